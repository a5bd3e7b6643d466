//! A convolutional row of the publication on the GPU: forward, backward, optimiser.
//!
//! In: images as they lie in the cache, u8 `[3, row, column]`, chosen by number. Out: logits, or a step: loss, gradients, new weights. All work is put on
//! one stream in the order of this file and nothing here waits, so buffers are used again as soon as the call that last reads them was put there: a feature map's
//! gradient takes the feature map's place.
//!
//! The first layer never writes its convolution's output: one kernel makes pooled values and argmax from the images, one its gradients from
//! pooled gradients, argmax and the images. Behind each further convolution (cuDNN) stands one kernel for bias, ReLU and pool. The first dense layer is cuBLAS', the second,
//! the loss and their gradients are two small kernels, and the optimiser is one kernel over all parameters.

use anyhow::{Result, ensure};
use rayon::prelude::*;

use super::convolution::{Convolutions, Pass, Shape, Tensors};
use super::dense::Dense;
use super::device::Argument::{Float, Int, Long, Pointer};
use super::device::{Device, Grid, Memory};
use super::layout::Layout;
use crate::architecture::OptimiserKind;
use crate::operators::optimiser::Moments;
use crate::train::Precision;

/// Blocks of a kernel that walks over memory, for each multiprocessor.
const BLOCKS_EACH: usize = 16;
/// Most partial sums of a bias' gradient.
const MOST_PARTS: usize = 1024;
/// Inputs of the first layer in a kernel's memory: 27 and what fills up.
const TAPS_IN_MEMORY: usize = 32;
/// Values, and parts at a time, of a block that adds up partial sums: a channel has up to `MOST_PARTS`, which one thread would wait for one after the other.
const SUM_BLOCK: [usize; 2] = [32, 32];
/// Parts at a time of a block that adds up the first layer's gradients.
const CONV1_SUM_PARTS: usize = 8;
/// Channels that a block of the first layer's kernels computes.
const CHANNELS_EACH: usize = 256;

/// Where the images of a step are: pixels of all images, the number of each image of the step (i64), and null or how each is changed (three i32).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Images {
    pub(crate) pixels: u64,
    pub(crate) numbers: u64,
    pub(crate) changes: u64,
    pub(crate) n: usize,
}

/// What a step learns from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Targets {
    /// Label and weight of each image, f32 `[image, 2]`.
    pub(crate) targets: u64,
    /// Images of all ranks.
    pub(crate) n_total: usize,
    /// Where the loss goes, f32.
    pub(crate) loss: u64,
}

/// Buffers of a step.
#[derive(Debug)]
struct Buffers {
    pooled: Vec<Memory>,
    argmax: Vec<Memory>,
    convolved: Vec<Memory>,
    hidden: Memory,
    hidden_gradient: Memory,
    logits: Memory,
    logit_gradient: Memory,
    image_loss: Memory,
    /// Partial sums; bf16 gradients of filters before they are widened.
    scratch: Memory,
}

/// The network in the GPU's memory.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) device: Device,
    pub(crate) layout: Layout,
    precision: Precision,
    optimiser: OptimiserKind,
    most_images: usize,
    side: usize,
    convolutions: Convolutions,
    dense: Dense,
    weights: Memory,
    /// Of all parameters, f32; summed over ranks in place.
    pub(crate) gradients: Memory,
    moments: [Memory; 2],
    copy: Option<Memory>,
    buffers: Buffers,
}

