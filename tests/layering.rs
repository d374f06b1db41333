use std::collections::{BTreeMap, BTreeSet, VecDeque};
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
    /// The files with nothing but tests that this one declares.
    test_modules: Vec<Vec<String>>,
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
            test_modules: test_modules(&module_of(&below), &text),
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

/// A file's path from the crate: `["model", "config"]` for `model/config.rs` and for `model/config/mod.rs`.
fn module_of(path: &Path) -> Vec<String> {
    let module = path.with_extension("");
    let parts = module.iter().map(|part| part.to_str().unwrap().to_string());
    parts.filter(|part| part != "mod").collect()
}

/// The modules that a text declares as `#[cfg(test)] mod x;`.
fn test_modules(module: &[String], text: &str) -> Vec<Vec<String>> {
    let declared = text.split("#[cfg(test)]\nmod ").skip(1).filter_map(|after| {
        let name = identifier(after)?;
        after[name.len()..].starts_with(';').then_some(name)
    });
    declared.map(|name| [module, &[name]].concat()).collect()
}

/// The rooms that a file names.
fn rooms_used(text: &str) -> BTreeSet<String> {
    let from_the_top = paths_named(text).into_iter().filter(|named| named.root == Root::Crate);
    from_the_top.filter_map(|named| named.names.into_iter().next()).collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Root {
    Crate,
    Super,
}

/// A path as it is written: `super::super::x::Y` has the names `super`, `x` and `Y` below the root `super`.
struct Named {
    root: Root,
    names: Vec<String>,
}

/// The paths that a text names from `crate`, `peft` or `super`, each entry of a `use` list as one.
fn paths_named(text: &str) -> Vec<Named> {
    let code: String =
        text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let mut paths = Vec::new();
    for (word, root) in [("crate::", Root::Crate), ("peft::", Root::Crate), ("super::", Root::Super)] {
        for (at, _) in code.match_indices(word) {
            let inside = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
            if !code[..at].ends_with(inside) {
                let mut ends = Vec::new();
                read_path(&code[at + word.len()..], &[], &mut ends);
                paths.extend(ends.into_iter().map(|names| Named { root, names }));
            }
        }
    }
    paths
}

/// Reads what follows a `::`, a name or a list in braces, and returns the text behind it.
fn read_path<'a>(text: &'a str, before: &[String], ends: &mut Vec<Vec<String>>) -> &'a str {
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = rest.trim_start_matches(|c: char| c.is_whitespace() || c == ',');
            if rest.is_empty() || rest.starts_with('}') {
                return rest.get(1..).unwrap_or_default();
            }
            rest = read_path(rest, before, ends);
            // A name of its own (`as x`) says nothing about the file.
            rest = &rest[rest.find([',', '}']).unwrap_or(rest.len())..];
        }
    }
    let name = identifier(text).unwrap_or_default();
    let rest = &text[name.len()..];
    let path = [before, &[name]].concat();
    match rest.strip_prefix("::") {
        Some(below) => read_path(below, &path, ends),
        None => {
            ends.push(path);
            rest
        }
    }
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

/// The file that each path of a text leads to; a module is named by its path from the crate.
fn modules_used(module: &[String], text: &str, modules: &BTreeSet<Vec<String>>) -> BTreeSet<Vec<String>> {
    let mut used = BTreeSet::new();
    for Named { root, names } in paths_named(text) {
        let above = names.iter().take_while(|name| *name == "super").count();
        let start = match root {
            Root::Crate => &[],
            Root::Super => &module[..module.len().saturating_sub(above + 1)],
        };
        let whole = [start, &names[above..]].concat();
        let file = (1..=whole.len()).rev().map(|end| &whole[..end]).find(|path| modules.contains(*path));
        used.extend(file.map(<[String]>::to_vec));
    }
    used
}

/// Which file uses which, without the uses between a file and the modules it lies in.
fn uses_between(files: &[(Vec<String>, String)]) -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
    let modules: BTreeSet<Vec<String>> = files.iter().map(|(module, _)| module.clone()).collect();
    let related = |a: &[String], b: &[String]| a.starts_with(b) || b.starts_with(a);
    files
        .iter()
        .map(|(module, text)| {
            let mut used = modules_used(module, text, &modules);
            used.retain(|other| !related(module, other));
            (module.clone(), used)
        })
        .collect()
}

/// The shortest circle through each file that is on one; a circle is told once.
fn circles(uses: &BTreeMap<Vec<String>, BTreeSet<Vec<String>>>) -> Vec<String> {
    let mut told = BTreeSet::new();
    let mut circles = Vec::new();
    for start in uses.keys() {
        let mut ways = VecDeque::from([vec![start]]);
        let mut seen = BTreeSet::new();
        while let Some(way) = ways.pop_front() {
            let last = way[way.len() - 1];
            if last == start && way.len() > 1 {
                if told.insert(way.iter().copied().collect::<BTreeSet<_>>()) {
                    let names: Vec<String> = way.iter().map(|module| module.join("/")).collect();
                    circles.push(names.join(" -> "));
                }
                break;
            }
            let next = uses[last].iter().filter(|next| seen.insert(*next));
            ways.extend(next.map(|next| [way.as_slice(), &[next]].concat()));
        }
    }
    circles
}

/// Files in a circle can be read, tested and changed only together.
#[test]
fn files_use_each_other_in_no_circle() {
    let files = files();
    let for_tests: BTreeSet<Vec<String>> = files.iter().flat_map(|file| file.test_modules.clone()).collect();
    let files: Vec<_> = files
        .into_iter()
        .filter(|file| file.room != "lib" && file.room != "main")
        .map(|file| (module_of(&file.path), file.text))
        .filter(|(module, _)| !for_tests.contains(module))
        .collect();
    let circles = circles(&uses_between(&files));
    assert!(circles.is_empty(), "files that use each other in a circle:\n{}", circles.join("\n"));
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

/// The reader of files sees a circle through a folder, and none where a file names what it lies in or what it holds.
#[test]
fn circles_between_files_are_found() {
    let file = |module: &str, text: &str| -> (Vec<String>, String) {
        (module.split('/').map(str::to_string).collect(), text.to_string())
    };
    let files = [
        file("model", "mod rule;\npub use rule::Rule;\nuse crate::model::router::Router;"),
        file("model/rule", "use super::{Router, config::{self, Size as S}, router};"),
        file("model/router", "use super::Rule;\n// use super::rule::CHANCE;"),
        file("model/config", "fn f() { crate::model::config::size::g() }"),
        file("model/config/size", "use super::Size;\nuse super::super::walk;"),
        file(
            "model/walk",
            "use crate::{error::Error, model::router};\nfn f(_: super::config::size::Size) {}",
        ),
    ];
    let uses = uses_between(&files);
    let of_rule: Vec<String> = uses[&files[1].0].iter().map(|used| used.join("/")).collect();
    assert_eq!(of_rule, ["model/config", "model/router"]);
    assert_eq!(circles(&uses), ["model/config/size -> model/walk -> model/config/size"]);
    let declared = test_modules(&files[0].0, "#[cfg(test)]\nmod accuracy;\n#[cfg(test)]\nmod tests {\n}\n");
    assert_eq!(declared, [file("model/accuracy", "").0]);
}
