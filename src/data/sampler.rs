//! The order of training: which rows batch number `n` of a run holds, as a pure function of `n`.
//!
//! An epoch is: the documents that the weights give it ([`mix::epoch`]), shuffled by (seed, epoch), packed into rows
//! if asked for, the rows shuffled, and cut into batches. The last batch of an epoch holds what is left: dropping it
//! would lose documents, and filling it from the next epoch would show some twice before others once.

use super::batch::{Batch, Row};
use super::mix::{self, Part};
use super::{chance, pack};

/// How training data is ordered and cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    /// Decides every shuffle.
    pub seed: u64,
    /// Rows per batch.
    pub batch_size: usize,
    /// Fill rows with several documents up to `max_length` tokens; otherwise a row is one document.
    pub pack: bool,
    /// Tokens per packed row.
    pub max_length: usize,
}

/// Batches by number.
#[derive(Debug)]
pub struct Sampler<'a> {
    parts: &'a [Part],
    order: Order,
    /// The number of the first batch of each epoch known so far.
    starts: Vec<u64>,
    current: Option<Epoch>,
}

#[derive(Debug)]
struct Epoch {
    number: u64,
    rows: Vec<Vec<(usize, usize)>>,
}

impl<'a> Sampler<'a> {
    /// Over the training documents of a [`Dataset`](super::Dataset), at least one.
    ///
    /// # Panics
    ///
    /// Where no part has both documents and a weight above 0, a weight is infinite or NaN, or `order.batch_size` is 0.
    #[must_use]
    pub fn new(parts: &'a [Part], order: Order) -> Self {
        let counts = |part: &Part| !part.rows.is_empty() && part.weight > 0.0;
        assert!(parts.iter().any(counts), "a data set has at least one document that its weight shows");
        assert!(
            parts.iter().all(|part| part.weight.is_finite()),
            "the weight of a source is a finite number"
        );
        assert!(order.batch_size > 0, "a batch has at least one row");
        Self { parts, order, starts: vec![0], current: None }
    }

    /// Micro-batch number `index` of the run, counted from zero over all epochs.
    pub fn batch(&mut self, index: u64) -> Batch {
        let (number, within) = self.place(index);
        let (parts, batch_size) = (self.parts, self.order.batch_size);
        let first = within as usize * batch_size;
        let rows = &self.epoch(number).rows;
        let last = rows.len().min(first + batch_size);
        rows[first..last].iter().flatten().map(|&(part, row)| &parts[part].rows[row]).collect()
    }

    /// The epoch that batch `index` belongs to, and its number within it.
    pub fn place(&mut self, index: u64) -> (u64, u64) {
        while self.starts[self.starts.len() - 1] <= index {
            self.measure_next();
        }
        let epoch = self.starts.partition_point(|&start| start <= index) - 1;
        (epoch as u64, index - self.starts[epoch])
    }

    /// How many batches the first `epochs` epochs have. Epochs differ where the weights are not whole numbers.
    pub fn batches_before(&mut self, epochs: u64) -> u64 {
        while self.starts.len() as u64 <= epochs {
            self.measure_next();
        }
        self.starts[epochs as usize]
    }

    /// How many batches epoch `number` has.
    pub fn batches_in(&mut self, number: u64) -> u64 {
        self.batches_before(number + 1) - self.batches_before(number)
    }

    fn measure_next(&mut self) {
        let number = self.starts.len() as u64 - 1;
        let rows = self.epoch(number).rows.len();
        self.starts.push(self.starts[number as usize] + rows.div_ceil(self.order.batch_size) as u64);
    }

    fn epoch(&mut self, number: u64) -> &Epoch {
        let (parts, order) = (self.parts, self.order);
        match &mut self.current {
            Some(epoch) if epoch.number == number => {}
            current => *current = Some(Epoch { number, rows: rows(parts, order, number) }),
        }
        self.current.as_ref().expect("set just above")
    }
}

