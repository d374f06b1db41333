use std::fs;
use std::io::Write;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::place::{Place, refusal};

#[test]
fn a_run_leaves_what_the_plan_promises() {
    let place = Place::new();
    let (stdout, stderr) = place.run(&["finetune", "recipe.toml"]);
    assert_eq!(stdout, "", "a run has no data for stdout");
    assert!(stderr.contains("trainable params: "), "{stderr}");
    assert!(stderr.contains("step 6/6  loss "), "{stderr}");
    let names = place.names_in("run");
    for name in [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "best",
        "checkpoint-4",
        "checkpoint-6",
        "metrics.jsonl",
        "recipe.toml",
        "tokenizer.json",
    ] {
        assert!(names.iter().any(|found| found == name), "no {name} in {names:?}");
    }
    assert!(names.iter().all(|name| name != "checkpoint-2"), "two checkpoints are kept: {names:?}");
    let metrics = fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let steps: Vec<u64> = lines
        .iter()
        .filter(|line| line["loss"].is_number())
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
    assert_eq!(lines.iter().filter(|line| line["eval_loss"].is_number()).count(), 3);

    let refused = place.command(&["finetune", "recipe.toml"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2), "a run is not overwritten");
}

#[test]
fn a_folder_of_something_else_is_left_alone() {
    let place = Place::new();
    fs::create_dir(place.path("notes")).unwrap();
    fs::write(place.path("notes/README.md"), "mine").unwrap();
    for more in [&[][..], &["--resume"]] {
        let refused = place
            .command(&[&["finetune", "recipe.toml", "--output", "notes"], more].concat())
            .output()
            .unwrap();
        assert_eq!(refused.status.code(), Some(2));
        assert_eq!(place.names_in("notes"), ["README.md"]);
    }
    assert_eq!(fs::read_to_string(place.path("notes/README.md")).unwrap(), "mine");
}

#[test]
fn a_resume_with_other_settings_changes_nothing() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let files = ["recipe.toml", "metrics.jsonl", "adapter_model.safetensors"];
    let read = || files.map(|name| fs::read(place.path("run").join(name)).unwrap());
    let before = read();
    let refused =
        place.command(&["finetune", "recipe.toml", "--resume", "--set", "train.steps=9"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(before == read());
}

/// The recipe in a run directory makes the run again, to the last bit.
#[test]
fn the_resolved_recipe_makes_the_same_run() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    place.run(&["finetune", "run/recipe.toml", "--output", "again", "--log", "silent"]);
    let adapter = |run: &str| fs::read(place.path(run).join("adapter_model.safetensors")).unwrap();
    assert!(adapter("run") == adapter("again"));
    let recipe = |run: &str| fs::read_to_string(place.path(run).join("recipe.toml")).unwrap();
    assert_eq!(recipe("run").replace("\"run\"", "\"again\""), recipe("again"));
}

#[test]
fn check_knows_a_run_before_it_begins() {
    let place = Place::new();
    let report = place.json(&["check", "recipe.toml", "--json"]);
    assert_eq!(report["steps"], 6);
    assert!(report["parameters"]["trainable"].as_u64().unwrap() > 0);
    let sample: String =
        report["sample"].as_array().unwrap().iter().map(|part| part["text"].as_str().unwrap()).collect();
    assert!(sample.contains("Where is kite"), "{sample}");
    assert!(!place.path("run").exists(), "check writes nothing");
    let (text, _) = place.run(&["check", "recipe.toml"]);
    assert!(text.contains("trainable params: "), "{text}");
}

#[test]
fn a_model_answers_with_and_without_its_adapter() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    // As it was trained: prompts and completions know no template.
    let prompt =
        ["generate", "--model", "model", "--prompt", "Where is kite 3?", "--max-new-tokens", "8", "--raw"];
    let adapted = [&prompt[..], &["--adapter", "run"]].concat();
    let (plain, adapted_once, adapted_twice) =
        (place.run(&prompt).0, place.run(&adapted).0, place.run(&adapted).0);
    assert_eq!(adapted_once, adapted_twice, "the most likely tokens do not change");
    assert_ne!(plain, adapted_once, "training at a high rate changes the answer");

    let measure = ["eval", "perplexity", "--model", "model", "--data", "data.jsonl", "--json"];
    let before = place.json(&measure);
    let after = place.json(&[&measure[..], &["--adapter", "run"]].concat());
    let nll = |document: &Value| document["nll"].as_f64().unwrap();
    assert!(nll(&after) < nll(&before), "{after} is no better than {before}");
    assert_eq!(before["tokens"], after["tokens"]);
    assert!((before["perplexity"].as_f64().unwrap().ln() - nll(&before)).abs() < 1e-9);

    let (stdout, stderr) =
        place.run(&["merge", "--model", "model", "--adapter", "run", "--output", "merged"]);
    assert_eq!(stdout, "");
    assert!(stderr.contains("merged/merge.json"), "{stderr}");
    let merged = place.json(&["eval", "perplexity", "--model", "merged", "--data", "data.jsonl", "--json"]);
    assert!((nll(&merged) - nll(&after)).abs() < 1e-4, "{merged} is not {after}");
}

