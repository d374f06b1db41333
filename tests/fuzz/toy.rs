//! A model of a few kilobytes whose files all belong together, as a folder and as GGUF files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::quantized::gguf_file::Value as Entry;
use candle_core::{DType, Device};
use peft::data::{Batch, TemplateParts, Text};
use peft::generate::{Limits, Sampling, Session};
use peft::model::{Decoder, Pretrained};
use serde_json::json;

use super::Files;
use super::process::place;
use crate::weights::gguf::{converted, tokenizers::byte_level, write};

/// What the folder is trained on, record by record.
const DATA: [&str; 3] = [
    r#"{"messages":[{"role":"user","content":"where is it?"},{"role":"assistant","content":"in a box."}]}"#,
    r#"{"messages":[{"role":"user","content":"who is he?"},{"role":"assistant","content":"the one."}]}"#,
    r#"{"messages":[{"role":"system","content":"say no"},{"role":"user","content":"so?"},{"role":"assistant","content":"no"}]}"#,
];

/// Short, for the model sees 64 tokens.
pub(super) const TEMPLATE: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

pub(super) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Files of a fixture, under their names in its folder.
pub(super) fn fixture_files(folder: &str, names: &[&str]) -> Files {
    let read = |name: &&str| ((*name).to_string(), fs::read(fixture(folder).join(name)).unwrap());
    names.iter().map(read).collect()
}

/// A whole model: the weights of a fixture, and a tokenizer of as many tokens.
pub(super) fn model() -> Files {
    let mut files = fixture_files("llama", &["config.json", "model.safetensors", "generation_config.json"]);
    files.insert("tokenizer.json".to_string(), tokenizer().to_string().into());
    let settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>"}, "add_bos_token": false,
    });
    files.insert("tokenizer_config.json".to_string(), settings.to_string().into());
    files.insert("chat_template.jinja".to_string(), TEMPLATE.into());
    files
}

/// Characters, two merges and four special tokens.
fn tokenizer() -> serde_json::Value {
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"];
    let plain = "abcdefghijklmnopqrstuvwxyz0123456789 .,?\n".chars().map(String::from);
    let all =
        special.iter().map(ToString::to_string).chain(plain).chain(["he".to_string(), "the".to_string()]);
    let vocabulary: serde_json::Map<_, _> = all.enumerate().map(|(id, token)| (token, json!(id))).collect();
    let added = |(id, content): (usize, &&str)| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": special.iter().enumerate().map(added).collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": [["h", "e"], ["t", "he"]],
        },
    })
}

/// The model as llama.cpp's converter writes it, with a tokenizer.
pub(super) fn gguf() -> Files {
    gguf_of("llama", "llama", |_| {})
}

/// A fixture as a GGUF file whose metadata is changed by `edit`.
pub(super) fn gguf_of(
    family: &str,
    architecture: &str,
    edit: impl FnOnce(&mut BTreeMap<String, Entry>),
) -> Files {
    let (mut metadata, tensors) = converted(family, architecture);
    metadata.extend(byte_level("smollm"));
    metadata.insert("tokenizer.chat_template".to_string(), Entry::String(TEMPLATE.to_string()));
    edit(&mut metadata);
    let file = tempfile::NamedTempFile::new().unwrap();
    write(file.path(), &metadata, &tensors);
    Files::from([("model.gguf".to_string(), fs::read(file.path()).unwrap())])
}

/// A folder with the model in `model` and data in `data.jsonl`, which becomes the current one.
pub(super) fn home() -> &'static Path {
    static HOME: OnceLock<PathBuf> = OnceLock::new();
    HOME.get_or_init(|| {
        let home = place().join("home");
        fs::create_dir_all(home.join("model")).unwrap();
        for (name, bytes) in model() {
            fs::write(home.join("model").join(name), bytes).unwrap();
        }
        fs::write(home.join("data.jsonl"), (DATA.join("\n") + "\n").repeat(3)).unwrap();
        std::env::set_current_dir(&home).unwrap();
        home
    })
}

/// Checks a model and computes with it: a batch as in training, and tokens with a cache.
pub(super) fn compute(model: &Pretrained) -> peft::Result<()> {
    model.check()?;
    let decoder = Decoder::open(model, model.compute_dtype(), &Device::Cpu)?;
    compute_with(&decoder)
}

pub(super) fn compute_with(decoder: &Decoder) -> peft::Result<()> {
    let vocabulary = decoder.config().vocab_size as u32;
    let tokens: Vec<u32> = (1..9).map(|token| token % vocabulary).collect();
    let batch = Batch {
        supervised: (0..8).map(|at| at % 5 != 0).collect(),
        tokens: tokens.clone(),
        offsets: vec![0, 5, 8],
        documents: vec![0, 1],
    };
    peft::eval::evaluate(decoder, &[batch])?;
    let limits = Limits { max_new_tokens: 3, stop: Vec::new() };
    Session::new(decoder).generate(&tokens[..4], &limits, Sampling::default(), |_| Ok(true))?;
    Ok(())
}

/// Reads every tensor of a model's files.
pub(super) fn read_values(model: &Pretrained) -> peft::Result<()> {
    let checkpoint = model.checkpoint();
    checkpoint.digest()?;
    checkpoint.tensor_digests()?;
    let first = checkpoint.tensors().keys().map(|name| checkpoint.read(name, DType::F32, &Device::Cpu));
    first.collect::<peft::Result<Vec<_>>>().map(drop)
}

/// Tokenizes, renders and decodes.
pub(super) fn speak(model: &Pretrained) -> peft::Result<()> {
    let files = model.text()?;
    // Without the number of the embedding's rows, so that tokenizers with more tokens are read too.
    let parts = TemplateParts {
        chat_template: files.chat_template,
        tool_template: files.tool_template,
        bos_token: files.bos_token,
        eos_token: files.eos_token,
        eos_token_ids: files.eos_token_ids,
        add_bos: Some(files.add_bos_token),
        ..TemplateParts::default()
    };
    let text = Text::new(files.tokenizer, parts)?;
    for said in ["", "the end", "  A é\u{1f600}\r\n\t<|im_end|>0123456789", "a\u{300}\0\u{feff}"] {
        let tokens = text.encode(said)?;
        text.encode_document(said)?;
        decode(&text, &tokens)?;
    }
    decode(&text, &[0, 1, 2, 5, 1 << 20, u32::MAX])?;
    if text.has_template() {
        let messages: Vec<_> = super::texts::messages();
        let tokens = text.prompt_tokens(&messages)?;
        text.render(&messages[..1], false)?;
        decode(&text, &tokens)?;
    }
    Ok(())
}

fn decode(text: &Text, tokens: &[u32]) -> peft::Result<()> {
    text.decode(tokens, false)?;
    text.decode(tokens, true)?;
    let mut stream = text.decode_stream(true);
    for token in tokens.iter().take(64) {
        stream.push(*token)?;
    }
    stream.finish().map(drop)
}
