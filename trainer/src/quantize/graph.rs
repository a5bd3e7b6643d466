//! The int8 graph of the standard profile: Q and DQ behind every layer, s8 weights and i32 biases behind DQ.

use std::collections::{BTreeMap, BTreeSet};

use crate::export::{IMAGE, IMAGE_SCALE, LOGIT};
use crate::onnx::{
    DataType, GraphProto, ModelProto, NodeProto, OnnxError, TensorProto, ValueInfoProto,
};

use super::integers::{Parameters, QuantizedLayer, WeightBits};
use super::plan::Plan;
use super::{Profile, QuantizeError, Ranges};

/// Name of a node's output before its quantization. Behind it stands a tensor with the name and meaning that it has in the f32 file.
pub(super) fn raw_name(output: &str, plan: &Plan, profile: Profile) -> String {
    if output == LOGIT || profile == Profile::Tensorrt || plan.relu_of.contains_key(output) {
        output.to_owned()
    } else {
        format!("{output}_unquantized")
    }
}

/// The int8 graph.
pub(super) fn emit(
    model: &ModelProto,
    plan: &Plan,
    ranges: &Ranges,
    profile: Profile,
    weight_bits: WeightBits,
) -> Result<ModelProto, QuantizeError> {
    let float = model.graph()?;
    let mut emitter = Emitter {
        constants: float.initializers(),
        dims: float
            .value_info
            .iter()
            .filter_map(|value| Some((value.name.as_str(), value.dims()?)))
            .collect(),
        plan,
        ranges,
        weight_bits,
        declared: BTreeSet::new(),
        graph: GraphProto {
            name: float.name.clone(),
            input: float.input.clone(),
            output: float.output.clone(),
            ..GraphProto::default()
        },
    };
    for node in &float.node {
        match profile {
            Profile::Standard => emitter.standard(node)?,
            Profile::Tensorrt => emitter.tensorrt(node)?,
        }
    }
    let mut quantized = ModelProto::new(emitter.graph);
    quantized.doc_string.clone_from(&model.doc_string);
    Ok(quantized)
}

pub(super) struct Emitter<'a> {
    pub(super) constants: BTreeMap<&'a str, &'a TensorProto>,
    pub(super) dims: BTreeMap<&'a str, Vec<usize>>,
    pub(super) plan: &'a Plan,
    pub(super) ranges: &'a Ranges,
    pub(super) weight_bits: WeightBits,
    pub(super) declared: BTreeSet<String>,
    pub(super) graph: GraphProto,
}

