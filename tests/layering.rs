use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Who may use whom; everybody may use `error`.
const ARROWS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("ops", &[]),
    ("weights", &[]),
    ("data", &[]),
    ("model", &["ops", "weights"]),
    ("adapter", &["model", "ops", "weights"]),
    ("eval", &["model", "data", "ops"]),
    ("generate", &["model", "data"]),
    ("train", &["model", "adapter", "eval", "data", "ops", "weights"]),
    ("merge", &["model", "adapter", "weights"]),
    ("upcycle", &["model", "eval", "data", "weights", "ops"]),
    // Types of settings alone: a recipe opens no file.
    ("recipe", &["ops", "data", "model", "adapter", "train", "upcycle"]),
    (
        "run",
        &[
            "ops", "weights", "data", "model", "adapter", "eval", "generate", "train", "merge", "upcycle",
            "recipe",
        ],
    ),
    (
        "cli",
        &[
            "ops", "weights", "data", "model", "adapter", "eval", "generate", "train", "merge", "upcycle",
            "recipe", "run",
        ],
    ),
    // The binary chooses its allocator.
    ("main", &["cli", "ops"]),
];

/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 5] = ["utils", "common", "helpers", "misc", "core"];

/// Lines of a file, its tests not counted.
const CEILING: usize = 400;

struct File {
    path: PathBuf,
    room: String,
    /// The text without its tests.
    text: String,
}

fn files() -> Vec<File> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &root, &mut files);
    assert!(files.len() > 20, "the house has more than {} files", files.len());
    files
}

fn collect(root: &Path, folder: &Path, files: &mut Vec<File>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(root, &path, files);
            continue;
        }
        let below = path.strip_prefix(root).unwrap().to_path_buf();
        let first = below.components().next().unwrap().as_os_str().to_str().unwrap();
        let text = fs::read_to_string(&path).unwrap();
        files.push(File {
            room: first.trim_end_matches(".rs").to_string(),
            text: without_tests(&text),
            path: below,
        });
    }
}

/// Tests are the last thing in a file.
fn without_tests(text: &str) -> String {
    match text.find("\n#[cfg(test)]\nmod ") {
        Some(end) => text[..=end].to_string(),
        None => text.to_string(),
    }
}

/// The rooms that a file names: `crate::room` and `peft::room`, also inside `use crate::{a::B, c}`.
fn rooms_used(text: &str) -> BTreeSet<String> {
    let code: String =
        text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let mut rooms = BTreeSet::new();
    for root in ["crate::", "peft::"] {
        for (at, _) in code.match_indices(root) {
            let after = &code[at + root.len()..];
            match after.strip_prefix('{') {
                Some(list) => rooms.extend(heads_of(list)),
                None => rooms.extend(identifier(after)),
            }
        }
    }
    rooms
}

/// The first identifier of each entry of a `use` list.
fn heads_of(list: &str) -> Vec<String> {
    let mut heads = Vec::new();
    let mut depth = 0;
    let mut entry = true;
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => entry = true,
            _ if entry && !c.is_whitespace() => {
                heads.extend(identifier(&list[at..]));
                entry = false;
            }
            _ => {}
        }
    }
    heads
}

fn identifier(text: &str) -> Option<String> {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    (end > 0).then(|| text[..end].to_string())
}

#[test]
fn rooms_use_only_what_their_line_names() {
    let arrows: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let mut forbidden = Vec::new();
    for file in files() {
        if file.room == "lib" {
            continue;
        }
        let Some(may_use) = arrows.get(file.room.as_str()) else {
            panic!("{}: the room `{}` has no line in the table", file.path.display(), file.room);
        };
        for used in rooms_used(&file.text) {
            let is_room = arrows.contains_key(used.as_str());
            if is_room && used != file.room && used != "error" && !may_use.contains(&used.as_str()) {
                forbidden.push(format!("{}: `{}` may not use `{used}`", file.path.display(), file.room));
            }
        }
    }
    assert!(forbidden.is_empty(), "{}", forbidden.join("\n"));
}

#[test]
fn files_are_short_enough_to_be_read() {
    let long: Vec<String> = files()
        .into_iter()
        .map(|file| (file.text.lines().count(), file.path))
        .filter(|(lines, _)| *lines > CEILING)
        .map(|(lines, path)| format!("{}: {lines} lines without tests, at most {CEILING}", path.display()))
        .collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}

#[test]
fn names_say_what_is_inside() {
    for file in files() {
        for part in file.path.components() {
            let name = part.as_os_str().to_str().unwrap().trim_end_matches(".rs");
            assert!(!EMPTY_NAMES.contains(&name), "{}: `{name}` says nothing", file.path.display());
        }
    }
}

#[test]
fn terminal_crates_are_known_to_cli_alone() {
    for file in files() {
        if file.room == "cli" || file.room == "main" {
            continue;
        }
        for name in ["clap::", "indicatif::", "ctrlc::", "println!(", "print!("] {
            let code =
                file.text.lines().find(|line| line.contains(name) && !line.trim_start().starts_with("//"));
            assert_eq!(code, None, "{}: only cli may use `{name}`", file.path.display());
        }
    }
}

/// The reader of this test reads.
#[test]
fn uses_are_found_in_every_spelling() {
    let text = "
        use crate::error::Result;
        use crate::{
            adapter::{self, hf::{Reader}},
            weights,
        };
        // use crate::cli::run;
        fn f() { crate::ops::linear() }
        pub(crate) use crate::model as m;
    ";
    let used: Vec<String> = rooms_used(text).into_iter().collect();
    assert_eq!(used, ["adapter", "error", "model", "ops", "weights"]);
    assert_eq!(without_tests("a\n\n#[cfg(test)]\nmod tests {\n}\n"), "a\n\n");
}
