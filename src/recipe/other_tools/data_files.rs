//! Data sets of other tools as files of a recipe.

use std::path::Path;

use super::draft::{DataFile, Draft};
use super::yaml::{Entry, Node, Value, find};

/// What a list of files is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Train,
    Eval,
}

/// Where the text of a file near the configuration comes from; `None`: there is no such file.
pub(super) type Nearby<'a> = &'a dyn Fn(&Path) -> Option<String>;

impl Draft {
    fn add(&mut self, to: Use, path: impl Into<String>, format: Option<&'static str>) {
        let file = DataFile { path: path.into(), format };
        match to {
            Use::Train => self.train.push(file),
            Use::Eval => self.eval.push(file),
        }
    }

    /// Adds a file that has to be made first of data on the Hub.
    fn add_of_hub(&mut self, to: Use, id: &str, format: Option<&'static str>, line: usize) {
        let name = id.rsplit('/').next().unwrap_or(id);
        let path = format!("{name}.jsonl");
        self.demand(line, format!("`{id}` is a dataset of the Hub: download it, and save it as `{path}`"));
        self.add(to, path, format);
    }

    /// The datasets of axolotl: a list of tables with `path` and `type`.
    pub(super) fn axolotl_datasets(&mut self, entry: &Entry, to: Use) {
        let single = [Node { line: entry.line, value: entry.value.clone() }];
        let nodes = match &entry.value {
            Value::List(nodes) => nodes.as_slice(),
            _ => &single,
        };
        for Node { line, value } in nodes {
            match value {
                Value::Table(keys) => self.axolotl_dataset(keys, *line, to),
                Value::Text(path) => self.path_or_id(to, path, None, None, *line),
                _ => self.demand(*line, format!("`{}`: expected a table with `path`", entry.key)),
            }
        }
    }

    fn axolotl_dataset(&mut self, keys: &[Entry], line: usize, to: Use) {
        let format = find(keys, "type").and_then(|kind| self.axolotl_format(kind));
        let ds_type = find(keys, "ds_type").map(|entry| entry.value.text());
        let files = find(keys, "data_files").map(|files| (files.line, files.value.words()));
        match (files, find(keys, "path")) {
            (Some((line, files)), _) => {
                files.iter().for_each(|path| self.path_or_id(to, path, Some("json"), format, line));
            }
            (None, Some(path)) => {
                self.path_or_id(to, &path.value.text(), ds_type.as_deref(), format, path.line);
            }
            (None, None) => self.demand(line, "a dataset without `path`"),
        }
        for Entry { line, key, value } in keys {
            let said = match key.as_str() {
                "path" | "type" | "ds_type" | "data_files" => true,
                "split" => value.text() == "train",
                "field_messages" => ["messages", "conversations"].contains(&value.text().as_str()),
                "chat_template" => value.text() == "tokenizer_default",
                _ => value.is_empty() || *value == Value::Flag(false),
            };
            if !said {
                let why = super::keys::sentence(key).unwrap_or("a recipe has no such key of a data file");
                self.remark(*line, format!("`{key}: {}`: {why}", value.text()));
            }
        }
    }

