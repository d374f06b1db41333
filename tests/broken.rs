use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::place::{Place, Tree, assert_same, refusal, told, tree};

const RESUME: [&str; 5] = ["finetune", "recipe.toml", "--resume", "--log", "silent"];

/// A run of six steps with checkpoints 2, 4 and 6.
fn place_with_run() -> (Place, Tree) {
    let place = Place::new();
    let recipe = fs::read_to_string(place.path("recipe.toml")).unwrap();
    fs::write(place.path("recipe.toml"), recipe.replace("keep = 2", "keep = 3")).unwrap();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let whole = results(&place.path("run"));
    (place, whole)
}

/// The run directory without what holds times.
fn results(run: &Path) -> Tree {
    tree(run).into_iter().filter(|(name, _)| name != "metrics.jsonl").collect()
}

fn change(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(path, text.replace(from, to)).unwrap();
}

fn flip_last_bit(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 0x40;
    fs::write(path, bytes).unwrap();
}

/// Every way in which the newest checkpoint can be broken: it is named, and the run goes on from the one before to the same
/// bits.
#[test]
fn a_broken_checkpoint_is_named_and_the_one_before_is_used() {
    let (place, whole) = place_with_run();
    type Breaks = fn(&Path);
    let ways: [(&str, Breaks); 9] = [
        ("optimizer.safetensors: was changed after it was written", |folder| {
            flip_last_bit(&folder.join("optimizer.safetensors"));
        }),
        ("adapter_model.safetensors: was changed after it was written", |folder| {
            flip_last_bit(&folder.join("adapter_model.safetensors"));
        }),
        ("adapter_config.json: is missing", |folder| {
            fs::remove_file(folder.join("adapter_config.json")).unwrap()
        }),
        ("trainer_state.json: was changed after it was written", |folder| {
            change(&folder.join("trainer_state.json"), "\"step\": 6", "\"step\": 5");
        }),
        ("trainer_state.json: was changed after it was written", |folder| {
            let path = folder.join("trainer_state.json");
            let state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            change(&path, &format!("\"piece_tokens\": {}", state["piece_tokens"]), "\"piece_tokens\": 0");
        }),
        ("trainer_state.json: not valid JSON", |folder| {
            let path = folder.join("trainer_state.json");
            let text = fs::read(&path).unwrap();
            fs::write(&path, &text[..text.len() / 2]).unwrap();
        }),
        ("has no `trainer_state.json`", |folder| fs::remove_file(folder.join("trainer_state.json")).unwrap()),
        ("trainer_state.json: is not valid UTF-8", |folder| {
            fs::write(folder.join("trainer_state.json"), b"\xff").unwrap();
        }),
        ("checkpoint-6: is empty", |folder| {
            fs::remove_dir_all(folder).unwrap();
            fs::create_dir(folder).unwrap();
        }),
    ];
    for (wanted, breaks) in ways {
        breaks(&place.path("run/checkpoint-6"));
        let (_, said) = place.run(&RESUME);
        assert!(
            said.starts_with("warning: a newer checkpoint is not whole and is not used: run/checkpoint-6"),
            "{said}"
        );
        assert!(said.contains(wanted), "{said}");
        assert_same(&results(&place.path("run")), &whole);
    }
}