fn rows(parts: &[Part], order: Order, epoch: u64) -> Vec<Vec<(usize, usize)>> {
    let mut documents = mix::epoch(parts, order.seed, epoch);
    chance::shuffle(&mut documents, &mut chance::generator("documents", &[order.seed, epoch]));
    if !order.pack {
        return documents.into_iter().map(|document| vec![document]).collect();
    }

    let length = |&(part, row): &(usize, usize)| parts[part].rows[row].tokens.len();
    let lengths: Vec<usize> = documents.iter().map(length).collect();
    let mut rows = pack::pack(&lengths, order.max_length);
    chance::shuffle(&mut rows, &mut chance::generator("rows", &[order.seed, epoch]));
    rows.into_iter().map(|row| row.into_iter().map(|i| documents[i]).collect()).collect()
}

/// The rows of all parts, in the order of the files.
pub(crate) fn all_rows(parts: &[Part]) -> impl Iterator<Item = &Row> {
    parts.iter().flat_map(|part| &part.rows)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn part(lengths: &[usize], first: u64, weight: f64) -> Part {
        let rows = lengths
            .iter()
            .zip(first..)
            .map(|(&length, document)| Row {
                tokens: vec![document as u32; length],
                supervised: (0..length).map(|i| i > 0).collect(),
                document,
            })
            .collect();
        Part { rows, weight }
    }

    fn counts(sampler: &mut Sampler<'_>, epochs: std::ops::Range<u64>) -> BTreeMap<u64, usize> {
        let mut counts = BTreeMap::new();
        for index in sampler.batches_before(epochs.start)..sampler.batches_before(epochs.end) {
            sampler.batch(index).documents.iter().for_each(|&number| *counts.entry(number).or_default() += 1);
        }
        counts
    }

    #[test]
    fn the_last_batch_of_an_epoch_is_smaller() {
        let parts = [part(&[2; 5], 0, 1.0)];
        let mut sampler = Sampler::new(&parts, Order { seed: 1, batch_size: 2, pack: false, max_length: 8 });
        let sizes: Vec<usize> = (0..6).map(|index| sampler.batch(index).num_documents()).collect();
        assert_eq!(sizes, [2, 2, 1, 2, 2, 1]);
        assert_eq!(sampler.place(4), (1, 1));
        assert_eq!(sampler.batches_in(3), 3);
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let parts = [part(&[2; 20], 0, 1.0)];
        let order = Order { seed: 1, batch_size: 20, pack: false, max_length: 8 };
        let mut sampler = Sampler::new(&parts, order);
        assert_ne!(sampler.batch(0), sampler.batch(1));
        assert_ne!(sampler.batch(0), Sampler::new(&parts, Order { seed: 2, ..order }).batch(0));
    }

    #[test]
    fn an_epoch_without_documents_is_passed_over() {
        let parts = [part(&[2; 2], 0, 0.1)];
        let mut sampler = Sampler::new(&parts, Order { seed: 1, batch_size: 1, pack: true, max_length: 8 });
        assert_eq!((sampler.place(0), sampler.place(1)), ((4, 0), (9, 0)));
    }

    proptest! {
        #[test]
        fn nothing_is_lost_doubled_or_dependent_on_the_way_there(
            lengths in prop::collection::vec(2usize..32, 1..40),
            other in prop::collection::vec(2usize..32, 0..20),
            batch_size in 1usize..5,
            pack: bool,
            seed: u64,
        ) {
            let parts = [part(&lengths, 0, 2.0), part(&other, lengths.len() as u64, 0.5)];
            let order = Order { seed, batch_size, pack, max_length: 32 };
            let mut sampler = Sampler::new(&parts, order);
            for (document, count) in counts(&mut sampler, 0..2) {
                prop_assert_eq!(count, if (document as usize) < lengths.len() { 4 } else { 1 });
            }
            let total = sampler.batches_before(3);
            let straight: Vec<Batch> = (0..total).map(|index| sampler.batch(index)).collect();
            for index in (0..total).rev() {
                let resumed = Sampler::new(&parts, order).batch(index);
                prop_assert_eq!(&straight[index as usize], &resumed);
                prop_assert!(resumed.tokens.len() <= 32 * batch_size);
            }
        }
    }
}