    /// The format that a `type` of axolotl stands for.
    fn axolotl_format(&mut self, kind: &Entry) -> Option<&'static str> {
        let name = kind.value.text();
        match name.split(['.', ':']).next().unwrap_or_default() {
            "alpaca" if !name.starts_with("alpaca.") => Some("alpaca"),
            "chat_template" | "sharegpt" => Some("messages"),
            "completion" | "pretrain" => Some("text"),
            _ => {
                let text = format!(
                    "`type: {name}` has no format of its own here: records need the keys of `messages`, `alpaca`, \
                     `prompt-completion` or `text`"
                );
                self.demand(kind.line, text);
                None
            }
        }
    }

    /// Adds a path, or what has to be made of an id of the Hub.
    fn path_or_id(
        &mut self,
        to: Use,
        path: &str,
        ds_type: Option<&str>,
        format: Option<&'static str>,
        line: usize,
    ) {
        let ending = Path::new(path).extension().map(|ending| ending.to_string_lossy().to_lowercase());
        match ending.as_deref() {
            Some("jsonl" | "json") => self.add(to, path, format),
            Some("parquet" | "csv" | "arrow" | "txt") => {
                let new = Path::new(path).with_extension("jsonl").display().to_string();
                self.demand(line, format!("`{path}` is not read: save its records as JSON Lines in `{new}`"));
                self.add(to, new, format);
            }
            // A folder, or a pattern.
            _ if path.starts_with(['.', '/', '~']) || ds_type.is_some() => {
                let read = matches!(ds_type, None | Some("json" | "file"));
                if !read {
                    let text = format!("`{path}` holds no JSON: save its records as `.jsonl` files there");
                    self.demand(line, text);
                }
                self.add(to, path, format);
            }
            _ => self.add_of_hub(to, path, format, line),
        }
    }

    /// The datasets of LLaMA-Factory: names that `dataset_info.json` explains.
    pub(super) fn llama_factory_datasets(
        &mut self,
        entry: &Entry,
        folder: &str,
        nearby: Nearby<'_>,
        to: Use,
    ) {
        let info = nearby(&Path::new(folder).join("dataset_info.json"));
        let info: Option<serde_json::Value> = info.and_then(|text| serde_json::from_str(&text).ok());
        for name in entry.value.words() {
            match info.as_ref().and_then(|info| info.get(&name)) {
                Some(about) => self.llama_factory_dataset(&name, about, folder, entry.line, to),
                None => {
                    let path = format!("{folder}/{name}.json");
                    let text = format!(
                        "`{name}` is explained in `{folder}/dataset_info.json`, which cannot be read from here or has no \
                         such name: put the path of its `file_name` in the place of `{path}`"
                    );
                    self.demand(entry.line, text);
                    self.add(to, path, None);
                }
            }
        }
    }

    fn llama_factory_dataset(
        &mut self,
        name: &str,
        about: &serde_json::Value,
        folder: &str,
        line: usize,
        to: Use,
    ) {
        let text = |key: &str| about.get(key).and_then(serde_json::Value::as_str);
        let format = match text("formatting") {
            Some("sharegpt" | "openai") => "messages",
            _ if about["columns"]["prompt"] == "text" => "text",
            _ => "alpaca",
        };
        let own =
            ["instruction", "input", "output", "history", "system", "tools", "messages", "conversations"];
        let columns = about.get("columns").and_then(|columns| columns.as_object());
        for (column, key) in columns.into_iter().flatten() {
            let key = key.as_str().unwrap_or_default();
            if format != "text" && !own.contains(&key) {
                let text = format!(
                    "`{name}` has `{column}` under `{key}`: records need the keys of the format `{format}`, which \
                     `peft check` tests"
                );
                self.demand(line, text);
            }
        }
        if about.get("ranking") == Some(&serde_json::Value::Bool(true)) {
            self.demand(line, format!("`{name}` has preferences, which are not trained on"));
        }
        match (text("hf_hub_url").or(text("ms_hub_url")), text("file_name")) {
            (Some(id), _) => self.add_of_hub(to, id, Some(format), line),
            (None, Some(file)) => {
                self.path_or_id(to, &format!("{folder}/{file}"), Some("file"), Some(format), line)
            }
            (None, None) => self.demand(line, format!("`{name}` has no `file_name` in `dataset_info.json`")),
        }
    }

    /// The folder of data of mlx-lm, which has `train.jsonl` and `valid.jsonl`.
    pub(super) fn mlx_data(&mut self, entry: &Entry) {
        let folder = entry.value.text();
        let folder = folder.trim_end_matches('/');
        if !folder.starts_with(['.', '/', '~']) && folder.split('/').count() == 2 {
            let text = format!(
                "`{folder}` is taken for a folder: if it is a dataset of the Hub, download it, and save it as \
                 `{folder}/train.jsonl` and `{folder}/valid.jsonl`"
            );
            self.demand(entry.line, text);
        }
        self.add(Use::Train, format!("{folder}/train.jsonl"), None);
        self.add(Use::Eval, format!("{folder}/valid.jsonl"), None);
    }
}
