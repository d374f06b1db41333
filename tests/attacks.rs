//! `ATTACKS.md` names tests that exist.

use std::fs;
use std::path::{Path, PathBuf};

/// The Rust files below a folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| match path.is_dir() {
            true => sources(&path),
            false => vec![path],
        })
        .filter(|path| path.extension().is_some_and(|ending| ending == "rs"))
        .collect()
}

#[test]
fn every_attack_has_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("tests/ATTACKS.md")).unwrap();
    let files = [sources(&root.join("tests")), sources(&root.join("src"))].concat();
    let code: String = files.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    let rows = page.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| idea"));
    let mut count = 0;
    for row in rows {
        let tests = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        // Names are in backticks; a file in parentheses says where a unit test is.
        let names: Vec<&str> =
            tests.split('`').skip(1).step_by(2).filter(|name| !name.contains('/')).collect();
        assert!(!names.is_empty(), "no test shows what meets this: {row}");
        for name in names {
            let name = name.rsplit("::").next().unwrap();
            assert!(code.contains(&format!("fn {name}(")), "there is no test `{name}`");
        }
        count += 1;
    }
    assert!(count > 35, "{count} rows");
}