/// Chat templates beside the default have digests as the other files have.
#[test]
fn a_further_template_that_changed_is_named() {
    const NAME: &str = "additional_chat_templates/tool_use.jinja";
    let place = Place::new();
    fs::create_dir(place.path("model/additional_chat_templates")).unwrap();
    fs::write(place.path("model").join(NAME), "tools").unwrap();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let whole = results(&place.path("run"));
    let path = place.path("run/checkpoint-6").join(NAME);
    for (wanted, text) in [("was changed after it was written", Some("mine")), ("is missing", None)] {
        match text {
            Some(text) => fs::write(&path, text).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let (_, said) = place.run(&RESUME);
        assert!(said.contains(&format!("run/checkpoint-6/{NAME}: {wanted}")), "{said}");
        assert_same(&results(&place.path("run")), &whole);
    }
}

/// The best evaluation has digests as checkpoints have. It is not written over when it is not what the run wrote.
#[test]
fn a_best_evaluation_that_changed_is_named_and_left_alone() {
    let (place, _) = place_with_run();
    type Breaks = fn(&Path);
    let ways: [(&str, Breaks); 5] = [
        ("/adapter_model.safetensors: was changed after it was written: its SHA-256 is another", |folder| {
            flip_last_bit(&folder.join("adapter_model.safetensors"));
        }),
        ("/adapter_config.json: is missing", |folder| {
            fs::remove_file(folder.join("adapter_config.json")).unwrap();
        }),
        ("/trainer_state.json: was changed after it was written: its SHA-256 is another", |folder| {
            change(&folder.join("trainer_state.json"), "\"eval_loss\": ", "\"eval_loss\": 1");
        }),
        ("/trainer_state.json: not valid JSON", |folder| {
            let path = folder.join("trainer_state.json");
            let text = fs::read(&path).unwrap();
            fs::write(&path, &text[..text.len() / 2]).unwrap();
        }),
        (": was not made by this run, and the run would write over it", |folder| {
            fs::remove_file(folder.join("trainer_state.json")).unwrap();
        }),
    ];
    let best = place.path("run/best");
    fs::rename(&best, place.path("kept")).unwrap();
    for (wanted, breaks) in ways {
        fs::create_dir(&best).unwrap();
        for name in place.names_in("kept") {
            fs::copy(place.path("kept").join(&name), best.join(&name)).unwrap();
        }
        breaks(&best);
        let before = tree(&place.path("run"));
        let said = refusal(&place, &RESUME);
        assert!(said.starts_with(&format!("exit 1\nerror: run/best{wanted}")), "{said}");
        assert!(said.contains("\nhint: move "), "{said}");
        assert_same(&tree(&place.path("run")), &before);
        fs::remove_dir_all(&best).unwrap();
    }
}

/// The newest checkpoint is that of the best step, or it is not.
#[test]
fn a_best_evaluation_that_is_missing_is_made_again_or_forgotten() {
    let (place, whole) = place_with_run();
    let best = place.path("run/best");
    let state: Value = serde_json::from_slice(&fs::read(best.join("trainer_state.json")).unwrap()).unwrap();
    assert_eq!(state["step"], 6, "the last evaluation is the best of this run");
    fs::remove_dir_all(&best).unwrap();
    let (_, said) = place.run(&RESUME);
    let wanted = "warning: run/best: the best evaluation, after step 6, is missing; it is written again from the checkpoint of \
                  that step\n";
    assert_eq!(said, wanted);
    assert_same(&results(&place.path("run")), &whole);

    fs::remove_dir_all(&best).unwrap();
    fs::remove_dir_all(place.path("run/checkpoint-6")).unwrap();
    let (_, said) = place.run(&RESUME);
    let wanted = "warning: run/best: the best evaluation, after step 3, is missing; later evaluations are no longer compared \
                  with it\n";
    assert_eq!(said, wanted);
    assert_same(&results(&place.path("run")), &whole);
}

#[test]
fn when_no_checkpoint_is_whole_each_is_named() {
    let (place, _) = place_with_run();
    flip_last_bit(&place.path("run/checkpoint-2/adapter_model.safetensors"));
    flip_last_bit(&place.path("run/checkpoint-4/optimizer.safetensors"));
    fs::remove_file(place.path("run/checkpoint-6/trainer_state.json")).unwrap();
    let before = tree(&place.path("run"));
    insta::assert_snapshot!(refusal(&place, &RESUME), @"
    exit 1
    error: run: none of the checkpoints is whole: run/checkpoint-6: has no `trainer_state.json`; run/checkpoint-4/optimizer.safetensors: was changed after it was written: its SHA-256 is another; run/checkpoint-2/adapter_model.safetensors: was changed after it was written: its SHA-256 is another
    hint: start anew with another `--output`
    ");
    assert_same(&tree(&place.path("run")), &before);
}

/// Earlier versions wrote no record of the best evaluation. It gets one, and is replaced by a better one, but for what a user put
/// there.
#[test]
fn a_best_evaluation_without_a_record_goes_on() {
    let (place, mut whole) = place_with_run();
    let state = place.path("run/checkpoint-4/trainer_state.json");
    let mut fields: Value = serde_json::from_slice(&fs::read(&state).unwrap()).unwrap();
    for key in ["files", "sha256", "kernel"] {
        assert!(fields.as_object_mut().unwrap().remove(key).is_some());
    }
    fs::write(&state, fields.to_string()).unwrap();
    fs::remove_dir_all(place.path("run/checkpoint-6")).unwrap();
    fs::remove_file(place.path("run/best/trainer_state.json")).unwrap();
    fs::write(place.path("run/best/notes.txt"), "mine").unwrap();
    whole.insert("best/notes.txt".to_string(), Some(b"mine".to_vec()));
    // A process that was killed while it wrote the record left half of it under another name.
    fs::write(place.path("run/best/.trainer_state.json.Ab12Cd.partial"), "{").unwrap();
    assert_eq!(place.run(&RESUME).1, "");
    let of_best =
        |tree: Tree| -> Tree { tree.into_iter().filter(|(name, _)| name.starts_with("best/")).collect() };
    assert_same(&of_best(results(&place.path("run"))), &of_best(whole));
}

/// Earlier versions wrote neither digests nor the instructions that were computed with.
#[test]
fn checkpoints_without_digests_go_on() {
    let (place, whole) = place_with_run();
    let without_digests = |step: u64| {
        let path = place.path(&format!("run/checkpoint-{step}/trainer_state.json"));
        let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for key in ["files", "sha256", "kernel"] {
            assert!(state.as_object_mut().unwrap().remove(key).is_some());
        }
        fs::write(path, serde_json::to_vec_pretty(&state).unwrap()).unwrap();
    };
    without_digests(4);
    fs::remove_dir_all(place.path("run/checkpoint-6")).unwrap();
    let (_, said) = place.run(&RESUME);
    assert_eq!(said, "");
    let results = results(&place.path("run"));
    let of_old = "checkpoint-4/trainer_state.json";
    assert!(results[of_old] != whole[of_old]);
    assert_eq!(results["adapter_model.safetensors"], whole["adapter_model.safetensors"]);

    // What can be seen without digests is seen: another step, and values that are no numbers.
    without_digests(6);
    change(&place.path("run/checkpoint-6/trainer_state.json"), "\"step\": 6", "\"step\": 5");
    let (_, said) = place.run(&RESUME);
    assert!(said.contains("run/checkpoint-6: `trainer_state.json` says step 5\n"), "{said}");
    without_digests(6);
    let optimizer = place.path("run/checkpoint-6/optimizer.safetensors");
    let mut bytes = fs::read(&optimizer).unwrap();
    let end = bytes.len() - 4;
    bytes[end..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&optimizer, bytes).unwrap();
    let (_, said) = place.run(&RESUME);
    assert!(said.contains("optimizer.safetensors: tensor `"), "{said}");
    assert!(said.contains("`: holds NaN, expected finite numbers\n"), "{said}");
}

#[test]
fn another_processor_is_said() {
    let (place, whole) = place_with_run();
    let path = place.path("run/checkpoint-4/trainer_state.json");
    let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let fields = state.as_object_mut().unwrap();
    let now = fields["kernel"].as_str().unwrap().to_string();
    fields["kernel"] = "abacus".into();
    // Without digests the change is not seen as one.
    fields.remove("files");
    fields.remove("sha256");
    fs::write(path, serde_json::to_vec_pretty(&state).unwrap()).unwrap();
    fs::remove_dir_all(place.path("run/checkpoint-6")).unwrap();
    let (_, said) = place.run(&RESUME);
    assert_eq!(
        said,
        format!(
            "warning: the run was computed with abacus so far, and this machine has {now}: the last bits will differ from \
             those of a run on one machine\n"
        )
    );
    let weights = "adapter_model.safetensors";
    assert_eq!(results(&place.path("run"))[weights], whole[weights]);
}

/// The variable is not the machine, and whoever set it can take it away.
#[test]
fn other_instructions_that_a_variable_chose_are_said_to_be_its_choice() {
    let (place, _) = place_with_run();
    let path = place.path("run/checkpoint-4/trainer_state.json");
    let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let fields = state.as_object_mut().unwrap();
    fields["kernel"] = "abacus".into();
    fields.remove("files");
    fields.remove("sha256");
    fs::write(path, state.to_string()).unwrap();
    fs::remove_dir_all(place.path("run/checkpoint-6")).unwrap();
    let output = place.command(&RESUME).env("PEFT_KERNELS", "portable").output().unwrap();
    assert_eq!(
        told(&place, &output),
        "exit 0\nwarning: the run was computed with abacus so far, and `PEFT_KERNELS` chooses portable: the last bits will \
         differ from those of a run with one choice"
    );
}

#[test]
fn metrics_that_cannot_be_read_are_left_out_and_named() {
    let (place, _) = place_with_run();
    let path = place.path("run/metrics.jsonl");
    let whole = fs::read(&path).unwrap();
    let mut lines: Vec<&[u8]> = whole.split_inclusive(|byte| *byte == b'\n').collect();
    lines.insert(2, b"\xff\xfe\n");
    lines.push(b"{\"step\": 6, \"lo");
    fs::write(&path, lines.concat()).unwrap();
    insta::assert_snapshot!(refusal(&place, &["inspect", "run"]), @"
    exit 1
    error: run/metrics.jsonl:3: not valid JSON: expected value at line 1 column 1
    hint: `peft finetune --resume` leaves out such lines
    ");
    let (_, said) = place.run(&RESUME);
    assert_eq!(said, "warning: run/metrics.jsonl: lines that could not be read are left out: 3\n");
    assert_eq!(fs::read(&path).unwrap(), whole);
}

#[test]
fn more_steps_of_a_run_that_has_ended_are_another_run() {
    let (place, _) = place_with_run();
    let longer = ["--set", "train.steps=12"];
    insta::assert_snapshot!(refusal(&place, &[&RESUME[..], &longer].concat()), @"
    exit 2
    error: run: the run was started with another recipe: `train.steps` was `6` and is `12` now
    hint: the run has ended; to train its result further, start another run with `--set adapter.from=run` and another `--output`
    ");
    let further = ["--set", "adapter.from=run", "--output", "further"];
    place.run(&[&["finetune", "recipe.toml", "--log", "silent"], &longer[..], &further].concat());
    assert!(place.path("further/checkpoint-12").exists());
    // Other changes have the hint that they had.
    let other = refusal(&place, &[&RESUME[..], &["--set", "train.learning_rate=1e-3"]].concat());
    assert!(other.contains("hint: resume with the recipe it was started with"), "{other}");
}
