//! A text of several kinds that every new model is measured on: held-out text is like what was fitted to, and most users
//! name no other file.

use std::collections::HashSet;

use serde::Deserialize;

use super::windows::Calibration;
use crate::data;
use crate::error::Result;

/// A story, an explanation, a dialogue, a list, a program, a letter, an article and a piece of news.
const DOCUMENTS: &str = include_str!("../../datasets/neutral.jsonl");

/// Tokens of all documents together: enough to tell models apart, and few beside the calibration text.
const MOST: usize = 2048;
/// With fewer tokens, or fewer different ones, the tokenizer does not know this text, and a loss would say nothing.
const LEAST: usize = 256;
const LEAST_DIFFERENT: usize = 48;

#[derive(Deserialize)]
struct Document {
    text: String,
}

impl Calibration {
    /// Adds the built-in text to report on, in windows of at most `longest` tokens. Gives the reason where it cannot be
    /// measured on: a tokenizer of another language, or one of tokens that the model, with `vocab` of them, does not have.
    pub fn measure_neutral(
        &mut self,
        tokenizer: &data::Text,
        vocab: usize,
        longest: usize,
    ) -> Result<Option<String>> {
        let documents: Vec<Document> =
            DOCUMENTS.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let share = MOST / documents.len();
        let mut encoded = Vec::new();
        for document in &documents {
            // Unchecked: a token that the model does not have is no fault of the user's text.
            let (mut tokens, _) = tokenizer.document(&document.text, usize::MAX)?;
            tokens.truncate(share);
            encoded.push(tokens);
        }
        let all: Vec<u32> = encoded.concat();
        let different: HashSet<&u32> = all.iter().collect();
        if let Some(token) = all.iter().find(|token| **token as usize >= vocab) {
            return Ok(Some(format!(
                "the built-in text was not measured: the tokenizer gives token {token}, and the model has {vocab}"
            )));
        }
        if all.len() < LEAST || different.len() < LEAST_DIFFERENT || longest < 2 {
            return Ok(Some(format!(
                "the built-in text was not measured: the tokenizer makes only {} tokens of it, {} different ones; name \
                 text unlike the calibration text in `calibration.eval`",
                all.len(),
                different.len()
            )));
        }
        self.add_neutral(&encoded, longest);
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tokenizer of whole words, of which it knows `words`.
    fn of_words(words: &[&str]) -> data::Text {
        let vocab: serde_json::Map<String, serde_json::Value> =
            ["?"].iter().chain(words).enumerate().map(|(id, word)| (word.to_string(), id.into())).collect();
        let file = serde_json::json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "decoder": null,
            "pre_tokenizer": { "type": "Whitespace" },
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "?" }
        });
        data::Text::new(file.to_string().parse().unwrap(), data::TemplateParts::default()).unwrap()
    }

    #[test]
    fn a_tokenizer_that_does_not_know_the_text_is_told_of() {
        let mut calibration = Calibration::default();
        let reason = calibration.measure_neutral(&of_words(&["the", "and"]), 3, 512).unwrap().unwrap();
        assert!(reason.contains("tokens of it, 3 different ones"), "{reason}");
        // Half of its words are there, and the model has too few tokens.
        let words: Vec<&str> = DOCUMENTS.split(|c: char| !c.is_alphabetic()).collect();
        let words: std::collections::BTreeSet<&str> =
            words.into_iter().filter(|word| word.len() < 5).collect();
        let tokenizer = of_words(&words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>());
        let reason = calibration.measure_neutral(&tokenizer, 40, 512).unwrap().unwrap();
        assert!(reason.ends_with("and the model has 40"), "{reason}");
        assert_eq!(calibration.further, []);
        assert_eq!(calibration.measure_neutral(&tokenizer, 1000, 64).unwrap(), None);
        let text = &calibration.further[0];
        assert!(text.num_tokens() <= MOST && text.num_windows() > 8, "{}", text.num_windows());
    }

    #[test]
    fn the_built_in_text_is_of_a_size_that_costs_little() {
        let documents: Vec<Document> =
            DOCUMENTS.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!((7..=16).contains(&documents.len()));
        assert!((3000..=6000).contains(&DOCUMENTS.len()), "{}", DOCUMENTS.len());
    }
}
