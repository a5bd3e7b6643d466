//! Puts our layers into graphs that are not one chain: ResNet, Inception, any file in QDQ form.
//!
//! In: the ONNX graph. Out: the same graph, in which each layer between DequantizeLinear and QuantizeLinear of u8 activations has become
//! one node on u8: Conv, Add, AveragePool, GlobalAveragePool and Gemm (s8 weights, i32 biases) operators of our own, each with the Relu behind it;
//! MaxPool, Concat and Flatten, where scale and zero point stay the same, themselves. A layer of another form stays as it is.
//! tract runs the result. Where nothing was left over, all of it is integer arithmetic and gives the same bits on every CPU.

use std::collections::HashSet;

use tract_onnx::pb::{GraphProto, NodeProto, TensorProto, tensor_proto::DataType};

use crate::attributes::{self, of_convolution, of_gemm, of_mean, of_sum};
use crate::convolution::Definition;
use crate::gemm::{self, Gemm};
use crate::graph::{
    Graph, dimensions, f32_elements, float, i32_elements, integer, integers, is_zero,
};
use crate::kernels::{Kernel, Levels};
use crate::mean::{MAX_POSITIONS, Mean};
use crate::sum::Sum;

/// What was replaced.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Replaced {
    /// Convolutions that our operator runs.
    pub(crate) n_convolutions: usize,
    /// Whether every layer is integer arithmetic now.
    pub(crate) is_all: bool,
}

/// Replaces what can be replaced.
pub(crate) fn replace_layers(proto: &mut GraphProto, kernel: Kernel) -> Replaced {
    let graph = Graph::new(proto);
    let found: Vec<NodeProto> = proto
        .node
        .iter()
        .filter_map(|node| replacement(&graph, node, kernel))
        .collect();
    let is_convolution = |node: &&NodeProto| node.op_type == attributes::CONVOLUTION;
    let n_convolutions = found.iter().filter(is_convolution).count();
    for node in found {
        if let Some(place) = proto.node.iter_mut().find(|old| old.output == node.output) {
            *place = node;
        }
    }
    remove_unread(proto);
    let is_integer = |node: &NodeProto| {
        let op_type = node.op_type.as_str();
        matches!(
            op_type,
            "MaxPool" | "Concat" | "Flatten" | "Identity" | "Sigmoid"
        ) || [
            attributes::CONVOLUTION,
            attributes::SUM,
            attributes::MEAN,
            attributes::GEMM,
        ]
        .contains(&op_type)
    };
    Replaced {
        n_convolutions,
        is_all: proto.node.iter().all(is_integer),
    }
}

