//! Which slices make each step's batch, and their tensors, a few batches ahead of the network.
//!
//! In: the cache's rows. Out: batches `[image, 3, 256, 256]` u8 with label and weight of each image. Every choice follows
//! from (seed, epoch, position), so a run can be continued anywhere.

mod augment;
mod sample;

use std::path::Path;
use std::sync::mpsc::sync_channel;

use anyhow::{Context, Result, ensure};
use shared::TENSOR_BYTES;

pub use self::augment::{Augmentation, Change, augment, changes};
pub use self::sample::{Sample, Sampling};
use crate::cache::Cache;

/// Batches that are read ahead of the one in work.
pub const PREFETCHED_BATCHES: usize = 2;

/// Streams of the run's seed; the network's first weights use 0 to 99.
const STREAM_SAMPLE: u64 = 1 << 32;
const STREAM_SHUFFLE: u64 = 2 << 32;
const STREAM_AUGMENT: u64 = 3 << 32;

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
