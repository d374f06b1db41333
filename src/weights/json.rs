//! Files of JSON, which are read whole and therefore bounded.

use std::path::Path;

use serde_json::Value;

use crate::error::{Context, Error, Json, Result, is_there, read_regular};

/// The most bytes of a JSON file, which is read whole: 100 MiB, since the index of a large model has tens of them.
pub(super) const LARGEST_JSON: u64 = 100 << 20;

/// The most bytes of a `tokenizer.json`: 500 MiB, since those of large vocabularies have tens of megabytes.
pub(super) const LARGEST_TOKENIZER: u64 = 500 << 20;

/// The files of a model's folder whose keys decide what the model and its text are.
const SETTINGS: [&str; 4] =
    ["config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"];

/// Warns of keys that the settings of the model in `folder` have twice in one object. A file that cannot be read is an error
/// of its reader.
pub(super) fn warnings_of_repeated_keys(folder: &Path) -> Vec<String> {
    let warning = |name: &str| {
        let json: Json =
            serde_json::from_slice(&read_regular(&folder.join(name), LARGEST_JSON).ok()?).ok()?;
        Some(format!("{}: {}", folder.join(name).display(), json.warning()?))
    };
    SETTINGS.into_iter().filter_map(warning).collect()
}

/// Reads a JSON file.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    let text = match read_regular(path, LARGEST_JSON) {
        Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::request("there is no such file")
                .with_hint("give the folder of a model as transformers saves it, with all its files"))
            .at(path);
        }
        read => read.at(path)?,
    };
    serde_json::from_slice(&text).at(path)
}

/// Reads a JSON file, or gives null where there is none.
pub(super) fn read_json_if_there(path: &Path) -> Result<Value> {
    if is_there(path) { read_json(path) } else { Ok(Value::Null) }
}
