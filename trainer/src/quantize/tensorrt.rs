//! The graph of profile `tensorrt`: Q and DQ to symmetric s8 in front of every Conv and Gemm, f32 biases.

use crate::calibrate::Range;
use crate::onnx::{DataType, NodeProto, TensorProto};

use super::QuantizeError;
use super::graph::{Emitter, constant, is_weighted};
use super::integers::symmetric_scale;

impl Emitter<'_> {
    pub(super) fn tensorrt(&mut self, node: &NodeProto) -> Result<(), QuantizeError> {
        let output = node.output[0].as_str();
        for name in node.input.iter().skip(1).filter(|_| !is_weighted(node)) {
            if let Some(&constant) = self.constants.get(name.as_str()) {
                self.graph.initializer.push(constant.clone());
            }
        }
        let mut node = node.clone();
        if is_weighted(&node) {
            let input = node.input[0].clone();
            node.input[0] = format!("{input}_dequantized");
            if self.declared.insert(input.clone()) {
                self.symmetric_input(&input)?;
            }
            let bits = self.weight_bits;
            let weight = constant(&self.constants, &node.input[1])?;
            let (shape, values) = (weight.shape()?, weight.to_f32()?);
            let n_outputs = shape.first().copied().unwrap_or(1).max(1);
            let rows = values.chunks_exact((values.len() / n_outputs).max(1));
            let scales: Vec<f32> = rows.clone().map(|row| bits.scale(row)).collect();
            let integers: Vec<i8> = rows
                .zip(&scales)
                .flat_map(|(row, &scale)| row.iter().map(move |&value| bits.integer(value, scale)))
                .collect();
            let name = node.input[1].clone();
            self.graph.initializer.push(TensorProto::int8(
                &format!("{name}_quantized"),
                &shape,
                &integers,
            ));
            self.graph.initializer.push(TensorProto::float(
                &format!("{name}_scale"),
                &[n_outputs],
                &scales,
            ));
            self.graph.initializer.push(TensorProto::int8(
                &format!("{name}_zero_point"),
                &[n_outputs],
                &vec![0; n_outputs],
            ));
            self.dequantize_constant(&name);
            if let Some(name) = node.input.get(2) {
                self.graph
                    .initializer
                    .push(constant(&self.constants, name)?.clone());
            }
        }
        self.push(node, output, DataType::Float);
        Ok(())
    }

    /// s8 Q and DQ of a layer's input.
    fn symmetric_input(&mut self, input: &str) -> Result<(), QuantizeError> {
        let leader = self.plan.leader_of.get(input).map_or(input, String::as_str);
        let range = if leader == "image_scaled" {
            Range {
                low: 0.0,
                high: 1.0,
            }
        } else {
            self.ranges
                .get(leader)
                .ok_or_else(|| QuantizeError::Unobserved {
                    name: leader.to_owned(),
                })?
                .1
        };
        let (scale, zero_point, integers) = (
            format!("{input}_scale"),
            format!("{input}_zero_point"),
            format!("{input}_quantized"),
        );
        self.graph
            .initializer
            .push(TensorProto::float(&scale, &[], &[symmetric_scale(range)]));
        self.graph
            .initializer
            .push(TensorProto::int8(&zero_point, &[], &[0]));
        self.push(
            NodeProto::new(
                "QuantizeLinear",
                &format!("{input}_quantize"),
                &[input, &scale, &zero_point],
                &integers,
            ),
            input,
            DataType::Int8,
        );
        let output = format!("{input}_dequantized");
        self.push(
            NodeProto::new(
                "DequantizeLinear",
                &format!("{input}_dequantize"),
                &[&integers, &scale, &zero_point],
                &output,
            ),
            input,
            DataType::Float,
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::command::self_test_images;
    use super::super::tests::{fast, float_model, quantized};
    use super::super::{Options, Profile};
    use super::*;
    use crate::execute::FloatGraph;

    #[test]
    fn tensorrt_profile_is_signed_and_leaves_biases_alone() {
        let (model, _) = quantized(
            &float_model("final", 0.03125),
            &Options {
                profile: Profile::Tensorrt,
                ..fast()
            },
        );
        let graph = model.graph().unwrap();
        let constants = graph.initializers();
        for node in graph
            .node
            .iter()
            .filter(|node| node.op_type == "QuantizeLinear")
        {
            assert_eq!(
                constants[node.input[2].as_str()].data_type,
                DataType::Int8 as i32
            );
        }
        assert!(constants["conv1.bias"].to_f32().is_ok());
        assert!(
            FloatGraph::new(&model)
                .unwrap()
                .logit(&self_test_images(1)[0], &mut |_, _| {})
                .unwrap()
                .is_finite()
        );
    }
}
