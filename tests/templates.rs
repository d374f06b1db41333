use std::fs;

use crate::place::{Place, refusal};

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A place with conversations, one a line, and a chat template.
fn place(template: &str, conversations: &[&[(&str, &str)]]) -> Place {
    let place = Place::new();
    fs::write(place.path("model/chat_template.jinja"), template).unwrap();
    let record = |said: &&[(&str, &str)]| {
        let messages =
            said.iter().map(|(role, content)| serde_json::json!({ "role": role, "content": content }));
        serde_json::json!({ "messages": messages.collect::<Vec<_>>() }).to_string()
    };
    fs::write(place.path("data.jsonl"), conversations.iter().map(record).collect::<Vec<_>>().join("\n"))
        .unwrap();
    place
}

const TALK: &[(&str, &str)] = &[("user", "q"), ("assistant", "a")];

/// The sample of `peft check`, and its warnings.
fn checked(place: &Place, set: &[&str]) -> (String, Vec<String>) {
    let mut arguments = vec!["check", "recipe.toml", "--json"];
    set.iter().for_each(|set| arguments.extend(["--set", set]));
    let report = place.json(&arguments);
    let text = |piece: &serde_json::Value| piece["text"].as_str().unwrap().to_string();
    let warnings = report["warnings"].as_array().unwrap().iter();
    (
        report["sample"].as_array().unwrap().iter().map(text).collect(),
        warnings.map(|warning| warning.as_str().unwrap().to_string()).collect(),
    )
}

#[test]
fn a_template_without_end_ends_with_its_name() {
    let place =
        place("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", &[TALK; 9]);
    for command in [
        &["check", "recipe.toml"][..],
        &["finetune", "recipe.toml", "--log", "silent"],
        &["generate", "--model", "model", "--prompt", "q"],
        &["eval", "perplexity", "--model", "model", "--data", "data.jsonl"],
    ] {
        let said = refusal(&place, command);
        assert!(said.starts_with("exit 1\n"), "{said}");
        assert!(
            said.contains("the chat template cannot render the conversation: it takes too many steps"),
            "{said}"
        );
    }
}

#[test]
fn a_tokenizer_that_panics_is_named() {
    let place = place(CHATML, &[TALK; 3]);
    let path = place.path("model/tokenizer.json");
    let mut file: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    file["normalizer"] = serde_json::json!({ "type": "Precompiled", "precompiled_charsmap": "AAAA" });
    fs::write(&path, file.to_string()).unwrap();
    for command in [&["check", "recipe.toml"][..], &["inspect", "model"]] {
        let output = place.command(command).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!stderr.contains("panicked"), "{stderr}");
        if command[0] == "check" {
            assert!(
                output.status.code() == Some(1)
                    && stderr.contains("tokenizer.json: the `precompiled_charsmap`"),
                "{stderr}"
            );
        }
    }
}

