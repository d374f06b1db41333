//! Adapters of mixtures through several runs, and what of routing a run says and refuses.

use std::fs;

use candle_core::Device;
use serde_json::Value;

use crate::fixture::difference;
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

/// Trained routers are part of the adapter that a further run goes on with: what it measures is what it writes.
#[test]
fn routers_of_an_earlier_run_stay_in_the_adapter() {
    for (family, class, keys) in [
        ("qwen2_moe", "Qwen2MoeForCausalLM", &["train.router=full"][..]),
        ("mixtral", "MixtralForCausalLM", &["train.router=full"]),
        ("glm4_moe", "Glm4MoeForCausalLM", &["train.router=full"]),
        ("glm4_moe", "Glm4MoeForCausalLM", &["losses.bias_update=0.5"]),
    ] {
        let place = sparse_place_of(family, class);
        let recipe = fs::read_to_string(place.path("recipe.toml")).unwrap();
        let recipe = recipe.replace("eval_share = 0.2", "eval = [{ path = \"data.jsonl\" }]");
        fs::write(place.path("recipe.toml"), recipe).unwrap();
        finetune(&place, &[keys, &["train.learning_rate=0.1"]].concat());
        let routers = |run: &str| {
            let tensors = candle_core::safetensors::load(
                place.path(run).join("adapter_model.safetensors"),
                &Device::Cpu,
            )
            .unwrap();
            let whole = tensors.into_iter().filter(|(name, _)| !name.contains(".lora_"));
            whole.collect::<std::collections::BTreeMap<_, _>>()
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
