use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::DType;
use peft::recipe::{Document, Plan, Recipe};
use peft::train::{Event, Reporter};
use serde_json::Value;

use crate::place::{Place, Tree, assert_same, refusal, tree};

/// A recipe with everything that a resumed run could get wrong: dropout, packing, accumulation, a last epoch that is not
/// whole, a rate that falls.
const MANY_STEPS: &str = r#"
task = "finetune"
output = "run"
model = { source = "model", dtype = "f32" }
adapter = { rank = 4, dropout = 0.2 }
data = { train = [{ path = "data.jsonl" }], eval_share = 0.2, max_length = 24, pack = true }

[train]
epochs = 12.5
batch_size = 1
accumulate = 2
learning_rate = 3e-3
schedule = "cosine"
warmup = 0.1
weight_decay = 0.01
eval_every = 3
save_every = 2
keep = 2
"#;

/// The lines of `metrics.jsonl` without what depends on the machine.
fn metrics(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        let fields = line.as_object_mut().unwrap();
        fields.remove("tokens_per_second");
        fields.remove("peak_rss_bytes");
        line
    };
    text.lines().map(line).collect()
}

/// A run directory without the files that name it or hold times.
fn results(run: &Path) -> Tree {
    tree(run).into_iter().filter(|(name, _)| name != "metrics.jsonl" && name != "recipe.toml").collect()
}

/// Two runs of one recipe are the same to the last bit.
fn assert_equal_runs(found: &Path, expected: &Path) {
    assert_same(&results(found), &results(expected));
    assert_eq!(metrics(found), metrics(expected));
    let steps = metrics(found).iter().filter(|line| line["loss"].is_number()).count() as u64;
    let numbers: Vec<u64> = metrics(found)
        .iter()
        .filter(|line| line["loss"].is_number())
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, (1..=steps).collect::<Vec<_>>());
}

#[cfg(unix)]
mod signals {
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    /// SplitMix64: moments of chance that a failure can name.
    struct Chance(u64);

    impl Chance {
        fn below(&mut self, end: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.0;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (mixed ^ (mixed >> 31)) % end
        }
    }

    fn temporaries(run: &Path) -> Vec<String> {
        tree(run).into_keys().filter(|name| name.contains(".partial") && !name.contains('/')).collect()
    }

    fn send(child: &Child, signal: i32) {
        // SAFETY: the signal goes to a child that has not been waited for, so that its id is still its own.
        unsafe { libc::kill(child.id() as libc::pid_t, signal) };
    }

