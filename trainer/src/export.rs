//! `trainer export`: trained or random weights to a standard f32 ONNX file.
//!
//! In: weights by name (`conv1.weight [O,I,3,3]`, `conv1.bias`, ..., `dense1.weight [O,I]`, ...) and the manifest. Out: one file,
//! opset 13, IR 7: `image` u8 `[N,3,256,256]` -> Cast -> Mul 1/255 -> conv1 -> relu1 -> pool1 -> ... -> flatten -> dense1 -> ... ->
//! `logit` f32 `[N,1]` -> Sigmoid -> `probability` f32 `[N,1]`. A tensor has its producer's name, the shape of every tensor
//! stands in `value_info`, weights are raw data, the manifest stands in `metadata_props` under
//! [`shared::manifest::METADATA_KEY`]. Making the file smaller and faster is [`crate::quantize`]'s.
//!
//! A transfer learner's weights come under torchvision's names; its file holds the batch normalisations folded into the convolutions, and the
//! normalisation of the image as a 1x1 convolution `normalise`, which a kernel that pads with zeros cannot take into itself.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors};
use serde::Serialize;
use shared::manifest::{
    DataKind, FORMAT_VERSION, METADATA_KEY, Manifest, Output, Precision, TrainingData, Validation,
};
use shared::spec::PreprocessSpec;

use crate::architecture::{self, Architecture, Family, pooled_side};
use crate::backbone::{Backbone, Layer, Node, Source, Window, backbone};
use crate::cache::{file_digest, write_atomically};
use crate::exit::{Exit, fault};
use crate::network::{Network, NetworkError};
use crate::onnx::{
    self, DataType, GraphProto, ModelProto, NodeProto, OnnxError, TensorProto, ValueInfoProto,
};
use crate::provenance;
use crate::quantization_aware;

/// Name of the input, u8 `[N, 3, 256, 256]`.
pub const IMAGE: &str = "image";
/// Name of the first output, f32 `[N, 1]`.
pub const LOGIT: &str = "logit";
/// Name of the second output, f32 `[N, 1]`, the sigmoid of the first.
pub const PROBABILITY: &str = "probability";
/// Scale of the input: the network's first operation, as f32.
pub const IMAGE_SCALE: f32 = 1.0 / 255.0;

const SIDE: usize = 256;
const CHANNELS: usize = 3;
/// Self-test images that a transfer learner's random weights get their statistics from.
const SETTLING_IMAGES: usize = 4;

/// One weight or bias: shape outermost first, values row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Weight {
    /// Shape.
    pub shape: Vec<usize>,
    /// Values.
    pub values: Vec<f32>,
}

/// Weights by name.
pub type Weights = BTreeMap<String, Weight>;

