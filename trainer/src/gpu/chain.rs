//! The body of a convolutional row: from images to the hidden layer before bias and ReLU, and back.
//!
//! A feature map's gradient takes the feature map's place. The first layer never writes its convolution's output: one kernel makes pooled values and argmax from the images,
//! one its gradients from pooled gradients, argmax and the images. Behind each further convolution (cuDNN) stands one kernel for bias, ReLU and pool. The first dense layer is
//! cuBLAS'.

use anyhow::Result;

use super::convolution::{Pass, Shape, Tensors};
use super::dense::Dense;
use super::device::Argument::{Int, Long, Pointer};
use super::device::{Device, Grid, Memory};
use super::head::Ends;
use super::layout::Layout;
use super::network::{BLOCKS_EACH, Base, Images, stored, summing_grid};
use crate::train::Precision;

/// Inputs of the first layer in a kernel's memory: 27 and what fills up.
pub(crate) const TAPS_IN_MEMORY: usize = 32;
/// Parts at a time of a block that adds up the first layer's gradients.
const CONV1_SUM_PARTS: usize = 8;
/// Proposals of cuDNN that are timed for each pass.
const MOST_TIMED: usize = 24;
/// Channels that a block of the first layer's kernels computes.
const CHANNELS_EACH: usize = 256;

/// The body in the GPU's memory.
#[derive(Debug)]
pub(crate) struct Chain {
    layout: Layout,
    dense: Dense,
    pooled: Vec<Memory>,
    argmax: Vec<Memory>,
    convolved: Vec<Memory>,
}