    /// Each kill comes some steps and some milliseconds after the start, so that it falls into loading, steps,
    /// evaluations, checkpoints and the cleaning of the one before.
    #[expect(clippy::print_stdout, reason = "the moments are there to be read when the test fails")]
    #[test]
    fn ten_kills_change_nothing() {
        let place = Place::new();
        fs::write(place.path("recipe.toml"), MANY_STEPS).unwrap();
        place.run(&["finetune", "recipe.toml", "--output", "whole", "--log", "silent"]);
        let parts = place.path("parts");
        let arguments = ["finetune", "recipe.toml", "--output", "parts", "--resume", "--log", "json"];
        let seed = 20_260_727;
        println!("seed {seed}");
        let mut chance = Chance(seed);
        for kill in 0..10 {
            let (steps, milliseconds) = (chance.below(7), chance.below(40));
            // Another number of threads each time: results must not depend on it.
            let threads = (1 + kill % 3).to_string();
            let mut child = place
                .command(&arguments)
                .env("RAYON_NUM_THREADS", threads)
                .stdin(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let events = BufReader::new(child.stderr.take().unwrap()).lines().map(|line| line.unwrap());
            let is_step = |line: &String| line.contains("\"event\":\"step\"");
            let mut made = events.filter(is_step).take(steps as usize);
            let last = made.by_ref().last();
            std::thread::sleep(Duration::from_millis(milliseconds));
            send(&child, libc::SIGKILL);
            assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL), "the run ended before the kill");
            let step = last.map(|line| serde_json::from_str::<Value>(&line).unwrap()["step"].clone());
            let left = temporaries(&parts);
            println!("kill {kill}: {milliseconds} ms after {steps} steps, at step {step:?}, left {left:?}");
        }
        place.run(&arguments);
        assert_equal_runs(&parts, &place.path("whole"));
        let names = tree(&parts).into_keys();
        assert_eq!(names.filter(|name| name.contains(".partial")).collect::<Vec<_>>(), [""; 0]);
        let recipe = |run: &str| fs::read_to_string(place.path(run).join("recipe.toml")).unwrap();
        assert_eq!(recipe("parts").replace("\"parts\"", "\"whole\""), recipe("whole"));
    }

    #[test]
    fn an_interrupted_run_is_resumed_to_the_same_bits() {
        interrupted_and_resumed(libc::SIGINT);
    }

    #[test]
    fn a_terminated_run_is_resumed_to_the_same_bits() {
        interrupted_and_resumed(libc::SIGTERM);
    }

    fn interrupted_and_resumed(signal: i32) {
        let place = Place::new();
        fs::write(place.path("recipe.toml"), MANY_STEPS).unwrap();
        let never = ["--set", "train.save_every=0", "--log", "json"];
        let of =
            |output: &'static str| [&["finetune", "recipe.toml", "--output", output], &never[..]].concat();
        place.run(&of("whole"));

        let mut child =
            place.command(&of("parts")).stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let begin = Instant::now();
        let lines =
            || fs::read_to_string(place.path("parts/metrics.jsonl")).map_or(0, |text| text.lines().count());
        while lines() < 4 {
            assert!(begin.elapsed() < Duration::from_secs(60), "the run does not begin");
            std::thread::sleep(Duration::from_millis(2));
        }
        send(&child, signal);
        // `timeout` sends SIGTERM to the process, then to its group: that is no wish to stop at once.
        if signal == libc::SIGTERM {
            send(&child, signal);
        }
        assert_eq!(child.wait().unwrap().code(), Some(130));
        let names = place.names_in("parts");
        let saved: Vec<&String> = names.iter().filter(|name| name.starts_with("checkpoint-")).collect();
        assert_eq!(saved.len(), 1, "{names:?}");
        assert!(!names.iter().any(|name| name == "adapter_model.safetensors"), "the run was over: {names:?}");

        place.run(&[&of("parts")[..], &["--resume"]].concat());
        // The checkpoint of the interruption stays.
        fs::remove_dir_all(place.path("parts").join(saved[0])).unwrap();
        assert_equal_runs(&place.path("parts"), &place.path("whole"));
    }

    /// Data of many rows keep the program from coming to its first step for some seconds.
    #[cfg(target_os = "linux")]
    #[test]
    fn before_the_first_step_there_is_nothing_to_save() {
        let place = Place::new();
        let rows: String =
            (0..100_000).map(|row| format!("{{\"text\": \"{row} and {row} again\"}}\n")).collect();
        fs::write(place.path("many.jsonl"), rows).unwrap();
        let slow = ["finetune", "recipe.toml", "--set", "data.train=[{ path = \"many.jsonl\" }]"];
        let mut child = place.command(&slow).stderr(Stdio::piped()).spawn().unwrap();
        // From here on the signal is listened for.
        while !listens(&child, libc::SIGTERM) {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        send(&child, libc::SIGTERM);
        assert_eq!(child.wait().unwrap().code(), Some(130));
        assert!(!place.path("run").exists());
    }

    /// Commands that only read are in order at every moment.
    #[cfg(target_os = "linux")]
    #[test]
    fn commands_that_read_end_at_once() {
        let place = Place::new();
        let rows: String =
            (0..100_000).map(|row| format!("{{\"text\": \"{row} and {row} again\"}}\n")).collect();
        fs::write(place.path("many.jsonl"), rows).unwrap();
        let eval = ["eval", "perplexity", "--model", "model", "--data", "many.jsonl"];
        let check = ["check", "recipe.toml", "--set", "data.train=[{ path = \"many.jsonl\" }]"];
        let chat = ["chat", "--model", "model"];
        for arguments in [&eval[..], &check, &chat] {
            for signal in [libc::SIGTERM, libc::SIGINT] {
                let mut command = place.command(arguments);
                command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
                let mut child = command.spawn().unwrap();
                let input = child.stdin.take();
                while !listens(&child, signal) {
                    assert_eq!(child.try_wait().unwrap(), None, "{arguments:?} ended before it listened");
                    std::thread::sleep(Duration::from_millis(1));
                }
                send(&child, signal);
                let output = child.wait_with_output().unwrap();
                drop(input);
                let told = String::from_utf8(output.stderr).unwrap();
                assert_eq!(output.status.code(), Some(130), "{arguments:?}: {told}");
                assert!(told.ends_with("\ninterrupted\n"), "{arguments:?}: {told:?}");
            }
        }
    }

    #[cfg(target_os = "linux")]
    /// Whether a process that has begun has a handler for the signal.
    fn listens(child: &Child, signal: i32) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or_default();
        u64::from_str_radix(caught.trim(), 16).is_ok_and(|caught| caught & (1 << (signal - 1)) != 0)
    }

    #[test]
    fn an_interrupted_merge_leaves_nothing() {
        let place = Place::new();
        place.run(&["finetune", "recipe.toml", "--log", "silent"]);
        let before = tree(&place.path(""));
        let merge = ["merge", "--model", "model", "--adapter", "run", "--output", "merged"];
        for signal in [libc::SIGINT, libc::SIGTERM] {
            let mut child = place.command(&merge).stderr(Stdio::piped()).spawn().unwrap();
            let is_partial = |name: &String| name.ends_with(".partial");
            let begin = Instant::now();
            while !place.names_in("").iter().any(is_partial) {
                assert!(begin.elapsed() < Duration::from_secs(60), "the merge does not begin");
                std::hint::spin_loop();
            }
            send(&child, signal);
            let code = child.wait().unwrap().code();
            assert_eq!(code, Some(130), "the merge was over before the signal");
            assert_same(&tree(&place.path("")), &before);
        }
    }

    #[test]
    fn one_run_directory_has_one_run() {
        let place = Place::new();
        fs::create_dir(place.path("run")).unwrap();
        let held = fs::File::open(place.path("run")).unwrap();
        held.lock().unwrap();
        insta::assert_snapshot!(refusal(&place, &["finetune", "recipe.toml", "--resume"]), @"
        exit 2
        error: run: another process is training here
        hint: wait until it has ended, or choose another folder with `--output`
        ");
        assert_eq!(tree(&place.path("run")), Tree::new());
    }
}