/// Why weights cannot be written as a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The architecture has no layers.
    #[error("{name} has no network to export")]
    NoNetwork {
        /// Name of the architecture.
        name: &'static str,
    },
    /// A weight is missing.
    #[error("the weights hold no {name}")]
    Missing {
        /// Name of the weight.
        name: String,
    },
    /// A weight has the wrong shape.
    #[error("{name} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Name of the weight.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that the architecture asks for.
        expected: Vec<usize>,
    },
    /// A weight is NaN or infinite.
    #[error("{name} holds a value that is not finite")]
    NotFinite {
        /// Name of the weight.
        name: String,
    },
    /// The file cannot be encoded.
    #[error(transparent)]
    Onnx(#[from] OnnxError),
    /// Random weights could not be made.
    #[error(transparent)]
    Network(#[from] NetworkError),
}

/// The f32 graph of `architecture` at `width` over `weights`, without manifest.
///
/// # Errors
///
/// [`ExportError`] where the weights do not fit the architecture.
pub fn float_model(
    architecture: &Architecture,
    width: f64,
    weights: &Weights,
) -> Result<ModelProto, ExportError> {
    match (architecture.family, backbone(architecture.family, width)) {
        (_, Some(backbone)) => transfer_model(architecture, &backbone, weights),
        (Family::Convolutional, None) => convolutional_model(architecture, width, weights),
        _ => Err(ExportError::NoNetwork {
            name: architecture.name,
        }),
    }
}

/// The graph of a transfer learner.
fn transfer_model(
    architecture: &Architecture,
    backbone: &Backbone,
    weights: &Weights,
) -> Result<ModelProto, ExportError> {
    let mut graph = GraphBuilder::begin(architecture.name);
    let scaled = graph.scaled_image();
    let image = graph.normalised_image(&scaled, backbone);
    // Name and rows and columns of each node's output.
    let mut outputs: Vec<(String, [usize; 2])> = Vec::new();
    for node in &backbone.nodes {
        let of_source = |source: &Source| match *source {
            Source::Image => (image.clone(), [SIDE; 2]),
            Source::Node(index) => outputs[index].clone(),
        };
        let inputs: Vec<(String, [usize; 2])> = node.inputs.iter().map(of_source).collect();
        outputs.push(graph.backbone_node(backbone, node, &inputs, weights)?);
    }
    let features = outputs.last().map_or("", |(name, _)| name.as_str());
    let n_features = backbone.n_features();
    let flatten = NodeProto::new("Flatten", "flatten", &[features], "flatten").with_int("axis", 1);
    graph.node(flatten, &[n_features]);
    graph.weight("fc.weight", weights, &[1, n_features])?;
    graph.weight("fc.bias", weights, &[1])?;
    graph.dense("fc", "flatten", LOGIT, 1);
    Ok(graph.finish())
}

/// The values of `name`, which must have the shape `expected`.
fn checked<'a>(
    weights: &'a Weights,
    name: &str,
    expected: &[usize],
) -> Result<&'a [f32], ExportError> {
    let missing = || ExportError::Missing {
        name: name.to_owned(),
    };
    let weight = weights.get(name).ok_or_else(missing)?;
    if weight.shape != expected || weight.values.len() != expected.iter().product::<usize>() {
        return Err(ExportError::Shape {
            name: name.to_owned(),
            found: weight.shape.clone(),
            expected: expected.to_vec(),
        });
    }
    if !weight.values.iter().all(|value| value.is_finite()) {
        return Err(ExportError::NotFinite {
            name: name.to_owned(),
        });
    }
    Ok(&weight.values)
}

/// Kernel and bias with the normalisation `norm` folded in: `gamma (W x - mean) / sqrt(variance + epsilon) + beta`.
fn folded(
    weights: &Weights,
    (kernel, shape): (&str, &[usize]),
    norm: &str,
    epsilon: f32,
) -> Result<(Vec<f32>, Vec<f32>), ExportError> {
    let n_outputs = shape[0];
    let field = |field: &str| checked(weights, &format!("{norm}.{field}"), &[n_outputs]);
    let (gamma, beta) = (field("weight")?, field("bias")?);
    let (mean, variance) = (field("running_mean")?, field("running_var")?);
    let mut kernel = checked(weights, &format!("{kernel}.weight"), shape)?.to_vec();
    let mut bias = beta.to_vec();
    let a_channel = kernel.len() / n_outputs.max(1);
    for (channel, kernel) in kernel.chunks_exact_mut(a_channel.max(1)).enumerate() {
        let factor = gamma[channel] / (variance[channel] + epsilon).sqrt();
        kernel.iter_mut().for_each(|value| *value *= factor);
        bias[channel] -= mean[channel] * factor;
    }
    Ok((kernel, bias))
}

/// A node with the window's attributes.
fn windowed(node: NodeProto, window: Window) -> NodeProto {
    let signed = |extents: &[usize]| -> Vec<i64> {
        // A window's extents are a few dozen.
        extents
            .iter()
            .map(|&extent| i64::try_from(extent).unwrap_or(i64::MAX))
            .collect()
    };
    let [rows, columns] = window.padding;
    node.with_ints("kernel_shape", &signed(&window.kernel))
        .with_ints("pads", &signed(&[rows, columns, rows, columns]))
        .with_ints("strides", &signed(&[window.stride, window.stride]))
}

