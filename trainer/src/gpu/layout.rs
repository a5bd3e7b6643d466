//! Where everything lies in the GPU's memory: pure arithmetic, so that it is tested without one.
//!
//! In: a convolutional row's units. Out: the place of every weight in one flat array (master weights, gradients, both moments and the copy that the
//! matrix units read all have this order), the shapes of the feature maps, and the bytes of every buffer of a step.
//!
//! Channels and hidden units are filled up to a multiple of 8, which the matrix units want. What fills up has weights and biases of 0, so its outputs are 0,
//! ReLU is closed there, its gradients are 0 and it stays 0. The first convolution is `[out, 3, 3, 3]` as in files, the others `[out, row, column, in]`,
//! the first dense layer `[out, row, column, channel]`, as the feature map before it lies.

use shared::CHANNELS;

use crate::train::Precision;

/// Multiple to which channels and units are filled up.
const FILL: usize = 8;
/// Multiple of values at which each parameter begins: 256 bytes of f32, 128 of bf16.
const ALIGNMENT: usize = 64;
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

/// A parameter's place in the flat array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) begin: usize,
    pub(crate) length: usize,
}

/// The network in the GPU's memory.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) blocks: Vec<Block>,
    /// Hidden units, filled up.
    pub(crate) units: usize,
    n_units: usize,
    /// `conv1.weight`, `conv1.bias`, ..., `dense2.bias`.
    pub(crate) spans: Vec<Span>,
    /// Length of the flat array.
    pub(crate) n_values: usize,
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
    /// Hidden layer before bias and ReLU, f32.
    pub(crate) hidden: usize,
    /// Its gradient.
    pub(crate) hidden_gradient: usize,
    /// Logits, their gradients, each image's loss: f32 each.
    pub(crate) per_image: usize,
}

impl Bytes {
    #[cfg(test)]
    pub(crate) fn total(&self) -> usize {
        let lists = [&self.pooled, &self.argmax, &self.convolved];
        let lists: usize = lists.into_iter().flatten().sum();
        lists + self.hidden + self.hidden_gradient + 3 * self.per_image
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
        let units = n_units.next_multiple_of(FILL);
        let mut layout = Self {
            blocks,
            units,
            n_units,
            spans: Vec::new(),
            n_values: 0,
        };
        for block in layout.blocks.clone() {
            layout.add(block.channels * 9 * block.channels_in);
            layout.add(block.channels);
        }
        layout.add(units * layout.flat());
        layout.add(units);
        layout.add(units);
        layout.add(1);
        layout
    }

    fn add(&mut self, length: usize) {
        self.spans.push(Span {
            begin: self.n_values,
            length,
        });
        self.n_values = (self.n_values + length).next_multiple_of(ALIGNMENT);
    }

    /// Inputs of the first dense layer.
    pub(crate) fn flat(&self) -> usize {
        self.blocks.last().map_or(0, Block::pooled)
    }

    /// How many values parameter `index` has in the files.
    pub(crate) fn length(&self, index: usize) -> usize {
        let n_blocks = self.blocks.len();
        match (index.checked_sub(2 * n_blocks), index % 2) {
            (None, 0) => {
                let block = self.blocks[index / 2];
                block.n_out * block.n_in * 9
            }
            (None, _) => self.blocks[index / 2].n_out,
            (Some(0), _) => {
                let last = self.blocks[n_blocks - 1];
                self.n_units * last.n_out * last.pooled_side().pow(2)
            }
            (Some(1 | 2), _) => self.n_units,
            _ => 1,
        }
    }

