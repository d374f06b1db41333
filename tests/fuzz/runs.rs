//! Data, recipes and run directories.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;

use peft::error::Context;
use peft::recipe::{Document, Plan, Recipe, Work};
use peft::run::{check, check_upcycle, finetune};
use peft::train::{Event, Reporter};
use serde_json::json;

use super::chance::{Chance, mutate_bytes, mutate_text};
use super::containers::mutate_safetensors;
use super::json::mutate_file;
use super::process::place;
use super::toy::{fixture_files, home};
use super::{Class, Files};

/// A file of training data, under `data`, whatever its format.
pub(super) struct Data;

impl Class for Data {
    fn seeds(&self) -> Vec<Files> {
        let lines = [
            r#"{"messages":[{"role":"system","content":"be kind"},{"role":"user","content":"where?"},{"role":"assistant","content":"here"}]}"#,
            r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"","tool_calls":[{"type":"function","function":{"name":"f","arguments":{"x":1}}}]},{"role":"tool","content":"2"},{"role":"assistant","content":"two"}],"tools":[{"type":"function","function":{"name":"f"}}]}"#,
            r#"{"conversations":[{"from":"human","value":"who?"},{"from":"gpt","value":"me"}],"system":"be short"}"#,
            r#"{"instruction":"add","input":"1 and 2","output":"3"}"#,
            r#"{"prompt":"one","completion":" two"}"#,
            r#"{"prompt":[{"role":"user","content":"one"}],"completion":[{"role":"assistant","content":"two"}]}"#,
            r#"{"text":"the end is near. é"}"#,
        ];
        let seed = |text: String| Files::from([("data".to_string(), text.into_bytes())]);
        let mut seeds: Vec<Files> = lines.map(|line| seed(format!("{line}\n").repeat(3))).into();
        seeds.push(seed(format!("[{},\n{}]", lines[0], lines[1])));
        seeds
    }

    fn attacks(&self, _seeds: &[Files]) -> Vec<Files> {
        let deep = format!("{{\"text\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let texts = [
            deep.as_bytes(),
            b"{\"text\":\"\xff\"}",
            br#"{"text":"\ud800"}"#,
            br#"{"text":"a\u0000b"}"#,
            br#"{"text":1e999}"#,
            b"",
            b"[",
            b"\n\n\n",
            b"PAR1",
            b"a,b\n1,2\n",
            b"\xef\xbb\xbf{\"text\":\"a\"}",
            br#"{"text":"a"}{"text":"b"}"#,
        ];
        texts.map(|text| Files::from([("data".to_string(), text.to_vec())])).into()
    }

    fn mutate(&self, files: &mut Files, chance: &mut Chance) {
        let text = files.get_mut("data").unwrap();
        if chance.one_in(4) {
            return mutate_text(text, chance);
        }
        // One record of several, or a list of all.
        let mut lines: Vec<Vec<u8>> = text.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
        let at = chance.below(lines.len());
        let mut record = Files::from([("record".to_string(), std::mem::take(&mut lines[at]))]);
        mutate_file(&mut record, "record", chance);
        lines[at] = record.remove("record").unwrap();
        *text = lines.join(&b'\n');
    }

    fn read(&self, folder: &Path) -> peft::Result<()> {
        home();
        let recipe = format!(
            "task = \"finetune\"\nmodel.source = \"model\"\nadapter.rank = 2\n\
             data = {{ train = [{{ path = {} }}], eval_share = 0.3, max_length = 64 }}",
            json!(folder.join("data"))
        );
        let document = Document::parse("data.toml", &recipe)?;
        let report = check(&Plan::of(&Recipe::read(&document)?, "data"))?;
        assert!(report.train[0].rows > 0, "checked, and nothing to train on");
        Ok(())
    }
}

/// A recipe of either task.
pub(super) struct Recipes;

const RECIPES: [&str; 3] = [
    r#"
task = "finetune"
seed = 7
output = "run"

[model]
source = "model"
dtype = "f32"

[adapter]
rank = 4
alpha = 8.0
dropout = 0.1
targets = ["q_proj", "down_proj"]
init = "kaiming-uniform"
rslora = true
seed = 3
dropout_seed = 4

[data]
train = [{ path = "data.jsonl", weight = 2.0, format = "auto" }]
eval = [{ path = "data.jsonl" }]
max_length = 64
pack = true
train_on = "all"

[train]
steps = 3
batch_size = 2
accumulate = 2
learning_rate = 1e-3
schedule = "cosine"
warmup = 0.1
weight_decay = 0.01
max_grad_norm = 1.0
eval_every = 1
save_every = 1
keep = 2
checkpoint = "auto"
memory_budget = "1GiB"
"#,
    r#"
task = "finetune"
model = { source = "model" }
data = { train = [{ path = "data.jsonl" }], eval_share = 0.5, max_length = 64 }
train = { full = true, epochs = 1.5 }
distill = { teacher = "model", kl = 1.0, temperature = 2.0 }
"#,
    r#"
task = "upcycle"
seed = 1
output = "mixture"
model = { source = "model" }
upcycle = { method = "split", experts = 7, shared = 1, active = 2, partition = "random", refit = "none" }
calibration = { data = [{ path = "data.jsonl" }], tokens = 64, held_out = 32 }
"#,
];

impl Class for Recipes {
    fn seeds(&self) -> Vec<Files> {
        RECIPES.map(|text| Files::from([("recipe.toml".to_string(), text.into())])).into()
    }

