use std::fs;
use std::path::{Path, PathBuf};

use peft::Error;
use peft::adapter::{Init, LoraConfig, Targets};
use peft::data::{Format, Source, TrainOn};
use peft::model::RouterLosses;
use peft::model::config::{Overflow, RouterNoise, RoutingKind};
use peft::ops::distillation::Terms;
use peft::recipe::other_tools::{Meaning, foreign_keys};
use peft::recipe::{
    AdapterPlan, AdapterRecipe, Bytes, ContinuedAdapter, DataPlan, DistillPlan, Document, DtypeChoice,
    Evaluation, ExpertChoice, Final, FreshAdapter, Length, MemoryBudget, Method, MixturePlan, ModelPlan,
    Plan, Recipe, RecomputeChoice, RouterTraining, Task, TrainPlan, Trained, UpcyclePlan, UpcycleRecipe,
    Warmup, Work, commented,
};
use peft::train::Schedule;
use proptest::prelude::*;
use proptest::{collection, option};

/// The recipes of the repository. A new one has to be counted here.
const SHIPPED: usize = 6;

const SHORTEST: &str = r#"
task = "finetune"
model.source = "model"
adapter = {}
data.train = [{ path = "data.jsonl" }]
"#;

fn plan(text: &str) -> Result<Plan, Error> {
    Ok(Plan::of(&Recipe::read(&Document::parse("test.toml", text)?)?, "test"))
}

/// The new adapter that a plan trains.
fn fresh(plan: Plan) -> FreshAdapter {
    let Trained::Adapter(adapter) = plan.trained else { panic!("the recipe has an adapter") };
    let AdapterPlan::Fresh(adapter) = *adapter else { panic!("the adapter is a new one") };
    adapter
}

/// What the user reads when `text` is refused.
fn refusal(text: &str) -> String {
    let error = plan(text).unwrap_err();
    assert_eq!(error.exit_code(), 2, "a wrong recipe is a wrong request: {error}");
    match error.hint() {
        Some(hint) => format!("{error}\nhint: {hint}"),
        None => error.to_string(),
    }
}

/// The shortest recipe with one more line.
fn refusal_of(line: &str) -> String {
    refusal(&format!("{SHORTEST}{line}"))
}

