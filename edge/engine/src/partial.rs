//! Puts our convolution into graphs that are not one chain: ResNet, Inception, any file in QDQ form.
//!
//! In: the ONNX graph. Out: the same graph, in which each `DQ -> Conv [-> Relu] -> Q` of u8 activations, s8 weights and i32 bias has become one
//! node of an operator of our own; tract runs it through [`GeneralConvolution`] and everything else as it comes. A convolution of another
//! form stays as it is.

use std::collections::HashSet;

use tract_onnx::pb::{AttributeProto, GraphProto, NodeProto, TensorProto, tensor_proto::DataType};

use crate::convolution::{Definition, GeneralConvolution};
use crate::graph::{Graph, dimensions, f32_elements, i32_elements, integer, integers, is_zero};
use crate::kernels::Kernel;

/// Operator type of our node.
pub(crate) const OPERATOR: &str = "QuantizedConvolution";

/// Replaces what can be replaced; returns how many convolutions.
pub(crate) fn replace_convolutions(proto: &mut GraphProto, kernel: Kernel) -> usize {
    let graph = Graph::new(proto);
    let found: Vec<(String, NodeProto)> = proto
        .node
        .iter()
        .filter(|node| node.op_type == "Conv")
        .filter_map(|node| replacement(&graph, node, kernel))
        .collect();
    let n = found.len();
    for (quantized, node) in found {
        let of_value = |node: &NodeProto| node.output.first() == Some(&quantized);
        if let Some(place) = proto.node.iter_mut().find(|node| of_value(node)) {
            *place = node;
        }
    }
    if n > 0 {
        remove_unread(proto);
    }
    n
}