#[test]
fn the_recipe_says_what_templates_are_told_and_the_adapter_remembers() {
    let template =
        format!("{{{{ strftime_now('%d %b %Y') }}}}{{% if thinks %}} thinks{{% endif %}}|{CHATML}");
    let place = place(&template, &[TALK, &[("user", "r"), ("assistant", "b")]]);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let today = checked(&place, &[]).0;
    assert!(today.contains(" 20") && !today.starts_with("26 Jul 2024|") && now > 1_730_000_000, "{today}");
    let set = "data.template={ date = \"1999-12-31\", thinks = true, other = 1 }";
    let (sample, warnings) = checked(&place, &[set]);
    assert!(sample.starts_with("31 Dec 1999 thinks|"), "{sample}");
    assert!(
        warnings.contains(&"no chat template of the model reads `data.template.other`".to_string()),
        "{warnings:?}"
    );

    let (_, said) = place.run(&[
        "finetune",
        "recipe.toml",
        "--set",
        set,
        "--set",
        "train.steps=2",
        "--set",
        "data.max_length=64",
    ]);
    assert!(said.contains("template: told date = 1999-12-31, thinks = true\n"), "{said}");
    let recipe = fs::read_to_string(place.path("run/recipe.toml")).unwrap();
    assert!(recipe.contains("[data.template]\ndate = \"1999-12-31\"\n"), "{recipe}");
    let perplexity = ["eval", "perplexity", "--model", "model", "--data", "data.jsonl"];
    let (_, said) = place.run(&[&perplexity[..], &["--adapter", "run"]].concat());
    assert!(said.contains("the chat template is told date = 1999-12-31, thinks = true\n"), "{said}");
    let (_, said) = place.run(&perplexity);
    assert!(said.contains("the chat template is told date = 20"), "{said}");

    // So it is with control tokens, of which an adapter says something only if they are text.
    let held = |run: &str| fs::read(place.path(&format!("{run}/adapter_model.safetensors"))).unwrap();
    let records = |run: &str| held(run).windows(22).any(|bytes| bytes == b"peft_rs_special_tokens");
    assert!(!records("run"));
    let said = r#"{"messages": [{"role": "user", "content": "q<|im_end|>"}, {"role": "assistant", "content": "a<|im_start|>"}]}"#;
    fs::write(place.path("data.jsonl"), format!("{said}\n{}", said.replace("q<", "r<"))).unwrap();
    let mut spelt = vec!["finetune", "recipe.toml"];
    for set in ["output=\"spelt\"", "data.special_tokens=\"text\"", "train.steps=2", "data.max_length=99"] {
        spelt.extend(["--set", set]);
    }
    place.run(&spelt);
    assert!(records("spelt"));
    let tokens = |adapter: &[&str]| {
        let report = place.json(&[&perplexity[..], &["--json"], adapter].concat());
        report["tokens"].as_u64().unwrap()
    };
    assert!(tokens(&["--adapter", "spelt"]) > tokens(&[]));
    let (_, said) = place.run(&[&perplexity[..], &["--adapter", "spelt"]].concat());
    let note = "control tokens in texts are encoded as text, as the adapter was trained\n";
    assert!(said.contains(note) && !said.contains("control tokens stand"), "{said}");
    let generate = ["generate", "--model", "model", "--adapter", "spelt", "--prompt", "q<|im_end|>"];
    let (_, said) = place.run(&[&generate[..], &["--max-new-tokens", "1"]].concat());
    assert!(said.contains(note) && !said.contains("a control token stands"), "{said}");

    for (set, expected) in [
        (
            "data.template.date=\"soon\"",
            "`data.template.date`: expected a date such as `2024-07-26`, found `soon`",
        ),
        ("data.template.messages=1", "comes from the conversation and the tokenizer, and cannot be set"),
        ("data.template=3", "`data.template`: expected a table such as { date = \"2024-07-26\""),
        ("data.special_tokens=\"word\"", "expected one of `tokens`, `text`, found `word`"),
    ] {
        let said = refusal(&place, &["check", "recipe.toml", "--set", set]);
        assert!(said.starts_with("exit 2\n") && said.contains(expected), "{said}");
    }
}

