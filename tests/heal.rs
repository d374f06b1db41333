//! An upcycled mixture and the dense model that it was made from: what they share, and how it learns to be like it.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use peft::data::Batch;
use peft::model::{Decoder, Pretrained, Recompute, RouterLosses};
use peft::ops::distillation::Terms;
use peft::ops::{Gradients, Parameter, Trainables};
use peft::train::{
    AdamW, AdamWConfig, Objective, StepGradients, Teacher, balanced_step_gradients, objective_gradients,
    step_gradients,
};
use serde_json::{Value, json};

use crate::fixture::{difference, logits, values};
use crate::place::{Place, refusal};

const UPCYCLE: &str = r#"
task = "upcycle"
output = "mixture"
model = { source = "model" }
upcycle = { experts = 6, shared = 2, active = 2 }
calibration = { data = [{ path = "data.jsonl" }], tokens = 512, held_out = 128 }
"#;

/// A place with a mixture made of its model, and a recipe that heals it.
fn place() -> Place {
    let place = Place::new();
    fs::write(place.path("upcycle.toml"), UPCYCLE).unwrap();
    place.run(&["upcycle", "upcycle.toml"]);
    let recipe = fs::read_to_string(place.path("recipe.toml")).unwrap();
    let recipe = recipe.replace("source = \"model\"", "source = \"mixture\"");
    fs::write(place.path("heal.toml"), recipe + "distill = { teacher = \"model\" }\n").unwrap();
    place
}

fn pretrained(folder: &Path) -> Pretrained {
    Pretrained::open(folder.to_str().unwrap()).unwrap()
}

fn open(folder: &Path) -> Decoder {
    Decoder::open(&pretrained(folder), DType::F32, &Device::Cpu).unwrap()
}

/// Three documents, the first half of each only read.
fn batch() -> Batch {
    Batch {
        tokens: (0..60).map(|n| (n * n * 13 + 5) % 1000).collect(),
        supervised: (0..60).map(|n| n % 20 >= 10).collect(),
        documents: vec![0, 1, 2],
        offsets: vec![0, 20, 40, 60],
    }
}

/// The lines of steps.
fn steps(place: &Place, run: &str) -> Vec<Value> {
    let text = fs::read_to_string(place.path(run).join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line.get("loss").is_some()).collect()
}

fn adapter(place: &Place, run: &str) -> Vec<u8> {
    fs::read(place.path(run).join("adapter_model.safetensors")).unwrap()
}

const BALANCED: RouterLosses =
    RouterLosses { switch: 0.1, importance: 0.0, load: 0.0, load_std: 0.0, z: 0.0, pooled: false };

/// The same model with and without the note in its configuration: of the one routers are trained as they were before they
/// were scaled down; of the other we scale ourselves, values down before each forward and gradients after each backward.
#[test]
fn routers_are_trained_as_if_logits_were_multiplied() {
    let place = place();
    let marked = pretrained(&place.path("mixture"));
    let units: Vec<f64> = marked.config().sparse_layers().map(|(_, moe)| moe.router_unit()).collect();
    assert!(units.iter().all(|unit| *unit == 1.0 / 256.0), "{units:?}");
    let mut model = open(&place.path("mixture"));
    let before = logits(&model, &batch());
    model.unscale_routers().unwrap();
    assert_eq!(difference(&logits(&model, &batch()), &before), 0.0, "the same to the bit");
    let trainables = model.make_routers_trainable().unwrap();

    let config = place.path("mixture/config.json");
    let mut plain: Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    plain.as_object_mut().unwrap().remove("upcycled").unwrap();
    fs::write(config, plain.to_string()).unwrap();
    let mut other = open(&place.path("mixture"));
    other.unscale_routers().unwrap();
    let stored = other.make_routers_trainable().unwrap();
    let unit = 1.0 / 256.0;
    let ours: Trainables = stored
        .iter()
        .map(|(name, weight)| {
            let unscaled = (weight.as_tensor() / unit).unwrap();
            (Arc::clone(name), Var::from_tensor(&unscaled).unwrap())
        })
        .collect();

    let config = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() };
    let (mut one, mut another) =
        (AdamW::new(config, &trainables, false).unwrap(), AdamW::new(config, &ours, false).unwrap());
    let of = |model: &Decoder, trainables: &Trainables| -> StepGradients {
        balanced_step_gradients(model, trainables, &[batch()], None, Recompute::None, &BALANCED).unwrap()
    };
    for _ in 0..3 {
        let step = of(&model, &trainables);
        assert!(step.norm > 0.0);
        one.update(&trainables, &step.gradients, 1.0, 1e-2).unwrap();
        let step = of(&other, &stored);
        let mut gradients = Gradients::of(&ours);
        for (name, gradient) in step.gradients.iter() {
            let parameter = Parameter::new(Arc::clone(name), ours[name].as_tensor());
            gradients.add(&parameter, &(gradient.unwrap() * unit).unwrap()).unwrap();
        }
        another.update(&ours, &gradients, 1.0, 1e-2).unwrap();
        for (name, weight) in &stored {
            weight.set(&(ours[name].as_tensor() * unit).unwrap()).unwrap();
        }
    }
    for (name, weight) in &trainables {
        assert_eq!(difference(weight.as_tensor(), ours[name].as_tensor()), 0.0, "{name}");
    }
    assert_eq!(difference(&logits(&model, &batch()), &logits(&other, &batch())), 0.0);
    assert!(difference(&logits(&model, &batch()), &before) > 0.0);
}