/// What a chat with the model of chance writes to stdout and stderr.
fn chat(place: &Place, lines: impl AsRef<[u8]>, more: &[&str]) -> (Vec<u8>, String) {
    let arguments = [&["chat", "--model", "model", "--max-new-tokens", "8"], more].concat();
    let mut command = place.command(&arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_ref()).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    (output.stdout, stderr)
}

#[test]
fn a_chat_answers_each_line() {
    let place = Place::new();
    let (one, stderr) = chat(&place, "Hello.\n", &[]);
    assert!(one.ends_with(b"\n") && stderr.is_empty());
    let (two, _) = chat(&place, "Hello.\nAnd now?\n", &[]);
    assert!(two.len() > one.len() && two.starts_with(&one));
    // Blank lines say nothing; the end of the input ends the chat.
    assert_eq!(chat(&place, "\nHello.\n\n  \nAnd now?\n\n", &[]).0, two);
}

#[test]
fn a_chat_goes_on_after_a_line_that_is_not_utf_8() {
    let place = Place::new();
    let (answered, stderr) = chat(&place, b"Hello.\r\n\xff\xfe?\nAnd now?\n", &[]);
    assert_eq!(answered, chat(&place, "Hello.\nAnd now?\n", &[]).0);
    assert_eq!(stderr, "warning: this line is not valid UTF-8 and is left out; say it again in UTF-8\n");
}

#[test]
fn a_chat_is_sampled_as_a_prompt_is() {
    let place = Place::new();
    let hot = |seed| chat(&place, "Hello.\n", &["--temperature", "2", "--seed", seed, "--dtype", "f32"]).0;
    assert_eq!(hot("1"), hot("1"));
    assert_ne!(hot("1"), hot("2"));
}

