use std::fs;

use serde_json::{Value, json};

use super::place::{Place, told};

/// A place whose training data are these records, and which evaluates on the same.
fn place(records: &[Value]) -> Place {
    let place = Place::new();
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    fs::write(place.path("rows.jsonl"), lines).unwrap();
    place
}

const DATA: [&str; 6] = [
    "--set",
    "data.train=[{ path = \"rows.jsonl\" }]",
    "--set",
    "data.eval=[{ path = \"rows.jsonl\" }]",
    "--set",
    "data.max_length=128",
];

fn check(place: &Place) -> Value {
    place.json(&[&["check", "recipe.toml", "--json"], &DATA[..]].concat())
}

/// The first document, what is learned of it in brackets.
fn sample(record: Value) -> String {
    let report = check(&place(&[record]));
    let segments = report["sample"].as_array().unwrap().iter();
    segments
        .map(|segment| {
            let text = segment["text"].as_str().unwrap();
            if segment["learned"] == true { format!("[{text}]") } else { text.to_string() }
        })
        .collect()
}

/// What the program says to data that it refuses.
fn refused(name: &str, bytes: &[u8]) -> String {
    let place = Place::new();
    fs::write(place.path(name), bytes).unwrap();
    let data = format!("data.train=[{{ path = \"{name}\" }}]");
    told(&place, &place.command(&["check", "recipe.toml", "--set", &data]).output().unwrap())
}

/// A folder and a pattern are all files that they stand for, and the run's recipe keeps what was written.
#[test]
fn folders_and_patterns_are_trained_on() {
    let place = Place::new();
    fs::create_dir(place.path("parts")).unwrap();
    for name in ["b.jsonl", "a.jsonl", "c.json"] {
        let record = format!("{{\"text\": \"This is {name}.\"}}\n");
        fs::write(place.path("parts").join(name), record.repeat(4)).unwrap();
    }
    let sets = |train: &str| [format!("data.train={train}"), "data.eval=data.jsonl".to_string()];
    for (train, files) in [
        ("parts", &["parts/a.jsonl", "parts/b.jsonl", "parts/c.json"][..]),
        ("parts/*.jsonl", &["parts/a.jsonl", "parts/b.jsonl"]),
        ("[\"parts/c.json\", \"parts/a.*\"]", &["parts/c.json", "parts/a.jsonl"]),
    ] {
        let [data, eval] = sets(train);
        let report = place.json(&["check", "recipe.toml", "--json", "--set", &data, "--set", &eval]);
        let counted = report["train"].as_array().unwrap().iter();
        let paths: Vec<_> = counted.map(|counts| counts["path"].as_str().unwrap()).collect();
        assert_eq!(paths, files);
    }
    let [data, eval] = sets("parts/*.jsonl");
    place.run(&["finetune", "recipe.toml", "--set", &data, "--set", &eval, "--set", "train.steps=1"]);
    let recipe = fs::read_to_string(place.path("run/recipe.toml")).unwrap();
    assert!(recipe.contains("path = \"parts/*.jsonl\""), "{recipe}");
    let into = ["finetune", "recipe.toml", "--output", "parts", "--set", &data];
    let said = told(&place, &place.command(&into).output().unwrap());
    assert!(said.contains("the output `parts` is the folder of the data `parts/a.jsonl`"), "{said}");
}

#[test]
fn all_that_a_row_says_is_trained_on() {
    let talk = json!([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]);
    let learned = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[a<|im_end|>]\n";
    for record in [
        json!({"system": "Be a sailor.", "conversations": talk}),
        json!({"system": "Be a sailor.", "messages": talk}),
        json!({"system": "Be a sailor.", "instruction": "q", "output": "a"}),
        json!({"messages": [{"role": "developer", "content": "Be a sailor."}, talk[0], talk[1]]}),
    ] {
        assert_eq!(sample(record), format!("<|im_start|>system\nBe a sailor.<|im_end|>\n{learned}"));
    }
    assert_eq!(
        sample(json!({"instruction": "q", "output": "a", "history": [["q0", "a0"]], "system": null})),
        format!("<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\n[a0<|im_end|>]\n{learned}")
    );
}

#[test]
fn turns_that_are_switched_off_are_not_learned() {
    for mark in ["weight", "train", "training", "loss"] {
        let off = if mark == "weight" { json!(0) } else { json!(false) };
        let mut bad = json!({"role": "assistant", "content": "bad"});
        bad[mark] = off;
        let good = json!({"role": "assistant", "content": "good", "weight": 1});
        let question = json!({"role": "user", "content": "q"});
        assert_eq!(
            sample(json!({"messages": [question, bad, question, good]})),
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nbad<|im_end|>\n\
             <|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[good<|im_end|>]\n",
            "{mark}"
        );
    }
}

