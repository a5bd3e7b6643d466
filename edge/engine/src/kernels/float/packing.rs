//! Weights of float layers in the order of the kernels.
//!
//! In: f32 filters `[output, input, 3, 3]`. Out: blocks of whole vectors; channels beyond the last are zero and give zeros.

use std::ops::Range;

use super::super::packing::Aligned;
use super::{FREQUENCIES, Filters, Geometry, SIDE};

/// The first layer, which reads the image's lines: direct, because three input channels leave Winograd nothing to gain.
#[derive(Debug)]
pub(crate) struct FirstLayer {
    pub(super) blocks: Vec<FirstBlock>,
    n_inputs: usize,
    /// Floats from one pooled pixel to the next.
    pub(super) out_stride: usize,
}

/// Some output channels of the first layer.
#[derive(Debug)]
pub(super) struct FirstBlock {
    pub(super) channels: Range<usize>,
    /// `[tap, channel]`.
    pub(super) weights: Aligned<f32>,
    pub(super) bias: Vec<f32>,
}

/// A layer by Winograd F(4 x 4, 3 x 3).
#[derive(Debug)]
pub(crate) struct WinogradLayer {
    /// Output channels of each block.
    pub(super) blocks: Vec<Range<usize>>,
    pub(super) n_inputs: usize,
    /// Floats from one input pixel to the next.
    pub(super) in_stride: usize,
    /// Floats from one pooled pixel to the next.
    pub(super) out_stride: usize,
    /// `[frequency][block][input][channel]`.
    pub(super) weights: Aligned<f32>,
    /// Bias, padded with zeros to the stride.
    pub(super) bias: Vec<f32>,
}

/// Blocks of at most `vectors` vectors that cover `stride` channels.
fn blocks(stride: usize, lanes: usize, vectors: usize) -> impl Iterator<Item = Range<usize>> {
    let step = lanes * vectors;
    (0..stride)
        .step_by(step)
        .map(move |first| first..stride.min(first + step))
}

fn padded(values: &[f32], n: usize) -> Vec<f32> {
    let mut padded = values.to_vec();
    padded.resize(n, 0.0);
    padded
}

impl FirstLayer {
    pub(super) fn new(filters: &Filters, geometry: Geometry) -> Self {
        let out_stride = filters.n_outputs().next_multiple_of(geometry.lanes);
        let bias = padded(&filters.bias, out_stride);
        let n_taps = 9 * filters.n_inputs;
        let block = |channels: Range<usize>| {
            let mut weights = Aligned::zeroed(n_taps * channels.len());
            for (index, channel) in channels
                .clone()
                .enumerate()
                .take_while(|(_, c)| *c < filters.n_outputs())
            {
                for (tap, &weight) in filters.weights[channel * n_taps..][..n_taps]
                    .iter()
                    .enumerate()
                {
                    weights[tap * channels.len() + index] = weight;
                }
            }
            let bias = bias[channels.clone()].to_vec();
            FirstBlock {
                channels,
                weights,
                bias,
            }
        };
        Self {
            blocks: blocks(out_stride, geometry.lanes, geometry.direct_vectors)
                .map(block)
                .collect(),
            n_inputs: filters.n_inputs,
            out_stride,
        }
    }

    /// Floats of the patch under one position: nine taps of each input, and a spare one.
    pub(super) fn patch_length(&self) -> usize {
        9 * self.n_inputs + 1
    }

    pub(super) fn bytes(&self) -> usize {
        let floats = self
            .blocks
            .iter()
            .map(|block| block.weights.len() + block.bias.len());
        4 * floats.sum::<usize>()
    }
}

impl WinogradLayer {
    pub(super) fn new(filters: &Filters, geometry: Geometry) -> Self {
        let n_inputs = filters.n_inputs;
        let out_stride = filters.n_outputs().next_multiple_of(geometry.lanes);
        let blocks: Vec<_> = blocks(out_stride, geometry.lanes, geometry.gemm_vectors).collect();
        let mut weights = Aligned::zeroed(FREQUENCIES * n_inputs * out_stride);
        for block in &blocks {
            let channels = block
                .clone()
                .take_while(|&channel| channel < filters.n_outputs());
            for (lane, channel) in channels.enumerate() {
                for input in 0..n_inputs {
                    let taps = &filters.weights[(channel * n_inputs + input) * 9..];
                    let taps = taps.first_chunk().expect("nine taps");
                    for (frequency, weight) in transform(taps).into_iter().enumerate() {
                        let of_block = (frequency * out_stride + block.start) * n_inputs;
                        weights[of_block + input * block.len() + lane] = weight;
                    }
                }
            }
        }
        Self {
            blocks,
            n_inputs,
            in_stride: n_inputs.next_multiple_of(geometry.lanes),
            out_stride,
            weights,
            bias: padded(&filters.bias, out_stride),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        4 * (self.weights.len() + self.bias.len())
    }
}

/// `G g G'` of nine taps, in f64, rounded once.
fn transform(taps: &[f32; 9]) -> [f32; FREQUENCIES] {
    let line = |[a, b, c]: [f64; 3]| {
        [
            a / 4.0,
            -(a + b + c) / 6.0,
            -(a - b + c) / 6.0,
            a / 24.0 + b / 12.0 + c / 6.0,
            a / 24.0 - b / 12.0 + c / 6.0,
            c,
        ]
    };
    let at = |tap: usize| f64::from(taps[tap]);
    let columns: [[f64; SIDE]; 3] =
        std::array::from_fn(|column| line([at(column), at(3 + column), at(6 + column)]));
    let mut transformed = [0.0; FREQUENCIES];
    for (row, out) in transformed.as_chunks_mut::<SIDE>().0.iter_mut().enumerate() {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the one rounding of a transformed weight"
        )]
        let rounded = line(columns.map(|column| column[row])).map(|weight| weight as f32);
        *out = rounded;
    }
    transformed
}