/// The quantized value behind a convolution, and our node that computes it.
fn replacement(graph: &Graph<'_>, conv: &NodeProto, kernel: Kernel) -> Option<(String, NodeProto)> {
    let [input, weights, bias @ ..] = conv.input.as_slice() else {
        return None;
    };
    let dequantize = graph
        .producer(input)
        .filter(|node| node.op_type == "DequantizeLinear")?;
    let (input_scale, input_zero) = activation(graph, dequantize)?;
    let weights_node = graph
        .producer(weights)
        .filter(|node| node.op_type == "DequantizeLinear")?;
    let (weights, weight_scales) = parameter(graph, weights_node, DataType::Int8)?;
    let shape: [usize; 4] = dimensions(weights)?.try_into().ok()?;
    let outputs = shape[0];
    let per_output = |scales: &[f32], output: usize| *scales.get(output).unwrap_or(&scales[0]);
    let is_per_output = |scales: &[f32]| scales.len() == 1 || scales.len() == outputs;
    let axis = integer(weights_node, "axis").unwrap_or(1);
    if !is_per_output(&weight_scales) || (weight_scales.len() > 1 && axis != 0) {
        return None;
    }

    let bias = match bias.first().filter(|name| !name.is_empty()) {
        None => vec![0; outputs],
        Some(name) => {
            let node = graph
                .producer(name)
                .filter(|node| node.op_type == "DequantizeLinear")?;
            let (bias, scales) = parameter(graph, node, DataType::Int32)?;
            let fits = |output| {
                let expected = input_scale * per_output(&weight_scales, output);
                (per_output(&scales, output) - expected).abs() <= 1e-5 * expected
            };
            let bias = i32_elements(bias).filter(|bias| bias.len() == outputs)?;
            (is_per_output(&scales) && (0..outputs).all(fits)).then_some(bias)?
        }
    };

    let mut reader = graph.only_reader(conv.output.first()?)?;
    let is_relu = reader.op_type == "Relu";
    if is_relu {
        reader = graph.only_reader(reader.output.first()?)?;
    }
    if reader.op_type != "QuantizeLinear" {
        return None;
    }
    let (output_scale, output_zero) = activation(graph, reader)?;
    let scale = (0..outputs).map(|output| {
        shared::quantize::requantize_scale(
            input_scale,
            per_output(&weight_scales, output),
            output_scale,
        )
    });
    let definition = Definition {
        shape,
        groups: size(integer(conv, "group").unwrap_or(1))?,
        strides: sizes(conv, "strides", 1)?,
        dilations: sizes(conv, "dilations", 1)?,
        pads: pads(conv)?,
        input_zero,
        output_zero,
        lowest: if is_relu { output_zero } else { 0 },
        weights: (!weights.raw_data.is_empty()).then(|| weights.raw_data.clone())?,
        bias,
        scale: scale.collect(),
    };
    let node = NodeProto {
        name: conv.name.clone(),
        op_type: OPERATOR.to_owned(),
        input: vec![dequantize.input.first()?.clone()],
        output: reader.output.clone(),
        attribute: attributes(&definition, kernel)?,
        ..NodeProto::default()
    };
    GeneralConvolution::new(definition, kernel)?;
    Some((reader.output.first()?.clone(), node))
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

/// The definition as attributes of a node; [`definition`] reads them back.
fn attributes(d: &Definition, kernel: Kernel) -> Option<Vec<AttributeProto>> {
    let attribute = |name: &str| AttributeProto {
        name: name.to_owned(),
        ..AttributeProto::default()
    };
    let ints = |name: &str, values: &[usize]| {
        let ints = values
            .iter()
            .map(|&n| i64::try_from(n).ok())
            .collect::<Option<_>>()?;
        Some(AttributeProto {
            ints,
            ..attribute(name)
        })
    };
    let zeros = [d.input_zero, d.output_zero, d.lowest].map(usize::from);
    Some(vec![
        ints("shape", &d.shape)?,
        ints("groups", &[d.groups])?,
        ints("strides", &d.strides)?,
        ints("dilations", &d.dilations)?,
        ints("pads", &d.pads)?,
        ints("zeros", &zeros)?,
        AttributeProto {
            s: d.weights.clone(),
            ..attribute("weights")
        },
        AttributeProto {
            ints: d.bias.iter().copied().map(i64::from).collect(),
            ..attribute("bias")
        },
        AttributeProto {
            floats: d.scale.clone(),
            ..attribute("scale")
        },
        AttributeProto {
            s: kernel.name().into(),
            ..attribute("kernel")
        },
    ])
}

/// The convolution of a node that [`replace_convolutions`] made; `None` for any other.
pub(crate) fn convolution(node: &NodeProto) -> Option<GeneralConvolution> {
    let attribute = |name: &str| {
        node.attribute
            .iter()
            .find(|attribute| attribute.name == name)
    };
    let ints = |name: &str| -> Option<Vec<usize>> {
        attribute(name)?
            .ints
            .iter()
            .map(|&n| usize::try_from(n).ok())
            .collect()
    };
    let [groups] = ints("groups")?[..] else {
        return None;
    };
    let [input_zero, output_zero, lowest] = ints("zeros")?[..] else {
        return None;
    };
    let bias = attribute("bias")?
        .ints
        .iter()
        .map(|&n| i32::try_from(n).ok());
    let definition = Definition {
        shape: ints("shape")?.try_into().ok()?,
        groups,
        strides: ints("strides")?.try_into().ok()?,
        dilations: ints("dilations")?.try_into().ok()?,
        pads: ints("pads")?.try_into().ok()?,
        input_zero: u8::try_from(input_zero).ok()?,
        output_zero: u8::try_from(output_zero).ok()?,
        lowest: u8::try_from(lowest).ok()?,
        weights: attribute("weights")?.s.clone(),
        bias: bias.collect::<Option<_>>()?,
        scale: attribute("scale")?.floats.clone(),
    };
    let kernel = std::str::from_utf8(&attribute("kernel")?.s)
        .ok()?
        .parse()
        .ok()?;
    GeneralConvolution::new(definition, kernel)
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
