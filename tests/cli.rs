use std::io::Read;
use std::process::{Command, Output, Stdio};

use assert_cmd::cargo::cargo_bin;

/// `peft` in the repository, without colours and with a width of its own.
fn peft(arguments: &[&str]) -> Command {
    let mut command = Command::new(cargo_bin("peft"));
    command
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("COLUMNS", "100")
        .env("NO_COLOR", "1");
    command
}

/// Exit status, stdout and stderr of a command, as one text.
fn told(arguments: &[&str]) -> String {
    let Output { status, stdout, stderr } = peft(arguments).output().unwrap();
    let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    let status = status.code().map_or("killed".to_string(), |code| code.to_string());
    let mut text = format!("exit {status}\n");
    for (name, stream) in [("stdout", stdout), ("stderr", stderr)] {
        if !stream.is_empty() {
            let lines: Vec<&str> = stream.lines().map(str::trim_end).collect();
            text += &format!("----- {name}\n{}\n", lines.join("\n"));
        }
    }
    text
}

#[test]
fn help() {
    insta::assert_snapshot!(told(&["--help"]), @"");
    assert_eq!(told(&[]).replace("exit 2\n----- stderr", "exit 0\n----- stdout"), told(&["-h"]));
}

#[test]
fn help_of_finetune() {
    insta::assert_snapshot!(told(&["finetune", "--help"]), @"");
}

#[test]
fn help_of_check() {
    insta::assert_snapshot!(told(&["check", "-h"]), @"");
}

#[test]
fn help_of_merge() {
    insta::assert_snapshot!(told(&["merge", "-h"]), @"");
}

#[test]
fn help_of_upcycle() {
    insta::assert_snapshot!(told(&["upcycle", "-h"]), @"");
}

#[test]
fn help_of_generate() {
    insta::assert_snapshot!(told(&["generate", "-h"]), @"");
}

#[test]
fn help_of_chat() {
    insta::assert_snapshot!(told(&["chat", "-h"]), @"");
}

#[test]
fn help_of_eval() {
    insta::assert_snapshot!(told(&["eval", "--help"]), @"");
}

#[test]
fn help_of_inspect() {
    insta::assert_snapshot!(told(&["inspect", "-h"]), @"");
}

#[test]
fn help_of_recipes() {
    insta::assert_snapshot!(told(&["recipes", "-h"]), @"");
}

#[test]
fn version() {
    assert_eq!(told(&["--version"]), format!("exit 0\n----- stdout\npeft {}\n", env!("CARGO_PKG_VERSION")));
}

/// Help is a single sentence per line without its full stop, and belittles nothing.
#[test]
fn help_reads_well() {
    for command in ["finetune", "check", "merge", "upcycle", "generate", "chat", "eval", "inspect", "recipes"]
    {
        let text = told(&[command, "-h"]);
        assert!(!text.contains("simply"), "{text}");
        for line in text.lines().filter(|line| line.ends_with('.')) {
            panic!("a full stop in the help of {command}: {line}");
        }
    }
}

#[test]
fn recipes_are_listed_and_shown() {
    insta::assert_snapshot!(told(&["recipes"]), @"");
    assert_eq!(told(&["recipes"]), told(&["recipes", "list"]));
    let shown = peft(&["recipes", "show", "quickstart"]).output().unwrap();
    assert_eq!(shown.stdout, include_bytes!("../recipes/quickstart.toml"));
    insta::assert_snapshot!(told(&["recipes", "show", "quikstart"]), @"");
}

#[test]
fn wrong_requests_exit_with_2_and_say_what_to_do() {
    insta::assert_snapshot!(told(&["finetune"]), @"");
    insta::assert_snapshot!(told(&["fintune", "quickstart"]), @"");
    insta::assert_snapshot!(told(&["finetune", "recipes/quikstart.toml"]), @"");
    insta::assert_snapshot!(told(&["finetune", "nothing/like/it.toml"]), @"");
    insta::assert_snapshot!(told(&["finetune", "recipes"]), @"");
    insta::assert_snapshot!(told(&["finetune", "quickstart", "--set", "train.learnign_rate=1"]), @"");
    insta::assert_snapshot!(told(&["finetune", "quickstart", "--set", "train.full=true"]), @"");
    insta::assert_snapshot!(told(&["upcycle", "quickstart"]), @"");
    insta::assert_snapshot!(
        told(&["generate", "--model", "m", "--prompt", "p", "--top-p", "1.5"]),
        @""
    );
}

#[test]
fn a_wrong_line_of_a_recipe_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wrong.toml");
    let text = include_str!("../recipes/quickstart.toml").replace("learning_rate", "learnign_rate");
    let line = text.lines().position(|line| line.contains("learnign_rate")).unwrap() + 1;
    std::fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap();
    assert_eq!(
        told(&["finetune", path]),
        format!(
            "exit 2\n----- stderr\nerror: {path}:{line}: unknown key `train.learnign_rate`\n\
             hint: did you mean `learning_rate`?\n"
        )
    );
}

#[test]
fn errors_are_json_when_progress_is() {
    let output = peft(&["finetune", "quickstart", "--set", "seed=x", "--log", "json"]).output().unwrap();
    let event: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(event["event"], "error");
    assert_eq!(event["exit_code"], 2);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn colour_is_only_there_when_wanted() {
    let arguments = ["recipes", "show", "nothing"];
    let plain = peft(&arguments).output().unwrap();
    assert!(!plain.stderr.contains(&0x1b));
    let coloured = peft(&arguments).args(["--color", "always"]).output().unwrap();
    assert!(coloured.stderr.starts_with(b"\x1b["));
    let without = |bytes: &[u8]| {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        ["\x1b[0m", "\x1b[1m", "\x1b[31m", "\x1b[36m"].iter().fold(text, |text, code| text.replace(code, ""))
    };
    assert_eq!(without(&coloured.stderr), without(&plain.stderr));
}

/// `peft … | head -0` ends quietly.
#[test]
fn a_closed_pipe_is_no_error() {
    let mut child = peft(&["recipes", "show", "quickstart"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    let status = child.wait().unwrap();
    assert_eq!((status.code(), stderr.as_str()), (Some(0), ""));
}