impl Network {
    /// For steps of at most `most_images` images of `side` rows and columns.
    ///
    /// # Errors
    /// More images than the sizes or the memory allow; CUDA's errors.
    pub(crate) fn new(
        device: Device,
        layout: Layout,
        side: usize,
        most_images: usize,
        precision: Precision,
        optimiser: OptimiserKind,
    ) -> Result<Self> {
        ensure!(
            (1..=layout.most_images()).contains(&most_images),
            "{most_images} images a step are not between 1 and {} on a GPU at this width",
            layout.most_images()
        );
        let zeros = |n_bytes: usize| device.zeros(n_bytes);
        let list =
            |bytes: &[usize]| -> Result<Vec<Memory>> { bytes.iter().map(|n| zeros(*n)).collect() };
        let bytes = layout.bytes(most_images, precision);
        let flat = 4 * layout.n_values;
        let first = layout.blocks[0].channels;
        let partial = MOST_PARTS.max(2 * device.n_multiprocessors())
            * layout
                .blocks
                .iter()
                .map(|block| block.channels)
                .max()
                .unwrap_or(0);
        let partial = partial.max(2 * device.n_multiprocessors() * first * TAPS_IN_MEMORY);
        let filters = layout.blocks.iter().skip(1);
        let filters = filters.map(|block| 9 * block.channels_in * block.channels);
        let scratch = (4 * partial).max(2 * filters.max().unwrap_or(0));
        Ok(Self {
            convolutions: Convolutions::new(&device, precision)?,
            dense: Dense::new(&device, precision)?,
            weights: zeros(flat)?,
            gradients: zeros(flat)?,
            moments: match optimiser {
                OptimiserKind::Adam => [zeros(flat)?, zeros(flat)?],
                OptimiserKind::Sgd => [zeros(0)?, zeros(0)?],
            },
            copy: match precision {
                Precision::Bf16 => Some(zeros(flat / 2)?),
                Precision::F32 => None,
            },
            buffers: Buffers {
                pooled: list(&bytes.pooled)?,
                argmax: list(&bytes.argmax)?,
                convolved: list(&bytes.convolved)?,
                hidden: zeros(bytes.hidden)?,
                hidden_gradient: zeros(bytes.hidden_gradient)?,
                logits: zeros(bytes.per_image)?,
                logit_gradient: zeros(bytes.per_image)?,
                image_loss: zeros(bytes.per_image)?,
                scratch: zeros(scratch)?,
            },
            device,
            layout,
            precision,
            optimiser,
            most_images,
            side,
        })
    }

    pub(crate) fn most_images(&self) -> usize {
        self.most_images
    }

    /// The kernel of that name for this precision.
    fn kernel(&self, names: [&'static str; 2]) -> &'static str {
        match self.precision {
            Precision::Bf16 => names[0],
            Precision::F32 => names[1],
        }
    }

    /// Where a parameter's f32 values lie among `flat` ones.
    fn place(&self, flat: &Memory, index: usize) -> u64 {
        let span = self.layout.spans[index];
        flat.range(4 * span.begin, 4 * span.length)
    }

    /// Where the values of a parameter lie that activations are multiplied with.
    fn factor(&self, index: usize) -> u64 {
        let span = self.layout.spans[index];
        match &self.copy {
            Some(copy) => copy.range(2 * span.begin, 2 * span.length),
            None => self.place(&self.weights, index),
        }
    }

    /// Replaces the weights, and the moments where there are any (else they become 0); waits.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn set(&mut self, weights: &[Vec<f32>], moments: &[Moments]) -> Result<()> {
        let spread = |values: &mut dyn Iterator<Item = &[f32]>| -> Vec<f32> {
            let mut flat = vec![0.0; self.layout.n_values];
            for (index, values) in values.enumerate() {
                for (at, value) in values.iter().enumerate() {
                    flat[self.layout.place(index, at)] = *value;
                }
            }
            flat
        };
        let flat = spread(&mut weights.iter().map(Vec::as_slice));
        self.device.write(&self.weights, 0, &flat)?;
        if self.optimiser == OptimiserKind::Adam {
            let first = spread(&mut moments.iter().map(|moments| moments.first.as_slice()));
            self.device.write(&self.moments[0], 0, &first)?;
            let second = spread(&mut moments.iter().map(|moments| moments.second.as_slice()));
            self.device.write(&self.moments[1], 0, &second)?;
        }
        if let Some(copy) = &self.copy {
            let n = self.layout.n_values;
            let grid = Grid::of(n, BLOCKS_EACH * self.device.n_multiprocessors());
            let (from, to) = (self.weights.pointer(), copy.pointer());
            self.device
                .launch("to_bf16_copy", grid, &[Pointer(from), Pointer(to), Long(n)])?;
        }
        Ok(())
    }

    /// Weights and moments in the files' order, once the stream has come here.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn get(&self) -> Result<(Vec<Vec<f32>>, Vec<Moments>)> {
        let weights = self.gather(&self.weights)?;
        let moments = match self.optimiser {
            OptimiserKind::Sgd => vec![Moments::default(); weights.len()],
            OptimiserKind::Adam => {
                let (first, second) = (
                    self.gather(&self.moments[0])?,
                    self.gather(&self.moments[1])?,
                );
                let both = first.into_iter().zip(second);
                both.map(|(first, second)| Moments { first, second })
                    .collect()
            }
        };
        Ok((weights, moments))
    }

    /// Gradients in the files' order, once the stream has come here.
    #[cfg(test)]
    pub(crate) fn gradients(&self) -> Result<Vec<Vec<f32>>> {
        self.gather(&self.gradients)
    }

