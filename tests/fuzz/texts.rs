//! Tokenizers, their settings, and chat templates.

use std::fs;
use std::path::Path;

use peft::data::{Message, Role};
use peft::model::Pretrained;
use serde_json::{Value, json};

use super::chance::{Chance, mutate_bytes, mutate_text};
use super::json::{mutate_file, with};
use super::toy::{fixture, model, speak};
use super::{Class, Files};

const TOKENIZER: &str = "tokenizer.json";
const SETTINGS: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";

/// What templates are rendered with.
pub(super) fn messages() -> Vec<Message> {
    let said = [(Role::User, "where is it?"), (Role::Assistant, "in a box."), (Role::User, "so?")];
    said.map(|(role, content)| Message::new(role, content)).into()
}

fn read(folder: &Path) -> peft::Result<()> {
    speak(&Pretrained::open(folder.to_str().unwrap())?)
}

/// A tokenizer of any kind.
pub(super) struct Tokenizer;

impl Class for Tokenizer {
    fn seeds(&self) -> Vec<Files> {
        let mut bundled = model();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny-llama").join(TOKENIZER);
        bundled.insert(TOKENIZER.to_string(), fs::read(path).unwrap());
        let toy = model();
        let of = |changes: &[(&str, Value)]| with(&toy, TOKENIZER, changes);
        let specials = json!({"<s>": {"id": "<s>", "ids": [1], "tokens": ["<|im_start|>"]}});
        let around = json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": specials,
        });
        let replace = |from: Value, to: &str| json!({"type": "Replace", "pattern": from, "content": to});
        let bert = json!({
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true,
        });
        let pieces = json!({"[UNK]": 0, "a": 1, "##b": 2, "the": 3, "<|im_start|>": 4, "<|im_end|>": 5});
        let unigram =
            json!([["<unk>", 0.0], ["▁", -1.0], ["▁the", -2.5], ["a", -3.0], ["<|im_start|>", 0.0]]);
        let metaspace =
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        vec![
            bundled,
            of(&[
                (
                    "/normalizer",
                    json!({"type": "Sequence", "normalizers": [
                        {"type": "NFKC"}, {"type": "Strip", "strip_left": true, "strip_right": false},
                        {"type": "Prepend", "prepend": "a"}, replace(json!({"String": " "}), "e"),
                        replace(json!({"Regex": "[xy]+"}), "z"), {"type": "Lowercase"},
                    ]}),
                ),
                (
                    "/pre_tokenizer",
                    json!({"type": "Sequence", "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": "\\s+(?!\\S)|\\w+"}, "behavior": "Isolated", "invert": false},
                        {"type": "Digits", "individual_digits": true}, {"type": "Punctuation", "behavior": "Isolated"},
                    ]}),
                ),
                ("/post_processor", around),
                (
                    "/decoder",
                    json!({"type": "Sequence", "decoders": [
                        replace(json!({"String": "▁"}), " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                    ]}),
                ),
            ]),
            of(&[
                ("/normalizer", bert),
                ("/pre_tokenizer", json!({"type": "BertPreTokenizer"})),
                (
                    "/model",
                    json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                                  "max_input_chars_per_word": 100, "vocab": pieces}),
                ),
                ("/decoder", json!({"type": "WordPiece", "prefix": "##", "cleanup": true})),
            ]),
            of(&[
                ("/pre_tokenizer", metaspace.clone()),
                ("/model", json!({"type": "Unigram", "unk_id": 0, "vocab": unigram, "byte_fallback": false})),
                ("/decoder", metaspace),
            ]),
            toy,
        ]
    }

    fn attacks(&self, seeds: &[Files]) -> Vec<Files> {
        let toy = &seeds[4];
        let set = |key: &str, value: Value| with(toy, TOKENIZER, &[(key, value)]);
        let replace = |from: Value, to: &str| json!({"type": "Replace", "pattern": from, "content": to});
        let charsmap = |map: &str| json!({"type": "Precompiled", "precompiled_charsmap": map});
        let swell = vec![replace(json!({"String": "e"}), &"e".repeat(64)); 6];
        let mut attacks = vec![
            set("/normalizer", replace(json!({"String": ""}), "x")),
            set("/normalizer", replace(json!({"Regex": "(a*)*"}), "x")),
            set("/normalizer", replace(json!({"Regex": "(a|aa)+$"}), "x")),
            set("/normalizer", charsmap("AAAA")),
            set("/normalizer", charsmap("////////////////")),
            set("/normalizer", charsmap("")),
            set("/normalizer", json!({"type": "Sequence", "normalizers": swell})),
            set(
                "/pre_tokenizer",
                json!({"type": "Split", "pattern": {"String": ""}, "behavior": "Removed",
                                         "invert": false}),
            ),
            set("/model/vocab", json!({})),
            set("/model/vocab", json!({"a": u32::MAX})),
            set("/model/dropout", json!(0.5)),
        ];
        // A control character that no JSON string may hold.
        let mut file = String::from_utf8(toy[TOKENIZER].clone()).unwrap();
        file = file.replace(r#"{"type":"Fuse"}"#, "{\"type\":\"Fu\u{1}se\"}");
        let mut control = toy.clone();
        control.insert(TOKENIZER.to_string(), file.into_bytes());
        attacks.push(control);
        attacks
    }

    fn mutate(&self, files: &mut Files, chance: &mut Chance) {
        match chance.below(8) {
            0 => mutate_bytes(files.get_mut(TOKENIZER).unwrap(), chance),
            _ => mutate_file(files, TOKENIZER, chance),
        }
    }

    fn read(&self, folder: &Path) -> peft::Result<()> {
        read(folder)
    }
}

