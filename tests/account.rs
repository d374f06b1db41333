use std::fs;

use serde_json::{Value, json};

use super::place::{Place, refusal};
use super::upcycle::{open, place, report};

const UPCYCLE: [&str; 4] = ["upcycle", "upcycle.toml", "--set", "upcycle.verify=false"];

/// What a conversion says on the terminal.
fn told(place: &Place, sets: &[&str]) -> String {
    if place.path("mixture").exists() {
        fs::remove_dir_all(place.path("mixture")).unwrap();
    }
    let mut arguments = UPCYCLE.to_vec();
    sets.iter().for_each(|set| arguments.extend(["--set", set]));
    place.run(&arguments).1
}

fn refused(place: &Place, sets: &[&str]) -> String {
    let mut arguments = [&UPCYCLE[..], &["--log", "silent"]].concat();
    sets.iter().for_each(|set| arguments.extend(["--set", set]));
    let said = refusal(place, &arguments);
    assert!(!place.path("mixture").exists());
    // What is refused is refused by `check` too.
    arguments[0] = "check";
    arguments.retain(|argument| !["--log", "silent"].contains(argument));
    assert_eq!(refusal(place, &arguments), said);
    said
}

#[test]
fn every_new_model_is_measured_on_the_built_in_text() {
    let place = place();
    for method in ["split", "prune", "copy"] {
        let mut sets = vec![format!("upcycle.method={method}"), "upcycle.verify=true".to_string()];
        if method == "copy" {
            sets.extend(["upcycle.shared=0".to_string(), "upcycle.experts=4".to_string()]);
        }
        let told = told(&place, &sets.iter().map(String::as_str).collect::<Vec<_>>());
        let account = report(&place, "mixture");
        let neutral = account["comparisons"].as_array().unwrap().last().unwrap().clone();
        assert_eq!((&neutral["origin"], &neutral["file"]), (&json!("neutral"), &Value::Null), "{method}");
        assert!((500..2048).contains(&neutral["tokens"].as_u64().unwrap()), "{}", neutral["tokens"]);
        let made = if method == "prune" { "pruned" } else { "mixture" };
        assert!(neutral[made]["nll"].is_f64() && neutral["dense"]["nll"].is_f64(), "{method}");
        let mut conclusion =
            account["conclusion"].as_array().unwrap().iter().map(|line| line.as_str().unwrap());
        // To a model of random weights all text is unknown.
        let says = "the built-in neutral text says nothing of what was lost: the dense model is no better there than guessing";
        let conclusion = conclusion.rfind(|line| line.contains(says)).unwrap();
        assert!(told.contains(conclusion), "{told}");
        let markdown = fs::read_to_string(place.path("mixture/upcycle.md")).unwrap();
        assert!(
            markdown.find("## Conclusion\n\n").unwrap() < markdown.find(conclusion).unwrap(),
            "{markdown}"
        );
        if method == "copy" {
            let above = neutral["mixture"]["above_dense"]["mean"].as_f64().unwrap();
            assert!(above.abs() < 1e-4, "{above}");
        }
    }
}

#[test]
fn a_short_context_is_not_exceeded() {
    let place = place();
    open(&place.path("model"), |config| config["max_position_embeddings"] = 40.into());
    told(&place, &[]);
    for text in report(&place, "mixture")["comparisons"].as_array().unwrap() {
        let windows = text["window_tokens"].as_array().unwrap().iter();
        assert_eq!(windows.map(|tokens| tokens.as_u64().unwrap()).max(), Some(39));
    }
}

#[test]
fn a_quarter_of_the_slices_each_is_printed() {
    let place = place();
    let told = told(&place, &["upcycle={ experts = 8, refit = \"none\" }"]);
    assert!(
        told.contains("8 slices of 48 neurons: 2 shared, 2 of 6 routed per token, 50% of the neurons"),
        "{told}"
    );
}

#[test]
fn experts_without_tokens_are_named() {
    let place = place();
    let told = told(&place, &["upcycle.router=zero"]);
    let account = report(&place, "mixture");
    let layers = account["layers"].as_array().unwrap();
    for layer in layers {
        assert_eq!(layer["calibration_load"], json!([512, 512, 0, 0]));
    }
    let warning = "warning: expert 2 of layer 0, expert 3 of layer 0, expert 2 of layer 1, expert 3 of layer 1, expert 2 of \
                   layer 2, expert 3 of layer 2 and 4 more: the router sends 0 of 512 calibration tokens there";
    assert!(told.contains(warning), "{told}");
    let markdown = fs::read_to_string(place.path("mixture/upcycle.md")).unwrap();
    assert!(markdown.contains(&format!("- {}", &warning["warning: ".len()..])), "{markdown}");
    // Where every expert has tokens there is nothing to say.
    let fine = self::told(&place, &["upcycle.router=random"]);
    let load = report(&place, "mixture")["layers"][0]["calibration_load"].clone();
    let load: Vec<u64> = load.as_array().unwrap().iter().map(|tokens| tokens.as_u64().unwrap()).collect();
    assert_eq!(load.iter().sum::<u64>(), 1024);
    assert!(load.iter().all(|tokens| *tokens > 0) && !fine.contains("the router sends 0"), "{load:?} {fine}");
}

#[test]
fn a_head_that_is_stored_twice_is_told_with_its_size() {
    let place = place();
    let (plan, _) = place.run(&["check", "upcycle.toml", "--set", "upcycle.method=prune"]);
    assert!(!plan.contains("stored twice"), "{plan}");
    let (plan, _) = place.run(&["check", "upcycle.toml"]);
    let told = told(&place, &[]);
    let line = "the embedding, which is the dense model's head too, is stored twice, for some programs do not tie the heads \
                of mixtures (`tie_word_embeddings = false`): 1024 x 128 values more, 0.5 MiB";
    let markdown = fs::read_to_string(place.path("mixture/upcycle.md")).unwrap();
    assert!(
        plan.contains(line) && told.contains(line) && markdown.contains(line),
        "{plan}\n{told}\n{markdown}"
    );
    assert_eq!(
        report(&place, "mixture")["untied"],
        json!({ "vocab": 1024, "hidden": 128, "bytes": 524_288 })
    );
}