    fn gather(&self, memory: &Memory) -> Result<Vec<Vec<f32>>> {
        let layout = &self.layout;
        let flat: Vec<f32> = self.device.read(memory, 0, layout.n_values)?;
        let values = |index| -> Vec<f32> {
            let all = (0..layout.length(index)).into_par_iter();
            all.map(|at| flat[layout.place(index, at)]).collect()
        };
        Ok((0..layout.spans.len()).map(values).collect())
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
    fn segment(&self) -> (usize, usize) {
        let windows = match self.precision {
            Precision::Bf16 => 128,
            Precision::F32 => 64,
        };
        let inputs = 4 * windows * TAPS_IN_MEMORY * self.precision.bytes();
        (windows, inputs + 12 * (2 * windows + 2))
    }

    /// From images to the hidden layer before bias and ReLU.
    fn features(&mut self, images: Images) -> Result<()> {
        let n = images.n;
        assert!(n >= 1 && n <= self.most_images);
        let first = self.layout.blocks[0];
        let side = first.pooled_side();
        let (windows, shared_bytes) = self.segment();
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
            Pointer(self.factor(0)),
            Pointer(self.place(&self.weights, 1)),
            Pointer(self.buffers.pooled[0].pointer()),
            Pointer(self.buffers.argmax[0].pointer()),
            Int(self.side),
            Int(self.side),
            Int(first.channels),
        ];
        let kernel = self.kernel(["conv1_forward_bf16", "conv1_forward_f32"]);
        self.device.launch(kernel, grid, &arguments)?;
        for layer in 1..self.layout.blocks.len() {
            self.convolve(layer, n, Pass::Forward)?;
            let block = self.layout.blocks[layer];
            let n_vectors = n * block.pooled() * self.precision.bytes() / 16;
            let arguments = [
                Pointer(self.buffers.convolved[layer].pointer()),
                Pointer(self.place(&self.weights, 2 * layer + 1)),
                Pointer(self.buffers.pooled[layer].pointer()),
                Pointer(self.buffers.argmax[layer].pointer()),
                Int(n),
                Int(block.convolved_side()),
                Int(block.convolved_side()),
                Int(block.channels),
            ];
            let kernel = self.kernel(["bias_relu_pool_bf16", "bias_relu_pool_f32"]);
            self.device
                .launch(kernel, Grid::of(n_vectors, usize::MAX), &arguments)?;
        }
        let (units, flat) = (self.layout.units, self.layout.flat());
        let last = self.layout.blocks.len() - 1;
        self.dense.forward(
            (n, units, flat),
            self.buffers.pooled[last].pointer(),
            self.factor(2 * last + 2),
            self.buffers.hidden.pointer(),
        )
    }

    /// One pass of a layer's convolution: its input and the input's gradient have one place, and so have its output and the output's gradient.
    fn convolve(&mut self, layer: usize, n: usize, pass: Pass) -> Result<()> {
        let shape = self.shape(layer, n);
        let tensors = self.tensors(layer, pass);
        self.convolutions.run(&self.device, shape, pass, tensors)
    }

    fn tensors(&self, layer: usize, pass: Pass) -> Tensors {
        let filter = match (pass, self.precision) {
            (Pass::FilterGradient, Precision::Bf16) => self.buffers.scratch.pointer(),
            (Pass::FilterGradient, Precision::F32) => self.place(&self.gradients, 2 * layer),
            _ => self.factor(2 * layer),
        };
        Tensors {
            input: self.buffers.pooled[layer - 1].pointer(),
            filter,
            output: self.buffers.convolved[layer].pointer(),
        }
    }

