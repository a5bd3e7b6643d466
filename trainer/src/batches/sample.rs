//! The slices of a part that a run uses, and the batches of each epoch.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::{STREAM_SAMPLE, STREAM_SHUFFLE};
use crate::cache::Cache;
use crate::index::Part;
use crate::random::Random;
use crate::split::{self, SplitBy};

/// Which slices of the training part are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Sampling {
    /// As many negative as positive slices, drawn once (the publication's).
    Balanced,
    /// As `balanced`, but the larger class is drawn anew in each epoch.
    BalancedEachEpoch,
    /// As many negative as positive slices, each positive one in one batch with a negative one: that of the same patient
    /// at the same height without the embolus where there is one (a thin phantom's training part), for every pair of the first epoch and for half of the others'; otherwise one at random.
    Matched,
    /// All slices; to be used with class weights.
    All,
}

/// The slices of a part that a run uses, positive and negative.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    positive: Vec<usize>,
    negative: Vec<usize>,
    /// Of a positive slice, the negative one at the same height of the same patient.
    twin: HashMap<usize, usize>,
}

impl Sample {
    /// The rows of `part`; by image the parts are drawn anew from `seed`.
    #[must_use]
    pub fn of_part(cache: &Cache, part: Part, by: SplitBy, seed: u64) -> Self {
        let mut sample = Self::default();
        for (index, row) in cache.rows().iter().enumerate() {
            let row_part = match by {
                SplitBy::Study => row.part,
                SplitBy::Image => {
                    split::part(by, seed, row.study_uid.as_str(), row.sop_uid.as_str())
                }
            };
            if row_part == part {
                if row.pe_present {
                    &mut sample.positive
                } else {
                    &mut sample.negative
                }
                .push(index);
            }
        }
        // Heights are random reals: two slices with the same one are the same patient's.
        let height = |&row: &usize| cache.rows()[row].z_mm.map(f64::to_bits);
        let negative = sample.negative.iter();
        let by_height: HashMap<u64, usize> = negative
            .filter_map(|row| Some((height(row)?, *row)))
            .collect();
        let positive = sample.positive.iter();
        sample.twin = positive
            .filter_map(|row| Some((*row, *by_height.get(&height(row)?)?)))
            .collect();
        sample
    }

    /// At most `n` slices with the classes as they are balanced by `sampling`, drawn from `seed`.
    #[must_use]
    pub fn drawn(mut self, sampling: Sampling, n: Option<usize>, seed: u64) -> Self {
        let mut random = Random::new(seed, STREAM_SAMPLE);
        random.shuffle(&mut self.positive);
        random.shuffle(&mut self.negative);
        let n = n.unwrap_or(usize::MAX);
        match sampling {
            Sampling::Balanced => {
                let each = (n / 2).min(self.positive.len()).min(self.negative.len());
                self.positive.truncate(each);
                self.negative.truncate(each);
            }
            Sampling::BalancedEachEpoch | Sampling::Matched => {
                self.positive.truncate(n / 2);
                self.negative.truncate(n / 2);
            }
            Sampling::All => {
                // The same share of both classes.
                let all = self.len();
                if n < all {
                    let positive = self.positive.len() * n / all;
                    self.negative.truncate(n - positive);
                    self.positive.truncate(positive);
                }
            }
        }
        self.positive.sort_unstable();
        self.negative.sort_unstable();
        self
    }

    /// Number of slices.
    #[must_use]
    pub fn len(&self) -> usize {
        self.positive.len() + self.negative.len()
    }

