//! Ranges of activations: what interval of each tensor the 256 levels of u8 shall cover.
//!
//! In: the f32 graph and calibration images. Out: a [`Histogram`] a tensor, filled image by image so that memory does not
//! grow with their number, and from it candidate intervals: min-max, percentiles, smallest squared error, smallest
//! relative entropy. Which candidate a tensor gets is decided by [`crate::quantize`], by the error of the logit.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;

use crate::execute::{ExecuteError, FloatGraph, Tensor};

/// Bins of a histogram, over `[-limit, limit]`.
pub const BINS: usize = 8192;
/// Levels of a u8 activation above its zero.
const LEVELS: f64 = 255.0;
/// Shares of the values that the percentile candidates keep.
const PERCENTILES: [f64; 3] = [0.999, 0.9999, 0.99999];

/// How an interval was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Smallest and largest value seen.
    MinMax,
    /// A share of the values on each side lies outside; the largest of 99.9, 99.99 and 99.999 % whose error is least.
    Percentile,
    /// Least mean squared error of the quantized values.
    Mse,
    /// Least relative entropy between the values' distribution and the quantized one (Migacz, "8-bit inference with TensorRT", 2017).
    Entropy,
    /// The range that the weights were trained with.
    #[value(skip)]
    Trained,
}

/// A closed interval that holds 0.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// At most 0.
    pub low: f32,
    /// At least 0.
    pub high: f32,
}

/// Counts of a tensor's values, with a range that doubles when a value lies outside.
#[derive(Clone, Debug)]
pub struct Histogram {
    bins: Vec<u64>,
    limit: f32,
    zeros: u64,
    low: f32,
    high: f32,
    count: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            bins: vec![0; BINS],
            limit: 0.0,
            zeros: 0,
            low: 0.0,
            high: 0.0,
            count: 0,
        }
    }
}

impl Histogram {
    /// Counts `values`; NaN and infinities are left out.
    pub fn add(&mut self, values: &[f32]) {
        let extent = Extent::of(values);
        if extent.n_finite < values.len() {
            let finite = values.iter().copied().filter(|value| value.is_finite());
            return self.add(&finite.collect::<Vec<f32>>());
        }
        self.low = self.low.min(extent.low);
        self.high = self.high.max(extent.high);
        self.widen(extent.high.max(-extent.low));
        self.zeros += extent.n_zeros as u64;
        self.count += values.len() as u64;
        if self.limit > 0.0 {
            self.count_bins(values);
            self.bins[BINS / 2] -= extent.n_zeros as u64;
        }
    }

    /// Counts finite values, zeros among them, each in its bin.
    fn count_bins(&mut self, values: &[f32]) {
        const BLOCK: usize = 64;
        let half = (BINS / 2) as f32;
        let per_unit = half / self.limit;
        // Two tables: neighbours are often in one bin, and then wait for each other in one table.
        let mut tables = vec![[0_u32; BINS]; 2];
        for block in values.chunks(BLOCK) {
            let mut bins = [0_u16; BLOCK];
            for (bin, &value) in bins.iter_mut().zip(block) {
                *bin = bin_of(value, per_unit, half);
            }
            for (index, &bin) in bins[..block.len()].iter().enumerate() {
                tables[index % 2][usize::from(bin)] += 1;
            }
        }
        let [first, second] = &tables[..] else { return };
        for (bin, (a, b)) in self.bins.iter_mut().zip(first.iter().zip(second)) {
            *bin += u64::from(*a) + u64::from(*b);
        }
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, mut other: Self) {
        self.widen(other.limit);
        other.widen(self.limit);
        self.low = self.low.min(other.low);
        self.high = self.high.max(other.high);
        self.zeros += other.zeros;
        self.count += other.count;
        self.limit = self.limit.max(other.limit);
        for (bin, more) in self.bins.iter_mut().zip(&other.bins) {
            *bin += more;
        }
    }

    /// Values counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Doubles the range until `magnitude` lies inside. Limits are powers of two, so any two histograms can be merged.
    fn widen(&mut self, magnitude: f32) {
        if magnitude <= 0.0 {
            return;
        }
        if self.limit <= 0.0 {
            self.limit = magnitude.log2().ceil().clamp(-100.0, 100.0).exp2();
        }
        while self.limit < magnitude {
            self.limit *= 2.0;
            let mut merged = vec![0; BINS];
            for (index, &count) in self.bins.iter().enumerate() {
                merged[BINS / 4 + index / 2] += count;
            }
            self.bins = merged;
        }
    }

