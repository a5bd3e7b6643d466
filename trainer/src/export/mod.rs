//! `trainer export`: trained or random weights to a standard f32 ONNX file.
//!
//! In: weights by name (`conv1.weight [O,I,3,3]`, `conv1.bias`, ..., `dense1.weight [O,I]`, ...) and the manifest. Out: one file,
//! opset 13, IR 7: `image` u8 `[N,3,256,256]` -> Cast -> Mul 1/255 -> conv1 -> relu1 -> pool1 -> ... -> flatten -> dense1 -> ... ->
//! `logit` f32 `[N,1]` -> Sigmoid -> `probability` f32 `[N,1]`. A tensor has its producer's name, the shape of every tensor
//! stands in `value_info`, weights are raw data, the manifest stands in `metadata_props` under
//! [`shared::manifest::METADATA_KEY`]. Making the file smaller and faster is [`crate::quantize`]'s.
//!
//! A transfer learner's weights come under torchvision's names; its file holds the batch normalisations folded into the convolutions, and the
//! normalisation of the image as a 1x1 convolution `normalise`, which a kernel that pads with zeros cannot take into itself.

mod command;
mod graph;
mod transfer;
mod weights;

use std::collections::BTreeMap;
use std::path::Path;

use shared::manifest::{
    DataKind, FORMAT_VERSION, METADATA_KEY, Manifest, Output, Precision, TrainingData, Validation,
};
use shared::spec::PreprocessSpec;

use crate::architecture::{Architecture, Family};
use crate::backbone::backbone;
use crate::cache::write_atomically;
use crate::network::NetworkError;
use crate::onnx::{self, ModelProto, OnnxError};

pub use command::{ExportArgs, ExportReport, run};
use graph::convolutional_model;
use transfer::transfer_model;
pub use weights::{Weight, Weights, random_weights, read_weights, weight_shapes, weights_of};

/// Name of the input, u8 `[N, 3, 256, 256]`.
pub const IMAGE: &str = "image";
/// Name of the first output, f32 `[N, 1]`.
pub const LOGIT: &str = "logit";
/// Name of the second output, f32 `[N, 1]`, the sigmoid of the first.
pub const PROBABILITY: &str = "probability";
/// Scale of the input: the network's first operation, as f32.
pub const IMAGE_SCALE: f32 = 1.0 / 255.0;

const SIDE: usize = 256;
const CHANNELS: usize = 3;

