//! Calibration text: documents cut into windows, those held out apart from those that things are fitted to.

use std::ops::Range;

use serde::Serialize;

use super::overlap::repeated;
use crate::data::{Row, generator, shuffle};
use crate::error::{Error, Result};
use crate::ops::Documents;

/// Tokens of the longest window.
pub const WINDOW: usize = 512;
/// Tokens that are computed at once: enough that a matrix product is at its best.
const BATCH: usize = 2048;

/// Windows end to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Where each window begins, and the end.
    pub offsets: Vec<usize>,
}

impl Windows {
    /// As documents of a forward pass.
    ///
    /// # Panics
    ///
    /// Where `offsets` does not begin with 0 or falls.
    #[must_use]
    pub fn documents(&self) -> Documents {
        Documents::new(self.offsets.clone(), (1..self.offsets.len() as u64).map(|end| end - 1).collect())
    }

    /// The rows whose next token is in the same window, and that token.
    #[must_use]
    pub fn targets(&self) -> (Vec<u32>, Vec<u32>) {
        let pairs = self.offsets.windows(2).flat_map(|span| span[0]..span[1].saturating_sub(1));
        pairs.map(|row| (row as u32, self.tokens[row + 1])).unzip()
    }

    /// For each token whether it is the first of its window.
    #[must_use]
    pub fn is_first(&self) -> Vec<bool> {
        let mut first = vec![false; self.tokens.len()];
        self.offsets.windows(2).filter(|span| span[0] < span[1]).for_each(|span| first[span[0]] = true);
        first
    }
}

/// Where text that a model is measured on comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// The part of the calibration data that nothing is fitted to, which is like the other part.
    #[default]
    HeldOut,
    /// A file of `calibration.eval`.
    File,
    /// The text of several kinds that is built into the program.
    Neutral,
}

/// Text that is reported on and that nothing is chosen by.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Text {
    /// Where it comes from.
    pub origin: Origin,
    /// The name of its file, where it is one of `calibration.eval`.
    pub file: Option<String>,
    /// Its windows, in batches.
    pub windows: Vec<Windows>,
    /// So many windows appear mostly in the text that is fitted to as well.
    pub repeated: usize,
}

impl Text {
    /// Returns the number of windows in the text.
    #[must_use]
    pub fn num_windows(&self) -> usize {
        self.windows.iter().map(|batch| batch.offsets.len() - 1).sum()
    }

    /// Returns the number of tokens in the text.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        count(&self.windows)
    }
}

/// Text to learn from and text to measure on, in batches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Calibration {
    /// What statistics are taken of and things are fitted to; mixed, so that a part of it is like the whole.
    pub fitted: Vec<Windows>,
    /// Text of the same kinds.
    pub held_out: Text,
    /// Text of other files, each reported on by itself, and the built-in one.
    pub further: Vec<Text>,
}

/// With fewer documents, none is held out as a whole, and the end of each is held out instead.
const FEW: usize = 16;

impl Calibration {
    /// Takes `tokens` tokens and `held_out` more of other documents, or where there are few, of the ends of each. `sources`
    /// are documents and their weight: a source of weight 2 gives twice as much of its text as one of weight 1. No window
    /// has more than `longest` tokens: [`WINDOW`], or fewer for a model that sees fewer.
    pub fn of(
        sources: &[(Vec<Row>, f64)],
        (tokens, held_out): (usize, usize),
        longest: usize,
        seed: u64,
    ) -> Result<Self> {
        let documents = mixed(sources, seed);
        let cut = |mut row: Vec<u32>| {
            let all = tokens.saturating_add(held_out).max(1);
            let end = (row.len().saturating_mul(held_out) / all).max(2).min(row.len() / 2);
            let end = row.split_off(row.len() - end);
            (end, row)
        };
        let (held_out, mut fitted) = if documents.len() < FEW {
            let (ends, own): (Vec<_>, Vec<_>) = documents.into_iter().map(cut).unzip();
            (
                windows(&mut ends.into_iter(), held_out, longest),
                windows(&mut own.into_iter(), tokens, longest),
            )
        } else {
            let mut documents = documents.into_iter();
            let held_out = windows(&mut documents, held_out, longest);
            (held_out, windows(&mut documents, tokens, longest))
        };
        // Windows of one document lie apart, for parts of the text stand for all of it.
        shuffle(&mut fitted, &mut generator("upcycle/windows", &[seed]));
        if fitted.is_empty() || held_out.is_empty() {
            return Err(Error::request("the calibration data has too few documents to hold any out")
                .with_hint("give more text in `calibration.data`, or a smaller `calibration.held_out`"));
        }
        let mut calibration = Self { fitted: batches(&fitted), ..Self::default() };
        calibration.held_out = calibration.text(Origin::HeldOut, None, &held_out);
        Ok(calibration)
    }

    fn text(&self, origin: Origin, file: Option<String>, windows: &[Vec<u32>]) -> Text {
        let windows = batches(windows);
        Text { origin, file, repeated: repeated(each(&windows), each(&self.fitted)), windows }
    }

