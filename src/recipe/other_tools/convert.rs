//! Configurations of other tools as recipes: text becomes text, and whatever a recipe does not say is remarked.

use std::path::Path;

use toml::Value as Toml;

use super::data_files::{Nearby, Use};
use super::draft::{DataFile, Draft, Remark};
use super::keys::{Meaning, Reading, meaning_of, sentence};
use super::tool::Tool;
use super::values::{Taken, read};
use super::yaml::{self, Entry, Value, find};
use crate::error::{Context, Error, Result};
use crate::recipe::{Document, Recipe};

/// A recipe that was a configuration of another tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Converted {
    /// The tool.
    pub tool: Tool,
    /// The recipe, as TOML.
    pub recipe: String,
    /// What the recipe does not say, and what is to do, by line.
    pub remarks: Vec<Remark>,
    /// Keys that are off or empty, which a recipe says by leaving them out.
    pub off: Vec<String>,
}

/// Steps that depend on how many there are in all.
struct Pending {
    key: &'static str,
    taken: Taken,
    from: String,
    line: usize,
}

struct Conversion<'a> {
    tool: Tool,
    entries: &'a [Entry],
    nearby: Nearby<'a>,
    draft: Draft,
    pending: Vec<Pending>,
    off: Vec<String>,
    /// Whether its schedule is one that has no warmup.
    never_warms_up: bool,
}

/// Turns the text of a configuration of axolotl, LLaMA-Factory or mlx-lm into a recipe that can be read. `path` is what errors
/// and the recipe call it, and `nearby` gives the text of a file that the configuration refers to.
pub fn convert(path: &Path, text: &str, nearby: Nearby<'_>) -> Result<Converted> {
    let entries = yaml::parse(path, text)?;
    let Some(tool) = Tool::of(&entries) else {
        let error = Error::request("its keys are those of no tool whose configurations are converted");
        let hint = "axolotl is told by keys such as `base_model` and `datasets`, LLaMA-Factory by `finetuning_type` and \
                    `cutoff_len`, mlx-lm by `iters` and `lora_parameters`";
        return Err(error.with_hint(hint)).at(path);
    };
    tool.refuse_other_work(path, &entries)?;
    let (draft, pending, off) = Default::default();
    let mut conversion =
        Conversion { tool, entries: &entries, nearby, draft, pending, off, never_warms_up: false };
    for (i, entry) in entries.iter().enumerate() {
        match entries[i + 1..].iter().any(|later| later.key == entry.key) {
            true => conversion.remark(entry, "the key stands in the file again, and the last one counts"),
            false => conversion.take(entry),
        }
    }
    conversion.finish();
    let Conversion { mut draft, off, .. } = conversion;
    draft.remarks.sort_by_key(|remark| remark.line.unwrap_or(usize::MAX));
    let heading = format!("From the {} configuration `{}`.", tool.name(), path.display());
    let recipe = draft.recipe(&heading.replace(char::is_control, " "));
    Recipe::read(&Document::parse(path.with_extension("toml"), &recipe)?)?;
    Ok(Converted { tool, recipe, remarks: draft.remarks, off })
}