    /// Chooses cuDNN's plans for steps of `n` images by time; waits for the device.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn tune(&mut self, n: usize) -> Result<()> {
        for layer in 1..self.layout.blocks.len() {
            for pass in [Pass::Forward, Pass::FilterGradient, Pass::InputGradient] {
                let (shape, tensors) = (self.shape(layer, n), self.tensors(layer, pass));
                self.convolutions.tune(&self.device, shape, pass, tensors)?;
            }
        }
        Ok(())
    }

    /// Bytes of workspace of cuDNN.
    pub(crate) fn workspace_bytes(&self) -> usize {
        self.convolutions.workspace_bytes()
    }

    /// The hidden layer to logits, and to the loss where there are targets.
    fn head(&mut self, n: usize, targets: Option<Targets>) -> Result<()> {
        let dense2 = 2 * self.layout.blocks.len() + 2;
        let n_total = targets.map_or(1, |targets| targets.n_total);
        let grid = Grid {
            blocks: [n, 1, 1],
            threads: [32, 1],
            shared_bytes: 0,
        };
        let arguments = [
            Pointer(self.buffers.hidden.pointer()),
            Pointer(self.place(&self.weights, dense2 - 1)),
            Pointer(self.place(&self.weights, dense2)),
            Pointer(self.place(&self.weights, dense2 + 1)),
            Pointer(targets.map_or(0, |targets| targets.targets)),
            Pointer(self.buffers.logits.pointer()),
            Pointer(self.buffers.image_loss.pointer()),
            Pointer(self.buffers.logit_gradient.pointer()),
            Int(self.layout.units),
            Int(n_total),
        ];
        self.device.launch("head_forward", grid, &arguments)
    }

    /// Logits of images, once the stream has come here.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn logits(&mut self, images: Images) -> Result<Vec<f32>> {
        self.features(images)?;
        self.head(images.n, None)?;
        self.device.read(&self.buffers.logits, 0, images.n)
    }

    /// Loss and gradients of a step. `after_layer` is called when the gradients of a layer's parameters were put on the stream, the dense
    /// layers (counted after the convolutions) first, then the convolutions from the last to the first.
    ///
    /// # Errors
    /// CUDA's, and those of `after_layer`.
    pub(crate) fn gradients_of(
        &mut self,
        images: Images,
        targets: Targets,
        mut after_layer: impl FnMut(&mut Self, usize) -> Result<()>,
    ) -> Result<()> {
        let n = images.n;
        self.features(images)?;
        self.head(n, Some(targets))?;
        self.dense_backward(n, targets)?;
        let n_blocks = self.layout.blocks.len();
        after_layer(self, n_blocks)?;
        let sizes = (n, self.layout.units, self.layout.flat());
        self.dense.input_gradient(
            sizes,
            self.buffers.hidden_gradient.pointer(),
            self.factor(2 * n_blocks),
            self.buffers.pooled[n_blocks - 1].pointer(),
        )?;
        for layer in (1..n_blocks).rev() {
            self.pool_backward(layer, n)?;
            self.convolve(layer, n, Pass::FilterGradient)?;
            if self.precision == Precision::Bf16 {
                let length = self.layout.spans[2 * layer].length;
                let most = BLOCKS_EACH * self.device.n_multiprocessors();
                let to = self.place(&self.gradients, 2 * layer);
                let arguments = [
                    Pointer(self.buffers.scratch.pointer()),
                    Pointer(to),
                    Long(length),
                ];
                self.device
                    .launch("to_f32", Grid::of(length, most), &arguments)?;
            }
            after_layer(self, layer)?;
            // The filter's gradient has read the input: its place is free for its gradient.
            self.convolve(layer, n, Pass::InputGradient)?;
        }
        self.first_backward(images)?;
        after_layer(self, 0)
    }

    /// Gradients of both dense layers' parameters and of the hidden layer; the loss.
    fn dense_backward(&mut self, n: usize, targets: Targets) -> Result<()> {
        let dense1 = 2 * self.layout.blocks.len();
        let units = self.layout.units;
        let grid = Grid {
            blocks: [units.div_ceil(32), 1, 1],
            threads: [32, 8],
            shared_bytes: 0,
        };
        let arguments = [
            Pointer(self.buffers.hidden.pointer()),
            Pointer(self.place(&self.weights, dense1 + 1)),
            Pointer(self.place(&self.weights, dense1 + 2)),
            Pointer(self.buffers.image_loss.pointer()),
            Pointer(self.buffers.logit_gradient.pointer()),
            Pointer(self.buffers.hidden_gradient.pointer()),
            Pointer(self.place(&self.gradients, dense1 + 1)),
            Pointer(self.place(&self.gradients, dense1 + 2)),
            Pointer(self.place(&self.gradients, dense1 + 3)),
            Pointer(targets.loss),
            Int(n),
            Int(units),
        ];
        let kernel = self.kernel(["head_backward_bf16", "head_backward_f32"]);
        self.device.launch(kernel, grid, &arguments)?;
        self.dense.weight_gradient(
            (n, units, self.layout.flat()),
            self.buffers.hidden_gradient.pointer(),
            self.buffers.pooled[dense1 / 2 - 1].pointer(),
            self.place(&self.gradients, dense1),
        )
    }

    /// From the pooled map's gradient to that of the convolution's output and of its bias.
    fn pool_backward(&mut self, layer: usize, n: usize) -> Result<()> {
        let block = self.layout.blocks[layer];
        let length = 16 / self.precision.bytes();
        let vectors = block.channels / length;
        // Vectors of a block's threads, a power of two, and windows.
        let across = (vectors + 1).next_power_of_two() / 2;
        let across = across.clamp(1, 32);
        let down = 256 / across;
        let cells = n * block.convolved_side().div_ceil(2).pow(2);
        let parts = cells
            .div_ceil(down)
            .min(8 * self.device.n_multiprocessors())
            .min(MOST_PARTS);
        let grid = Grid {
            blocks: [parts, vectors.div_ceil(across), 1],
            threads: [across, down],
            shared_bytes: 256 * length * 4,
        };
        let arguments = [
            Pointer(self.buffers.pooled[layer].pointer()),
            Pointer(self.buffers.argmax[layer].pointer()),
            Pointer(self.buffers.convolved[layer].pointer()),
            Pointer(self.buffers.scratch.pointer()),
            Int(n),
            Int(block.convolved_side()),
            Int(block.convolved_side()),
            Int(block.channels),
        ];
        let kernel = self.kernel([
            "bias_relu_pool_backward_bf16",
            "bias_relu_pool_backward_f32",
        ]);
        self.device.launch(kernel, grid, &arguments)?;
        let arguments = [
            Pointer(self.buffers.scratch.pointer()),
            Pointer(self.place(&self.gradients, 2 * layer + 1)),
            Int(parts),
            Int(block.channels),
        ];
        let grid = Grid {
            blocks: [block.channels.div_ceil(SUM_BLOCK[0]), 1, 1],
            threads: SUM_BLOCK,
            shared_bytes: 0,
        };
        self.device.launch("sum_parts", grid, &arguments)
    }

    /// Gradients of the first layer's parameters.
    fn first_backward(&mut self, images: Images) -> Result<()> {
        let first = self.layout.blocks[0];
        let (windows, shared_bytes) = self.segment();
        let groups = first.channels.div_ceil(CHANNELS_EACH);
        let side = first.pooled_side();
        let n_items = images.n * side * side.div_ceil(windows);
        let parts = (2 * self.device.n_multiprocessors())
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
            Pointer(self.buffers.pooled[0].pointer()),
            Pointer(self.buffers.argmax[0].pointer()),
            Pointer(self.buffers.scratch.pointer()),
            Int(images.n),
            Int(self.side),
            Int(self.side),
            Int(first.channels),
        ];
        let kernel = self.kernel(["conv1_backward_bf16", "conv1_backward_f32"]);
        self.device.launch(kernel, grid, &arguments)?;
        let arguments = [
            Pointer(self.buffers.scratch.pointer()),
            Pointer(self.place(&self.gradients, 0)),
            Pointer(self.place(&self.gradients, 1)),
            Int(parts),
            Int(first.channels),
        ];
        let grid = Grid {
            blocks: [first.channels, 1, 1],
            threads: [TAPS_IN_MEMORY, CONV1_SUM_PARTS],
            shared_bytes: 0,
        };
        self.device.launch("conv1_sum", grid, &arguments)
    }

    /// All gradients and the loss become 0: a rank without images.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn no_gradients(&mut self, loss: &Memory, step: usize) -> Result<()> {
        self.device.clear(&self.gradients)?;
        self.device.clear_range(loss, 4 * step, 4)
    }

    /// One step of the optimiser; for Adam `rate` has the correction of the step in it.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn update(&mut self, rate: f32) -> Result<()> {
        let n = self.layout.n_values;
        let grid = Grid::of(n / 4, BLOCKS_EACH * self.device.n_multiprocessors());
        let copy = self.copy.as_ref().map_or(0, Memory::pointer);
        let (weights, gradients) = (self.weights.pointer(), self.gradients.pointer());
        match self.optimiser {
            OptimiserKind::Adam => {
                let [first, second] = [0, 1].map(|moment| self.moments[moment].pointer());
                let arguments = [
                    Pointer(weights),
                    Pointer(first),
                    Pointer(second),
                    Pointer(gradients),
                    Pointer(copy),
                    Long(n),
                    Float(rate),
                ];
                self.device.launch("adam", grid, &arguments)
            }
            OptimiserKind::Sgd => {
                let arguments = [
                    Pointer(weights),
                    Pointer(gradients),
                    Pointer(copy),
                    Long(n),
                    Float(rate),
                ];
                self.device.launch("sgd", grid, &arguments)
            }
        }
    }
}
