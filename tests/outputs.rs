use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::place::{Place, assert_same, refusal, told, tree};

/// What a command says that is refused and changes nothing.
fn refused(place: &Place, arguments: &[&str]) -> String {
    let before = tree(&place.path(""));
    let said = refusal(place, arguments);
    assert_same(&tree(&place.path("")), &before);
    said
}

fn finetune(output: &str) -> [&str; 6] {
    ["finetune", "recipe.toml", "--log", "silent", "--output", output]
}

/// Other trainers use the names `checkpoint-N` and `best` too.
#[test]
fn folders_of_others_are_refused_by_name() {
    for (made, named) in [
        ("theirs/checkpoint-1/model.safetensors", "checkpoint-1"),
        ("theirs/best/model.safetensors", "best"),
        ("theirs/model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"),
        ("theirs/tokenizer_config.json", "tokenizer_config.json"),
    ] {
        let place = Place::new();
        let file = place.path(made);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "theirs").unwrap();
        for resume in [&[][..], &["--resume"][..]] {
            let said = refused(&place, &[&finetune("theirs")[..], resume].concat());
            let wanted = format!("exit 2\nerror: theirs: holds `{named}` and no run, and the run would ");
            assert!(said.starts_with(&wanted), "{said}");
        }
        let said = refused(&place, &["check", "recipe.toml", "--set", "output=theirs"]);
        assert!(said.contains(&format!("holds `{named}` and no run")), "{said}");
    }
}

/// A folder of metrics alone is no run that `best` could be of, and a checkpoint of another trainer is not resumed.
#[test]
fn a_run_does_not_take_what_others_made_for_its_own() {
    let place = Place::new();
    fs::create_dir_all(place.path("theirs/best")).unwrap();
    fs::write(place.path("theirs/metrics.jsonl"), "").unwrap();
    fs::write(place.path("theirs/best/config.json"), "{}").unwrap();
    insta::assert_snapshot!(refused(&place, &[&finetune("theirs")[..], &["--resume"]].concat()), @"
    exit 2
    error: theirs: holds `best` and no `recipe.toml` of a run that made it
    hint: move it to another folder, or choose another run directory with `--output`
    ");

    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    fs::create_dir(place.path("run/checkpoint-500")).unwrap();
    fs::write(place.path("run/checkpoint-500/trainer_state.json"), "{\"global_step\": 500}").unwrap();
    insta::assert_snapshot!(refused(&place, &["finetune", "recipe.toml", "--resume"]), @"
    exit 2
    error: run/checkpoint-500: is not a checkpoint of this program
    hint: move it to another folder, or choose another run directory with `--output`
    ");
}

/// Of checkpoints that are there, only those of the run are removed.
#[test]
fn only_checkpoints_of_the_run_are_pruned() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    copy(&place, "run/checkpoint-4", "run/checkpoint-1");
    copy(&place, "run/checkpoint-4", "run/checkpoint-2");
    let state = place.path("run/checkpoint-2/trainer_state.json");
    let other = fs::read_to_string(&state).unwrap().replace("\"seed\": \"42\"", "\"seed\": \"43\"");
    fs::write(&state, other).unwrap();
    place.run(&["finetune", "recipe.toml", "--log", "silent", "--resume"]);
    assert_eq!(checkpoints(&place), ["checkpoint-2", "checkpoint-4", "checkpoint-6"]);
}

fn copy(place: &Place, from: &str, to: &str) {
    fs::create_dir(place.path(to)).unwrap();
    for (name, bytes) in tree(&place.path(from)) {
        let path = place.path(to).join(name);
        match bytes {
            None => fs::create_dir(path).unwrap(),
            Some(bytes) => fs::write(path, bytes).unwrap(),
        }
    }
}

fn checkpoints(place: &Place) -> Vec<String> {
    place.names_in("run").into_iter().filter(|name| name.starts_with("checkpoint-")).collect()
}

/// Whose a checkpoint is whose record cannot be read, the header of its optimizer's state tells.
#[test]
fn a_checkpoint_without_a_record_is_pruned_where_it_is_of_the_run() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    for step in [1, 2, 3] {
        let folder = format!("run/checkpoint-{step}");
        copy(&place, "run/checkpoint-4", &folder);
        fs::write(place.path(&folder).join("trainer_state.json"), "{\"step\":").unwrap();
    }
    fs::remove_file(place.path("run/checkpoint-1/trainer_state.json")).unwrap();
    fs::write(place.path("run/checkpoint-3/optimizer.safetensors"), "theirs").unwrap();
    place.run(&["finetune", "recipe.toml", "--log", "silent", "--resume"]);
    assert_eq!(checkpoints(&place), ["checkpoint-3", "checkpoint-4", "checkpoint-6"]);
}

