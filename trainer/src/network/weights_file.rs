//! Weights files: safetensors of f32 tensors under the parameters' names, with architecture, width and provenance in the metadata.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors};

use super::{Network, NetworkError, Parameter};
use crate::architecture;
use crate::checkpoint::write_atomically;

impl Network {
    /// The network of a weights file, by the architecture and width in its metadata.
    ///
    /// # Errors
    /// When the file cannot be read, is not safetensors, or does not hold exactly this network.
    pub fn load(path: &Path, device: &Device) -> Result<Self, NetworkError> {
        let bytes = read(path)?;
        let fault = |fault: String| NetworkError::Weights {
            path: path.into(),
            fault,
        };
        let (_, header) =
            SafeTensors::read_metadata(&bytes).map_err(|error| fault(error.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let field = |key: &str| {
            metadata
                .get(key)
                .ok_or_else(|| fault(format!("metadata has no `{key}`")))
        };
        let name = field("architecture")?;
        let architecture = architecture::find(name)
            .ok_or_else(|| fault(format!("unknown architecture `{name}`")))?;
        let width: f64 = field("width")?
            .parse()
            .map_err(|_| fault("metadata `width` is not a number".into()))?;
        let mut network = Self::new(architecture, width, 0, device)?;
        network.set_from(path, &bytes)?;
        network.provenance = metadata.into_iter().collect();
        Ok(network)
    }

    /// Replaces the weights by those of a file, which must name the same parameters with the same shapes; its metadata
    /// is not looked at.
    ///
    /// # Errors
    /// When the file cannot be read, or a parameter is missing, unknown or of another shape.
    pub fn set_weights(&self, path: &Path) -> Result<(), NetworkError> {
        self.set_from(path, &read(path)?)
    }

    /// Replaces the weights of the backbone by those of a file in torchvision's naming; `fc` too where it has one output, else it keeps its
    /// values (the file's is for other classes). The auxiliary classifier and `num_batches_tracked` are left out.
    ///
    /// # Errors
    /// As [`Network::set_weights`].
    pub fn set_pretrained(&self, path: &Path) -> Result<(), NetworkError> {
        self.set_where(path, &read(path)?, |name, shape| {
            let is_for_other_classes = name.starts_with("fc.") && shape.first() != Some(&1);
            let is_left_out =
                name.starts_with("AuxLogits.") || name.ends_with("num_batches_tracked");
            !(is_left_out || is_for_other_classes)
        })
    }

    fn set_from(&self, path: &Path, bytes: &[u8]) -> Result<(), NetworkError> {
        self.set_where(path, bytes, |_, _| true)
    }

    /// Replaces the weights by those of a file for which `is_read` (name, shape) holds. Only `fc` may be missing, and only where it is not read.
    fn set_where(
        &self,
        path: &Path,
        bytes: &[u8],
        is_read: impl Fn(&str, &[usize]) -> bool,
    ) -> Result<(), NetworkError> {
        let fault = |fault: String| NetworkError::Weights {
            path: path.into(),
            fault,
        };
        let file = SafeTensors::deserialize(bytes).map_err(|error| fault(error.to_string()))?;
        for name in file.names() {
            let is_unread = file
                .tensor(name)
                .is_ok_and(|view| !is_read(name, view.shape()));
            if !is_unread
                && !self
                    .parameters
                    .iter()
                    .any(|parameter| parameter.name == name)
            {
                return Err(fault(format!(
                    "`{name}` is not a parameter of {}",
                    self.architecture.name
                )));
            }
        }
        for Parameter { name, variable, .. } in &self.parameters {
            let view = file
                .tensor(name)
                .map_err(|_| fault(format!("`{name}` is missing")))?;
            if !is_read(name, view.shape()) {
                continue;
            }
            if view.shape() != variable.dims() || view.dtype() != Dtype::F32 {
                return Err(fault(format!(
                    "`{name}` is {:?} {:?}, not F32 {:?}",
                    view.dtype(),
                    view.shape(),
                    variable.dims()
                )));
            }
            let mut values = view.data().as_chunks().0.iter();
            let is_finite = |bytes: &[u8; 4]| f32::from_le_bytes(*bytes).is_finite();
            // A ReLU or a max pool turns NaN into a number again: no later stage would see it.
            if !values.all(is_finite) {
                return Err(fault(format!("`{name}` holds a value that is not finite")));
            }
            variable.set(&Tensor::from_raw_buffer(
                view.data(),
                DType::F32,
                view.shape(),
                &self.device,
            )?)?;
        }
        Ok(())
    }

    /// Writes the weights with the metadata `architecture`, `width` and their provenance; whole or not at all.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), NetworkError> {
        let mut metadata = self.provenance.clone();
        metadata.extend([
            ("architecture".to_owned(), self.architecture.name.to_owned()),
            ("width".to_owned(), self.width.to_string()),
        ]);
        let mut parts = Vec::new();
        for parameter in &self.parameters {
            parts.push((
                parameter.name.clone(),
                parameter.variable.dims().to_vec(),
                self.values(parameter)?,
            ));
        }
        let bytes = to_safetensors(&parts, &metadata);
        write_atomically(path, &bytes).map_err(|source| NetworkError::File {
            path: path.into(),
            source,
        })
    }

    /// A parameter's values, row-major.
    fn values(&self, parameter: &Parameter) -> Result<Vec<f32>, NetworkError> {
        Ok(parameter.variable.flatten_all()?.to_vec1::<f32>()?)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, NetworkError> {
    std::fs::read(path).map_err(|source| NetworkError::File {
        path: path.into(),
        source,
    })
}

/// A safetensors file of f32 tensors (name, shape, values): the same bytes for the same contents, which the crate's own
/// writer does not give (its metadata stand in a hash map's order).
pub(crate) fn to_safetensors(
    parts: &[(String, Vec<usize>, Vec<f32>)],
    metadata: &BTreeMap<String, String>,
) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::json!(metadata));
    let mut end = 0;
    for (name, shape, values) in parts {
        let begin = end;
        end += 4 * values.len();
        let entry =
            serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]});
        header.insert(name.clone(), entry);
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    // The values stand at a multiple of 8 bytes.
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = Vec::with_capacity(8 + header.len() + end);
    bytes.extend((header.len() as u64).to_le_bytes());
    bytes.extend(header);
    for (_, _, values) in parts {
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
    bytes
}
