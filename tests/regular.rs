#![cfg(unix)]
//! Devices, pipes and huge files are refused at once by every reader, and nothing from outside of a model's folder gets
//! into a copy of it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use peft::weights::Checkpoint;

use super::place::{Place, told, tree};
use super::upcycle;

/// Puts a link into the place of a file.
fn relink(path: &Path, target: impl AsRef<Path>) {
    let _ = fs::remove_file(path);
    symlink(target, path).unwrap();
}

fn pipe(path: &Path) {
    let _ = fs::remove_file(path);
    assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// Exit status and stderr of a command that must neither wait nor swell.
fn refused(place: &Place, arguments: &[&str]) -> String {
    let mut command = place.command(arguments);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > Duration::from_secs(10) {
            child.kill().unwrap();
            panic!("peft {} waits", arguments.join(" "));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output: Output = child.wait_with_output().unwrap();
    told(place, &output)
}

#[test]
fn every_reader_refuses_devices_pipes_and_huge_files() {
    const CHECK: &[&str] = &["check", "recipe.toml"];
    const EVAL: &[&str] =
        &["eval", "perplexity", "--model", "model", "--adapter", "adapter", "--data", "data.jsonl"];
    let cases: [(&str, &[&str]); 10] = [
        ("recipe.toml", CHECK),
        ("data.jsonl", CHECK),
        ("model/config.json", CHECK),
        ("model/model.safetensors", CHECK),
        ("model/tokenizer.json", CHECK),
        ("model/tokenizer_config.json", CHECK),
        ("model/generation_config.json", CHECK),
        ("model/chat_template.jinja", CHECK),
        ("adapter/adapter_config.json", EVAL),
        ("adapter/adapter_model.safetensors", EVAL),
    ];
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--set", "train.steps=1", "--output", "adapter"]);
    for (name, arguments) in cases {
        let path = place.path(name);
        let original = fs::read(&path).ok();
        relink(&path, "/dev/zero");
        let error = refused(&place, arguments);
        assert!(error.starts_with("exit 1\n"), "{name}: {error}");
        assert!(
            error.contains(&format!("{name}: is a character device, expected a regular file")),
            "{error}"
        );
        pipe(&path);
        let error = refused(&place, arguments);
        assert!(error.contains(&format!("{name}: is a named pipe, expected a regular file")), "{error}");
        assert!(error.contains("\nhint: "), "{error}");
        relink(&path, "nowhere");
        let error = refused(&place, arguments);
        assert!(error.contains(&format!("{name}: is a link to `nowhere`, which is not there")), "{error}");
        fs::remove_file(&path).unwrap();
        // Weights are mapped, not read, and may have any size.
        if name != "model/model.safetensors" {
            fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
            let error = refused(&place, arguments);
            assert!(
                error.contains(&format!("{name}: has 1099511627776 bytes, expected at most ")),
                "{error}"
            );
        }
        let _ = fs::remove_file(&path);
        if let Some(original) = original {
            fs::write(&path, original).unwrap();
        }
    }
    place.run(CHECK);
}

#[test]
fn a_link_out_of_the_model_is_not_copied_into_a_result() {
    let place = Place::new();
    fs::write(place.path("secret.json"), "{\"key\": 1}").unwrap();
    let companion = place.path("model/generation_config.json");
    relink(&companion, "../secret.json");
    place.run(&["inspect", "model"]);
    let before = tree(&place.path("."));
    for command in ["check", "finetune"] {
        let error = refused(&place, &[command, "recipe.toml"]);
        assert!(error.starts_with("exit 1\n"), "{error}");
        let link = "model/generation_config.json: is a link to `../secret.json`, outside of its folder";
        assert!(error.contains(link), "{error}");
        assert!(error.contains("hint: replace the link with a copy of the file"), "{error}");
        assert!(tree(&place.path(".")) == before, "`{command}` leaves nothing behind");
    }

    // What is linked within the folder is the model's, and weights may be anywhere.
    fs::write(place.path("model/settings.json"), "{}").unwrap();
    relink(&companion, "settings.json");
    fs::rename(place.path("model/model.safetensors"), place.path("weights")).unwrap();
    relink(&place.path("model/model.safetensors"), "../weights");
    place.run(&["finetune", "recipe.toml", "--set", "train.steps=1"]);
    assert_eq!(fs::read_to_string(place.path("run/generation_config.json")).unwrap(), "{}");
    let copied = fs::symlink_metadata(place.path("run/generation_config.json")).unwrap();
    assert!(copied.is_file());

    let merge = ["merge", "--model", "model", "--adapter", "run", "--output", "merged"];
    relink(&companion, "../secret.json");
    let error = refused(&place, &merge);
    assert!(error.contains("outside of its folder"), "{error}");
    assert!(!place.path("merged").exists());
    relink(&companion, "settings.json");
    place.run(&merge);
    assert!(!fs::symlink_metadata(place.path("merged/model.safetensors")).unwrap().is_symlink());
}

#[test]
fn a_link_out_of_an_adapter_is_not_copied_into_a_result() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent", "--set", "train.steps=1"]);
    fs::write(place.path("secret"), "key").unwrap();
    relink(&place.path("run/chat_template.jinja"), "../secret");
    let merge = ["merge", "--model", "model", "--adapter", "run", "--output", "merged"];
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        // With a tokenizer the files are copied; without one the template alone is written.
        let error = refused(&place, &merge);
        assert!(error.contains("run/chat_template.jinja: is a link to `../secret`, outside of"), "{error}");
        assert!(!place.path("merged").exists());
        fs::remove_file(place.path("run").join(name)).unwrap();
    }

    // Nothing is written of these files: those of an adapter that another one follows, and what only a tokenizer would need.
    place.run(&["finetune", "recipe.toml", "--log", "silent", "--set", "train.steps=1", "--output", "last"]);
    fs::write(place.path("last/chat_template.jinja"), "last").unwrap();
    fs::remove_file(place.path("last/tokenizer.json")).unwrap();
    for name in ["tokenizer.model", "added_tokens.json"] {
        relink(&place.path("last").join(name), "../secret");
    }
    let both = ["merge", "--model", "model", "--adapter", "run", "--adapter", "last", "--output", "both"];
    place.run(&both);
    assert_eq!(fs::read_to_string(place.path("both/chat_template.jinja")).unwrap(), "last");
    assert!(!place.path("both/tokenizer.model").exists());
}