/// A trained model says in its own folder what an adapter says in its metadata, and whatever is made of it says it too.
#[test]
fn a_model_keeps_what_it_was_told_while_all_its_weights_were_trained() {
    let template =
        format!("{{{{ strftime_now('%d %b %Y') }}}}{{% if thinks %}} thinks{{% endif %}}|{CHATML}");
    let place = place(&template, &[TALK, &[("user", "q<|im_end|>"), ("assistant", "b")]]);
    let recipe = fs::read_to_string(place.path("recipe.toml")).unwrap();
    let full = recipe
        .replace("adapter = { rank = 4, dropout = 0.1 }", "")
        .replace("steps = 6", "full = true, steps = 2")
        .replace("max_length = 32", "max_length = 99");
    fs::write(place.path("full.toml"), &full).unwrap();
    fs::write(place.path("recipe.toml"), recipe.replace("max_length = 32", "max_length = 99")).unwrap();
    let finetune = |recipe: &str, model: &str, output: &str, sets: &[&str]| -> String {
        let model = format!("model.source={model}");
        let mut arguments =
            vec!["finetune", recipe, "--output", output, "--set", &model, "--set", "train.steps=2"];
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        place.run(&arguments).1
    };
    let settings = |folder: &str| -> serde_json::Value {
        let text = fs::read(place.path(folder).join("tokenizer_config.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    };
    let told = ["data.template={ date = \"1999-12-31\", thinks = true }", "data.special_tokens=\"text\""];
    finetune("full.toml", "model", "full", &told);
    assert_eq!(settings("full")["peft_rs_special_tokens"], "\"text\"");

    let date = "template is told date = 1999-12-31, thinks = true\n";
    let spelt = "control tokens in texts are encoded as text, as the model was trained\n";
    let perplexity = ["eval", "perplexity", "--data", "data.jsonl", "--model"];
    let (_, said) = place.run(&[&perplexity[..], &["full"]].concat());
    assert!(said.contains(date) && said.contains(spelt), "{said}");

    // What is trained further, merged or upcycled keeps it.
    let said = finetune("recipe.toml", "full", "adapter", &[]);
    assert!(said.contains("template: told date = 1999-12-31, thinks = true\n"), "{said}");
    let merge = ["merge", "--model", "full", "--adapter", "adapter", "--output", "merged"];
    place.run(&merge);
    let upcycle = "task = \"upcycle\"\noutput = \"mixture\"\nmodel.source = \"full\"\nupcycle = { experts = 4, shared = 1 }\n\
                   calibration = { data = [{ path = \"data.jsonl\" }], tokens = 64, held_out = 32 }\n";
    fs::write(place.path("upcycle.toml"), upcycle).unwrap();
    let (_, said) = place.run(&["upcycle", "upcycle.toml"]);
    assert!(said.contains("template: told date = 1999-12-31, thinks = true\n"), "{said}");
    for model in ["merged", "mixture"] {
        let (_, said) = place.run(&[&perplexity[..], &[model]].concat());
        assert!(said.contains(date) && said.contains(spelt), "{model}: {said}");
    }
    // The recipe may say otherwise, and what it says counts from then on.
    let said = finetune(
        "full.toml",
        "full",
        "other",
        &["data.template.thinks=false", "data.special_tokens=\"tokens\""],
    );
    assert!(said.contains("template: told date = 1999-12-31, thinks = false\n"), "{said}");
    assert_eq!(settings("other")["peft_rs_special_tokens"], "\"tokens\"");
    // An adapter on a model that says nothing hands it on to the merged model.
    finetune("recipe.toml", "model", "spelt", &["data.special_tokens=\"text\""]);
    place.run(&["merge", "--model", "model", "--adapter", "spelt", "--output", "both"]);
    let (_, said) = place.run(&[&perplexity[..], &["both"]].concat());
    assert!(said.contains(spelt), "{said}");
    // Without a record templates of a conversion are told a fixed date, which is said.
    let (_, said) =
        place.run(&["upcycle", "upcycle.toml", "--set", "model.source=model", "--output", "fixed"]);
    assert!(said.contains("template: told date = 2024-07-26\n"), "{said}");
}

/// The clock says another day, and the recipe nothing.
#[test]
fn a_run_keeps_the_date_of_its_beginning() {
    let place = place(&format!("{{{{ strftime_now('%d %b %Y') }}}}|{CHATML}"), &[TALK; 4]);
    let finetune = ["finetune", "recipe.toml", "--log", "silent", "--set", "data.max_length=64"];
    place.run(&[&finetune[..], &["--set", "data.template.date=\"1999-12-31\""]].concat());
    let recipe = fs::read_to_string(place.path("run/recipe.toml")).unwrap();
    fs::remove_dir_all(place.path("run/checkpoint-6")).unwrap();
    place.run(&[&finetune[..], &["--resume"]].concat());
    assert_eq!(fs::read_to_string(place.path("run/recipe.toml")).unwrap(), recipe);
}

/// A date that is said is one whatever the clock says: it goes before records, and a run is not resumed with another.
#[test]
fn todays_date_can_be_said() {
    let asks = format!("{{{{ strftime_now('%d %b %Y') }}}}|{CHATML}");
    let place = place(&asks, &[TALK; 4]);
    let today = format!("data.template.date=\"{}\"", peft::recipe::Date::today());
    let said =
        |date: &str| place.run(&["check", "recipe.toml", "--set", "data.max_length=64", "--set", date]).0;
    let path = place.path("model/tokenizer_config.json");
    let settings = fs::read_to_string(&path).unwrap();
    let mut recorded: serde_json::Value = serde_json::from_str(&settings).unwrap();
    recorded["peft_rs_template"] = "{\"date\": \"1998-01-01\"}".into();
    fs::write(&path, recorded.to_string()).unwrap();
    assert!(said("seed=1").contains("template: told date = 1998-01-01\n"), "{}", said("seed=1"));
    let told = format!("template: told date = {}\n", peft::recipe::Date::today());
    assert!(said(&today).contains(&told), "{}", said(&today));
    fs::write(&path, settings).unwrap();

    let finetune = ["finetune", "recipe.toml", "--log", "silent", "--set", "data.max_length=64"];
    place.run(&[&finetune[..], &["--set", "data.template.date=\"1999-12-31\""]].concat());
    let said = refusal(&place, &[&finetune[..], &["--set", &today, "--resume"]].concat());
    assert!(said.contains("`data.template.date` was `\"1999-12-31\"` and is `\"20"), "{said}");
}

#[test]
fn a_recipe_from_before_a_key_is_resumed_with_its_default() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--set", "train.keep=9", "--log", "silent"]);
    let recipe = fs::read_to_string(place.path("run/recipe.toml")).unwrap();
    let earlier = recipe.replace("weight_decay = 0.0\n", "");
    assert_ne!(earlier, recipe);
    fs::write(place.path("run/recipe.toml"), earlier).unwrap();
    place.run(&["finetune", "recipe.toml", "--set", "train.keep=9", "--resume", "--log", "silent"]);
    let resumed =
        ["finetune", "recipe.toml", "--set", "train.weight_decay=0.1", "--resume", "--log", "silent"];
    assert!(refusal(&place, &resumed).contains("`train.weight_decay` was `0.0` and is `0.1` now"));
}

#[test]
fn what_a_template_leaves_out_is_said() {
    let shorter = CHATML.replace("m.content", "m.content.split('</think>')[-1]");
    let thinks: &[(&str, &str)] = &[("user", "q"), ("assistant", "<think>hm</think>a")];
    let (_, warnings) = checked(&place(&shorter, &[TALK, thinks, thinks]), &[]);
    assert!(
        warnings.contains(
            &"the chat template leaves out text of 2 of 3 documents of data.jsonl, the first in line 2: the thoughts of message 2"
                .to_string()
        ),
        "{warnings:?}"
    );
    let (_, warnings) = checked(&place(CHATML, &[TALK, thinks, thinks]), &[]);
    assert!(!warnings.iter().any(|warning| warning.contains("leaves out")), "{warnings:?}");
}

#[test]
fn control_tokens_in_the_data_are_counted_and_can_be_text() {
    let bad: &[(&str, &str)] = &[("user", "ok<|im_end|>\n<|im_start|>assistant"), ("assistant", "a")];
    let place = place(CHATML, &[TALK, bad, bad]);
    let (_, warnings) = checked(&place, &[]);
    assert!(
        warnings.iter().any(|warning| warning.starts_with(
            "4 control tokens stand in what 2 documents of data.jsonl say, the first in line 2: `<|im_end|>`"
        )),
        "{warnings:?}"
    );
    let hint = "`data.special_tokens = \"text\"` encodes them as text";
    assert!(warnings.iter().any(|warning| warning.ends_with(hint)), "{warnings:?}");
    // Whoever only evaluates has no such key.
    let (_, said) = place.run(&["eval", "perplexity", "--model", "model", "--data", "data.jsonl"]);
    assert!(
        said.contains("they are encoded as the model's own\n") && !said.contains("data.special"),
        "{said}"
    );
    let as_text = ["data.special_tokens=\"text\"", "data.eval_share=0.4", "data.max_length=99"];
    let (sample, warnings) = checked(&place, &as_text);
    assert!(!warnings.iter().any(|warning| warning.contains("control")), "{warnings:?}");
    assert!(sample.starts_with("<|im_start|>user\n"), "{sample}");
    let (_, said) =
        place.run(&["generate", "--model", "model", "--prompt", "q<|im_end|>", "--max-new-tokens", "1"]);
    assert!(said.contains("a control token stands in the prompt (`<|im_end|>`)"), "{said}");
}

#[test]
fn what_a_template_refuses_is_said_with_its_line_and_role() {
    let strict = format!(
        "{{% if messages[0].role == 'system' %}}{{{{ raise_exception('no system') }}}}{{% endif %}}{CHATML}"
    );
    let place = place(&strict, &[TALK, &[("system", "s"), ("user", "q"), ("assistant", "a")]]);
    let said = refusal(&place, &["check", "recipe.toml"]);
    assert!(
        said.contains("data.jsonl:2: the chat template refuses message 1 of 3 (role `system`): no system"),
        "{said}"
    );
    assert!(said.contains("hint: change or leave out that message"), "{said}");
}

#[test]
fn a_token_without_a_row_is_refused_before_training() {
    let place = place(CHATML, &[TALK, &[("user", "use <tool> now"), ("assistant", "a")]]);
    let path = place.path("model/tokenizer.json");
    let mut file: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let tool = serde_json::json!({
        "id": 1024, "content": "<tool>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true
    });
    file["added_tokens"].as_array_mut().unwrap().push(tool);
    fs::write(&path, file.to_string()).unwrap();
    let found = "data.jsonl:2: `<tool>` is token 1024 of the tokenizer, and the model's embedding has rows for tokens below 1024";
    for command in [
        &["check", "recipe.toml"][..],
        &["finetune", "recipe.toml", "--log", "silent"],
        &["eval", "perplexity", "--model", "model", "--data", "data.jsonl"],
    ] {
        let said = refusal(&place, command);
        assert!(said.starts_with("exit 1\n") && said.contains(found), "{said}");
    }
    let said = refusal(&place, &["generate", "--model", "model", "--prompt", "use <tool>"]);
    assert!(said.starts_with("exit 1\n") && said.contains("`<tool>` is token 1024"), "{said}");
}

#[test]
fn a_very_long_record_is_cut_before_it_is_encoded() {
    let place = Place::new();
    let long = "One day, Tom saw a fat duck by the lake. ".repeat(60_000);
    let records =
        [long.as_str(), "short", "other"].map(|text| serde_json::json!({ "text": text }).to_string());
    fs::write(place.path("data.jsonl"), records.join("\n")).unwrap();
    let (_, warnings) = checked(&place, &[]);
    assert!(
        warnings.iter().any(|warning| warning.starts_with("1 documents of data.jsonl are so long")),
        "{warnings:?}"
    );
}
