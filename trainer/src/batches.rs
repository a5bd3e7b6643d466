//! Which slices make each step's batch, and their tensors, a few batches ahead of the network.
//!
//! In: the cache's rows. Out: batches `[image, 3, 256, 256]` u8 with label and weight of each image. Every choice follows
//! from (seed, epoch, position), so a run can be continued anywhere.

use std::collections::HashMap;
use std::path::Path;
use std::sync::mpsc::sync_channel;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use shared::{CHANNELS, SIDE, TENSOR_BYTES};

use crate::cache::Cache;
use crate::index::Part;
use crate::random::Random;
use crate::split::{self, SplitBy};

/// Batches that are read ahead of the one in work.
pub const PREFETCHED_BATCHES: usize = 2;

/// Streams of the run's seed; the network's first weights use 0 to 99.
const STREAM_SAMPLE: u64 = 1 << 32;
const STREAM_SHUFFLE: u64 = 2 << 32;
const STREAM_AUGMENT: u64 = 3 << 32;

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

/// Small changes of the training images; all off by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct Augmentation {
    /// Mirror half of the training slices left to right. Loses the side of the embolus
    #[arg(long)]
    pub flip: bool,
    /// Move each training slice by up to this many pixels in both directions
    #[arg(long, value_name = "PIXELS", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=64))]
    pub shift: u16,
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

/// The steps of an order file: one line a step, the cache rows of its batch separated by spaces.
///
/// # Errors
/// A file that cannot be read, a word that is no row of the cache, an empty line.
pub fn read_order(path: &Path, n_rows: usize) -> Result<Vec<Vec<usize>>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let mut steps = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let at = || format!("{} line {}", path.display(), index + 1);
        let rows: Vec<usize> = line
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()
            .with_context(at)?;
        ensure!(!rows.is_empty(), "{}: no rows", at());
        ensure!(
            rows.iter().all(|&row| row < n_rows),
            "{}: a row is not below {n_rows}",
            at()
        );
        steps.push(rows);
    }
    Ok(steps)
}

/// One step's images.
#[derive(Debug)]
pub struct Batch {
    /// u8 `[image, 3, 256, 256]`.
    pub images: Vec<u8>,
    /// Label (0 or 1) and weight of each image, `[image, 2]`.
    pub targets: Vec<f32>,
}

impl Batch {
    /// Number of images.
    #[must_use]
    pub fn n_images(&self) -> usize {
        self.targets.len() / 2
    }
}

/// Reads the tensors of `rows`; `weights` are those of the negative and the positive class.
#[must_use]
pub fn read_batch(cache: &Cache, rows: &[usize], weights: [f32; 2]) -> Batch {
    let mut images = Vec::with_capacity(rows.len() * TENSOR_BYTES);
    let mut targets = Vec::with_capacity(rows.len() * 2);
    for &row in rows {
        images.extend_from_slice(cache.tensor(row));
        let pe_present = cache.rows()[row].pe_present;
        targets.extend([
            f32::from(u8::from(pe_present)),
            weights[usize::from(pe_present)],
        ]);
    }
    Batch { images, targets }
}

/// Calls `f` with each of `steps` (from number `first` on) in order, reading at most [`PREFETCHED_BATCHES`] ahead, until
/// `f` says false or fails.
///
/// # Errors
/// What `f` says.
pub fn for_each_batch(
    cache: &Cache,
    steps: &[Vec<usize>],
    first: usize,
    weights: [f32; 2],
    augment: impl Fn(usize, &mut Batch) + Send,
    mut f: impl FnMut(usize, Batch) -> Result<bool>,
) -> Result<()> {
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(PREFETCHED_BATCHES);
        scope.spawn(move || {
            for (index, rows) in steps.iter().enumerate().skip(first) {
                let mut batch = read_batch(cache, rows, weights);
                augment(index, &mut batch);
                // The receiver is gone when training stopped.
                if sender.send((index, batch)).is_err() {
                    return;
                }
            }
        });
        // Moved in, so that it is dropped, and the reader stops, when `f` fails.
        let receiver = receiver;
        for (index, batch) in &receiver {
            if !f(index, batch)? {
                break;
            }
        }
        Ok(())
    })
}

/// Changes the images of a batch in place; the changes follow from (seed, epoch, step in the epoch). `first` is the place of the batch's first image
/// among those of the whole step, of which other ranks hold the rest.
pub fn augment(
    options: Augmentation,
    seed: u64,
    epoch: u32,
    step: usize,
    first: usize,
    batch: &mut Batch,
) {
    if options == Augmentation::default() {
        return;
    }
    let stream = STREAM_AUGMENT
        .wrapping_add(u64::from(epoch) << 40)
        .wrapping_add(step as u64);
    let mut random = Random::new(seed, stream);
    let shift = usize::from(options.shift);
    let mut change = || {
        let is_flipped = options.flip && random.below(2) == 1;
        (
            is_flipped,
            random.below(2 * shift + 1),
            random.below(2 * shift + 1),
        )
    };
    for _ in 0..first {
        change();
    }
    for image in batch.images.chunks_exact_mut(TENSOR_BYTES) {
        let (is_flipped, down, right) = change();
        let before = image.to_vec();
        for plane in 0..CHANNELS {
            for row in 0..SIDE {
                for column in 0..SIDE {
                    let from_column = if is_flipped {
                        SIDE - 1 - column
                    } else {
                        column
                    };
                    let from = (row + down)
                        .checked_sub(shift)
                        .zip((from_column + right).checked_sub(shift));
                    let value = match from {
                        Some((row, column)) if row < SIDE && column < SIDE => {
                            before[(plane * SIDE + row) * SIDE + column]
                        }
                        _ => 0,
                    };
                    image[(plane * SIDE + row) * SIDE + column] = value;
                }
            }
        }
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

    #[test]
    fn flip_and_shift_move_the_image() {
        let mut images = vec![0u8; TENSOR_BYTES];
        images[100 * SIDE + 20] = 9;
        let count = |images: &[u8]| images.iter().filter(|&&value| value == 9).count();
        for step in 0..8 {
            let mut batch = Batch {
                images: images.clone(),
                targets: vec![1.0, 1.0],
            };
            augment(
                Augmentation {
                    flip: true,
                    shift: 5,
                },
                1,
                0,
                step,
                0,
                &mut batch,
            );
            assert_eq!(count(&batch.images), 1);
            let at = batch.images.iter().position(|&value| value == 9).unwrap();
            let (row, column) = (at / SIDE, at % SIDE);
            assert!((95..=105).contains(&row));
            assert!(
                (15..=25).contains(&column) || (230..=240).contains(&column),
                "{column}"
            );
        }
    }

    #[test]
    fn images_change_alike_whichever_rank_has_them() {
        let mut random = Random::new(3, 0);
        let mut whole = Batch {
            images: (0..3 * TENSOR_BYTES)
                .map(|_| u8::try_from(random.below(256)).unwrap())
                .collect(),
            targets: vec![1.0; 6],
        };
        let options = Augmentation {
            flip: true,
            shift: 5,
        };
        let mut second = Batch {
            images: whole.images[TENSOR_BYTES..].to_vec(),
            targets: vec![1.0; 4],
        };
        augment(options, 1, 2, 7, 0, &mut whole);
        augment(options, 1, 2, 7, 1, &mut second);
        assert!(whole.images[TENSOR_BYTES..] == second.images);
    }
}
