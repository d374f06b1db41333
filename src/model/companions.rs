//! The files beside the weights of a model: what a copy with other weights carries on.

use std::fs;
use std::path::Path;

use candle_core::DType;
use serde_json::{Value, json};

use super::pretrained::Pretrained;
use crate::error::{Context, Error, Result};

impl Pretrained {
    /// Writes tokenizer, chat template and generation settings into an existing folder: those of a folder byte for
    /// byte, those of a GGUF file as Hugging Face files.
    pub fn write_companions(&self, folder: &Path) -> Result<()> {
        if self.checkpoint().is_gguf() {
            return self.write_text_files(folder);
        }
        for file in self.checkpoint().companions()? {
            let Some(name) = file.file_name() else { continue };
            let copy = folder.join(name);
            fs::write(&copy, fs::read(&file).at(&file)?).at(&copy)?;
        }
        Ok(())
    }

    /// Writes `config.json` for weights that are all of type `dtype`.
    pub fn write_config(&self, folder: &Path, dtype: DType) -> Result<()> {
        let mut config = self.config_json().clone();
        let name = match dtype {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            _ => "float32",
        };
        if let Value::Object(fields) = &mut config {
            // transformers 5 writes `dtype`, earlier versions `torch_dtype`; each is kept where it stands.
            let key = if fields.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            fields.insert(key.to_string(), json!(name));
        }
        write_json(&folder.join("config.json"), &config)
    }

    fn write_text_files(&self, folder: &Path) -> Result<()> {
        let text = self.text()?;
        let path = folder.join("tokenizer.json");
        text.tokenizer
            .save(&path, true)
            .map_err(|error| Error::invalid(format!("the tokenizer cannot be written: {error}")))
            .at(&path)?;
        let mut config = json!({ "tokenizer_class": "PreTrainedTokenizerFast" });
        let tokens = [
            ("bos_token", text.bos_token),
            ("eos_token", text.eos_token),
            ("pad_token", text.pad_token),
            ("unk_token", text.unk_token),
        ];
        for (key, token) in tokens {
            if let Some(token) = token {
                config[key] = json!(token);
            }
        }
        write_json(&folder.join("tokenizer_config.json"), &config)?;
        if let Some(template) = text.chat_template {
            let path = folder.join("chat_template.jinja");
            fs::write(&path, template).at(&path)?;
        }
        let generation = json!({ "eos_token_id": text.eos_token_ids });
        write_json(&folder.join("generation_config.json"), &generation)
    }
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    fs::write(path, text).at(path)
}
