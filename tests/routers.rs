//! Adapters of mixtures through several runs, and what of routing a run says and refuses.

use std::collections::{BTreeMap, HashMap};
use std::fs;

use candle_core::{Device, Tensor};
use peft::adapter::{LoraConfig, Patterns, Targets, hf, init, resolve};
use serde_json::{Value, json};

use crate::fixture::{Fixture, difference};
use crate::moe::{sparse_place, sparse_place_of};
use crate::place::{Place, refusal};

/// The command with these keys set.
fn set<'a>(command: &[&'a str], keys: &[&'a str]) -> Vec<&'a str> {
    command.iter().copied().chain(keys.iter().flat_map(|key| ["--set", *key])).collect()
}

fn finetune(place: &Place, keys: &[&str]) {
    place.run(&set(&["finetune", "recipe.toml", "--log", "silent"], keys));
}

fn refused(place: &Place, keys: &[&str]) -> String {
    refusal(place, &set(&["check", "recipe.toml"], keys))
}

/// Of the last evaluation of a run.
fn last_eval_loss(place: &Place, run: &str) -> f64 {
    let text = fs::read_to_string(place.path(run).join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|line| line["eval_loss"].as_f64()).next_back().unwrap()
}

fn tensors(place: &Place, run: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(place.path(run).join("adapter_model.safetensors"), &Device::Cpu).unwrap()
}

/// Trained routers are part of the adapter that a further run goes on with: what it measures is what it writes.
#[test]
fn routers_of_an_earlier_run_stay_in_the_adapter() {
    for (family, class, keys) in [
        ("qwen2_moe", "Qwen2MoeForCausalLM", &["train.router=full"][..]),
        ("mixtral", "MixtralForCausalLM", &["train.router=full"]),
        ("granitemoe", "GraniteMoeForCausalLM", &["train.router=full"]),
        ("glm4_moe", "Glm4MoeForCausalLM", &["train.router=full"]),
        ("glm4_moe", "Glm4MoeForCausalLM", &["losses.bias_update=0.5"]),
    ] {
        let place = sparse_place_of(family, class);
        let recipe = fs::read_to_string(place.path("recipe.toml")).unwrap();
        let recipe = recipe.replace("eval_share = 0.2", "eval = [{ path = \"data.jsonl\" }]");
        fs::write(place.path("recipe.toml"), recipe).unwrap();
        finetune(&place, &[keys, &["train.learning_rate=0.1"]].concat());
        let routers = |run: &str| -> BTreeMap<String, Tensor> {
            tensors(&place, run).into_iter().filter(|(name, _)| !name.contains(".lora_")).collect()
        };
        let earlier = routers("run");
        assert!(!earlier.is_empty());
        finetune(&place, &["adapter.from=run", "output=further", "train.steps=2"]);
        let further = routers("further");
        assert_eq!(further.keys().collect::<Vec<_>>(), earlier.keys().collect::<Vec<_>>(), "{family}");
        for (name, tensor) in &earlier {
            assert_eq!(difference(&further[name], tensor), 0.0, "{family}: {name}");
        }
        let arguments =
            ["eval", "perplexity", "--model", "model", "--adapter", "further", "--data", "data.jsonl"];
        let measured = place.json(&[&arguments[..], &["--max-length", "32", "--json"]].concat());
        let (found, expected) = (measured["nll"].as_f64().unwrap(), last_eval_loss(&place, "further"));
        assert!(
            (found - expected).abs() < 1e-5,
            "{family} {keys:?}: {found} from the files, {expected} in the run"
        );
        // A run that goes on from its checkpoint has them too.
        let whole = fs::read(place.path("further/adapter_model.safetensors")).unwrap();
        place.run(&set(
            &["finetune", "recipe.toml", "--resume", "--log", "silent"],
            &["adapter.from=run", "output=further", "train.steps=2"],
        ));
        assert_eq!(fs::read(place.path("further/adapter_model.safetensors")).unwrap(), whole);
    }
}

#[test]
fn a_recipe_that_asks_for_another_adapter_than_it_goes_on_with_is_refused() {
    let place = sparse_place();
    finetune(&place, &["adapter.experts=[0, 2]", "adapter.shared_experts=false"]);
    let from = "adapter.from=run";
    insta::assert_snapshot!(refused(&place, &[from, "train.router=lora"]), @r#"
    exit 2
    error: `train.router` is "lora", and the adapter in `adapter.from` has no low-rank terms on routers
    hint: train the routers' weights with `train.router = "full"`, or begin with a fresh adapter
    "#);
    insta::assert_snapshot!(
        refused(&place, &[from, "adapter.experts=[0, 1]", "adapter.shared_experts=true"]), @"
    exit 2
    error: the adapter in `adapter.from` is another one: `adapter.experts` are not its experts, which are 0, 2; `adapter.shared_experts` is true, and it has no terms on shared experts
    hint: leave these keys out: it keeps its own
    ");
    for keys in [&["adapter.experts=true"][..], &["adapter.experts=false"]] {
        assert!(refused(&place, &[&[from], keys].concat()).contains("which are 0, 2"));
    }
    // As it is, or not said.
    let same = ["adapter.experts=[2, 0]", "adapter.shared_experts=false"];
    for keys in [&same[..], &[]] {
        finetune(&place, &[&[from, "output=further"], keys].concat());
        fs::remove_dir_all(place.path("further")).unwrap();
    }
}

/// An adapter with terms on routers goes on with them, whether its targets are said again or not.
#[test]
fn low_rank_terms_on_routers_are_trained_further() {
    let place = sparse_place();
    finetune(&place, &["train.router=lora"]);
    finetune(&place, &["adapter.from=run", "output=further", "train.router=lora"]);
    let targets = r#"adapter.targets=["gate_proj", "up_proj", "down_proj"]"#;
    finetune(&place, &["adapter.from=further", "output=third", "train.router=lora", targets]);
    place.run(&["merge", "--model", "model", "--adapter", "third", "--output", "merged"]);
}

#[test]
fn experts_that_are_not_there_are_refused() {
    insta::assert_snapshot!(refused(&sparse_place(), &["adapter.experts=[0, 9]"]), @"
    exit 2
    error: `adapter.experts` has 9, and `model` has 4 experts
    hint: experts are numbered from 0 to 3
    ");
}

/// Granite's gate and up are written as one product of both ranks, of which each gets its own back.
#[test]
fn ranks_stay_what_they_are_from_run_to_run() {
    let place = sparse_place_of("granitemoe", "GraniteMoeForCausalLM");
    finetune(&place, &[]);
    finetune(&place, &["adapter.from=run", "output=second"]);
    finetune(&place, &["adapter.from=second", "output=third"]);
    let shapes = |run: &str| -> BTreeMap<String, Vec<usize>> {
        tensors(&place, run).into_iter().map(|(name, tensor)| (name, tensor.dims().to_vec())).collect()
    };
    let of_gate_up = "base_model.model.model.layers.0.block_sparse_moe.experts.base_layer.lora_A.weight";
    // Eight experts, of gate and up rank 4 each.
    assert_eq!(shapes("run")[of_gate_up], [8 * (4 + 4), 32]);
    assert_eq!(shapes("second"), shapes("run"));
    assert_eq!(shapes("third"), shapes("run"));
    let arguments = ["eval", "perplexity", "--model", "model", "--adapter", "third", "--data", "data.jsonl"];
    place.run(&arguments);
}

/// PEFT has one rank for all experts' gate and up, the sum of both, and looks nowhere else for it.
#[test]
fn ranks_of_experts_are_written_for_peft() {
    let fixture = Fixture::open("qwen2_moe");
    let base = fixture.pretrained();
    for (rslora, alphas) in [(false, [24, 8]), (true, [17, 8])] {
        let of_experts = |gate_up, down| {
            let pattern = |name: &str| format!(r".*\.experts\.\d+\.{name}");
            [("gate_proj", gate_up), ("up_proj", gate_up), ("down_proj", down)].map(|(n, v)| (pattern(n), v))
        };
        let config = LoraConfig {
            rank: 3,
            alpha: Some(6.0),
            rslora,
            targets: Targets::names(["gate_proj", "up_proj", "down_proj"]),
            rank_pattern: Patterns(of_experts(6, 4).to_vec()),
            alpha_pattern: Patterns(of_experts(12, 8).map(|(n, v)| (n, v as f64)).to_vec()),
            ..LoraConfig::default()
        };
        let placements = resolve(&config, base.config()).unwrap();
        let tensors = init::fresh(&config, &placements.placements, base.config(), &Device::Cpu).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        hf::write(folder.path(), &config, &placements, tensors, &hf::Provenance::default()).unwrap();
        let written = fs::read(folder.path().join("adapter_config.json")).unwrap();
        let written: Value = serde_json::from_slice(&written).unwrap();
        let (gate_up, down) = (r".*\.gate_up_proj", r".*\.experts\.down_proj");
        assert_eq!([&written["rank_pattern"][gate_up], &written["rank_pattern"][down]], [12, 4]);
        let found = [gate_up, down].map(|p| written["alpha_pattern"][p].as_f64().unwrap().round() as i64);
        assert_eq!(found, alphas, "rslora {rslora}");
    }
}

/// PEFT takes the last part of a module's path for its name.
#[test]
fn routers_are_read_by_whatever_name_peft_has_for_them() {
    let place = sparse_place();
    finetune(&place, &["train.router=full"]);
    let measured = || {
        let arguments =
            ["eval", "perplexity", "--model", "model", "--adapter", "run", "--data", "data.jsonl"];
        place.json(&[&arguments[..], &["--json"]].concat())["nll"].as_f64().unwrap()
    };
    let expected = measured();
    let path = place.path("run/adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["modules_to_save"] = json!(["gate"]);
    fs::write(path, config.to_string()).unwrap();
    assert_eq!(measured().to_bits(), expected.to_bits());
}

/// One expert whose weight is divided by itself: nothing depends on the router.
#[test]
fn routers_that_nothing_reaches_are_refused() {
    let place = sparse_place_of("mixtral", "MixtralForCausalLM");
    let keys = ["routing.active=1", "train.router=full"];
    insta::assert_snapshot!(refused(&place, &keys), @r#"
    exit 2
    error: routers would get no gradient: one expert of a token is active, and its weight in `model` is always 1, as the weights of the chosen sum to one
    hint: train with `losses.switch`, or with two active experts or more, or leave `train.router` "frozen"
    "#);
    finetune(&place, &[&keys[..], &["losses.switch=0.1", "train.steps=12"]].concat());
    place.run(&set(&["check", "recipe.toml"], &["routing.active=1"]));
    // Scores that are not divided have a gradient.
    finetune(&sparse_place(), &[&keys[..], &["train.steps=12"]].concat());
}

#[test]
fn the_number_of_active_experts_goes_with_what_can_say_it() {
    let place = sparse_place();
    let report = |keys: &[&str]| place.json(&set(&["check", "recipe.toml", "--json"], keys));
    assert_eq!(report(&["routing.active=2"])["warnings"], json!([]));
    let warnings = report(&["routing.active=1"])["warnings"].to_string();
    insta::assert_snapshot!(warnings, @r#"["`routing.active` is 1 in this run alone: `peft eval`, `generate` and `merge` take the model's own 2 experts of a token"]"#);

    let recipe = fs::read_to_string(place.path("recipe.toml")).unwrap();
    let recipe = recipe.replace("adapter = { rank = 4, dropout = 0.1 }\n", "");
    let recipe = recipe.replace("eval_share = 0.2", "eval = [{ path = \"data.jsonl\" }]");
    fs::write(place.path("recipe.toml"), recipe).unwrap();
    let keys = ["train.full=true", "routing.active=1"];
    assert!(!report(&keys)["warnings"].to_string().contains("routing.active"));
    finetune(&place, &keys);
    let config: Value = serde_json::from_slice(&fs::read(place.path("run/config.json")).unwrap()).unwrap();
    assert_eq!(config["num_experts_per_tok"], json!(1));
    let arguments = ["eval", "perplexity", "--model", "run", "--data", "data.jsonl"];
    let measured = place.json(&[&arguments[..], &["--max-length", "32", "--json"]].concat());
    let (found, expected) = (measured["nll"].as_f64().unwrap(), last_eval_loss(&place, "run"));
    assert!((found - expected).abs() < 1e-5, "{found} from the files, {expected} in the run");
}

#[test]
fn a_plan_says_how_experts_are_chosen() {
    let lines = |keys: &[&str]| {
        let report = sparse_place().json(&set(&["check", "recipe.toml", "--json"], keys));
        let lines: Vec<String> = report["lines"]
            .as_array()
            .unwrap()
            .iter()
            .map(|line| line.as_str().unwrap().to_string())
            .skip_while(|line| !line.starts_with("routers:"))
            .take_while(|line| !line.starts_with("train:"))
            .collect();
        assert!(lines.iter().all(|line| line.len() <= 80), "{lines:?}");
        lines.join("\n")
    };
    insta::assert_snapshot!(lines(&[]), @"routers: frozen, 2 of 4 experts active");
    insta::assert_snapshot!(lines(&["train.router=full", "losses.switch=0.01", "routing.noise=learned"]), @"
    routers: trained whole, 2 of 4 experts active, learned noise
    balance: switch 0.01
    ");
    insta::assert_snapshot!(lines(&[
        "train.router=lora",
        "losses.switch=0.0123",
        "losses.importance=0.0123",
        "losses.load=0.0123",
        "losses.load_std=0.0123",
        "losses.z=0.00123",
        "losses.pooled=true",
        "routing.noise=gaussian",
        "routing.kind=hash",
        "routing.capacity_factor=1.25",
        "routing.capacity_warmup=3",
        "routing.overflow=reroute",
    ]), @"
    routers: low-rank terms trained, 2 of 4 experts active, gaussian noise,
      chosen by the token, capacity 1.25 from step 3 (reroute)
    balance: switch 0.0123, importance 0.0123, load 0.0123, load_std 0.0123,
      z 0.00123, pooled over layers
    ");
}

/// Losses on routers are those of the tokens computed at once, which a budget fixes.
#[test]
fn a_run_that_follows_free_memory_says_so() {
    let place = sparse_place();
    let records: String = (0..600)
        .map(|n| format!("{{\"prompt\": \"Where is kite {n}?\", \"completion\": \" In box {n}.\"}}\n"))
        .collect();
    fs::write(place.path("data.jsonl"), records).unwrap();
    let warnings = |keys: &[&str]| {
        let report = place.json(&set(&["check", "recipe.toml", "--json"], keys));
        report["warnings"]
            .as_array()
            .unwrap()
            .iter()
            .map(|w| w.as_str().unwrap().to_string())
            .collect::<Vec<_>>()
    };
    let large = ["train.batch_size=64", "losses.z=0.1"];
    insta::assert_snapshot!(warnings(&large).join("\n"), @"losses on routers are taken over the tokens computed at once, 1,024 of a batch, and these follow the memory that is free: set `train.memory_budget` for a run that can be repeated");
    assert!(
        warnings(&["train.batch_size=64", "routing.capacity_factor=1.5"])[0]
            .contains("the capacity of experts is")
    );
    let empty: [&str; 0] = [];
    assert_eq!(warnings(&[&large[..], &["train.memory_budget=1GiB"]].concat()), empty);
    assert_eq!(warnings(&["losses.z=0.1"]), empty);
    assert_eq!(warnings(&["train.batch_size=64"]), empty);
}
