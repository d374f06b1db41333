use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use peft::model::{Decoder, Pretrained, Recompute};
use peft::ops::{Documents, Gradients, Pass};
use peft::weights::Checkpoint;
use serde_json::Value;

use super::place::{Place, assert_same, refusal, tree};

const RECIPE: &str = r#"
task = "upcycle"
output = "mixture"
model = { source = "model" }
upcycle = { experts = 6, shared = 2, active = 2, refit = "none" }
calibration = { data = [{ path = "text.jsonl" }], tokens = 512, held_out = 128 }
"#;

/// A place with text to calibrate on.
pub(crate) fn place() -> Place {
    let place = Place::new();
    let record = |n: usize| {
        let words: Vec<String> =
            (0..24).map(|w| format!("kite {} box {}", (n * 7 + w * w) % 23, (w * n) % 11)).collect();
        format!("{{\"text\": \"{}\"}}\n", words.join(" "))
    };
    fs::write(place.path("text.jsonl"), (0..24).map(record).collect::<String>()).unwrap();
    fs::write(place.path("upcycle.toml"), RECIPE).unwrap();
    fs::write(place.path("short.jsonl"), "{\"text\": \"kite\"}\n").unwrap();
    place
}

/// The bundled model and text: in a trained model neurons can make up for each other.
fn trained() -> Place {
    let place = place();
    let bundled = |path: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join(path).to_str().unwrap().to_string();
    let recipe = format!(
        r#"
task = "upcycle"
output = "mixture"
model = {{ source = '{}' }}
upcycle = {{ experts = 12, shared = 4, active = 4 }}
calibration = {{ data = [{{ path = '{}' }}], tokens = 4096, held_out = 1024 }}
"#,
        bundled("examples/tiny-llama"),
        bundled("datasets/tiny-world.jsonl")
    );
    fs::write(place.path("trained.toml"), recipe).unwrap();
    fs::copy(bundled("datasets/tiny-world-eval.jsonl"), place.path("further.jsonl")).unwrap();
    place
}

