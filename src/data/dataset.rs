//! Sources to a data set: tokenised on all cores, cut to length, counted, split.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::TrainOn;
use super::batch::{Row, fingerprint};
use super::conversation::{Conversation, REASONING};
use super::counts::{Counts, Lengths};
use super::mix::{self, Part};
use super::sampler::all_rows;
use super::source::{self, Key, Record, Records, Source};
use super::text::Text;
use super::tokens::{Tokens, tokenise};
use super::value::would_be_missed;
use super::warning::{Noticed, Warning};
use crate::error::{Context, Error, Result};

/// What becomes of the documents.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preparation {
    /// Documents are cut to this many tokens.
    pub max_length: usize,
    /// Which tokens are learned.
    pub train_on: TrainOn,
    /// The share of the training documents that is held out where there is no other data to evaluate on.
    pub eval_share: f64,
    /// The fewest documents of which a share is held out.
    pub eval_least: usize,
    /// Decides what is held out.
    pub seed: u64,
}

/// All documents of a run, ready to be put into batches.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// What is trained on, by source.
    pub train: Vec<Part>,
    /// What is evaluated on.
    pub eval: Vec<Row>,
    /// What the training sources held, before anything was held out.
    pub train_counts: Vec<Counts>,
    /// What the evaluation sources held; empty where documents were held out.
    pub eval_counts: Vec<Counts>,
    /// What to tell the user.
    pub warnings: Vec<Warning>,
}

impl Dataset {
    /// Reads and tokenises all sources. Without `eval` sources a share of the training documents is held out.
    pub fn load(train: &[Source], eval: &[Source], text: &Text, preparation: &Preparation) -> Result<Self> {
        let mut parts = Vec::new();
        let mut train_counts = Vec::new();
        let mut first = 0;
        for source in &files_of(train)? {
            let weight = mix::check_weight(source.weight)?;
            let (rows, counts) = load(source, text, preparation.max_length, preparation.train_on, first)?;
            mix::check_seen(weight, rows.len()).at(&source.path)?;
            first += counts.records as u64;
            parts.push(Part { rows, weight });
            train_counts.push(counts);
        }
        if parts.is_empty() {
            return Err(
                Error::request("there is no data to train on").with_hint("name a file in `data.train`")
            );
        }

        let mut warnings = Vec::new();
        let mut eval_rows = Vec::new();
        let mut eval_counts = Vec::new();
        for source in &files_of(eval)? {
            let (rows, counts) = load(source, text, preparation.max_length, preparation.train_on, first)?;
            first += counts.records as u64;
            eval_rows.extend(rows);
            eval_counts.push(counts);
        }
        // Of too few documents each counts, and a loss on one or two of them says little.
        let holds_out = eval.is_empty()
            && preparation.eval_share > 0.0
            && all_rows(&parts).count() >= preparation.eval_least;
        if holds_out {
            eval_rows = mix::hold_out(&mut parts, preparation.eval_share, preparation.seed);
            if eval_rows.is_empty() {
                warnings.push(Warning::NothingToHoldOut);
            }
        } else if !eval_rows.is_empty() {
            let trained: std::collections::HashSet<[u8; 32]> = all_rows(&parts).map(Row::digest).collect();
            let both = eval_rows.iter().filter(|row| trained.contains(&row.digest())).count();
            if both > 0 {
                warnings.push(Warning::EvalInTrain(both));
            }
        }
        let ends = |row: &Row| {
            row.tokens
                .iter()
                .zip(&row.supervised)
                .any(|(token, &counted)| counted && text.eos_ids().contains(token))
        };
        if !all_rows(&parts).any(ends) {
            warnings.push(Warning::EosNeverSupervised);
        }
        warnings.extend(sourced(&train_counts, &eval_counts, text));
        Ok(Self { train: parts, eval: eval_rows, train_counts, eval_counts, warnings })
    }

    /// SHA-256 over the tokens and labels of everything trained and evaluated on.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        fingerprint(all_rows(&self.train).chain(&self.eval))
    }
}

