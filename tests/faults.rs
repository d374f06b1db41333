//! Memory that the system refuses and files that change while they are mapped end a command with a message, and nothing
//! that was computed from such a file is published.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use candle_core::Device;
use peft::adapter::hf::Adapter;
use peft::merge::merge;
use peft::model::Pretrained;
use peft::recipe::{Document, Plan, Recipe, UpcyclePlan, UpcycleRecipe};
use peft::train::{Event, Reporter};

use super::place::Place;
use super::upcycle;

/// Writes the same bytes over a file, as a copy of another model would, but for one.
fn overwrite(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(path, bytes).unwrap();
}

/// Makes a file older than any change to it that a test makes; the times of some file systems have coarse steps.
fn age(path: &Path) {
    let earlier = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
    fs::File::options().write(true).open(path).unwrap().set_modified(earlier).unwrap();
}

const CHANGED: &str = "the file was changed while it was in use: it was written to";

/// Overwrites a file after a step.
struct OverwritesAt<'a> {
    step: u64,
    path: &'a Path,
}

impl Reporter for OverwritesAt<'_> {
    fn report(&mut self, event: &Event) {
        if matches!(event, Event::Step(report) if report.step == self.step) {
            overwrite(self.path);
        }
    }
}

#[test]
fn a_run_whose_model_is_overwritten_saves_nothing_more() {
    let place = Place::new();
    let weights = place.path("model/model.safetensors");
    age(&weights);
    let recipe = fs::read_to_string(place.path("recipe.toml"))
        .unwrap()
        .replace("\"run\"", &format!("{:?}", place.path("run")))
        .replace("\"model\"", &format!("{:?}", place.path("model")))
        .replace("\"data.jsonl\"", &format!("{:?}", place.path("data.jsonl")));
    let plan = Plan::of(&Recipe::read(&Document::parse("test.toml", &recipe).unwrap()).unwrap(), "test");
    // Saved after steps 2, 4 and 6.
    let mut reporter = OverwritesAt { step: 3, path: &weights };
    let error = peft::run::finetune(&plan, false, &AtomicBool::new(false), &mut reporter).unwrap_err();
    assert_eq!(error.to_string(), format!("{}: {CHANGED}", weights.display()));
    assert_eq!(error.exit_code(), 1);
    assert!(place.path("run/checkpoint-2").exists());
    let published = ["checkpoint-4", "checkpoint-6", "adapter_model.safetensors", "best"];
    assert!(published.iter().all(|name| !place.path("run").join(name).exists()));
}

#[test]
fn a_merge_whose_model_is_overwritten_writes_nothing() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let weights = place.path("model/model.safetensors");
    age(&weights);
    let model = Pretrained::open(place.path("model").to_str().unwrap()).unwrap();
    let adapter = Adapter::read(&place.path("run"), &Device::Cpu).unwrap();
    let output = place.path("merged");
    let error = merge(&model, &[adapter], &output, None, &mut |progress| {
        // After the last comparison of what was written with the model.
        if progress.done == progress.total {
            overwrite(&weights);
        }
        true
    });
    assert_eq!(error.unwrap_err().to_string(), format!("{}: {CHANGED}", weights.display()));
    assert!(!output.exists());
}

#[test]
fn an_upcycling_whose_model_is_overwritten_writes_nothing() {
    let place = upcycle::place();
    let weights = place.path("model/model.safetensors");
    age(&weights);
    let recipe = fs::read_to_string(place.path("upcycle.toml"))
        .unwrap()
        .replace("\"mixture\"", &format!("{:?}", place.path("mixture")))
        .replace("\"model\"", &format!("{:?}", place.path("model")))
        .replace("\"text.jsonl\"", &format!("{:?}", place.path("text.jsonl")));
    let recipe = UpcycleRecipe::read(&Document::parse("test.toml", &recipe).unwrap()).unwrap();
    let mut say = |event| {
        if matches!(&event, peft::upcycle::Event::Note { text } if text == "writing the account") {
            overwrite(&weights);
        }
        Ok(())
    };
    let error = peft::run::upcycle(&UpcyclePlan::of(&recipe, "test"), &mut say, &mut |_| {});
    assert_eq!(error.unwrap_err().to_string(), format!("{}: {CHANGED}", weights.display()));
    assert!(!place.path("mixture").exists());
}

#[cfg(target_os = "linux")]
mod linux {
    use std::process::{Command, Output, Stdio};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::quantized;