/// Our node in place of a layer and of the QuantizeLinear behind it.
fn replacement(graph: &Graph<'_>, node: &NodeProto, kernel: Kernel) -> Option<NodeProto> {
    let inputs = || node.input.iter().map(|name| Activation::read(graph, name));
    let (op_type, inputs, output, attribute) = match node.op_type.as_str() {
        "Conv" => {
            let (input, output) = (
                Activation::read(graph, node.input.first()?)?,
                Activation::written(graph, node)?,
            );
            let definition = convolution(graph, node, &input, &output)?;
            definition.folded_bias()?;
            let attribute = of_convolution(&definition, kernel)?;
            (attributes::CONVOLUTION, vec![input], output.name, attribute)
        }
        "Gemm" => {
            let input = Activation::read(graph, node.input.first()?)?;
            let output = Activation::written(graph, node);
            let definition = dense(graph, node, &input, output.as_ref())?;
            let attribute = of_gemm(&definition, kernel)?;
            Gemm::new(definition, kernel)?;
            let name = output.map_or_else(|| node.output.first().cloned(), |o| Some(o.name))?;
            (attributes::GEMM, vec![input], name, attribute)
        }
        "Add" => {
            let inputs: Vec<Activation> = inputs().collect::<Option<_>>()?;
            let output = Activation::written(graph, node)?;
            let [a, b] = inputs.as_slice() else {
                return None;
            };
            let sum = Sum {
                scales: [a.scale, b.scale, output.scale],
                zeros: [a.zero, b.zero, output.zero],
                lowest: output.lowest,
            };
            let attribute = sum.is_finite().then(|| of_sum(&sum))?;
            (attributes::SUM, inputs, output.name, attribute)
        }
        "AveragePool" | "GlobalAveragePool" => {
            let inputs: Vec<Activation> = inputs().collect::<Option<_>>()?;
            let output = Activation::written(graph, node)?;
            let mean = mean(node, inputs.first()?, &output)?;
            (attributes::MEAN, inputs, output.name, of_mean(&mean)?)
        }
        "MaxPool" | "Concat" | "Flatten" => {
            let inputs: Vec<Activation> = inputs().collect::<Option<_>>()?;
            let output = Activation::written(graph, node)?;
            let is_same = |input: &Activation| {
                (input.scale.to_bits(), input.zero) == (output.scale.to_bits(), output.zero)
            };
            let fits = inputs.iter().all(is_same) && output.lowest == 0;
            fits.then_some((
                node.op_type.as_str(),
                inputs,
                output.name,
                node.attribute.clone(),
            ))?
        }
        _ => return None,
    };
    Some(NodeProto {
        name: node.name.clone(),
        op_type: op_type.to_owned(),
        input: inputs.into_iter().map(|input| input.name).collect(),
        output: vec![output],
        attribute,
        ..NodeProto::default()
    })
}

/// A quantized activation: the value that holds its integers, and what they stand for.
struct Activation {
    name: String,
    scale: f32,
    zero: u8,
    /// Smallest integer: the zero point behind a Relu, else 0.
    lowest: u8,
}

impl Activation {
    fn levels(&self) -> Levels {
        Levels {
            zero: self.zero,
            lowest: self.lowest,
        }
    }

    /// What the DequantizeLinear that makes `value` reads.
    fn read(graph: &Graph<'_>, value: &str) -> Option<Self> {
        let node = graph
            .producer(value)
            .filter(|node| node.op_type == "DequantizeLinear")?;
        let (scale, zero) = activation(graph, node)?;
        Some(Self {
            name: node.input.first()?.clone(),
            scale,
            zero,
            lowest: 0,
        })
    }

    /// What the QuantizeLinear behind `node`, or behind the Relu behind it, writes.
    fn written(graph: &Graph<'_>, node: &NodeProto) -> Option<Self> {
        let mut reader = graph.only_reader(node.output.first()?)?;
        let is_relu = reader.op_type == "Relu";
        if is_relu {
            reader = graph.only_reader(reader.output.first()?)?;
        }
        let (scale, zero) =
            (reader.op_type == "QuantizeLinear").then(|| activation(graph, reader))??;
        Some(Self {
            name: reader.output.first()?.clone(),
            scale,
            zero,
            lowest: if is_relu { zero } else { 0 },
        })
    }
}

/// s8 weights with their shape and scales, and i32 biases.
struct Parameters {
    shape: Vec<usize>,
    weights: Vec<u8>,
    scales: Vec<f32>,
    bias: Vec<i32>,
}

