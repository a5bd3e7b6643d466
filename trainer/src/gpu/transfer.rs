//! A transfer learner's backbone on the GPU: from images to features, and back.
//!
//! What is computed is [`crate::transfer`]'s; which layers there are is [`crate::backbone`]'s; where everything lies is [`super::graph`]'s. Each normalisation is folded
//! into its filter and bias on the GPU, from the master weights, as often as these change: once where the backbone is frozen. Behind a convolution (cuDNN) stands one kernel for bias and ReLU, which
//! also writes the map to its place in a concatenation; a sum adds the biases of the convolutions before it by itself. On the way back one kernel adds up the parts of a map's
//! gradient, closes what ReLU closed, and sums the bias' gradient; cuDNN's two passes follow, and one kernel takes the folded gradients apart.

use anyhow::Result;

use super::convolution::{Pass, Shape, Tensors};
use super::device::Argument::{Float, Int, Long, Pointer};
use super::device::{Argument, Grid, Memory};
use super::graph::{Filter, Graph, Map, Node};
use super::head::Ends;
use super::network::{Base, Images, MOST_PARTS, stored, summing_grid};
use crate::backbone::{Layer, Source, Window};
use crate::transfer::PER_CONVOLUTION;

/// Proposals of cuDNN that are timed for each convolution: there are dozens.
const MOST_TIMED: usize = 8;
/// Threads for an output channel's filter.
const FOLDING_THREADS: usize = 128;

/// The body in the GPU's memory.
#[derive(Debug)]
pub(crate) struct Transfer {
    graph: Graph,
    /// All regions of the graph.
    regions: Memory,
    /// Folded filters and biases.
    filters: Memory,
    biases: Memory,
    /// Sums of gradients over images and places.
    bias_gradients: Memory,
    /// The parts of each node's gradient, as `Part` in `kernels.cu`, and where each node's begin.
    parts: Memory,
    first_part: Vec<usize>,
    /// Bias of the features, and where its gradient goes.
    no_bias: Memory,
    no_gradient: Memory,
    /// Whether the filters are those of the weights.
    is_folded: bool,
}

/// Words of a part in `kernels.cu`.
const PART_WORDS: usize = 4;

