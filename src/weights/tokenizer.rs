//! A `tokenizer.json` before and while the `tokenizers` crate reads it: what makes the crate panic, or a text grow
//! without measure, is an error.

mod growth;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{ModelWrapper, Tokenizer};

use crate::error::{Error, Result, caught};

const HINT: &str =
    "load the tokenizer with transformers and save it again, or take the file of the published model";

/// A tokenizer from its JSON.
pub(super) fn read(json: &[u8]) -> Result<Tokenizer> {
    #[derive(Deserialize)]
    struct Parts {
        #[serde(default)]
        normalizer: Value,
    }

    // A file that names its normalizer twice is refused here: the crate would read both.
    let parts: Parts = serde_json::from_slice(json).map_err(unreadable)?;
    growth::refuse_false_charsmaps(&parts.normalizer)?;
    let mut tokenizer = or_refused(caught(|| Tokenizer::from_bytes(json)))?;
    // Whoever trains decides where rows are cut and filled, and a file may ask for filled ones without end.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(unreadable)?;
    refuse_dropout(&tokenizer)?;
    growth::refuse_excess(&tokenizer)?;
    // What is wrong with a normalizer shows with the first text.
    or_refused(caught(|| tokenizer.encode_fast("a b\nHello wörld", true)))?;
    Ok(tokenizer)
}

/// A tokenizer that leaves out merges at random gives other tokens each time: no run with it could be repeated.
fn refuse_dropout(tokenizer: &Tokenizer) -> Result<()> {
    match tokenizer.get_model() {
        ModelWrapper::BPE(model) if model.dropout.is_some_and(|dropout| dropout != 0.0) => {
            let dropout = model.dropout.unwrap_or_default();
            Err(Error::invalid(format!(
                "the tokenizer has `dropout` {dropout}: the same text would get other tokens each time"
            ))
            .with_hint("set it to null, with which merges are all made"))
        }
        _ => Ok(()),
    }
}

fn or_refused<T>(done: Result<Result<T, tokenizers::Error>, String>) -> Result<T> {
    match done {
        Ok(done) => done.map_err(unreadable),
        Err(panic) => Err(Error::invalid(format!("not a usable tokenizer: {panic}")).with_hint(HINT)),
    }
}