impl Parameters {
    /// Those of a Conv or Gemm: zero points 0, one scale or one an output, biases at the scale input x weight.
    fn of(graph: &Graph<'_>, node: &NodeProto, input_scale: f32) -> Option<Self> {
        let [_, weights, bias @ ..] = node.input.as_slice() else {
            return None;
        };
        let weights_node = graph
            .producer(weights)
            .filter(|node| node.op_type == "DequantizeLinear")?;
        let (weights, scales) = parameter(graph, weights_node, DataType::Int8)?;
        let shape = dimensions(weights)?;
        if weights.raw_data.is_empty() || weights.raw_data.len() != shape.iter().product::<usize>()
        {
            return None;
        }
        let &outputs = shape.first()?;
        let scales = per_output(scales, outputs)?;
        let axis = integer(weights_node, "axis").unwrap_or(1);
        if scales.iter().any(|s| s.to_bits() != scales[0].to_bits()) && axis != 0 {
            return None;
        }
        let bias = match bias.first().filter(|name| !name.is_empty()) {
            None => vec![0; outputs],
            Some(name) => {
                let node = graph
                    .producer(name)
                    .filter(|node| node.op_type == "DequantizeLinear")?;
                let (bias, of_bias) = parameter(graph, node, DataType::Int32)?;
                let fits = |(of_bias, of_weights): (&f32, &f32)| {
                    let expected = input_scale * of_weights;
                    (of_bias - expected).abs() <= 1e-5 * expected
                };
                let of_bias = per_output(of_bias, outputs)?;
                let bias = i32_elements(bias).filter(|bias| bias.len() == outputs)?;
                of_bias.iter().zip(&scales).all(fits).then_some(bias)?
            }
        };
        Some(Self {
            shape,
            weights: weights.raw_data.clone(),
            scales,
            bias,
        })
    }

    /// Accumulator to output; `None` where one is not finite.
    fn requantize_scales(&self, input: f32, output: f32) -> Option<Vec<f32>> {
        let scale = |&weight| shared::quantize::requantize_scale(input, weight, output);
        let scales = self.scales.iter().map(scale);
        scales.map(|s| s.is_finite().then_some(s)).collect()
    }
}

/// A scale for each output; `None` where there are neither one nor as many.
fn per_output(scales: Vec<f32>, outputs: usize) -> Option<Vec<f32>> {
    match scales[..] {
        [scale] => Some(vec![scale; outputs]),
        _ => (scales.len() == outputs).then_some(scales),
    }
}

fn convolution(
    graph: &Graph<'_>,
    node: &NodeProto,
    input: &Activation,
    output: &Activation,
) -> Option<Definition> {
    let parameters = Parameters::of(graph, node, input.scale)?;
    Some(Definition {
        scale: parameters.requantize_scales(input.scale, output.scale)?,
        shape: parameters.shape.try_into().ok()?,
        groups: size(integer(node, "group").unwrap_or(1))?,
        strides: sizes(node, "strides", 1)?,
        dilations: sizes(node, "dilations", 1)?,
        pads: pads(node)?,
        input_zero: input.zero,
        levels: output.levels(),
        weights: parameters.weights,
        bias: parameters.bias,
    })
}

fn dense(
    graph: &Graph<'_>,
    node: &NodeProto,
    input: &Activation,
    output: Option<&Activation>,
) -> Option<gemm::Definition> {
    let is_one =
        |name| float(node, name).is_none_or(|factor| factor.to_bits() == 1.0_f32.to_bits());
    let is_plain = integer(node, "transB") == Some(1) && integer(node, "transA").unwrap_or(0) == 0;
    // Where nothing is quantized behind it, its value must not be clamped either.
    let ends = output.is_some()
        || graph
            .only_reader(node.output.first()?)
            .is_none_or(|reader| matches!(reader.op_type.as_str(), "Identity" | "Sigmoid"));
    if !is_plain || !ends || !is_one("alpha") || !is_one("beta") {
        return None;
    }
    let parameters = Parameters::of(graph, node, input.scale)?;
    Some(gemm::Definition {
        n_inputs: *parameters.shape.get(1)?,
        input_zero: input.zero,
        output: output.map(Activation::levels),
        scale: match output {
            Some(output) => parameters.requantize_scales(input.scale, output.scale)?,
            None => parameters.requantize_scales(input.scale, 1.0)?,
        },
        weights: parameters.weights,
        bias: parameters.bias,
    })
}