#[test]
fn a_chat_goes_on_when_the_model_sees_no_more() {
    let place = Place::new();
    let (long, too_long) = ("kite ".repeat(200), "kite ".repeat(600));
    let said = format!("{long}\n{long}\n{long}\n{long}\n{too_long}\n{long}\n");
    let (_, stderr) = chat(&place, said, &[]);
    insta::with_settings!({ filters => vec![(r"takes \d+ tokens", "takes [N] tokens")] }, {
        insta::assert_snapshot!(stderr, @"
        warning: the model sees 512 tokens, and the chat is longer: the oldest exchange is forgotten
        warning: the model sees 512 tokens, and the chat is longer: the oldest exchange is forgotten
        warning: this takes [N] tokens, and the model sees 512 with the answer: it is left out; say less
        warning: the model sees 512 tokens, and the chat is longer: the oldest exchange is forgotten
        ");
    });
}

#[test]
fn a_chat_with_a_model_that_sees_next_to_nothing_says_so() {
    let place = Place::new();
    let path = place.path("model/config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for most in [1, 2, 3] {
        config["max_position_embeddings"] = most.into();
        fs::write(&path, config.to_string()).unwrap();
        let (stdout, stderr) = chat(&place, "Hello.\n", &[]);
        assert!(stdout.is_empty() && stderr.contains(&format!("the model sees {most} with")), "{stderr}");
    }
}

/// What a model was trained with it should be asked with.
#[test]
fn a_run_says_how_its_data_was_laid_out_and_the_adapter_remembers() {
    let place = Place::new();
    let messages: String = (0..24)
        .map(|n| {
            format!(
                "{{\"messages\": [{{\"role\": \"user\", \"content\": \"Where is kite {n}?\"}}, \
                 {{\"role\": \"assistant\", \"content\": \"In box {n}.\"}}]}}\n"
            )
        })
        .collect();
    fs::write(place.path("messages.jsonl"), messages).unwrap();
    let (said, _) = place.run(&["check", "recipe.toml"]);
    assert!(said.contains("(prompt-completion, plain text without the chat template)"), "{said}");
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let set = ["--set", "data.train=[{ path = \"messages.jsonl\" }]", "--set", "data.max_length=64"];
    let (_, said) = place.run(&[&["finetune", "recipe.toml", "--output", "talk"], &set[..]].concat());
    assert!(said.contains("(messages, through the chat template)"), "{said}");

    let generate = |more: &[&str]| {
        let prompt = ["generate", "--model", "model", "--prompt", "Where?", "--max-new-tokens", "2"];
        place.run(&[&prompt[..], &["--log", "silent"], more].concat()).1
    };
    insta::assert_snapshot!(generate(&["--adapter", "run"]), @"
    warning: the adapter was trained on plain text, and what is said goes through the chat template; `--raw` leaves it out
    ");
    insta::assert_snapshot!(generate(&["--adapter", "talk", "--raw"]), @"
    warning: the adapter was trained through the chat template, and `--raw` gives the prompt without it
    ");
    assert_eq!(generate(&["--adapter", "run", "--raw"]), "");
    assert_eq!(generate(&["--adapter", "talk"]), "");
    insta::assert_snapshot!(chat(&place, "", &["--adapter", "run"]).1, @"
    warning: the adapter was trained on plain text, and what is said goes through the chat template; `peft generate --raw` leaves it out
    ");
}

#[test]
fn a_run_that_has_not_ended_names_its_newest_checkpoint() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let as_model = || refusal(&place, &["generate", "--model", "run", "--prompt", "x"]);
    assert!(as_model().contains("it is an adapter\n"), "{}", as_model());
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::remove_file(place.path("run").join(name)).unwrap();
    }
    let with_adapter =
        |command: &[&str]| refusal(&place, &[command, &["--model", "model", "--adapter", "run"]].concat());
    let said = with_adapter(&["generate", "--prompt", "x"]);
    insta::assert_snapshot!(said, @"
    exit 2
    error: `run` is a run that has not ended, so there is no adapter in it yet
    hint: its newest checkpoint is `run/checkpoint-6`; `peft finetune --resume` goes on with the run
    ");
    assert_eq!(with_adapter(&["merge", "--output", "merged"]), said);
    assert_eq!(with_adapter(&["eval", "perplexity", "--data", "data.jsonl"]), said);
    let from = ["finetune", "recipe.toml", "--output", "more", "--set", "adapter.from=run"];
    assert_eq!(refusal(&place, &from), said);
    for name in ["checkpoint-4", "checkpoint-6"] {
        fs::remove_dir_all(place.path("run").join(name)).unwrap();
    }
    insta::assert_snapshot!(with_adapter(&["chat"]), @"
    exit 2
    error: `run` is a run that has not ended, so there is no adapter in it yet
    hint: it has no checkpoint either; `peft finetune --resume` goes on with it
    ");
}

/// What a command writes to a terminal of this kind.
#[cfg(target_os = "linux")]
fn on_terminal(place: &Place, kind: &str, arguments: &[&str]) -> String {
    use std::io::Read;
    use std::os::fd::{FromRawFd, OwnedFd};

    let (mut ours, mut theirs) = (0, 0);
    let (name, settings, size) = (std::ptr::null_mut(), std::ptr::null(), std::ptr::null());
    // SAFETY: both numbers are ours to write to; name, settings and size are left to the system.
    let opened = unsafe { libc::openpty(&raw mut ours, &raw mut theirs, name, settings, size) };
    assert_eq!(opened, 0);
    // SAFETY: the call has just opened both, and nobody else knows them.
    let (ours, theirs) = unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
    let mut command = place.command(arguments);
    let mut child = command.env("TERM", kind).stderr(theirs).stdout(Stdio::null()).spawn().unwrap();
    drop(command);
    let (mut bytes, mut ours) = (Vec::new(), fs::File::from(ours));
    // The end of a terminal is an error.
    let _ = ours.read_to_end(&mut bytes);
    assert!(child.wait().unwrap().success());
    String::from_utf8(bytes).unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn steps_are_lines_where_nothing_can_be_drawn() {
    let place = Place::new();
    let dumb = on_terminal(&place, "dumb", &["finetune", "recipe.toml"]);
    assert!(dumb.contains("step 6/6  loss ") && !dumb.contains('\u{1b}'), "{dumb}");
    let drawn = on_terminal(&place, "xterm", &["finetune", "recipe.toml", "--output", "again"]);
    assert!(drawn.contains("6/6 ━") && !drawn.contains("step 6/6  loss "), "{drawn}");
}

#[test]
fn a_flag_with_epochs_takes_the_place_of_steps() {
    let place = Place::new();
    let (said, note) = place.run(&["check", "recipe.toml", "--set", "train.epochs=2"]);
    assert!(said.contains("course: 2 epochs (20 steps) of "), "{said}");
    assert_eq!(note, "`--set train.epochs=2` takes the place of `train.steps`\n");
    let (said, note) = place.run(&["check", "recipe.toml"]);
    assert!(said.contains("course: 6 steps (0.6 epochs) of ") && note.is_empty(), "{said}");
}

#[test]
fn progress_in_json_is_json_throughout() {
    let place = Place::new();
    let (_, stderr) = place.run(&["finetune", "recipe.toml", "--log", "json"]);
    let events: Vec<Value> = stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let named = |name: &str| events.iter().filter(|event| event["event"] == name).count();
    assert_eq!((named("start"), named("step"), named("evaluation"), named("end")), (1, 6, 3, 1));
}

#[test]
fn everything_can_be_inspected() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let model = place.json(&["inspect", "model", "--json"]);
    assert_eq!((&model["kind"], &model["problems"]), (&"model".into(), &Value::Array(vec![])));
    let data = place.json(&["inspect", "data.jsonl", "--json"]);
    assert_eq!((&data["kind"], &data["records"]), (&"data".into(), &24.into()));
    let run = place.json(&["inspect", "run", "--json"]);
    assert_eq!(
        (&run["kind"], &run["steps_made"], &run["model"]),
        (&"run".into(), &6.into(), &"model".into())
    );
    let adapter = place.json(&["inspect", "run/best", "--json"]);
    assert_eq!((&adapter["kind"], &adapter["config"]["rank"]), (&"adapter".into(), &4.into()));

    insta::with_settings!({ filters => vec![(r"[\d,]+ tokens/s", "[SPEED]"), (r"[\d.]+ [KMG]iB\n", "[MEMORY]\n"),
        (r"\d+\.\d{4}", "[LOSS]"), (r"step \d", "step [N]"), (r"[▁-█]+", "[COURSE]")] }, {
        insta::assert_snapshot!(place.run(&["inspect", "model"]).0, @"
        model          model
        family         llama
        parameters     1,115,520
        vocabulary     1,024
        hidden size    128
        positions      512
        head           tied to the embedding
        chat template  yes
        weights        47 tensors, 4.3 MiB of f32
        layers         5 x 4 heads of 32 (2 for keys and values), feed-forward 384 (silu)
        q_proj         5 x [128, 128]
        k_proj         5 x [64, 128]
        v_proj         5 x [64, 128]
        o_proj         5 x [128, 128]
        gate_proj      5 x [384, 128]
        up_proj        5 x [384, 128]
        down_proj      5 x [128, 384]
        lm_head        1 x [1024, 128]
        ");
        insta::assert_snapshot!(place.run(&["inspect", "run/best"]).0, @"
        adapter        run/best
        base model     model
        rank           4
        scale          1 from alpha 4
        dropout        0.1
        targets        down_proj, gate_proj, up_proj
        parameters     30,720
        down_proj      5 x
        gate_proj      5 x
        up_proj        5 x
        ");
        insta::assert_snapshot!(place.run(&["inspect", "data.jsonl"]).0, @"
        data           data.jsonl
        format         prompt-completion
        records        24
        messages       48
        characters     27 on average, 28 at most (line 24)
        prompt         Where is kite 0?
        completion     In box 0.
        ");
        insta::assert_snapshot!(place.run(&["inspect", "run"]).0, @"
        run            run
        model          model
        steps          6 of 6
        tokens         177
        loss           [LOSS] at first, [LOSS] at last
                       [COURSE]
        eval loss      [LOSS] at first, [LOSS] at last, [LOSS] at best after step [N]
                       [COURSE]
        speed          [SPEED]
        peak memory    [MEMORY]
        checkpoints    4, 6
        ");
    });
    let nothing = place.command(&["inspect", "."]).output().unwrap();
    assert_eq!(nothing.status.code(), Some(2));
    insta::assert_snapshot!(refusal(&place, &["inspect", "recipe.toml"]), @"
    exit 2
    error: `recipe.toml` is a recipe, expected a model, an adapter, a data file or a run
    hint: `peft check recipe.toml` says what it will do; what it made is described by `peft inspect` of its output
    ");
}

#[test]
fn merged_adapters_that_do_not_agree_are_said() {
    let place = Place::new();
    let train = ["finetune", "recipe.toml", "--log", "silent", "--output"];
    place.run(&[&train[..], &["one"]].concat());
    place.run(&[&train[..], &["other", "--set", "data.special_tokens=text"]].concat());
    let merge = |adapters: [&str; 2], output: &str| {
        let [first, second] = adapters;
        place
            .run(&["merge", "--model", "model", "--adapter", first, "--adapter", second, "--output", output])
            .1
    };
    let said = "do not agree about `peft_rs_special_tokens`";
    assert!(merge(["one", "other"], "mixed").contains(said));
    assert!(!merge(["one", "one"], "same").contains(said));
}

/// A record that cannot be read is named with its file before anything is written.
#[test]
fn records_that_cannot_be_read_are_named() {
    let place = Place::new();
    let path = place.path("model/tokenizer_config.json");
    let mut settings: Value =
        fs::read(&path).map_or(Value::Null, |bytes| serde_json::from_slice(&bytes).unwrap());
    if settings.is_null() {
        settings = serde_json::json!({});
    }
    for (key, record) in
        [("peft_rs_template", serde_json::json!("text")), ("peft_rs_special_tokens", serde_json::json!(5))]
    {
        let mut changed = settings.clone();
        changed[key] = record;
        fs::write(&path, changed.to_string()).unwrap();
        let told = refusal(&place, &["check", "recipe.toml"]);
        assert!(told.contains(&format!("error: model/tokenizer_config.json: `{key}` is ")), "{told}");
    }
    fs::write(&path, settings.to_string()).unwrap();

    // Of a model without a tokenizer, the settings beside the adapter are read.
    place.run(&["finetune", "recipe.toml", "--log", "silent", "--set", "train.steps=1"]);
    fs::remove_file(place.path("model/tokenizer.json")).unwrap();
    edit(&place.path("run/tokenizer_config.json"), |settings| settings["peft_rs_template"] = 5.into());
    let told = refusal(&place, &["generate", "--model", "model", "--adapter", "run", "--prompt", "x"]);
    assert!(told.contains("error: run/tokenizer_config.json: `peft_rs_template` is "), "{told}");
}

/// The template that the tests give to an adapter; its answers begin otherwise than the model's.
const OWN_TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}";

/// A place with a trained adapter in `run`.
fn place_with_adapter() -> Place {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent", "--set", "train.steps=2"]);
    place
}

fn edit(path: &std::path::Path, change: impl FnOnce(&mut Value)) {
    let mut file: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut file);
    fs::write(path, file.to_string()).unwrap();
}

/// Gives the adapter's tokenizer another token.
fn add_token(place: &Place, content: &str, id: u64) {
    edit(&place.path("run/tokenizer.json"), |file| {
        file["added_tokens"].as_array_mut().unwrap().push(serde_json::json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }));
    });
}

#[test]
fn an_adapter_is_asked_through_its_own_template_and_merged_with_it() {
    let place = place_with_adapter();
    let generate =
        ["generate", "--model", "model", "--adapter", "run", "--prompt", "x", "--max-new-tokens", "1"];
    let said =
        "the tokenizer files of the adapter `run` are used, not the model's: its chat template is another\n";
    assert!(!place.run(&generate).1.contains("tokenizer files"), "copies of the model's files are no others");
    let messages =
        r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}"#;
    fs::write(place.path("talk.jsonl"), messages).unwrap();
    let nll = |model: &str, more: &[&str]| {
        let eval = ["eval", "perplexity", "--data", "talk.jsonl", "--json", "--model", model];
        place.json(&[&eval[..], more].concat())["nll"].as_f64().unwrap()
    };
    let before = nll("model", &["--adapter", "run"]);
    fs::write(place.path("run/chat_template.jinja"), OWN_TEMPLATE).unwrap();
    let adapted = nll("model", &["--adapter", "run"]);
    let told = place.run(&generate).1;
    assert!(told.contains(said), "{told}");
    assert!(chat(&place, "", &["--adapter", "run"]).1.contains(said));

    let merge = ["merge", "--model", "model", "--adapter", "run", "--output", "merged"];
    let told = place.run(&merge).1;
    let whole = "the merged model has the tokenizer files of the adapter `run`, not the base's: its chat template is another\n";
    assert!(told.contains(whole), "{told}");
    assert_eq!(fs::read_to_string(place.path("merged/chat_template.jinja")).unwrap(), OWN_TEMPLATE);
    let receipt: Value = serde_json::from_slice(&fs::read(place.path("merged/merge.json")).unwrap()).unwrap();
    assert_eq!(receipt["text"], whole.trim_end());
    // The same conversation has the same loss with both, and another one than through the model's template.
    assert!((nll("merged", &[]) - adapted).abs() < 1e-4);
    assert!((before - adapted).abs() > 1e-2);

    // Without a tokenizer of its own, the template alone takes the place of the model's, in the settings too.
    fs::remove_file(place.path("run/tokenizer.json")).unwrap();
    edit(&place.path("model/tokenizer_config.json"), |settings| settings["chat_template"] = "old".into());
    assert!(place.run(&generate).1.contains(said));
    place.run(&["merge", "--model", "model", "--adapter", "run", "--output", "alone"]);
    assert_eq!(fs::read_to_string(place.path("alone/chat_template.jinja")).unwrap(), OWN_TEMPLATE);
    let settings = fs::read_to_string(place.path("alone/tokenizer_config.json")).unwrap();
    assert!(!settings.contains("old") && settings.contains("m.role"), "{settings}");
    assert!(place.path("alone/tokenizer.json").is_file());

    // With a tokenizer and no settings too, the settings of the merged model have no other template.
    fs::copy(place.path("model/tokenizer.json"), place.path("run/tokenizer.json")).unwrap();
    fs::remove_file(place.path("run/tokenizer_config.json")).unwrap();
    place.run(&["merge", "--model", "model", "--adapter", "run", "--output", "both"]);
    assert_eq!(fs::read_to_string(place.path("both/chat_template.jinja")).unwrap(), OWN_TEMPLATE);
    assert_eq!(fs::read_to_string(place.path("both/tokenizer_config.json")).unwrap(), settings);
}

#[test]
fn a_tokenizer_of_an_adapter_that_splits_otherwise_is_used() {
    let place = place_with_adapter();
    let generate =
        ["generate", "--model", "model", "--adapter", "run", "--prompt", "x", "--max-new-tokens", "1"];
    let path = place.path("run/tokenizer.json");
    let original = fs::read(&path).unwrap();
    let ending = json!([{ "Sequence": { "id": "A", "type_id": 0 } }, { "SpecialToken": { "id": "<|im_end|>", "type_id": 0 } }]);
    let ending = json!({
        "type": "TemplateProcessing", "single": ending, "pair": ending,
        "special_tokens": { "<|im_end|>": { "id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"] } },
    });
    let splits = "its tokenizer splits texts otherwise";
    for (part, value, said) in [
        ("merges", Value::Null, splits),
        ("normalizer", json!({ "type": "Lowercase" }), splits),
        ("pre_tokenizer", Value::Null, splits),
        ("post_processor", ending, splits),
        ("normalized", Value::Null, splits),
        ("decoder", Value::Null, "its tokenizer joins tokens otherwise"),
        (
            "vocab",
            Value::Null,
            "1 token that only the model's tokenizer has (`ella`); its tokenizer splits texts otherwise",
        ),
    ] {
        edit(&path, |file| match part {
            "merges" => drop(file["model"]["merges"].as_array_mut().unwrap().pop()),
            "normalized" => file["added_tokens"][1]["lstrip"] = true.into(),
            "vocab" => {
                file["model"]["merges"].as_array_mut().unwrap().pop();
                file["model"]["vocab"].as_object_mut().unwrap().remove("ella").unwrap();
            }
            _ => file[part] = value,
        });
        let told = place.run(&generate).1;
        let said = format!("the tokenizer files of the adapter `run` are used, not the model's: {said}");
        assert_eq!(told.lines().next(), Some(said.as_str()), "{part}");
        fs::write(&path, &original).unwrap();
    }
    // Of a file that is only laid out otherwise there is nothing to say.
    edit(&path, |file| file["padding"] = Value::Null);
    assert!(fs::read(&path).unwrap() != original);
    assert!(!place.run(&generate).1.contains("tokenizer files"));

    edit(&path, |file| drop(file["model"]["merges"].as_array_mut().unwrap().pop()));
    let told = place.run(&["merge", "--model", "model", "--adapter", "run", "--output", "merged"]).1;
    assert!(told.contains(splits), "{told}");
    assert!(fs::read(place.path("merged/tokenizer.json")).unwrap() == fs::read(&path).unwrap());

    // Two adapters of which each splits in its own way do not agree.
    place.run(&["finetune", "recipe.toml", "--log", "silent", "--set", "train.steps=1", "--output", "other"]);
    edit(&place.path("other/tokenizer.json"), |file| file["normalizer"] = json!({ "type": "Lowercase" }));
    let both = ["merge", "--model", "model", "--adapter", "run", "--adapter", "other", "--output", "two"];
    let told = place.run(&both).1;
    assert!(told.contains("the adapters do not agree about tokenizer and chat template"), "{told}");
}

#[test]
fn settings_of_an_adapter_without_a_tokenizer_are_used_and_other_files_named() {
    let place = place_with_adapter();
    let generate =
        ["generate", "--model", "model", "--adapter", "run", "--prompt", "x", "--max-new-tokens", "1"];
    let merge =
        |output: &str| place.run(&["merge", "--model", "model", "--adapter", "run", "--output", output]).1;
    fs::remove_file(place.path("run/tokenizer.json")).unwrap();
    assert!(!place.run(&generate).1.contains("tokenizer files"), "what is left is the model's");
    let messages =
        r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}"#;
    fs::write(place.path("talk.jsonl"), messages).unwrap();
    for folder in ["model", "run"] {
        fs::write(place.path(folder).join("chat_template.jinja"), OWN_TEMPLATE).unwrap();
    }
    let nll = |model: &[&str]| {
        let eval = ["eval", "perplexity", "--data", "talk.jsonl", "--json", "--model"];
        place.json(&[&eval[..], model].concat())["nll"].as_f64().unwrap()
    };
    let before = nll(&["model", "--adapter", "run"]);

    // A file that the model has too is nothing of the adapter's own.
    for folder in ["model", "run"] {
        fs::write(place.path(folder).join("vocab.json"), "{}").unwrap();
    }
    edit(&place.path("run/tokenizer_config.json"), |settings| {
        settings["add_bos_token"] = true.into();
        settings.as_object_mut().unwrap().remove("eos_token");
    });
    fs::write(place.path("run/special_tokens_map.json"), r#"{"eos_token": "<|im_start|>"}"#).unwrap();
    fs::write(place.path("run/merges.txt"), "a b").unwrap();
    fs::write(place.path("run/tokenizer.model"), "pieces").unwrap();
    let unused = "its `merges.txt`, `tokenizer.model` are not used, as it has no `tokenizer.json`; \
        its `add_bos_token` is true, which is not used, as the model's tokenizer does not begin texts with the `bos_token`";
    let said = format!(
        "the tokenizer files of the adapter `run` are used, not the model's: its `eos_token` is `<|im_start|>`; {unused}"
    );
    assert_eq!(place.run(&generate).1.lines().next(), Some(said.as_str()));
    let adapted = nll(&["model", "--adapter", "run"]);
    assert!((before - adapted).abs() > 1e-3);
    assert!(merge("merged").contains("its `eos_token` is `<|im_start|>`"));
    assert!((nll(&["merged"]) - adapted).abs() < 1e-4);
    let settings = |folder: &str| -> Value {
        serde_json::from_slice(&fs::read(place.path(folder).join("tokenizer_config.json")).unwrap()).unwrap()
    };
    let mut expected = settings("model");
    expected["eos_token"] = "<|im_start|>".into();
    assert_eq!(settings("merged"), expected);

    // A token that the model's tokenizer lacks ends no text.
    fs::write(place.path("run/special_tokens_map.json"), r#"{"eos_token": "<own>"}"#).unwrap();
    let said = "not all tokenizer files beside the adapter `run` are used: \
        its `merges.txt`, `tokenizer.model` are not used, as it has no `tokenizer.json`; ";
    let told = place.run(&generate).1;
    let lacking = "its `eos_token` is `<own>`, which is not used, as the model's tokenizer lacks it";
    assert!(
        told.lines().next().is_some_and(|line| line.starts_with(said) && line.contains(lacking)),
        "{told}"
    );
    let told = merge("same");
    assert!(told.contains(said) && told.contains(lacking), "{told}");
    assert_eq!(settings("same"), settings("model"));

    fs::remove_file(place.path("run/chat_template.jinja")).unwrap();
    edit(&place.path("run/tokenizer_config.json"), |settings| {
        settings["chat_template"] = json!([{ "name": "rag", "template": "x" }]);
    });
    let told = refusal(&place, &generate);
    assert!(told.contains("run/tokenizer_config.json: `chat_template` is a list"), "{told}");
    assert!(told.contains("into a file `chat_template.jinja` beside the weights"), "{told}");
}

#[test]
fn tokens_of_an_adapter_are_used_or_named() {
    let place = place_with_adapter();
    let config: Value = serde_json::from_slice(&fs::read(place.path("model/config.json")).unwrap()).unwrap();
    let rows = config["vocab_size"].as_u64().unwrap();
    let generate =
        ["generate", "--model", "model", "--adapter", "run", "--prompt", "x", "--max-new-tokens", "1"];
    let merge = ["merge", "--model", "model", "--adapter", "run", "--output", "merged"];
    // As trainers do that give a reserved token a name.
    edit(&place.path("run/tokenizer.json"), |file| {
        let vocabulary = file["model"]["vocab"].as_object_mut().unwrap();
        let id = vocabulary.remove("<|endoftext|>").unwrap();
        vocabulary.insert("<own>".to_string(), id);
        file["added_tokens"][0]["content"] = "<own>".into();
    });
    edit(&place.path("run/tokenizer_config.json"), |settings| settings["eos_token"] = "<own>".into());
    let told = place.run(&generate).1;
    let said = "the tokenizer files of the adapter `run` are used, not the model's: its `eos_token` is `<own>`; \
        1 token that the model's tokenizer lacks (`<own>`); \
        1 token that only the model's tokenizer has (`<|endoftext|>`)";
    assert_eq!(told.lines().next(), Some(said));
    place.run(&merge);
    let merged = fs::read(place.path("merged/tokenizer.json")).unwrap();
    assert!(merged == fs::read(place.path("run/tokenizer.json")).unwrap());
    assert!(fs::read_to_string(place.path("merged/tokenizer_config.json")).unwrap().contains("<own>"));

    // Settings that the adapter has not are the model's.
    fs::rename(place.path("run/tokenizer_config.json"), place.path("settings.json")).unwrap();
    place.run(&["merge", "--model", "model", "--adapter", "run", "--output", "bare"]);
    assert!(fs::read(place.path("bare/tokenizer.json")).unwrap() == merged);
    let settings = |folder: &str| fs::read(place.path(folder).join("tokenizer_config.json")).unwrap();
    assert!(settings("bare") == settings("model"));
    fs::rename(place.path("settings.json"), place.path("run/tokenizer_config.json")).unwrap();

    add_token(&place, "<beyond>", rows);
    // A token to pad with, which trainers add: the adapter works, and only a text with it does not.
    let told = place.run(&generate).1;
    let said = "1 token that the model's embedding has no row for, which texts must not have (`<beyond>`)";
    assert!(told.lines().next().is_some_and(|line| line.contains(said)), "{told}");
    let with_token: Vec<&str> =
        generate.iter().map(|word| if *word == "x" { "x<beyond>" } else { word }).collect();
    let refused = refusal(&place, &with_token);
    assert!(
        refused.contains("`<beyond>` is token 1024 of the tokenizer, and the model's embedding has rows for tokens below 1024"),
        "{refused}"
    );
    let told = place.run(&["merge", "--model", "model", "--adapter", "run", "--output", "other"]).1;
    assert!(told.contains(said), "{told}");
}

#[test]
fn merged_adapters_with_other_templates_are_said() {
    let place = place_with_adapter();
    fs::create_dir(place.path("own")).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(place.path("run").join(name), place.path("own").join(name)).unwrap();
    }
    fs::write(place.path("own/chat_template.jinja"), OWN_TEMPLATE).unwrap();
    let merge = |adapters: [&str; 2], output: &str| {
        let [first, second] = adapters;
        place
            .run(&["merge", "--model", "model", "--adapter", first, "--adapter", second, "--output", output])
            .1
    };
    let said = "the adapters do not agree about tokenizer and chat template";
    let template = |output: &str| fs::read_to_string(place.path(output).join("chat_template.jinja")).unwrap();
    for (adapters, output) in [(["run", "own"], "last"), (["own", "run"], "first")] {
        let told = merge(adapters, output);
        assert!(told.contains(said) && told.contains("has those of `own`"), "{told}");
        assert_eq!(template(output), OWN_TEMPLATE);
    }
    let told = merge(["own", "own"], "same");
    assert!(!told.contains(said) && told.contains("the tokenizer files of the adapter `own`"), "{told}");

    // Training that goes on with it keeps the model's template, and says so.
    let from = ["check", "recipe.toml", "--set", "adapter.from=own"];
    let warning = "the adapter `own` has tokenizer files of its own, and this run uses the model's: its chat template is another";
    assert!(place.run(&from).1.contains(warning), "{}", place.run(&from).1);
    assert!(!place.run(&["check", "recipe.toml", "--set", "adapter.from=run"]).1.contains("tokenizer files"));
    let (_, said) = place.run(&[&from[..], &["--set", "adapter.init=gaussian"]].concat());
    assert!(said.contains("`adapter.init` does nothing beside `adapter.from`"), "{said}");
}

#[test]
fn an_adapter_laid_out_in_an_unknown_way_is_refused() {
    let place = place_with_adapter();
    let path = place.path("run/adapter_model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let known = br#""peft_rs_layout":"plain""#;
    let at = bytes.windows(known.len()).position(|window| window == known).unwrap();
    let mut changed = bytes;
    changed[at..at + known.len()].copy_from_slice(br#""peft_rs_layout":"plane""#);
    fs::write(&path, changed).unwrap();
    let refused = refusal(&place, &["generate", "--model", "model", "--adapter", "run", "--prompt", "x"]);
    insta::assert_snapshot!(refused, @"
    exit 1
    error: run: the metadata of adapter_model.safetensors: `peft_rs_layout` is `plane`, expected one of `template`, `plain`, `mixed`
    hint: remove the key, or take the file as it was written by the training
    ");
    assert_eq!(
        refusal(&place, &["merge", "--model", "model", "--adapter", "run", "--output", "merged"]),
        refused
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_chat_with_a_folder_as_its_input_says_so() {
    let place = Place::new();
    let mut command = place.command(&["chat", "--model", "model"]);
    let output = command.stdin(fs::File::open(place.path("model")).unwrap()).output().unwrap();
    insta::assert_snapshot!(crate::place::told(&place, &output), @"
    exit 2
    error: standard input is a folder, expected lines of text
    hint: type what you say, or give a file with a line for each question: `peft chat --model MODEL < questions.txt`
    ");
}

#[test]
fn files_that_are_no_model_are_inspected_for_what_they_seem_to_be() {
    let place = Place::new();
    for (name, bytes) in [
        ("n.csv", &b"question,answer\na,b\n"[..]),
        ("n.txt", b"Once upon a time, there was a king.\n"),
        ("n.yaml", b"a: b\n"),
        ("n.gz", b"\x1f\x8b\x08\0"),
        ("n.bin", b"PK\x03\x04"),
        ("n.data", b"{\"text\": \"a\"}\n"),
        ("empty", b""),
        ("n", b"\x01\x02\x03"),
    ] {
        fs::write(place.path(name), bytes).unwrap();
    }
    let refused = |name: &str| refusal(&place, &["inspect", name]);
    let all: Vec<String> =
        ["n.csv", "n.txt", "n.yaml", "n.gz", "n.bin", "n.data", "empty", "n"].map(refused).to_vec();
    insta::assert_snapshot!(all.join("\n"), @r#"
    exit 2
    error: `n.csv` seems to be a CSV file, expected the folder of a model, an adapter or a run, a `.gguf` file, or data in `.jsonl` or `.json`
    hint: write it as JSON Lines first: `pandas.read_csv(old).to_json(new, orient="records", lines=True)`
    exit 2
    error: `n.txt` seems to be plain text, expected the folder of a model, an adapter or a run, a `.gguf` file, or data in `.jsonl` or `.json`
    hint: write each document as a line `{"text": "…"}`
    exit 2
    error: `n.yaml` seems to be YAML, expected the folder of a model, an adapter or a run, a `.gguf` file, or data in `.jsonl` or `.json`
    hint: write it as JSON first: `json.dump(yaml.safe_load(open(old)), open(new, "w"))`
    exit 2
    error: `n.gz` seems to be compressed with gzip, expected the folder of a model, an adapter or a run, a `.gguf` file, or data in `.jsonl` or `.json`
    hint: decompress it first, with `gunzip`
    exit 2
    error: `n.bin` seems to hold weights as PyTorch pickles them, expected the folder of a model, an adapter or a run, a `.gguf` file, or data in `.jsonl` or `.json`
    hint: pickles can run code and are not read: load the model with transformers and save it, which writes safetensors
    exit 2
    error: `n.data` seems to be JSON, expected the folder of a model, an adapter or a run, a `.gguf` file, or data in `.jsonl` or `.json`
    hint: data files end in `.jsonl` or `.json`: give it such a name
    exit 2
    error: `empty` is empty, expected the folder of a model, an adapter or a run, a `.gguf` file, or data in `.jsonl` or `.json`
    exit 2
    error: `n` is of a kind that is not known, expected the folder of a model, an adapter or a run, a `.gguf` file, or data in `.jsonl` or `.json`
    "#);
    // The ending says what it was meant to be.
    fs::write(place.path("n.gguf"), "GGGG").unwrap();
    assert!(refused("n.gguf").contains("n.gguf: does not begin with `GGUF`"), "{}", refused("n.gguf"));
}
