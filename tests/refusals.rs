use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Output;

use candle_core::{Device, Tensor};

use crate::place::{Place, Tree, assert_same, told, tree};

/// What `peft` says to a bad request. Fails when the request is not refused, or anything changes in the folder.
fn refused(place: &Place, arguments: &[&str]) -> String {
    let before = tree(&place.path(""));
    let said = told_of(place, &place.command(arguments).output().unwrap());
    assert_same(&tree(&place.path("")), &before);
    said
}

fn told_of(place: &Place, output: &Output) -> String {
    assert!(matches!(output.status.code(), Some(1 | 2)), "not refused: {}", output.status);
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    told(place, output).replace(fixtures.to_str().unwrap(), "[fixtures]")
}

/// [`refused`], of the place's recipe with one value changed.
fn refused_with(place: &Place, set: &str) -> String {
    refused(place, &["finetune", "recipe.toml", "--log", "silent", "--set", set])
}

/// Of training data that is `text`.
fn refused_data(text: &str) -> String {
    let place = Place::new();
    fs::write(place.path("data.jsonl"), text).unwrap();
    refused(&place, &["finetune", "recipe.toml", "--log", "silent"])
}

/// Of the place's recipe with some text in it changed.
fn refused_recipe(from: &str, to: &str) -> String {
    let place = Place::new();
    let recipe = fs::read_to_string(place.path("recipe.toml")).unwrap();
    assert!(recipe.contains(from));
    fs::write(place.path("recipe.toml"), recipe.replace(from, to)).unwrap();
    refused(&place, &["finetune", "recipe.toml"])
}

/// Of a model whose `config.json` says something else.
fn refused_config(from: &str, to: &str) -> String {
    let place = Place::new();
    let config = fs::read_to_string(place.path("model/config.json")).unwrap();
    assert!(config.contains(from));
    fs::write(place.path("model/config.json"), config.replace(from, to)).unwrap();
    refused(&place, &["finetune", "recipe.toml", "--log", "silent"])
}

fn fixture(name: &str) -> String {
    format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Of an adapter, wherever one can be named; all commands say the same of its files.
fn refused_adapter(adapter: &str) -> String {
    let place = Place::new();
    let merge = ["merge", "--model", "model", "--adapter", adapter, "--output", "merged"];
    let generate = ["generate", "--model", "model", "--adapter", adapter, "--prompt", "x"];
    let eval = ["eval", "perplexity", "--model", "model", "--adapter", adapter, "--data", "data.jsonl"];
    let set = format!("adapter.from={adapter}");
    let said = refused(&place, &merge);
    assert_eq!(refused(&place, &generate), said);
    assert_eq!(refused(&place, &eval), said);
    assert_eq!(refused_with(&place, &set), said);
    said
}

// Recipes. What is wrong within one, key by key: `recipes.rs`. Arguments: `cli.rs`.

#[test]
fn no_recipe() {
    insta::assert_snapshot!(refused(&Place::new(), &["finetune", "other.toml"]), @"");
}

#[test]
fn unknown_key() {
    insta::assert_snapshot!(refused_recipe("learning_rate", "learnign_rate"), @"");
}

#[test]
fn wrong_type() {
    insta::assert_snapshot!(refused_recipe("batch_size = 1", "batch_size = \"one\""), @"");
}

#[test]
fn broken_toml() {
    insta::assert_snapshot!(refused_recipe("rank = 4,", "rank = ,"), @"");
}

#[test]
fn a_recipe_that_is_not_text() {
    let place = Place::new();
    fs::write(place.path("recipe.toml"), b"task = \"\xff\"").unwrap();
    insta::assert_snapshot!(refused(&place, &["finetune", "recipe.toml"]), @"");
}

#[test]
fn nonsense_laid_over() {
    let place = Place::new();
    insta::assert_snapshot!(refused_with(&place, "nonsense"), @"");
    insta::assert_snapshot!(refused_with(&place, "=3"), @"");
    insta::assert_snapshot!(refused_with(&place, "a.b.c=3"), @"");
    insta::assert_snapshot!(refused_with(&place, "train=1"), @"");
    insta::assert_snapshot!(refused_with(&place, "train.steps=[[["), @"");
    insta::assert_snapshot!(refused_recipe("steps = 6", "epochs = 1e300"), @"");
}

// Models.

#[test]
fn no_model() {
    insta::assert_snapshot!(refused_with(&Place::new(), "model.source=nothing"), @"");
}

#[test]
fn a_model_without_its_configuration() {
    let place = Place::new();
    fs::remove_file(place.path("model/config.json")).unwrap();
    insta::assert_snapshot!(refused(&place, &["finetune", "recipe.toml"]), @"");
}

#[test]
fn truncated_weights() {
    let place = Place::new();
    let path = place.path("model/model.safetensors");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..100_000]).unwrap();
    insta::assert_snapshot!(refused(&place, &["finetune", "recipe.toml"]), @"");
    fs::write(&path, &whole[..1000]).unwrap();
    insta::assert_snapshot!(refused(&place, &["finetune", "recipe.toml"]), @"");
}

