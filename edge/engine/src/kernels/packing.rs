//! Weights in the order in which a kernel reads them.
//!
//! In: a convolution's weights `[output channel, kernel row, byte of the row]`. Out: blocks of output channels, each
//! one contiguous stream that a kernel reads from front to back, aligned to a cache line.

use super::{Geometry, WeightFormat};

/// Bytes of a cache line, and of the widest register.
const LINE: usize = 64;

/// A block of output channels, ready for a kernel.
#[derive(Debug)]
pub(crate) struct PackedBlock {
    /// First output channel.
    pub(crate) first_channel: usize,
    /// Packed weights.
    pub(crate) weights: AlignedBytes,
    /// Bias of each channel, with the geometry's offset folded in.
    pub(crate) bias: Vec<i32>,
    /// Requantization scale of each channel.
    pub(crate) scale: Vec<f32>,
}

/// The weights of one convolution before packing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unpacked<'a> {
    /// s8 as bytes, `[output channel, kernel row, byte of the row]`.
    pub(crate) weights: &'a [u8],
    /// Rows of the kernel.
    pub(crate) kernel_rows: usize,
    /// Bytes of a kernel row, padded to a multiple of [`Geometry::group`].
    pub(crate) kernel_row_bytes: usize,
    /// Bias of each output channel.
    pub(crate) bias: &'a [i32],
    /// Requantization scale of each output channel.
    pub(crate) scale: &'a [f32],
}

/// Packs a convolution for one kernel. Channels beyond the last are zero: they compute 0 and cost only time.
pub(crate) fn pack(geometry: Geometry, layer: Unpacked<'_>) -> Vec<PackedBlock> {
    let n_channels = layer.bias.len();
    let block_channels = geometry.lanes * geometry.max_vectors;
    (0..n_channels)
        .step_by(block_channels)
        .map(|first| {
            let n = (n_channels - first)
                .min(block_channels)
                .next_multiple_of(geometry.lanes);
            pack_block(geometry, layer, first, n)
        })
        .collect()
}

fn pack_block(
    geometry: Geometry,
    layer: Unpacked<'_>,
    first_channel: usize,
    n: usize,
) -> PackedBlock {
    let filter_bytes = layer.kernel_rows * layer.kernel_row_bytes;
    let filters: Vec<&[u8]> = layer
        .weights
        .chunks_exact(filter_bytes)
        .skip(first_channel)
        .take(n)
        .collect();
    let zeros = vec![0; filter_bytes];
    let filter = |channel: usize| filters.get(channel).copied().unwrap_or(&zeros);

    let bytes_per_weight = match geometry.weight {
        WeightFormat::Bytes => 1,
        WeightFormat::EvenOddWords => 2,
    };
    let mut weights = AlignedBytes::zeroed(filter_bytes * n * bytes_per_weight);
    let vectors = weights.chunks_exact_mut(geometry.lanes * geometry.group * bytes_per_weight);
    let vectors_per_group = n / geometry.lanes;
    for (index, packed) in vectors.enumerate() {
        let (group, first) = (
            index / vectors_per_group,
            index % vectors_per_group * geometry.lanes,
        );
        for lane in 0..geometry.lanes {
            let weights = &filter(first + lane)[group * geometry.group..][..geometry.group];
            match geometry.weight {
                WeightFormat::Bytes => {
                    packed[lane * geometry.group..][..geometry.group].copy_from_slice(weights)
                }
                WeightFormat::EvenOddWords => pack_even_odd(weights, packed, lane, geometry.lanes),
            }
        }
    }

    let offset = |channel: usize| {
        let sum: i32 = filter(channel)
            .iter()
            .map(|&w| i32::from(w.cast_signed()))
            .sum();
        if geometry.is_offset { 128 * sum } else { 0 }
    };
    let at =
        |values: &[i32], channel: usize| values.get(first_channel + channel).copied().unwrap_or(0);
    PackedBlock {
        first_channel,
        bias: (0..n)
            .map(|channel| at(layer.bias, channel).wrapping_add(offset(channel)))
            .collect(),
        scale: (0..n)
            .map(|channel| {
                layer
                    .scale
                    .get(first_channel + channel)
                    .copied()
                    .unwrap_or(1.0)
            })
            .collect(),
        weights,
    }
}

/// A group of four weights as i16: those of even index of all lanes, then those of odd index.
fn pack_even_odd(weights: &[u8], packed: &mut [u8], lane: usize, lanes: usize) {
    for (index, weight) in weights.iter().enumerate() {
        let word = i16::from(weight.cast_signed()).to_le_bytes();
        let position = (index % 2 * lanes + lane) * 2 + index / 2;
        packed[2 * position..][..2].copy_from_slice(&word);
    }
}

/// Numbers that start at a cache line, so that no vector load crosses one.
#[derive(Debug)]
pub(crate) struct Aligned<T> {
    storage: Vec<T>,
    start: usize,
    len: usize,
}

/// Packed s8 or i16 weights.
pub(crate) type AlignedBytes = Aligned<u8>;

impl<T: Copy + Default> Aligned<T> {
    /// `len` zeros.
    pub(crate) fn zeroed(len: usize) -> Self {
        let spare = LINE / size_of::<T>();
        let storage = vec![T::default(); len + spare];
        let start = storage.as_ptr().align_offset(LINE).min(spare);
        Self {
            storage,
            start,
            len,
        }
    }
}

impl<T> std::ops::Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.storage[self.start..][..self.len]
    }
}

impl<T> std::ops::DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.storage[self.start..][..self.len]
    }
}