    /// Adds `tokens` tokens of a file to report on.
    pub fn report_on(
        &mut self,
        file: &str,
        documents: Vec<Row>,
        tokens: usize,
        longest: usize,
        seed: u64,
    ) -> Result<()> {
        let windows = windows(&mut mixed(&[(documents, 1.0)], seed).into_iter(), tokens, longest);
        if windows.is_empty() {
            return Err(Error::request(format!(
                "`{file}` of `calibration.eval` has no document of two tokens or more"
            )));
        }
        self.further.push(self.text(Origin::File, Some(file.to_string()), &windows));
        Ok(())
    }

    /// Adds documents of the built-in text to report on, all of them, each cut into windows.
    pub(super) fn add_neutral(&mut self, documents: &[Vec<u32>], longest: usize) {
        let windows = documents.iter().flat_map(|document| document.chunks(longest));
        let windows: Vec<Vec<u32>> = windows.filter(|w| w.len() >= 2).map(<[u32]>::to_vec).collect();
        self.further.push(self.text(Origin::Neutral, None, &windows));
    }

    /// Refuses text that cannot be put into so many clusters of windows, for `router = "hidden-kmeans"`.
    pub fn refuse_fewer_windows(&self, clusters: usize) -> Result<()> {
        let windows: usize = self.fitted.iter().map(|batch| batch.offsets.len() - 1).sum();
        if windows == 0 {
            return Err(Error::request("`upcycle.router = \"hidden-kmeans\"` needs calibration text")
                .with_hint("name files in `calibration.data`"));
        }
        if windows < clusters {
            return Err(Error::request(format!(
                "`upcycle.router = \"hidden-kmeans\"` needs a window of calibration text for each of {clusters} experts, \
                 and finds {windows}"
            ))
            .with_hint("give more text and raise `calibration.tokens`, or lower `upcycle.experts`"));
        }
        Ok(())
    }

    /// Every text that is reported on, the held-out one first, where there is one.
    pub fn texts(&self) -> impl Iterator<Item = &Text> {
        std::iter::once(&self.held_out).filter(|text| !text.windows.is_empty()).chain(&self.further)
    }

    /// Tokens to learn from and tokens held out.
    #[must_use]
    pub fn num_tokens(&self) -> (usize, usize) {
        (count(&self.fitted), self.held_out.num_tokens())
    }
}

/// The windows of all batches.
fn each(batches: &[Windows]) -> impl Iterator<Item = &[u32]> {
    batches.iter().flat_map(|batch| batch.offsets.windows(2).map(|span| &batch.tokens[span[0]..span[1]]))
}

fn count(batches: &[Windows]) -> usize {
    batches.iter().map(|batch| batch.tokens.len()).sum()
}

/// All documents, shuffled so that the sources are mixed by weight from the beginning on.
fn mixed(sources: &[(Vec<Row>, f64)], seed: u64) -> Vec<Vec<u32>> {
    let mut placed = Vec::new();
    for (number, (rows, weight)) in sources.iter().enumerate() {
        let mut order: Vec<usize> = (0..rows.len()).collect();
        shuffle(&mut order, &mut generator("upcycle/documents", &[seed, number as u64]));
        let tokens: usize = rows.iter().map(|row| row.tokens.len()).sum();
        let mut before = 0;
        for row in order {
            // Where it would lie if all of the source were spread over one unit of weight.
            let place = (before as f64 + 0.5) / (weight * tokens as f64);
            before += rows[row].tokens.len();
            placed.push((place, number, rows[row].tokens.clone()));
        }
    }
    placed.sort_by(|x, y| x.0.total_cmp(&y.0).then(x.1.cmp(&y.1)));
    placed.into_iter().map(|(_, _, tokens)| tokens).collect()
}

/// Windows of the next documents, `most` tokens of them. No document gives more than an eighth, so that none stands for all.
fn windows(documents: &mut impl Iterator<Item = Vec<u32>>, most: usize, longest: usize) -> Vec<Vec<u32>> {
    let mut windows = Vec::new();
    let mut taken = 0;
    let share = (most / 8).max(WINDOW);
    let mut rest: Vec<Vec<u32>> = Vec::new();
    let mut take = |window: &[u32], taken: &mut usize| {
        let window = &window[..window.len().min(most - *taken)];
        if window.len() >= 2 {
            *taken += window.len();
            windows.push(window.to_vec());
        }
    };
    while taken + 2 <= most {
        let Some(document) = documents.next() else { break };
        let (own, more) = document.split_at(document.len().min(share));
        own.chunks(longest).for_each(|window| take(window, &mut taken));
        rest.extend(more.chunks(longest).map(<[u32]>::to_vec));
    }
    // Where there is little text, all of it is taken.
    rest.iter().for_each(|window| take(window, &mut taken));
    windows
}

/// The first batches that have at most `most` tokens together; one at least, where there is one.
pub(super) fn first_batches(batches: &[Windows], most: usize) -> &[Windows] {
    let mut tokens = 0;
    let within = batches.iter().take_while(|batch| {
        tokens += batch.tokens.len();
        tokens <= most
    });
    &batches[..within.count().max(1).min(batches.len())]
}