#[test]
fn weights_of_another_shape() {
    insta::assert_snapshot!(refused_config("\"vocab_size\": 1024", "\"vocab_size\": 1000"), @"");
}

#[test]
fn unknown_family() {
    insta::assert_snapshot!(refused_config("\"model_type\": \"llama\"", "\"model_type\": \"llame\""), @"");
}

#[test]
fn weights_that_are_no_numbers() {
    let place = Place::new();
    let path = place.path("model/model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    let broken = (tensors[name].clone() * f64::NAN).unwrap();
    tensors.insert(name.to_string(), broken);
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let said = refused(&place, &["finetune", "recipe.toml", "--log", "silent"]);
    insta::assert_snapshot!(said, @"");
    assert_eq!(refused(&place, &["generate", "--model", "model", "--prompt", "x"]), said);
}

// Adapters.

#[test]
fn targets_that_match_nothing() {
    insta::assert_snapshot!(refused_with(&Place::new(), "adapter.targets=[\"c_attn\"]"), @"");
}

#[test]
fn ranks_that_cannot_be() {
    let place = Place::new();
    insta::assert_snapshot!(refused_with(&place, "adapter.rank=0"), @"");
    insta::assert_snapshot!(refused_with(&place, "adapter.rank=129"), @"");
}

#[test]
fn kinds_of_adapters_that_are_not_built() {
    insta::assert_snapshot!(refused_adapter(&fixture("adapters/dora")), @"");
    insta::assert_snapshot!(refused_adapter(&fixture("adapters/modules_to_save")), @"");
    insta::assert_snapshot!(refused_adapter(&fixture("adapters/pissa")), @"");
    insta::assert_snapshot!(refused_adapter(&fixture("adapters/pickle")), @"");
}

#[test]
fn an_adapter_of_rank_0() {
    let place = Place::new();
    let folder = place.path("adapter");
    fs::create_dir(&folder).unwrap();
    let config = fs::read_to_string(fixture("llama/adapter/adapter_config.json")).unwrap();
    assert!(config.contains("\"r\": 4"));
    fs::write(folder.join("adapter_config.json"), config.replace("\"r\": 4", "\"r\": 0")).unwrap();
    let tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    safetensors::serialize_to_file(&tensors, None, &folder.join("adapter_model.safetensors")).unwrap();
    insta::assert_snapshot!(refused_with(&place, "adapter.from=adapter"), @"");
}

#[test]
fn an_adapter_for_another_base() {
    let place = Place::new();
    let adapter = fixture("llama/adapter");
    let merge = ["merge", "--model", "model", "--adapter", &adapter, "--output", "merged"];
    insta::assert_snapshot!(refused(&place, &merge), @"");
    let more = refused_with(&place, &format!("adapter.from={adapter}"));
    assert!(more.contains("[fixtures]/llama/adapter: the adapter does not fit the model: "), "{more}");
}

#[test]
fn no_adapter() {
    let place = Place::new();
    insta::assert_snapshot!(refused_with(&place, "adapter.from=nowhere"), @"");
}

// Data. Every way in which a record can be wrong: `data/source.rs`.

#[test]
fn no_data() {
    let place = Place::new();
    insta::assert_snapshot!(refused_with(&place, "data.train=[{ path = \"none.jsonl\" }]"), @"");
    insta::assert_snapshot!(refused_with(&place, "data.train=[{ path = \"model\" }]"), @"");
    insta::assert_snapshot!(refused_data(""), @"");
}

#[test]
fn a_broken_line() {
    let lines = "{\"prompt\": \"a\", \"completion\": \"b\"}\n\n{\"prompt\": \"a\", \"completion\": }\n";
    insta::assert_snapshot!(refused_data(lines), @"");
}

#[test]
fn wrong_roles() {
    let message = |role: &str| format!("{{\"role\": \"{role}\", \"content\": \"c\"}}");
    let line = |roles: &[&str]| {
        let messages: Vec<String> = roles.iter().map(|role| message(role)).collect();
        format!("{{\"messages\": [{}]}}\n", messages.join(", "))
    };
    let right = line(&["user", "assistant"]);
    insta::assert_snapshot!(refused_data(&(right.clone() + &line(&["user", "bot"]))), @"");
    insta::assert_snapshot!(refused_data(&(right + &line(&["user", "system", "user"]))), @"");
}

#[test]
fn documents_of_which_nothing_is_left() {
    let place = Place::new();
    insta::assert_snapshot!(refused_with(&place, "data.max_length=2"), @"");
    insta::assert_snapshot!(refused_with(&place, "data.max_length=513"), @"");
}

// Outputs.

#[test]
fn outputs_that_cannot_be() {
    let place = Place::new();
    let to =
        |output: &str| refused(&place, &["finetune", "recipe.toml", "--log", "silent", "--output", output]);
    insta::assert_snapshot!(to("data.jsonl"), @"");
    insta::assert_snapshot!(to("data.jsonl/run"), @"");
    insta::assert_snapshot!(to("model"), @"");
    insta::assert_snapshot!(to(""), @"");
    let (model, adapter) = (fixture("llama"), fixture("llama/adapter"));
    let merge = |output: &str| {
        refused(&place, &["merge", "--model", &model, "--adapter", &adapter, "--output", output])
    };
    insta::assert_snapshot!(merge("data.jsonl"), @"");
    insta::assert_snapshot!(merge("data.jsonl/merged"), @"");
    insta::assert_snapshot!(merge("model"), @"");
}

/// Root may write everywhere, so this test has something to see for others only.
#[cfg(unix)]
#[test]
fn a_folder_that_may_not_be_written() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    let closed = place.path("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, PermissionsExt::from_mode(0o555)).unwrap();
    if fs::create_dir(closed.join("try")).is_ok() {
        return;
    }
    let arguments = ["finetune", "recipe.toml", "--log", "silent", "--output", "closed/run"];
    insta::assert_snapshot!(refused(&place, &arguments), @"
    exit 1
    error: closed/run: Permission denied (os error 13)
    hint: choose a folder that can be written with `--output`, or change its permissions
    ");
}

/// A limit on the size of files stands in for a full disk.
#[cfg(target_os = "linux")]
mod full_disk {
    use std::os::unix::process::CommandExt;

    use super::*;

    /// What a command says when no file can grow beyond `bytes`.
    fn limited(place: &Place, bytes: u64, arguments: &[&str]) -> String {
        let mut command = place.command(arguments);
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
        let set = move || {
            // SAFETY: both calls are safe between fork and exec; they change settings of the new process only.
            let done = unsafe {
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit)
            };
            if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        };
        // SAFETY: the closure allocates nothing and takes no locks.
        unsafe { command.pre_exec(set) };
        told_of(place, &command.output().unwrap())
    }

    #[test]
    fn a_run_that_cannot_begin_leaves_nothing() {
        let place = Place::new();
        let before = tree(&place.path(""));
        let run = ["finetune", "recipe.toml", "--log", "silent", "--output", "new/run"];
        insta::assert_snapshot!(limited(&place, 100, &run), @"");
        assert_same(&tree(&place.path("")), &before);
    }

    /// The first checkpoint does not fit; the second attempt, with room, ends as a run that always had it.
    #[test]
    fn a_checkpoint_is_there_whole_or_not() {
        let place = Place::new();
        let run = ["finetune", "recipe.toml", "--log", "silent"];
        // An adapter fits, and the optimizer's state, of twice the size, does not.
        insta::with_settings!({ filters => vec![(r"\.checkpoint-2\.\w{6}\.", ".checkpoint-2.[RANDOM].")] }, {
            insta::assert_snapshot!(limited(&place, 200_000, &run), @"");
        });
        let left: Vec<String> = place.names_in("run");
        assert_eq!(left, ["metrics.jsonl", "recipe.toml"]);
        place.run(&[&run[..], &["--resume"]].concat());
        place.run(&[&run[..], &["--output", "whole"]].concat());
        let weights = |run: &str| fs::read(place.path(run).join("adapter_model.safetensors")).unwrap();
        assert!(weights("run") == weights("whole"));
    }

    #[test]
    fn a_merge_leaves_nothing() {
        let place = Place::new();
        let before = tree(&place.path(""));
        let (model, adapter) = (fixture("llama"), fixture("llama/adapter"));
        let merge = ["merge", "--model", &model, "--adapter", &adapter, "--output", "new/merged"];
        insta::with_settings!({ filters => vec![(r"\.merged\.\w{6}\.", ".merged.[RANDOM].")] }, {
            insta::assert_snapshot!(limited(&place, 10_000, &merge), @"");
        });
        let empty = Tree::from([("new".to_string(), None)]);
        let after: Tree =
            tree(&place.path("")).into_iter().filter(|(name, _)| !before.contains_key(name)).collect();
        assert!(after.is_empty() || after == empty, "{:?}", after.keys());
    }
}

// What looks odd and is right.

#[test]
fn recipes_from_windows() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let recipe = fs::read_to_string(place.path("recipe.toml")).unwrap();
    fs::write(place.path("windows.toml"), format!("\u{feff}{}", recipe.replace('\n', "\r\n"))).unwrap();
    place.run(&["finetune", "windows.toml", "--output", "windows", "--log", "silent"]);
    let weights = |run: &str| fs::read(place.path(run).join("adapter_model.safetensors")).unwrap();
    assert!(weights("run") == weights("windows"));
}

