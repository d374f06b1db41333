//! What a model was told about its text while it was trained, which `tokenizer_config.json` records. Other programs keep these
//! keys and do not read them, and every copy of the model has the file.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::write_atomic;
use crate::error::{Context, Error, Result};

/// Records what chat templates were told, if they ask for anything.
pub const TEMPLATE: &str = "peft_rs_template";

/// Records what control tokens in texts are, if they are not tokens of their own.
pub const SPECIAL_TOKENS: &str = "peft_rs_special_tokens";

const FILE: &str = "tokenizer_config.json";

/// The records among the settings of a tokenizer.
pub(super) fn of(settings: &Value) -> BTreeMap<String, String> {
    // What is no text is kept as it is written, so that whoever reads the record finds what is wrong.
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_string);
    let said = |key: &str| Some((key.to_string(), text(settings.get(key)?)));
    [TEMPLATE, SPECIAL_TOKENS].into_iter().filter_map(said).collect()
}

/// Writes these records into the settings of the tokenizer in `folder`; those that are `None` are removed. A file that says
/// the same already is left alone.
pub fn record(folder: &Path, records: &[(&str, Option<String>)]) -> Result<()> {
    let path = folder.join(FILE);
    let settings = super::read_json_if_there(&path)?;
    let mut changed = match settings.clone() {
        Value::Null => Map::new(),
        Value::Object(settings) => settings,
        _ => return Err(Error::invalid("is no JSON object")).at(&path),
    };
    for (key, record) in records {
        match record {
            Some(text) => drop(changed.insert((*key).to_string(), Value::from(text.as_str()))),
            None => drop(changed.shift_remove(*key)),
        }
    }
    let changed = Value::Object(changed);
    if changed == settings || (settings.is_null() && changed == Value::Object(Map::new())) {
        return Ok(());
    }
    write_atomic(&path, (serde_json::to_string_pretty(&changed)? + "\n").as_bytes())
}