    /// Where value `at` of parameter `index`, in the files' order, stands in the flat array.
    pub(crate) fn place(&self, index: usize, at: usize) -> usize {
        let n_blocks = self.blocks.len();
        let within = if index == 2 * n_blocks {
            let last = self.blocks[n_blocks - 1];
            let area = last.pooled_side().pow(2);
            let (pixel, channel, unit) =
                (at % area, at / area % last.n_out, at / area / last.n_out);
            (unit * area + pixel) * last.channels + channel
        } else if index > 0 && index < 2 * n_blocks && index.is_multiple_of(2) {
            let block = self.blocks[index / 2];
            let (tap, channel, out) = (at % 9, at / 9 % block.n_in, at / 9 / block.n_in);
            (out * 9 + tap) * block.channels_in + channel
        } else {
            at
        };
        self.spans[index].begin + within
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
            hidden: n * self.units * 4,
            hidden_gradient: n * self.units * precision.bytes(),
            per_image: n * 4,
        }
    }

    /// Bytes of the flat arrays: master weights, gradients, two moments, and the copy that the matrix units read.
    #[cfg(test)]
    pub(crate) fn parameter_bytes(&self, precision: Precision) -> usize {
        let copy = if precision == Precision::Bf16 { 2 } else { 0 };
        self.n_values * (4 * 4 + copy)
    }

    /// Most images of a step that the sizes allow.
    pub(crate) fn most_images(&self) -> usize {
        let pooled = self.blocks.iter().map(Block::pooled);
        let convolved = self.blocks.iter().skip(1).map(Block::convolved);
        let largest = pooled.chain(convolved).max().unwrap_or(1);
        (MOST_VALUES / largest).min(usize::from(u16::MAX))
    }

    /// The flat array's ranges whose gradients are summed over the ranks together, in the order in which the backward pass completes them: each a
    /// layer's or several layers', at least `least` values where there are as many, with the number of the layer that completes it.
    pub(crate) fn buckets(&self, least: usize) -> Vec<(usize, std::ops::Range<usize>)> {
        let mut buckets = Vec::new();
        let mut end = self.n_values;
        // The dense layers are complete together.
        for layer in (0..=self.blocks.len()).rev() {
            let begin = self.spans[2 * layer].begin;
            if end - begin >= least || layer == 0 {
                buckets.push((layer, begin..end));
                end = begin;
            }
        }
        buckets
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_value_has_a_place_of_its_own_within_its_parameter() {
        // Units that are no multiple of 8, on a side that leaves odd edges.
        let layout = Layout::new(29, &[5, 12, 7], 10);
        let shapes = [5 * 27, 5, 12 * 5 * 9, 12, 7 * 12 * 9, 7, 10 * 7, 10, 10, 1];
        assert_eq!(layout.blocks[2].pooled_side(), 1);
        assert_eq!(layout.spans.len(), shapes.len());
        let mut all = BTreeSet::new();
        for (index, length) in shapes.into_iter().enumerate() {
            let span = layout.spans[index];
            assert_eq!(layout.length(index), length, "parameter {index}");
            for at in 0..length {
                let place = layout.place(index, at);
                assert!((span.begin..span.begin + span.length).contains(&place));
                assert!(all.insert(place));
            }
        }
    }

    #[test]
    fn filters_lie_with_their_channels_innermost() {
        let layout = Layout::new(62, &[16, 8], 8);
        // conv2.weight [8, 16, 3, 3]: out 3, in 5, row 2, column 1.
        let place = layout.place(2, ((3 * 16 + 5) * 3 + 2) * 3 + 1);
        assert_eq!(
            place,
            layout.spans[2].begin + ((3 * 3 + 2) * 3 + 1) * 16 + 5
        );
        // dense1.weight [8, 8 x 14 x 14]: unit 2, channel 6, row 4, column 9.
        let place = layout.place(4, ((2 * 8 + 6) * 14 + 4) * 14 + 9);
        assert_eq!(
            place,
            layout.spans[4].begin + ((2 * 14 + 4) * 14 + 9) * 8 + 6
        );
    }

    #[test]
    fn final_model_takes_two_gigabytes_at_batch_50() {
        let layout = Layout::new(256, &[512, 256, 128], 256);
        assert_eq!(layout.flat(), 115_200);
        let bytes = layout.bytes(50, Precision::Bf16);
        assert_eq!(bytes.pooled[0], 50 * 127 * 127 * 512 * 2);
        assert_eq!(bytes.convolved[1], 50 * 125 * 125 * 256 * 2);
        assert_eq!(bytes.total(), 1_849_754_200);
        assert_eq!(layout.parameter_bytes(Precision::Bf16), 557_659_008);
        // The unpooled output of the first layer would allow 65; it never exists.
        assert_eq!(layout.most_images(), 260);
    }

    #[test]
    fn buckets_cover_the_array_from_its_end() {
        let layout = Layout::new(256, &[512, 256, 128], 256);
        let buckets = layout.buckets(1 << 20);
        let layers: Vec<usize> = buckets.iter().map(|(layer, _)| *layer).collect();
        assert_eq!(layers, [3, 1, 0]);
        let mut end = layout.n_values;
        for (_, range) in buckets {
            assert_eq!(range.end, end);
            end = range.start;
        }
        assert_eq!(end, 0);
    }
}