impl Emitter<'_> {
    fn standard(&mut self, node: &NodeProto) -> Result<(), QuantizeError> {
        let output = node.output[0].as_str();
        match node.op_type.as_str() {
            "Cast" => Ok(()),
            "Mul" => {
                self.declare(
                    "image",
                    Parameters {
                        scale: IMAGE_SCALE,
                        zero_point: 0,
                    },
                );
                self.push(
                    NodeProto::new(
                        "DequantizeLinear",
                        "image_dequantize",
                        &[IMAGE, "image_scale", "image_zero_point"],
                        output,
                    ),
                    output,
                    DataType::Float,
                );
                Ok(())
            }
            "Sigmoid" => {
                self.push(node.clone(), output, DataType::Float);
                Ok(())
            }
            "Relu" if self.plan.relu_of.values().any(|relu| relu == output) => Ok(()),
            _ => {
                let mut quantized = node.clone();
                if is_weighted(node) {
                    self.weights(node)?;
                }
                quantized.output[0] = raw_name(output, self.plan, Profile::Standard);
                let raw = quantized.output[0].clone();
                self.push(quantized, output, DataType::Float);
                if output == LOGIT {
                    Ok(())
                } else {
                    self.requantize(&raw, output)
                }
            }
        }
    }

    /// Q and DQ behind `raw`; what comes out has the name that the f32 file gives it.
    fn requantize(&mut self, raw: &str, output: &str) -> Result<(), QuantizeError> {
        let name = self.plan.relu_of.get(output).map_or(output, String::as_str);
        let leader = self.plan.leader_of.get(name).map_or(name, String::as_str);
        let parameters = self.plan.parameters(name, self.ranges)?;
        let prefix = if leader == "image_scaled" {
            "image"
        } else {
            leader
        };
        self.declare(prefix, parameters);
        let (scale, zero_point, integers) = (
            format!("{prefix}_scale"),
            format!("{prefix}_zero_point"),
            format!("{name}_quantized"),
        );
        self.push(
            NodeProto::new(
                "QuantizeLinear",
                &format!("{name}_quantize"),
                &[raw, &scale, &zero_point],
                &integers,
            ),
            output,
            DataType::Uint8,
        );
        self.push(
            NodeProto::new(
                "DequantizeLinear",
                &format!("{name}_dequantize"),
                &[&integers, &scale, &zero_point],
                name,
            ),
            output,
            DataType::Float,
        );
        Ok(())
    }

    /// Declares scale and zero point of an activation once.
    pub(super) fn declare(&mut self, prefix: &str, parameters: Parameters) {
        if self.declared.insert(prefix.to_owned()) {
            self.graph.initializer.push(TensorProto::float(
                &format!("{prefix}_scale"),
                &[],
                &[parameters.scale],
            ));
            self.graph.initializer.push(TensorProto::uint8(
                &format!("{prefix}_zero_point"),
                &[],
                &[parameters.zero_point],
            ));
        }
    }

    /// Adds a node whose output has the shape of `like` in the f32 file.
    pub(super) fn push(&mut self, node: NodeProto, like: &str, element: DataType) {
        if let Some(dims) = self.dims.get(like) {
            self.graph
                .value_info
                .push(ValueInfoProto::batched(&node.output[0], element, dims));
        }
        self.graph.node.push(node);
    }

    /// s8 weights and i32 bias of `node` with their DQ, under the names that the node reads.
    fn weights(&mut self, node: &NodeProto) -> Result<(), QuantizeError> {
        let input = self.plan.parameters(&node.input[0], self.ranges)?;
        let weight = constant(&self.constants, &node.input[1])?;
        let shape = weight.shape()?;
        let n_outputs = shape.first().copied().unwrap_or(1).max(1);
        let bias = match node.input.get(2) {
            Some(name) => constant(&self.constants, name)?.to_f32()?,
            None => vec![0.0; n_outputs],
        };
        let is_per_tensor = node.output[0] == LOGIT;
        let layer = QuantizedLayer::of(
            &weight.to_f32()?,
            &bias,
            input.scale,
            is_per_tensor,
            self.weight_bits,
        );
        let layer = layer.map_err(|channel| QuantizeError::Overflow {
            node: node.name.clone(),
            channel,
        })?;
        let scale_dims: &[usize] = if is_per_tensor { &[] } else { &[n_outputs] };
        let zeros = vec![0; layer.scales.len()];
        let name = &node.input[1];
        self.graph.initializer.push(TensorProto::int8(
            &format!("{name}_quantized"),
            &shape,
            &layer.weights,
        ));
        self.graph.initializer.push(TensorProto::float(
            &format!("{name}_scale"),
            scale_dims,
            &layer.scales,
        ));
        self.graph.initializer.push(TensorProto::int8(
            &format!("{name}_zero_point"),
            scale_dims,
            &zeros,
        ));
        self.dequantize_constant(name);
        if let Some(name) = node.input.get(2) {
            let scales: Vec<f32> = layer
                .scales
                .iter()
                .map(|scale| input.scale * scale)
                .collect();
            self.graph.initializer.push(TensorProto::int32(
                &format!("{name}_quantized"),
                &[n_outputs],
                &layer.bias,
            ));
            self.graph.initializer.push(TensorProto::float(
                &format!("{name}_scale"),
                scale_dims,
                &scales,
            ));
            self.graph.initializer.push(TensorProto::int32(
                &format!("{name}_zero_point"),
                scale_dims,
                &vec![0; scales.len()],
            ));
            self.dequantize_constant(name);
        }
        Ok(())
    }

    pub(super) fn dequantize_constant(&mut self, name: &str) {
        let inputs = [
            format!("{name}_quantized"),
            format!("{name}_scale"),
            format!("{name}_zero_point"),
        ];
        let inputs = [inputs[0].as_str(), inputs[1].as_str(), inputs[2].as_str()];
        self.graph.node.push(
            NodeProto::new(
                "DequantizeLinear",
                &format!("{name}_dequantize"),
                &inputs,
                name,
            )
            .with_int("axis", 0),
        );
    }
}

