//! The f32 graph of a convolutional network, and the builder that all graphs grow in.

use crate::architecture::Architecture;
use crate::onnx::{DataType, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};

use super::weights::{Weights, checked, weight_shapes};
use super::{CHANNELS, ExportError, IMAGE, IMAGE_SCALE, LOGIT, PROBABILITY, SIDE};

pub(super) fn convolutional_model(
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
pub(super) struct GraphBuilder {
    graph: GraphProto,
}

impl GraphBuilder {
    pub(super) fn begin(name: &str) -> Self {
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
    pub(super) fn node(&mut self, node: NodeProto, dims: &[usize]) {
        self.graph.value_info.push(ValueInfoProto::batched(
            &node.output[0],
            DataType::Float,
            dims,
        ));
        self.graph.node.push(node);
    }

    /// `image` as f32 in `[0, 1]`; returns the tensor's name.
    pub(super) fn scaled_image(&mut self) -> String {
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

    pub(super) fn weight(
        &mut self,
        name: &str,
        weights: &Weights,
        expected: &[usize],
    ) -> Result<(), ExportError> {
        let values = checked(weights, name, expected)?;
        self.constant(name, expected, values);
        Ok(())
    }

    pub(super) fn constant(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let constant = TensorProto::float(name, shape, values);
        self.graph.initializer.push(constant);
    }

    pub(super) fn dense(&mut self, name: &str, input: &str, output: &str, n_outputs: usize) {
        let inputs = [input, &format!("{name}.weight"), &format!("{name}.bias")];
        self.node(
            NodeProto::new("Gemm", name, &inputs, output).with_int("transB", 1),
            &[n_outputs],
        );
    }

    /// Adds the sigmoid and declares the outputs; the tensor `logit` must stand.
    pub(super) fn finish(mut self) -> ModelProto {
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
