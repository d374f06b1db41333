//! `PEFT_KERNELS` chooses instructions, and every set of them computes the same models to rounding.

use std::process::Command;

use peft::ops::Kernels;

use crate::place::{Place, told};

/// All names, the newest first.
const NAMES: [&str; 5] = ["amx", "avx512-bf16", "avx512", "avx2", "portable"];

/// Those that this machine has.
fn here() -> Vec<&'static str> {
    NAMES.into_iter().filter(|name| Kernels::named(name, name).is_some()).collect()
}

#[test]
fn a_name_that_is_unknown_is_refused() {
    let place = Place::new();
    for command in [["check", "recipe.toml"], ["finetune", "recipe.toml"], ["inspect", "model"]] {
        let stderr = told(&place, &place.command(&command).env("PEFT_KERNELS", "avx1024").output().unwrap());
        assert!(stderr.starts_with("exit 2\n"), "{stderr}");
        assert!(stderr.contains("`PEFT_KERNELS` is `avx1024`; expected one of "), "{stderr}");
        assert!(stderr.contains(&format!("this machine has {}", here().join(", "))), "{stderr}");
    }
    for name in NAMES.into_iter().filter(|name| !here().contains(name)) {
        let stderr = told(
            &place,
            &place.command(&["check", "recipe.toml"]).env("PEFT_KERNELS", name).output().unwrap(),
        );
        assert!(stderr.contains("this machine has no such instructions"), "{stderr}");
    }
    assert!(!place.path("run").exists());
}

#[test]
fn threads_that_cannot_be_meant_are_refused() {
    let place = Place::new();
    for threads in ["1000000", "-1", "two", "1025"] {
        let stderr = told(
            &place,
            &place.command(&["inspect", "model"]).env("RAYON_NUM_THREADS", threads).output().unwrap(),
        );
        assert!(
            stderr.starts_with(&format!(
                "exit 2\nerror: `RAYON_NUM_THREADS` is `{threads}`; expected a whole number"
            )),
            "{stderr}"
        );
    }
}

#[test]
fn a_run_says_what_it_is_computed_with() {
    let place = Place::new();
    for name in here() {
        let checked = place.command(&["check", "recipe.toml"]).env("PEFT_KERNELS", name).output().unwrap();
        let checked = String::from_utf8(checked.stdout).unwrap();
        assert!(checked.contains(&format!("kernels: {name} on ")), "{checked}");
        assert!(checked.contains("as `PEFT_KERNELS` says"), "{checked}");
    }
    let stop_at = |steps: &str, name: &str, resume: &[&str]| {
        let set = format!("train.steps={steps}");
        let arguments = [&["finetune", "recipe.toml", "--set", &set], resume].concat();
        let run = place.command(&arguments).env("PEFT_KERNELS", name).output().unwrap();
        (run.status.code(), String::from_utf8(run.stderr).unwrap())
    };
    let (first, last) = (here()[0], here()[here().len() - 1]);
    let (code, stderr) = stop_at("6", first, &[]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains(&format!("kernels: {first} on ")), "{stderr}");
    std::fs::remove_dir_all(place.path("run/checkpoint-6")).unwrap();
    let (code, stderr) = stop_at("6", last, &["--resume"]);
    assert_eq!(code, Some(0), "{stderr}");
    let other = format!("computed with {first} so far");
    assert_eq!(stderr.contains(&other), first != last, "{stderr}");
}

/// Logits, losses and gradients of transformers and PEFT hold on every path: this program's tests of them, run again.
#[test]
fn every_path_agrees_with_transformers() {
    let current = Kernels::current();
    for name in here() {
        if current.f32() == name && current.bf16() == name {
            continue;
        }
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.args(["parity::", "gradients::", "losses::", "generate::", "moe::", "quantized::"]);
        // A process of its own: instructions are chosen once.
        let output = again.env("PEFT_KERNELS", name).output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{name}:\n{stdout}");
        assert!(stdout.lines().filter(|line| line.ends_with("... ok")).count() > 20, "{name}:\n{stdout}");
    }
}
