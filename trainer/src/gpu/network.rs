//! A network on the GPU: its parameters, its end, and one of two bodies before it.
//!
//! In: images as they lie in the cache, u8 `[3, row, column]`, chosen by number. Out: logits, or a step: loss, gradients, new weights. All work is put on
//! one stream in the order of the calls and nothing here waits, so memory is used again as soon as the call that last reads it was put there. The body of a convolutional row is
//! [`super::chain`]'s, that of a transfer learner [`super::transfer`]'s.

use anyhow::{Error, Result, ensure};

use super::chain::Chain;
use super::convolution::Convolutions;
use super::device::Argument::{Int, Pointer};
use super::device::{Device, Grid, Memory};
use super::graph::Graph;
use super::head::{Ends, Head};
use super::layout::Layout;
use super::parameters::{Parameters, Spans};
use super::transfer::Transfer;
use crate::architecture::{Architecture, OptimiserKind};
use crate::backbone::{Backbone, backbone};
use crate::operators::optimiser::Moments;
use crate::train::Precision;

/// Blocks of a kernel that walks over memory, for each multiprocessor.
pub(crate) const BLOCKS_EACH: usize = 16;
/// Most partial sums of a bias' gradient.
pub(crate) const MOST_PARTS: usize = 1024;
/// Values, and parts at a time, of a block that adds up partial sums: a channel has up to `MOST_PARTS`, which one thread would wait for one after the other.
const SUM_BLOCK: [usize; 2] = [32, 32];

/// The name of a kernel for what activations are stored in.
macro_rules! stored {
    ($precision:expr, $name:literal) => {
        match $precision {
            crate::train::Precision::Bf16 => concat!($name, "_bf16"),
            crate::train::Precision::F32 => concat!($name, "_f32"),
        }
    };
}
pub(crate) use stored;

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

/// What both kinds of networks have.
#[derive(Debug)]
pub(crate) struct Base {
    pub(crate) device: Device,
    pub(crate) precision: Precision,
    /// Rows and columns of an image.
    pub(crate) side: usize,
    pub(crate) parameters: Parameters,
    pub(crate) convolutions: Convolutions,
    pub(crate) head: Head,
    /// Partial sums; gradients of filters before they are widened.
    pub(crate) scratch: Memory,
}

/// What stands before the end.
#[derive(Debug)]
enum Body {
    Chain(Chain),
    Transfer(Box<Transfer>),
}

/// What a body is made from.
#[derive(Debug)]
pub(crate) enum Design {
    /// A convolutional row.
    Chain(Layout),
    /// A transfer learner.
    Transfer {
        backbone: Backbone,
        /// Whether more than its last layer learns.
        is_trained: bool,
    },
}

impl Design {
    /// That of a row of the table at a width factor, for the images of a cache.
    pub(crate) fn of(architecture: &Architecture, width: f64) -> Self {
        match backbone(architecture.family, width) {
            Some(backbone) => Self::Transfer {
                backbone,
                is_trained: !architecture.is_backbone_frozen,
            },
            None => {
                let units = architecture.scaled(width);
                let layout = Layout::new(shared::SIDE, &units.convolutions, units.dense);
                Self::Chain(layout)
            }
        }
    }
}

/// The network in the GPU's memory.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) base: Base,
    body: Body,
    most_images: usize,
}

impl Network {
    /// For steps of at most `most_images` images of `side` rows and columns.
    ///
    /// # Errors
    /// More images than the sizes or the memory allow; CUDA's errors.
    pub(crate) fn new(
        device: Device,
        design: Design,
        side: usize,
        most_images: usize,
        precision: Precision,
        optimiser: OptimiserKind,
    ) -> Result<Self> {
        let (n, n_multiprocessors) = (most_images, device.n_multiprocessors());
        let base = |spans: Spans, has_copy: bool, units: usize, scratch: usize| {
            Ok::<Base, Error>(Base {
                precision,
                side,
                parameters: Parameters::new(&device, spans, optimiser, has_copy)?,
                convolutions: Convolutions::new(&device, precision)?,
                head: Head::new(&device, units, n, precision)?,
                scratch: device.zeros(scratch)?,
                device,
            })
        };
        let (base, body) = match design {
            Design::Chain(layout) => {
                let most = layout.most_images();
                ensure!(
                    (1..=most).contains(&n),
                    "{n} images a step are not between 1 and {most} on a GPU at this width"
                );
                let scratch = layout.scratch_bytes(n_multiprocessors);
                let has_copy = precision == Precision::Bf16;
                let base = base(layout.spans.clone(), has_copy, layout.units, scratch)?;
                let chain = Chain::new(&base.device, layout, n, precision)?;
                (base, Body::Chain(chain))
            }
            Design::Transfer {
                backbone,
                is_trained,
            } => {
                let graph = Graph::new(backbone, is_trained, side, n, precision)?;
                let scratch = Transfer::scratch_bytes(&graph, precision.bytes());
                let base = base(graph.spans.clone(), false, graph.n_features(), scratch)?;
                let transfer = Transfer::new(&base, graph)?;
                (base, Body::Transfer(Box::new(transfer)))
            }
        };
        Ok(Self {
            base,
            body,
            most_images,
        })
    }