#[test]
fn what_is_left_out_is_filled_in() {
    let plan = plan(SHORTEST).unwrap();
    insta::assert_snapshot!(plan.to_toml().unwrap(), @r#"
    task = "finetune"
    seed = 42
    output = "runs/test"

    [model]
    source = "model"
    dtype = "auto"

    [adapter]
    method = "lora"
    rank = 16
    alpha = 16.0
    dropout = 0.0
    targets = ["gate_proj", "up_proj", "down_proj"]
    init = "peft"
    rslora = false
    seed = 42
    dropout_seed = 43

    [data]
    max_length = 512
    pack = true
    train_on = "completion"

    [[data.train]]
    path = "data.jsonl"
    weight = 1.0
    format = "auto"

    [train]
    full = false
    epochs = 3.0
    batch_size = 4
    accumulate = 1
    learning_rate = 0.0002
    schedule = "cosine"
    warmup = 0.05
    weight_decay = 0.0
    max_grad_norm = 1.0
    eval_every = 50
    save_every = 50
    keep = 3
    final = "best"
    recompute = "auto"
    "#);
}

/// Paths alone are files without a weight and a format of their own; what is written stays in the resolved recipe.
#[test]
fn data_may_be_paths() {
    let tables = plan(&SHORTEST.replace("data.jsonl", "parts/*.jsonl")).unwrap();
    for data in ["\"parts/*.jsonl\"", "[\"parts/*.jsonl\"]"] {
        let paths = plan(&SHORTEST.replace("[{ path = \"data.jsonl\" }]", data)).unwrap();
        assert_eq!(paths, tables);
        assert!(paths.to_toml().unwrap().contains("path = \"parts/*.jsonl\""));
    }
    let mixed = "[\"a\", { path = \"b\", weight = 2 }]\ndata.eval = \"c\"";
    let plan = plan(&SHORTEST.replace("[{ path = \"data.jsonl\" }]", mixed)).unwrap();
    let weights: Vec<_> =
        plan.data.train.iter().map(|source| (source.path.to_str(), source.weight)).collect();
    assert_eq!(weights, [(Some("a"), 1.0), (Some("b"), 2.0)]);
    assert!(matches!(&plan.data.eval, Evaluation::Files(files) if files[0].path == Path::new("c")));
}

#[test]
fn seeds_and_alpha_follow_what_is_written() {
    let text = format!("seed = 7\n{SHORTEST}").replace("adapter = {}", "adapter.rank = 8");
    let adapter = fresh(plan(&text).unwrap());
    assert_eq!((adapter.config.seed, adapter.config.dropout_seed), (7, 8));
    assert_eq!(adapter.config.alpha, Some(8.0));
    let adapter = fresh(plan(&text.replace("rank = 8", "seed = 20")).unwrap());
    assert_eq!((adapter.config.seed, adapter.config.dropout_seed), (20, 21));
}

#[test]
fn unknown_keys_are_refused_with_the_nearest() {
    insta::assert_snapshot!(refusal_of("train.learnign_rate = 1e-4"), @"
    test.toml:6: unknown key `train.learnign_rate`
    hint: did you mean `learning_rate`?
    ");
    insta::assert_snapshot!(refusal_of("[trian]\nsteps = 5"), @"
    test.toml:6: unknown key `trian`
    hint: did you mean `train`?
    ");
    insta::assert_snapshot!(refusal_of("[zebra]"), @"
    test.toml:6: unknown key `zebra`
    hint: expected one of `task`, `seed`, `output`, `model`, `adapter`, `data`, `train`, `routing`, `losses`, `distill`
    ");
    let two = "{ path = \"a\" },\n    { paht = \"b\" }";
    insta::assert_snapshot!(refusal(&SHORTEST.replace("{ path = \"data.jsonl\" }", two)), @"
    test.toml:6: unknown key `data.train.paht`
    hint: did you mean `path`?
    ");
}

#[test]
fn keys_of_other_tools_lead_to_those_that_mean_them() {
    insta::assert_snapshot!(refusal(&SHORTEST.replace("adapter = {}", "adapter.lora_r = 8")), @"
    test.toml:4: unknown key `adapter.lora_r`
    hint: `lora_r` of other tools is `adapter.rank` here
    ");
    insta::assert_snapshot!(refusal_of("train.warmup_steps = 100"), @"
    test.toml:6: unknown key `train.warmup_steps`
    hint: `warmup_steps` of other tools is `train.warmup` here, a share of the steps such as 0.05 or their number
    ");
    insta::assert_snapshot!(refusal_of("per-device-train-batch-size = 2"), @"
    test.toml:6: unknown key `per-device-train-batch-size`
    hint: `per-device-train-batch-size` of other tools is `train.batch_size` here
    ");
    insta::assert_snapshot!(refusal_of("train.seed = 3"), @"
    test.toml:6: unknown key `train.seed`
    hint: `seed` stands above the first table of a recipe
    ");
    insta::assert_snapshot!(refusal_of("weight_decay = 0.1"), @"
    test.toml:6: unknown key `weight_decay`
    hint: `weight_decay` belongs to `[train]`: `train.weight_decay`
    ");
    insta::assert_snapshot!(refusal_of("train.resume_from_checkpoint = true"), @"
    test.toml:6: unknown key `train.resume_from_checkpoint`
    hint: leave `resume_from_checkpoint` out: the flag `--resume` of `peft finetune` goes on from the newest checkpoint
    ");
    insta::assert_snapshot!(refusal_of("deepspeed = \"zero3.json\""), @"
    test.toml:6: unknown key `deepspeed`
    hint: leave `deepspeed` out, which is not built: a run uses one process on one machine
    ");
    insta::assert_snapshot!(upcycle_refusal("calibration.max_length = 512"), @"
    test.toml:5: unknown key `calibration.max_length`
    hint: expected one of `data`, `eval`, `tokens`, `held_out`
    ");
}

/// The whole table: each name stands in it once, the keys of ours that it names exist, and a recipe with the name is told
/// them.
#[test]
fn every_key_of_another_tool_has_its_hint() {
    let mut names = std::collections::BTreeSet::new();
    for key in foreign_keys() {
        let sentence = match key.meaning {
            Meaning::Key(ours, _) => {
                let mut document = Document::parse("test.toml", SHORTEST).unwrap();
                document.set(ours, toml::de::DeValue::Boolean(true), "here").unwrap();
                let said = Recipe::read(&document).map_or_else(|error| error.to_string(), |_| String::new());
                assert!(!said.contains("unknown key"), "{said}");
                ours
            }
            Meaning::Said(_, sentence) | Meaning::NotBuilt(_, sentence) => sentence,
        };
        for name in key.names {
            assert!(names.insert(name), "`{name}` stands in the table twice");
            // No key of `[losses]` has the name of one of another tool.
            let said = refusal_of(&format!("losses.{} = true", name.replace('*', "anything")));
            let hint = said.split_once("\nhint: ").unwrap_or_else(|| panic!("{said}")).1;
            let stands_above = hint.ends_with("stands above the first table of a recipe");
            assert!(hint.contains(sentence) || stands_above, "{name}: {hint}");
        }
    }
    assert!(names.len() >= 80, "{}", names.len());
}

#[test]
fn wrong_types_say_what_was_expected_and_found() {
    insta::assert_snapshot!(refusal_of("train.steps = \"many\""), @r#"test.toml:6: `train.steps`: expected a whole number, found the string "many""#);
    insta::assert_snapshot!(refusal_of("train.steps = 1.5"), @"test.toml:6: `train.steps`: expected a whole number, found `1.5`");
    insta::assert_snapshot!(refusal_of("train.steps = -1"), @"test.toml:6: `train.steps`: expected a whole number of at least 0, found `-1`");
    insta::assert_snapshot!(refusal_of("train = 5"), @"test.toml:6: `train`: expected a table, found `5`");
    insta::assert_snapshot!(refusal_of("output = 5"), @"test.toml:6: `output`: expected a path in a string, found `5`");
    insta::assert_snapshot!(refusal_of("data.pack = \"yes\""), @r#"test.toml:6: `data.pack`: expected `true` or `false`, found the string "yes""#);
    insta::assert_snapshot!(refusal_of("data.eval = { path = \"x\" }"), @"test.toml:6: `data.eval`: expected a list of files, or a path in a string, found a table");
    insta::assert_snapshot!(refusal_of("data.eval = [5]"), @r#"test.toml:6: `data.eval`: expected a path in a string, or a table such as { path = "data.jsonl" }, found `5`"#);
    insta::assert_snapshot!(refusal_of("train.learning_rate = 2024-01-01"), @"test.toml:6: `train.learning_rate`: expected a number, found the date 2024-01-01");
}

#[test]
fn names_are_listed_when_one_is_wrong() {
    insta::assert_snapshot!(refusal_of("train.schedule = \"cosin\""), @"
    test.toml:6: `train.schedule`: expected one of `constant`, `linear`, `cosine`, found `cosin`
    hint: did you mean `cosine`?
    ");
    insta::assert_snapshot!(refusal_of("train.schedule = 3"), @"test.toml:6: `train.schedule`: expected one of `constant`, `linear`, `cosine`, found `3`");
    insta::assert_snapshot!(refusal_of("model.dtype = \"float32\""), @"test.toml:6: `model.dtype`: expected one of `auto`, `f32`, `bf16`, found `float32`");
    insta::assert_snapshot!(refusal(&SHORTEST.replace("finetune", "finetun")), @"
    test.toml:2: `task`: expected one of `finetune`, `upcycle`, found `finetun`
    hint: did you mean `finetune`?
    ");
    insta::assert_snapshot!(refusal(&SHORTEST.replace("adapter = {}", "adapter.targets = 5")), @"test.toml:4: `adapter.targets`: expected a list of names, or a regular expression in a string");
    insta::assert_snapshot!(refusal(&SHORTEST.replace("adapter = {}", "adapter.targets = []")), @r#"
    test.toml:4: `adapter.targets` is empty, so nothing would be trained
    hint: "all-linear" takes every linear layer
    "#);
}

/// Every numeric key ends somewhere; the largest value is taken.
#[test]
fn numbers_have_largest_values() {
    let finetune = [
        ("adapter.rank", "65536", "65537"),
        ("adapter.alpha", "1e6", "1.1e6"),
        ("data.max_length", "134217728", "134217729"),
        ("train.steps", "1099511627776", "1099511627777"),
        ("train.epochs", "10000", "10001"),
        ("train.batch_size", "65536", "65537"),
        ("train.accumulate", "65536", "1000000000"),
        ("train.learning_rate", "10", "1e10"),
        ("train.weight_decay", "100", "101"),
        ("train.max_grad_norm", "1e9", "2e9"),
        ("train.eval_every", "1099511627776", "9223372036854775807"),
        ("train.save_every", "1099511627776", "1099511627777"),
        ("train.keep", "1000000", "1000001"),
        ("train.memory_budget", "\"1024TiB\"", "\"1025TiB\""),
        ("routing.active", "65536", "65537"),
        ("routing.capacity_factor", "65536", "1e9"),
        ("routing.capacity_warmup", "1099511627776", "1099511627777"),
        ("losses.switch", "1e6", "1e7"),
        ("losses.importance", "1e6", "1e7"),
        ("losses.load", "1e6", "1e7"),
        ("losses.load_std", "1e6", "1e7"),
        ("losses.z", "1e6", "1e7"),
        ("losses.bias_update", "1e6", "1e7"),
        ("distill.kl", "1e6", "1e7"),
        ("distill.temperature", "1000", "1001"),
        ("distill.hidden", "1e6", "1e7"),
    ];
    for (key, most, more) in finetune {
        let read = |value: &str| {
            let adapter = if key.starts_with("adapter.") { "" } else { "adapter = {}" };
            let needed = match key {
                "routing.capacity_warmup" => "routing.capacity_factor = 2",
                _ if key.starts_with("distill.") => "distill.teacher = \"t\"",
                _ => "",
            };
            let text = SHORTEST.replace("adapter = {}", adapter);
            plan(&format!("{text}{key} = {value}\n{needed}"))
        };
        read(most).unwrap_or_else(|error| panic!("{key}: {error}"));
        let error = read(more).unwrap_err().to_string();
        assert!(error.contains(&format!("`{key}`: expected a")), "{error}");
    }
    for key in ["experts", "shared", "active", "groups"] {
        let error = upcycle_refusal(&format!("upcycle.{key} = 1000000000"));
        let expected =
            format!("`upcycle.{key}`: expected a whole number of at most 65536, found `1000000000`");
        assert!(error.ends_with(&expected), "{error}");
    }
    for key in ["tokens", "held_out"] {
        let error = upcycle_refusal(&format!("calibration.{key} = 1000000000000"));
        assert!(
            error.contains(&format!("`calibration.{key}`: expected a whole number of at most 134217728")),
            "{error}"
        );
    }
    let weight = SHORTEST.replace("path =", "weight = 1e18, path =");
    insta::assert_snapshot!(refusal(&weight), @"test.toml:5: `data.train.weight`: expected a number of at most 1000, found `1e18`");
}

#[test]
fn numbers_have_ranges() {
    insta::assert_snapshot!(refusal_of("train.learning_rate = 0"), @"test.toml:6: `train.learning_rate`: expected a number above 0, found `0`");
    insta::assert_snapshot!(refusal_of("train.learning_rate = nan"), @"test.toml:6: `train.learning_rate`: expected a number above 0, found `NaN`");
    insta::assert_snapshot!(refusal_of("train.learning_rate = inf"), @"test.toml:6: `train.learning_rate`: expected a number above 0, found `inf`");
    insta::assert_snapshot!(refusal_of("train.warmup = 1.5"), @"test.toml:6: `train.warmup`: expected a share of the steps from 0 to 1, or a whole number of steps from 2 on, found `1.5`");
    insta::assert_snapshot!(refusal_of("train.batch_size = 0"), @"test.toml:6: `train.batch_size`: expected a whole number of at least 1, found `0`");
    insta::assert_snapshot!(refusal_of("train.max_grad_norm = -1"), @"test.toml:6: `train.max_grad_norm`: expected a number of at least 0, found `-1`");
    insta::assert_snapshot!(refusal_of("train.memory_budget = \"4 gigs\""), @"test.toml:6: `train.memory_budget`: expected an amount of memory such as `4GiB` or `512MiB`, found `4 gigs`");
    insta::assert_snapshot!(refusal_of("data.eval_share = 1"), @"test.toml:6: `data.eval_share`: expected a number above 0 and below 1, found `1`");
    insta::assert_snapshot!(refusal_of("data.max_length = 1"), @"test.toml:6: `data.max_length`: expected a whole number of at least 2, found `1`");
    insta::assert_snapshot!(refusal(&SHORTEST.replace("adapter = {}", "adapter.dropout = 1.0")), @"test.toml:4: `adapter.dropout`: expected a number of at least 0 and below 1, found `1.0`");
    insta::assert_snapshot!(refusal(&SHORTEST.replace("adapter = {}", "adapter.alpha = 0")), @"test.toml:4: `adapter.alpha`: expected a number above 0, found `0`");
    insta::assert_snapshot!(refusal(&SHORTEST.replace("path =", "weight = 0.0, path =")), @"test.toml:5: `data.train.weight`: expected a number above 0, found `0.0`");
}

#[test]
fn what_a_run_needs_cannot_be_left_out() {
    insta::assert_snapshot!(refusal(""), @r#"
    test.toml: the key `task` is missing
    hint: begin the recipe with `task = "finetune"`
    "#);
    insta::assert_snapshot!(refusal(&SHORTEST.replace("model.source", "model = {} #")), @"test.toml:3: the key `model.source` is missing");
    insta::assert_snapshot!(refusal("task = \"finetune\"\nadapter = {}\n[data]\n[model]\nsource = \"x\""), @"test.toml:3: the key `data.train` is missing");
    insta::assert_snapshot!(refusal(&SHORTEST.replace("[{ path = \"data.jsonl\" }]", "[]")), @"test.toml:5: `data.train` is empty: expected at least one file");
}

#[test]
fn keys_that_contradict_each_other_are_refused() {
    insta::assert_snapshot!(refusal_of("train.steps = 5\ntrain.epochs = 1"), @"
    test.toml:7: `train.steps` and `train.epochs` both say how long to train
    hint: leave one of them out
    ");
    insta::assert_snapshot!(refusal_of("distill = { teacher = \"dense\", kl = 0 }"), @"
    test.toml:6: `distill.teacher` has nothing to say: `distill.kl` and `distill.hidden` are 0
    hint: leave the teacher out, or set `distill.kl = 1.0`
    ");
    insta::assert_snapshot!(refusal_of("train.full = true"), @"
    test.toml:6: `train.full = true` trains all weights, so there can be no `[adapter]`
    hint: leave one of them out
    ");
    insta::assert_snapshot!(refusal(&SHORTEST.replace("adapter = {}", "")), @"
    test.toml: nothing would be trained: there is no `[adapter]`
    hint: add an `[adapter]` table, or set `train.full = true` to train all weights
    ");
}

#[test]
fn routing_that_needs_another_key_is_refused_and_what_is_off_is_not() {
    insta::assert_snapshot!(refusal_of("routing.noise = \"learned\""), @r#"
    test.toml:6: learned noise is trained with the routers, and `train.router` is "frozen"
    hint: set `train.router` to "full" or "lora", or `routing.noise` to "gaussian"
    "#);
    insta::assert_snapshot!(refusal_of("routing.capacity_warmup = 10"), @"
    test.toml:6: `routing.capacity_warmup` leads to a capacity that is not given
    hint: set `routing.capacity_factor` too
    ");
    insta::assert_snapshot!(refusal_of("routing.nosie = \"none\""), @"
    test.toml:6: unknown key `routing.nosie`
    hint: did you mean `noise`?
    ");
    let off = r#"
        train.router = "frozen"
        routing = { noise = "none", overflow = "drop", kind = "model" }
        losses = { switch = 0, importance = 0.0, load = 0.0, load_std = 0.0, z = 0.0, bias_update = 0.0, pooled = false }
        distill = { kl = 1.0, temperature = 1.0, hidden = 0.0 }
    "#;
    assert_eq!(plan(&format!("{SHORTEST}{off}")).unwrap(), plan(SHORTEST).unwrap());
}

#[test]
fn everything_that_is_wrong_is_said_at_once_in_the_order_of_the_file() {
    let wrong = "
task = \"finetune\"
model = { sorce = \"model\" }
adapter = { rank = \"many\", dropout = 2 }
data.train = [{ path = 5 }, { paht = \"x\" }]
train.steps = 0
zebra = 1
";
    insta::assert_snapshot!(refusal(wrong), @r#"
    test.toml:3: unknown key `model.sorce`
    hint: did you mean `source`?
    test.toml:4: `adapter.rank`: expected a whole number, found the string "many"
    test.toml:4: `adapter.dropout`: expected a number of at least 0 and below 1, found `2`
    test.toml:5: `data.train.path`: expected a path in a string, found `5`
    test.toml:5: unknown key `data.train.paht`
    hint: did you mean `path`?
    test.toml:6: `train.steps`: expected a whole number of at least 1, found `0`
    test.toml:7: unknown key `zebra`
    hint: expected one of `task`, `seed`, `output`, `model`, `adapter`, `data`, `train`, `routing`, `losses`, `distill`
    "#);
    let contradicting = format!("{SHORTEST}data.eval = []\ntrain = {{ steps = 1, epochs = 1, full = true }}");
    insta::assert_snapshot!(refusal(&contradicting), @"
    test.toml:6: `data.eval` is empty: expected at least one file
    test.toml:7: `train.steps` and `train.epochs` both say how long to train
    hint: leave one of them out
    test.toml:7: `train.full = true` trains all weights, so there can be no `[adapter]`
    hint: leave one of them out
    ");
}

/// Each key of the reference is a sentence, and its example is a value that the key takes.
#[test]
fn keys_are_described_and_their_examples_are_read() {
    for task in [Task::Finetune, Task::Upcycle] {
        let shortest = match task {
            Task::Finetune => SHORTEST.to_string(),
            Task::Upcycle => {
                "task = \"upcycle\"\nmodel.source = \"m\"\ncalibration.data = [{ path = \"c\" }]".to_string()
            }
        };
        let keys: Vec<_> = task.keys().collect();
        assert!(keys.len() >= 20, "{}", keys.len());
        for (path, key) in keys {
            assert!(key.meaning().ends_with('.'), "{path}: {}", key.meaning());
            assert!(!key.values().is_empty() && !key.default().is_empty(), "{path}");
            if path.starts_with("data.train.") {
                continue;
            }
            let example = key.example();
            let value = toml::de::DeValue::parse(&example)
                .unwrap_or_else(|error| panic!("{path} = {example}: {error}"))
                .into_inner();
            let mut document = Document::parse("test.toml", &shortest).unwrap();
            document.set(&path, value, "here").unwrap();
            let error = match task {
                Task::Finetune => Recipe::read(&document).err(),
                Task::Upcycle => UpcycleRecipe::read(&document).err(),
            };
            // A key alone may contradict another; its own value has to be right.
            let said = error.map_or_else(String::new, |error| error.to_string());
            assert!(!said.contains("expected") && !said.contains("unknown key"), "{path}: {said}");
        }
    }
}

#[test]
fn the_recipe_with_every_key_is_a_recipe_and_so_is_each_of_its_comments() {
    let text = commented(Task::Finetune);
    assert_eq!(plan(&text).unwrap(), {
        let shortest = "task = \"finetune\"\nmodel.source = \"HuggingFaceTB/SmolLM2-135M\"\nadapter = {}\n";
        plan(&format!("{shortest}data.train = [{{ path = \"train.jsonl\" }}]")).unwrap()
    });
    let (upcycle, read) = (commented(Task::Upcycle), |text: &str| {
        UpcycleRecipe::read(&Document::parse("test.toml", text).unwrap())
    });
    read(&upcycle).unwrap();
    // Without the marks of comments every key is one that recipes have.
    let is_key = |line: &&str| line.starts_with("# ") && line.contains(" = ") && !line.contains(". ");
    let bare = |text: &str| {
        let lines = text.lines().map(|line| if is_key(&line) { &line[2..] } else { line });
        lines.collect::<Vec<_>>().join("\n")
    };
    let said = plan(&bare(&text)).unwrap_err().to_string();
    assert!(!said.contains("unknown key") && said.contains("both say how long to train"), "{said}");
    assert!(text.lines().chain(upcycle.lines()).all(|line| line.chars().count() <= 100), "{text}");
}

#[test]
fn the_schema_has_every_key_with_its_bounds() {
    let schema = peft::recipe::schema();
    let of_task = &schema["oneOf"][0]["properties"];
    assert_eq!(of_task["task"]["enum"], serde_json::json!(["finetune"]));
    for (path, _) in Task::Finetune.keys().filter(|(path, _)| !path.starts_with("data.train.")) {
        let mut node = of_task;
        for part in path.split('.') {
            node = if node.get(part).is_some() { &node[part] } else { &node["properties"][part] };
        }
        assert!(node["description"].is_string(), "{path}: {node}");
    }
    let rank = &of_task["adapter"]["properties"]["rank"];
    assert_eq!((&rank["type"], &rank["maximum"]), (&"integer".into(), &65_536.into()));
    assert_eq!(
        of_task["train"]["properties"]["schedule"]["enum"],
        serde_json::json!(["constant", "linear", "cosine"])
    );
    assert_eq!(of_task["data"]["required"], serde_json::json!(["train"]));
    assert_eq!(
        of_task["data"]["properties"]["train"]["items"]["anyOf"][1]["required"],
        serde_json::json!(["path"])
    );
}

#[test]
fn keys_of_earlier_versions_are_read() {
    let earlier = plan(&format!("{SHORTEST}train.checkpoint = \"block\"")).unwrap();
    assert_eq!(earlier, plan(&format!("{SHORTEST}train.recompute = \"block\"")).unwrap());
    assert_eq!(earlier.train.recompute, RecomputeChoice::Block);
    insta::assert_snapshot!(refusal_of("train = { checkpoint = \"block\", recompute = \"none\" }"), @"
    test.toml:6: `train.checkpoint` is the earlier name of `train.recompute`, which is given too
    hint: leave one of them out
    ");
    insta::assert_snapshot!(refusal_of("train.checkpoint = \"blok\""), @"
    test.toml:6: `train.recompute`: expected one of `auto`, `none`, `block`, found `blok`
    hint: did you mean `block`?
    ");
}

#[test]
fn keys_that_do_nothing_without_another_are_refused() {
    insta::assert_snapshot!(refusal_of("distill.hidden = 0.1"), @"
    test.toml:6: `distill.hidden` is for a teacher, and there is none
    hint: name the teacher in `distill.teacher`, or leave the key out
    ");
    insta::assert_snapshot!(refusal_of("routing.overflow = \"reroute\""), @"
    test.toml:6: `routing.overflow` is for experts that are full, and no capacity is given
    hint: set `routing.capacity_factor` too
    ");
    insta::assert_snapshot!(refusal_of("losses.pooled = true"), @"
    test.toml:6: `losses.pooled` says how losses on routers are computed, and there is none
    hint: set `losses.switch` too, or leave it out
    ");
}

#[test]
fn a_warmup_is_a_share_or_a_number_of_steps() {
    let warmup = |text: &str| plan(&format!("{SHORTEST}train.warmup = {text}")).unwrap().train.warmup;
    for (text, expected) in [
        ("0.1", Warmup::Share(0.1)),
        ("0", Warmup::Share(0.0)),
        ("1", Warmup::Share(1.0)),
        ("1.0", Warmup::Share(1.0)),
        ("2", Warmup::Steps(2)),
        ("500", Warmup::Steps(500)),
    ] {
        assert_eq!(warmup(text), expected, "{text}");
    }
    assert_eq!((Warmup::Share(0.05).updates(30), Warmup::Steps(500).updates(30)), (2, 500));
    insta::assert_snapshot!(refusal_of("train.warmup = -2"), @"test.toml:6: `train.warmup`: expected a share of the steps from 0 to 1, or a whole number of steps from 2 on, found `-2`");
}

#[test]
fn what_is_evaluated_on_is_files_a_share_or_nothing() {
    let eval = |line: &str| plan(&format!("{SHORTEST}{line}")).unwrap().data.eval;
    assert_eq!(eval(""), Evaluation::ShareOfMany);
    assert_eq!(eval("data.eval = false"), Evaluation::Off);
    assert_eq!(eval("data.eval_share = 0.1"), Evaluation::Share(0.1));
    insta::assert_snapshot!(refusal_of("data.eval = true"), @"test.toml:6: `data.eval`: expected `false` or a list of files, found `true`");
    insta::assert_snapshot!(refusal_of("data.eval = false\ndata.eval_share = 0.1"), @"
    test.toml:7: `data.eval` and `data.eval_share` both say what to evaluate on
    hint: leave one of them out
    ");
}

/// Whatever a message calls by the name of a recipe's key is one.
#[test]
fn messages_name_keys_that_recipes_have() {
    let mut files = Vec::new();
    files_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    let mut keys = std::collections::BTreeSet::new();
    for file in files {
        let text = fs::read_to_string(file).unwrap();
        let text = text.split("\n#[cfg(test)]\n").next().unwrap();
        for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
            for quoted in line.split('`').skip(1).step_by(2) {
                let key = quoted.split([' ', '=', '{']).next().unwrap_or_default();
                let names_tensor = ["model.safetensors", "model.layers", "model.norm", "model.embed_tokens"];
                let is_key = |c: char| c.is_ascii_lowercase() || c == '_' || c == '.';
                if ["model.", "adapter.", "data.", "train."].iter().any(|table| key.starts_with(table))
                    && key.chars().all(is_key)
                    && !names_tensor.iter().any(|name| key.starts_with(name))
                {
                    keys.insert(key.to_string());
                }
            }
        }
    }
    assert!(keys.len() >= 12, "{keys:?}");
    for key in keys {
        let mut document = Document::parse("test.toml", SHORTEST).unwrap();
        document.set(&key, toml::de::DeValue::Boolean(true), "here").unwrap();
        let said = Recipe::read(&document).map_or_else(|error| error.to_string(), |_| String::new());
        assert!(!said.contains("unknown key"), "{said}");
    }
}

#[test]
fn broken_toml_is_told_with_its_place() {
    insta::assert_snapshot!(refusal("task = \"finetune\"\nmodel = = 3"), @"test.toml:2: not valid TOML at column 9: extra `=`, expected nothing");
    insta::assert_snapshot!(refusal("seed = 1\nseed = 2"), @"test.toml:2: not valid TOML at column 1: duplicate key");
    insta::assert_snapshot!(refusal("seed = 99999999999999999999"), @"test.toml:1: `99999999999999999999` is too large: whole numbers end at 9223372036854775807");
}

#[test]
fn every_shipped_recipe_is_planned() {
    let mut recipes = Vec::new();
    files_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes"), &mut recipes);
    assert_eq!(recipes.len(), SHIPPED);
    for path in recipes {
        let text = fs::read_to_string(&path).unwrap();
        let document = Document::parse(&path, &text).unwrap();
        let name = path.file_stem().unwrap().to_str().unwrap();
        let (output, folder, task) = match Work::of(&document, name).unwrap() {
            Work::Finetune(plan) => (plan.output, "runs", "finetune"),
            Work::Upcycle(plan) => (plan.output, "models", "upcycle"),
        };
        assert_eq!(output, Path::new(folder).join(name), "{name} writes where its name says");
        let command = format!("\n#   cargo run --release -- {task} recipes/{name}.toml\n");
        assert!(text.contains(&command), "{name} does not say its command");
    }
}

/// The shortest recipe that makes a mixture.
const UPCYCLE: &str = r#"
task = "upcycle"
model.source = "model"
calibration.data = [{ path = "data.jsonl" }]
"#;

fn upcycle_plan(text: &str) -> Result<UpcyclePlan, Error> {
    Ok(UpcyclePlan::of(&UpcycleRecipe::read(&Document::parse("test.toml", text)?)?, "test"))
}

fn upcycle_refusal(line: &str) -> String {
    let error = upcycle_plan(&format!("{UPCYCLE}{line}")).unwrap_err();
    assert_eq!(error.exit_code(), 2, "a wrong recipe is a wrong request: {error}");
    match error.hint() {
        Some(hint) => format!("{error}\nhint: {hint}"),
        None => error.to_string(),
    }
}

#[test]
fn what_an_upcycling_recipe_leaves_out_is_filled_in() {
    let plan = upcycle_plan(UPCYCLE).unwrap();
    let text = plan.to_toml().unwrap();
    assert_eq!(upcycle_plan(&text).unwrap(), plan);
    insta::assert_snapshot!(text, @r#"
    task = "upcycle"
    seed = 42
    output = "models/test"

    [model]
    source = "model"
    dtype = "auto"

    [upcycle]
    method = "split"
    experts = 16
    shared = 4
    active = 4
    partition = "alternating"
    router = "ridge"
    refit = "local"
    sources = []
    prompts = []
    format = "auto"
    verify = true
    baselines = true

    [upcycle.keep_dense]
    first = 0
    last = 0
    every = 1

    [calibration]
    tokens = 65536
    held_out = 8192

    [[calibration.data]]
    path = "data.jsonl"
    weight = 1.0
    format = "auto"
    "#);
}

#[test]
fn what_is_shared_and_active_follows_the_number_of_slices() {
    let of = |keys: &str| {
        let settings = upcycle_plan(&format!("{UPCYCLE}upcycle = {{ {keys} }}")).unwrap().settings;
        (settings.experts, settings.shared, settings.active)
    };
    assert_eq!(of("experts = 8"), (8, 2, 2));
    assert_eq!(of("experts = 4"), (4, 1, 1));
    assert_eq!(of("experts = 6"), (6, 2, 2));
    assert_eq!(of("experts = 2"), (2, 0, 1));
    assert_eq!(of("experts = 8, method = \"prune\""), (8, 2, 2));
    assert_eq!(of("experts = 32, shared = 2"), (32, 2, 8));
    assert_eq!(of("experts = 32, active = 2"), (32, 8, 2));
    assert_eq!(of("active = 12"), (16, 3, 12), "one slice is left that a token is not sent to");
    assert_eq!(of("method = \"copy\""), (8, 0, 2));
    assert_eq!(of("method = \"mix\", sources = [\"a\", \"b\"]"), (3, 0, 2));
    assert_eq!(of("method = \"expand\""), (1, 0, 1));
}

#[test]
fn contradictions_of_an_upcycling_recipe_are_refused() {
    insta::assert_snapshot!(upcycle_refusal("upcycle.expert = 8"), @"
    test.toml:5: unknown key `upcycle.expert`
    hint: did you mean `experts`?
    ");
    insta::assert_snapshot!(upcycle_refusal("upcycle = { experts = 8, shared = 8 }"), @"
    test.toml:5: `upcycle.shared` is 8, and there are 8 slices in all
    hint: leave slices for the router to choose from
    ");
    insta::assert_snapshot!(upcycle_refusal("upcycle = { experts = 8, shared = 4, active = 5 }"), @"
    test.toml:5: `upcycle.active` is 5, and a token can be routed to 4
    hint: lower it, or raise `upcycle.experts`
    ");
    insta::assert_snapshot!(upcycle_refusal("upcycle = { method = \"copy\", partition = \"kmeans\" }"), @r#"
    test.toml:5: `upcycle.partition` does nothing with `upcycle.method = "copy"`
    hint: leave it out
    "#);
    for key in ["partition = \"kmeans\"", "router = \"logistic\"", "baselines = false"] {
        let said = upcycle_refusal(&format!("upcycle = {{ method = \"prune\", {key} }}"));
        let name = key.split(' ').next().unwrap_or_default();
        assert!(
            said.contains(&format!("`upcycle.{name}` does nothing with `upcycle.method = \"prune\"`")),
            "{said}"
        );
    }
    let blank = "upcycle = { method = \"copy\", router = \"prompts\", prompts = [[\"a duck\"], []] }";
    insta::assert_snapshot!(upcycle_refusal(blank), @"
    test.toml:5: `upcycle.prompts[1]` is an empty list
    hint: give each expert prompts of the kind of text that it is for
    ");
    let blank =
        "upcycle = { method = \"copy\", router = \"prompts\", prompts = [[\"a duck\", \" \"], [\"b\"]] }";
    insta::assert_snapshot!(upcycle_refusal(blank), @"
    test.toml:5: `upcycle.prompts[0][1]` is an empty prompt
    hint: give each expert prompts of the kind of text that it is for
    ");
    let same = "upcycle = { method = \"copy\", router = \"prompts\", prompts = [[\"a\", \"b\"], [\"c\"], [\"b \", \"a\"]] }";
    insta::assert_snapshot!(upcycle_refusal(same), @"
    test.toml:5: `upcycle.prompts[0]` and `upcycle.prompts[2]` are the same: the router could not tell their experts apart
    hint: give each expert prompts of the kind of text that it is for
    ");
    insta::assert_snapshot!(upcycle_refusal("upcycle.keep_dense = { every = 0 }"), @"
    test.toml:5: `upcycle.keep_dense.every` is 0
    hint: 1 converts every layer, 2 each second one
    ");
    insta::assert_snapshot!(upcycle_refusal("calibration.eval = [{ path = \"data.jsonl\" }]"), @"
    test.toml:5: `calibration.eval` has `data.jsonl`, which `calibration.data` has too
    hint: what is learned from cannot be measured on; `held_out` keeps a part of each file out
    ");
    let copies = "upcycle.method = \"copy\"\ncalibration.eval = [{ path = \"other.jsonl\" }]";
    insta::assert_snapshot!(upcycle_refusal(copies), @"
    test.toml:6: `calibration.eval` is for slices, found `copy`
    hint: copies begin as the dense model; leave it out
    ");
    insta::assert_snapshot!(upcycle_refusal("upcycle = { shared = 4, active = 12 }"), @"
    test.toml:5: `upcycle.shared` of 4 and `upcycle.active` of 12 are all 16 slices: every token would go through all of them, as in the dense model
    hint: lower one of them; half of `upcycle.experts` together is usual
    ");
    let pruned = "upcycle = { method = \"prune\", experts = 8, shared = 4, active = 4 }";
    insta::assert_snapshot!(upcycle_refusal(pruned), @"
    test.toml:5: `upcycle.shared` of 4 and `upcycle.active` of 4 are all 8 slices: no neuron would be pruned
    hint: lower one of them; half of `upcycle.experts` together is usual
    ");
    insta::assert_snapshot!(upcycle_refusal("upcycle = { method = \"copy\", experts = 1 }"), @"
    test.toml:5: `upcycle.experts` of 1 leaves one expert to route to
    hint: a router needs two or more to choose from
    ");
    insta::assert_snapshot!(upcycle_refusal("upcycle = { method = \"prune\", format = \"qwen2_moe\" }"), @r#"
    test.toml:5: `upcycle.format` does nothing with `upcycle.method = "prune"`
    hint: leave it out
    "#);
    let twice = "upcycle = { method = \"mix\", sources = [\"a\", \"b\", \"a\"] }";
    insta::assert_snapshot!(upcycle_refusal(twice), @"
    test.toml:5: `upcycle.sources` has `a` twice, or it is `model.source`
    hint: two experts would be the same; name each checkpoint once
    ");
    insta::assert_snapshot!(upcycle_refusal("upcycle = { method = \"mix\", experts = 8, sources = [\"a\"] }"), @"
    test.toml:5: `upcycle.experts` is 8, and `mix` makes an expert of each of 2 checkpoints
    hint: leave it out; `model.source` is the first checkpoint
    ");
    let groups = "upcycle = { method = \"virtual-groups\", experts = 2, active = 3 }";
    insta::assert_snapshot!(upcycle_refusal(groups), @"
    test.toml:5: `upcycle.active` is 3, and a token can be routed to 2
    hint: lower it, or raise `upcycle.experts`
    ");
    insta::assert_snapshot!(upcycle_refusal("upcycle.router = \"prompts\""), @r#"
    test.toml:5: `upcycle.router = "prompts"` needs prompts
    hint: give a list of prompts for each expert
    "#);
    insta::assert_snapshot!(upcycle_refusal("upcycle.method = \"mix\""), @r#"
    test.toml:5: `upcycle.method = "mix"` needs further checkpoints
    hint: name them in `upcycle.sources`
    "#);
    insta::assert_snapshot!(upcycle_refusal("upcycle.format = \"glm\""), @"
    test.toml:5: `upcycle.format`: expected one of `auto`, `glm4_moe`, `granitemoeshared`, `qwen2_moe`, `mixtral`, `qwen3_moe`, found `glm`
    hint: did you mean `glm4_moe`?
    ");
    insta::assert_snapshot!(upcycle_refusal("train.steps = 5"), @"
    test.toml:5: unknown key `train`
    hint: expected one of `task`, `seed`, `output`, `model`, `upcycle`, `calibration`
    ");
}

fn files_below(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files_below(&path, files) } else { files.push(path) }
    }
    files.sort();
}

fn number(range: std::ops::Range<f64>) -> impl Strategy<Value = f64> {
    // Short decimals as people write them, and doubles that need all their digits.
    prop_oneof![
        (1u32..100).prop_map({
            let range = range.clone();
            move |n| (f64::from(n) / 100.0).clamp(range.start, range.end)
        }),
        range
    ]
}

fn sources() -> impl Strategy<Value = Vec<Source>> {
    let format = prop_oneof![
        Just(Format::Auto),
        Just(Format::Messages),
        Just(Format::Alpaca),
        Just(Format::PromptCompletion),
        Just(Format::Text)
    ];
    let source = (".{1,20}", number(0.01..1e3), format).prop_map(|(path, weight, format)| Source {
        path: path.into(),
        weight,
        format,
    });
    collection::vec(source, 1..4)
}

fn targets() -> impl Strategy<Value = Targets> {
    prop_oneof![
        Just(Targets::AllLinear),
        collection::vec(".{1,10}", 1..4).prop_map(Targets::names),
        "[a-z.*()|]{1,20}".prop_map(Targets::Pattern),
    ]
}

fn init() -> impl Strategy<Value = Init> {
    prop_oneof![
        Just(Init::Peft),
        Just(Init::KaimingUniform),
        Just(Init::KaimingNormal),
        Just(Init::XavierUniform),
        Just(Init::XavierNormal),
        Just(Init::Gaussian),
        Just(Init::Nju)
    ]
}

fn trained() -> impl Strategy<Value = Trained> {
    let seeds = (0..i64::MAX as u64, 0..i64::MAX as u64);
    let scale = (0usize..5000, number(0.001..1e4), any::<bool>());
    let adapter = (scale, number(0.0..0.999), targets(), init(), seeds, option::of(".{1,20}")).prop_map(
        |((rank, alpha, rslora), dropout, targets, init, (seed, dropout_seed), from)| {
            let config = LoraConfig {
                rank,
                alpha: Some(alpha),
                dropout,
                targets,
                init,
                rslora,
                seed,
                dropout_seed,
                ..LoraConfig::default()
            };
            Trained::Adapter(Box::new(match from.map(PathBuf::from) {
                None => AdapterPlan::Fresh(FreshAdapter {
                    config,
                    experts: ExpertChoice::All(true),
                    shared_experts: true,
                }),
                Some(from) => AdapterPlan::Continue(ContinuedAdapter {
                    from: from.clone(),
                    dropout,
                    dropout_seed,
                    expected: AdapterRecipe {
                        method: Some(Method::Lora),
                        rank: Some(rank),
                        alpha: Some(alpha),
                        dropout: Some(dropout),
                        init: Some(init),
                        seed: Some(seed),
                        dropout_seed: Some(dropout_seed),
                        from: Some(from),
                        rslora: rslora.then_some(true),
                        ..AdapterRecipe::default()
                    },
                }),
            }))
        },
    );
    prop_oneof![4 => adapter, 1 => Just(Trained::Full)]
}

fn data() -> impl Strategy<Value = DataPlan> {
    let eval = prop_oneof![
        sources().prop_map(Evaluation::Files),
        number(0.001..0.999).prop_map(Evaluation::Share),
        Just(Evaluation::ShareOfMany),
        Just(Evaluation::Off),
    ];
    let train_on = prop_oneof![Just(TrainOn::Completion), Just(TrainOn::All)];
    (sources(), eval, 2usize..100_000, any::<bool>(), train_on).prop_map(
        |(train, eval, max_length, pack, train_on)| DataPlan {
            train,
            eval,
            max_length,
            pack,
            train_on,
            template: Default::default(),
            special_tokens: Default::default(),
        },
    )
}

fn train() -> impl Strategy<Value = TrainPlan> {
    let length =
        prop_oneof![(1u64..1 << 40).prop_map(Length::Steps), number(0.01..100.0).prop_map(Length::Epochs)];
    let schedule = prop_oneof![Just(Schedule::Constant), Just(Schedule::Linear), Just(Schedule::Cosine)];
    let recompute =
        prop_oneof![Just(RecomputeChoice::Auto), Just(RecomputeChoice::None), Just(RecomputeChoice::Block)];
    let budget = prop_oneof![
        Just(MemoryBudget::Free),
        (1u64..1 << 50).prop_map(|bytes| MemoryBudget::Limit(Bytes(bytes))),
        (1u64..64).prop_map(|gib| MemoryBudget::Limit(Bytes(gib << 30))),
    ];
    let sizes = (1usize..1000, 1usize..1000, 0u64..1000, 0u64..1000, 1usize..100);
    let warmup = prop_oneof![number(0.0..1.0).prop_map(Warmup::Share), (2u64..9999).prop_map(Warmup::Steps)];
    let rates = (number(1e-9..10.0), warmup, number(0.0..10.0), number(0.0..100.0));
    let r#final = prop_oneof![Just(Final::Best), Just(Final::Last)];
    (length, sizes, rates, schedule, recompute, budget, r#final).prop_map(
        |(length, sizes, rates, schedule, recompute, memory_budget, r#final)| {
            let (batch_size, accumulate, eval_every, save_every, keep) = sizes;
            let (learning_rate, warmup, weight_decay, max_grad_norm) = rates;
            TrainPlan {
                length,
                batch_size,
                accumulate,
                learning_rate,
                schedule,
                warmup,
                weight_decay,
                max_grad_norm,
                eval_every,
                save_every,
                keep,
                r#final,
                recompute,
                memory_budget,
            }
        },
    )
}

fn mixture() -> impl Strategy<Value = MixturePlan> {
    let router =
        prop_oneof![Just(RouterTraining::Frozen), Just(RouterTraining::Lora), Just(RouterTraining::Full)];
    let kind = prop_oneof![Just(RoutingKind::Model), Just(RoutingKind::Random), Just(RoutingKind::Hash)];
    let overflow = prop_oneof![Just(Overflow::Drop), Just(Overflow::Reroute)];
    let coefficient = || prop_oneof![Just(0.0), number(1e-6..10.0)];
    let losses = (
        coefficient(),
        coefficient(),
        coefficient(),
        coefficient(),
        coefficient(),
        coefficient(),
        any::<bool>(),
    );
    let noise = prop_oneof![Just(RouterNoise::None), Just(RouterNoise::Gaussian)];
    let capacity = option::of((number(0.1..9.0), 0u64..9));
    let routing = (option::of(1usize..9), noise, capacity, overflow, kind);
    (router, routing, losses).prop_map(|(router, routing, losses)| {
        let (active, noise, capacity, overflow, kind) = routing;
        let (capacity_factor, capacity_warmup) =
            capacity.map_or((None, 0), |(factor, steps)| (Some(factor), steps));
        let (switch, importance, load, load_std, z, bias_update, pooled) = losses;
        let losses = RouterLosses { switch, importance, load, load_std, z, pooled: false };
        // Neither means anything alone.
        let losses = RouterLosses { pooled: pooled && losses.are_on(), ..losses };
        let overflow = if capacity_factor.is_some() { overflow } else { Overflow::default() };
        MixturePlan {
            router,
            active,
            noise,
            capacity_factor,
            capacity_warmup,
            overflow,
            kind,
            losses,
            bias_update,
        }
    })
}

fn distill() -> impl Strategy<Value = DistillPlan> {
    // A teacher has something to say.
    let terms = (number(1e-6..10.0), number(0.1..10.0), prop_oneof![Just(0.0), number(1e-6..10.0)]);
    (".{1,30}", terms).prop_map(|(teacher, (kl, temperature, hidden))| DistillPlan {
        teacher,
        terms: Terms { kl, temperature, hidden },
    })
}

proptest! {
    /// The recipe in a run directory does what the run did.
    #[test]
    fn a_plan_written_down_is_the_same_plan(
        seed in 0..i64::MAX as u64,
        output in ".{1,30}",
        source in ".{1,30}",
        dtype in prop_oneof![Just(DtypeChoice::Auto), Just(DtypeChoice::F32), Just(DtypeChoice::Bf16)],
        trained in trained(),
        data in data(),
        train in train(),
        mixture in mixture(),
        distill in option::of(distill()),
    ) {
        let model = ModelPlan { source, dtype, id: None };
        let plan = Plan { seed, output: output.into(), model, trained, data, train, mixture, distill };
        let text = plan.to_toml().unwrap();
        let recipe = Recipe::read(&Document::parse("again.toml", &text).unwrap());
        prop_assert!(recipe.is_ok(), "{}\n{}", recipe.unwrap_err(), text);
        prop_assert_eq!(Plan::of(&recipe.unwrap(), "again"), plan);
    }

    /// Whatever is written, the answer is a recipe or an error, and never a panic.
    #[test]
    fn no_text_makes_the_reader_panic(text in "(task = \"finetune\"\n)?[a-z.=\"\\[\\]{}0-9\n -]{0,200}") {
        let _ = plan(&text);
    }
}

/// The table of keys in README says what the program says.
#[test]
fn the_readme_has_the_defaults_of_its_keys() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let keys: std::collections::BTreeMap<String, &peft::recipe::Key> = Task::Finetune.keys().collect();
    let mut found = 0;
    for line in readme.lines() {
        let cells: Vec<&str> = line.split(" | ").collect();
        let [names, default, _] = cells[..] else { continue };
        let names = names.trim_start_matches("| ").split(", ").map(|name| name.trim_matches('`'));
        for key in names.filter_map(|name| keys.get(name)) {
            found += 1;
            assert_eq!(key.default(), default, "{line}");
        }
    }
    assert!(found >= 20, "{found}");
}
