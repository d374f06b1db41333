use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use peft::model::{Decoder, Pretrained};
use peft::ops::Documents;
use peft::weights::Checkpoint;
use serde_json::Value;

use super::place::Place;

const RECIPE: &str = r#"
task = "upcycle"
output = "mixture"
model = { source = "model" }
upcycle = { experts = 6, shared = 2, active = 2, refit = "none" }
calibration = { data = [{ path = "text.jsonl" }], tokens = 512, held_out = 128 }
"#;

/// A place with text to calibrate on.
fn place() -> Place {
    let place = Place::new();
    let record = |n: usize| {
        let words: Vec<String> =
            (0..24).map(|w| format!("kite {} box {}", (n * 7 + w * w) % 23, (w * n) % 11)).collect();
        format!("{{\"text\": \"{}\"}}\n", words.join(" "))
    };
    fs::write(place.path("text.jsonl"), (0..24).map(record).collect::<String>()).unwrap();
    fs::write(place.path("upcycle.toml"), RECIPE).unwrap();
    place
}

fn logits(model: &Decoder) -> Vec<f32> {
    let tokens: Vec<u32> = (0..40).map(|n| (n * n * 13 + 5) % 1000).collect();
    let hidden = model.forward(&tokens, &Documents::single(40, 0)).unwrap().hidden;
    model.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn open(folder: &Path, change: impl FnOnce(&mut Value)) -> Decoder {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(path, config.to_string()).unwrap();
    Decoder::open(&Pretrained::open(folder.to_str().unwrap()).unwrap(), DType::F32, &Device::Cpu).unwrap()
}

fn difference(x: &[f32], y: &[f32]) -> f32 {
    x.iter().zip(y).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

fn dense(place: &Place) -> Vec<f32> {
    logits(&open(&place.path("model"), |_| {}))
}

#[test]
fn all_experts_on_is_the_dense_model() {
    let place = place();
    // Equal weights, as a router of zeros gives them.
    place.run(&["upcycle", "upcycle.toml", "--set", "upcycle.router=zero"]);
    let folder = place.path("mixture");
    let whole = open(&folder, |config| {
        config["num_experts_per_tok"] = 4.into();
        config["routed_scaling_factor"] = 4.0.into();
    });
    let found = difference(&logits(&whole), &dense(&place));
    assert!(found < 2e-3, "{found}");
    let fewer = open(&folder, |config| {
        config["num_experts_per_tok"] = 2.into();
        config["routed_scaling_factor"] = 2.0.into();
    });
    assert!(difference(&logits(&fewer), &dense(&place)) > 10.0 * found, "fewer experts give something else");
}

#[test]
fn every_neuron_is_in_one_slice_to_the_bit() {
    let place = place();
    for partition in ["sequential", "random", "kmeans", "coactivation", "alternating"] {
        let set = format!("upcycle.partition={partition}");
        place.run(&["upcycle", "upcycle.toml", "--set", &set, "--output", partition]);
        let rows = |folder: &str, is_part: &dyn Fn(&str) -> bool| {
            let checkpoint = Checkpoint::open(place.path(folder).to_str().unwrap()).unwrap();
            let names = checkpoint.tensors().keys().filter(|name| is_part(name));
            let mut rows: Vec<Vec<u32>> = names
                .flat_map(|name| {
                    let tensor: Tensor = checkpoint.read(name, DType::F32, &Device::Cpu).unwrap();
                    tensor.to_vec2::<f32>().unwrap()
                })
                .map(|row| row.into_iter().map(f32::to_bits).collect())
                .collect();
            rows.sort();
            rows
        };
        let whole = rows("model", &|name| name.contains("layers.1.mlp.gate_proj"));
        let parts = rows(partition, &|name| name.contains("layers.1.mlp") && name.contains("gate_proj"));
        assert!(whole == parts, "{partition}");
    }
}

#[test]
fn slices_that_do_not_divide_are_filled_up() {
    let place = place();
    // 384 neurons in 7 slices of 55.
    let set = ["--set", "upcycle.experts=7", "--set", "upcycle.active=3"];
    place.run(&[&["upcycle", "upcycle.toml"], &set[..]].concat());
    let report = report(&place, "mixture");
    assert_eq!(report["expert_width"], 55);
    let guarantees = report["guarantees"].as_array().unwrap();
    assert_eq!(guarantees.len(), 3);
    assert!(guarantees.iter().all(|guarantee| guarantee["holds"] == true), "{guarantees:#?}");
}

/// The tensors of a folder that another has with other bytes.
fn changed(place: &Place, one: &str, other: &str) -> Vec<String> {
    let open = |folder: &str| Checkpoint::open(place.path(folder).to_str().unwrap()).unwrap();
    let (one, other) = (open(one), open(other));
    assert!(one.tensors().keys().eq(other.tensors().keys()));
    let differ = |name: &&String| one.bytes(name).unwrap() != other.bytes(name).unwrap();
    one.tensors().keys().filter(differ).cloned().collect()
}

fn report(place: &Place, folder: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(place.path(folder).join("upcycle.json")).unwrap()).unwrap()
}

#[test]
fn a_split_is_verified_before_its_down_projections_are_fitted() {
    let place = place();
    for (format, is_down) in [
        ("glm4_moe", (|name| name.ends_with("down_proj.weight")) as fn(&str) -> bool),
        ("granitemoeshared", |name| name.ends_with("output_linear.weight")),
    ] {
        let set = format!("upcycle.format={format}");
        let run = |refit: &str| {
            let (set_refit, folder) = (format!("upcycle.refit={refit}"), format!("{format}-{refit}"));
            place.run(&["upcycle", "upcycle.toml", "--set", &set, "--set", &set_refit, "--output", &folder]);
            folder
        };
        let (plain, fitted) = (run("none"), run("local"));
        let account = report(&place, &fitted);
        let guarantees = account["guarantees"].as_array().unwrap();
        assert_eq!(guarantees.len(), 3, "{format}");
        for guarantee in guarantees {
            assert_eq!(
                (&guarantee["promised"], &guarantee["holds"]),
                (&true.into(), &true.into()),
                "{guarantee}"
            );
        }
        assert!(guarantees[0]["nll_difference"].as_f64().unwrap().abs() < 1e-6);
        let changed = changed(&place, &plain, &fitted);
        assert!(!changed.is_empty() && changed.iter().all(|name| is_down(name)), "{changed:?}");
        let refitted = &account["refitted"];
        assert_eq!(refitted["tensors"], changed.len());
        assert_eq!(refitted["compared"], true);
        let all = Checkpoint::open(place.path(&fitted).to_str().unwrap()).unwrap().tensors().len();
        assert_eq!(refitted["untouched"], all - changed.len());
        assert!(
            refitted["changes"].as_object().unwrap().values().any(|change| change.as_f64().unwrap() > 0.0)
        );
        assert!(report(&place, &plain)["refitted"].is_null());
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let place = place();
    for output in ["one", "other"] {
        place.run(&["upcycle", "upcycle.toml", "--set", "upcycle.refit=local", "--output", output]);
    }
    let bytes = |folder: &str| fs::read(place.path(folder).join("model.safetensors")).unwrap();
    assert!(bytes("one") == bytes("other"));
    place.run(&["upcycle", "upcycle.toml", "--set", "seed=7", "--output", "third"]);
    assert!(bytes("one") != bytes("third"));
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

#[test]
fn a_pruned_model_is_smaller_and_of_the_same_family() {
    let place = place();
    place.run(&["upcycle", "upcycle.toml", "--set", "upcycle.method=prune", "--set", "upcycle.refit=local"]);
    let folder = place.path("mixture");
    let config: Value =
        serde_json::from_str(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
    assert_eq!((&config["model_type"], &config["intermediate_size"]), (&"llama".into(), &256.into()));
    Pretrained::open(folder.to_str().unwrap()).unwrap().check().unwrap();
}

#[test]
fn an_output_that_is_there_is_left_alone() {
    let place = place();
    fs::create_dir(place.path("mixture")).unwrap();
    fs::write(place.path("mixture/mine.txt"), "mine").unwrap();
    let output = place.command(&["upcycle", "upcycle.toml"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(place.names_in("mixture"), ["mine.txt"]);
}