#[test]
fn text_that_is_not_used_is_told_by_every_command() {
    let row = |n: usize| json!({"prompt": format!("Where is kite {n}?"), "completion": " Here.", "context": "In the sky.", "id": "k"});
    let place = place(&(0..8).map(row).collect::<Vec<_>>());
    let expected =
        "rows.jsonl: text under these keys is not used: `context` (8 records, the first in line 1)";
    let report = check(&place);
    let warnings: Vec<&Value> = report["warnings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|warning| warning.as_str().unwrap().contains("rows.jsonl"))
        .collect();
    assert_eq!(warnings, [expected], "once, though the file is named twice");
    assert_eq!(report["train"][0]["unused"], json!([{"key": "context", "records": 8, "line": 1}]));

    let finetune = ["finetune", "recipe.toml", "--set", "train.steps=1"];
    let (_, said) = place.run(&[&finetune[..], &DATA].concat());
    assert!(said.contains(expected), "{said}");
    let (_, said) = place.run(&["eval", "perplexity", "--model", "model", "--data", "rows.jsonl", "--json"]);
    assert!(said.contains(expected), "{said}");
    let said = place.json(&["inspect", "rows.jsonl", "--json"]);
    assert_eq!(said["unused"][0]["key"], "context");
    let place = super::upcycle::place();
    let text = fs::read_to_string(place.path("text.jsonl")).unwrap();
    fs::write(place.path("text.jsonl"), text.replacen("{\"text\"", "{\"note\": \"n\", \"text\"", 1)).unwrap();
    let said = place.json(&["check", "upcycle.toml", "--json"]);
    let expected = "text.jsonl: text under these keys is not used: `note` (line 1)";
    assert!(said["warnings"].as_array().unwrap().contains(&json!(expected)), "{said}");
}

/// JSON lets a key stand twice, and readers take the last value.
#[test]
fn keys_that_are_repeated_are_told_by_every_command() {
    let place = Place::new();
    let rows = [
        r#"{"prompt": "p", "completion": "c"}"#,
        r#"{"prompt": "p", "prompt": "q", "completion": "c"}"#,
        r#"{"prompt": [{"role": "user", "content": "a", "content": "b"}, {"role": "user", "content": "a", "content": "b"}],
            "completion": [{"role": "assistant", "content": "c"}]}"#,
        r#"{"prompt": "p", "prompt": "p", "prompt": "p", "completion": "c"}"#,
    ];
    let lines = rows.map(|row| row.replace('\n', " ")).join("\n");
    let expected = "rows.jsonl: these keys stand more than once in an object, and only the last value is used: `prompt` (2 \
                    records, the first in line 2), `content` (line 3)";
    for text in [lines.clone(), format!("[{}]", lines.replace('\n', ",\n"))] {
        fs::write(place.path("rows.jsonl"), text).unwrap();
        let report = check(&place);
        let warnings = report["warnings"].as_array().unwrap().iter();
        let warnings: Vec<&Value> =
            warnings.filter(|warning| warning.as_str().unwrap().contains("more than once")).collect();
        assert_eq!(warnings, [expected], "once, though the file is named twice");
        assert_eq!(
            report["train"][0]["repeated"][0],
            json!({"key": "prompt", "records": 2, "line": 2}),
            "{report}"
        );
    }
    let (_, said) = place.run(&["eval", "perplexity", "--model", "model", "--data", "rows.jsonl"]);
    assert!(said.contains(expected), "{said}");
    let (said, _) = place.run(&["inspect", "rows.jsonl"]);
    assert!(said.contains("repeated       `prompt` of 2 records (the first in line 2)\n"), "{said}");
}