impl Counts {
    /// Returns the warnings about this source.
    #[must_use]
    pub fn warnings(&self, text: &Text) -> Vec<Warning> {
        let mut warnings = Vec::new();
        if self.lost.documents > 0 {
            warnings.push(Warning::LostText(self.path.clone(), self.records, self.lost.clone()));
        }
        if self.controls.documents > 0 && !text.takes_control_tokens_for_text() {
            warnings.push(Warning::ControlTokens(
                self.path.clone(),
                self.control_tokens,
                self.controls.clone(),
            ));
        }
        if self.cut > 0 {
            warnings.push(Warning::Cut(self.path.clone(), self.cut));
        }
        if !self.repeated.is_empty() {
            warnings.push(Warning::Repeated { path: self.path.clone(), keys: self.repeated.clone() });
        }
        if !self.unused.is_empty() {
            warnings.push(Warning::Unused { path: self.path.clone(), keys: self.unused.clone() });
        }
        if !self.unread.is_empty() {
            warnings.push(Warning::Unread { path: self.path.clone(), keys: self.unread.clone() });
        }
        warnings
    }
}

/// The files of all sources.
fn files_of(sources: &[Source]) -> Result<Vec<Source>> {
    Ok(sources.iter().map(Source::files).collect::<Result<Vec<_>>>()?.concat())
}

/// Collects the warnings about all sources; a file that is named twice is warned of once.
fn sourced(train: &[Counts], eval: &[Counts], text: &Text) -> Vec<Warning> {
    let mut warnings: Vec<Warning> = Vec::new();
    for warning in train.iter().chain(eval).flat_map(|counts| counts.warnings(text)) {
        if !warnings.contains(&warning) {
            warnings.push(warning);
        }
    }
    warnings
}

/// The documents of one source, numbered from `first`, and what was counted on the way.
pub fn load(
    source: &Source,
    text: &Text,
    max_length: usize,
    train_on: TrainOn,
    first: u64,
) -> Result<(Vec<Row>, Counts)> {
    rows(source, text, max_length, train_on, first, true)
}

/// The documents of one source as perplexity is measured on them: a text is what the tokenizer makes of it, without
/// an end token put after it; the rest is as in training on completions.
pub fn load_for_perplexity(source: &Source, text: &Text, max_length: usize) -> Result<(Vec<Row>, Counts)> {
    rows(source, text, max_length, TrainOn::Completion, 0, false)
}

