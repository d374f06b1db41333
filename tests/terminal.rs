use std::fs;

use crate::place::{Place, refusal};

const ODD: &str = "\u{1b}]0;owned\u{7}";

/// A template, a path and a name that would rename the window of a terminal.
#[test]
fn control_characters_in_messages_are_shown() {
    let place = Place::new();
    let config = place.path("model/tokenizer_config.json");
    let raise = format!("{{{{ raise_exception('no {ODD}') }}}}");
    let mut settings: serde_json::Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    settings["chat_template"] = raise.clone().into();
    fs::write(&config, settings.to_string()).unwrap();
    for name in place.names_in("model").iter().filter(|name| name.ends_with(".jinja")) {
        fs::write(place.path("model").join(name), &raise).unwrap();
    }
    let data = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n";
    fs::write(place.path("data.jsonl"), data).unwrap();
    for log in ["auto", "lines", "json", "silent"] {
        let said = refusal(&place, &["finetune", "recipe.toml", "--log", log]);
        assert!(said.contains("u001b]0;owned") && !said.contains(ODD), "{said:?}");
    }
    let said = refusal(&place, &["inspect", &format!("{ODD}.jsonl")]);
    assert!(said.contains("\\u001b]0;owned\\u0007.jsonl"), "{said:?}");
}

/// Names in which a line of their own stands, and marks that turn text around.
#[test]
fn names_cannot_forge_lines_of_messages() {
    const FORGED: &str = "a\nerror: owned\nhint: \u{202e}run it\u{2028}\r\nwarning: b";
    let place = Place::new();
    let refused = |arguments: &[&str]| {
        let said = refusal(&place, arguments);
        let shown = "    error: owned\n    hint: \\u202erun it\\u2028\\u000d\n    warning: b";
        assert!(said.contains(shown), "{said}");
        assert!(!said.contains("\nerror: owned") && !said.contains("\nhint: \\u202e"), "{said}");
    };
    refused(&["inspect", &format!("{FORGED}.jsonl")]);
    refused(&["eval", "perplexity", "--model", FORGED, "--data", "data.jsonl"]);
    let recipe = fs::read_to_string(place.path("recipe.toml")).unwrap();
    let targets = format!("rank = 4, targets = [{}]", serde_json::Value::from(FORGED));
    fs::write(place.path("forged.toml"), recipe.replace("rank = 4", &targets)).unwrap();
    refused(&["finetune", "forged.toml"]);

    // What is warned of, and what is said of a file on stdout.
    let data = serde_json::json!({ "text": "a", FORGED: "text that nothing reads" });
    fs::write(place.path("data.jsonl"), format!("{data}\n").repeat(9)).unwrap();
    let (_, told) = place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    assert!(told.contains("    error: owned\n") && !told.contains("\nerror:"), "{told}");
    let (told, _) = place.run(&["inspect", "data.jsonl"]);
    assert!(told.contains("\n               error: owned\n") && !told.contains("\nerror:"), "{told}");
}

/// On a terminal what a file holds is shown; another program gets it as it is.
#[cfg(target_os = "linux")]
#[test]
fn control_characters_in_answers_are_shown_on_a_terminal() {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::FromRawFd;

    let place = Place::new();
    fs::write(place.path("odd.jsonl"), format!("{}\n", serde_json::json!({ "text": format!("a{ODD}b\tc") })))
        .unwrap();
    let inspect = ["inspect", "odd.jsonl"];
    assert!(place.run(&inspect).0.contains(ODD));

    let (mut ours, mut theirs) = (0, 0);
    let none = std::ptr::null_mut();
    // SAFETY: both numbers are ours to be written, and the others may be null.
    assert_eq!(unsafe { libc::openpty(&raw mut ours, &raw mut theirs, none, none.cast(), none.cast()) }, 0);
    // SAFETY: both descriptors were just opened and belong to nobody else.
    let (mut ours, theirs) = unsafe { (File::from_raw_fd(ours), File::from_raw_fd(theirs)) };
    let mut child = place.command(&inspect).stdout(theirs).spawn().unwrap();
    assert!(child.wait().unwrap().success());
    drop(child);
    let mut shown = Vec::new();
    // The other end is closed, which reads as an error once all is read.
    let _ = ours.read_to_end(&mut shown);
    let shown = String::from_utf8(shown).unwrap();
    assert!(shown.contains("a\\u001b]0;owned\\u0007b") && !shown.contains('\u{1b}'), "{shown:?}");
}
