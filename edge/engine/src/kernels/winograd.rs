//! Winograd F(2 x 2, 3 x 3) in integers, exact: 16 multiplications in place of 36 for each 2 x 2 window, which is the pooling window.
//!
//! In: rows of u8 activations as [`super::conv_row`] reads them. Out: the same bytes. For kernels whose fast multiplication is one of
//! 16-bit pairs (`vpmaddwd`).
//!
//! With the matrices of Lavin and Gray (arXiv 1509.09308, section 4.1), B for the 4 x 4 activations `d`, G for the 3 x 3 weights `g`, A for
//! the result: `Y = A'[(G g G') . (B' d B)]A`. `2 G` is integer, so weights are packed as `(2 G) g (2 G)'` and the result is `4 Y`, an exact
//! multiple. Bounds: transformed activations are at most 4 x 255 = 1020, weights at most 9 x 127 = 1143, both fit 16 bits, and so do sums of two
//! products 32. Sums of many wrap modulo 2^32, which is harmless as `4 Y` itself fits i32: [`is_exact`] holds for the layer.
//!
//! This file has the layout and the weights' transform. The rest is the kernels'.

use super::packing::{AlignedBytes, PackedBlock};

/// Products for one window.
pub(super) const FREQUENCIES: usize = 16;

/// Side of the activations under one window.
pub(super) const SIDE: usize = 4;

/// Channels that are transformed at once; pixels are padded to a multiple.
pub(super) const CHANNELS: usize = 16;

/// Windows whose transformed activations are held at once.
const MAX_WINDOWS: usize = 36;

/// A convolution packed for this algorithm.
#[derive(Debug)]
pub(crate) struct WinogradLayer {
    /// Blocks of `block_channels`; weights i16 `[frequency][pair of inputs][channel][2]`.
    pub(super) blocks: Vec<PackedBlock>,
    /// Output channels of a block; those beyond the last are zero.
    pub(super) block_channels: usize,
    /// Input channels, padded.
    pub(super) n_inputs: usize,
}

/// Memory for one thread.
#[derive(Debug, Default)]
pub(crate) struct WinogradScratch {
    /// Transformed activations `[frequency][window][input]`.
    pub(super) activations: Vec<i16>,
    /// Sums of products of one block `[frequency][window][channel]`.
    pub(super) sums: Vec<i32>,
}

/// Whether four times every sum of the layer fits i32. `weights` is s8 `[output, ...]`.
pub(crate) fn is_exact(weights: &[u8], n_outputs: usize) -> bool {
    let reach = |filter: &[u8]| {
        let magnitudes = filter
            .iter()
            .map(|w| i64::from(w.cast_signed().unsigned_abs()));
        4 * 255 * magnitudes.sum::<i64>()
    };
    let filter_bytes = weights.len() / n_outputs.max(1);
    weights
        .chunks_exact(filter_bytes.max(1))
        .all(|filter| reach(filter) <= i64::from(i32::MAX))
}

impl WinogradLayer {
    /// Packs s8 weights `[output, input, 3, 3]`.
    pub(crate) fn new(
        block_channels: usize,
        weights: &[u8],
        n_inputs: usize,
        bias: &[i32],
        scale: &[f32],
    ) -> Self {
        let blocks = (0..bias.len())
            .step_by(block_channels)
            .map(|first_channel| {
                let last = bias.len().min(first_channel + block_channels);
                let mut block_bias = bias[first_channel..last].to_vec();
                let mut block_scale = scale[first_channel..last].to_vec();
                block_bias.resize(block_channels, 0);
                block_scale.resize(block_channels, 1.0);
                let filters = &weights[first_channel * n_inputs * 9..last * n_inputs * 9];
                PackedBlock {
                    first_channel,
                    weights: pack_block(block_channels, filters, n_inputs),
                    bias: block_bias,
                    scale: block_scale,
                }
            });
        Self {
            blocks: blocks.collect(),
            block_channels,
            n_inputs: n_inputs.next_multiple_of(CHANNELS),
        }
    }

    /// Bytes of weights, biases and scales.
    pub(crate) fn bytes(&self) -> usize {
        let bytes = |block: &PackedBlock| block.weights.len() + 8 * block.bias.len();
        self.blocks.iter().map(bytes).sum()
    }

    /// Makes the scratch memory large enough for rows of this layer of up to `n_windows`.
    pub(crate) fn reserve(&self, n_windows: usize, scratch: &mut WinogradScratch) {
        // A shorter row can have a larger part: 62 windows are done as 31 and 31, 35 at once.
        let n = FREQUENCIES * n_windows.min(MAX_WINDOWS);
        let grow = |len: usize, n: usize| len.max(n);
        let activations = grow(scratch.activations.len(), n * self.n_inputs);
        let sums = grow(scratch.sums.len(), n * self.block_channels);
        scratch.activations.resize(activations, 0);
        scratch.sums.resize(sums, 0);
    }
}

impl WinogradScratch {
    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val(self.activations.as_slice()) + size_of_val(self.sums.as_slice())
    }
}

/// The parts of a row of `n` windows that are done at once, equal but for one.
pub(super) fn parts(n: usize, most: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let n_parts = n.div_ceil(most);
    (0..n_parts).map(move |part| n * part / n_parts..n * (part + 1) / n_parts)
}

/// The windows of a row that are done at once.
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(dead_code, reason = "Winograd in integers pays with AVX2 alone")
)]
pub(super) fn window_parts(n_windows: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    parts(n_windows, MAX_WINDOWS)
}

fn pack_block(block_channels: usize, filters: &[u8], n_inputs: usize) -> AlignedBytes {
    let pairs = n_inputs.next_multiple_of(CHANNELS) / 2;
    let mut packed = AlignedBytes::zeroed(FREQUENCIES * pairs * block_channels * 4);
    for input in 0..n_inputs {
        for (channel, filter) in filters.chunks_exact(9 * n_inputs).enumerate() {
            let transformed = transform_weights(&filter[9 * input..][..9]);
            for (frequency, weight) in transformed.into_iter().enumerate() {
                let pair = (frequency * pairs + input / 2) * block_channels + channel;
                let at = 4 * pair + input % 2 * 2;
                packed[at..][..2].copy_from_slice(&weight.to_le_bytes());
            }
        }
    }
    packed
}

/// `(2 G) g (2 G)'`, row by row.
fn transform_weights(weights: &[u8]) -> [i16; FREQUENCIES] {
    let line = |[a, b, c]: [i16; 3]| [2 * a, a + b + c, a - b + c, 2 * c];
    let at = |tap: usize| i16::from(weights[tap].cast_signed());
    let columns: [[i16; SIDE]; 3] =
        std::array::from_fn(|column| line([at(column), at(3 + column), at(6 + column)]));
    let mut transformed = [0; FREQUENCIES];
    for (row, out) in transformed.as_chunks_mut::<SIDE>().0.iter_mut().enumerate() {
        *out = line(columns.map(|column| column[row]));
    }
    transformed
}