/// Shapes of all weights of a convolutional `architecture` at `width`, by name.
#[must_use]
pub fn weight_shapes(architecture: &Architecture, width: f64) -> Vec<(String, Vec<usize>)> {
    let units = architecture.scaled(width);
    let mut shapes = Vec::new();
    let mut n_inputs = CHANNELS;
    for (index, &n_outputs) in units.convolutions.iter().enumerate() {
        shapes.push((
            format!("conv{}.weight", index + 1),
            vec![n_outputs, n_inputs, 3, 3],
        ));
        shapes.push((format!("conv{}.bias", index + 1), vec![n_outputs]));
        n_inputs = n_outputs;
    }
    let side = pooled_side(SIDE, units.convolutions.len());
    n_inputs *= side * side;
    for (index, n_outputs) in [units.dense, 1].into_iter().enumerate() {
        shapes.push((
            format!("dense{}.weight", index + 1),
            vec![n_outputs, n_inputs],
        ));
        shapes.push((format!("dense{}.bias", index + 1), vec![n_outputs]));
        n_inputs = n_outputs;
    }
    shapes
}

fn convolutional_model(
    architecture: &Architecture,
    width: f64,
    weights: &Weights,
) -> Result<ModelProto, ExportError> {
    let mut graph = GraphBuilder::begin(architecture.name);
    for (name, expected) in weight_shapes(architecture, width) {
        graph.weight(&name, weights, &expected)?;
    }
    let units = architecture.scaled(width);
    let (mut tensor, mut side) = (graph.scaled_image(), SIDE);
    for (index, &n_outputs) in units.convolutions.iter().enumerate() {
        let (conv, relu, pool) = (
            format!("conv{}", index + 1),
            format!("relu{}", index + 1),
            format!("pool{}", index + 1),
        );
        side -= 2;
        let inputs = [
            tensor.as_str(),
            &format!("{conv}.weight"),
            &format!("{conv}.bias"),
        ];
        let node = NodeProto::new("Conv", &conv, &inputs, &conv).with_ints("kernel_shape", &[3, 3]);
        graph.node(
            node.with_ints("pads", &[0, 0, 0, 0])
                .with_ints("strides", &[1, 1]),
            &[n_outputs, side, side],
        );
        graph.node(
            NodeProto::new("Relu", &relu, &[&conv], &relu),
            &[n_outputs, side, side],
        );
        side /= 2;
        let node =
            NodeProto::new("MaxPool", &pool, &[&relu], &pool).with_ints("kernel_shape", &[2, 2]);
        graph.node(node.with_ints("strides", &[2, 2]), &[n_outputs, side, side]);
        tensor = pool;
    }
    let n_features = units
        .convolutions
        .last()
        .map_or(0, |n_channels| n_channels * side * side);
    graph.node(
        NodeProto::new("Flatten", "flatten", &[&tensor], "flatten").with_int("axis", 1),
        &[n_features],
    );
    graph.dense("dense1", "flatten", "dense1", units.dense);
    let relu = format!("relu{}", units.convolutions.len() + 1);
    graph.node(
        NodeProto::new("Relu", &relu, &["dense1"], &relu),
        &[units.dense],
    );
    graph.dense("dense2", &relu, LOGIT, 1);
    Ok(graph.finish())
}

/// A graph that grows in topological order, with the shape of every tensor.
pub(crate) struct GraphBuilder {
    graph: GraphProto,
}

impl GraphBuilder {
    pub(crate) fn begin(name: &str) -> Self {
        let input = vec![ValueInfoProto::batched(
            IMAGE,
            DataType::Uint8,
            &[CHANNELS, SIDE, SIDE],
        )];
        Self {
            graph: GraphProto {
                name: name.to_owned(),
                input,
                ..GraphProto::default()
            },
        }
    }

    /// Adds a node whose only output has `[N, dims...]`.
    pub(crate) fn node(&mut self, node: NodeProto, dims: &[usize]) {
        self.graph.value_info.push(ValueInfoProto::batched(
            &node.output[0],
            DataType::Float,
            dims,
        ));
        self.graph.node.push(node);
    }

    /// `image` as f32 in `[0, 1]`; returns the tensor's name.
    fn scaled_image(&mut self) -> String {
        let dims = [CHANNELS, SIDE, SIDE];
        let cast = NodeProto::new("Cast", "image_float", &[IMAGE], "image_float")
            .with_int("to", i64::from(DataType::Float as i32));
        self.node(cast, &dims);
        self.graph
            .initializer
            .push(TensorProto::float("image_scale", &[], &[IMAGE_SCALE]));
        self.node(
            NodeProto::new(
                "Mul",
                "image_scaled",
                &["image_float", "image_scale"],
                "image_scaled",
            ),
            &dims,
        );
        "image_scaled".to_owned()
    }

