//! What is asked on the command line, from stdin, in a file or in a chat, through the program itself.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};

use peft::generate::{Fitted, Talk};
use peft::model::Pretrained;
use peft::run::text_of;
use serde_json::{Value, json};

use crate::place::{Place, refusal, told};

/// A command that gets `input` on stdin.
fn with_input(place: &Place, arguments: &[&str], input: impl AsRef<[u8]>) -> Output {
    let mut command = place.command(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that refuses something else may not read it.
    let _ = child.stdin.take().unwrap().write_all(input.as_ref());
    child.wait_with_output().unwrap()
}

/// What a chat with the model of chance writes to stdout and stderr.
fn chat(place: &Place, lines: &str, more: &[&str]) -> (String, String) {
    let arguments = [&["chat", "--model", "model", "--max-new-tokens", "8"], more].concat();
    let Output { status, stdout, stderr } = with_input(place, &arguments, lines);
    let stderr = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{stderr}");
    (String::from_utf8(stdout).unwrap(), stderr)
}

const GENERATE: [&str; 5] = ["generate", "--model", "model", "--max-new-tokens", "8"];

fn put_template(place: &Place, template: &str) {
    let settings = place.path("model/tokenizer_config.json");
    let mut found: Value = serde_json::from_slice(&fs::read(&settings).unwrap()).unwrap();
    found.as_object_mut().unwrap().remove("chat_template");
    fs::write(settings, found.to_string()).unwrap();
    fs::write(place.path("model/chat_template.jinja"), template).unwrap();
}

/// A template with a place for a system message, one that refuses it, and one that leaves it out.
const WITH_SYSTEM: &str = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}";
const WITHOUT: &str = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role here') }}\
                       {% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}";
const LEAVES_OUT: &str = "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}] {{ m.content }}\n{% endif %}{% endfor %}";

