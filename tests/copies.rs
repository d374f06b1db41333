use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use peft::model::{Decoder, Pretrained};
use peft::ops::Documents;
use peft::weights::Checkpoint;
use serde_json::{Value, json};

use super::moe::sparse_place_of;
use super::place::{Place, refusal};
use super::upcycle::{dense, difference, logits, open, place, report};

fn rewrite(folder: &Path, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let path = folder.join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

fn checkpoint(place: &Place, folder: &str) -> Checkpoint {
    Checkpoint::open(place.path(folder).to_str().unwrap()).unwrap()
}

#[test]
fn copies_are_the_dense_model_however_many_are_active() {
    let place = place();
    for (method, format) in [("copy", "mixtral"), ("copy", "glm4_moe"), ("virtual-groups", "mixtral")] {
        let output = format!("{method}-{format}");
        let sets = [
            format!("upcycle.method={method}"),
            format!("upcycle.format={format}"),
            "upcycle.experts=4".to_string(),
            "upcycle.shared=0".to_string(),
        ];
        let mut arguments = vec!["upcycle", "upcycle.toml", "--output", &output];
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        place.run(&arguments);
        let groups = if method == "copy" { 1 } else { 4 };
        for active in [1, 2, 4] {
            let mixture = open(&place.path(&output), |config| {
                config["num_experts_per_tok"] = (active * groups).into();
            });
            let found = difference(&logits(&mixture), &dense(&place));
            assert!(found < 2e-3, "{output} at {active}: {found}");
        }
    }
}

fn warnings(place: &Place, folder: &str) -> String {
    report(place, folder)["warnings"].as_array().unwrap().iter().map(|line| format!("{line}\n")).collect()
}

/// A router of zeros takes the first experts for every token; what a router was not made from, it is measured on.
#[test]
fn copies_that_get_no_token_are_named() {
    let place = place();
    let mut arguments = vec!["upcycle", "upcycle.toml"];
    for set in ["upcycle.method=copy", "upcycle.experts=4", "upcycle.shared=0", "upcycle.router=zero"] {
        arguments.extend(["--set", set]);
    }
    place.run(&arguments);
    let told = warnings(&place, "mixture");
    assert!(told.contains("expert 2 of layer 0, expert 3 of layer 0, expert 2 of layer 1, "), "{told}");
    assert!(told.contains(" tokens of the built-in neutral text there, so they learn nothing"), "{told}");
    place.run(&[&arguments[..], &["--set", "upcycle.active=4", "--output", "all"]].concat());
    let told = warnings(&place, "all");
    assert!(!told.contains("the router sends 0 of"), "{told}");
}

/// A dense model with norms of q and k, which `qwen3_moe` can hold.
fn qwen3() -> Place {
    let place = place();
    let folder = place.path("model");
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config["model_type"] = "qwen3".into();
    config["architectures"] = json!(["Qwen3ForCausalLM"]);
    let head = config["head_dim"].as_u64().unwrap() as usize;
    let layers = config["num_hidden_layers"].as_u64().unwrap();
    fs::write(path, config.to_string()).unwrap();
    rewrite(&folder, |tensors| {
        for layer in 0..layers {
            for norm in ["q_norm", "k_norm"] {
                let weight = Tensor::ones(head, DType::F32, &Device::Cpu).unwrap();
                tensors.insert(format!("model.layers.{layer}.self_attn.{norm}.weight"), weight);
            }
        }
    });
    place
}

#[test]
fn a_model_with_norms_of_q_and_k_becomes_a_qwen3_moe() {
    let place = qwen3();
    let set =
        ["--set", "upcycle.format=qwen3_moe", "--set", "upcycle.shared=0", "--set", "upcycle.experts=4"];
    place.run(&[&["upcycle", "upcycle.toml"], &set[..]].concat());
    let guarantees = report(&place, "mixture")["guarantees"].clone();
    assert_eq!((&guarantees[0]["promised"], &guarantees[0]["holds"]), (&true.into(), &true.into()));
    place.run(
        &[&["upcycle", "upcycle.toml", "--output", "copies", "--set", "upcycle.method=copy"], &set[..]]
            .concat(),
    );
    for active in [1, 3] {
        let mixture = open(&place.path("copies"), |config| {
            assert_eq!(config["model_type"], "qwen3_moe");
            config["num_experts_per_tok"] = active.into();
        });
        let found = difference(&logits(&mixture), &dense(&place));
        assert!(found < 2e-3, "{active}: {found}");
    }
}

#[test]
fn a_mix_has_the_networks_of_its_checkpoints() {
    let place = place();
    fs::create_dir(place.path("other")).unwrap();
    for name in place.names_in("model") {
        fs::copy(place.path("model").join(&name), place.path("other").join(&name)).unwrap();
    }
    rewrite(&place.path("other"), |tensors| {
        tensors.values_mut().for_each(|tensor| *tensor = (&*tensor * 1.5).unwrap());
    });
    let mix = [
        "upcycle",
        "upcycle.toml",
        "--log",
        "silent",
        "--set",
        "upcycle={ method = \"mix\", sources = [\"other\"], active = 1 }",
    ];
    place.run(&mix);
    let (mixture, first, other) =
        (checkpoint(&place, "mixture"), checkpoint(&place, "model"), checkpoint(&place, "other"));
    for (expert, source) in [(0, &first), (1, &other)] {
        for (theirs, ours) in [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")] {
            let theirs = format!("model.layers.2.block_sparse_moe.experts.{expert}.{theirs}.weight");
            let ours = format!("model.layers.2.mlp.{ours}.weight");
            assert!(mixture.bytes(&theirs).unwrap() == source.bytes(&ours).unwrap(), "{theirs}");
        }
    }
    let name = "model.layers.2.self_attn.q_proj.weight";
    assert!(mixture.bytes(name).unwrap() == first.bytes(name).unwrap());
    open(&place.path("other"), |config| config["rms_norm_eps"] = 1e-3.into());
    insta::assert_snapshot!(refusal(&place, &[&mix[..], &["--output", "again"]].concat()), @"
    exit 2
    error: the `config.json` of `other` describes another model than that of `model`
    hint: `mix` takes fine-tunes of one model
    ");
}

#[test]
fn prompts_go_to_the_expert_that_they_stand_for() {
    let place = place();
    let prompts = [["kite box kite", "where is the kite?"], ["The captain sails.", "Rain falls at sea."]];
    let set = format!(
        "upcycle={{ method = \"copy\", experts = 2, active = 1, router = \"prompts\", prompts = {} }}",
        json!(prompts)
    );
    let upcycle = ["upcycle", "upcycle.toml", "--set", &set];
    place.run(&upcycle);
    let base = Pretrained::open(place.path("mixture").to_str().unwrap()).unwrap();
    let text = peft::run::text_of(&base, &Default::default(), Default::default()).unwrap();
    let model = Decoder::open(&base, DType::F32, &Device::Cpu).unwrap();
    for (expert, prompts) in prompts.iter().enumerate() {
        let tokens: Vec<u32> =
            prompts.iter().flat_map(|prompt| text.encode_document(prompt).unwrap()).collect();
        let first = text.encode_document(prompts[0]).unwrap().len();
        let documents = Documents::new(vec![0, first, tokens.len()], vec![0, 1]);
        for routing in model.forward(&tokens, &documents).unwrap().routing {
            let means: Vec<f32> = routing.logits.mean(0).unwrap().to_vec1().unwrap();
            assert!(
                means[expert] > means[1 - expert],
                "layer {}: {means:?} of prompts {expert}",
                routing.layer
            );
        }
    }
    let three = set.replace("experts = 2", "experts = 3");
    insta::assert_snapshot!(refusal(&place, &["upcycle", "upcycle.toml", "--log", "silent", "--output", "again", "--set", &three]), @r#"
    exit 2
    error: `--set upcycle={ method = "copy", experts = 3, active = 1, router = "prompts", prompts = [["kite box kite","where is the kite?"],["The captain sails.","Rain falls at sea."]] }`: `upcycle.prompts` has 2 lists, and there are 3 experts
    hint: give a list of prompts for each expert
    "#);
}

const EXPAND: &str = r#"
task = "upcycle"
output = "more"
model = { source = "model" }
upcycle = { method = "expand", experts = 2 }
calibration = { data = [{ path = "data.jsonl" }], tokens = 256, held_out = 64 }
"#;

fn expandable(family: &str, class: &str) -> Place {
    let place = sparse_place_of(family, class);
    fs::write(place.path("expand.toml"), EXPAND).unwrap();
    place
}

#[test]
fn experts_more_sleep_where_the_choice_has_a_bias() {
    let place = expandable("glm4_moe", "Glm4MoeForCausalLM");
    place.run(&["upcycle", "expand.toml"]);
    let guarantees = report(&place, "more")["guarantees"].clone();
    assert_eq!((&guarantees[0]["promised"], &guarantees[0]["holds"]), (&true.into(), &true.into()));
    let before = logits(&open(&place.path("model"), |_| {}));
    let more = open(&place.path("more"), |config| assert_eq!(config["n_routed_experts"], 6));
    assert_eq!(difference(&logits(&more), &before), 0.0);
    // What was there is there to the byte, routers first.
    let (old, new) = (checkpoint(&place, "model"), checkpoint(&place, "more"));
    for name in old.tensors().keys() {
        assert!(new.bytes(name).unwrap().starts_with(old.bytes(name).unwrap()), "{name}");
    }
    let copied = report(&place, "more")["copied"]["1"].clone();
    for (number, original) in copied.as_array().unwrap().iter().enumerate() {
        for projection in ["gate_proj", "up_proj", "down_proj"] {
            let of = |expert: u64| format!("model.layers.1.mlp.experts.{expert}.{projection}.weight");
            let (copy, original) = (of(4 + number as u64), of(original.as_u64().unwrap()));
            assert!(new.bytes(&copy).unwrap() == old.bytes(&original).unwrap(), "{copy}");
        }
    }
    drop((old, new));
    // Awake they are chosen: the bias alone keeps them out.
    rewrite(&place.path("more"), |tensors| {
        let name = "model.layers.1.mlp.gate.e_score_correction_bias";
        let awake = Tensor::new(&[0f32, 0.0, 0.0, 0.0, 5.0, 5.0], &Device::Cpu).unwrap();
        assert_eq!(tensors.insert(name.to_string(), awake).unwrap().dims(), [6]);
    });
    assert!(difference(&logits(&open(&place.path("more"), |_| {})), &before) > 1e-3);
}

#[test]
fn experts_more_without_a_bias_are_measured_and_not_promised() {
    let place = expandable("qwen2_moe", "Qwen2MoeForCausalLM");
    let (_, told) = place.run(&["upcycle", "expand.toml", "--set", "upcycle.drop_ratio=0.5"]);
    assert!(told.contains("1 layer has 6 experts now, 2 of them new"), "{told}");
    let guarantee = report(&place, "more")["guarantees"][0].clone();
    assert_eq!(guarantee["promised"], false);
    let new = checkpoint(&place, "more");
    let copied = report(&place, "more")["copied"]["1"][0].as_u64().unwrap();
    let rows = |expert: u64| -> Vec<Vec<f32>> {
        let name = format!("model.layers.1.mlp.experts.{expert}.gate_proj.weight");
        new.read(&name, DType::F32, &Device::Cpu).unwrap().to_vec2().unwrap()
    };
    let same = rows(4).iter().zip(rows(copied)).filter(|(new, old)| *new == old).count();
    assert_eq!(same, 8, "half of 16 neurons are drawn anew");
    // The same seed gives the same experts.
    place.run(&["upcycle", "expand.toml", "--set", "upcycle.drop_ratio=0.5", "--output", "again"]);
    let bytes = |folder: &str| fs::read(place.path(folder).join("model.safetensors")).unwrap();
    assert!(bytes("more") == bytes("again"));
}

/// With equal rows the first experts are taken for every token, so the others are copied without use.
#[test]
fn copies_of_experts_that_get_no_token_are_named() {
    let place = expandable("qwen2_moe", "Qwen2MoeForCausalLM");
    let (_, told) = place.run(&["upcycle", "expand.toml"]);
    assert!(!told.contains("new experts are copies of them"), "{told}");
    rewrite(&place.path("model"), |tensors| {
        let router = tensors.get_mut("model.layers.1.mlp.gate.weight").unwrap();
        *router = router.zeros_like().unwrap();
    });
    place.run(&["upcycle", "expand.toml", "--set", "upcycle.experts=4", "--output", "idle"]);
    let told = warnings(&place, "idle");
    assert!(told.contains("expert 3 of layer 1: the router sends 0 of "), "{told}");
    assert!(told.contains(" calibration tokens there, and new experts are copies of them"), "{told}");
    assert!(told.contains("expert 7 of layer 1: the router sends 0 of "), "{told}");
    assert!(told.contains(" measured tokens there, so these new experts learn nothing"), "{told}");
}

#[test]
fn every_family_of_one_tensor_per_expert_takes_more() {
    for (family, class, experts) in [
        ("mixtral", "MixtralForCausalLM", 8),
        ("qwen3_moe", "Qwen3MoeForCausalLM", 4),
        ("olmoe", "OlmoeForCausalLM", 4),
    ] {
        let place = expandable(family, class);
        if family == "mixtral" {
            open(&place.path("model"), |config| config["num_local_experts"] = experts.into());
        }
        place.run(&["upcycle", "expand.toml"]);
        let base = Pretrained::open(place.path("model").to_str().unwrap()).unwrap();
        let more = Pretrained::open(place.path("more").to_str().unwrap()).unwrap();
        let counts: Vec<usize> = more.config().sparse_layers().map(|(_, moe)| moe.experts).collect();
        assert_eq!(counts, vec![experts + 2; base.config().sparse_layers().count()], "{family}");
        assert_eq!(more.checkpoint().tensors().len(), base.checkpoint().tensors().len() + counts.len() * 6);
        for name in base.checkpoint().tensors().keys() {
            let bytes = |model: &Pretrained| model.checkpoint().bytes(name).unwrap().to_vec();
            assert!(bytes(&more).starts_with(&bytes(&base)), "{family}: {name}");
        }
        let guarantee = report(&place, "more")["guarantees"][0].clone();
        assert_eq!(guarantee["promised"], false, "{family}");
    }
}

#[test]
fn what_cannot_have_experts_more_is_refused() {
    let dense = place();
    fs::write(dense.path("expand.toml"), EXPAND).unwrap();
    let refused = |place: &Place, sets: &[&str]| {
        refusal(place, &[&["upcycle", "expand.toml", "--log", "silent"], sets].concat())
    };
    insta::assert_snapshot!(refused(&dense, &[]), @r#"
    exit 2
    error: `model` is not a mixture of experts
    hint: `upcycle.method = "copy"` or `"split"` makes one of a dense model
    "#);
    insta::assert_snapshot!(refused(&dense, &["--set", "upcycle.active=3"]), @r#"
    exit 2
    error: `--set upcycle.active=3`: `upcycle.active` does nothing with `upcycle.method = "expand"`: a token keeps the number of experts that it has in the mixture
    hint: leave it out; `num_experts_per_tok` of the mixture's `config.json` says the number
    "#);
    let sparse = expandable("qwen2_moe", "Qwen2MoeForCausalLM");
    insta::assert_snapshot!(refused(&sparse, &["--set", "upcycle.router=ridge"]), @r#"
    exit 2
    error: `upcycle.router` does nothing with `upcycle.method = "expand"`: a new expert starts from the router row of the expert that it copies
    hint: leave `upcycle.router` out
    "#);
    rewrite(&sparse.path("model"), |tensors| {
        let take = |tensors: &mut HashMap<String, Tensor>, expert: usize, projection: &str| {
            tensors.remove(&format!("model.layers.1.mlp.experts.{expert}.{projection}.weight")).unwrap()
        };
        let both = (0..4).map(|e| {
            let both = [take(tensors, e, "gate_proj"), take(tensors, e, "up_proj")];
            Tensor::cat(&both, 0).unwrap()
        });
        let both = Tensor::stack(&both.collect::<Vec<_>>(), 0).unwrap();
        let down =
            Tensor::stack(&(0..4).map(|e| take(tensors, e, "down_proj")).collect::<Vec<_>>(), 0).unwrap();
        tensors.insert("model.layers.1.mlp.experts.gate_up_proj".to_string(), both);
        tensors.insert("model.layers.1.mlp.experts.down_proj".to_string(), down);
    });
    insta::assert_snapshot!(refused(&sparse, &[]), @"
    exit 2
    error: the experts of `model` lie in one tensor, `model.layers.1.mlp.experts.gate_up_proj`; experts are added to a safetensors folder with one tensor per expert
    hint: mixtral, qwen2_moe, qwen3_moe, olmoe and glm4_moe are stored so on the Hub
    ");
}
