//! Where a convolutional row lies in the GPU's memory: pure arithmetic, so that it is tested without one.
//!
//! In: its units. Out: the places of its parameters, the shapes of the feature maps, and the bytes of every buffer of a step. The first convolution is
//! `[out, 3, 3, 3]` as in files.

use shared::CHANNELS;

use super::chain::TAPS_IN_MEMORY;
use super::network::MOST_PARTS;
use super::parameters::{FILL, Inner, Span, Spans};
use crate::train::Precision;

/// Most values of a tensor: the libraries' and the kernels' sizes are i32.
const MOST_VALUES: usize = i32::MAX as usize;

/// One block of convolution, ReLU and pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// Rows and columns of its input.
    pub(crate) side: usize,
    /// Channels of its input, filled up (the image's are 3).
    pub(crate) channels_in: usize,
    /// Channels of its output, filled up.
    pub(crate) channels: usize,
    n_in: usize,
    n_out: usize,
}

impl Block {
    pub(crate) fn convolved_side(&self) -> usize {
        self.side - 2
    }

    pub(crate) fn pooled_side(&self) -> usize {
        self.convolved_side() / 2
    }

    /// Values of an image's feature map before the pool.
    pub(crate) fn convolved(&self) -> usize {
        self.convolved_side().pow(2) * self.channels
    }

    /// Values of an image's pooled feature map.
    pub(crate) fn pooled(&self) -> usize {
        self.pooled_side().pow(2) * self.channels
    }
}

/// The network in the GPU's memory.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) blocks: Vec<Block>,
    /// Hidden units, filled up.
    pub(crate) units: usize,
    /// `conv1.weight`, `conv1.bias`, ..., `dense2.bias`.
    pub(crate) spans: Spans,
}

/// Bytes of the buffers of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bytes {
    /// Pooled feature maps, and later their gradients.
    pub(crate) pooled: Vec<usize>,
    /// One byte a window.
    pub(crate) argmax: Vec<usize>,
    /// Convolutions' outputs and later their gradients; 0 for the first, whose output never exists.
    pub(crate) convolved: Vec<usize>,
}

impl Bytes {
    #[cfg(test)]
    pub(crate) fn total(&self) -> usize {
        let lists = [&self.pooled, &self.argmax, &self.convolved];
        lists.into_iter().flatten().sum()
    }
}

impl Layout {
    /// The network for images of `side` rows and columns with that many output channels and hidden units.
    pub(crate) fn new(side: usize, convolutions: &[usize], n_units: usize) -> Self {
        let mut blocks: Vec<Block> = Vec::new();
        for &n_out in convolutions {
            let (side, n_in, channels_in) = match blocks.last() {
                Some(before) => (before.pooled_side(), before.n_out, before.channels),
                None => (side, CHANNELS, CHANNELS),
            };
            blocks.push(Block {
                side,
                channels_in,
                channels: n_out.next_multiple_of(FILL),
                n_in,
                n_out,
            });
        }
        let mut spans = Vec::new();
        for (layer, block) in blocks.iter().enumerate() {
            spans.push(if layer == 0 {
                let (n, length) = (27 * block.n_out, 27 * block.channels);
                Span::list(layer, n, length, true)
            } else {
                let inner = inner(9, block.n_in, block.channels_in);
                Span::matrix(layer, block.n_out, block.channels, inner, true)
            });
            spans.push(Span::list(layer, block.n_out, block.channels, true));
        }
        let (units, layer) = (n_units.next_multiple_of(FILL), blocks.len());
        let last = blocks.last().expect("a row has convolutions");
        let inner = inner(last.pooled_side().pow(2), last.n_out, last.channels);
        spans.push(Span::matrix(layer, n_units, units, inner, true));
        spans.push(Span::list(layer, n_units, units, true));
        spans.push(Span::list(layer, n_units, units, true));
        spans.push(Span::list(layer, 1, 1, true));
        Self {
            spans: Spans::new(spans),
            blocks,
            units,
        }
    }

    /// Inputs of the first dense layer.
    pub(crate) fn flat(&self) -> usize {
        self.blocks.last().map_or(0, Block::pooled)
    }

