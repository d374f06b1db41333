//! The tokenizer in a GGUF file's metadata, built as the `tokenizer.json` it was made from.
//!
//! candle's own reader of these fields splits text as GPT-2 does whatever `tokenizer.ggml.pre` says, and puts a space
//! before it, so its ids are not the model's.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use serde_json::{Map, Value as Json, json};

use super::gguf::GgufMetadata;
use super::text::TextFiles;
use crate::error::{Error, Result};

const CONTRACTIONS_AND_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|";
const MARKS_AND_SPACES: &str = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Bytes of a token.
const LONGEST_TOKEN: usize = 4096;

impl TextFiles {
    /// From the metadata of a GGUF file.
    pub(super) fn from_gguf(metadata: &GgufMetadata) -> Result<Self> {
        let vocabulary = Vocabulary::read(metadata)?;
        let kind = text(metadata, "tokenizer.ggml.model").unwrap_or_default();
        let parts = match kind {
            "gpt2" => vocabulary.byte_level(metadata)?,
            "llama" => vocabulary.sentencepiece(metadata)?,
            _ => {
                return Err(Error::invalid(format!(
                    "`tokenizer.ggml.model` is `{kind}`, which is not supported; supported are `gpt2` and `llama`"
                )));
            }
        };
        let add_bos = flag(metadata, "tokenizer.ggml.add_bos_token").unwrap_or(parts.add_bos);
        let add_eos = flag(metadata, "tokenizer.ggml.add_eos_token").unwrap_or(false);
        let special = |name: &str| id(metadata, name).filter(|id| (*id as usize) < vocabulary.tokens.len());
        let token = |name: &str| special(name).map(|id| vocabulary.tokens[id as usize].to_string());
        let bos = special("bos").filter(|_| add_bos);
        let eos = special("eos").filter(|_| add_eos);
        let tokenizer = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": vocabulary.added(),
            "normalizer": parts.normalizer,
            "pre_tokenizer": parts.pre_tokenizer,
            "post_processor": vocabulary.post_processor(bos, eos),
            "decoder": parts.decoder,
            "model": parts.model,
        });
        let tokenizer = super::tokenizer::read(&serde_json::to_vec(&tokenizer)?).map_err(|error| {
            Error::invalid(format!("the tokenizer in the metadata cannot be built: {error}"))
                .with_hint("give the model as a Hugging Face folder")
        })?;
        let endings = ["eos", "eot", "eom"];
        Ok(Self {
            tokenizer,
            chat_template: text(metadata, "tokenizer.chat_template").map(str::to_string),
            tool_template: text(metadata, "tokenizer.chat_template.tool_use").map(str::to_string),
            bos_token: token("bos"),
            eos_token: token("eos"),
            pad_token: token("padding"),
            unk_token: token("unknown"),
            told: Default::default(),
            told_by: Default::default(),
            eos_token_ids: endings.into_iter().filter_map(special).collect(),
            add_bos_token: false,
        }
        .settled())
    }
}

/// The parts of a `tokenizer.json` that differ between kinds.
struct Parts {
    normalizer: Json,
    pre_tokenizer: Json,
    decoder: Json,
    model: Json,
    /// Whether a text begins with the first token where the file says nothing.
    add_bos: bool,
}

struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    /// llama.cpp's kinds: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    kinds: Vec<u32>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a GgufMetadata) -> Result<Self> {
        let tokens = strings(metadata, "tokenizer.ggml.tokens")?;
        // Every way to cut a token in two is looked at.
        if let Some(id) = tokens.iter().position(|token| token.len() > LONGEST_TOKEN) {
            let found = tokens[id].len();
            return Err(Error::invalid(format!(
                "token {id} has {found} bytes, expected at most {LONGEST_TOKEN}"
            )));
        }
        let kinds = match metadata.get("tokenizer.ggml.token_type") {
            Some(Value::Array(list)) if list.len() == tokens.len() => {
                list.iter().map(|kind| integer(kind).unwrap_or(1)).collect()
            }
            Some(_) => {
                return Err(Error::invalid("`tokenizer.ggml.token_type` must have one entry per token"));
            }
            None => vec![1; tokens.len()],
        };
        Ok(Self { tokens, kinds })
    }

    fn ids(&self) -> Map<String, Json> {
        self.tokens.iter().enumerate().map(|(id, token)| ((*token).to_string(), json!(id))).collect()
    }

    /// Tokens that are found in a text before anything else is done to it.
    fn added(&self) -> Vec<Json> {
        let kinds = self.kinds.iter().zip(&self.tokens).enumerate();
        kinds
            .filter(|(_, (kind, _))| matches!(kind, 2..=4))
            .map(|(id, (kind, token))| {
                json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": *kind != 4,
                })
            })
            .collect()
    }

    fn post_processor(&self, bos: Option<u32>, eos: Option<u32>) -> Json {
        let entry = |id: u32, kind: u32| json!({ "SpecialToken": { "id": self.tokens[id as usize], "type_id": kind } });
        let sequence = |name: &str, kind: u32| {
            let mut list: Vec<Json> = bos.iter().map(|id| entry(*id, kind)).collect();
            list.push(json!({ "Sequence": { "id": name, "type_id": kind } }));
            list.extend(eos.iter().map(|id| entry(*id, kind)));
            list
        };
        let special: Map<String, Json> = bos
            .iter()
            .chain(eos.iter())
            .map(|id| {
                let token = self.tokens[*id as usize];
                (token.to_string(), json!({ "id": token, "ids": [id], "tokens": [token] }))
            })
            .collect();
        let pair: Vec<Json> = sequence("A", 0).into_iter().chain(sequence("B", 1)).collect();
        json!({
            "type": "TemplateProcessing", "single": sequence("A", 0), "pair": pair, "special_tokens": special,
        })
    }

    /// Byte-level BPE, split beforehand as `tokenizer.ggml.pre` says.
    fn byte_level(&self, metadata: &GgufMetadata) -> Result<Parts> {
        let merges = strings(metadata, "tokenizer.ggml.merges")?;
        let pre = text(metadata, "tokenizer.ggml.pre").unwrap_or("gpt-2");
        let bytes = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex });
        let split = |regex: String| {
            json!({ "type": "Sequence", "pretokenizers": [
                { "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false },
                bytes(false),
            ]})
        };
        let mut whole_words = false;
        let mut normalizer = Json::Null;
        let pre_tokenizer = match pre {
            "gpt-2" | "gpt2" => bytes(true),
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" => {
                json!({ "type": "Sequence", "pretokenizers": [
                    { "type": "Digits", "individual_digits": true }, bytes(true),
                ]})
            }
            "llama-bpe" | "llama3" | "llama-v3" | "smaug-bpe" => {
                whole_words = true;
                split(format!(r"{CONTRACTIONS_AND_WORDS}\p{{N}}{{1,3}}{MARKS_AND_SPACES}"))
            }
            "qwen2" | "deepseek-r1-qwen" => {
                normalizer = json!({ "type": "NFC" });
                split(format!(r"{CONTRACTIONS_AND_WORDS}\p{{N}}{MARKS_AND_SPACES}"))
            }
            "tekken" => {
                whole_words = true;
                split(TEKKEN.to_string())
            }
            other => {
                return Err(Error::invalid(format!(
                    "`tokenizer.ggml.pre` is `{other}`, which is not supported; supported are `gpt-2`, `smollm`, \
                     `starcoder`, `llama-bpe`, `qwen2` and `tekken`"
                ))
                .with_hint("give the model as a Hugging Face folder"));
            }
        };
        Ok(Parts {
            normalizer,
            pre_tokenizer,
            decoder: bytes(true),
            model: json!({
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": whole_words, "vocab": self.ids(), "merges": merges,
            }),
            add_bos: pre.starts_with("llama"),
        })
    }

    /// SentencePiece BPE: merges follow from the scores of what they make.
    fn sentencepiece(&self, metadata: &GgufMetadata) -> Result<Parts> {
        let scores: Vec<f32> = match metadata.get("tokenizer.ggml.scores") {
            Some(Value::Array(list)) if list.len() == self.tokens.len() => {
                list.iter().map(|score| score.to_f32().unwrap_or(0.0)).collect()
            }
            _ => return Err(Error::invalid("`tokenizer.ggml.scores` must have one entry per token")),
        };
        let unknown = id(metadata, "unknown").and_then(|id| self.tokens.get(id as usize)).unwrap_or(&"<unk>");
        let mut normalizers =
            vec![json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" })];
        let mut decoders = vec![
            json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
        ];
        if flag(metadata, "tokenizer.ggml.add_space_prefix").unwrap_or(true) {
            normalizers.insert(0, json!({ "type": "Prepend", "prepend": "▁" }));
            decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        }
        Ok(Parts {
            normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
            pre_tokenizer: Json::Null,
            decoder: json!({ "type": "Sequence", "decoders": decoders }),
            model: json!({
                "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
                "ignore_merges": false, "vocab": self.ids(), "merges": self.merges(&scores),
            }),
            add_bos: true,
        })
    }

    /// Every way to make a token of two others, best token first and among equals the longest left half first: the
    /// order in which transformers converts SentencePiece models.
    fn merges(&self, scores: &[f32]) -> Vec<[&'a str; 2]> {
        let mergeable = |kind: u32| matches!(kind, 1 | 4);
        let ids: HashMap<&str, usize> = (0..self.tokens.len())
            .filter(|id| mergeable(self.kinds[*id]))
            .map(|id| (self.tokens[id], id))
            .collect();
        let mut merges = Vec::new();
        for (id, token) in self.tokens.iter().enumerate().filter(|(id, _)| mergeable(self.kinds[*id])) {
            for (cut, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(cut);
                if let (Some(left_id), Some(right_id)) = (ids.get(left), ids.get(right)) {
                    let lengths = (left.chars().count(), right.chars().count());
                    merges.push((scores[id], id, (*left_id, *right_id), lengths, [left, right]));
                }
            }
        }
        merges
            .sort_by(|x, y| y.0.total_cmp(&x.0).then(y.3.cmp(&x.3)).then(x.1.cmp(&y.1)).then(x.2.cmp(&y.2)));
        merges.into_iter().map(|merge| merge.4).collect()
    }
}