#[test]
fn text_of_one_kind_and_too_little_text_are_warned_of() {
    let place = place();
    let told = told(&place, &["upcycle.partition=gradient"]);
    for warning in [
        "warning: `upcycle.partition = \"gradient\"` makes an expert for each kind of text, and `calibration.data` names one file",
        "warning: 512 calibration tokens give each of 4 experts about 256, and 512 are the least to tell experts apart by; \
         raise `calibration.tokens` to 1024 or more",
    ] {
        assert!(told.contains(warning), "{told}");
    }
    assert!(told.contains("512 tokens to learn from, 128 held out, all of `text.jsonl`"), "{told}");
    fs::write(place.path("other.jsonl"), "{\"text\": \"another kind of text, which is short\"}\n").unwrap();
    let two = "calibration.data=[{ path = \"text.jsonl\" }, { path = \"other.jsonl\" }]";
    let told = self::told(&place, &["upcycle.partition=gradient", two, "calibration.tokens=2048"]);
    assert!(!told.contains("names one file") && !told.contains("are the least"), "{told}");
    assert!(told.contains("held out of the same 2 files"), "{told}");
}

#[test]
fn the_same_text_is_not_fitted_to_and_measured_on() {
    let place = place();
    fs::copy(place.path("text.jsonl"), place.path("copy.jsonl")).unwrap();
    insta::assert_snapshot!(refused(&place, &["calibration.data=[{ path = \"text.jsonl\" }, { path = \"copy.jsonl\" }]"]), @"
    exit 2
    error: `calibration.data` has the same file twice, `text.jsonl` and `copy.jsonl`: its text would be held out and fitted to
    hint: name it once, with a larger `weight` if it is to count more
    ");
    insta::assert_snapshot!(refused(&place, &["calibration.eval=[{ path = \"copy.jsonl\" }]"]), @"
    exit 2
    error: `calibration.eval` has `copy.jsonl`, which is `text.jsonl` of `calibration.data`
    hint: what is learned from cannot be measured on; `held_out` keeps a part of each file out
    ");
    let other = refused(&place, &["calibration.eval=[{ path = \"./text.jsonl\" }]"]);
    assert!(other.contains("`calibration.eval` has `./text.jsonl`"), "{other}");
    // The same documents in another order, with blanks between them.
    let text = fs::read_to_string(place.path("text.jsonl")).unwrap();
    let reversed: Vec<&str> = text.lines().rev().collect();
    fs::write(place.path("reversed.jsonl"), reversed.join("\n\n")).unwrap();
    let reversed = ["calibration.tokens=65536", "calibration.eval=[{ path = \"reversed.jsonl\" }]"];
    insta::assert_snapshot!(refused(&place, &reversed), @"
    exit 2
    error: `reversed.jsonl` of `calibration.eval`: all text that would be measured on is in the calibration text
    hint: what is learned from cannot be measured on; name a file of other text
    ");
    // All but two documents of it are learned from, and one is new.
    let other = "{\"text\": \"what nobody has read before, for it was written here and now\"}";
    fs::write(place.path("most.jsonl"), format!("{text}{other}\n")).unwrap();
    let most = [
        "calibration.tokens=65536",
        "calibration.held_out=600",
        "calibration.eval=[{ path = \"most.jsonl\" }]",
    ];
    let told = told(&place, &most);
    assert!(told.contains("windows of `most.jsonl` are in the calibration text too"), "{told}");
    // Of documents that are there twice one may be held out and the other fitted to.
    fs::write(place.path("twice.jsonl"), format!("{text}{text}")).unwrap();
    let told =
        self::told(&place, &["calibration.data=[{ path = \"twice.jsonl\" }]", "calibration.tokens=65536"]);
    assert!(told.contains("held-out windows are in the text that is fitted to, too"), "{told}");
    let markdown = fs::read_to_string(place.path("mixture/upcycle.md")).unwrap();
    assert!(
        markdown.contains("of these windows are for the most part in the text that was fitted to, too"),
        "{markdown}"
    );
    let told = self::told(&place, &[]);
    assert!(!told.contains("windows are in the text") && !told.contains("same file"), "{told}");
}

#[test]
fn what_copies_do_not_use_is_told() {
    let place = place();
    let told = told(&place, &["upcycle={ method = \"copy\", experts = 2, verify = false }"]);
    assert!(told.contains("warning: `upcycle.active` is 2, as many as there are experts"), "{told}");
    assert!(told.contains("warning: `calibration` is not used"), "{told}");
    fs::remove_dir_all(place.path("mixture")).unwrap();
    insta::assert_snapshot!(refused(&place, &["upcycle={ method = \"copy\", router = \"ridge\" }"]), @"
    exit 2
    error: `upcycle.router`: this one tells slices of one network apart, and the experts here are copies of whole networks
    hint: `upcycle.router` of copies is `random`, `zero`, `hidden-kmeans` or `prompts`
    ");
    let clusters = ["upcycle={ method = \"copy\", router = \"hidden-kmeans\" }", "calibration.tokens=64"];
    insta::assert_snapshot!(refused(&place, &clusters), @r#"
    exit 2
    error: `upcycle.router = "hidden-kmeans"` needs a window of calibration text for each of 8 experts, and finds 1
    hint: give more text and raise `calibration.tokens`, or lower `upcycle.experts`
    "#);
}