/// A later checkpoint that is not whole does not count among those that are kept.
#[test]
fn a_broken_checkpoint_does_not_take_the_place_of_a_whole_one() {
    let place = Place::new();
    let recipe = fs::read_to_string(place.path("recipe.toml")).unwrap();
    fs::write(place.path("recipe.toml"), recipe.replace("keep = 2", "keep = 1")).unwrap();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    copy(&place, "run/checkpoint-6", "run/checkpoint-8");
    place.run(&["finetune", "recipe.toml", "--log", "silent", "--resume"]);
    assert_eq!(checkpoints(&place), ["checkpoint-6", "checkpoint-8"]);
}

/// The folder of the best evaluation says of which run it is, and only then it is removed or written over.
#[test]
fn the_best_evaluation_of_another_run_is_left_alone() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let state = |folder: &str| -> Value {
        let text = fs::read(place.path(folder).join("trainer_state.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    };
    assert_eq!(state("run/best")["fingerprint"], state("run/checkpoint-6")["fingerprint"]);
    let theirs = place.path("run/best");
    fs::remove_dir_all(&theirs).unwrap();
    fs::create_dir(&theirs).unwrap();
    fs::write(theirs.join("config.json"), "{}").unwrap();
    fs::write(theirs.join("trainer_state.json"), "{\"global_step\": 5}").unwrap();
    let wanted = "exit 1\nerror: run/best: was not made by this run, and the run would write over it\nhint: move it to another \
                  folder and go on with `--resume`";
    assert_eq!(refused(&place, &["finetune", "recipe.toml", "--log", "silent", "--resume"]), wanted);
    // Without any checkpoint the run begins again, and would remove it.
    for name in checkpoints(&place) {
        fs::remove_dir_all(place.path("run").join(name)).unwrap();
    }
    fs::remove_file(theirs.join("trainer_state.json")).unwrap();
    assert_eq!(refused(&place, &["finetune", "recipe.toml", "--log", "silent", "--resume"]), wanted);
}

/// What a user put into folders of the run is there after these folders were replaced or would have been removed.
#[test]
fn files_of_others_in_folders_of_the_run_stay() {
    let place = Place::new();
    let run = ["finetune", "recipe.toml", "--log", "silent"];
    place.run(&run);
    fs::remove_dir_all(place.path("run/checkpoint-6")).unwrap();
    copy(&place, "run/checkpoint-4", "run/checkpoint-2");
    for folder in ["run/best", "run/checkpoint-2"] {
        fs::write(place.path(folder).join("notes.txt"), "mine").unwrap();
        fs::create_dir_all(place.path(folder).join("plots/small")).unwrap();
        fs::write(place.path(folder).join("plots/small/loss.svg"), "mine").unwrap();
    }
    copy(&place, "run/checkpoint-4", "run/checkpoint-3");
    let template = "additional_chat_templates/mine.jinja";
    for folder in ["run/best", "run/checkpoint-3"] {
        fs::create_dir(place.path(folder).join("additional_chat_templates")).unwrap();
        fs::write(place.path(folder).join(template), "mine").unwrap();
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::{PermissionsExt, symlink};
        symlink("..", place.path("run/best/up")).unwrap();
        symlink("nowhere", place.path("run/best/dangling")).unwrap();
        let sealed = place.path("run/best/sealed");
        fs::write(&sealed, "mine").unwrap();
        fs::set_permissions(&sealed, fs::Permissions::from_mode(0o0)).unwrap();
        let pipe = place.path("run/best/pipe");
        assert!(Command::new("mkfifo").arg(pipe).status().unwrap().success());
    }
    let of_best = place.names_in("run/best");
    // What a desktop leaves keeps no checkpoint.
    copy(&place, "run/checkpoint-4", "run/checkpoint-1");
    fs::write(place.path("run/checkpoint-1/.DS_Store"), "").unwrap();
    // The run goes on from step 4, finds a better evaluation after step 6, and keeps the last two checkpoints.
    let (_, said) = place.run(&[&run[..], &["--resume"]].concat());
    insta::assert_snapshot!(said, @"
    warning: run/checkpoint-2 is kept, because the run did not write `notes.txt` in it
    warning: run/checkpoint-3 is kept, because the run did not write `additional_chat_templates/mine.jinja` in it
    ");
    let state: Value =
        serde_json::from_slice(&fs::read(place.path("run/best/trainer_state.json")).unwrap()).unwrap();
    assert_eq!(state["step"], 6);
    assert!(state["files"].get("notes.txt").is_none(), "it is not of the run: {state}");
    assert_eq!(place.names_in("run/best"), of_best);
    for folder in ["run/best", "run/checkpoint-2"] {
        for name in ["notes.txt", "plots/small/loss.svg"] {
            assert_eq!(fs::read_to_string(place.path(folder).join(name)).unwrap(), "mine", "{folder}");
        }
    }
    for folder in ["run/best", "run/checkpoint-3"] {
        assert_eq!(fs::read_to_string(place.path(folder).join(template)).unwrap(), "mine", "{folder}");
    }
    assert_eq!(checkpoints(&place), ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-6"]);

    // Begun again, the run leaves it there too.
    for name in checkpoints(&place) {
        fs::remove_dir_all(place.path("run").join(name)).unwrap();
    }
    place.run(&[&run[..], &["--resume"]].concat());
    assert_eq!(place.names_in("run/best"), of_best);
}

/// Templates that the run copied keep no checkpoint, whether its record names them or not, as those of earlier builds do;
/// what a user put beside them does.
#[test]
fn further_templates_of_the_run_keep_no_checkpoint() {
    let place = Place::new();
    fs::create_dir(place.path("model/additional_chat_templates")).unwrap();
    fs::write(place.path("model/additional_chat_templates/tool_use.jinja"), "tools").unwrap();
    let run = ["finetune", "recipe.toml", "--log", "silent"];
    place.run(&run);
    for step in 0..=3 {
        copy(&place, "run/checkpoint-4", &format!("run/checkpoint-{step}"));
    }
    for step in [1, 2] {
        let path = place.path(&format!("run/checkpoint-{step}/trainer_state.json"));
        let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let state = state.as_object_mut().unwrap();
        state.remove("lists_templates").unwrap();
        let files = state["files"].as_object_mut().unwrap();
        files.remove("additional_chat_templates/tool_use.jinja").unwrap();
        fs::write(path, serde_json::to_string_pretty(state).unwrap()).unwrap();
    }
    for step in [2, 3] {
        let notes = format!("run/checkpoint-{step}/additional_chat_templates/notes.md");
        fs::write(place.path(&notes), "mine").unwrap();
    }
    let (_, said) = place.run(&[&run[..], &["--resume"]].concat());
    insta::assert_snapshot!(said, @"warning: run/checkpoint-3 is kept, because the run did not write `additional_chat_templates/notes.md` in it");
    assert_eq!(checkpoints(&place), ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-6"]);
}

/// A file that came into the run directory before the result did, or that was changed there, is not written over.
#[test]
fn the_first_result_is_not_written_over_files_of_others() {
    let place = Place::new();
    let run = [&finetune("run")[..], &["--resume"]].concat();
    place.run(&run);
    let whole = tree(&place.path("run"));
    // What is the same is lost to nobody.
    fs::remove_file(place.path("run/adapter_model.safetensors")).unwrap();
    place.run(&run);
    assert_same(&tree(&place.path("run")), &whole);

    fs::remove_file(place.path("run/adapter_model.safetensors")).unwrap();
    fs::write(place.path("run/README.md"), "mine").unwrap();
    insta::assert_snapshot!(refused(&place, &run), @"
    exit 1
    error: run/README.md: differs from the result of the run, which would be written over it
    hint: move it to another folder and go on with `--resume`
    ");
    fs::remove_file(place.path("run/README.md")).unwrap();
    place.run(&run);
    assert_same(&tree(&place.path("run")), &whole);

    // Weights are no file like others: those of somebody else stay, and those of the run do not give away what is beside them.
    for name in ["adapter_model.safetensors", "adapter_config.json"] {
        fs::write(place.path("run").join(name), "theirs").unwrap();
        let wanted = format!(
            "exit 1\nerror: run/{name}: differs from the result of the run, which would be written over it"
        );
        let said = refused(&place, &run);
        assert!(said.starts_with(&wanted), "{said}");
        fs::remove_file(place.path("run").join(name)).unwrap();
        place.run(&run);
        assert_same(&tree(&place.path("run")), &whole);
    }

    // What the run wrote earlier is replaced, even if it would write something else now.
    fs::copy(
        place.path("run/checkpoint-4/adapter_model.safetensors"),
        place.path("run/adapter_model.safetensors"),
    )
    .unwrap();
    assert!(tree(&place.path("run")) != whole);
    place.run(&run);
    assert_same(&tree(&place.path("run")), &whole);
}

/// Nor are files in a folder of the result, and things in the place of its files that are no files.
#[test]
fn the_first_result_is_not_written_over_what_is_no_file_or_in_a_folder() {
    let place = Place::new();
    let template = "additional_chat_templates/tool_use.jinja";
    fs::create_dir(place.path("model/additional_chat_templates")).unwrap();
    fs::write(place.path("model").join(template), "tools").unwrap();
    let run = [&finetune("run")[..], &["--resume"]].concat();
    place.run(&run);
    let whole = tree(&place.path("run"));
    let refused_for = |name: &str| {
        let said = refusal(&place, &run);
        let wanted = format!(
            "exit 1\nerror: run/{name}: differs from the result of the run, which would be written over it"
        );
        assert!(said.starts_with(&wanted), "{said}");
    };
    fs::remove_file(place.path("run/adapter_model.safetensors")).unwrap();
    fs::write(place.path("run").join(template), "mine").unwrap();
    refused_for(template);
    assert_eq!(fs::read_to_string(place.path("run").join(template)).unwrap(), "mine");
    fs::remove_file(place.path("run").join(template)).unwrap();

    let card = place.path("run/README.md");
    fs::remove_file(&card).unwrap();
    fs::create_dir(&card).unwrap();
    refused_for("README.md");
    fs::remove_dir(&card).unwrap();
    #[cfg(unix)]
    {
        assert!(Command::new("mkfifo").arg(&card).status().unwrap().success());
        refused_for("README.md");
        assert!(std::os::unix::fs::FileTypeExt::is_fifo(&fs::metadata(&card).unwrap().file_type()));
        fs::remove_file(&card).unwrap();
        std::os::unix::fs::symlink("nowhere", &card).unwrap();
        refused_for("README.md");
        fs::remove_file(&card).unwrap();
    }
    place.run(&run);
    assert_same(&tree(&place.path("run")), &whole);
}

#[test]
fn a_file_in_the_place_of_the_best_evaluation_is_refused() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    fs::remove_dir_all(place.path("run/best")).unwrap();
    fs::write(place.path("run/best"), "mine").unwrap();
    insta::assert_snapshot!(refused(&place, &[&finetune("run")[..], &["--resume"]].concat()), @"
    exit 2
    error: run/best: is no folder, and the run keeps its best evaluation there
    hint: move it to another folder, or choose another run directory with `--output`
    ");
}

#[cfg(unix)]
#[test]
fn names_that_cannot_be_meant_are_refused_by_every_command_that_writes() {
    let place = crate::upcycle::place();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    for (output, wanted) in [
        ("/", "the output `/` is the root of the file system"),
        ("~/runs/x", "the output `~/runs/x` begins with `~`, which only a shell replaces with a home folder"),
        ("~/..", "the output `~/..` begins with `~`, which"),
        ("$HOME/x", "the output `$HOME/x` has `$HOME` in it, and only a shell replaces variables"),
        (".", "the output `.` is the folder that the command runs in"),
        ("..", "the output `..` is no name of a folder, for it ends with `..`"),
    ] {
        let set = format!("output={output}");
        for command in [
            &finetune(output)[..],
            &["check", "recipe.toml", "--set", &set],
            &["check", "upcycle.toml", "--set", &set],
            &["upcycle", "upcycle.toml", "--output", output],
            &["merge", "--model", "model", "--adapter", "run", "--output", output],
        ] {
            let said = refused(&place, command);
            assert!(said.starts_with(&format!("exit 2\nerror: {wanted}")), "{command:?}: {said}");
            assert!(said.contains("\nhint: "), "{command:?}: {said}");
        }
    }
    std::os::unix::fs::symlink("nowhere", place.path("dangling")).unwrap();
    for output in ["dangling", "dangling/x"] {
        for command in [
            &finetune(output)[..],
            &["upcycle", "upcycle.toml", "--output", output],
            &["merge", "--model", "model", "--adapter", "run", "--output", output],
        ] {
            let said = refusal(&place, command);
            let wanted = "exit 2\nerror: dangling: is a link to `nowhere`, which is not there\nhint: ";
            assert!(said.starts_with(wanted), "{command:?}: {said}");
        }
    }
    assert!(!place.path("nowhere").exists());
}

#[test]
fn the_home_folder_and_folders_that_are_read_are_no_outputs() {
    let place = Place::new();
    fs::create_dir_all(place.path("home")).unwrap();
    let output = place.path("home");
    let output = place.command(&finetune(output.to_str().unwrap())).env("HOME", &output).output().unwrap();
    let said = told(&place, &output);
    assert!(said.starts_with("exit 2\nerror: the output `[place]/home` is your home folder\n"), "{said}");

    fs::create_dir_all(place.path("texts")).unwrap();
    fs::copy(place.path("data.jsonl"), place.path("texts/data.jsonl")).unwrap();
    let data = ["--set", "data.train=[{ path = \"texts/data.jsonl\" }]"];
    insta::assert_snapshot!(refused(&place, &[&finetune("texts")[..], &data].concat()), @"
    exit 2
    error: the output `texts` is the folder of the data `texts/data.jsonl`
    hint: name a folder of its own, such as `runs/first`
    ");
}

/// A link to a folder and a last `.` are other names of a folder.
#[cfg(unix)]
#[test]
fn other_names_of_a_folder_are_understood() {
    let place = Place::new();
    for name in ["real", "real-merged"] {
        fs::create_dir(place.path(name)).unwrap();
    }
    std::os::unix::fs::symlink("real", place.path("link")).unwrap();
    std::os::unix::fs::symlink("real-merged", place.path("link-merged")).unwrap();
    place.run(&finetune("link"));
    place.run(&finetune("new/run/."));
    for (adapter, output) in [("real", "link-merged"), ("new/run", "new/merged/.")] {
        place.run(&[
            "merge",
            "--model",
            "model",
            "--adapter",
            adapter,
            "--output",
            output,
            "--log",
            "silent",
        ]);
    }
    // The receipt names the adapter, which differs.
    let merged = |folder: &str| {
        let mut files = tree(&place.path(folder));
        assert!(files.remove("merge.json").is_some());
        files
    };
    assert_same(&merged("real-merged"), &merged("new/merged"));
    assert!(place.path("link-merged").is_symlink(), "the link stays a link");
    assert!(!place.names_in("").iter().any(|name| name.ends_with(".partial")));
}

/// What a killed merge was writing is removed by the next one of that name, and what a running one writes is not.
#[cfg(unix)]
#[test]
fn rests_of_killed_merges_are_removed() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let merge =
        |output| ["merge", "--model", "model", "--adapter", "run", "--output", output, "--log", "silent"];
    for name in [
        ".merged.Ab12Cd.partial",
        ".merged.running.partial",
        ".merged.held00.partial",
        ".other.Ab12Cd.partial",
    ] {
        fs::create_dir(place.path(name)).unwrap();
        fs::write(place.path(name).join("model.safetensors"), "half").unwrap();
    }
    let held = fs::File::open(place.path(".merged.held00.partial")).unwrap();
    held.lock().unwrap();
    place.run(&merge("merged"));
    let partial = |place: &Place| -> Vec<String> {
        place.names_in("").into_iter().filter(|name| name.ends_with(".partial")).collect()
    };
    assert_eq!(
        partial(&place),
        [".merged.held00.partial", ".merged.running.partial", ".other.Ab12Cd.partial"]
    );

    // A merge that is really killed leaves its folder, without a lock.
    for name in partial(&place) {
        fs::remove_dir_all(place.path(&name)).unwrap();
    }
    let begin = Instant::now();
    while partial(&place).is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(60), "the merge is always over before the kill");
        let _ = fs::remove_dir_all(place.path("killed"));
        let mut child = place.command(&merge("killed")).stderr(Stdio::null()).spawn().unwrap();
        while partial(&place).is_empty() && child.try_wait().unwrap().is_none() {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let _ = fs::remove_dir_all(place.path("killed"));
    place.run(&merge("killed"));
    assert_eq!(partial(&place), [""; 0]);
}

/// Renamed while the run goes on, the directory is not made again without its recipe, metrics and lock.
#[cfg(unix)]
#[test]
fn a_run_directory_that_is_gone_is_noticed() {
    let place = Place::new();
    let long = ["--set", "train.steps=100000", "--set", "train.save_every=20", "--set", "train.eval_every=0"];
    let run = ["finetune", "recipe.toml", "--log", "silent"];
    let child = place.command(&[&run[..], &long].concat()).stderr(Stdio::piped()).spawn().unwrap();
    let begin = Instant::now();
    while !place.path("run/checkpoint-20").exists() {
        assert!(begin.elapsed() < Duration::from_secs(60), "the run does not begin");
        std::thread::sleep(Duration::from_millis(2));
    }
    fs::rename(place.path("run"), place.path("moved")).unwrap();
    insta::assert_snapshot!(told(&place, &child.wait_with_output().unwrap()), @"
    exit 1
    error: run: was removed or renamed while the run went on, and nothing more is saved
    hint: put it back under this name and go on with `--resume`, or start anew
    ");
    assert!(!place.path("run").exists(), "{:?}", place.names_in("run"));
    assert!(place.path("moved/checkpoint-20").exists());
}

#[test]
fn what_a_run_will_write_is_known_before() {
    let place = Place::new();
    let recipe = fs::read_to_string(place.path("recipe.toml")).unwrap();
    let full = recipe
        .replace("adapter = { rank = 4, dropout = 0.1 }", "")
        .replace("steps = 6", "full = true, steps = 6");
    for (output, recipe) in [("adapter", recipe), ("full", full)] {
        fs::write(place.path("recipe.toml"), recipe).unwrap();
        let set = format!("output={output}");
        let report: Value = place.json(&["check", "recipe.toml", "--json", "--set", &set]);
        let predicted = report["disk_bytes"].as_u64().unwrap();
        place.run(&["finetune", "recipe.toml", "--log", "silent", "--set", &set]);
        let found: usize = tree(&place.path(output)).values().flatten().map(Vec::len).sum();
        let found = found as u64;
        assert!((found..=2 * found).contains(&predicted), "{output}: {predicted} predicted, {found} found");
    }
}

/// A tensor of zeros that takes no room where it is, and would where it is copied to.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_is_too_small_is_known_before_a_merge() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let path = place.path("model/model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let end = (bytes.len() - 8 - length) as u64;
    // 12 TiB, which is more than is free and less than a file can have.
    let more = 12_u64 << 40;
    let tensor =
        serde_json::json!({ "dtype": "F32", "shape": [more / 4], "data_offsets": [end, end + more] });
    header.insert("model.rotary_emb.inv_freq".to_string(), tensor);
    let header = serde_json::to_vec(&header).unwrap();
    let file = fs::File::create(&path).unwrap();
    let whole = [&(header.len() as u64).to_le_bytes()[..], &header, &bytes[8 + length..]].concat();
    std::io::Write::write_all(&mut &file, &whole).unwrap();
    if file.set_len(whole.len() as u64 + more).is_err() {
        return;
    }
    let said = refusal(&place, &["merge", "--model", "model", "--adapter", "run", "--output", "merged"]);
    let wanted = "exit 1\nerror: merged: the disk has ";
    assert!(
        said.starts_with(wanted) && said.contains(" free, and 12288.0 GiB are going to be written\n"),
        "{said}"
    );
    assert!(!place.path("merged").exists());
}

/// `check` refuses what a run would be refused for later: a folder that may not be written, a disk without room.
#[cfg(unix)]
#[test]
fn what_the_file_system_shows_is_known_to_check() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;

    let place = Place::new();
    let sets = ["train.steps=1000000000", "train.save_every=1", "train.keep=1000000"];
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
    let said = refused(&place, &[&["check", "recipe.toml"], &sets[..]].concat());
    assert!(said.starts_with("exit 1\nerror: run: the disk has "), "{said}");
    assert!(
        said.contains("hint: free some space, keep fewer checkpoints with `train.keep`, or choose"),
        "{said}"
    );

    let closed = place.path("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(place.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    fs::set_permissions(&closed, PermissionsExt::from_mode(0o555)).unwrap();
    for command in ["check", "finetune"] {
        let mut command = place.command(&[command, "recipe.toml", "--set", "output=closed/run"]);
        // Root may write everywhere; nobody may not.
        if fs::create_dir(closed.join("try")).is_ok() {
            fs::remove_dir(closed.join("try")).unwrap();
            command.uid(65534);
        }
        let Ok(output) = command.output() else { return };
        assert_eq!(
            told(&place, &output),
            "exit 1\nerror: closed/run: Permission denied (os error 13)\nhint: change the permissions, or choose an output \
             folder that can be written with `--output`"
        );
    }
}

/// `check` says that a run is there, and whether the recipe could go on with it.
#[test]
fn check_knows_the_run_that_is_there() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let (_, said) = place.run(&["check", "recipe.toml"]);
    assert_eq!(
        said,
        "warning: `run` holds a run of this recipe already: `peft finetune` goes on with it with `--resume`, or writes to \
         another folder with `--output`\n"
    );
    let (_, said) = place.run(&["check", "recipe.toml", "--set", "seed=1"]);
    let wanted = "warning: `peft finetune` needs another folder with `--output`: run: the run was started with another recipe: ";
    assert!(said.starts_with(wanted), "{said}");
}

/// The top folder of a run has the weights of the best evaluation, or on request those of the last step.
#[test]
fn a_run_leaves_its_best_weights_or_its_last() {
    let place = Place::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The learning rate grows to the end and is far too high there, so that the last evaluation is not the best.
    let sets = [
        format!("model.source={}", root.join("examples/tiny-llama").display()),
        format!("data.train=[{{ path = {:?} }}]", root.join("tests/fixtures/run/data.jsonl")),
        "adapter.dropout=0".to_string(),
        "train.eval_every=1".to_string(),
        "train.learning_rate=0.2".to_string(),
        "train.warmup=1.0".to_string(),
    ];
    let run = |output: &str, r#final: &str| {
        let mut arguments =
            vec!["finetune", "recipe.toml", "--output", output, "--log", "json", "--set", r#final];
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        let said = place.run(&arguments).1;
        serde_json::from_str::<Value>(said.lines().last().unwrap()).unwrap()
    };
    let end = run("best", "train.final=best");
    let step = end["result"]["step"].as_u64().unwrap();
    assert!(end["event"] == "end" && end["result"]["is_best"] == true && (1..6).contains(&step), "{end}");
    let weights = |path: &str| fs::read(place.path(path).join("adapter_model.safetensors")).unwrap();
    assert_eq!(weights("best"), weights("best/best"));
    assert_ne!(weights("best"), weights("best/checkpoint-6"));
    let end = run("last", "train.final=last");
    assert_eq!((&end["result"]["step"], &end["result"]["is_best"]), (&6.into(), &false.into()));
    assert_ne!(weights("last"), weights("last/best"));
}

#[test]
fn of_few_documents_none_is_held_out_unless_a_share_is_asked_for() {
    let place = Place::new();
    let recipe = fs::read_to_string(place.path("recipe.toml")).unwrap();
    fs::write(place.path("recipe.toml"), recipe.replace("eval_share = 0.2, ", "")).unwrap();
    let documents = |set: &[&str]| {
        let report = place.json(&[&["check", "recipe.toml", "--json"], set].concat());
        report["eval_documents"].as_u64().unwrap()
    };
    assert_eq!(documents(&[]), 0);
    assert_eq!(documents(&["--set", "data.eval_share=0.25"]), 6);
    let records: String =
        (0..50).map(|n| format!("{{\"prompt\": \"Kite {n}?\", \"completion\": \"Box {n}.\"}}\n")).collect();
    fs::write(place.path("data.jsonl"), records).unwrap();
    assert!(documents(&[]) > 0);
    assert_eq!(documents(&["--set", "data.eval=false"]), 0);
}

#[test]
fn the_metrics_of_a_run_are_drawn_and_printed_as_csv() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let (csv, _) = place.run(&["inspect", "run", "--csv"]);
    let lines: Vec<&str> = csv.lines().collect();
    let columns: Vec<&str> = lines[0].split(',').collect();
    assert!(columns[0] == "step" && columns.contains(&"eval_loss") && columns.contains(&"loss"), "{csv}");
    // Six steps and an evaluation before, after the third and after the last.
    assert_eq!(lines.len(), 1 + 6 + 3);
    assert!(lines.iter().all(|line| line.split(',').count() == columns.len()), "{csv}");
    let (said, _) = place.run(&["inspect", "run"]);
    assert!(said.chars().filter(|c| ('▁'..='█').contains(c)).count() == 6 + 3, "{said}");
    assert!(refusal(&place, &["inspect", "model", "--csv"]).contains("`model` is none"));
}

/// What a merge keeps is measured on data, before and after.
#[test]
fn a_merge_prints_the_loss_of_base_adapter_and_merged_model() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let merge = ["merge", "--model", "model", "--adapter", "run", "--output", "merged", "--data"];
    let said = refusal(&place, &[&merge[..], &["none.jsonl"]].concat());
    assert!(said.contains("none.jsonl") && !place.path("merged").exists(), "{said}");
    let (losses, _) = place.run(&[&merge[..], &["data.jsonl"]].concat());
    let losses: Vec<(&str, f64)> = losses
        .lines()
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, loss)| (name.trim(), loss.parse().unwrap()))
        .collect();
    let [("base", base), ("with the adapter", adapter), ("merged", merged)] = losses[..] else {
        panic!("{losses:?}")
    };
    assert!(adapter < base - 0.1 && (adapter - merged).abs() < 1e-4, "{losses:?}");
    let eval = ["eval", "perplexity", "--model", "merged", "--data", "data.jsonl", "--json"];
    assert!((place.json(&eval)["nll"].as_f64().unwrap() - merged).abs() < 1e-6);
}

#[test]
fn an_adapter_of_a_local_folder_names_the_model_by_its_id() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent", "--set", "model.id=org/name@v1"]);
    let config: Value =
        serde_json::from_slice(&fs::read(place.path("run/adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["base_model_name_or_path"], &config["revision"]), (&"org/name".into(), &"v1".into()));
    let card = fs::read_to_string(place.path("run/README.md")).unwrap();
    assert!(card.contains("org/name"), "{card}");
    assert!(fs::read_to_string(place.path("run/recipe.toml")).unwrap().contains("id = \"org/name@v1\""));
}