impl Transfer {
    /// In fresh memory; `base` has the end's already.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn new(base: &Base, graph: Graph) -> Result<Self> {
        let device = &base.device;
        let regions = device.zeros(graph.n_bytes)?;
        let (mut words, mut first_part) = (Vec::<u64>::new(), Vec::new());
        for node in &graph.nodes {
            first_part.push(words.len() / PART_WORDS);
            for part in &node.parts {
                let from = part.first * base.precision.bytes();
                let at = match part.region {
                    Some(region) => regions.pointer() + graph.range(region).0 as u64,
                    None => base.head.gradient.pointer(),
                };
                words.extend([at + from as u64, part.image as u64, part.place as u64]);
                words.push(u64::from(part.scale.to_bits()));
            }
        }
        let parts = device.zeros(8 * words.len())?;
        device.write(&parts, 0, &words)?;
        let n_features = graph.n_features();
        Ok(Self {
            regions,
            filters: device.zeros(graph.n_filters * base.precision.bytes())?,
            biases: device.zeros(4 * graph.n_biases)?,
            bias_gradients: device.zeros(4 * graph.n_biases)?,
            parts,
            first_part,
            no_bias: device.zeros(4 * n_features)?,
            no_gradient: device.zeros(4 * n_features)?,
            is_folded: false,
            graph,
        })
    }

    /// Bytes of the scratch memory: partial sums of gradients, or the gradient of a folded filter.
    pub(crate) fn scratch_bytes(graph: &Graph, value_bytes: usize) -> usize {
        let (filter, channels) = graph.widest();
        (4 * MOST_PARTS * channels).max(value_bytes * filter)
    }

    /// The weights were changed: by the optimiser, or from outside.
    pub(crate) fn has_new_weights(&mut self, is_by_optimiser: bool) {
        self.is_folded &= is_by_optimiser && !self.graph.is_trained;
    }

    /// The parameters behind the features.
    pub(crate) fn ends(&self, base: &Base) -> Ends {
        let fc = PER_CONVOLUTION * self.graph.n_convolutions();
        Ends {
            bias1: self.no_bias.pointer(),
            weight2: base.parameters.weight(fc),
            bias2: base.parameters.weight(fc + 1),
        }
    }

    /// Where their gradients go.
    pub(crate) fn end_gradients(&self, base: &Base) -> Ends {
        let fc = PER_CONVOLUTION * self.graph.n_convolutions();
        Ends {
            bias1: self.no_gradient.pointer(),
            weight2: base.parameters.gradient(fc),
            bias2: base.parameters.gradient(fc + 1),
        }
    }

    fn region(&self, region: usize) -> u64 {
        let (at, n_bytes) = self.graph.range(region);
        self.regions.range(at, n_bytes)
    }

    fn map(&self, map: &Map) -> u64 {
        let (at, n_bytes) = self.graph.range_of(map);
        self.regions.range(at, n_bytes)
    }

    fn input(&self, index: usize) -> &Map {
        self.graph.map(self.graph.backbone.nodes[index].inputs[0])
    }

    fn filter(&self, base: &Base, node: &Node, filter: Filter) -> u64 {
        let bytes = base.precision.bytes();
        let n_values = filter.length * node.map.channels;
        self.filters.range(filter.at * bytes, n_values * bytes)
    }

    fn shape(&self, index: usize, window: Window, n: usize) -> Shape {
        let input = self.input(index);
        Shape {
            n_images: n,
            channels_in: input.channels,
            channels_out: self.graph.nodes[index].map.channels,
            input: input.sides,
            window: window.kernel,
            stride: [window.stride; 2],
            padding: window.padding,
        }
    }

    /// What a pass of a node's convolution reads and writes; `None` for the gradient of an image.
    fn tensors(&self, base: &Base, index: usize, filter: Filter, pass: Pass) -> Option<Tensors> {
        let node = &self.graph.nodes[index];
        let input = self.map(self.input(index));
        Some(match pass {
            Pass::Forward => Tensors {
                input,
                filter: self.filter(base, node, filter),
                output: self.region(node.raw),
            },
            Pass::FilterGradient => Tensors {
                input,
                filter: base.scratch.pointer(),
                output: self.region(node.gradient),
            },
            Pass::InputGradient => Tensors {
                input: self.region(node.input_gradient?),
                filter: self.filter(base, node, filter),
                output: self.region(node.gradient),
            },
        })
    }

    /// Chooses cuDNN's plans for steps of `n` images by time; waits for the device.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn tune(&mut self, base: &mut Base, n: usize) -> Result<()> {
        let passes: &[Pass] = if self.graph.is_trained {
            &[Pass::Forward, Pass::FilterGradient, Pass::InputGradient]
        } else {
            &[Pass::Forward]
        };
        for index in 0..self.graph.nodes.len() {
            let Some(filter) = self.graph.nodes[index].filter else {
                continue;
            };
            let shape = self.shape(index, filter.window, n);
            for pass in passes {
                if let Some(tensors) = self.tensors(base, index, filter, *pass) {
                    let convolutions = &mut base.convolutions;
                    convolutions.tune(&base.device, shape, *pass, tensors, MOST_TIMED)?;
                }
            }
        }
        Ok(())
    }

    /// Filters and biases from kernels and normalisations.
    fn fold(&mut self, base: &mut Base) -> Result<()> {
        if self.is_folded {
            return Ok(());
        }
        for node in &self.graph.nodes {
            let Some(filter) = node.filter else { continue };
            let parameter = PER_CONVOLUTION * filter.layer;
            let [weight, gamma, beta, mean, variance] =
                [0, 1, 2, 3, 4].map(|at| Pointer(base.parameters.weight(parameter + at)));
            let arguments = [
                weight,
                gamma,
                beta,
                mean,
                variance,
                Float(self.graph.backbone.epsilon),
                Pointer(self.filter(base, node, filter)),
                Pointer(self.biases.range(4 * node.bias, 4 * node.map.channels)),
                Int(filter.length),
            ];
            let grid = by_channel(node);
            let kernel = stored!(base.precision, "fold");
            base.device.launch(kernel, grid, &arguments)?;
        }
        self.is_folded = true;
        Ok(())
    }

    /// From images to features.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn forward(&mut self, base: &mut Base, images: Images) -> Result<()> {
        self.fold(base)?;
        let [red, green, blue] = self.graph.backbone.mean;
        let [of_red, of_green, of_blue] = self.graph.backbone.deviation;
        let arguments = [
            Pointer(images.pixels),
            Pointer(images.numbers),
            Pointer(images.changes),
            Pointer(self.map(&self.graph.image)),
            Int(images.n),
            Int(base.side),
            Int(base.side),
            Float(red),
            Float(green),
            Float(blue),
            Float(of_red),
            Float(of_green),
            Float(of_blue),
        ];
        let grid = Grid::of(images.n * base.side * base.side, usize::MAX);
        let kernel = stored!(base.precision, "normalise");
        base.device.launch(kernel, grid, &arguments)?;
        for index in 0..self.graph.nodes.len() {
            self.node(base, index, images.n)?;
        }
        Ok(())
    }

    fn node(&self, base: &mut Base, index: usize, n: usize) -> Result<()> {
        let (node, input) = (&self.graph.nodes[index], self.input(index));
        match &self.graph.backbone.nodes[index].layer {
            Layer::Convolution { .. } => self.convolve(base, index, n),
            Layer::MaxPool(window) => {
                let kernel = stored!(base.precision, "max_pool");
                self.pool(base, index, *window, n, kernel)
            }
            Layer::AveragePool(window) => {
                let kernel = stored!(base.precision, "mean_pool");
                self.pool(base, index, *window, n, kernel)
            }
            Layer::GlobalAverage => {
                let arguments = [
                    Pointer(self.map(input)),
                    Pointer(base.head.z.pointer()),
                    Int(n),
                    Int(input.n_places()),
                    Int(input.channels),
                ];
                let grid = vectors(base, n, &node.map);
                let kernel = stored!(base.precision, "average");
                base.device.launch(kernel, grid, &arguments)
            }
            Layer::AddRelu => self.add(base, index, n),
            // Its inputs were written to their places.
            Layer::Concat => Ok(()),
        }
    }

    fn convolve(&self, base: &mut Base, index: usize, n: usize) -> Result<()> {
        let node = &self.graph.nodes[index];
        let Some(filter) = node.filter else {
            return Ok(());
        };
        self.pass(base, index, filter, Pass::Forward, n)?;
        if !filter.has_relu {
            return Ok(());
        }
        let arguments = [
            Pointer(self.region(node.raw)),
            Pointer(self.biases.range(4 * node.bias, 4 * node.map.channels)),
            Pointer(self.map(&node.map)),
            Int(node.map.pitch),
            Long(n * node.map.n_places()),
            Int(node.map.channels),
        ];
        let grid = vectors(base, n * node.map.n_places(), &node.map);
        let kernel = stored!(base.precision, "bias_relu");
        base.device.launch(kernel, grid, &arguments)
    }

    fn pass(
        &self,
        base: &mut Base,
        index: usize,
        filter: Filter,
        pass: Pass,
        n: usize,
    ) -> Result<()> {
        let Some(tensors) = self.tensors(base, index, filter, pass) else {
            return Ok(());
        };
        let shape = self.shape(index, filter.window, n);
        base.convolutions.run(&base.device, shape, pass, tensors)
    }

    fn add(&self, base: &mut Base, index: usize, n: usize) -> Result<()> {
        let map = &self.graph.nodes[index].map;
        let mut arguments = Vec::new();
        for source in &self.graph.backbone.nodes[index].inputs {
            arguments.push(Pointer(self.map(self.graph.map(*source))));
            // A convolution without ReLU has left its bias to this sum.
            let bias = match *source {
                Source::Node(input) => match self.graph.nodes[input] {
                    Node {
                        filter:
                            Some(Filter {
                                has_relu: false, ..
                            }),
                        bias,
                        ..
                    } => self.biases.range(4 * bias, 4 * map.channels),
                    _ => 0,
                },
                Source::Image => 0,
            };
            arguments.push(Pointer(bias));
        }
        arguments.extend([
            Pointer(self.map(map)),
            Long(n * map.n_places()),
            Int(map.channels),
        ]);
        let grid = vectors(base, n * map.n_places(), map);
        let kernel = stored!(base.precision, "add_relu");
        base.device.launch(kernel, grid, &arguments)
    }

    fn pool(
        &self,
        base: &mut Base,
        index: usize,
        window: Window,
        n: usize,
        kernel: &'static str,
    ) -> Result<()> {
        let (map, input) = (&self.graph.nodes[index].map, self.input(index));
        let mut arguments = vec![
            Pointer(self.map(input)),
            Pointer(self.map(map)),
            Int(map.pitch),
            Pointer(self.argmax(index)),
            Int(n),
            Int(map.channels),
        ];
        arguments.extend(geometry(window, input, map));
        let grid = vectors(base, n * map.n_places(), map);
        base.device.launch(kernel, grid, &arguments)
    }

    /// Where the places of largest values lie; a mean has none.
    fn argmax(&self, index: usize) -> u64 {
        match self.graph.backbone.nodes[index].layer {
            Layer::MaxPool(_) => self.region(self.graph.nodes[index].argmax),
            _ => 0,
        }
    }

    /// From the features' gradient to those of all parameters before them, where these are trained.
    ///
    /// # Errors
    /// CUDA's, and those of `after_layer`.
    pub(crate) fn backward(
        &mut self,
        base: &mut Base,
        images: Images,
        after_layer: &mut dyn FnMut(&mut Base, usize) -> Result<()>,
    ) -> Result<()> {
        after_layer(base, self.graph.n_convolutions())?;
        if !self.graph.is_trained {
            return Ok(());
        }
        for index in (0..self.graph.nodes.len()).rev() {
            let node = &self.graph.nodes[index];
            match (&self.graph.backbone.nodes[index].layer, node.filter) {
                (_, Some(filter)) => {
                    if filter.has_relu {
                        self.relu_backward(base, index, images.n)?;
                    }
                    self.pass(base, index, filter, Pass::FilterGradient, images.n)?;
                    self.unfold(base, index, filter)?;
                    after_layer(base, filter.layer)?;
                    self.pass(base, index, filter, Pass::InputGradient, images.n)?;
                }
                (Layer::AddRelu, _) => self.relu_backward(base, index, images.n)?,
                (Layer::MaxPool(window), _) => {
                    let kernel = stored!(base.precision, "max_pool_backward");
                    self.pool_backward(base, index, *window, images.n, kernel)?;
                }
                (Layer::AveragePool(window), _) => {
                    let kernel = stored!(base.precision, "mean_pool_backward");
                    self.pool_backward(base, index, *window, images.n, kernel)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The parts of a node's gradient, and how many.
    fn parts(&self, index: usize) -> [Argument; 2] {
        let n = self.graph.nodes[index].parts.len();
        let part = 8 * PART_WORDS;
        let at = self.parts.range(part * self.first_part[index], part * n);
        [Pointer(at), Int(n)]
    }

    /// From a map's gradient to that before its ReLU, and its sums.
    fn relu_backward(&self, base: &mut Base, index: usize, n: usize) -> Result<()> {
        let node = &self.graph.nodes[index];
        let map = &node.map;
        let (grid, n_sums) = summing_grid(base, n * map.n_places(), map.channels);
        let [parts, n_parts] = self.parts(index);
        let arguments = [
            Pointer(self.map(map)),
            Int(map.pitch),
            parts,
            n_parts,
            Pointer(self.region(node.gradient)),
            Pointer(base.scratch.pointer()),
            Int(n),
            Int(map.n_places()),
            Int(map.channels),
        ];
        let kernel = stored!(base.precision, "relu_backward");
        base.device.launch(kernel, grid, &arguments)?;
        let to = self.sums(node);
        base.sum_parts(n_sums, map.channels, to)
    }

    /// Where the gradient of a convolution's folded bias lies.
    fn sums(&self, node: &Node) -> u64 {
        let (at, n) = (node.bias_gradient, node.map.channels);
        self.bias_gradients.range(4 * at, 4 * n)
    }

    fn unfold(&self, base: &mut Base, index: usize, filter: Filter) -> Result<()> {
        let node = &self.graph.nodes[index];
        let parameter = PER_CONVOLUTION * filter.layer;
        let weight = |at: usize| Pointer(base.parameters.weight(parameter + at));
        let gradient = |at: usize| Pointer(base.parameters.gradient(parameter + at));
        let arguments = [
            Pointer(base.scratch.pointer()),
            Pointer(self.sums(node)),
            weight(0),
            weight(1),
            weight(3),
            weight(4),
            Float(self.graph.backbone.epsilon),
            gradient(0),
            gradient(1),
            gradient(2),
            Int(filter.length),
        ];
        let kernel = stored!(base.precision, "unfold");
        base.device.launch(kernel, by_channel(node), &arguments)
    }

    fn pool_backward(
        &self,
        base: &mut Base,
        index: usize,
        window: Window,
        n: usize,
        kernel: &'static str,
    ) -> Result<()> {
        let (node, input) = (&self.graph.nodes[index], self.input(index));
        let Some(to) = node.input_gradient else {
            return Ok(());
        };
        let [parts, n_parts] = self.parts(index);
        let mut arguments = vec![
            Pointer(self.argmax(index)),
            parts,
            n_parts,
            Pointer(self.region(to)),
            Int(n),
            Int(input.channels),
        ];
        arguments.extend(geometry(window, input, &node.map));
        let grid = vectors(base, n * input.n_places(), input);
        base.device.launch(kernel, grid, &arguments)
    }
}

/// A block for each channel of a node's map.
fn by_channel(node: &Node) -> Grid {
    Grid {
        blocks: [node.map.channels, 1, 1],
        threads: [FOLDING_THREADS, 1],
        shared_bytes: 0,
    }
}

/// A thread for each 16 bytes of channels of `n_places` places.
fn vectors(base: &Base, n_places: usize, map: &Map) -> Grid {
    let n = n_places * map.channels * base.precision.bytes() / 16;
    Grid::of(n, usize::MAX)
}

/// As `Pool` in `kernels.cu`.
fn geometry(window: Window, input: &Map, output: &Map) -> [Argument; 9] {
    let Window {
        kernel,
        stride,
        padding,
    } = window;
    [
        Int(kernel[0]),
        Int(kernel[1]),
        Int(stride),
        Int(padding[0]),
        Int(padding[1]),
        Int(input.sides[0]),
        Int(input.sides[1]),
        Int(output.sides[0]),
        Int(output.sides[1]),
    ]
}