/// Files hold routers as they are stored, weights and low-rank terms alike, and a resumed run goes on to the same bits.
#[test]
fn trained_routers_are_written_as_they_are_stored() {
    let place = place();
    let routers = |file: &str| -> Vec<(String, Tensor)> {
        let tensors = candle_core::safetensors::load(place.path(file), &Device::Cpu).unwrap();
        tensors.into_iter().filter(|(name, _)| name.ends_with("mlp.gate.weight")).collect()
    };
    let stored = routers("mixture/model.safetensors");
    for router in ["full", "lora"] {
        let set = format!("train.router={router}");
        let arguments =
            ["finetune", "heal.toml", "--output", router, "--set", &set, "--set", "losses.bias_update=0.1"];
        place.run(&arguments);
        let whole = adapter(&place, router);
        fs::remove_dir_all(place.path(router).join("checkpoint-6")).unwrap();
        place.run(&[&arguments[..], &["--resume"]].concat());
        assert!(adapter(&place, router) == whole, "{router}");
        let lines = fs::read_to_string(place.path(router).join("metrics.jsonl")).unwrap();
        let last: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
        place.run(&[
            "merge",
            "--model",
            "mixture",
            "--adapter",
            router,
            "--output",
            &format!("{router}-merged"),
        ]);
        // Of steps of 1e-2 in values whose stored size is 2^-8 of that.
        for (name, merged) in routers(&format!("{router}-merged/model.safetensors")) {
            let before = &stored.iter().find(|(own, _)| *own == name).unwrap().1;
            let moved = difference(&merged, before);
            assert!(moved > 0.0 && moved < 7.0 * 1e-2 / 256.0, "{router}: {name} moved by {moved}");
        }
        let held_out = last["eval_loss"].as_f64().unwrap();
        assert!(held_out.is_finite());
        let nll = |arguments: &[&str]| {
            let all =
                [&["eval", "perplexity", "--data", "data.jsonl", "--json", "--model"], arguments].concat();
            place.json(&all)["nll"].as_f64().unwrap()
        };
        let (beside, merged) = (nll(&["mixture", "--adapter", router]), nll(&[&format!("{router}-merged")]));
        assert!((beside - merged).abs() < 2e-3, "{router}: {beside} beside the weights, {merged} in them");
        // Going on with it begins where it ended.
        let further = format!("{router}-further");
        place.run(&[
            "finetune",
            "heal.toml",
            "--output",
            &further,
            "--set",
            &set,
            "--set",
            "train.steps=1",
            "--set",
            &format!("adapter.from={router}"),
            "--set",
            "adapter.rank=4",
        ]);
        let text = fs::read_to_string(place.path(&further).join("metrics.jsonl")).unwrap();
        let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        let begins = first["eval_loss"].as_f64().unwrap();
        assert!((begins - held_out).abs() < 1e-6, "{router}: ended with {held_out}, begins with {begins}");
    }
}