fn batches(windows: &[Vec<u32>]) -> Vec<Windows> {
    let mut batches: Vec<Windows> = Vec::new();
    for window in windows {
        match batches.last_mut() {
            Some(batch) if batch.tokens.len() + window.len() <= BATCH => {
                batch.tokens.extend_from_slice(window);
                batch.offsets.push(batch.tokens.len());
            }
            _ => batches.push(Windows { tokens: window.clone(), offsets: vec![0, window.len()] }),
        }
    }
    batches
}

/// One in so many batches of the sample is kept out of the fits, to choose among their results.
const JUDGED: usize = 8;

/// The batches that fits are made from, and the batches that choose among fits.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub(super) fitted: Range<usize>,
    pub(super) judged: Range<usize>,
}

impl Sample {
    /// The first batches, of which the last ones are left for choices.
    pub(super) fn of(text: &[Windows], most: usize) -> Self {
        let batches = first_batches(text, most).len();
        let judged_from = batches - (batches / JUDGED).max(usize::from(batches > 1));
        Self { fitted: 0..judged_from, judged: judged_from..batches }
    }

    /// The first batches of either.
    pub(super) fn part(&self, text: &[Windows], most: usize) -> Self {
        let first = |range: &Range<usize>, most| {
            range.start..range.start + first_batches(&text[range.clone()], most).len()
        };
        Self { fitted: first(&self.fitted, most - most / JUDGED), judged: first(&self.judged, most / JUDGED) }
    }

    /// All of it.
    pub(super) fn batches(&self) -> impl Iterator<Item = usize> + use<> {
        self.fitted.clone().chain(self.judged.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(lengths: &[usize], first: u32) -> Vec<Row> {
        let row = |(n, length): (usize, &usize)| Row {
            tokens: vec![first + n as u32; *length],
            supervised: vec![true; *length],
            document: n as u64,
        };
        lengths.iter().enumerate().map(row).collect()
    }

    #[test]
    fn held_out_documents_are_not_fitted_to() {
        let calibration = Calibration::of(&[(rows(&[700; 20], 0), 1.0)], (6000, 1500), WINDOW, 1).unwrap();
        let ids = |batches: &[Windows]| -> std::collections::BTreeSet<u32> {
            batches.iter().flat_map(|batch| batch.tokens.iter().copied()).collect()
        };
        assert!(ids(&calibration.fitted).is_disjoint(&ids(&calibration.held_out.windows)));
        assert_eq!(calibration.num_tokens(), (6000, 1500));
    }

    #[test]
    fn no_window_is_longer_than_the_model_sees() {
        let mut calibration = Calibration::of(&[(rows(&[700; 20], 0), 1.0)], (6000, 1500), 100, 1).unwrap();
        calibration.report_on("file", rows(&[700; 3], 50), 1000, 100, 1).unwrap();
        calibration.add_neutral(&[vec![7; 250], vec![8; 101]], 100);
        let texts = calibration.texts().flat_map(|text| &text.windows);
        let batches = calibration.fitted.iter().chain(texts);
        let lengths: Vec<usize> =
            batches.flat_map(|batch| batch.offsets.windows(2).map(|w| w[1] - w[0])).collect();
        assert_eq!(lengths.iter().max(), Some(&100));
        // A window of one token has nothing to predict.
        assert_eq!(calibration.further[1].num_windows(), 4);
    }

    #[test]
    fn sources_are_mixed_by_weight() {
        let sources = [(rows(&[100; 80], 0), 1.0), (rows(&[100; 80], 1000), 3.0)];
        let calibration = Calibration::of(&sources, (4000, 400), WINDOW, 1).unwrap();
        let of_second = calibration.fitted.iter().flat_map(|b| &b.tokens).filter(|id| **id >= 1000).count();
        assert!((2900..=3100).contains(&of_second), "{of_second}");
    }

    #[test]
    fn one_document_is_cut_in_two() {
        let calibration = Calibration::of(&[(rows(&[3000], 0), 1.0)], (2000, 500), WINDOW, 1).unwrap();
        assert_eq!(calibration.num_tokens(), (2000, 500));
    }

    #[test]
    fn of_few_documents_the_end_of_each_is_held_out() {
        let mut documents = rows(&[800; 3], 0);
        for (n, row) in documents.iter_mut().enumerate() {
            row.tokens = (1000 * n as u32..).take(800).collect();
        }
        let calibration = Calibration::of(&[(documents, 1.0)], (1500, 300), WINDOW, 1).unwrap();
        let span = |batches: &[Windows], document: u32| {
            let tokens = batches.iter().flat_map(|batch| &batch.tokens);
            let own: Vec<u32> = tokens.filter(|id| **id / 1000 == document).map(|id| id % 1000).collect();
            (own.iter().min().copied().unwrap(), own.iter().max().copied().unwrap())
        };
        for document in 0..3 {
            let (fitted, held_out) =
                (span(&calibration.fitted, document), span(&calibration.held_out.windows, document));
            assert!(fitted.1 < held_out.0, "{document}: {fitted:?} and {held_out:?}");
        }
    }
}