impl Conversion<'_> {
    fn remark(&mut self, entry: &Entry, why: &str) {
        self.draft.remark(entry.line, format!("`{}: {}`: {why}", entry.key, entry.value.text()));
    }

    /// Takes a key of the configuration.
    fn take(&mut self, entry: &Entry) {
        if entry.value.is_empty() {
            return self.off.push(entry.key.clone());
        }
        if self.take_special(entry) {
            return;
        }
        match meaning_of(&entry.key) {
            Some(Meaning::Key(key, reading)) => self.take_as(key, reading, entry),
            Some(Meaning::Said(same, _) | Meaning::NotBuilt(same, _))
                if same.contains(&entry.value.text().as_str()) => {}
            Some(Meaning::Said(same, _) | Meaning::NotBuilt(same, _))
                if entry.value == Value::Flag(false) && !same.contains(&"true") =>
            {
                self.off.push(entry.key.clone());
            }
            Some(Meaning::Said(_, sentence) | Meaning::NotBuilt(_, sentence)) => self.remark(entry, sentence),
            None => {
                self.remark(entry, "recipes have no such key, and this program does not know what it does")
            }
        }
    }

    /// Takes the value of an entry for `key`.
    fn take_as(&mut self, key: &'static str, reading: Reading, entry: &Entry) {
        self.never_warms_up |= reading == Reading::Schedule && entry.value.text() == "constant";
        let from = format!("{}: {}", entry.key, entry.value.text());
        match read(reading, &entry.value) {
            Ok(Taken::Value(value)) => self.draft.set(key, value, &from, entry.line),
            Ok(Taken::NoEvaluation) => self.draft.set("data.eval", false.into(), &from, entry.line),
            Ok(Taken::Nothing) => {}
            Ok(taken) => self.pending.push(Pending { key, taken, from, line: entry.line }),
            Err(why) => self.remark(entry, &why),
        }
    }

    /// Takes a key that means something else to this tool than to the others.
    fn take_special(&mut self, entry: &Entry) -> bool {
        let (entries, nearby) = (self.entries, self.nearby);
        let folder = || find(entries, "dataset_dir").map_or("data".to_string(), |entry| entry.value.text());
        match (self.tool, entry.key.as_str()) {
            // What it says is known by now, or said with the other.
            (Tool::Axolotl, "adapter") | (Tool::LlamaFactory, "finetuning_type" | "dataset_dir") => {}
            (Tool::MlxLm, "training_mode" | "train_mode" | "optimizer") => {}
            (Tool::MlxLm, "train") if entry.value == Value::Flag(true) => {}
            (Tool::MlxLm, "test") if entry.value == Value::Flag(false) => self.off.push(entry.key.clone()),
            (Tool::Axolotl, "datasets") => self.draft.axolotl_datasets(entry, Use::Train),
            (Tool::Axolotl, "pretraining_dataset") => {
                self.draft.axolotl_datasets(entry, Use::Train);
                self.draft.put("data.train_on", "all");
            }
            (Tool::Axolotl, "test_datasets") => self.draft.axolotl_datasets(entry, Use::Eval),
            (Tool::Axolotl, "batch_size") => {
                self.remark(
                    entry,
                    "it is all rows of a step, here `train.batch_size` times `train.accumulate`",
                );
            }
            (Tool::Axolotl, "special_tokens") => self.remark(entry, "the tokens are those of the tokenizer"),
            (Tool::LlamaFactory, "dataset") => {
                self.draft.llama_factory_datasets(entry, &folder(), nearby, Use::Train);
            }
            (Tool::LlamaFactory, "eval_dataset") => {
                self.draft.llama_factory_datasets(entry, &folder(), nearby, Use::Eval);
            }
            (Tool::LlamaFactory, "stage") => {
                if entry.value.text() == "pt" {
                    self.draft.put("data.train_on", "all");
                    self.draft.put("data.pack", true);
                }
            }
            (Tool::MlxLm, "model") => self.take_as("model.source", Reading::Same, entry),
            (Tool::MlxLm, "data") => self.draft.mlx_data(entry),
            (Tool::MlxLm, "fine_tune_type") => {
                if entry.value.text() == "dora" {
                    self.remark(entry, sentence("use_dora").unwrap_or_default());
                }
            }
            (Tool::MlxLm, "train" | "test") => {
                self.remark(entry, "`peft finetune` trains, and `peft eval perplexity` measures a result");
            }
            (Tool::MlxLm, "resume_adapter_file") => self.remark(
                entry,
                "`adapter.from` takes the folder of an adapter that PEFT or this program wrote",
            ),
            (Tool::MlxLm, "lora_parameters" | "lr_schedule" | "optimizer_config") => match &entry.value {
                Value::Table(inner) => self.take_table(&entry.key, inner),
                _ => self.remark(entry, "expected a table"),
            },
            _ => return false,
        }
        true
    }

    /// Takes a table of mlx-lm.
    fn take_table(&mut self, table: &str, inner: &[Entry]) {
        let optimizer =
            find(self.entries, "optimizer").map_or("adam".to_string(), |entry| entry.value.text());
        for entry in inner {
            match (table, entry.key.as_str()) {
                _ if entry.value.is_empty() => self.off.push(entry.key.clone()),
                ("lora_parameters", "keys") => self.take_as("adapter.targets", Reading::Targets, entry),
                ("lora_parameters", "scale") => {
                    let rank = find(inner, "rank").and_then(|rank| rank.value.number()).unwrap_or(8.0);
                    match entry.value.number() {
                        Some(scale) => {
                            let from = format!("scale: {scale}");
                            self.draft.set("adapter.alpha", (scale * rank).into(), &from, entry.line);
                        }
                        None => self.remark(entry, "expected a number"),
                    }
                }
                ("lora_parameters", "alpha") => {
                    self.remark(entry, "mlx-lm scales by `scale`, and this is `scale` times the rank here");
                }
                ("lr_schedule", "name") => self.take_as("train.schedule", Reading::Schedule, entry),
                ("lr_schedule", "warmup") => self.take_as("train.warmup", Reading::WarmupSteps, entry),
                ("lr_schedule", _) => {
                    self.remark(
                        entry,
                        "the rate rises to `train.learning_rate`, and falls to zero at the end",
                    );
                }
                ("optimizer_config", name) => match &entry.value {
                    Value::Table(settings) if name == optimizer => self.take_table("optimizer", settings),
                    _ => self.remark(entry, "it is for another optimizer"),
                },
                _ => self.take(entry),
            }
        }
    }

    /// Says what depends on several keys, and what the tool does where they are left out.
    fn finish(&mut self) {
        let full = self.tool.is_full(self.entries);
        if full {
            self.draft.put("train.full", true);
            self.draft.drop_adapter();
        }
        let settles_length =
            self.draft.get("train.steps").is_some() || self.draft.get("train.epochs").is_some();
        if self.draft.get("train.steps").is_some() && self.draft.get("train.epochs").is_some() {
            self.draft.remove("train.epochs");
            self.draft.remark_of_all("the number of epochs is left out, because that of steps counts");
        }
        let mut defaults = Vec::new();
        self.say_optimizer(&mut defaults);
        for (key, value) in self.tool.defaults() {
            let is_length = ["train.steps", "train.epochs"].contains(key) && settles_length;
            let is_pending = self.pending.iter().any(|pending| pending.key == *key);
            let is_of_adapter = key.starts_with("adapter.") && full;
            if self.draft.get(key).is_none() && !is_length && !is_pending && !is_of_adapter {
                let Ok(value) = value.parse::<Toml>() else { continue };
                defaults.push(format!("`{key} = {value}`"));
                self.draft.put(key, value);
            }
        }
        let rank = self.draft.get("adapter.rank").and_then(Toml::as_integer);
        if let Some(alpha) = rank.and_then(|rank| self.tool.alpha(rank))
            && self.draft.get("adapter.alpha").is_none()
        {
            defaults.push(format!("`adapter.alpha = {alpha:?}`"));
            self.draft.put("adapter.alpha", alpha);
        }
        if !defaults.is_empty() {
            let (name, defaults) = (self.tool.name(), defaults.join(", "));
            self.draft.remark_of_all(format!("left out, and written as {name} would do it: {defaults}"));
        }
        self.say_pending();
        if self.never_warms_up && self.draft.get("train.warmup") != Some(&Toml::Float(0.0)) {
            self.draft.put("train.warmup", 0.0);
            self.draft.remark_of_all("`train.warmup` is 0, because the schedule `constant` never warms up");
        }
        self.fill_in();
    }

    /// mlx-lm has Adam, which is AdamW without a decay, and AdamW, which has one unless told otherwise.
    fn say_optimizer(&mut self, defaults: &mut Vec<String>) {
        if self.tool != Tool::MlxLm {
            return;
        }
        let Some(entry) = find(self.entries, "optimizer") else { return };
        match entry.value.text().to_lowercase().as_str() {
            "adam" => self.draft.remove("train.weight_decay"),
            "adamw" if self.draft.get("train.weight_decay").is_none() => {
                defaults.push("`train.weight_decay = 0.01`".to_string());
                self.draft.put("train.weight_decay", 0.01);
            }
            "adamw" => {}
            _ => self.remark(entry, sentence("optimizer").unwrap_or_default()),
        }
    }

    /// Says steps as a share of all steps, and shares of all steps as steps, where a number of steps is given.
    fn say_pending(&mut self) {
        let steps = self.draft.get("train.steps").and_then(Toml::as_integer).map(|steps| steps as f64);
        for Pending { key, taken, from, line } in std::mem::take(&mut self.pending) {
            let value = match (taken, steps) {
                (Taken::OfSteps(part), Some(steps)) => Toml::from((part / steps).min(1.0)),
                (Taken::ShareOfSteps(share), Some(steps)) => Toml::from((share * steps).ceil() as i64),
                (Taken::OfSteps(part), None) => {
                    let text = format!(
                        "`{from}`: `{key}` is a share of the steps, of which `peft check` says how many there are: set it \
                         to {part} divided by their number"
                    );
                    self.draft.demand(line, text);
                    continue;
                }
                _ => {
                    let text = format!(
                        "`{from}`: `{key}` is a number of steps, of which `peft check` says how many there are in all"
                    );
                    self.draft.demand(line, text);
                    continue;
                }
            };
            self.draft.set(key, value, &from, line);
        }
    }

    /// Puts names in the place of what a recipe needs and the configuration has not.
    fn fill_in(&mut self) {
        if self.draft.get("model.source").is_none() {
            self.draft.put("model.source", "MODEL");
            self.draft
                .demand(1, "no model is named: put its folder, GGUF file or Hub id in the place of `MODEL`");
        }
        if self.draft.train.is_empty() {
            let path = "data.jsonl".to_string();
            self.draft.demand(1, "no data is named: put the path of a file into `data.train`");
            self.draft.train.push(DataFile { path, format: None });
        }
        if !self.tool.evaluates(self.entries) && self.draft.get("data.eval").is_none() {
            self.draft.put("data.eval", false);
        }
        let mlx_layers = ["num_layers", "lora_layers"];
        if self.tool == Tool::MlxLm && mlx_layers.iter().all(|key| find(self.entries, key).is_none()) {
            self.draft.remark_of_all("every layer is trained, and mlx-lm would train the last 16");
        }
    }
}
