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