/// Sets the flag that Ctrl-C sets, after some steps.
struct Stop<'a> {
    after: &'a [u64],
    flag: &'a AtomicBool,
}

impl Reporter for Stop<'_> {
    fn report(&mut self, event: &Event) {
        if let Event::Step(report) = event {
            self.flag.store(self.after.contains(&report.step), Ordering::Relaxed);
        }
    }
}

/// Trains all weights in one go, and again with interruptions; both leave the same. Gives the run directory's tree.
fn all_weights(stored: DType, computed: &str) -> Tree {
    let place = Place::with(stored);
    let plan = |output: &str| {
        let recipe = MANY_STEPS
            .replace("adapter = { rank = 4, dropout = 0.2 }", "")
            .replace("epochs = 12.5", "full = true\nsteps = 9")
            .replace("\"f32\"", &format!("\"{computed}\""))
            .replace("\"run\"", &format!("{:?}", place.path(output)))
            .replace("\"model\"", &format!("{:?}", place.path("model")))
            .replace("\"data.jsonl\"", &format!("{:?}", place.path("data.jsonl")));
        Plan::of(&Recipe::read(&Document::parse("test.toml", &recipe).unwrap()).unwrap(), "test")
    };
    let run = |output: &str, resume: bool, after: &[u64]| {
        let flag = AtomicBool::new(false);
        peft::run::finetune(&plan(output), resume, &flag, &mut Stop { after, flag: &flag })
    };
    run("whole", false, &[]).unwrap();
    for (resume, after) in [(false, 3), (true, 4), (true, 7)] {
        let error = run("parts", resume, &[after]).unwrap_err();
        assert_eq!(error.exit_code(), 130, "{error}");
        assert!(place.path(&format!("parts/checkpoint-{after}")).exists());
    }
    run("parts", true, &[]).unwrap();
    assert_equal_runs(&place.path("parts"), &place.path("whole"));
    tree(&place.path("whole"))
}

fn has_masters(run: &Tree) -> bool {
    let optimizer = run["checkpoint-9/optimizer.safetensors"].as_ref().unwrap();
    let tensors = safetensors::SafeTensors::deserialize(optimizer).unwrap();
    tensors.names().iter().any(|name| name.ends_with(".master"))
}

#[test]
fn all_weights_in_bf16_go_on_to_the_same_bits() {
    assert!(has_masters(&all_weights(DType::BF16, "bf16")));
}