fn rows(
    source: &Source,
    text: &Text,
    max_length: usize,
    train_on: TrainOn,
    first: u64,
    end_texts: bool,
) -> Result<(Vec<Row>, Counts)> {
    let path = &source.path;
    let Records { records, format, unused, repeated } = source::read(path, source.format)?;
    // After an error, later records are not looked at: each may take as long as a template is let run.
    let failed = AtomicUsize::new(usize::MAX);
    let tokenised: Vec<Result<Tokens>> = records
        .par_iter()
        .enumerate()
        .map(|(i, record)| {
            if i > failed.load(Ordering::Relaxed) {
                return Ok(Tokens::default());
            }
            let tokens = tokenise(&record.conversation, text, train_on, end_texts, max_length);
            if tokens.is_err() {
                failed.fetch_min(i, Ordering::Relaxed);
            }
            tokens
        })
        .collect();

    let mut counts = Counts {
        path: path.clone(),
        format,
        records: records.len(),
        rows: 0,
        tokens: 0,
        supervised: 0,
        templated: 0,
        truncated: 0,
        dropped_by_truncation: 0,
        dropped_without_labels: 0,
        first_dropped: None,
        cut: 0,
        lost: Noticed::default(),
        controls: Noticed::default(),
        control_tokens: 0,
        lengths: Lengths::default(),
        unused,
        repeated,
        unread: unread(&records, text),
    };
    let mut lengths = Vec::with_capacity(records.len());
    let mut rows = Vec::with_capacity(records.len());
    for ((Record { line, conversation }, tokenised), document) in records.iter().zip(tokenised).zip(first..) {
        let Tokens { mut tokens, mut supervised, is_cut, lost, controls } = tokenised.at_line(path, *line)?;
        lengths.push(tokens.len());
        if let Some(lost) = lost {
            counts.lost.add(*line, lost);
        }
        if let (found @ 1.., Some(first)) = controls {
            counts.control_tokens += found;
            counts.controls.add(*line, first);
        }
        counts.cut += usize::from(is_cut);
        // Of one that is cut, the rest may have some.
        let learnable = is_cut || supervised.contains(&true);
        counts.truncated += usize::from(tokens.len() > max_length);
        tokens.truncate(max_length);
        supervised.truncate(max_length);
        if !supervised.contains(&true) {
            counts.dropped_by_truncation += usize::from(learnable);
            counts.dropped_without_labels += usize::from(!learnable);
            counts.first_dropped.get_or_insert(*line);
            continue;
        }
        let row = Row { tokens, supervised, document };
        counts.tokens += row.tokens.len();
        counts.supervised += row.num_supervised();
        counts.templated += usize::from(matches!(conversation, Conversation::Chat { .. }));
        rows.push(row);
    }
    counts.rows = rows.len();
    counts.lengths = Lengths::of(lengths);
    if rows.is_empty() {
        return Err(nothing_left(&counts, max_length)).at(path);
    }
    Ok((rows, counts))
}

/// The keys of messages and the variables of records that the chat template has no word for.
fn unread(records: &[Record], text: &Text) -> Vec<Key> {
    if !text.has_template() {
        return Vec::new();
    }
    let mut keys = BTreeMap::new();
    for Record { conversation, line } in records {
        let Conversation::Chat { messages, tools, extra, .. } = conversation else { continue };
        let mut of_record: BTreeSet<&str> = extra.keys().map(String::as_str).collect();
        of_record.extend(tools.as_ref().map(|_| "tools"));
        let fields = messages.iter().flat_map(|message| &message.fields);
        of_record
            .extend(fields.filter(|(key, value)| would_be_missed(key, value)).map(|(key, _)| key.as_str()));
        of_record.iter().for_each(|key| Key::count(&mut keys, key, *line));
    }
    keys.retain(|key, _| match REASONING.contains(&key.as_str()) {
        true => !REASONING.iter().any(|name| text.template_mentions(name)),
        false => !text.template_mentions(key),
    });
    Key::ordered(keys)
}

fn nothing_left(counts: &Counts, max_length: usize) -> Error {
    let Counts { records, dropped_by_truncation, lengths, .. } = counts;
    if *dropped_by_truncation == 0 {
        return Error::invalid(format!("none of the {records} documents has a token to learn"));
    }
    Error::request(format!(
        "none of the {records} documents has a token to learn within `data.max_length` = {max_length} tokens: \
         {dropped_by_truncation} have their first one later"
    ))
    .with_hint(format!(
        "raise `data.max_length`: the longest document has {}{} tokens, 95 of 100 have at most {}",
        if counts.cut > 0 { "more than " } else { "" },
        lengths.max,
        lengths.p95
    ))
}