fn strings<'a>(metadata: &'a GgufMetadata, key: &str) -> Result<Vec<&'a str>> {
    let wrong = || Error::invalid(format!("`{key}` must be a list of strings"));
    match metadata.get(key) {
        Some(Value::Array(list)) => list
            .iter()
            .map(|value| match value {
                Value::String(text) => Ok(text.as_str()),
                _ => Err(wrong()),
            })
            .collect(),
        Some(_) => Err(wrong()),
        None => Err(Error::invalid(format!("`{key}` is missing, so there is no tokenizer"))),
    }
}

fn text<'a>(metadata: &'a GgufMetadata, key: &str) -> Option<&'a str> {
    match metadata.get(key)? {
        Value::String(text) => Some(text),
        _ => None,
    }
}

fn flag(metadata: &GgufMetadata, key: &str) -> Option<bool> {
    metadata.get(key)?.to_bool().ok()
}

fn id(metadata: &GgufMetadata, name: &str) -> Option<u32> {
    integer(metadata.get(&format!("tokenizer.ggml.{name}_token_id"))?)
}

fn integer(value: &Value) -> Option<u32> {
    match value {
        Value::I8(n) => u32::try_from(*n).ok(),
        Value::I16(n) => u32::try_from(*n).ok(),
        Value::I32(n) => u32::try_from(*n).ok(),
        Value::I64(n) => u32::try_from(*n).ok(),
        value => value.to_u64().ok().and_then(|n| u32::try_from(n).ok()),
    }
}