/// Why weights cannot be written as a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The architecture has no layers.
    #[error("{name} has no network to export")]
    NoNetwork {
        /// Name of the architecture.
        name: &'static str,
    },
    /// A weight is missing.
    #[error("the weights hold no {name}")]
    Missing {
        /// Name of the weight.
        name: String,
    },
    /// A weight has the wrong shape.
    #[error("{name} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Name of the weight.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that the architecture asks for.
        expected: Vec<usize>,
    },
    /// A weight is NaN or infinite.
    #[error("{name} holds a value that is not finite")]
    NotFinite {
        /// Name of the weight.
        name: String,
    },
    /// The file cannot be encoded.
    #[error(transparent)]
    Onnx(#[from] OnnxError),
    /// Random weights could not be made.
    #[error(transparent)]
    Network(#[from] NetworkError),
}

/// The f32 graph of `architecture` at `width` over `weights`, without manifest.
///
/// # Errors
///
/// [`ExportError`] where the weights do not fit the architecture.
pub fn float_model(
    architecture: &Architecture,
    width: f64,
    weights: &Weights,
) -> Result<ModelProto, ExportError> {
    match (architecture.family, backbone(architecture.family, width)) {
        (_, Some(backbone)) => transfer_model(architecture, &backbone, weights),
        (Family::Convolutional, None) => convolutional_model(architecture, width, weights),
        _ => Err(ExportError::NoNetwork {
            name: architecture.name,
        }),
    }
}

/// Writes the weights of the safetensors file `weights` as f32 ONNX file `out`, with `manifest`.
///
/// # Errors
///
/// As [`run`].
pub fn export(weights: &Path, manifest: &Manifest, out: &Path) -> anyhow::Result<()> {
    let (architecture, width, weights) = read_weights(weights)?;
    write_atomically(out, &float_file(architecture, width, &weights, manifest)?)
}

/// The bytes of an f32 file.
///
/// # Errors
///
/// [`ExportError`] where the weights do not fit the architecture.
pub fn float_file(
    architecture: &Architecture,
    width: f64,
    weights: &Weights,
    manifest: &Manifest,
) -> Result<Vec<u8>, ExportError> {
    let mut model = float_model(architecture, width, weights)?;
    model.doc_string = shared::RESEARCH_USE.to_owned();
    let manifest = Manifest {
        precision: Precision::Float32,
        self_test: Vec::new(),
        ..manifest.clone()
    };
    model.set_metadata(METADATA_KEY, manifest.to_json());
    Ok(onnx::write(&model)?)
}

/// A manifest that claims nothing: no training data, no metrics, no operating point.
#[must_use]
pub fn new_manifest(architecture: &Architecture, width: f64) -> Manifest {
    let output = |name: &str, meaning: &str| Output {
        name: name.to_owned(),
        meaning: meaning.to_owned(),
    };
    Manifest {
        format_version: FORMAT_VERSION,
        preprocess: PreprocessSpec::default(),
        architecture: architecture.name.to_owned(),
        width,
        precision: Precision::Float32,
        training_data: TrainingData {
            kind: DataKind::None,
            digest: String::new(),
            n_studies: 0,
            n_slices: 0,
        },
        outputs: vec![
            output(LOGIT, "pulmonary embolism present on the slice, as logit"),
            output(
                PROBABILITY,
                "sigmoid of the logit, not refitted by the temperature",
            ),
        ],
        metrics: Vec::new(),
        operating_points: Vec::new(),
        validation: Validation::Unvalidated,
        temperature: None,
        study_rule: None,
        self_test: Vec::new(),
        tools: BTreeMap::from([("trainer".to_owned(), env!("CARGO_PKG_VERSION").to_owned())]),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::architecture;
    use crate::execute::FloatGraph;
    use crate::network::Network;

    #[test]
    fn exported_file_gives_the_network_s_logits() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "vanilla",
            "two-conv-dense64",
            "final",
            "resnet50",
            "inception-v3",
        ] {
            let architecture = architecture::find(name).unwrap();
            let network = Network::new(architecture, 0.02, 7, &Device::Cpu).unwrap();
            let (weights, out) = (
                folder.path().join("model.safetensors"),
                folder.path().join("model.onnx"),
            );
            let mut image = vec![0; shared::TENSOR_BYTES];
            shared::selftest::image(1, &mut image);
            let shape = (1, CHANNELS, SIDE, SIDE);
            let images = Tensor::from_vec(image.clone(), shape, &Device::Cpu).unwrap();
            network.settle(&images).unwrap();
            network.save(&weights).unwrap();
            export(&weights, &new_manifest(architecture, 0.02), &out).unwrap();
            let model = onnx::read(&std::fs::read(&out).unwrap()).unwrap();
            let graph = FloatGraph::new(&model).unwrap();
            let ours = graph.logit(&image, &mut |_, _| {}).unwrap();
            let logits = network.forward(&images).unwrap();
            let candle = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0];
            // Sums of f32 in another order.
            assert!(
                (ours - candle).abs() <= 1e-4 * candle.abs().max(1.0),
                "{name}: {ours} {candle}"
            );
        }
    }

    #[test]
    fn every_row_with_a_network_exports_and_the_baseline_is_refused_by_name() {
        for architecture in architecture::ARCHITECTURES {
            let weights = random_weights(architecture, 0.01, 1);
            if architecture.family == Family::Majority {
                assert!(
                    matches!(weights, Err(ExportError::NoNetwork { name }) if name == architecture.name)
                );
            } else {
                let model = float_model(architecture, 0.01, &weights.unwrap()).unwrap();
                assert_eq!(model.graph().unwrap().output[0].name, LOGIT);
            }
        }
    }

    #[test]
    fn weights_of_another_shape_are_refused() {
        let architecture = architecture::find("final").unwrap();
        let mut weights = random_weights(architecture, 0.01, 1).unwrap();
        weights.remove("dense2.bias");
        assert!(matches!(
            float_model(architecture, 0.01, &weights),
            Err(ExportError::Missing { .. })
        ));
        let weights = random_weights(architecture, 0.02, 1).unwrap();
        assert!(matches!(
            float_model(architecture, 0.01, &weights),
            Err(ExportError::Shape { .. })
        ));
    }
}