fn unreadable(error: impl std::fmt::Display) -> Error {
    Error::invalid(format!("not a readable tokenizer: {error}")).with_hint(HINT)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::growth::holds_its_trie;
    use super::*;

    fn with(part: &str, value: Value) -> String {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/tiny-llama/tokenizer.json");
        let mut file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        file[part] = value;
        file.to_string()
    }

    /// Each of these ended the program.
    #[test]
    fn what_panics_or_swells_is_an_error() {
        let replace = |pattern: Value, content: &str| json!({ "type": "Replace", "pattern": pattern, "content": content });
        let double = || replace(json!({ "String": "e" }), "ee");
        let many = json!({ "type": "Sequence", "normalizers": (0..7).map(|_| double()).collect::<Vec<_>>() });
        let charsmap = |map: &str| json!({ "type": "Precompiled", "precompiled_charsmap": map });
        for (normalizer, expected) in [
            (replace(json!({ "String": "" }), "x"), "one of its normalizers replaces the empty text"),
            (charsmap("AAAA"), "the `precompiled_charsmap` of its normalizer is shorter"),
            (charsmap("////////////////"), "the `precompiled_charsmap` of its normalizer is shorter"),
            (charsmap(""), "the `precompiled_charsmap` of its normalizer is shorter"),
            (charsmap("AAAAAAAA"), "not a usable tokenizer: "),
            (many, "its normalizers can make a text 128 times as long, and at most 64 times is read"),
        ] {
            let error = read(with("normalizer", normalizer.clone()).as_bytes()).unwrap_err();
            assert!(error.to_string().starts_with(expected), "{normalizer}: {error}");
            assert!(error.hint().is_some());
        }
        let raw =
            with("decoder", json!({ "type": "ByteFallback" })).replace("ByteFallback", "Byte\u{1}Fallback");
        assert!(read(raw.as_bytes()).unwrap_err().to_string().starts_with("not a "));
        let filled = json!({
            "strategy": { "Fixed": 1_000_000_000_000_000u64 }, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "x"
        });
        assert!(read(with("padding", filled).as_bytes()).unwrap().get_padding().is_none());
    }

    /// Each of these asked for gigabytes with the first text, or with a few tokens.
    #[test]
    fn every_part_of_a_tokenizer_is_held_to_a_growth() {
        let replace = |pattern: Value, content: &str| json!({ "type": "Replace", "pattern": pattern, "content": content });
        let ten = || replace(json!({ "Regex": "." }), "..........");
        let decoders = |parts: Vec<Value>| json!({ "type": "Sequence", "decoders": parts });
        let normalizers = |parts: Vec<Value>| json!({ "type": "Sequence", "normalizers": parts });
        let many = |count: usize, part: Value| vec![part; count];
        let untagged = json!({ "pattern": { "Regex": "." }, "content": ".".repeat(65) });
        let other = json!({ "type": "Other", "pattern": { "Regex": "." }, "content": ".".repeat(65) });
        // A trie of no bytes, and one text.
        let charsmap = json!({ "type": "Precompiled", "precompiled_charsmap": "AAAAAGFh" });
        let long = json!({ "type": "Precompiled", "precompiled_charsmap": format!("AAAAAGFh{}", "YWFh".repeat(30)) });
        let byte_level = |space: bool| json!({ "type": "ByteLevel", "add_prefix_space": space, "trim_offsets": true, "use_regex": true });
        let metaspace = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always" });
        let pretokenizers = |parts: Vec<Value>| json!({ "type": "Sequence", "pretokenizers": parts });
        let template = |pieces: usize, ids: usize| {
            json!({
                "type": "TemplateProcessing",
                "single": vec![json!({ "Sequence": { "id": "A", "type_id": 0 } }); pieces]
                    .into_iter()
                    .chain([json!({ "SpecialToken": { "id": "x", "type_id": 0 } })])
                    .collect::<Vec<_>>(),
                "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 0 } }],
                "special_tokens": { "x": { "id": "x", "ids": vec![1; ids], "tokens": vec!["x"; ids] } },
            })
        };
        let grown = |what: &str, factor: &str| format!("its {what} can make a text {factor} times as long, ");
        for (part, value, expected) in [
            ("decoder", decoders(many(9, ten())), grown("decoders", "1000000000")),
            ("decoder", ten(), String::new()),
            (
                "decoder",
                replace(json!({ "String": "" }), "x"),
                "one of its decoders replaces the empty".to_string(),
            ),
            (
                "decoder",
                replace(json!({ "String": "a".repeat(2000) }), &"x".repeat(2000)),
                "one of its decoders puts in a text of 2000 characters, and at most 1024".to_string(),
            ),
            ("decoder", untagged.clone(), grown("decoders", "65")),
            ("decoder", other.clone(), grown("decoders", "65")),
            ("decoder", decoders(many(7, replace(json!({ "Regex": "x*" }), "y"))), grown("decoders", "128")),
            (
                "decoder",
                decoders(many(7, replace(json!({ "Regex": "a\\K" }), "y"))),
                grown("decoders", "128"),
            ),
            (
                "decoder",
                decoders(many(7, replace(json!({ "Regex": "(?=a)" }), "y"))),
                grown("decoders", "128"),
            ),
            ("decoder", decoders(many(7, replace(json!({ "Regex": "a+|(?:[bc]d?)" }), "y"))), String::new()),
            (
                "decoder",
                decoders(many(4, json!({ "type": "BPEDecoder", "suffix": "" }))),
                grown("decoders", "81"),
            ),
            (
                "decoder",
                decoders(many(257, json!({ "type": "Fuse" }))),
                "its decoders have 257 steps, ".to_string(),
            ),
            (
                "decoder",
                decoders(many(7, json!({ "type": "WordPiece", "prefix": "##", "cleanup": true }))),
                grown("decoders", "128"),
            ),
            ("decoder", decoders(vec![byte_level(true); 9]), String::new()),
            ("normalizer", untagged, grown("normalizers", "65")),
            ("normalizer", other, grown("normalizers", "65")),
            (
                "normalizer",
                json!({ "type": "Prepend", "prepend": "▁".repeat(1_000_000) }),
                "one of its normalizers puts in a text of 1000000 characters, ".to_string(),
            ),
            ("normalizer", normalizers(many(2, long.clone())), grown("normalizers", "8464")),
            ("normalizer", normalizers(many(9, charsmap)), grown("normalizers", "512")),
            ("normalizer", normalizers(many(7, json!({ "type": "ByteLevel" }))), grown("normalizers", "128")),
            ("pre_tokenizer", pretokenizers(many(4, byte_level(true))), grown("pre-tokenizers", "256")),
            ("pre_tokenizer", pretokenizers(many(7, metaspace)), grown("pre-tokenizers", "128")),
            (
                "post_processor",
                template(64, 1),
                "the templates of its post-processor have 67 pieces, ".to_string(),
            ),
            (
                "post_processor",
                template(1, 300),
                "its post-processor adds 300 tokens to a text, ".to_string(),
            ),
            (
                "model",
                json!({ "type": "WordLevel", "vocab": { "a".repeat(5000): 0 }, "unk_token": "x" }),
                "a token of its vocabulary has 5000 characters, ".to_string(),
            ),
        ] {
            let told = match read(with(part, value.clone()).as_bytes()) {
                Ok(_) => String::new(),
                Err(error) => format!("{error}"),
            };
            assert!(told.starts_with(&expected) && told.is_empty() == expected.is_empty(), "{value}: {told}");
        }
        let twice = with("version", json!("1.0")).replacen('{', r#"{"normalizer": null, "#, 1);
        assert!(read(twice.as_bytes()).unwrap_err().to_string().contains("duplicate field `normalizer`"));
    }

    #[test]
    fn merges_left_out_at_random_are_refused() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/tiny-llama/tokenizer.json");
        let mut file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for (dropout, refused) in [(json!(null), false), (json!(0.0), false), (json!(0.5), true)] {
            file["model"]["dropout"] = dropout.clone();
            let read = read(file.to_string().as_bytes());
            let told = read.err().map(|error| error.to_string()).unwrap_or_default();
            assert_eq!(told.starts_with("the tokenizer has `dropout` 0.5: "), refused, "{dropout}: {told}");
        }
    }

    #[test]
    fn tokenizers_as_they_are_published_are_read() {
        let spaces = json!({ "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
            { "type": "Replace", "pattern": { "Regex": " {2,}" }, "content": "▁" },
            { "type": "NFKD" },
        ]});
        read(with("normalizer", spaces).as_bytes()).unwrap();
        // A trie of 4 bytes, and no texts.
        assert!(holds_its_trie("BAAAAAAAAAA="));
        assert!(!holds_its_trie("CAAAAAAAAAA="));
    }
}