pub(crate) fn logits(model: &Decoder) -> Vec<f32> {
    let tokens: Vec<u32> = (0..40).map(|n| (n * n * 13 + 5) % 1000).collect();
    let hidden = model.forward(&tokens, &Documents::single(40, 0)).unwrap().hidden;
    model.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub(crate) fn open(folder: &Path, change: impl FnOnce(&mut Value)) -> Decoder {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(path, config.to_string()).unwrap();
    Decoder::open(&Pretrained::open(folder.to_str().unwrap()).unwrap(), DType::F32, &Device::Cpu).unwrap()
}

pub(crate) fn difference(x: &[f32], y: &[f32]) -> f32 {
    x.iter().zip(y).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

pub(crate) fn dense(place: &Place) -> Vec<f32> {
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
    for partition in
        ["sequential", "random", "kmeans", "coactivation", "gradient", "gradient-sharing", "alternating"]
    {
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

pub(crate) fn report(place: &Place, folder: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(place.path(folder).join("upcycle.json")).unwrap()).unwrap()
}

#[test]
fn a_split_is_verified_before_its_down_projections_are_fitted() {
    let place = trained();
    for (format, is_down) in [
        ("glm4_moe", (|name| name.ends_with("down_proj.weight")) as fn(&str) -> bool),
        ("granitemoeshared", |name| name.ends_with("output_linear.weight")),
    ] {
        let set = format!("upcycle.format={format}");
        let run = |refit: &str| {
            let (set_refit, folder) = (format!("upcycle.refit={refit}"), format!("{format}-{refit}"));
            place.run(&["upcycle", "trained.toml", "--set", &set, "--set", &set_refit, "--output", &folder]);
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
        assert!(guarantees[0]["max_logit_difference"].as_f64().unwrap() < 1e-4);
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

/// What is measured has the weights of the written router: with many small experts, equal ones are another model.
#[test]
fn hundreds_of_small_experts_are_what_was_measured() {
    let place = trained();
    let mut arguments = vec!["upcycle", "trained.toml"];
    for set in [
        "upcycle.experts=192",
        "upcycle.shared=0",
        "upcycle.active=4",
        "calibration.tokens=1000",
        "calibration.held_out=32",
    ] {
        arguments.extend(["--set", set]);
    }
    place.run(&arguments);
    let account = report(&place, "mixture");
    let read_back = account["guarantees"].as_array().unwrap().last().unwrap();
    assert!(read_back["nll_difference"].as_f64().unwrap().abs() < 1e-4, "{read_back}");
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let place = trained();
    for partition in ["alternating", "gradient"] {
        let partition = format!("upcycle.partition={partition}");
        let run = |seed: &str, output: &str| {
            let sets = ["--set", &partition, "--set", seed, "--output", output];
            place.run(&[&["upcycle", "trained.toml"], &sets[..]].concat());
            fs::read(place.path(output).join("model.safetensors")).unwrap()
        };
        let one = run("seed=42", "one");
        assert!(one == run("seed=42", "other"), "{partition}");
        assert!(one != run("seed=7", "third"), "{partition}");
        ["one", "other", "third"].iter().for_each(|folder| fs::remove_dir_all(place.path(folder)).unwrap());
    }
}

/// What gradients are taken of is the output of the network: with `dy` its gradient, that of the down projection is `dy^T h`.
#[test]
fn a_walk_back_gives_the_gradients_of_training() {
    let place = place();
    let base = Pretrained::open(place.path("model").to_str().unwrap()).unwrap();
    let tokens: Vec<u32> = (0..24).map(|n| (n * n * 13 + 5) % 1000).collect();
    let documents = Documents::new(vec![0, 9, 24], vec![0, 1]);
    let mut trained = Decoder::open(&base, DType::F32, &Device::Cpu).unwrap();
    let trainables = trained.make_trainable().unwrap();
    let mut gradients = Gradients::of(&trainables);
    let pass = Pass::training(&documents, None);
    let (output, saved) = trained.forward_training(&tokens, &pass, Recompute::None, &gradients).unwrap();
    trained.backward(saved, &pass, &output.hidden.sin().unwrap(), &mut gradients).unwrap();
    let model = Decoder::open(&base, DType::F32, &Device::Cpu).unwrap();
    let read = |name: String| base.read(&name, DType::F32, &Device::Cpu).unwrap();
    let mut layers = Vec::new();
    let mut visit = |layer: usize, x: &Tensor, dy: &Tensor| {
        let of = |name: &str| {
            let weight = read(format!("model.layers.{layer}.mlp.{name}.weight"));
            x.matmul(&weight.t().unwrap()).unwrap()
        };
        let h = (of("gate_proj").silu()? * of("up_proj"))?;
        let found = dy.t()?.matmul(&h)?;
        let name = format!("model.layers.{layer}.mlp.down_proj.weight");
        let wanted = gradients.of_name(&name).unwrap();
        let largest = |tensor: &Tensor| -> f32 {
            tensor.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
        };
        let error = largest(&(&found - wanted)?);
        assert!(error < 1e-4 * largest(wanted), "{name}: {error} of {}", largest(wanted));
        layers.push(layer);
        Ok(())
    };
    model.walk_back(&tokens, &documents, |hidden| Ok(hidden.sin()?), &mut visit).unwrap();
    assert_eq!(layers, [4, 3, 2, 1, 0]);
}

#[test]
fn losses_are_told_by_window_and_by_text() {
    let place = trained();
    let eval = ["--set", "calibration.eval=[{ path = \"further.jsonl\" }]"];
    let (_, told) = place.run(&[&["upcycle", "trained.toml"], &eval[..]].concat());
    assert!(told.contains("measured on 1,024 tokens of further.jsonl too"), "{told}");
    let account = report(&place, "mixture");
    let texts = account["comparisons"].as_array().unwrap();
    let files: Vec<&Value> = texts.iter().map(|text| &text["file"]).collect();
    assert_eq!(files, [&Value::Null, &"further.jsonl".into(), &Value::Null]);
    let origins: Vec<&Value> = texts.iter().map(|text| &text["origin"]).collect();
    assert_eq!(origins, ["held-out", "file", "neutral"]);
    let markdown = fs::read_to_string(place.path("mixture/upcycle.md")).unwrap();
    for text in texts {
        let numbers = |value: &Value| -> Vec<f64> {
            value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
        };
        let tokens = numbers(&text["window_tokens"]);
        let total: f64 = tokens.iter().sum();
        assert_eq!(total, text["tokens"].as_f64().unwrap());
        let sums = |rival: &str| numbers(&text[rival]["window_sums"]);
        for rival in ["dense", "pruned", "pruned_refit", "mixture", "oracle"] {
            let nll = sums(rival).iter().sum::<f64>() / total;
            assert!((nll - text[rival]["nll"].as_f64().unwrap()).abs() < 1e-12, "{rival}");
        }
        for (key, rival) in [("mixture_less_pruned", "pruned"), ("mixture_less_pruned_refit", "pruned_refit")]
        {
            let differences: Vec<f64> =
                sums("mixture").iter().zip(sums(rival)).map(|(mixture, rival)| mixture - rival).collect();
            let mean = differences.iter().sum::<f64>() / total;
            let (found, error) = (&text[key]["mean"], text[key]["standard_error"].as_f64().unwrap());
            assert!((mean - found.as_f64().unwrap()).abs() < 1e-12, "{key}");
            assert!(error > 0.0 && error < 1.0, "{key}: {error}");
            assert!(markdown.contains(&format!("{mean:+.4} ± {error:.4}")), "{markdown}");
        }
    }
    let weights = |folder: &str| fs::read(place.path(folder).join("model.safetensors")).unwrap();
    let without = ["--set", "upcycle.baselines=false", "--set", "upcycle.verify=false", "--output", "alone"];
    place.run(&[&["upcycle", "trained.toml"], &without[..]].concat());
    assert!(weights("alone") == weights("mixture"), "what is measured changes nothing");
    let alone = report(&place, "alone");
    assert_eq!(alone["comparisons"][0]["mixture"], texts[0]["mixture"]);
    assert!(alone["comparisons"][0]["pruned"].is_null());
    assert_eq!(alone["guarantees"], serde_json::json!([]));
}

#[test]
fn a_fit_to_the_stream_is_another_one() {
    let place = trained();
    for refit in ["local", "stream"] {
        let set = format!("upcycle.refit={refit}");
        place.run(&["upcycle", "trained.toml", "--set", &set, "--output", refit]);
        let account = report(&place, refit);
        let changes = account["refitted"]["changes"].as_object().unwrap();
        assert!(changes.values().any(|change| change.as_f64().unwrap() > 0.0), "{refit}");
    }
    let changed = changed(&place, "local", "stream");
    assert!(
        !changed.is_empty() && changed.iter().all(|name| name.ends_with("down_proj.weight")),
        "{changed:?}"
    );
}

#[test]
fn layers_that_stay_dense_keep_their_bits() {
    let place = trained();
    let keep = ["--set", "upcycle.keep_dense={ first = 2 }"];
    place.run(&[&["upcycle", "trained.toml"], &keep[..]].concat());
    let account = report(&place, "mixture");
    assert_eq!(account["dense_layers"], serde_json::json!([0, 1]));
    assert_eq!(account["guarantees"].as_array().unwrap().len(), 3);
    let mixture = Checkpoint::open(place.path("mixture").to_str().unwrap()).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny-llama");
    let base = Checkpoint::open(source.to_str().unwrap()).unwrap();
    for layer in 0..5 {
        let name = format!("model.layers.{layer}.mlp.down_proj.weight");
        match layer < 2 {
            true => assert!(mixture.bytes(&name).unwrap() == base.bytes(&name).unwrap(), "{name}"),
            false => assert!(mixture.info(&name).is_err(), "{name}"),
        }
    }
    // The other layers are no prefix, which only some families can say.
    let refused = refusal(
        &place,
        &[
            "upcycle",
            "trained.toml",
            "--set",
            "upcycle.keep_dense={ last = 1 }",
            "--set",
            "upcycle.format=glm4_moe",
            "--output",
            "x",
        ],
    );
    assert!(refused.contains("`glm4_moe`: only its first layers can be dense"), "{refused}");
}

#[test]
fn weights_of_sixteen_bits_stay_such() {
    let place = trained();
    for dtype in ["f32", "bf16"] {
        let set = format!("model.dtype={dtype}");
        place.run(&["upcycle", "trained.toml", "--set", &set, "--output", dtype]);
        let account = report(&place, dtype);
        for guarantee in account["guarantees"].as_array().unwrap() {
            assert_eq!(guarantee["holds"], true, "{guarantee}");
        }
        let mixture = Checkpoint::open(place.path(dtype).to_str().unwrap()).unwrap();
        for (name, info) in mixture.tensors() {
            // What decides on experts is held in f32.
            let bits = if name.contains("mlp.gate.") { "f32" } else { "bf16" };
            assert_eq!(info.dtype.to_string(), bits, "{name}");
        }
    }
}

#[test]
fn what_cannot_be_split_is_refused() {
    let place = place();
    let refused = |set: &str| {
        let said = refusal(&place, &["upcycle", "upcycle.toml", "--log", "silent", "--set", set]);
        assert!(!place.path("mixture").exists(), "{set}");
        said
    };
    insta::assert_snapshot!(refused("upcycle.experts=500"), @"
    exit 2
    error: `upcycle.experts` is 500, and the networks of the model have 384 neurons
    hint: a slice has one neuron at least
    ");
    insta::assert_snapshot!(refused("upcycle.active=5"), @"
    exit 2
    error: `--set upcycle.active=5`: `upcycle.active` is 5, and a token can be routed to 4
    hint: lower it, or raise `upcycle.experts`
    ");
    insta::assert_snapshot!(refused("upcycle.format=mixtral"), @r#"
    exit 2
    error: a mixture of this model cannot be stored as `mixtral`: it has no shared experts
    hint: `upcycle.format = "auto"` takes a family that can hold it
    "#);
    insta::assert_snapshot!(refused("upcycle.format=qwen3_moe"), @r#"
    exit 2
    error: a mixture of this model cannot be stored as `qwen3_moe`: it has a norm of q and k, and the model has none
    hint: `upcycle.format = "auto"` takes a family that can hold it
    "#);
    insta::assert_snapshot!(refused("calibration.data=[{ path = \"short.jsonl\" }]"), @"
    exit 2
    error: the calibration data has too few documents to hold any out
    hint: give more text in `calibration.data`, or a smaller `calibration.held_out`
    ");
    insta::assert_snapshot!(refused("upcycle.keep_dense={ first = 5 }"), @"
    exit 2
    error: `upcycle.keep_dense` keeps all 5 layers dense, so nothing would be converted
    hint: lower `first`, `last` or `every`
    ");
    fs::write(place.path("one.jsonl"), "{\"text\": \"a\"}\n").unwrap();
    insta::assert_snapshot!(refused("calibration.eval=[{ path = \"one.jsonl\" }]"), @"
    exit 1
    error: one.jsonl: none of the 1 documents has a token to learn
    ");
    place.run(&["upcycle", "upcycle.toml"]);
    let again =
        ["upcycle", "upcycle.toml", "--log", "silent", "--set", "model.source=mixture", "--output", "again"];
    insta::assert_snapshot!(refusal(&place, &again), @"
    exit 2
    error: layer 0 of the model is a mixture of experts already
    hint: give a dense model
    ");
}

#[cfg(unix)]
#[test]
fn an_interrupted_conversion_leaves_nothing() {
    let place = trained();
    let before = tree(&place.path(""));
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut child = place.command(&["upcycle", "trained.toml"]).stderr(Stdio::piped()).spawn().unwrap();
        let begin = Instant::now();
        while !place.names_in("").iter().any(|name| name.ends_with(".partial")) {
            assert!(begin.elapsed() < Duration::from_secs(60), "the conversion does not begin");
            std::hint::spin_loop();
        }
        // SAFETY: the signal goes to a child that has not been waited for, so that its id is still its own.
        unsafe { libc::kill(child.id() as libc::pid_t, signal) };
        assert_eq!(child.wait().unwrap().code(), Some(130), "the conversion was over before the signal");
        assert_same(&tree(&place.path("")), &before);
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
    // No mixture is made on the way.
    let report = report(&place, "mixture");
    let comparison = &report["comparisons"][0];
    assert!(["dense", "pruned", "pruned_refit"].iter().all(|rival| comparison[rival]["nll"].is_f64()));
    assert!(comparison["mixture"].is_null() && comparison["oracle"].is_null());
    assert_eq!(report["layers"].as_array().map(Vec::len), Some(0));
}

#[test]
fn progress_is_told_as_json_on_request() {
    let place = place();
    let (_, stderr) = place.run(&["upcycle", "upcycle.toml", "--log", "json"]);
    let events: Vec<Value> = stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let layers: Vec<u64> = events.iter().filter_map(|event| event["done"].as_u64()).collect();
    assert_eq!(layers, (1..=layers.len() as u64).collect::<Vec<_>>());
    assert!(
        events[0]["event"] == "note"
            && layers.last() == events.iter().find_map(|e| e["layers"].as_u64()).as_ref()
    );
    let end = &events[events.len() - 1];
    assert!(end["event"] == "end" && end["path"] == "mixture" && end["seconds"].is_f64(), "{end}");
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