    fn weight(
        &mut self,
        name: &str,
        weights: &Weights,
        expected: &[usize],
    ) -> Result<(), ExportError> {
        let values = checked(weights, name, expected)?;
        self.constant(name, expected, values);
        Ok(())
    }

    fn constant(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let constant = TensorProto::float(name, shape, values);
        self.graph.initializer.push(constant);
    }

    /// `(image - mean) / deviation` in each channel, as a 1x1 convolution; returns the tensor's name.
    fn normalised_image(&mut self, image: &str, backbone: &Backbone) -> String {
        let (mut kernel, mut bias) = ([0.0; CHANNELS * CHANNELS], [0.0; CHANNELS]);
        for channel in 0..CHANNELS {
            kernel[channel * (CHANNELS + 1)] = 1.0 / backbone.deviation[channel];
            bias[channel] = -backbone.mean[channel] / backbone.deviation[channel];
        }
        self.constant("normalise.weight", &[CHANNELS, CHANNELS, 1, 1], &kernel);
        self.constant("normalise.bias", &[CHANNELS], &bias);
        let inputs = [image, "normalise.weight", "normalise.bias"];
        let window = Window {
            kernel: [1, 1],
            stride: 1,
            padding: [0, 0],
        };
        let node = NodeProto::new("Conv", "normalise", &inputs, "normalise");
        self.node(windowed(node, window), &[CHANNELS, SIDE, SIDE]);
        "normalise".to_owned()
    }

    /// Adds a node of a backbone; returns name and rows and columns of its output.
    fn backbone_node(
        &mut self,
        backbone: &Backbone,
        node: &Node,
        inputs: &[(String, [usize; 2])],
        weights: &Weights,
    ) -> Result<(String, [usize; 2]), ExportError> {
        let (name, channels) = (node.name.as_str(), node.channels);
        let names: Vec<&str> = inputs.iter().map(|(name, _)| name.as_str()).collect();
        let input_sides = inputs.first().map_or([0, 0], |(_, sides)| *sides);
        let sides_of = |window: Window| window.output(input_sides).unwrap_or([0, 0]);
        let (new, sides, has_relu) = match &node.layer {
            Layer::Convolution {
                kernel_name,
                norm_name,
                window,
                has_relu,
            } => {
                let [rows, columns] = window.kernel;
                let shape = [
                    channels,
                    backbone.channels_of(node.inputs[0]),
                    rows,
                    columns,
                ];
                let (kernel, bias) =
                    folded(weights, (kernel_name, &shape), norm_name, backbone.epsilon)?;
                let constants = [format!("{name}.weight"), format!("{name}.bias")];
                self.constant(&constants[0], &shape, &kernel);
                self.constant(&constants[1], &[channels], &bias);
                let inputs = [names[0], &constants[0], &constants[1]];
                let node = NodeProto::new("Conv", name, &inputs, name);
                (windowed(node, *window), sides_of(*window), *has_relu)
            }
            Layer::MaxPool(window) => {
                let node = NodeProto::new("MaxPool", name, &names, name);
                (windowed(node, *window), sides_of(*window), false)
            }
            Layer::AveragePool(window) => {
                let node = NodeProto::new("AveragePool", name, &names, name);
                let node = windowed(node, *window).with_int("count_include_pad", 1);
                (node, sides_of(*window), false)
            }
            Layer::GlobalAverage => {
                let node = NodeProto::new("GlobalAveragePool", name, &names, name);
                (node, [1, 1], false)
            }
            Layer::AddRelu => (NodeProto::new("Add", name, &names, name), input_sides, true),
            Layer::Concat => {
                let node = NodeProto::new("Concat", name, &names, name).with_int("axis", 1);
                (node, input_sides, false)
            }
        };
        let dims = [channels, sides[0], sides[1]];
        self.node(new, &dims);
        if !has_relu {
            return Ok((name.to_owned(), sides));
        }
        let relu = format!("{name}.relu");
        self.node(NodeProto::new("Relu", &relu, &[name], &relu), &dims);
        Ok((relu, sides))
    }