pub(super) fn is_weighted(node: &NodeProto) -> bool {
    matches!(node.op_type.as_str(), "Conv" | "Gemm")
}

pub(super) fn constant<'a>(
    constants: &BTreeMap<&str, &'a TensorProto>,
    name: &str,
) -> Result<&'a TensorProto, OnnxError> {
    constants
        .get(name)
        .copied()
        .ok_or_else(|| OnnxError::Undefined {
            name: name.to_owned(),
        })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_structure, fast, float_model, quantized};
    use super::*;

    fn operators(model: &ModelProto) -> Vec<&str> {
        let nodes = model.graph().unwrap().node.iter();
        let on_activations = nodes.filter(|node| {
            !node.input[0].ends_with(".weight_quantized")
                && !node.input[0].ends_with(".bias_quantized")
        });
        on_activations.map(|node| node.op_type.as_str()).collect()
    }

    #[test]
    fn float_file_has_the_recorded_structure() {
        check_structure(
            &float_model("final", 0.125),
            "1b2dcfa53bfb0275a8883d9a6351d27415c7f4ba7ee132dab1d0f7e5afc3f0e9",
        );
    }

    #[test]
    fn int8_file_has_the_recorded_structure() {
        let (model, _) = quantized(&float_model("final", 0.03125), &fast());
        check_structure(
            &model,
            "076d332b70507f62c986000613281e30941129ab4382a35a8c5d94ea9ebdf798",
        );
    }

    #[test]
    fn int8_graph_is_the_one_that_runtimes_fuse() {
        let (model, _) = quantized(&float_model("two-conv", 0.01), &fast());
        let (q, dq) = ("QuantizeLinear", "DequantizeLinear");
        let block = ["Conv", q, dq, "MaxPool", q, dq];
        let tail = ["Flatten", q, dq, "Gemm", q, dq, "Gemm", "Sigmoid"];
        assert_eq!(
            operators(&model),
            [[dq].as_slice(), &block, &block, &tail].concat()
        );
    }

    #[test]
    fn weights_are_symmetric_zero_points_are_zero_and_pools_keep_their_scale() {
        let (model, _) = quantized(&float_model("vanilla", 0.01), &fast());
        let graph = model.graph().unwrap();
        for tensor in &graph.initializer {
            if tensor.name.ends_with(".weight_quantized") {
                assert!(
                    tensor
                        .to_i8()
                        .unwrap()
                        .iter()
                        .all(|weight| *weight != i8::MIN)
                );
            } else if tensor.name.ends_with("_zero_point") {
                assert!(
                    tensor.raw_data.iter().all(|byte| *byte == 0),
                    "{}",
                    tensor.name
                );
            }
        }
        let scale_of = |name: &str| {
            graph
                .node
                .iter()
                .find(|node| node.name == name)
                .map(|node| node.input[1].as_str())
        };
        for (name, scale) in [
            ("pool1_quantize", "relu1_scale"),
            ("flatten_quantize", "relu2_scale"),
        ] {
            assert_eq!(scale_of(name), Some(scale));
        }
        let names: Vec<&str> = graph
            .output
            .iter()
            .map(|output| output.name.as_str())
            .collect();
        assert_eq!(names, ["logit", "probability"]);
    }
}