    /// The interval of every method.
    #[must_use]
    pub fn ranges(&self) -> BTreeMap<Method, Range> {
        let min_max = Range {
            low: self.low,
            high: self.high,
        };
        let of_percentiles = PERCENTILES.map(|share| self.percentile(share));
        let percentile = of_percentiles
            .into_iter()
            .min_by(|a, b| self.squared_error(*a).total_cmp(&self.squared_error(*b)));
        let shrunk = (1..=100_u8)
            .map(|step| f32::from(step) / 100.0)
            .map(|share| Range {
                low: self.low * share,
                high: self.high * share,
            });
        let mse = shrunk.min_by(|a, b| self.squared_error(*a).total_cmp(&self.squared_error(*b)));
        BTreeMap::from([
            (Method::MinMax, min_max),
            (Method::Percentile, percentile.unwrap_or(min_max)),
            (Method::Mse, mse.unwrap_or(min_max)),
            (Method::Entropy, self.entropy()),
        ])
    }

    /// Mean squared error of the counted values when quantized over `range`, taking a bin's values as evenly spread and at its centre.
    fn squared_error(&self, range: Range) -> f64 {
        let step = f64::from(range.high - range.low) / LEVELS;
        if step <= 0.0 {
            return if self.zeros == self.count {
                0.0
            } else {
                f64::INFINITY
            };
        }
        let occupied = self
            .bins
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0);
        let sum: f64 = occupied
            .map(|(index, &count)| {
                let value = self.centre(index);
                let outside = (value - f64::from(range.high)).max(f64::from(range.low) - value);
                let squared = if outside > 0.0 {
                    outside * outside
                } else {
                    step * step / 12.0
                };
                squared * as_f64(count)
            })
            .sum();
        sum / as_f64(self.count.max(1))
    }

    /// The interval that leaves `1 - share` of the values outside on each side.
    fn percentile(&self, share: f64) -> Range {
        let outside = as_f64(self.count) * (1.0 - share);
        let edge = |bins: &mut dyn Iterator<Item = usize>| {
            let mut seen = 0.0;
            for index in bins {
                seen += as_f64(self.bins[index]);
                if seen > outside {
                    return Some(index);
                }
            }
            None
        };
        let half = BINS / 2;
        let high = edge(&mut (half..BINS).rev()).map_or(0.0, |index| as_f32(self.centre(index)));
        let low = edge(&mut (0..half)).map_or(0.0, |index| as_f32(self.centre(index)));
        Range {
            low: low.max(self.low),
            high: high.min(self.high),
        }
    }

    /// Least relative entropy over the share of the range that is kept, in 128 steps; the zeros, which any interval represents exactly, are left out.
    fn entropy(&self) -> Range {
        let whole = Range {
            low: self.low,
            high: self.high,
        };
        let magnitudes: Vec<f64> = (0..BINS / 2)
            .map(|index| as_f64(self.bins[BINS / 2 + index] + self.bins[BINS / 2 - 1 - index]))
            .collect();
        let reach =
            f64::from(self.high.max(-self.low)) / f64::from(self.limit.max(f32::MIN_POSITIVE));
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of at most 1 of 4096 bins"
        )]
        let n_used =
            ((reach * as_f64(magnitudes.len() as u64)).ceil() as usize).clamp(1, magnitudes.len());
        let kept = (16..=128_usize).map(|step| (step, (n_used * step / 128).max(1)));
        let best = kept.min_by(|a, b| {
            divergence(&magnitudes[..n_used], a.1)
                .total_cmp(&divergence(&magnitudes[..n_used], b.1))
        });
        best.map_or(whole, |(step, _)| {
            let share = as_f32(as_f64(step as u64) / 128.0);
            Range {
                low: self.low * share,
                high: self.high * share,
            }
        })
    }

    fn centre(&self, index: usize) -> f64 {
        let half = as_f64(BINS as u64 / 2);
        (as_f64(index as u64) + 0.5 - half) / half * f64::from(self.limit)
    }
}

/// Relative entropy of the distribution `counts`, clipped to its first `n_kept` bins, against its 256-level version.
fn divergence(counts: &[f64], n_kept: usize) -> f64 {
    let outside: f64 = counts[n_kept..].iter().sum();
    let kept = &counts[..n_kept];
    let total: f64 = kept.iter().sum::<f64>() + outside;
    if total <= 0.0 {
        return 0.0;
    }
    let kept_total: f64 = kept.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let levels = n_kept.min(256);
    let mut sum = 0.0;
    for level in 0..levels {
        let group = level * n_kept / levels..(level + 1) * n_kept / levels;
        let occupied = kept[group.clone()]
            .iter()
            .filter(|count| **count > 0.0)
            .count();
        let mean = kept[group.clone()].iter().sum::<f64>() / as_f64(occupied.max(1) as u64);
        for index in group {
            let clipped = if index == n_kept - 1 { outside } else { 0.0 };
            let p = (kept[index] + clipped) / total;
            // A bin that holds nothing but clipped values has no counterpart: the usual small probability stands for it.
            let q = if kept[index] > 0.0 {
                mean / kept_total
            } else {
                1e-12
            };
            if p > 0.0 {
                sum += p * (p / q).ln();
            }
        }
    }
    sum
}