#[test]
fn paths_with_spaces() {
    let place = Place::new();
    fs::create_dir(place.path("a b")).unwrap();
    for name in ["model", "data.jsonl", "recipe.toml"] {
        fs::rename(place.path(name), place.path("a b").join(name)).unwrap();
    }
    let sets = ["--set", "model.source=a b/model", "--set", "data.train=[{ path = \"a b/data.jsonl\" }]"];
    let run = ["finetune", "a b/recipe.toml", "--output", "a b/run ö", "--log", "silent"];
    place.run(&[&run[..], &sets[..]].concat());
    let merge = ["merge", "--model", "a b/model", "--adapter", "a b/run ö", "--output", "a b/merged"];
    place.run(&merge);
    assert!(place.path("a b/merged/model.safetensors").exists());
}

#[test]
fn one_document_is_trained_on_and_not_held_out() {
    let place = Place::new();
    let data = fs::read_to_string(place.path("data.jsonl")).unwrap();
    fs::write(place.path("data.jsonl"), data.lines().next().unwrap()).unwrap();
    let (_, said) = place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    insta::assert_snapshot!(said, @"");
    assert!(place.path("run/adapter_model.safetensors").exists());
    assert!(!place.path("run/best").exists(), "nothing was evaluated");
}

#[test]
fn two_tokens_are_a_document() {
    let place = Place::new();
    fs::write(place.path("data.jsonl"), "{\"text\": \"one two three\"}\n{\"text\": \"four five six\"}\n")
        .unwrap();
    let (_, said) = place.run(&["finetune", "recipe.toml", "--log", "silent", "--set", "data.max_length=2"]);
    insta::assert_snapshot!(said, @"");
    assert!(place.path("run/adapter_model.safetensors").exists());
}
