//! What `docs/model-file.md` says of every model file, beyond what it takes to run one: operator set, names and types, weights inside the file.
//!
//! In: the protobuf. Out: the first fault. The engine runs other makers' files all the same; who decides on patients refuses them, because a
//! file that keeps to none of this was not made for that.

use shared::{CHANNELS, SIDE};
use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::tensor_shape_proto::dimension;
use tract_onnx::pb::{ModelProto, TensorProto, ValueInfoProto, type_proto};

use crate::graph::{Graph, dimensions};

/// The operator set, of the standard domain.
const OPSET: i64 = 13;
/// Name of the graph's input.
const IMAGE: &str = "image";
/// Names of the graph's first outputs.
const OUTPUTS: [&str; 2] = ["logit", "probability"];

/// The first thing that is not as the document says; `None` where all is.
pub(crate) fn fault(proto: &ModelProto) -> Option<String> {
    let graph = proto.graph.as_ref()?;
    let is_standard = |domain: &str| matches!(domain, "" | "ai.onnx");
    let sets = proto.opset_import.as_slice();
    if !matches!(sets, [set] if is_standard(&set.domain) && set.version == OPSET) {
        let sets = sets.iter();
        let sets = sets.map(|set| format!("operator set {:?} {}", set.domain, set.version));
        let sets: Vec<String> = sets.collect();
        return Some(format!(
            "{}, expected is {OPSET} of the standard domain alone",
            if sets.is_empty() {
                "no operator set".to_owned()
            } else {
                sets.join(", ")
            }
        ));
    }
    if let Some(node) = graph.node.iter().find(|node| !is_standard(&node.domain)) {
        return Some(format!("node {} is of domain {:?}", node.name, node.domain));
    }
    let image = Graph::new(graph).image_input();
    let image = image
        .filter(|image| image.name == IMAGE)
        .and_then(|image| image.image());
    if image != Some([CHANNELS, SIDE, SIDE]) {
        return Some(format!(
            "its only input is not {IMAGE}, u8 [N, {CHANNELS}, {SIDE}, {SIDE}]"
        ));
    }
    for (index, name) in OUTPUTS.into_iter().enumerate() {
        if !graph
            .output
            .get(index)
            .is_some_and(|output| is_output(output, name))
        {
            return Some(format!("output {} is not {name}, f32 [N, 1]", index + 1));
        }
    }
    let constant = graph
        .initializer
        .iter()
        .find(|constant| !is_inside(constant));
    constant.map(|constant| {
        format!(
            "constant {} does not stand in the file as raw data of its shape",
            constant.name
        )
    })
}

fn is_output(output: &ValueInfoProto, name: &str) -> bool {
    let r#type = output
        .r#type
        .as_ref()
        .and_then(|r#type| r#type.value.as_ref());
    let Some(type_proto::Value::TensorType(tensor)) = r#type else {
        return false;
    };
    let shape = tensor.shape.iter().flat_map(|shape| &shape.dim);
    let shape: Vec<_> = shape.map(|dimension| dimension.value.as_ref()).collect();
    output.name == name
        && DataType::try_from(tensor.elem_type) == Ok(DataType::Float)
        && matches!(shape[..], [_, Some(dimension::Value::DimValue(1))])
}

/// Whether the values are raw data inside the file that fill the shape.
fn is_inside(constant: &TensorProto) -> bool {
    let bytes = match DataType::try_from(constant.data_type) {
        Ok(DataType::Uint8 | DataType::Int8) => 1,
        Ok(DataType::Float | DataType::Int32) => 4,
        Ok(DataType::Int64) => 8,
        _ => return false,
    };
    let n_values = dimensions(constant).map(|shape| shape.iter().product::<usize>());
    constant.data_location != Some(DataLocation::External as i32)
        && n_values.and_then(|n| n.checked_mul(bytes)) == Some(constant.raw_data.len())
}

#[cfg(test)]
mod tests {
    use tract_onnx::pb::{
        GraphProto, NodeProto, OperatorSetIdProto, TensorShapeProto, TypeProto, tensor_shape_proto,
    };

    use super::*;

    fn value(name: &str, element: DataType, dims: &[i64]) -> ValueInfoProto {
        let dim = dims.iter().map(|&n| tensor_shape_proto::Dimension {
            value: Some(dimension::Value::DimValue(n)),
            ..Default::default()
        });
        let shape = TensorShapeProto { dim: dim.collect() };
        let tensor = type_proto::Tensor {
            elem_type: element as i32,
            shape: Some(shape),
        };
        ValueInfoProto {
            name: name.to_owned(),
            r#type: Some(TypeProto {
                value: Some(type_proto::Value::TensorType(tensor)),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// As little as keeps to the contract.
    fn file() -> ModelProto {
        ModelProto {
            opset_import: vec![OperatorSetIdProto {
                domain: String::new(),
                version: OPSET,
            }],
            graph: Some(GraphProto {
                node: vec![NodeProto::default()],
                input: vec![value(IMAGE, DataType::Uint8, &[1, 3, 256, 256])],
                output: OUTPUTS
                    .map(|name| value(name, DataType::Float, &[1, 1]))
                    .to_vec(),
                initializer: vec![TensorProto {
                    name: "w".to_owned(),
                    dims: vec![2],
                    data_type: DataType::Float as i32,
                    raw_data: vec![0; 8],
                    ..Default::default()
                }],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[track_caller]
    fn check(expected: &str, change: impl FnOnce(&mut ModelProto, &mut GraphProto)) {
        let mut file = file();
        let mut graph = file.graph.take().unwrap();
        change(&mut file, &mut graph);
        file.graph = Some(graph);
        let found = fault(&file).unwrap_or_default();
        assert!(
            found.contains(expected) && found.is_empty() == expected.is_empty(),
            "{found}"
        );
    }

    #[test]
    fn a_file_that_keeps_to_the_contract_has_no_fault() {
        check("", |_, _| {});
    }

    #[test]
    fn whatever_is_otherwise_is_named() {
        check("operator set \"\" 14", |file, _| {
            file.opset_import[0].version = 14
        });
        check("no operator set", |file, _| file.opset_import.clear());
        check("operator set \"\" 13, operator set \"\" 13", |file, _| {
            file.opset_import.push(file.opset_import[0].clone());
        });
        check("operator set \"com.microsoft\"", |file, _| {
            file.opset_import[0].domain = "com.microsoft".to_owned();
        });
        check("domain \"com.microsoft\"", |_, graph| {
            graph.node[0].domain = "com.microsoft".to_owned();
        });
        check("only input is not image", |_, graph| {
            graph.input = vec![value(IMAGE, DataType::Float, &[1, 3, 256, 256])];
        });
        check("only input is not image", |_, graph| {
            graph.input = vec![value(IMAGE, DataType::Uint8, &[1, 3, 512, 512])];
        });
        check("output 1 is not logit", |_, graph| graph.output.swap(0, 1));
        check("output 2 is not probability", |_, graph| {
            graph.output[1] = value("probability", DataType::Float, &[1, 2]);
        });
        check("constant w", |_, graph| {
            graph.initializer[0].data_location = Some(DataLocation::External as i32);
        });
        check("constant w", |_, graph| {
            graph.initializer[0].raw_data.pop();
        });
    }
}