#[test]
fn weights_that_are_written_rounded_go_on_to_the_same_bits() {
    assert!(has_masters(&all_weights(DType::BF16, "f32")));
}

#[test]
fn resuming_nothing_is_beginning() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--output", "whole", "--log", "silent"]);
    place.run(&["finetune", "recipe.toml", "--output", "none", "--resume", "--log", "silent"]);
    fs::create_dir(place.path("empty")).unwrap();
    place.run(&["finetune", "recipe.toml", "--output", "empty", "--resume", "--log", "silent"]);
    for run in ["none", "empty"] {
        assert_equal_runs(&place.path(run), &place.path("whole"));
    }
}

/// A name that was mistyped begins a run that nobody wanted: that is warned of, with the names of runs.
#[test]
fn resuming_nothing_is_warned_of() {
    let place = Place::new();
    let told = |output: &str, more: &[&str]| {
        let arguments = ["finetune", "recipe.toml", "--output", output, "--log", "silent"];
        place.run(&[&arguments[..], more].concat()).1
    };
    assert_eq!(
        told("runs/first", &["--resume"]),
        "warning: there is no run in `runs/first` to go on with: a new one begins there\n"
    );
    assert_eq!(told("runs/other", &[]), "");
    assert_eq!(
        told("runs/frist", &["--resume"]),
        "warning: there is no run in `runs/frist` to go on with: a new one begins there; `--output` goes on with another, \
         such as `runs/first`, `runs/other`\n"
    );
    assert_eq!(told("runs/frist", &["--resume"]), "");
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let place = Place::new();
    fs::write(place.path("recipe.toml"), MANY_STEPS).unwrap();
    for threads in ["1", "2", "5"] {
        let arguments = ["finetune", "recipe.toml", "--output", threads, "--log", "silent"];
        let status = place.command(&arguments).env("RAYON_NUM_THREADS", threads).status().unwrap();
        assert!(status.success());
    }
    assert_equal_runs(&place.path("2"), &place.path("1"));
    assert_equal_runs(&place.path("5"), &place.path("1"));
}