    pub(crate) fn most_images(&self) -> usize {
        self.most_images
    }

    /// Replaces the weights, and the moments where there are any (else they become 0); waits.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn set(&mut self, weights: &[Vec<f32>], moments: &[Moments]) -> Result<()> {
        let Base {
            device, parameters, ..
        } = &mut self.base;
        parameters.set(device, weights, moments)?;
        if let Body::Transfer(transfer) = &mut self.body {
            transfer.has_new_weights(false);
        }
        Ok(())
    }

    /// Weights and moments in the files' order, once the stream has come here.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn get(&mut self) -> Result<(Vec<Vec<f32>>, Vec<Moments>)> {
        self.base.parameters.get(&self.base.device)
    }

    /// Gradients in the files' order, once the stream has come here.
    #[cfg(test)]
    pub(crate) fn gradients(&mut self) -> Result<Vec<Vec<f32>>> {
        self.base.parameters.gradients(&self.base.device)
    }

    /// Chooses cuDNN's plans for steps of `n` images by time; waits for the device.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn tune(&mut self, n: usize) -> Result<()> {
        match &mut self.body {
            Body::Chain(chain) => chain.tune(&mut self.base, n),
            Body::Transfer(transfer) => transfer.tune(&mut self.base, n),
        }
    }

    /// Bytes of workspace of cuDNN.
    pub(crate) fn workspace_bytes(&self) -> usize {
        self.base.convolutions.workspace_bytes()
    }

    /// Images to logits, and to the loss where there are targets.
    fn forward(&mut self, images: Images, targets: Option<Targets>) -> Result<Ends> {
        let n = images.n;
        assert!(n >= 1 && n <= self.most_images);
        let base = &mut self.base;
        let ends = match &mut self.body {
            Body::Chain(chain) => {
                chain.forward(base, images)?;
                chain.ends(base)
            }
            Body::Transfer(transfer) => {
                transfer.forward(base, images)?;
                transfer.ends(base)
            }
        };
        base.head.forward(&mut base.device, ends, n, targets)?;
        Ok(ends)
    }

    /// Logits of images, once the stream has come here.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn logits(&mut self, images: Images) -> Result<Vec<f32>> {
        self.forward(images, None)?;
        let base = &self.base;
        base.device.read(&base.head.logits, 0, images.n)
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
        mut after_layer: impl FnMut(&mut Base, usize) -> Result<()>,
    ) -> Result<()> {
        let ends = self.forward(images, Some(targets))?;
        let (base, n) = (&mut self.base, images.n);
        let gradients = match &self.body {
            Body::Chain(chain) => chain.end_gradients(base),
            Body::Transfer(transfer) => transfer.end_gradients(base),
        };
        let (head, device) = (&base.head, &mut base.device);
        head.backward(device, base.precision, (ends, gradients), n, targets)?;
        match &mut self.body {
            Body::Chain(chain) => chain.backward(base, images, &mut after_layer),
            Body::Transfer(transfer) => transfer.backward(base, images, &mut after_layer),
        }
    }

    /// All gradients and the loss become 0: a rank without images.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn no_gradients(&mut self, loss: &Memory, step: usize) -> Result<()> {
        let device = &self.base.device;
        device.clear(&self.base.parameters.gradients)?;
        device.clear_range(loss, 4 * step, 4)
    }

    /// One step of the optimiser; for Adam `rate` has the correction of the step in it.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn update(&mut self, rate: f32) -> Result<()> {
        let Base {
            device, parameters, ..
        } = &mut self.base;
        parameters.update(device, rate)?;
        if let Body::Transfer(transfer) = &mut self.body {
            transfer.has_new_weights(true);
        }
        Ok(())
    }
}

/// A grid for a kernel that goes over `cells` with all their vectors of channels and leaves partial sums in the scratch memory, and the number of these.
pub(crate) fn summing_grid(base: &Base, cells: usize, channels: usize) -> (Grid, usize) {
    let length = 16 / base.precision.bytes();
    let vectors = channels / length;
    // Vectors of a block's threads, a power of two, and cells.
    let across = ((vectors + 1).next_power_of_two() / 2).clamp(1, 32);
    let down = 256 / across;
    let parts = cells
        .div_ceil(down)
        .min(8 * base.device.n_multiprocessors())
        .min(MOST_PARTS);
    let grid = Grid {
        blocks: [parts, vectors.div_ceil(across), 1],
        threads: [across, down],
        shared_bytes: 256 * length * 4,
    };
    (grid, parts)
}

impl Base {
    /// Adds up the partial sums in the scratch memory.
    pub(crate) fn sum_parts(&mut self, parts: usize, channels: usize, to: u64) -> Result<()> {
        let arguments = [
            Pointer(self.scratch.pointer()),
            Pointer(to),
            Int(parts),
            Int(channels),
        ];
        let grid = Grid {
            blocks: [channels.div_ceil(SUM_BLOCK[0]), 1, 1],
            threads: SUM_BLOCK,
            shared_bytes: 0,
        };
        self.device.launch("sum_parts", grid, &arguments)
    }
}
