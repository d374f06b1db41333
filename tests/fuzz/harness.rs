//! A reader that does what none may do, so that the harness is seen to notice.

use std::fs;
use std::path::Path;

use peft::Error;

use super::chance::Chance;
use super::process::{faults, is_child, run};
use super::{Class, Files};

const NAME: &str = "faults_of_every_kind_are_seen";

/// What the reader does, and what the harness says of it.
const DEEDS: [(&str, &str); 9] = [
    ("nothing", ""),
    ("a panic", "panicked: on purpose"),
    ("an abort", "ended the process"),
    ("a stack", "overflowed its stack"),
    ("a large allocation", "memory allocation of 2147483648 bytes failed"),
    ("a long time", "took more than 5 s"),
    ("a file behind", "failed and left `half` behind"),
    ("an empty message", "has an empty message"),
    ("a message without end", "has a message without end"),
];

struct Misdeeds;

impl Class for Misdeeds {
    fn seeds(&self) -> Vec<Files> {
        vec![Files::from([("deed".to_string(), DEEDS[0].0.into())])]
    }

    fn attacks(&self, _seeds: &[Files]) -> Vec<Files> {
        DEEDS.map(|(deed, _)| Files::from([("deed".to_string(), deed.into())])).into()
    }

    fn mutate(&self, _files: &mut Files, _chance: &mut Chance) {}

    fn read(&self, folder: &Path) -> peft::Result<()> {
        match fs::read_to_string(folder.join("deed"))?.as_str() {
            "a panic" => panic!("on purpose"),
            "an abort" => std::process::abort(),
            "a stack" => assert!(deep(0) > 0),
            "a large allocation" => {
                assert!(std::hint::black_box(Vec::<u8>::with_capacity(1 << 31)).is_empty());
            }
            "a long time" => loop {
                std::hint::spin_loop();
            },
            "a file behind" => {
                fs::write(folder.join("half"), "half")?;
                return Err(Error::invalid("`half` is half"));
            }
            "an empty message" => return Err(Error::invalid("")),
            // Messages of this crate's own are bounded.
            "a message without end" => return Err(std::io::Error::other("a".repeat(5000)).into()),
            _ => {}
        }
        Ok(())
    }
}

/// Calls itself until there is no stack.
fn deep(level: u64) -> u64 {
    let here = std::hint::black_box([level; 64]);
    if level == u64::MAX { 0 } else { deep(level + 1) + here[7] }
}

pub(super) fn faults_of_every_kind_are_seen() {
    if is_child() {
        return run(NAME, &Misdeeds);
    }
    let (found, accepted) = faults(NAME, DEEDS.len() as u64);
    let seen: Vec<(u64, &str)> = found.iter().map(|fault| (fault.case, fault.what.as_str())).collect();
    assert_eq!(seen.len(), DEEDS.len() - 1, "{seen:?}");
    for (case, what) in seen {
        assert!(what.contains(DEEDS[case as usize].1), "{what}");
    }
    assert_eq!(accepted, Some(0), "the process that came to the end read three errors");
    let kept = fs::read_to_string(found[0].kept.join("deed")).unwrap();
    assert_eq!(kept, DEEDS[1].0);
    for fault in found {
        fs::remove_dir_all(fault.kept).unwrap();
    }
}