    fn dense(&mut self, name: &str, input: &str, output: &str, n_outputs: usize) {
        let inputs = [input, &format!("{name}.weight"), &format!("{name}.bias")];
        self.node(
            NodeProto::new("Gemm", name, &inputs, output).with_int("transB", 1),
            &[n_outputs],
        );
    }

    /// Adds the sigmoid and declares the outputs; the tensor `logit` must stand.
    fn finish(mut self) -> ModelProto {
        self.node(
            NodeProto::new("Sigmoid", PROBABILITY, &[LOGIT], PROBABILITY),
            &[1],
        );
        self.graph
            .value_info
            .retain(|value| value.name != LOGIT && value.name != PROBABILITY);
        self.graph.output = [LOGIT, PROBABILITY]
            .map(|name| ValueInfoProto::batched(name, DataType::Float, &[1]))
            .to_vec();
        ModelProto::new(self.graph)
    }
}

/// A transfer learner's random weights, with the statistics that they have on the self-test's images.
fn random_transfer(
    architecture: &'static Architecture,
    width: f64,
    seed: u64,
) -> Result<Weights, NetworkError> {
    let network = Network::new(architecture, width, seed, &Device::Cpu)?;
    let mut images = vec![0; SETTLING_IMAGES * shared::TENSOR_BYTES];
    for (seed, image) in (1..).zip(images.chunks_exact_mut(shared::TENSOR_BYTES)) {
        shared::selftest::image(seed, image);
    }
    let shape = (SETTLING_IMAGES, CHANNELS, SIDE, SIDE);
    network.settle(&Tensor::from_vec(images, shape, &Device::Cpu)?)?;
    weights_of(&network)
}

/// The weights of a network, by name.
///
/// # Errors
///
/// Where a tensor cannot be read.
pub fn weights_of(network: &Network) -> Result<Weights, NetworkError> {
    let mut weights = Weights::new();
    for parameter in network.parameters() {
        let weight = Weight {
            shape: parameter.variable.dims().to_vec(),
            values: parameter.variable.flatten_all()?.to_vec1()?,
        };
        weights.insert(parameter.name.clone(), weight);
    }
    Ok(weights)
}

/// Random weights: Glorot-uniform kernels, small random biases; the same for the same seed.
///
/// # Errors
///
/// [`ExportError::NoNetwork`] where the architecture has no layers.
pub fn random_weights(
    architecture: &'static Architecture,
    width: f64,
    seed: u64,
) -> Result<Weights, ExportError> {
    if backbone(architecture.family, width).is_some() {
        return Ok(random_transfer(architecture, width, seed)?);
    }
    if architecture.family != Family::Convolutional {
        return Err(ExportError::NoNetwork {
            name: architecture.name,
        });
    }
    let mut state = seed;
    let mut uniform = |limit: f32| {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        #[expect(
            clippy::cast_precision_loss,
            reason = "24 random bits are exact in f32"
        )]
        let unit = (mixed >> 40) as f32 / (1_u64 << 24) as f32;
        (unit * 2.0 - 1.0) * limit
    };
    let of_shape = |(name, shape): (String, Vec<usize>)| {
        let n_values: usize = shape.iter().product();
        let taps: usize = shape.iter().skip(2).product();
        #[expect(
            clippy::cast_precision_loss,
            reason = "a layer has fewer than 2^24 inputs and outputs"
        )]
        let limit = match shape[..] {
            [n_outputs, n_inputs, ..] => (6.0 / ((n_outputs + n_inputs) * taps) as f32).sqrt(),
            _ => 0.05,
        };
        let values = (0..n_values).map(|_| uniform(limit)).collect();
        (name, Weight { shape, values })
    };
    Ok(weight_shapes(architecture, width)
        .into_iter()
        .map(of_shape)
        .collect())
}

/// Arguments of `trainer export`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  trainer export --run runs/demo --out model.onnx\n  trainer export --random-init --model final --width 0.125 --seed 1 --out random.onnx\n\n\
    Research use only, not a medical device."
)]
pub struct ExportArgs {
    /// Run folder: its model.safetensors, and its manifest.json where there is one.
    #[arg(
        long,
        required_unless_present = "random_init",
        conflicts_with = "random_init"
    )]
    pub run: Option<PathBuf>,
    /// Random weights instead of a run.
    #[arg(long, requires = "model")]
    pub random_init: bool,
    /// Architecture of the random weights.
    #[arg(long, conflicts_with = "run")]
    pub model: Option<String>,
    /// Factor on the units of every convolution and hidden dense layer of the random weights.
    #[arg(long, default_value_t = 1.0, value_parser = architecture::parse_width)]
    pub width: f64,
    /// Seed of the random weights.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The ONNX file to write.
    #[arg(long)]
    pub out: PathBuf,
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