/// A row as text, in runs of tokens that are learned or not: what `peft check` shows of the first sample.
pub fn preview(row: &Row, text: &Text) -> Result<Vec<(String, bool)>> {
    let mut segments: Vec<(String, bool)> = Vec::new();
    let mut add = |piece: String, counted: bool| match segments.last_mut() {
        Some((said, same)) if *same == counted => said.push_str(&piece),
        _ if piece.is_empty() => {}
        _ => segments.push((piece, counted)),
    };
    let mut stream = text.decode_stream(false);
    for (&token, &counted) in row.tokens.iter().zip(&row.supervised) {
        add(stream.push(token)?, counted);
    }
    add(stream.finish()?, row.supervised.last().copied().unwrap_or(false));
    Ok(segments)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::text::tests::{CHATML, chatml, text};
    use crate::data::{Format, TemplateParts};

    fn source(lines: &[&str]) -> (tempfile::NamedTempFile, Source) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), lines.join("\n")).unwrap();
        let source = Source { path: file.path().into(), weight: 1.0, format: Format::Auto };
        (file, source)
    }

    fn preparation(max_length: usize, eval_share: f64) -> Preparation {
        Preparation { max_length, train_on: TrainOn::Completion, eval_share, eval_least: 0, seed: 1 }
    }

    #[test]
    fn what_is_cut_and_dropped_is_counted() {
        let (_file, source) = source(&[
            r#"{"prompt": "1", "completion": "2"}"#,
            r#"{"prompt": "1 2 3 4 5 6 7 8", "completion": "9"}"#,
            r#"{"prompt": "1", "completion": "2 3 4 5 6 7 8 9"}"#,
        ]);
        let (rows, counts) = load(&source, &chatml(), 6, TrainOn::Completion, 10).unwrap();
        assert_eq!(rows.iter().map(|row| row.document).collect::<Vec<_>>(), [10, 12]);
        assert_eq!(rows.iter().map(|row| row.tokens.len()).collect::<Vec<_>>(), [3, 6]);
        let Counts { records, rows, tokens, supervised, truncated, .. } = counts;
        assert_eq!((records, rows, tokens, supervised, truncated), (3, 2, 9, 7, 2));
        assert_eq!((counts.dropped_by_truncation, counts.dropped_without_labels), (1, 0));
        assert_eq!((counts.first_dropped, counts.format), (Some(2), Format::PromptCompletion));
        assert!(counts.lengths.p50 <= counts.lengths.p95 && counts.lengths.p95 <= counts.lengths.max);
    }

    #[test]
    fn a_source_of_which_nothing_is_left_is_an_error() {
        let (_file, source) = source(&[r#"{"prompt": "1 2 3 4 5 6 7 8", "completion": "9"}"#]);
        let error = load(&source, &chatml(), 4, TrainOn::Completion, 0).unwrap_err();
        assert!(
            error.to_string().ends_with(
                "none of the 1 documents has a token to learn within `data.max_length` = 4 tokens: 1 have their first one later"
            ),
            "{error}"
        );
        let hint = error.hint().unwrap();
        assert!(hint.starts_with("raise `data.max_length`: the longest document has 1"), "{hint}");

        let (_file, source) = self::source(&[r#"{"text": "1"}"#]);
        let endless = text(&[], TemplateParts::default(), |_| {});
        let error = load(&source, &endless, 4, TrainOn::Completion, 0).unwrap_err().to_string();
        assert!(error.ends_with("none of the 1 documents has a token to learn"), "{error}");
    }

    #[test]
    fn errors_of_templates_have_the_line() {
        let (file, source) = source(&[
            r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#,
            r#"{"messages": [{"role": "user", "content": "q"}]}"#,
        ]);
        let error = load(&source, &chatml(), 99, TrainOn::Completion, 0).unwrap_err();
        let place = format!("{}:2: ", file.path().display());
        assert!(error.to_string().starts_with(&place), "{error}");
    }

    #[test]
    fn documents_are_held_out_or_given() {
        let lines: Vec<String> = (0..20).map(|i| format!(r#"{{"text": "document {i}"}}"#)).collect();
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let (_train, train) = source(&lines);
        let (_eval, eval) = source(&lines[..2]);
        let text = chatml();

        let split = Dataset::load(std::slice::from_ref(&train), &[], &text, &preparation(99, 0.2)).unwrap();
        assert_eq!((split.train[0].rows.len(), split.eval.len(), split.warnings.len()), (16, 4, 0));
        let given =
            Dataset::load(std::slice::from_ref(&train), &[eval], &text, &preparation(99, 0.2)).unwrap();
        assert_eq!((given.train[0].rows.len(), given.eval.len()), (20, 2));
        assert_eq!(given.eval[0].document, 20);
        assert_eq!(given.warnings, [Warning::EvalInTrain(2)]);
        assert_ne!(split.fingerprint(), given.fingerprint());
        let none = Dataset::load(&[train], &[], &text, &preparation(99, 0.0)).unwrap();
        assert!(none.eval.is_empty() && none.warnings.is_empty());
        assert!(Dataset::load(&[], &[], &text, &preparation(99, 0.0)).is_err());
    }

    #[test]
    fn perplexity_sees_texts_as_the_tokenizer_has_them() {
        let (_file, source) = source(&[r#"{"text": "1 2 3"}"#]);
        let text = chatml();
        let (rows, _) = load_for_perplexity(&source, &text, 99).unwrap();
        assert_eq!(rows[0].tokens, text.encode_document("1 2 3").unwrap());
        assert_eq!(load(&source, &text, 99, TrainOn::Completion, 0).unwrap().0[0].tokens.last(), Some(&2));
    }

    #[test]
    fn oddities_are_told() {
        let (_file, source) = source(&[r#"{"text": "1 2 3"}"#, r#"{"text": "1 2 3"}"#]);
        let data = Dataset::load(&[source], &[], &chatml(), &preparation(2, 0.5)).unwrap();
        assert_eq!(data.warnings, [Warning::NothingToHoldOut, Warning::EosNeverSupervised]);
        assert_eq!(data.train[0].rows.len(), 2);
    }

    #[test]
    fn text_that_is_not_used_is_told_once_a_file() {
        let row = |more: &str| {
            format!(
                r#"{{"messages": [{{"role": "user", "content": "q", "name": "n"}}, {{"role": "assistant", "content": "a"}}]{more}}}"#
            )
        };
        let rows = [
            row(""),
            row(r#", "context": "c", "id": "x", "tools": [{"name": "f"}]"#),
            row(r#", "context": "c", "chat_template_kwargs": {"deep": true, "mood": "m"}"#),
        ];
        let (file, source) = source(&rows.each_ref().map(String::as_str));
        let template = CHATML.replace("{% for", "{% if mood %}{{ mood }}{% endif %}{% for");
        let parts = TemplateParts { chat_template: Some(template), ..TemplateParts::default() };
        let text = text(&[], parts, |_| {});
        let eval = std::slice::from_ref(&source);
        let data = Dataset::load(eval, eval, &text, &preparation(99, 0.0)).unwrap();
        let told: Vec<String> = data.warnings.iter().skip(1).map(ToString::to_string).collect();
        let path = file.path().display();
        assert_eq!(
            told,
            [
                "no document has an end-of-sequence token to learn, so the model will not learn to stop"
                    .to_string(),
                format!(
                    "{path}: text under these keys is not used: `context` (2 records, the first in line 2)"
                ),
                format!(
                    "{path}: the chat template does not read these keys: `name` (3 records, the first in line 1), \
                     `tools` (line 2), `deep` (line 3)"
                ),
            ]
        );
    }

    #[test]
    fn documents_that_are_switched_off_are_counted() {
        let row = |weight: u8| {
            format!(
                r#"{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": "a", "weight": {weight}}}]}}"#
            )
        };
        let (_file, source) = source(&[&row(1), &row(0)]);
        let (rows, counts) = load(&source, &chatml(), 99, TrainOn::Completion, 0).unwrap();
        assert_eq!((rows.len(), counts.dropped_without_labels, counts.first_dropped), (1, 1, Some(2)));
    }

    #[test]
    fn lengths_are_the_least_that_enough_documents_have() {
        assert_eq!(Lengths::of((1..=100).collect()), Lengths { p50: 50, p95: 95, max: 100 });
        assert_eq!(Lengths::of(vec![7]), Lengths { p50: 7, p95: 7, max: 7 });
        assert_eq!(Lengths::of(vec![]), Lengths::default());
    }
}