    fn attacks(&self, _seeds: &[Files]) -> Vec<Files> {
        let replaced = |(from, to): (&str, &str)| {
            assert!(RECIPES[0].contains(from));
            Files::from([("recipe.toml".to_string(), RECIPES[0].replace(from, to).into())])
        };
        [
            // No epoch would ever show a document.
            ("weight = 2.0", "weight = 1e-320"),
            ("accumulate = 2", "accumulate = 9223372036854775807"),
            ("batch_size = 2", "batch_size = 9223372036854775807"),
            ("steps = 3", "steps = 9223372036854775807"),
            ("rank = 4", "rank = 9223372036854775807"),
            ("steps = 3", "epochs = 10000"),
            ("learning_rate = 1e-3", "learning_rate = 1e10"),
            ("path = \"data.jsonl\"", "path = \"/dev/zero\""),
            ("output = \"run\"", "output = \"/\""),
        ]
        .map(replaced)
        .into()
    }

    fn mutate(&self, files: &mut Files, chance: &mut Chance) {
        let text = files.get_mut("recipe.toml").unwrap();
        if chance.one_in(3) {
            return mutate_text(text, chance);
        }
        // A value, from an equals sign to the next mark.
        let signs: Vec<usize> = (0..text.len()).filter(|at| text[*at] == b'=').collect();
        if signs.is_empty() {
            return mutate_bytes(text, chance);
        }
        let start = chance.pick(&signs) + 1;
        let is_mark = |byte: &u8| b",}\n".contains(byte);
        let end = text[start..].iter().position(is_mark).map_or(text.len(), |at| start + at);
        let value = match chance.below(8) {
            0 => json!(chance.phrase()).to_string(),
            1 => {
                (*chance.pick(&["true", "[]", "{}", "inf", "nan", "1979-05-27", "[[1]]", "\"\""])).to_string()
            }
            2 => format!("\"{}\"", "a".repeat(1 << chance.below(14))),
            3 => {
                let other = chance.pick(&signs) + 1;
                let end = text[other..].iter().position(is_mark).map_or(text.len(), |at| other + at);
                String::from_utf8_lossy(&text[other..end]).into_owned()
            }
            _ => chance.extreme().to_lowercase(),
        };
        text.splice(start..end, value.bytes());
    }

    fn read(&self, folder: &Path) -> peft::Result<()> {
        home();
        let path = folder.join("recipe.toml");
        let text = fs::read_to_string(&path).at(&path)?;
        let document = Document::parse(path, &text)?;
        match Work::of(&document, "fuzz")? {
            Work::Finetune(plan) => {
                let again = Recipe::read(&Document::parse("again.toml", &plan.to_toml()?)?)?;
                assert_eq!(Plan::of(&again, "fuzz"), *plan, "the resolved recipe is another");
                check(&plan).map(drop)
            }
            Work::Upcycle(plan) => check_upcycle(&plan).map(drop),
        }
    }
}

/// The folder of a run that goes on.
pub(super) struct Checkpoints;

const RUN: &str = r#"
task = "finetune"
model = { source = "model", dtype = "f32" }
adapter = { rank = 2 }
data = { train = [{ path = "data.jsonl" }], eval_share = 0.3, max_length = 64 }
train = { steps = 2, batch_size = 1, save_every = 1, keep = 2, learning_rate = 1e-2 }
"#;

struct Silent;

impl Reporter for Silent {
    fn report(&mut self, _: &Event) {}
}

fn train(output: &Path, resume: bool) -> peft::Result<()> {
    home();
    let mut plan = Plan::of(&Recipe::read(&Document::parse("run.toml", RUN)?)?, "run");
    plan.output = output.to_path_buf();
    finetune(&plan, resume, &AtomicBool::new(false), &mut Silent).map(drop)
}

/// The files of a run that nothing happened to.
fn whole() -> &'static Files {
    static WHOLE: OnceLock<Files> = OnceLock::new();
    WHOLE.get_or_init(|| {
        let run = place().join("whole");
        train(&run, false).unwrap();
        crate::place::tree(&run).into_iter().filter_map(|(name, bytes)| Some((name, bytes?))).collect()
    })
}

impl Class for Checkpoints {
    fn seeds(&self) -> Vec<Files> {
        let whole = whole().clone();
        // Killed after its first step.
        let mut killed = whole.clone();
        killed.retain(|name, _| {
            name.starts_with("checkpoint-1/") || name == "recipe.toml" || name == "metrics.jsonl"
        });
        vec![whole, killed]
    }

    fn mutate(&self, files: &mut Files, chance: &mut Chance) {
        let inside =
            |name: &&String| name.contains('/') || name.ends_with(".toml") || name.ends_with(".jsonl");
        let names: Vec<String> = files.keys().filter(inside).cloned().collect();
        let name = chance.pick(&names).clone();
        let file = files.get_mut(&name).unwrap();
        match name.rsplit('.').next() {
            // A recipe that is gone is written anew, which is no harm.
            _ if name != "recipe.toml" && chance.one_in(12) => drop(files.remove(&name)),
            Some("safetensors") => mutate_safetensors(file, chance),
            Some("json") => mutate_file(files, &name, chance),
            _ => mutate_text(file, chance),
        }
    }

    fn read(&self, folder: &Path) -> peft::Result<()> {
        train(folder, true)?;
        let name = "adapter_model.safetensors";
        let found = fs::read(folder.join(name)).unwrap();
        assert!(found == whole()[name], "went on to other weights");
        Ok(())
    }
}

/// An input that reading changes would hide what the mutation did.
#[test]
fn mutations_follow_from_seed_and_number() {
    let class = super::models::Config;
    let mutated = |case| {
        let mut files = fixture_files("llama", &["config.json"]);
        class.mutate(&mut files, &mut Chance::new("config", 3, case));
        files
    };
    assert!((0..50).all(|case| mutated(case) == mutated(case)));
    let different: std::collections::BTreeSet<Files> = (0..50).map(mutated).collect();
    assert!(different.len() > 40, "{} of 50 mutations differ", different.len());
}