/// Of the settings of models and adapters the last value is used, too.
#[test]
fn keys_that_settings_repeat_are_told() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    for (file, key) in [
        ("model/config.json", "rms_norm_eps"),
        ("model/tokenizer_config.json", "model_max_length"),
        ("model/generation_config.json", "eos_token_id"),
        ("run/adapter_config.json", "r"),
    ] {
        let path = place.path(file);
        let text = fs::read_to_string(&path).unwrap_or("{\n}".to_string());
        let value = serde_json::from_str::<Value>(&text).unwrap().get(key).cloned().unwrap_or(json!(2));
        let end = text.trim_end().strip_suffix('}').unwrap().trim_end();
        let comma = if end.ends_with('{') { "" } else { "," };
        fs::write(&path, format!("{end}{comma} {0}: {value}, {0}: {value}}}", json!(key))).unwrap();
        let generate =
            ["generate", "--model", "model", "--adapter", "run", "--prompt", "a", "--max-new-tokens", "1"];
        let (_, said) = place.run(&generate);
        let told = format!("`{key}` stands more than once in an object, and only the last value is used\n");
        assert!(said.contains(&told), "{file}: {said}");
        let named = if file.starts_with("run/") { "in the adapter's configuration" } else { file };
        assert!(said.contains(named), "{file}: {said}");
        fs::write(&path, text).unwrap();
    }
}

#[test]
fn tools_that_the_template_does_not_read_are_told() {
    let record = json!({"tools": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": false},
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]});
    let said = check(&place(&[record]))["warnings"].to_string();
    let keys = "`enable_thinking` (line 1), `tools` (line 1)";
    assert!(said.contains(&format!("the chat template does not read these keys: {keys}")), "{said}");
}

#[test]
fn files_that_are_no_json_are_named_for_what_they_are() {
    insta::assert_snapshot!(refused("data.csv", b"instruction,output\nq,a\n"), @r###"
    exit 1
    error: data.csv:1: the file looks like a CSV file, expected JSON Lines or JSON
    hint: write it as JSON Lines first: `pandas.read_csv(old).to_json(new, orient="records", lines=True)`
    "###);
    insta::assert_snapshot!(refused("data.jsonl", b"PAR1\x15\x04"), @r###"
    exit 1
    error: data.jsonl: the file is a Parquet file, expected JSON Lines or JSON
    hint: write it as JSON Lines first: `pandas.read_parquet(old).to_json(new, orient="records", lines=True)`
    "###);
    insta::assert_snapshot!(refused("data.jsonl", b"\x1f\x8b\x08\0\0"), @r###"
    exit 1
    error: data.jsonl: the file is compressed with gzip, expected JSON Lines or JSON
    hint: decompress it first, with `gunzip`
    "###);
    insta::assert_snapshot!(refused("data.jsonl", b"- text: a\n"), @r###"
    exit 1
    error: data.jsonl:1: the file looks like YAML, expected JSON Lines or JSON
    hint: write it as JSON first: `json.dump(yaml.safe_load(open(old)), open(new, "w"))`
    "###);
    insta::assert_snapshot!(refused("data.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"caf\xe9\"}\n"), @r###"
    exit 1
    error: data.jsonl:2: not valid UTF-8: the byte 0xe9 at column 14
    hint: data files are UTF-8; convert one that a Windows program wrote with `iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW`
    "###);
    insta::assert_snapshot!(refused("data.jsonl", b"{\"text\": \"\\ud83d\"}\n"), @r###"
    exit 1
    error: data.jsonl:1: not valid JSON at column 11: `\ud83d` is half of a surrogate pair, which is no character
    hint: the string was cut inside an emoji, or was no valid text before; remove the half
    "###);
    insta::assert_snapshot!(refused("data.jsonl", b"{\"text\": \"a\", \"score\": NaN}\n"), @r###"
    exit 1
    error: data.jsonl:1: not valid JSON at column 24: found `NaN`, which Python writes and JSON does not have
    hint: write null, or leave the key out; `json.dumps(…, allow_nan=False)` finds such values
    "###);
    insta::assert_snapshot!(refused("data.json", b"{\"train\": [{\"text\": \"a\"}]}\n"), @r###"
    exit 1
    error: data.json: the file is one object with a list of records under `train`
    hint: write the list alone, or call it one of `data`, `records`, `rows`, `examples`, `instances`, `items`
    "###);
    insta::assert_snapshot!(refused("data.jsonl", b"{\"messages\": [{\"role\": \"user\", \"text\": \"q\"}]}\n"), @r###"
    exit 1
    error: data.jsonl:1: message 1 of 1: the `user` message has no `content`; it has the key `text`
    hint: what is said goes under `content` (or `value`, beside `from`), and may not be null
    "###);
    insta::assert_snapshot!(refused("data.jsonl", b"{\"text\": \"a\"}\n{\"prompt\": \"p\", \"completion\": \"c\"}\n"), @r###"
    exit 1
    error: data.jsonl:2: the record has the keys `prompt`, `completion`, expected `text` (format text)
    hint: all records of a file have the format of its first, or the one that the recipe names; this one has the format prompt-completion: put it into a file of its own
    "###);
}