/// What stands beside the tokenizer.
pub(super) struct TokenizerConfig;

const BESIDE: [&str; 3] = [SETTINGS, "special_tokens_map.json", "generation_config.json"];

impl Class for TokenizerConfig {
    fn seeds(&self) -> Vec<Files> {
        let mut files = model();
        let template = String::from_utf8(files.remove(TEMPLATE).unwrap()).unwrap();
        let specials =
            json!({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "lstrip": false}});
        files.insert(BESIDE[1].to_string(), specials.to_string().into());
        let named = json!([
            {"name": "default", "template": template}, {"name": "tool_use", "template": template},
        ]);
        vec![
            with(&files, SETTINGS, &[("/chat_template", json!(template))]),
            with(&files, SETTINGS, &[("/chat_template", named)]),
            files,
        ]
    }

    fn mutate(&self, files: &mut Files, chance: &mut Chance) {
        let name = *chance.pick(&BESIDE);
        mutate_file(files, name, chance);
    }

    fn read(&self, folder: &Path) -> peft::Result<()> {
        read(folder)
    }
}

/// A chat template in a file of its own.
pub(super) struct Template;

/// Parts that take time, memory or stack, or that call what may fail.
const PARTS: [&str; 16] = [
    "{% for x in range(100000) %}{% for y in range(100000) %}a{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{{ [1]|slice(1000000000)|list }}",
    "{{ 'a' * 10000000000 }}",
    "{{ messages | tojson(indent=18446744073709551615) }}",
    "{{ messages | tojson(indent=-1) }}",
    "{{ 'a'.ljust(10000000000) }}{{ 'a'|center(10000000000) }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ (2**62)**2 }}{{ 1 // 0 }}{{ -9223372036854775808 // -1 }}",
    "{{ strftime_now('%9999999999Y %Q %') }}",
    "{{ messages[9223372036854775807:-9223372036854775808:-1] }}",
    "{{ raise_exception('\u{1b}]0;title\u{7}') }}",
    "{% include 'x' %}{% extends '/etc/passwd' %}",
    "{{ loop.index }}{{ self }}{{ caller() }}{{ debug() }}",
    "{{ range(0, 9223372036854775807, 1)|list|length }}{{ lipsum(n=1000000) }}",
];

impl Class for Template {
    fn seeds(&self) -> Vec<Files> {
        let seed = |name| {
            let mut files = model();
            files.insert(TEMPLATE.to_string(), fs::read(fixture("chat").join(name)).unwrap());
            files
        };
        ["gemma.jinja", "llama3.jinja", "mistral.jinja", "qwen.jinja", "smollm2.jinja", "zephyr.jinja"]
            .map(seed)
            .into()
    }

    fn attacks(&self, seeds: &[Files]) -> Vec<Files> {
        let deep = [
            format!("{{{{ {}1 }}}}", "-".repeat(50_000)),
            format!("{{{{ x{} }}}}", ".a".repeat(50_000)),
            format!("{{{{ x{} }}}}", "|upper".repeat(50_000)),
            format!("{{{{ {}1{} }}}}", "(".repeat(50_000), ")".repeat(50_000)),
            format!("{{{{ {}1{} }}}}", "[".repeat(50_000), "]".repeat(50_000)),
            "{% if x %}".repeat(50_000),
            "{{ 1 }}".repeat(700_000),
        ];
        let with = |template: &str| {
            let mut files = seeds[0].clone();
            files.insert(TEMPLATE.to_string(), template.into());
            files
        };
        PARTS.into_iter().map(with).chain(deep.iter().map(|template| with(template))).collect()
    }

    fn mutate(&self, files: &mut Files, chance: &mut Chance) {
        let template = files.get_mut(TEMPLATE).unwrap();
        match chance.below(4) {
            0 => {
                let at = chance.below(template.len() + 1);
                template.splice(at..at, (*chance.pick(&PARTS)).bytes());
            }
            1 => mutate_bytes(template, chance),
            _ => mutate_text(template, chance),
        }
    }

    fn read(&self, folder: &Path) -> peft::Result<()> {
        read(folder)
    }
}
