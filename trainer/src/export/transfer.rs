//! The f32 graph of a transfer learner: torchvision's layers with the batch normalisations folded into the convolutions.

use crate::architecture::Architecture;
use crate::backbone::{Backbone, Layer, Node, Source, Window};
use crate::onnx::{ModelProto, NodeProto};

use super::graph::GraphBuilder;
use super::weights::{Weights, checked};
use super::{CHANNELS, ExportError, LOGIT, SIDE};

/// The graph of a transfer learner.
pub(super) fn transfer_model(
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

impl GraphBuilder {
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