/// transformers saves templates beside the default into a folder of their own.
#[test]
fn templates_beside_the_default_go_into_every_result() {
    const NAME: &str = "additional_chat_templates/tool_use.jinja";
    let place = upcycle::place();
    let tuned = Place::new();
    for place in [&place, &tuned] {
        fs::create_dir(place.path("model/additional_chat_templates")).unwrap();
        fs::write(place.path("model").join(NAME), "tools").unwrap();
        fs::write(place.path("model/additional_chat_templates/notes.md"), "no template").unwrap();
    }
    let has_templates = |folder: &Path| {
        assert_eq!(fs::read_to_string(folder.join(NAME)).unwrap(), "tools");
        assert_eq!(fs::read_dir(folder.join("additional_chat_templates")).unwrap().count(), 1);
    };
    place.run(&["upcycle", "upcycle.toml"]);
    has_templates(&place.path("mixture"));
    let run = ["finetune", "recipe.toml", "--log", "silent", "--set", "train.steps=2"];
    tuned.run(&run);
    has_templates(&tuned.path("run"));
    has_templates(&tuned.path("run/checkpoint-2"));
    // The result is written again, where there is one.
    tuned.run(&[&run[..], &["--resume"]].concat());
    has_templates(&tuned.path("run"));
    tuned.run(&["merge", "--model", "model", "--adapter", "run", "--output", "merged"]);
    has_templates(&tuned.path("merged"));
    let recipe = fs::read_to_string(tuned.path("recipe.toml")).unwrap();
    let recipe = recipe
        .replace("adapter = { rank = 4, dropout = 0.1 }", "")
        .replace("steps = 6", "steps = 1, full = true");
    fs::write(tuned.path("full.toml"), recipe).unwrap();
    tuned.run(&["finetune", "full.toml", "--output", "full"]);
    has_templates(&tuned.path("full"));

    // A run would write over templates of somebody else.
    fs::create_dir_all(tuned.path("other/additional_chat_templates")).unwrap();
    let error = refused(&tuned, &["finetune", "recipe.toml", "--output", "other"]);
    assert!(error.contains("holds `additional_chat_templates` and no run"), "{error}");

    let check: &[&str] = &["check", "recipe.toml"];
    let template = tuned.path("model").join(NAME);
    fs::write(&template, " ".repeat((1 << 20) + 1)).unwrap();
    let error = refused(&tuned, check);
    assert!(error.contains(&format!("model/{NAME}: has 1048577 bytes, expected at most 1048576")), "{error}");
    fs::write(tuned.path("secret.jinja"), "secret").unwrap();
    relink(&template, "../../secret.jinja");
    assert!(refused(&tuned, check).contains("outside of its folder"));
    fs::remove_file(&template).unwrap();
    (0..65).for_each(|n| fs::write(template.with_file_name(format!("{n}.jinja")), "x").unwrap());
    let error = refused(&tuned, check);
    assert!(error.contains("holds 65 chat templates, expected at most 64"), "{error}");
    fs::remove_dir_all(tuned.path("model/additional_chat_templates")).unwrap();
    fs::create_dir(tuned.path("elsewhere")).unwrap();
    fs::write(tuned.path("elsewhere/tool_use.jinja"), "secret").unwrap();
    relink(&tuned.path("model/additional_chat_templates"), "../elsewhere");
    assert!(refused(&tuned, check).contains("outside of its folder"));
}

