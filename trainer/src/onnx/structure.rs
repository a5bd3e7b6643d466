//! The structure of a graph as text, without weights: what a golden test digests.

use super::{AttributeProto, Dimension, GraphProto, ValueInfoProto};

impl GraphProto {
    /// Structure of the graph as text, one line a constant, input, output, shape and node, without weights: what a golden test
    /// digests. Equal texts mean equal operators, attributes, names, element types and shapes.
    #[must_use]
    pub fn structure(&self) -> String {
        let mut lines = Vec::new();
        for (kind, values) in [
            ("input", &self.input),
            ("output", &self.output),
            ("value", &self.value_info),
        ] {
            lines.extend(
                values
                    .iter()
                    .map(|value| format!("{kind} {} {}", value.name, value.describe())),
            );
        }
        for tensor in &self.initializer {
            lines.push(format!(
                "constant {} {} {:?}",
                tensor.name, tensor.data_type, tensor.dims
            ));
        }
        for node in &self.node {
            let attributes: Vec<String> = node
                .attribute
                .iter()
                .map(AttributeProto::describe)
                .collect();
            lines.push(format!(
                "node {} {} {:?} -> {:?} {}",
                node.op_type,
                node.name,
                node.input,
                node.output,
                attributes.join(" ")
            ));
        }
        lines.join("\n")
    }
}

impl AttributeProto {
    fn describe(&self) -> String {
        match self.r#type {
            1 => format!("{}={}", self.name, self.f),
            2 => format!("{}={}", self.name, self.i),
            3 => format!("{}={:?}", self.name, String::from_utf8_lossy(&self.s)),
            _ => format!("{}={:?}", self.name, self.ints),
        }
    }
}

impl ValueInfoProto {
    fn describe(&self) -> String {
        let Some(tensor) = self
            .r#type
            .as_ref()
            .and_then(|kind| kind.tensor_type.as_ref())
        else {
            return "untyped".to_owned();
        };
        let dims = tensor.shape.iter().flat_map(|shape| &shape.dim);
        let dims: Vec<String> = dims
            .map(|dim| match &dim.value {
                Some(Dimension::Value(extent)) => extent.to_string(),
                Some(Dimension::Param(name)) => name.clone(),
                None => "?".to_owned(),
            })
            .collect();
        format!("{} [{}]", tensor.elem_type, dims.join(","))
    }
}