/// What `trainer export` says of the file.
#[derive(Clone, Debug, Serialize)]
pub struct ExportReport {
    /// The file.
    pub file: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Architecture.
    pub architecture: String,
    /// Width factor.
    pub width: f64,
    /// Number of weights and biases.
    pub n_parameters: u64,
    /// [`shared::RESEARCH_USE`].
    pub notice: &'static str,
}

/// Runs `trainer export`.
///
/// # Errors
///
/// Where the weights cannot be read, do not fit their architecture, or the file cannot be written.
pub fn run(args: &ExportArgs) -> anyhow::Result<ExitCode> {
    let (architecture, width, weights, manifest) = match (&args.run, &args.model) {
        (Some(run), _) => {
            let file = run.join("model.safetensors");
            let (architecture, width, weights) = read_weights(&file)?;
            (
                architecture,
                width,
                weights,
                run_manifest(run, &file, architecture, width)?,
            )
        }
        (None, model) => {
            let name = model.as_deref().unwrap_or_default();
            let architecture = architecture::find(name)
                .ok_or_else(|| fault(Exit::Usage, format!("unknown model {name:?}")))?;
            let weights = random_weights(architecture, args.width, args.seed)?;
            (
                architecture,
                args.width,
                weights,
                new_manifest(architecture, args.width),
            )
        }
    };
    let n_parameters = weights
        .values()
        .map(|weight| weight.values.len() as u64)
        .sum();
    let bytes = float_file(architecture, width, &weights, &manifest)?;
    write_file(&args.out, &bytes)?;
    let report = ExportReport {
        file: args.out.clone(),
        bytes: bytes.len() as u64,
        architecture: architecture.name.to_owned(),
        width,
        n_parameters,
        notice: shared::RESEARCH_USE,
    };
    let mut stdout = std::io::stdout().lock();
    if args.json {
        writeln!(stdout, "{}", serde_json::to_string(&report)?)?;
    } else {
        writeln!(
            stdout,
            "{}: {} at width {width}, {n_parameters} parameters, {} bytes",
            args.out.display(),
            architecture.name,
            bytes.len()
        )?;
        writeln!(stdout, "{}", shared::RESEARCH_USE)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes the weights of the safetensors file `weights` as f32 ONNX file `out`, with `manifest`.
///
/// # Errors
///
/// As [`run`].
pub fn export(weights: &Path, manifest: &Manifest, out: &Path) -> anyhow::Result<()> {
    let (architecture, width, weights) = read_weights(weights)?;
    write_file(out, &float_file(architecture, width, &weights, manifest)?)
}

/// The bytes of an f32 file.
///
/// # Errors
///
/// [`ExportError`] where the weights do not fit the architecture.
pub fn float_file(
    architecture: &Architecture,
    width: f64,
    weights: &Weights,
    manifest: &Manifest,
) -> Result<Vec<u8>, ExportError> {
    let mut model = float_model(architecture, width, weights)?;
    model.doc_string = shared::RESEARCH_USE.to_owned();
    let manifest = Manifest {
        precision: Precision::Float32,
        self_test: Vec::new(),
        ..manifest.clone()
    };
    model.set_metadata(METADATA_KEY, manifest.to_json());
    Ok(onnx::write(&model)?)
}

/// Architecture, width and weights of a safetensors file of ours.
///
/// # Errors
///
/// Where the file cannot be read, names no architecture of ours or holds something else than f32.
pub fn read_weights(path: &Path) -> anyhow::Result<(&'static Architecture, f64, Weights)> {
    let bytes =
        std::fs::read(path).with_context(|| format!("reading weights {}", path.display()))?;
    let (_, header) = SafeTensors::read_metadata(&bytes)
        .with_context(|| format!("reading weights {}", path.display()))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let name = metadata
        .get("architecture")
        .context("the weights name no architecture")?;
    let architecture = architecture::find(name)
        .with_context(|| format!("the weights are of the unknown architecture {name:?}"))?;
    let width: f64 = metadata
        .get("width")
        .context("the weights name no width")?
        .parse()
        .context("reading the width of the weights")?;
    let mut weights = Weights::new();
    for (name, view) in SafeTensors::deserialize(&bytes)?.tensors() {
        ensure!(
            view.dtype() == Dtype::F32,
            "{name} is {:?}, expected F32",
            view.dtype()
        );
        let values = view
            .data()
            .as_chunks()
            .0
            .iter()
            .map(|&value| f32::from_le_bytes(value))
            .collect();
        weights.insert(
            name,
            Weight {
                shape: view.shape().to_vec(),
                values,
            },
        );
    }
    Ok((architecture, width, weights))
}

/// A manifest that claims nothing: no training data, no metrics, no operating point.
#[must_use]
pub fn new_manifest(architecture: &Architecture, width: f64) -> Manifest {
    let output = |name: &str, meaning: &str| Output {
        name: name.to_owned(),
        meaning: meaning.to_owned(),
    };
    Manifest {
        format_version: FORMAT_VERSION,
        preprocess: PreprocessSpec::default(),
        architecture: architecture.name.to_owned(),
        width,
        precision: Precision::Float32,
        training_data: TrainingData {
            kind: DataKind::None,
            digest: String::new(),
            n_studies: 0,
            n_slices: 0,
        },
        outputs: vec![
            output(LOGIT, "pulmonary embolism present on the slice, as logit"),
            output(
                PROBABILITY,
                "sigmoid of the logit, not refitted by the temperature",
            ),
        ],
        metrics: Vec::new(),
        operating_points: Vec::new(),
        validation: Validation::Unvalidated,
        temperature: None,
        study_rule: None,
        self_test: Vec::new(),
        tools: BTreeMap::from([("trainer".to_owned(), env!("CARGO_PKG_VERSION").to_owned())]),
    }
}

/// The manifest that `trainer evaluate` left in the run folder, where it is of these weights; where there is none, one that says how the weights
/// came about and claims nothing else.
fn run_manifest(
    run: &Path,
    weights: &Path,
    architecture: &Architecture,
    width: f64,
) -> anyhow::Result<Manifest> {
    let path = run.join("manifest.json");
    let known = Network::load(weights, &Device::Cpu)?.provenance;
    let mut manifest = if path.exists() {
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("reading {}", path.display()))?;
        let manifest =
            Manifest::from_json(&text).with_context(|| format!("reading {}", path.display()))?;
        let digest = file_digest(weights)?;
        ensure!(
            manifest.tools.get(provenance::WEIGHTS) == Some(&digest),
            "{} is not of {}: its figures and thresholds are another model's; evaluate these weights (`trainer evaluate --model {}`) or remove it",
            path.display(),
            weights.display(),
            weights.display()
        );
        manifest
    } else {
        let mut manifest = new_manifest(architecture, width);
        provenance::tell(&known, &mut manifest)?;
        manifest
    };
    if let Some(ranges) = known.get(quantization_aware::DIGEST) {
        let key = quantization_aware::DIGEST.to_owned();
        manifest.tools.insert(key, ranges.clone());
    }
    Ok(manifest)
}

/// Writes a file whole or not at all.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    write_atomically(path, bytes).map_err(|error| {
        fault(
            Exit::CannotWrite,
            format!("writing {}: {error:#}", path.display()),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::execute::FloatGraph;

    #[test]
    fn exported_file_gives_the_network_s_logits() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "vanilla",
            "two-conv-dense64",
            "final",
            "resnet50",
            "inception-v3",
        ] {
            let architecture = architecture::find(name).unwrap();
            let network = Network::new(architecture, 0.02, 7, &Device::Cpu).unwrap();
            let (weights, out) = (
                folder.path().join("model.safetensors"),
                folder.path().join("model.onnx"),
            );
            let mut image = vec![0; shared::TENSOR_BYTES];
            shared::selftest::image(1, &mut image);
            let shape = (1, CHANNELS, SIDE, SIDE);
            let images = Tensor::from_vec(image.clone(), shape, &Device::Cpu).unwrap();
            network.settle(&images).unwrap();
            network.save(&weights).unwrap();
            export(&weights, &new_manifest(architecture, 0.02), &out).unwrap();
            let model = onnx::read(&std::fs::read(&out).unwrap()).unwrap();
            let graph = FloatGraph::new(&model).unwrap();
            let ours = graph.logit(&image, &mut |_, _| {}).unwrap();
            let logits = network.forward(&images).unwrap();
            let candle = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0];
            // Sums of f32 in another order.
            assert!(
                (ours - candle).abs() <= 1e-4 * candle.abs().max(1.0),
                "{name}: {ours} {candle}"
            );
        }
    }

    #[test]
    fn every_row_with_a_network_exports_and_the_baseline_is_refused_by_name() {
        for architecture in architecture::ARCHITECTURES {
            let weights = random_weights(architecture, 0.01, 1);
            if architecture.family == Family::Majority {
                assert!(
                    matches!(weights, Err(ExportError::NoNetwork { name }) if name == architecture.name)
                );
            } else {
                let model = float_model(architecture, 0.01, &weights.unwrap()).unwrap();
                assert_eq!(model.graph().unwrap().output[0].name, LOGIT);
            }
        }
    }

    /// A run folder with random weights.
    fn run_of(folder: &Path, name: &str, seed: u64) -> PathBuf {
        let run = folder.join(name);
        std::fs::create_dir(&run).unwrap();
        let architecture = architecture::find("vanilla").unwrap();
        let mut network = Network::new(architecture, 0.01, seed, &Device::Cpu).unwrap();
        network.provenance = BTreeMap::from([
            ("split".to_owned(), "image".to_owned()),
            ("split_seed".to_owned(), "3".to_owned()),
            (quantization_aware::DIGEST.to_owned(), "00".to_owned()),
        ]);
        network.save(&run.join("model.safetensors")).unwrap();
        run
    }

    fn manifest_of(run: &Path) -> anyhow::Result<Manifest> {
        let architecture = architecture::find("vanilla").unwrap();
        run_manifest(run, &run.join("model.safetensors"), architecture, 0.01)
    }

    #[test]
    fn the_manifest_of_another_run_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (own, other) = (
            run_of(folder.path(), "own", 1),
            run_of(folder.path(), "other", 2),
        );
        let mut manifest = manifest_of(&own).unwrap();
        assert_eq!(manifest.tools["split"], "image");
        assert_eq!(manifest.tools[quantization_aware::DIGEST], "00");
        let digest = file_digest(&own.join("model.safetensors")).unwrap();
        manifest
            .tools
            .insert(provenance::WEIGHTS.to_owned(), digest);
        for run in [&own, &other] {
            std::fs::write(run.join("manifest.json"), manifest.to_json()).unwrap();
        }
        assert_eq!(manifest_of(&own).unwrap(), manifest);
        let error = manifest_of(&other).unwrap_err().to_string();
        assert!(
            error.contains("is not of") && error.contains("trainer evaluate"),
            "{error}"
        );
    }

    #[test]
    fn weights_that_are_not_finite_are_neither_exported_nor_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let run = run_of(folder.path(), "run", 1);
        let path = run.join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let end = bytes.len();
        for bad in [f32::NAN, f32::INFINITY] {
            bytes[end - 4..].copy_from_slice(&bad.to_le_bytes());
            std::fs::write(&path, &bytes).unwrap();
            let (architecture, width, weights) = read_weights(&path).unwrap();
            let error = float_model(architecture, width, &weights).unwrap_err();
            assert!(matches!(error, ExportError::NotFinite { .. }), "{error}");
            let error = Network::load(&path, &Device::Cpu).unwrap_err().to_string();
            assert!(error.contains("not finite"), "{error}");
        }
    }

    #[test]
    fn weights_of_another_shape_are_refused() {
        let architecture = architecture::find("final").unwrap();
        let mut weights = random_weights(architecture, 0.01, 1).unwrap();
        weights.remove("dense2.bias");
        assert!(matches!(
            float_model(architecture, 0.01, &weights),
            Err(ExportError::Missing { .. })
        ));
        let weights = random_weights(architecture, 0.02, 1).unwrap();
        assert!(matches!(
            float_model(architecture, 0.01, &weights),
            Err(ExportError::Shape { .. })
        ));
    }
}