impl Chain {
    /// For steps of at most `n` images.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn new(
        device: &Device,
        layout: Layout,
        n: usize,
        precision: Precision,
    ) -> Result<Self> {
        let list = |bytes: &[usize]| -> Result<Vec<Memory>> {
            bytes.iter().map(|n| device.zeros(*n)).collect()
        };
        let bytes = layout.bytes(n, precision);
        Ok(Self {
            dense: Dense::new(device, precision)?,
            pooled: list(&bytes.pooled)?,
            argmax: list(&bytes.argmax)?,
            convolved: list(&bytes.convolved)?,
            layout,
        })
    }

    /// Number of the first dense layer's weights among the parameters.
    fn dense1(&self) -> usize {
        2 * self.layout.blocks.len()
    }

    /// The parameters behind the hidden layer.
    pub(crate) fn ends(&self, base: &Base) -> Ends {
        let dense1 = self.dense1();
        Ends {
            bias1: base.parameters.weight(dense1 + 1),
            weight2: base.parameters.weight(dense1 + 2),
            bias2: base.parameters.weight(dense1 + 3),
        }
    }

    /// Where their gradients go.
    pub(crate) fn end_gradients(&self, base: &Base) -> Ends {
        let dense1 = self.dense1();
        Ends {
            bias1: base.parameters.gradient(dense1 + 1),
            weight2: base.parameters.gradient(dense1 + 2),
            bias2: base.parameters.gradient(dense1 + 3),
        }
    }

    fn shape(&self, layer: usize, n: usize) -> Shape {
        let block = self.layout.blocks[layer];
        Shape {
            n_images: n,
            channels_in: block.channels_in,
            channels_out: block.channels,
            input: [block.side; 2],
            window: [3; 2],
            stride: [1; 2],
            padding: [0; 2],
        }
    }

    /// Windows of a row of the first pooled map that a block takes, and the block's shared bytes: as `Segment` in `kernels.cu`.
    fn segment(precision: Precision) -> (usize, usize) {
        let windows = match precision {
            Precision::Bf16 => 128,
            Precision::F32 => 64,
        };
        let inputs = 4 * windows * TAPS_IN_MEMORY * precision.bytes();
        (windows, inputs + 12 * (2 * windows + 2))
    }

    /// From images to the hidden layer before bias and ReLU.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn forward(&mut self, base: &mut Base, images: Images) -> Result<()> {
        let n = images.n;
        let first = self.layout.blocks[0];
        let side = first.pooled_side();
        let (windows, shared_bytes) = Self::segment(base.precision);
        let grid = Grid {
            blocks: [
                side * side.div_ceil(windows),
                n,
                first.channels.div_ceil(CHANNELS_EACH),
            ],
            threads: [256, 1],
            shared_bytes,
        };
        let arguments = [
            Pointer(images.pixels),
            Pointer(images.numbers),
            Pointer(images.changes),
            Pointer(base.parameters.factor(0)),
            Pointer(base.parameters.weight(1)),
            Pointer(self.pooled[0].pointer()),
            Pointer(self.argmax[0].pointer()),
            Int(base.side),
            Int(base.side),
            Int(first.channels),
        ];
        let kernel = stored!(base.precision, "conv1_forward");
        base.device.launch(kernel, grid, &arguments)?;
        for layer in 1..self.layout.blocks.len() {
            self.convolve(base, layer, n, Pass::Forward)?;
            let block = self.layout.blocks[layer];
            let n_vectors = n * block.pooled() * base.precision.bytes() / 16;
            let arguments = [
                Pointer(self.convolved[layer].pointer()),
                Pointer(base.parameters.weight(2 * layer + 1)),
                Pointer(self.pooled[layer].pointer()),
                Pointer(self.argmax[layer].pointer()),
                Int(n),
                Int(block.convolved_side()),
                Int(block.convolved_side()),
                Int(block.channels),
            ];
            let kernel = stored!(base.precision, "bias_relu_pool");
            let grid = Grid::of(n_vectors, usize::MAX);
            base.device.launch(kernel, grid, &arguments)?;
        }
        let last = self.layout.blocks.len() - 1;
        self.dense.forward(
            (n, self.layout.units, self.layout.flat()),
            self.pooled[last].pointer(),
            base.parameters.factor(self.dense1()),
            base.head.z.pointer(),
        )
    }

    /// One pass of a layer's convolution: its input and the input's gradient have one place, and so have its output and the output's gradient.
    fn convolve(&self, base: &mut Base, layer: usize, n: usize, pass: Pass) -> Result<()> {
        let (shape, tensors) = (self.shape(layer, n), self.tensors(base, layer, pass));
        base.convolutions.run(&base.device, shape, pass, tensors)
    }

    fn tensors(&self, base: &Base, layer: usize, pass: Pass) -> Tensors {
        let filter = match (pass, base.precision) {
            (Pass::FilterGradient, Precision::Bf16) => base.scratch.pointer(),
            (Pass::FilterGradient, Precision::F32) => base.parameters.gradient(2 * layer),
            _ => base.parameters.factor(2 * layer),
        };
        Tensors {
            input: self.pooled[layer - 1].pointer(),
            filter,
            output: self.convolved[layer].pointer(),
        }
    }

    /// Chooses cuDNN's plans for steps of `n` images by time; waits for the device.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn tune(&mut self, base: &mut Base, n: usize) -> Result<()> {
        for layer in 1..self.layout.blocks.len() {
            for pass in [Pass::Forward, Pass::FilterGradient, Pass::InputGradient] {
                let (shape, tensors) = (self.shape(layer, n), self.tensors(base, layer, pass));
                let convolutions = &mut base.convolutions;
                convolutions.tune(&base.device, shape, pass, tensors, MOST_TIMED)?;
            }
        }
        Ok(())
    }

    /// From the hidden layer's gradient to those of all parameters before it.
    ///
    /// # Errors
    /// CUDA's, and those of `after_layer`.
    pub(crate) fn backward(
        &mut self,
        base: &mut Base,
        images: Images,
        after_layer: &mut dyn FnMut(&mut Base, usize) -> Result<()>,
    ) -> Result<()> {
        let n = images.n;
        let n_blocks = self.layout.blocks.len();
        let sizes = (n, self.layout.units, self.layout.flat());
        let dense1 = self.dense1();
        self.dense.weight_gradient(
            sizes,
            base.head.gradient.pointer(),
            self.pooled[n_blocks - 1].pointer(),
            base.parameters.gradient(dense1),
        )?;
        after_layer(base, n_blocks)?;
        self.dense.input_gradient(
            sizes,
            base.head.gradient.pointer(),
            base.parameters.factor(dense1),
            self.pooled[n_blocks - 1].pointer(),
        )?;
        for layer in (1..n_blocks).rev() {
            self.pool_backward(base, layer, n)?;
            self.convolve(base, layer, n, Pass::FilterGradient)?;
            if base.precision == Precision::Bf16 {
                let length = base.parameters.spans.all[2 * layer].length;
                let most = BLOCKS_EACH * base.device.n_multiprocessors();
                let arguments = [
                    Pointer(base.scratch.pointer()),
                    Pointer(base.parameters.gradient(2 * layer)),
                    Long(length),
                ];
                let grid = Grid::of(length, most);
                base.device.launch("to_f32", grid, &arguments)?;
            }
            after_layer(base, layer)?;
            // The filter's gradient has read the input: its place is free for its gradient.
            self.convolve(base, layer, n, Pass::InputGradient)?;
        }
        self.first_backward(base, images)?;
        after_layer(base, 0)
    }

    /// From the pooled map's gradient to that of the convolution's output and of its bias.
    fn pool_backward(&self, base: &mut Base, layer: usize, n: usize) -> Result<()> {
        let block = self.layout.blocks[layer];
        let cells = n * block.convolved_side().div_ceil(2).pow(2);
        let (grid, parts) = summing_grid(base, cells, block.channels);
        let arguments = [
            Pointer(self.pooled[layer].pointer()),
            Pointer(self.argmax[layer].pointer()),
            Pointer(self.convolved[layer].pointer()),
            Pointer(base.scratch.pointer()),
            Int(n),
            Int(block.convolved_side()),
            Int(block.convolved_side()),
            Int(block.channels),
        ];
        let kernel = stored!(base.precision, "bias_relu_pool_backward");
        base.device.launch(kernel, grid, &arguments)?;
        let to = base.parameters.gradient(2 * layer + 1);
        base.sum_parts(parts, block.channels, to)
    }

    /// Gradients of the first layer's parameters.
    fn first_backward(&self, base: &mut Base, images: Images) -> Result<()> {
        let first = self.layout.blocks[0];
        let (windows, shared_bytes) = Self::segment(base.precision);
        let groups = first.channels.div_ceil(CHANNELS_EACH);
        let side = first.pooled_side();
        let n_items = images.n * side * side.div_ceil(windows);
        let parts = (2 * base.device.n_multiprocessors())
            .div_ceil(groups)
            .min(n_items);
        let grid = Grid {
            blocks: [parts, groups, 1],
            threads: [256, 1],
            shared_bytes,
        };
        let arguments = [
            Pointer(images.pixels),
            Pointer(images.numbers),
            Pointer(images.changes),
            Pointer(self.pooled[0].pointer()),
            Pointer(self.argmax[0].pointer()),
            Pointer(base.scratch.pointer()),
            Int(images.n),
            Int(base.side),
            Int(base.side),
            Int(first.channels),
        ];
        let kernel = stored!(base.precision, "conv1_backward");
        base.device.launch(kernel, grid, &arguments)?;
        let arguments = [
            Pointer(base.scratch.pointer()),
            Pointer(base.parameters.gradient(0)),
            Pointer(base.parameters.gradient(1)),
            Int(parts),
            Int(first.channels),
        ];
        let grid = Grid {
            blocks: [first.channels, 1, 1],
            threads: [TAPS_IN_MEMORY, CONV1_SUM_PARTS],
            shared_bytes: 0,
        };
        base.device.launch("conv1_sum", grid, &arguments)
    }
}
