//! Rows and batches: documents end to end, without padding.
//!
//! A batch is flat: `tokens` `[tokens]`, `supervised` `[tokens]`, `offsets` `[num_documents + 1]`.

use sha2::{Digest, Sha256};

/// One document as the model will see it: its tokens, and which of them are to be learned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Token ids; at least two.
    pub tokens: Vec<u32>,
    /// For each token whether the loss counts its prediction (from the tokens before it). The first is never counted.
    pub supervised: Vec<bool>,
    /// The stable number of the document in its data set.
    pub document: u64,
}

impl Row {
    /// How many tokens are learned.
    #[must_use]
    pub fn num_supervised(&self) -> usize {
        self.supervised.iter().filter(|&&counted| counted).count()
    }

    /// SHA-256 over length, tokens and labels: equal exactly for documents that are the same to the model.
    pub(crate) fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update((self.tokens.len() as u64).to_le_bytes());
        for (token, &counted) in self.tokens.iter().zip(&self.supervised) {
            hash.update(token.to_le_bytes());
            hash.update([u8::from(counted)]);
        }
        hash.finalize().into()
    }
}

/// Documents end to end, without padding: what one forward pass sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Token ids of all documents.
    pub tokens: Vec<u32>,
    /// As in [`Row`].
    pub supervised: Vec<bool>,
    /// Where each document begins, and the end: `num_documents + 1` entries.
    pub offsets: Vec<usize>,
    /// The stable number of each document.
    pub documents: Vec<u64>,
}

impl Default for Batch {
    fn default() -> Self {
        Self { tokens: Vec::new(), supervised: Vec::new(), offsets: vec![0], documents: Vec::new() }
    }
}

impl<'a> FromIterator<&'a Row> for Batch {
    fn from_iter<I: IntoIterator<Item = &'a Row>>(rows: I) -> Self {
        let mut batch = Self::default();
        for row in rows {
            batch.push(&row.tokens, &row.supervised, row.document);
        }
        batch
    }
}

impl Batch {
    /// How many documents it holds.
    #[must_use]
    pub fn num_documents(&self) -> usize {
        self.documents.len()
    }

    /// How many tokens are learned.
    #[must_use]
    pub fn num_supervised(&self) -> usize {
        self.supervised.iter().filter(|&&counted| counted).count()
    }

    /// For each token that is learned, the token before it, whose hidden state predicts it, and the token itself:
    /// `(rows, targets)`.
    #[must_use]
    pub fn targets(&self) -> (Vec<u32>, Vec<u32>) {
        let learned = self.supervised.iter().enumerate().skip(1).filter(|(_, counted)| **counted);
        learned.map(|(index, _)| (index as u32 - 1, self.tokens[index])).unzip()
    }

    /// The same documents in the same order in batches of at most `token_budget` tokens, cut between documents only:
    /// a longer document is a batch of its own.
    #[must_use]
    pub fn pieces(&self, token_budget: usize) -> Vec<Self> {
        let mut pieces: Vec<Self> = Vec::new();
        for (number, span) in self.documents.iter().zip(self.offsets.windows(2)) {
            let (tokens, supervised) = (&self.tokens[span[0]..span[1]], &self.supervised[span[0]..span[1]]);
            match pieces.last_mut() {
                Some(piece) if piece.tokens.len() + tokens.len() <= token_budget => {
                    piece.push(tokens, supervised, *number);
                }
                _ => {
                    let mut piece = Self::default();
                    piece.push(tokens, supervised, *number);
                    pieces.push(piece);
                }
            }
        }
        pieces
    }

    fn push(&mut self, tokens: &[u32], supervised: &[bool], document: u64) {
        self.tokens.extend_from_slice(tokens);
        self.supervised.extend_from_slice(supervised);
        self.offsets.push(self.tokens.len());
        self.documents.push(document);
    }
}

/// Rows in their own order, in batches of at most `token_budget` tokens; a longer row is a batch of its own.
#[must_use]
pub fn eval_batches(rows: &[Row], token_budget: usize) -> Vec<Batch> {
    rows.iter().collect::<Batch>().pieces(token_budget)
}

/// SHA-256, in hexadecimal, over the tokens and labels of all rows in order: a resumed run compares it to see that
/// its data is what it was.
pub fn fingerprint<'a>(rows: impl IntoIterator<Item = &'a Row>) -> String {
    let mut hash = Sha256::new();
    for row in rows {
        hash.update(row.digest());
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(document: u64, length: usize) -> Row {
        let supervised = (0..length).map(|i| i > 0).collect();
        Row { tokens: vec![document as u32; length], supervised, document }
    }

    #[test]
    fn rows_lie_end_to_end() {
        let batch: Batch = [row(0, 3), row(1, 2)].iter().collect();
        assert_eq!(batch.tokens, [0, 0, 0, 1, 1]);
        assert_eq!(batch.supervised, [false, true, true, false, true]);
        assert_eq!(batch.offsets, [0, 3, 5]);
        assert_eq!((batch.documents.as_slice(), batch.num_supervised()), ([0, 1].as_slice(), 3));
    }

    #[test]
    fn evaluation_keeps_the_order_and_the_budget() {
        let rows = [row(0, 3), row(1, 2), row(2, 9), row(3, 1), row(4, 4)];
        let batches = eval_batches(&rows, 5);
        let documents: Vec<Vec<u64>> = batches.iter().map(|batch| batch.documents.clone()).collect();
        assert_eq!(documents, [vec![0, 1], vec![2], vec![3, 4]]);
        assert!(eval_batches(&[], 5).is_empty());
    }

    #[test]
    fn the_fingerprint_sees_tokens_labels_and_boundaries() {
        let rows = [row(0, 3), row(0, 2)];
        let mut relabelled = rows.clone();
        relabelled[0].supervised[1] = false;
        let one = [row(0, 5)];
        let prints = [fingerprint(&rows), fingerprint(&relabelled), fingerprint(&one), fingerprint(&[])];
        assert_eq!(prints[0], fingerprint(&rows.clone()));
        for (i, print) in prints.iter().enumerate() {
            assert_eq!(print.len(), 64);
            assert!(!prints[..i].contains(print));
        }
    }
}
