//! Adapters of mixtures through several runs, and what of routing a run says and refuses.

use std::fs;

use candle_core::Device;
use serde_json::Value;

use crate::fixture::difference;
use crate::moe::sparse_place_of;
use crate::place::Place;

/// The command with these keys set.
fn set<'a>(command: &[&'a str], keys: &[&'a str]) -> Vec<&'a str> {
    command.iter().copied().chain(keys.iter().flat_map(|key| ["--set", *key])).collect()
}

fn finetune(place: &Place, keys: &[&str]) {
    place.run(&set(&["finetune", "recipe.toml", "--log", "silent"], keys));
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