    /// Whether there is no slice.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of slices with and without PE.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.positive.len(), self.negative.len())
    }

    /// All rows, in order.
    #[must_use]
    pub fn rows(&self) -> Vec<usize> {
        let mut rows = [self.positive.as_slice(), &self.negative].concat();
        rows.sort_unstable();
        rows
    }

    /// The batches of an epoch: its rows in an order drawn from (seed, epoch), the last batch as short as it comes.
    #[must_use]
    pub fn epoch(
        &self,
        sampling: Sampling,
        batch: usize,
        seed: u64,
        epoch: u32,
    ) -> Vec<Vec<usize>> {
        let mut random = Random::new(seed, STREAM_SHUFFLE + u64::from(epoch));
        if sampling == Sampling::Matched {
            let pairs = self.pairs(epoch, &mut random);
            return pairs.chunks(batch.max(2)).map(<[usize]>::to_vec).collect();
        }
        let mut rows = if sampling == Sampling::BalancedEachEpoch {
            let each = self.positive.len().min(self.negative.len());
            let mut rows = Vec::with_capacity(2 * each);
            for class in [&self.positive, &self.negative] {
                let mut class = class.clone();
                random.shuffle(&mut class);
                rows.extend_from_slice(&class[..each]);
            }
            rows
        } else {
            self.rows()
        };
        random.shuffle(&mut rows);
        rows.chunks(batch.max(1)).map(<[usize]>::to_vec).collect()
    }
}

impl Sample {
    /// Positive and negative slices in turn, as [`Sampling::Matched`] says.
    fn pairs(&self, epoch: u32, random: &mut Random) -> Vec<usize> {
        let mut positive = self.positive.clone();
        random.shuffle(&mut positive);
        let mut rows = Vec::with_capacity(2 * positive.len());
        for row in positive {
            let is_matched = epoch == 0 || random.below(2) == 0;
            let twin = self.twin.get(&row).filter(|_| is_matched);
            let other = || self.negative.get(random.below(self.negative.len()));
            if let Some(&negative) = twin.or_else(other) {
                rows.extend([row, negative]);
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(positive: usize, negative: usize) -> Sample {
        Sample {
            positive: (0..positive).collect(),
            negative: (positive..positive + negative).collect(),
            twin: (0..positive.min(negative))
                .map(|row| (row, positive + row))
                .collect(),
        }
    }

    #[test]
    fn balanced_sample_has_as_many_of_both() {
        assert_eq!(
            sample(7, 90).drawn(Sampling::Balanced, None, 1).counts(),
            (7, 7)
        );
        assert_eq!(
            sample(70, 90)
                .drawn(Sampling::Balanced, Some(51), 1)
                .counts(),
            (25, 25)
        );
        assert_eq!(
            sample(10, 90).drawn(Sampling::All, Some(50), 1).counts(),
            (5, 45)
        );
        assert_eq!(
            sample(10, 90).drawn(Sampling::All, None, 1).counts(),
            (10, 90)
        );
    }

    #[test]
    fn epoch_visits_every_slice_once_and_keeps_the_last_partial_batch() {
        let all = sample(5, 18);
        let steps = all.epoch(Sampling::All, 10, 3, 0);
        assert_eq!(steps.iter().map(Vec::len).collect::<Vec<_>>(), [10, 10, 3]);
        let mut rows = steps.concat();
        assert_ne!(rows, all.epoch(Sampling::All, 10, 3, 1).concat());
        assert_eq!(rows, all.epoch(Sampling::All, 10, 3, 0).concat());
        rows.sort_unstable();
        assert_eq!(rows, (0..23).collect::<Vec<_>>());
    }

    #[test]
    fn balanced_epochs_draw_other_negatives() {
        let all = sample(5, 100).drawn(Sampling::BalancedEachEpoch, None, 1);
        let (first, second) = (
            all.epoch(Sampling::BalancedEachEpoch, 4, 3, 0),
            all.epoch(Sampling::BalancedEachEpoch, 4, 3, 1),
        );
        assert_eq!(first.concat().len(), 10);
        let set = |steps: &[Vec<usize>]| {
            steps
                .concat()
                .into_iter()
                .collect::<std::collections::BTreeSet<_>>()
        };
        assert_ne!(set(&first), set(&second));
    }

    #[test]
    fn matched_batches_pair_each_positive_with_its_twin() {
        let all = sample(50, 60);
        let is_twin = |pair: &&[usize]| pair[1] == pair[0] + 50;
        let count = |epoch| {
            let rows = all.epoch(Sampling::Matched, 8, 3, epoch).concat();
            assert_eq!(rows.len(), 100);
            rows.chunks(2).filter(is_twin).count()
        };
        assert_eq!(count(0), 50);
        assert!((15..40).contains(&count(1)));
    }
}