fn mean(node: &NodeProto, input: &Activation, output: &Activation) -> Option<Mean> {
    let is_global = node.op_type == "GlobalAveragePool";
    let kernel = if is_global {
        None
    } else {
        Some(sizes(node, "kernel_shape", 0)?)
    };
    let (strides, pads) = (sizes(node, "strides", 1)?, pads(node)?);
    let fits = |kernel: [usize; 2]| {
        (0..4).all(|side| pads[side] < kernel[side % 2])
            && kernel[0] * kernel[1] <= MAX_POSITIONS
            && !strides.contains(&0)
            && integer(node, "ceil_mode").unwrap_or(0) == 0
    };
    // A Relu behind a mean does nothing to what is at least the zero point, and is not expected otherwise.
    let is_finite = (input.scale / output.scale).is_finite();
    (kernel.is_none_or(fits) && output.lowest == 0 && is_finite).then_some(Mean {
        kernel,
        strides,
        pads,
        counts_padding: integer(node, "count_include_pad") == Some(1),
        scales: [input.scale, output.scale],
        zeros: [input.zero, output.zero],
    })
}

/// Scale and zero point of a Q or DQ of u8 activations.
fn activation(graph: &Graph<'_>, node: &NodeProto) -> Option<(f32, u8)> {
    let scale = graph.constant(node.input.get(1)?).and_then(f32_elements)?;
    let zero = graph.constant(node.input.get(2)?)?;
    if DataType::try_from(zero.data_type) != Ok(DataType::Uint8) {
        return None;
    }
    let zero = match (zero.raw_data.as_slice(), zero.int32_data.as_slice()) {
        (&[zero], []) => zero,
        ([], &[zero]) => u8::try_from(zero).ok()?,
        _ => return None,
    };
    match scale[..] {
        [scale] if scale.is_normal() && scale > 0.0 => Some((scale, zero)),
        _ => None,
    }
}

/// The constant and the scales of a DQ of parameters, zero point 0.
fn parameter<'a>(
    graph: &Graph<'a>,
    node: &NodeProto,
    element: DataType,
) -> Option<(&'a TensorProto, Vec<f32>)> {
    let tensor = graph.constant(node.input.first()?)?;
    let scales = graph.constant(node.input.get(1)?).and_then(f32_elements)?;
    let is_symmetric = node
        .input
        .get(2)
        .is_none_or(|name| name.is_empty() || graph.constant(name).is_some_and(is_zero));
    let are_scales = !scales.is_empty() && scales.iter().all(|s| s.is_normal() && *s > 0.0);
    (DataType::try_from(tensor.data_type) == Ok(element) && is_symmetric && are_scales)
        .then_some((tensor, scales))
}

fn size(value: i64) -> Option<usize> {
    usize::try_from(value).ok().filter(|&n| n < 1 << 16)
}

/// Two sizes of an attribute, `default` where it is absent.
fn sizes(node: &NodeProto, name: &str, default: usize) -> Option<[usize; 2]> {
    match integers(node, name) {
        None => Some([default; 2]),
        Some(&[row, column]) => Some([size(row)?, size(column)?]),
        Some(_) => None,
    }
}

fn pads(node: &NodeProto) -> Option<[usize; 4]> {
    let auto = node
        .attribute
        .iter()
        .find(|attribute| attribute.name == "auto_pad");
    if auto.is_some_and(|auto| auto.s != b"NOTSET" && auto.s != b"VALID") {
        return None;
    }
    match integers(node, "pads") {
        None => Some([0; 4]),
        Some(&[top, left, bottom, right]) => {
            Some([size(top)?, size(left)?, size(bottom)?, size(right)?])
        }
        Some(_) => None,
    }
}

/// Removes nodes and constants that nothing reads any more, so that tract does not compute them.
fn remove_unread(proto: &mut GraphProto) {
    let mut read: HashSet<String> = proto
        .output
        .iter()
        .map(|output| output.name.clone())
        .collect();
    // Nodes stand in an order in which producers come first, so one pass from the end finds all that is read.
    let nodes = std::mem::take(&mut proto.node);
    let mut kept: Vec<NodeProto> = Vec::new();
    for node in nodes.into_iter().rev() {
        if node.output.iter().any(|output| read.contains(output)) {
            read.extend(node.input.iter().cloned());
            kept.push(node);
        }
    }
    kept.reverse();
    proto.node = kept;
    proto
        .initializer
        .retain(|tensor| read.contains(&tensor.name));
}