#[test]
fn companions_that_are_no_json_are_refused_before_the_work() {
    let place = Place::new();
    fs::write(place.path("model/added_tokens.json"), "root:x:0:0").unwrap();
    let error = refused(&place, &["check", "recipe.toml"]);
    assert!(error.contains("model/added_tokens.json: not valid JSON: "), "{error}");
}

#[test]
fn the_blobs_of_a_hub_cache_belong_to_its_snapshots() {
    let place = Place::new();
    let repository = place.path("hub/models--org--name");
    let snapshot = repository.join("snapshots/0123456789abcdef0123456789abcdef01234567");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir(repository.join("blobs")).unwrap();
    for entry in fs::read_dir(place.path("model")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        fs::copy(&path, repository.join("blobs").join(format!("{name}-blob"))).unwrap();
        symlink(format!("../../blobs/{name}-blob"), snapshot.join(name)).unwrap();
    }
    let target = place.path("copy");
    fs::create_dir(&target).unwrap();
    let checkpoint = Checkpoint::open(snapshot.to_str().unwrap()).unwrap();
    checkpoint.write_companions(&target).unwrap();
    assert_eq!(
        fs::read(target.join("tokenizer.json")).unwrap(),
        fs::read(place.path("model/tokenizer.json")).unwrap()
    );
    // Another repository's blobs are not this one's.
    fs::create_dir_all(place.path("hub/models--org--other/blobs")).unwrap();
    fs::write(place.path("hub/models--org--other/blobs/x"), "{}").unwrap();
    relink(&snapshot.join("tokenizer.json"), "../../../models--org--other/blobs/x");
    let error = checkpoint.write_companions(&target).unwrap_err().to_string();
    assert!(error.contains("outside of its folder"), "{error}");
}

#[test]
fn the_files_of_a_run_are_regular_too() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--set", "train.steps=2", "--log", "silent"]);
    const RESUME: &[&str] = &["finetune", "recipe.toml", "--set", "train.steps=2", "--resume"];
    let no_state = "none of the checkpoints is whole: run/checkpoint-2: has no `trainer_state.json`";
    for (file, command, reason) in [
        ("run/recipe.toml", RESUME, "pipe"),
        ("run/metrics.jsonl", RESUME, "pipe"),
        ("run/checkpoint-2/trainer_state.json", RESUME, no_state),
    ] {
        let whole = fs::read(place.path(file)).unwrap();
        pipe(&place.path(file));
        let said = refused(&place, command);
        assert!(!said.starts_with("exit 0") && said.contains(reason), "{file}: {said}");
        fs::remove_file(place.path(file)).unwrap();
        fs::write(place.path(file), whole).unwrap();
    }
}