    /// Bytes of the buffers for steps of `n` images.
    pub(crate) fn bytes(&self, n: usize, precision: Precision) -> Bytes {
        let of = |values: fn(&Block) -> usize, bytes: usize| -> Vec<usize> {
            let blocks = self.blocks.iter();
            blocks.map(|block| n * values(block) * bytes).collect()
        };
        let mut convolved = of(Block::convolved, precision.bytes());
        convolved[0] = 0;
        Bytes {
            pooled: of(Block::pooled, precision.bytes()),
            argmax: of(Block::pooled, 1),
            convolved,
        }
    }

    /// Bytes of the scratch memory: partial sums of gradients, or the gradient of a filter in bf16.
    pub(crate) fn scratch_bytes(&self, n_multiprocessors: usize) -> usize {
        let of_first = 2 * n_multiprocessors * self.blocks[0].channels * TAPS_IN_MEMORY;
        let widest = self.blocks.iter().map(|block| block.channels).max();
        let of_bias = MOST_PARTS * widest.unwrap_or(0);
        let filters = self.blocks.iter().skip(1);
        let filters = filters.map(|block| 9 * block.channels_in * block.channels);
        (4 * of_first.max(of_bias)).max(2 * filters.max().unwrap_or(0))
    }

    /// Bytes of the flat arrays: master weights, gradients, two moments, and the copy that the matrix units read.
    #[cfg(test)]
    pub(crate) fn parameter_bytes(&self, precision: Precision) -> usize {
        let copy = if precision == Precision::Bf16 { 2 } else { 0 };
        self.spans.n_values * (4 * 4 + copy)
    }

    /// Most images of a step that the sizes allow.
    pub(crate) fn most_images(&self) -> usize {
        let pooled = self.blocks.iter().map(Block::pooled);
        let convolved = self.blocks.iter().skip(1).map(Block::convolved);
        let largest = pooled.chain(convolved).max().unwrap_or(1);
        (MOST_VALUES / largest).min(usize::from(u16::MAX))
    }
}

/// The inner dimensions of a parameter that reads `width` channels, of which the first `n` are those of the files.
fn inner(places: usize, n: usize, width: usize) -> Inner {
    Inner {
        places,
        channels: (0..n).collect(),
        width,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_lie_with_their_channels_innermost() {
        let layout = Layout::new(62, &[16, 8], 8);
        // conv2.weight [8, 16, 3, 3]: out 3, in 5, row 2, column 1.
        let place = layout.spans.place(2, ((3 * 16 + 5) * 3 + 2) * 3 + 1);
        assert_eq!(
            place,
            layout.spans.all[2].begin + ((3 * 3 + 2) * 3 + 1) * 16 + 5
        );
        // dense1.weight [8, 8 x 14 x 14]: unit 2, channel 6, row 4, column 9.
        let place = layout.spans.place(4, ((2 * 8 + 6) * 14 + 4) * 14 + 9);
        assert_eq!(
            place,
            layout.spans.all[4].begin + ((2 * 14 + 4) * 14 + 9) * 8 + 6
        );
    }

    #[test]
    fn final_model_takes_two_gigabytes_at_batch_50() {
        let layout = Layout::new(256, &[512, 256, 128], 256);
        assert_eq!(layout.flat(), 115_200);
        let bytes = layout.bytes(50, Precision::Bf16);
        assert_eq!(bytes.pooled[0], 50 * 127 * 127 * 512 * 2);
        assert_eq!(bytes.convolved[1], 50 * 125 * 125 * 256 * 2);
        assert_eq!(bytes.total(), 1_849_676_800);
        assert_eq!(layout.parameter_bytes(Precision::Bf16), 557_659_008);
        // The unpooled output of the first layer would allow 65; it never exists.
        assert_eq!(layout.most_images(), 260);
    }

    #[test]
    fn buckets_cover_the_array_from_its_end() {
        let spans = Layout::new(256, &[512, 256, 128], 256).spans;
        let buckets = spans.buckets(1 << 20);
        let layers: Vec<usize> = buckets.iter().map(|(layer, _)| *layer).collect();
        assert_eq!(layers, [3, 1, 0]);
        let mut end = spans.n_values;
        for (_, range) in buckets {
            assert_eq!(range.end, end);
            end = range.start;
        }
        assert_eq!(end, 0);
    }
}