/// What a pass over the values shows at once.
struct Extent {
    /// At most 0.
    low: f32,
    /// At least 0.
    high: f32,
    n_zeros: usize,
    n_finite: usize,
}

impl Extent {
    fn of(values: &[f32]) -> Self {
        const LANES: usize = 16;
        let (mut low, mut high) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        let (mut zeros, mut finite) = ([0_u32; LANES], [0_u32; LANES]);
        let (blocks, rest) = values.as_chunks::<LANES>();
        let mut last = [0.0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        for block in blocks.iter().chain(std::iter::once(&last)) {
            for lane in 0..LANES {
                let value = block[lane];
                low[lane] = low[lane].min(value);
                high[lane] = high[lane].max(value);
                zeros[lane] += u32::from(value == 0.0);
                finite[lane] += u32::from(value.is_finite());
            }
        }
        let n_padding = LANES - rest.len();
        let total =
            |counts: [u32; LANES]| counts.iter().map(|&n| n as usize).sum::<usize>() - n_padding;
        Self {
            low: low.into_iter().fold(0.0, f32::min),
            high: high.into_iter().fold(0.0, f32::max),
            n_zeros: total(zeros),
            n_finite: total(finite),
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the product lies within 0..=BINS, and the cast saturates"
)]
fn bin_of(value: f32, per_unit: f32, half: f32) -> u16 {
    ((value * per_unit + half) as u16).min(BINS as u16 - 1)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts beyond 2^53 do not occur: that is 10^10 images"
)]
fn as_f64(count: u64) -> f64 {
    count as f64
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "an interval's end needs no more digits than f32"
)]
fn as_f32(value: f64) -> f32 {
    value as f32
}

/// What the images showed of every tensor.
#[derive(Clone, Debug, Default)]
pub struct Observation {
    /// Values of each tensor.
    pub histograms: BTreeMap<String, Histogram>,
    /// Largest magnitude of each channel of each tensor `[channel, ...]`.
    pub channel_magnitudes: BTreeMap<String, Vec<f32>>,
}

impl Observation {
    fn add(&mut self, name: &str, tensor: &Tensor) {
        self.histograms
            .entry(name.to_owned())
            .or_default()
            .add(&tensor.values);
        let channels = tensor.shape.first().copied().unwrap_or(1).max(1);
        let magnitudes = self
            .channel_magnitudes
            .entry(name.to_owned())
            .or_insert_with(|| vec![0.0; channels]);
        let planes = tensor
            .values
            .chunks_exact((tensor.values.len() / channels).max(1));
        for (magnitude, plane) in magnitudes.iter_mut().zip(planes) {
            *magnitude = plane
                .iter()
                .fold(*magnitude, |largest, value| largest.max(value.abs()));
        }
    }

    fn merge(mut self, other: Self) -> Self {
        for (name, histogram) in other.histograms {
            self.histograms.entry(name).or_default().merge(histogram);
        }
        for (name, magnitudes) in other.channel_magnitudes {
            let mine = self
                .channel_magnitudes
                .entry(name)
                .or_insert_with(|| vec![0.0; magnitudes.len()]);
            mine.iter_mut()
                .zip(magnitudes)
                .for_each(|(mine, other)| *mine = mine.max(other));
        }
        self
    }
}

/// Runs `graph` over `images`, each u8 `[3, 256, 256]`, and observes the tensors in `names`. The result does not depend on
/// the number of threads.
///
/// # Errors
///
/// As [`FloatGraph::advance`].
pub fn observe(
    graph: &FloatGraph,
    names: &[String],
    images: &[&[u8]],
    progress: &(dyn Fn() + Sync),
) -> Result<Observation, ExecuteError> {
    let observed = images
        .par_iter()
        .try_fold(Observation::default, |mut observation, image| {
            graph.logit(image, &mut |name, tensor| {
                if names.iter().any(|wanted| wanted == name) {
                    observation.add(name, tensor);
                }
            })?;
            progress();
            Ok(observation)
        });
    observed.try_reduce(
        Observation::default,
        |first, second| Ok(first.merge(second)),
    )
}

#[cfg(test)]
mod tests;