#[test]
fn a_teacher_shares_the_weights_that_are_the_same() {
    let place = place();
    let (student, teacher) = (pretrained(&place.path("mixture")), pretrained(&place.path("model")));
    let model = Decoder::open(&student, DType::F32, &Device::Cpu).unwrap();
    let beside = Decoder::open_beside(&teacher, DType::F32, &Device::Cpu, (&model, &student)).unwrap();
    let id = |model: &Decoder, path: &str| {
        let linear = model.linears().find(|linear| linear.path == path).unwrap();
        linear.weight.parameter().unwrap().tensor().id()
    };
    let q = "model.layers.1.self_attn.q_proj";
    assert_eq!(id(&model, q), id(&beside, q));
    assert_eq!(difference(&logits(&beside, &batch()), &logits(&open(&place.path("model")), &batch())), 0.0);
    // What is left are the feed-forward networks, which the mixture has in slices.
    let own: usize = beside
        .linears()
        .filter(|linear| linear.path.contains(".mlp."))
        .map(|linear| 4 * linear.weight.parameter().unwrap().tensor().elem_count())
        .sum();
    assert_eq!(teacher.bytes_beside(&student, DType::F32).unwrap(), own as u64);

    // A student that was trained has its own.
    fs::create_dir(place.path("trained")).unwrap();
    for name in place.names_in("model") {
        fs::copy(place.path("model").join(&name), place.path("trained").join(&name)).unwrap();
    }
    let file = place.path("trained/model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let name = format!("{q}.weight");
    let changed = tensors[&name].affine(1.5, 0.0).unwrap();
    tensors.insert(name.clone(), changed);
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let trained = pretrained(&place.path("trained"));
    assert!(!trained.has_same_bytes(&name, &teacher).unwrap());
    assert!(trained.has_same_bytes("model.embed_tokens.weight", &teacher).unwrap());
    let beside =
        Decoder::open_beside(&trained, DType::F32, &Device::Cpu, (&open(&place.path("model")), &teacher))
            .unwrap();
    assert_eq!(difference(&logits(&beside, &batch()), &logits(&open(&place.path("trained")), &batch())), 0.0);
}

/// A step that is cut into pieces learns the same; terms that do not count are not there.
#[test]
fn a_teachers_terms_are_means_over_the_learned_tokens() {
    let place = place();
    let teacher = open(&place.path("model"));
    let mut model = open(&place.path("mixture"));
    let trainables = model.make_routers_trainable().unwrap();
    let of = |batches: &[Batch], kl: f64, hidden: f64| {
        let terms = Terms { kl, temperature: 2.0, hidden };
        let teacher = Teacher { model: &teacher, terms };
        let objective = Objective { losses: RouterLosses::default(), teacher: Some(teacher) };
        objective_gradients(&model, &trainables, batches, None, Recompute::None, &objective).unwrap()
    };
    let whole = of(&[batch()], 1.0, 0.5);
    let pieces = of(&batch().pieces(20), 1.0, 0.5);
    assert_eq!(batch().pieces(20).len(), 3);
    let plain = step_gradients(&model, &trainables, &[batch()], None, Recompute::None).unwrap();
    assert_eq!(whole.loss, plain.loss);
    for (found, expected) in [(pieces.kl, whole.kl), (pieces.hidden, whole.hidden)] {
        let (found, expected) = (found.unwrap(), expected.unwrap());
        assert!(expected > 0.0 && (found - expected).abs() < 1e-6 * (1.0 + expected), "{found} {expected}");
    }
    for (name, gradient) in whole.gradients.iter() {
        let (found, expected) = (pieces.gradients.of_name(name).unwrap(), gradient.unwrap());
        let most = values(expected).iter().fold(0.0f32, |most, x| most.max(x.abs()));
        assert!(difference(found, expected) <= 1e-4 * most, "{name}");
        assert!(difference(plain.gradients.of_name(name).unwrap(), expected) > 1e-3 * most, "{name}");
    }
    let only = of(&[batch()], 0.0, 0.5);
    assert_eq!((only.kl, only.hidden), (None, whole.hidden));
}

#[test]
fn a_healing_run_goes_on_to_the_same_bits_and_tells_its_terms() {
    let place = place();
    place.run(&["finetune", "heal.toml", "--set", "distill.hidden=0.1"]);
    let told = steps(&place, "run");
    assert_eq!(told.len(), 6);
    assert!(
        told.iter().all(|line| line["kl"].as_f64().unwrap() > 0.0 && line["hidden"].as_f64().unwrap() > 0.0)
    );
    let whole = adapter(&place, "run");
    fs::remove_dir_all(place.path("run/checkpoint-6")).unwrap();
    place.run(&["finetune", "heal.toml", "--set", "distill.hidden=0.1", "--resume"]);
    assert!(adapter(&place, "run") == whole);

    // `loss` is that of the text alone.
    place.run(&[
        "finetune",
        "heal.toml",
        "--set",
        "distill.kl=0",
        "--set",
        "distill.hidden=0.1",
        "--output",
        "kl-less",
    ]);
    let less = steps(&place, "kl-less");
    assert_eq!((less[0].get("kl"), &less[0]["loss"]), (None, &told[0]["loss"]));
    assert!(adapter(&place, "kl-less") != whole);

    // Another teacher under the same name.
    fs::remove_dir_all(place.path("run/checkpoint-6")).unwrap();
    let file = place.path("model/model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let norm = tensors["model.norm.weight"].affine(2.0, 0.0).unwrap();
    tensors.insert("model.norm.weight".to_string(), norm);
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let text = refusal(&place, &["finetune", "heal.toml", "--set", "distill.hidden=0.1", "--resume"]);
    assert!(text.contains("the teacher is not the one that the run was started with"), "{text}");
}

#[test]
fn teachers_that_cannot_teach_are_refused_before_any_work() {
    let place = place();
    let change = |folder: &str, change: &dyn Fn(&Path)| {
        fs::create_dir(place.path(folder)).unwrap();
        for name in place.names_in("model") {
            fs::copy(place.path("model").join(&name), place.path(folder).join(&name)).unwrap();
        }
        change(&place.path(folder));
    };
    change("renamed", &|folder| {
        let file = folder.join("tokenizer.json");
        let mut tokenizer: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        let words = tokenizer["model"]["vocab"].as_object_mut().unwrap();
        let (word, last) = (words.keys().next().unwrap().clone(), words.keys().next_back().unwrap().clone());
        let (one, other) = (words[&word].clone(), words[&last].clone());
        words.insert(word, other);
        words.insert(last, one);
        fs::write(file, tokenizer.to_string()).unwrap();
    });
    change("larger", &|folder| {
        let file = folder.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        config["vocab_size"] = json!(config["vocab_size"].as_u64().unwrap() + 8);
        fs::write(file, config.to_string()).unwrap();
        let file = folder.join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
        let longer = tensors["model.embed_tokens.weight"].pad_with_zeros(0, 0, 8).unwrap();
        tensors.insert("model.embed_tokens.weight".to_string(), longer);
        candle_core::safetensors::save(&tensors, &file).unwrap();
    });
    for (teacher, said) in
        [("modell", "distill.teacher"), ("renamed", "knows other tokens"), ("larger", "has a vocabulary of")]
    {
        let set = format!("distill.teacher={teacher}");
        for command in ["check", "finetune"] {
            let text = refusal(&place, &[command, "heal.toml", "--set", &set]);
            assert!(text.contains(said), "{command} {teacher}: {text}");
        }
        assert!(!place.path("run").exists());
    }
}

/// The recipes of the repository on its tiny model, with fewer steps and less text to calibrate on.
#[test]
fn a_healed_mixture_is_nearer_to_the_dense_model() {
    let place = Place::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for folder in ["examples", "datasets", "recipes"] {
        std::os::unix::fs::symlink(root.join(folder), place.path(folder)).unwrap();
    }
    place.run(&[
        "upcycle",
        "recipes/upcycle-tiny.toml",
        "--set",
        "calibration.tokens=4096",
        "--set",
        "calibration.held_out=512",
        "--set",
        "upcycle.verify=false",
    ]);
    let heal = ["finetune", "recipes/upcycle-heal.toml", "--set", "train.eval_every=0"];
    place.run(&[&heal[..], &["--set", "train.steps=16", "--set", "train.warmup=0"]].concat());
    let told = steps(&place, "runs/upcycle-heal");
    assert!(told[15]["kl"].as_f64() < told[0]["kl"].as_f64());
    // PEFT loads a module whole: with the weight of a router goes its bias, which is not trained.
    let file = place.path("runs/upcycle-heal/adapter_model.safetensors");
    let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let of_routers = |ending: &str| tensors.keys().filter(|name| name.ends_with(ending)).count();
    assert_eq!(of_routers("mlp.gate.weight"), 5);
    assert_eq!(of_routers("mlp.gate.e_score_correction_bias"), 5);
    place.run(&[
        "merge",
        "--model",
        "models/upcycle-tiny",
        "--adapter",
        "runs/upcycle-heal",
        "--output",
        "models/healed-tiny",
    ]);
    let nll = |model: &str| {
        let data = "datasets/tiny-world-eval.jsonl";
        place.json(&["eval", "perplexity", "--model", model, "--data", data, "--json"])["nll"]
            .as_f64()
            .unwrap()
    };
    let (dense, cut, healed) =
        (nll("examples/tiny-llama"), nll("models/upcycle-tiny"), nll("models/healed-tiny"));
    assert!(healed - dense < 0.7 * (cut - dense), "{dense} dense, {cut} cut, {healed} healed");
    let (told, _) = place.run(&[
        "generate",
        "--model",
        "models/healed-tiny",
        "--raw",
        "--prompt",
        "On Tuesday, Ida heard",
        "--max-new-tokens",
        "8",
    ]);
    assert!(!told.trim().is_empty());
}
