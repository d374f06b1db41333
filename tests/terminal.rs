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