    #[test]
    fn a_mapped_file_that_is_cut_is_named() {
        let place = quantized::place();
        let sets = ["train.steps=1000000", "train.eval_every=0", "train.save_every=0"];
        let sets = sets.iter().flat_map(|set| ["--set", *set]);
        let arguments: Vec<&str> =
            ["finetune", "recipe.toml", "--log", "lines"].into_iter().chain(sets).collect();
        let mut run = place.command(&arguments);
        let mut child = run.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let begun = Instant::now();
        let metrics = place.path("run/metrics.jsonl");
        while fs::metadata(&metrics).map_or(0, |file| file.len()) == 0 {
            assert!(begun.elapsed() < Duration::from_secs(60), "no step was made");
            assert_eq!(child.try_wait().unwrap(), None, "the run ended by itself");
            std::thread::sleep(Duration::from_millis(5));
        }
        fs::File::options().write(true).open(place.path("model.gguf")).unwrap().set_len(100).unwrap();
        let Output { status, stderr, .. } = child.wait_with_output().unwrap();
        let told = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(1), "{status}: {told}");
        let message = "error: `model.gguf` can no longer be read: the file was cut while it was in use, or its disk failed\nhint: ";
        assert_eq!(told.matches(message).count(), 1, "{told}");
        assert_eq!(told.matches("error").count(), 1, "{told}");
        assert!(!place.path("run/adapter_model.safetensors").exists());
    }

    /// Status and stderr of a training run in that many KiB of addresses.
    fn in_limit(place: &Place, kib: u64) -> (Option<i32>, String) {
        let script = format!("ulimit -v {kib} && exec \"$@\"");
        let binary = env!("CARGO_BIN_EXE_peft");
        let output = format!("run-{kib}");
        let arguments = ["finetune", "recipe.toml", "--log", "silent", "--output", &output];
        let mut shell = Command::new("sh");
        shell.args(["-c", &script, "sh", binary]).args(arguments).current_dir(place.path(""));
        shell.env("RAYON_NUM_THREADS", "2").env("RUST_BACKTRACE", "0");
        let Output { status, stderr, .. } = shell.output().unwrap();
        (status.code(), String::from_utf8(stderr).unwrap())
    }

    #[test]
    fn a_file_that_is_too_large_for_the_memory_is_named() {
        let place = Place::new();
        let file = fs::File::options().write(true).open(place.path("model/tokenizer.json")).unwrap();
        file.set_len(450 << 20).unwrap();
        let (status, told) = in_limit(&place, 400 << 10);
        assert_eq!(status, Some(1), "{told}");
        let expected = "error: model/tokenizer.json: has 471859200 bytes, and the system has no memory to read them into\nhint: ";
        assert!(told.contains(expected), "{told}");
        assert!(!told.contains("out of memory"), "{told}");
    }

    #[test]
    fn memory_that_the_system_refuses_is_named() {
        let place = Place::new();
        // Long enough that the steps need most: some hundred MiB.
        let text = "Where is the kite? ".repeat(1200);
        let records = format!("{{\"text\": \"{text}\"}}\n").repeat(24);
        fs::write(place.path("data.jsonl"), records).unwrap();
        let config = fs::read_to_string(place.path("model/config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
        config["max_position_embeddings"] = 8192.into();
        fs::write(place.path("model/config.json"), config.to_string()).unwrap();
        let recipe = fs::read_to_string(place.path("recipe.toml")).unwrap();
        let recipe = recipe.replace("max_length = 32", "max_length = 4096").replace("steps = 6", "steps = 1");
        fs::write(place.path("recipe.toml"), recipe).unwrap();

        let mut refused = 0;
        for mib in [40, 60, 90, 130, 200, 300, 400] {
            let (status, told) = in_limit(&place, mib << 10);
            if status == Some(0) {
                assert!(!told.contains("error"), "{mib} MiB: {told}");
                continue;
            }
            assert_eq!(status, Some(1), "{mib} MiB: {told}");
            assert_eq!(told.matches("error: ").count(), 1, "{mib} MiB: {told}");
            assert_eq!(told.matches("hint: ").count(), 1, "{mib} MiB: {told}");
            assert!(told.contains("memory"), "{mib} MiB: {told}");
            // A run that has begun can go on; before that there is nothing, and no empty folder either.
            let run = format!("run-{}", mib << 10);
            assert!(
                !place.path(&run).exists() || place.path(&run).join("recipe.toml").exists(),
                "{mib} MiB: {told}"
            );
            if told.contains("error: out of memory: the system refused ") {
                assert!(told.contains("`train.memory_budget`"), "{told}");
                refused += 1;
            }
        }
        assert!(refused > 2, "{refused} limits were too small");
        assert_eq!(in_limit(&place, 16 << 20).0, Some(0));
    }
}
