//! Nodes and shapes: constructors for those that we emit, and readers of attributes and extents.

use super::{
    AttributeProto, BATCH, DataType, Dimension, DimensionProto, NodeProto, TensorShapeProto,
    TensorTypeProto, TypeProto, ValueInfoProto, extent_i64,
};

impl NodeProto {
    /// A node of the standard operator set.
    #[must_use]
    pub fn new(op_type: &str, name: &str, input: &[&str], output: &str) -> Self {
        Self {
            input: input.iter().map(|&name| name.to_owned()).collect(),
            output: vec![output.to_owned()],
            name: name.to_owned(),
            op_type: op_type.to_owned(),
            ..Self::default()
        }
    }

    /// The same with an attribute of kind INT.
    #[must_use]
    pub fn with_int(mut self, name: &str, value: i64) -> Self {
        self.attribute.push(AttributeProto {
            name: name.to_owned(),
            i: value,
            r#type: 2,
            ..AttributeProto::default()
        });
        self
    }

    /// The same with an attribute of kind INTS.
    #[must_use]
    pub fn with_ints(mut self, name: &str, values: &[i64]) -> Self {
        self.attribute.push(AttributeProto {
            name: name.to_owned(),
            ints: values.to_vec(),
            r#type: 7,
            ..AttributeProto::default()
        });
        self
    }

    /// Attribute of kind INT, or `default` where it is left out.
    #[must_use]
    pub fn int(&self, name: &str, default: i64) -> i64 {
        self.find(name).map_or(default, |attribute| attribute.i)
    }

    /// Attribute of kind INTS; empty where it is left out.
    #[must_use]
    pub fn ints(&self, name: &str) -> &[i64] {
        self.find(name)
            .map_or(&[], |attribute| attribute.ints.as_slice())
    }

    fn find(&self, name: &str) -> Option<&AttributeProto> {
        self.attribute
            .iter()
            .find(|attribute| attribute.name == name)
    }
}

impl ValueInfoProto {
    /// A tensor `[N, dims...]` with symbolic batch.
    #[must_use]
    pub fn batched(name: &str, element: DataType, dims: &[usize]) -> Self {
        let known = dims
            .iter()
            .map(|&extent| Dimension::Value(extent_i64(extent)));
        let all = std::iter::once(Dimension::Param(BATCH.to_owned())).chain(known);
        let dim = all
            .map(|value| DimensionProto { value: Some(value) })
            .collect();
        Self {
            name: name.to_owned(),
            r#type: Some(TypeProto {
                tensor_type: Some(TensorTypeProto {
                    elem_type: element as i32,
                    shape: Some(TensorShapeProto { dim }),
                }),
            }),
            doc_string: String::new(),
        }
    }

    /// The known extents behind the batch dimension; `None` where the shape is missing or has another unknown extent.
    #[must_use]
    pub fn dims(&self) -> Option<Vec<usize>> {
        let shape = self.r#type.as_ref()?.tensor_type.as_ref()?.shape.as_ref()?;
        let known = shape.dim.iter().skip(1).map(|dim| match dim.value {
            Some(Dimension::Value(extent)) => usize::try_from(extent).ok(),
            _ => None,
        });
        known.collect()
    }
}