#[test]
fn a_system_message_stands_before_the_prompt() {
    let place = Place::new();
    put_template(&place, WITH_SYSTEM);
    let generate = |more: &[&str]| place.run(&[&GENERATE[..], more].concat()).0;
    let system = ["--system", "Speak like a pirate."];
    let found = generate(&[&["--prompt", "Where is kite 3?"], &system[..]].concat());
    let written = "[system] Speak like a pirate.\n[user] Where is kite 3?\n";
    assert_eq!(found, generate(&["--raw", "--prompt", written]));
    assert_ne!(found, generate(&["--prompt", "Where is kite 3?"]));
    assert_eq!(chat(&place, "Where is kite 3?\n", &system).0, found);

    put_template(&place, WITHOUT);
    for command in [&[&GENERATE[..], &["--prompt", "x"]].concat()[..], &["chat", "--model", "model"]] {
        let refused = refusal(&place, &[command, &system].concat());
        assert_eq!(
            refused,
            "exit 2\n\
             error: the chat template has no place for a system message: the chat template refuses message 1 of 2 (role `system`): \
             no system role here\n\
             hint: write into the prompt what the model is to keep to"
        );
    }
    put_template(&place, LEAVES_OUT);
    let refused = refusal(&place, &[&GENERATE[..], &["--prompt", "x"], &system].concat());
    insta::assert_snapshot!(refused, @"
    exit 2
    error: the chat template has no place for a system message: it leaves the message out
    hint: write into the prompt what the model is to keep to
    ");
    let raw = refusal(&place, &[&GENERATE[..], &["--prompt", "x", "--raw"], &system].concat());
    assert!(
        raw.starts_with("exit 2\n") && raw.contains("'--raw' cannot be used with '--system <TEXT>'"),
        "{raw}"
    );
    let blank = refusal(&place, &[&GENERATE[..], &["--prompt", "x", "--system", " "]].concat());
    assert!(blank.starts_with("exit 2\n") && blank.contains("expected a text that is not blank"), "{blank}");
}

#[test]
fn a_prompt_comes_from_stdin() {
    let place = Place::new();
    let read = [&GENERATE[..], &["--raw", "--prompt", "-"]].concat();
    let given = |prompt: &str| place.run(&[&GENERATE[..], &["--raw", "--prompt", prompt]].concat()).0;
    for (input, prompt) in
        [("One\ntwo\n", "One\ntwo"), ("One\r\n", "One"), ("One\n\n", "One\n"), ("One", "One")]
    {
        let output = with_input(&place, &read, input);
        assert_eq!(String::from_utf8(output.stdout).unwrap(), given(prompt), "{input:?}");
    }
    insta::assert_snapshot!(told(&place, &with_input(&place, &read, b"\xff")), @"
    exit 2
    error: standard input is not valid UTF-8, expected a prompt in UTF-8
    ");
    insta::assert_snapshot!(told(&place, &with_input(&place, &read, "\n")), @"
    exit 2
    error: the prompt has no tokens
    hint: write something with `--prompt`
    ");
}

#[test]
fn threads_are_as_many_as_the_flag_says() {
    let place = Place::new();
    let kernels = |more: &[&str]| {
        let output =
            place.command(&[&["check", "recipe.toml"], more].concat()).env("RAYON_NUM_THREADS", "3").output();
        let said = String::from_utf8(output.unwrap().stdout).unwrap();
        said.lines().find(|line| line.starts_with("kernels: ")).unwrap().to_string()
    };
    assert!(kernels(&[]).contains(" on 3 threads"));
    assert!(kernels(&["--threads", "2"]).contains(" on 2 threads"));
    let answer =
        |threads| place.run(&[&GENERATE[..], &["--prompt", "Where?", "--threads", threads]].concat()).0;
    assert_eq!(answer("1"), answer("2"));
    for threads in ["0", "1025", "two"] {
        let refused = refusal(&place, &["generate", "--threads", threads]);
        assert!(refused.starts_with("exit 2\n") && refused.contains("'--threads <N>'"), "{refused}");
    }
}

/// The lines of JSON that a file of prompts is answered with.
fn answered(place: &Place, prompts: &str, more: &[&str]) -> Vec<Value> {
    fs::write(place.path("prompts.jsonl"), prompts).unwrap();
    let stdout = place.run(&[&GENERATE[..], &["--prompts", "prompts.jsonl"], more].concat()).0;
    stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn each_record_of_a_file_is_answered_as_its_prompt_alone() {
    let place = Place::new();
    put_template(&place, WITH_SYSTEM);
    let asked: Vec<String> =
        (0..12).map(|n| format!("{} is kite {n}?", "Where ".repeat(1 + n % 5))).collect();
    let records: Vec<Value> = asked
        .iter()
        .enumerate()
        .map(|(n, asked)| match n % 3 {
            0 => json!({ "messages": [{ "role": "user", "content": asked }], "id": { "n": n } }),
            _ => json!({ "id": n, "prompt": asked, "more": [null, 1.5] }),
        })
        .collect();
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    for more in [&[][..], &["--temperature", "1.5", "--seed", "3"], &["--system", "Be brief."]] {
        let found = answered(&place, &lines, more);
        assert_eq!(found.len(), records.len());
        for ((mut found, record), asked) in found.into_iter().zip(&records).zip(&asked) {
            let alone = place.run(&[&GENERATE[..], &["--prompt", asked], more].concat()).0;
            let mut take = |key: &str| found.as_object_mut().unwrap().shift_remove(key).unwrap();
            assert_eq!(format!("{}\n", take("completion").as_str().unwrap()), alone);
            let (tokens, reason) = (take("tokens").as_u64().unwrap(), take("finish_reason"));
            assert!(
                if reason == "length" { tokens == 8 } else { reason == "stop" && tokens <= 8 },
                "{tokens}"
            );
            assert_eq!(&found, record, "the keys of the record are carried through");
        }
    }
    let raw = answered(&place, "{\"prompt\": \"Where\"}\n", &["--raw"]);
    let alone = place.run(&[&GENERATE[..], &["--raw", "--prompt", "Where"]].concat()).0;
    assert_eq!(format!("{}\n", raw[0]["completion"].as_str().unwrap()), alone);
}

#[test]
fn tools_and_variables_of_a_record_reach_the_template() {
    let place = Place::new();
    put_template(&place, "{{ mood }} {{ tools[0].name if tools else '' }} {{ messages[-1].content }}");
    let record = json!({
        "messages": [{ "role": "user", "content": "Where?" }],
        "tools": [{ "name": "find" }],
        "chat_template_kwargs": { "mood": "calm" },
    });
    let found = answered(&place, &format!("{record}\n"), &[]);
    let alone = place.run(&[&GENERATE[..], &["--raw", "--prompt", "calm find Where?"]].concat()).0;
    assert_eq!(format!("{}\n", found[0]["completion"].as_str().unwrap()), alone);
}

#[test]
fn records_that_cannot_be_answered_are_named_with_their_line() {
    let place = Place::new();
    put_template(&place, WITH_SYSTEM);
    let refused = |line: &str, more: &[&str]| {
        fs::write(place.path("prompts.jsonl"), format!("{{\"prompt\": \"a\"}}\n{line}\n")).unwrap();
        refusal(&place, &[&GENERATE[..], &["--prompts", "prompts.jsonl"], more].concat())
    };
    insta::assert_snapshot!(refused("{\"text\": \"a\"}", &[]), @"
    exit 1
    error: prompts.jsonl:2: the record has the key `text`, expected `prompt` or `messages`
    ");
    insta::assert_snapshot!(refused("{\"prompt\": \"a\", \"completion\": \"b\"}", &[]), @"
    exit 1
    error: prompts.jsonl:2: the record has a key `completion`, which the answer is written under
    hint: give the key another name, such as `expected`
    ");
    let long = format!("{{\"prompt\": \"{}\"}}", "kite ".repeat(600));
    assert!(refused(&long, &[]).contains("prompts.jsonl:2: the prompt has "), "{}", refused(&long, &[]));
    let talk = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}";
    insta::assert_snapshot!(refused(talk, &["--raw"]), @"
    exit 2
    error: prompts.jsonl:2: `messages` go through the chat template, which `--raw` leaves out; expected `prompt`
    ");
    let own = "{\"messages\": [{\"role\": \"system\", \"content\": \"a\"}, {\"role\": \"user\", \"content\": \"a\"}]}";
    insta::assert_snapshot!(refused(own, &["--system", "b"]), @"
    exit 2
    error: prompts.jsonl:2: the messages begin with a system message of their own, and `--system` gives another
    hint: keep one of the two
    ");
    let both = refusal(&place, &[&GENERATE[..], &["--prompts", "prompts.jsonl", "--prompt", "a"]].concat());
    assert!(both.starts_with("exit 2\n") && both.contains("cannot be used with"), "{both}");
    let missing = refusal(&place, &[&GENERATE[..], &["--prompts", "prompt.jsonl"]].concat());
    assert!(missing.contains("hint: did you mean `prompts.jsonl`?"), "{missing}");
}

#[test]
fn a_chat_obeys_its_commands() {
    let place = Place::new();
    put_template(&place, WITH_SYSTEM);
    let alone = |lines: &str| chat(&place, lines, &["--log", "silent"]).0;
    let first = alone("Hello.\n");
    let both = alone("Hello.\nAnd now?\n");
    let second = both.strip_prefix(&first).unwrap();
    // What is forgotten or taken back is not seen any more.
    assert_eq!(alone("Hello.\n/clear\nHello.\n"), format!("{first}{first}"));
    assert_eq!(
        alone("Hello.\nWhat?\n/undo\nAnd now?\n").strip_suffix(second).unwrap(),
        alone("Hello.\nWhat?\n")
    );
    // The system message holds from there on, and stays when all is cleared.
    let instructed = chat(&place, "Hello.\n", &["--system", "Be a pirate.", "--log", "silent"]).0;
    assert_ne!(instructed, first);
    assert_eq!(alone("/system Be a pirate.\nHello.\n"), instructed);
    assert_eq!(alone("/system Be a pirate.\nHello.\n/clear\nHello.\n"), instructed.repeat(2));
    assert_eq!(alone("/system Be a pirate.\n/system\nHello.\n"), first);
    // Nothing is asked after the end.
    assert_eq!(alone("Hello.\n/exit\nAnd now?\n"), first);
    // Lines between quotes are one question, commands among them too.
    let question = json!({ "messages": [{ "role": "user", "content": "One\n/clear\n\ntwo" }] });
    let several = answered(&place, &format!("{question}\n"), &[]);
    let completion = several[0]["completion"].as_str().unwrap();
    assert_eq!(alone("\"\"\"\nOne\n/clear\n\ntwo\n\"\"\"\n"), format!("{completion}\n"));
}

#[test]
fn a_chat_says_what_its_commands_did() {
    let place = Place::new();
    put_template(&place, WITHOUT);
    let said = |lines: &str| chat(&place, lines, &[]).1;
    insta::assert_snapshot!(said("/hlep\n/whatever it is\n/clear now\n/undo\n/save\n/save x\n/exit\n"), @r#"
    warning: there is no command `/hlep`; did you mean `/help`?
    warning: there is no command `/whatever`; `/help` lists the commands, and a question that begins with `/` stands between lines of `"""`
    warning: `/clear` stands alone, and `now` follows it here: nothing is done
    warning: nothing has been answered, so there is nothing to take back
    warning: `/save` needs the name of a file to write
    warning: nothing has been answered, so there is nothing to save
    "#);
    insta::assert_snapshot!(said("/help\n/clear\n/system Be brief.\n/system\n"), @r#"
    /help         list the commands
    /clear        forget what was said; the system message stays
    /system TEXT  tell the model what to keep to; without TEXT, nothing
    /save FILE    write the chat into a new file, a record that `data.train` takes
    /undo         take back the last exchange
    /exit         end the chat, as Ctrl-D does
    """           before and after several lines that are one question
    what was said is forgotten
    warning: the chat template has no place for a system message: the chat template refuses message 1 of 2 (role `system`): no system role here
    there is no system message
    "#);
    insta::assert_snapshot!(said("Hello.\n/undo\n\"\"\"\nand\n"), @r#"
    the last exchange is taken back
    warning: the input ends before the line of `"""` that ends a question: the question is left out
    "#);
}

#[test]
fn a_saved_chat_is_training_data() {
    let place = Place::new();
    put_template(&place, WITH_SYSTEM);
    let long = "kite ".repeat(200);
    let lines = format!("{long}\n{long}\n{long}\nHello.\n/save chat.jsonl\n/save chat.jsonl\n");
    let (stdout, stderr) = chat(&place, &lines, &["--system", "Be brief.", "--temperature", "1"]);
    assert!(stderr.contains("the oldest exchange is forgotten\n"), "{stderr}");
    assert!(
        stderr.ends_with(
            "wrote chat.jsonl\nwarning: chat.jsonl: exists already, and `/save` writes a new file\n"
        ),
        "{stderr}"
    );
    let saved = fs::read_to_string(place.path("chat.jsonl")).unwrap();
    let record: Value = serde_json::from_str(saved.strip_suffix('\n').unwrap()).unwrap();
    let messages = record["messages"].as_array().unwrap();
    assert_eq!(messages[0], json!({ "role": "system", "content": "Be brief." }));
    assert_eq!(messages.len(), 9, "all exchanges are there, those too that the model sees no more");
    let answers: String =
        messages.iter().skip(2).step_by(2).map(|m| format!("{}\n", m["content"].as_str().unwrap())).collect();
    assert_eq!(answers, stdout);
    fs::write(place.path("chats.jsonl"), saved.repeat(10)).unwrap();
    let set = ["--set", "data.train=[{ path = \"chats.jsonl\" }]", "--set", "data.max_length=512"];
    let (checked, _) = place.run(&[&["check", "recipe.toml"], &set[..]].concat());
    assert!(checked.contains("(messages, through the chat template)"), "{checked}");
}

/// The system message stays while exchanges leave.
#[test]
fn a_chat_slides_and_keeps_its_system_message() {
    let place = Place::new();
    put_template(&place, WITH_SYSTEM);
    let long = "kite ".repeat(200);
    let lines = format!("Hello.\n{long}\n{long}\n{long}\nAnd now?\n/save chat.jsonl\n");
    let (_, stderr) = chat(&place, &lines, &["--system", "Be a pirate.", "--log", "silent"]);
    let forgotten = "warning: the model sees 512 tokens, and the chat is longer: the ";
    assert!(!stderr.is_empty() && stderr.lines().all(|line| line.starts_with(forgotten)), "{stderr}");
    let saved: Value = serde_json::from_slice(&fs::read(place.path("chat.jsonl")).unwrap()).unwrap();
    let all = saved["messages"].as_array().unwrap();
    let (question, answer) = (&all[all.len() - 2..all.len() - 1], &all[all.len() - 1]["content"]);
    // The last answer is that to the system message, the exchanges that have room, and the question.
    let answers_seeing = |exchanges: usize| {
        let seen = &all[all.len() - 2 - 2 * exchanges..all.len() - 2];
        let record = json!({ "messages": ([&all[..1], seen, question].concat()) });
        fs::write(place.path("seen.jsonl"), format!("{record}\n")).unwrap();
        let output = place.command(&[&GENERATE[..], &["--prompts", "seen.jsonl"]].concat()).output().unwrap();
        serde_json::from_slice::<Value>(&output.stdout).map(|found| found["completion"].clone()).ok()
    };
    assert!((1..=2).any(|exchanges| answers_seeing(exchanges).as_ref() == Some(answer)), "{answer}");
}

#[test]
fn completions_and_manual_pages_are_those_of_the_commands() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let (script, said) = place.run(&["completions", shell]);
        assert!(script.contains("finetune") && script.contains("max-new-tokens"), "{shell}: {script}");
        assert!(!script.contains("choices"), "{shell}: what does not exist is not completed");
        assert_eq!(said, "");
    }
    let refused = refusal(&place, &["completions", "tcsh"]);
    assert!(
        refused.starts_with("exit 2\n") && refused.contains("[possible values: bash, elvish, fish,"),
        "{refused}"
    );

    let (stdout, said) = place.run(&["man", "pages/man1"]);
    assert_eq!((stdout.as_str(), said.as_str()), ("", "wrote the manual pages to pages/man1\n"));
    let pages = place.names_in("pages/man1");
    for page in ["peft.1", "peft-finetune.1", "peft-generate.1", "peft-chat.1", "peft-man.1"] {
        assert!(pages.iter().any(|name| name == page), "{pages:?}");
    }
    let page = fs::read_to_string(place.path("pages/man1/peft-generate.1")).unwrap();
    assert!(page.contains("\\-\\-prompts") && page.contains("Answer each record of this file"), "{page}");
    let eval = fs::read_to_string(place.path("pages/man1/peft-eval.1")).unwrap();
    assert!(!eval.contains("choices"), "{eval}");
    // Pages of an earlier version are replaced.
    place.run(&["man", "pages/man1"]);
    let refused = refusal(&place, &["man", "recipe.toml"]);
    assert!(refused.starts_with("exit 1\nerror: recipe.toml: manual pages cannot be written: "), "{refused}");
}

/// The tokens of a question begin with the system message, whatever exchanges had to leave for it.
#[test]
fn the_oldest_exchanges_leave_and_the_system_message_stays() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny-llama");
    let base = Pretrained::open(model.to_str().unwrap()).unwrap();
    let text = text_of(&base, &Default::default(), Default::default()).unwrap();
    let mut talk = Talk::new(&text, 160, 16);
    talk.set_system(Some("Be a pirate.".to_string())).unwrap();
    let mut left = 0;
    for number in 0..12 {
        let Fitted::Prompt { tokens, forgotten } = talk.ask(&format!("Where is kite {number}?")).unwrap()
        else {
            panic!("question {number} has room");
        };
        left += forgotten;
        let prompt = text.decode(&tokens, false).unwrap();
        assert!(prompt.contains("Be a pirate.") && tokens.len() <= 144, "{prompt}");
        let seen = (0..=number).filter(|earlier| prompt.contains(&format!("kite {earlier}?")));
        assert_eq!(seen.collect::<Vec<_>>(), (left..=number).collect::<Vec<_>>(), "{prompt}");
        talk.answer(format!("In box {number}."));
    }
    assert!(left > 2, "{left} exchanges left");
}
