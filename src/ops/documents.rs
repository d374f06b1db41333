//! The layout of a flat batch: documents end to end in one row of tokens, without padding.

use std::ops::Range;

/// Where each document of a flat batch begins and ends, and which one it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Documents {
    /// `num_documents + 1` token offsets, beginning with 0.
    offsets: Vec<usize>,
    /// The stable number of each document in its data set; dropout masks depend on it, not on the batch.
    ids: Vec<u64>,
    /// The position of each document's first token: 0 in training, the length of its cache in decoding.
    starts: Vec<usize>,
}

impl Documents {
    /// Documents that begin at position 0. `offsets` has one entry more than `ids`, begins with 0 and never falls.
    ///
    /// # Panics
    ///
    /// Where `offsets` is anything else: ops write the rows of different documents from different threads, so these must
    /// not overlap and must cover the batch.
    #[must_use]
    pub fn new(offsets: Vec<usize>, ids: Vec<u64>) -> Self {
        assert!(
            ids.len().checked_add(1) == Some(offsets.len()),
            "{} offsets of documents, expected one more than the {} documents",
            offsets.len(),
            ids.len()
        );
        assert!(offsets[0] == 0, "the first document begins at token {}, expected 0", offsets[0]);
        assert!(offsets.is_sorted(), "the offsets of documents must never fall");
        let starts = vec![0; ids.len()];
        Self { offsets, ids, starts }
    }

    /// One document of `len` tokens whose first token stands at position `start`.
    #[must_use]
    pub fn single(len: usize, start: usize) -> Self {
        Self { offsets: vec![0, len], ids: vec![0], starts: vec![start] }
    }

    /// Documents of one token each, which stand at these positions. Their numbers are those of [`Documents::single`], so that
    /// what depends on the number is the same for one of many.
    #[must_use]
    pub fn next_of_each(starts: Vec<usize>) -> Self {
        Self { offsets: (0..=starts.len()).collect(), ids: vec![0; starts.len()], starts }
    }

    /// Each document on its own, with its token range.
    pub fn singles(&self) -> impl ExactSizeIterator<Item = (Range<usize>, Self)> + '_ {
        self.ranges()
            .zip(&self.starts)
            .map(|(range, start)| (range.clone(), Self::single(range.len(), *start)))
    }

    /// Tokens in all documents together.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        self.offsets.last().copied().unwrap_or(0)
    }

    /// The position of the first token of a single document; of several the largest of their positions.
    #[must_use]
    pub fn start(&self) -> usize {
        self.starts.iter().copied().max().unwrap_or(0)
    }

    /// The token range of each document.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = Range<usize>> + '_ {
        self.offsets.windows(2).map(|pair| pair[0]..pair[1])
    }

    /// For each token its document's number and its position there.
    pub fn places(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        let begins = self.ids.iter().zip(&self.starts);
        self.ranges()
            .zip(begins)
            .flat_map(|(range, (&id, &start))| (0..range.len()).map(move |i| (id, (start + i) as u32)))
    }

    /// Returns the document number of one token and its position there. Panics for a token that is in no document.
    fn place(&self, token: usize) -> (u64, u32) {
        assert!(token < self.num_tokens(), "token {token} of {}", self.num_tokens());
        let document = self.offsets.partition_point(|offset| *offset <= token) - 1;
        (self.ids[document], (self.starts[document] + token - self.offsets[document]) as u32)
    }

    /// The position of each token in its document.
    #[must_use]
    pub fn positions(&self) -> Vec<u32> {
        self.places().map(|(_, position)| position).collect()
    }
}

/// What a forward pass is given beside its input.
#[derive(Debug, Clone, Copy)]
pub struct Pass<'a> {
    /// The documents of the batch.
    pub documents: &'a Documents,
    /// The optimizer step whose dropout masks apply; `None` switches dropout off.
    pub dropout_step: Option<u64>,
    /// The token of each row of the input; `None`: rows are the tokens.
    pub rows: Option<&'a [u32]>,
    /// The ids of the tokens, for routers that go by them.
    pub ids: Option<&'a [u32]>,
}

impl<'a> Pass<'a> {
    /// A pass without dropout: evaluation, generation.
    #[must_use]
    pub fn inference(documents: &'a Documents) -> Self {
        Self { documents, dropout_step: None, rows: None, ids: None }
    }

    /// A pass of training, with the dropout masks of a step; without dropout when that is `None`.
    #[must_use]
    pub fn training(documents: &'a Documents, dropout_step: Option<u64>) -> Self {
        Self { documents, dropout_step, rows: None, ids: None }
    }

    /// The same pass over rows that are these tokens.
    #[must_use]
    pub fn of_rows<'r>(&self, rows: &'r [u32]) -> Pass<'r>
    where
        'a: 'r,
    {
        Pass { rows: Some(rows), ..*self }
    }

    /// The same pass over tokens of these ids.
    #[must_use]
    pub fn with_ids<'r>(&self, ids: &'r [u32]) -> Pass<'r>
    where
        'a: 'r,
    {
        Pass { ids: Some(ids), ..*self }
    }

    /// Rows of the input.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.rows.map_or_else(|| self.documents.num_tokens(), <[u32]>::len)
    }

    /// Of each row the document's number and the position there.
    #[must_use]
    pub fn places(&self) -> Vec<(u64, u32)> {
        match self.rows {
            None => self.documents.places().collect(),
            Some(rows) => rows.iter().map(|token| self.documents.place(*token as usize)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    #[test]
    fn documents_that_overlap_or_leave_tokens_out_are_refused() {
        for (offsets, ids) in [
            (vec![], vec![]),
            (vec![1, 2], vec![0]),
            (vec![0, 40, 10, 64], vec![0, 1, 2]),
            (vec![0, 2], vec![]),
            (vec![0, 2], vec![0, 1]),
        ] {
            assert!(catch_unwind(|| Documents::new(offsets.clone(), ids)).is_err(), "{offsets:?}");
        }
        assert_eq!(Documents::new(vec![0], vec![]).num_tokens(), 0);
        assert_eq!(Documents::new(vec![0, 2, 2, 5], vec![7, 8, 9]).num_tokens(), 5);
    }
}