#[test]
fn a_run_goes_on_with_what_it_began_with() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let before = tree(&place.path("run"));
    let resume = ["finetune", "recipe.toml", "--resume", "--log", "silent"];
    let changed = ["--set", "train.learning_rate=1e-3", "--set", "adapter.targets=all-linear"];
    insta::assert_snapshot!(refusal(&place, &[&resume[..], &changed[..]].concat()), @r#"
    exit 2
    error: run: the run was started with another recipe: `adapter.targets` was `["gate_proj", "up_proj", "down_proj"]` and is `"all-linear"` now; `train.learning_rate` was `0.01` and is `0.001` now
    hint: resume with the recipe it was started with, or start anew with another `--output`
    "#);
    assert_same(&tree(&place.path("run")), &before);

    let data = fs::read_to_string(place.path("data.jsonl")).unwrap();
    fs::write(place.path("data.jsonl"), data.replace("box 7", "box 8")).unwrap();
    insta::assert_snapshot!(refusal(&place, &resume), @"
    exit 2
    error: run: the data are not those that the run was started with
    hint: resume with the files it was started with, or start anew with another `--output`
    ");
    assert_same(&tree(&place.path("run")), &before);

    fs::write(place.path("data.jsonl"), &data).unwrap();

    // Weights of the same shapes that something else was trained into.
    let path = place.path("model/model.safetensors");
    let weights = fs::read(&path).unwrap();
    let mut other = weights.clone();
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    other[header..].chunks_exact_mut(4).for_each(|value| value[0] ^= 1);
    fs::write(&path, other).unwrap();
    insta::assert_snapshot!(refusal(&place, &resume), @"
    exit 2
    error: run: the weights of `model` are not those that the run was started with
    hint: resume with the files it was started with, or start anew with another `--output`
    ");
    assert_same(&tree(&place.path("run")), &before);
    fs::write(&path, weights).unwrap();

    // Bytes that make no other documents are no change.
    fs::write(place.path("data.jsonl"), data.replace('\n', "\r\n\r\n")).unwrap();
    place.run(&resume);
    assert_same(&tree(&place.path("run")), &before);
}

/// What a killed run was writing goes; what only looks like it stays.
#[test]
fn only_our_own_temporaries_are_removed() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let run = place.path("run");
    let theirs = [
        "notes.txt",
        ".hidden.partial",
        ".mine.Ab12Cd.partial",
        ".best.Ab12C.partial",
        ".best.Ab1-Cd.partial",
        ".checkpoint-x.Ab12Cd.partial",
        "best.Ab12Cd.partial",
    ];
    for name in theirs {
        fs::write(run.join(name), name).unwrap();
    }
    let before = tree(&run);

    for name in [".metrics.jsonl.Ab12Cd.partial", ".recipe.toml.000000.partial"] {
        fs::write(run.join(name), "half").unwrap();
    }
    for name in
        [".checkpoint-8.Ab12Cd.partial", ".result.Zz9Zz9.partial", ".checkpoint-2.Ab12Cd.partial/removed"]
    {
        fs::create_dir_all(run.join(name)).unwrap();
        fs::write(run.join(name).join("adapter_model.safetensors"), "half").unwrap();
    }
    // Killed between the two renames that exchange a folder, between saving and removing what is too old, and in the
    // middle of a line.
    fs::create_dir(run.join(".best.Ab12Cd.partial")).unwrap();
    fs::rename(run.join("best"), run.join(".best.Ab12Cd.partial/previous")).unwrap();
    fs::create_dir(run.join("checkpoint-2")).unwrap();
    let mut torn = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    torn.push_str("{\"step\":6,\"lo");
    fs::write(run.join("metrics.jsonl"), torn).unwrap();

    place.run(&["finetune", "recipe.toml", "--resume", "--log", "silent"]);
    assert_same(&tree(&run), &before);
}

#[test]
fn every_zero_steps_is_at_the_end() {
    let place = Place::new();
    let never = ["--set", "train.save_every=0", "--set", "train.eval_every=0", "--log", "silent"];
    place.run(&[&["finetune", "recipe.toml"], &never[..]].concat());
    let names = place.names_in("run");
    let saved: Vec<&String> = names.iter().filter(|name| name.starts_with("checkpoint-")).collect();
    assert_eq!(saved, ["checkpoint-6"]);
    let evaluated: Vec<Value> = metrics(&place.path("run"))
        .into_iter()
        .filter(|line| line["eval_loss"].is_number())
        .map(|line| line["step"].clone())
        .collect();
    assert_eq!(evaluated, [6]);
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// `tests/fixtures/run` is the folder of a run that was killed after step 2 of 4. The program that wrote it kept one hash of
/// all settings as words in its records, and knew fewer keys.
#[test]
fn a_run_of_an_earlier_program_goes_on() {
    let place = Place::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    copy_folder(&root.join("tests/fixtures/run"), &place.path("earlier"));
    copy_folder(&root.join("examples/tiny-llama"), &place.path("earlier/model"));
    let within = |arguments: &[&str]| {
        let mut command = place.command(arguments);
        let output = command.current_dir(place.path("earlier")).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = within(&["finetune", "recipe.toml", "--output", "whole"]);
    assert_eq!(code, Some(0), "{said}");
    let other = "data.train=[{ path = \"data.jsonl\", weight = 2 }]";
    let (code, said) = within(&["finetune", "run/recipe.toml", "--resume", "--set", other]);
    assert_eq!(code, Some(2), "{said}");
    let records = fs::read_to_string(place.path("earlier/data.jsonl")).unwrap();
    fs::write(place.path("earlier/data.jsonl"), records.replace("box 3", "box 9")).unwrap();
    let (code, said) = within(&["finetune", "recipe.toml", "--resume"]);
    assert!(
        code == Some(2) && said.contains("the data are not those that the run was started with"),
        "{said}"
    );
    fs::write(place.path("earlier/data.jsonl"), records).unwrap();
    let (code, said) = within(&["finetune", "recipe.toml", "--resume"]);
    assert!(code == Some(0) && said.contains("going on from run/checkpoint-2"), "{said}");
    // The machine that computed the first steps may have had other instructions.
    let last = |run: &str| {
        let metrics = fs::read_to_string(place.path("earlier").join(run).join("metrics.jsonl")).unwrap();
        let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter_map(|line| line["eval_loss"].as_f64()).next_back().unwrap()
    };
    assert!((last("run") - last("whole")).abs() < 1e-4, "{} and {}", last("run"), last("whole"));
}
