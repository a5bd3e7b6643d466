//! Weights by name: of a network, of a safetensors file, random.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, ensure};
use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors};

use crate::architecture::{self, Architecture, Family, pooled_side};
use crate::backbone::backbone;
use crate::network::{Network, NetworkError};

use super::{CHANNELS, ExportError, SIDE};

/// Self-test images that a transfer learner's random weights get their statistics from.
const SETTLING_IMAGES: usize = 4;

/// One weight or bias: shape outermost first, values row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Weight {
    /// Shape.
    pub shape: Vec<usize>,
    /// Values.
    pub values: Vec<f32>,
}

/// Weights by name.
pub type Weights = BTreeMap<String, Weight>;

/// The values of `name`, which must have the shape `expected`.
pub(super) fn checked<'a>(
    weights: &'a Weights,
    name: &str,
    expected: &[usize],
) -> Result<&'a [f32], ExportError> {
    let missing = || ExportError::Missing {
        name: name.to_owned(),
    };
    let weight = weights.get(name).ok_or_else(missing)?;
    if weight.shape != expected || weight.values.len() != expected.iter().product::<usize>() {
        return Err(ExportError::Shape {
            name: name.to_owned(),
            found: weight.shape.clone(),
            expected: expected.to_vec(),
        });
    }
    if !weight.values.iter().all(|value| value.is_finite()) {
        return Err(ExportError::NotFinite {
            name: name.to_owned(),
        });
    }
    Ok(&weight.values)
}

/// Shapes of all weights of a convolutional `architecture` at `width`, by name.
#[must_use]
pub fn weight_shapes(architecture: &Architecture, width: f64) -> Vec<(String, Vec<usize>)> {
    let units = architecture.scaled(width);
    let mut shapes = Vec::new();
    let mut n_inputs = CHANNELS;
    for (index, &n_outputs) in units.convolutions.iter().enumerate() {
        shapes.push((
            format!("conv{}.weight", index + 1),
            vec![n_outputs, n_inputs, 3, 3],
        ));
        shapes.push((format!("conv{}.bias", index + 1), vec![n_outputs]));
        n_inputs = n_outputs;
    }
    let side = pooled_side(SIDE, units.convolutions.len());
    n_inputs *= side * side;
    for (index, n_outputs) in [units.dense, 1].into_iter().enumerate() {
        shapes.push((
            format!("dense{}.weight", index + 1),
            vec![n_outputs, n_inputs],
        ));
        shapes.push((format!("dense{}.bias", index + 1), vec![n_outputs]));
        n_inputs = n_outputs;
    }
    shapes
}

/// A transfer learner's random weights, with the statistics that they have on the self-test's images.
fn random_transfer(
    architecture: &'static Architecture,
    width: f64,
    seed: u64,
) -> Result<Weights, NetworkError> {
    let network = Network::new(architecture, width, seed, &Device::Cpu)?;
    let mut images = vec![0; SETTLING_IMAGES * shared::TENSOR_BYTES];
    for (seed, image) in (1..).zip(images.chunks_exact_mut(shared::TENSOR_BYTES)) {
        shared::selftest::image(seed, image);
    }
    let shape = (SETTLING_IMAGES, CHANNELS, SIDE, SIDE);
    network.settle(&Tensor::from_vec(images, shape, &Device::Cpu)?)?;
    weights_of(&network)
}

/// The weights of a network, by name.
///
/// # Errors
///
/// Where a tensor cannot be read.
pub fn weights_of(network: &Network) -> Result<Weights, NetworkError> {
    let mut weights = Weights::new();
    for parameter in network.parameters() {
        let weight = Weight {
            shape: parameter.variable.dims().to_vec(),
            values: parameter.variable.flatten_all()?.to_vec1()?,
        };
        weights.insert(parameter.name.clone(), weight);
    }
    Ok(weights)
}

/// Random weights: Glorot-uniform kernels, small random biases; the same for the same seed.
///
/// # Errors
///
/// [`ExportError::NoNetwork`] where the architecture has no layers.
pub fn random_weights(
    architecture: &'static Architecture,
    width: f64,
    seed: u64,
) -> Result<Weights, ExportError> {
    if backbone(architecture.family, width).is_some() {
        return Ok(random_transfer(architecture, width, seed)?);
    }
    if architecture.family != Family::Convolutional {
        return Err(ExportError::NoNetwork {
            name: architecture.name,
        });
    }
    let mut state = seed;
    let mut uniform = |limit: f32| {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        #[expect(
            clippy::cast_precision_loss,
            reason = "24 random bits are exact in f32"
        )]
        let unit = (mixed >> 40) as f32 / (1_u64 << 24) as f32;
        (unit * 2.0 - 1.0) * limit
    };
    let of_shape = |(name, shape): (String, Vec<usize>)| {
        let n_values: usize = shape.iter().product();
        let taps: usize = shape.iter().skip(2).product();
        #[expect(
            clippy::cast_precision_loss,
            reason = "a layer has fewer than 2^24 inputs and outputs"
        )]
        let limit = match shape[..] {
            [n_outputs, n_inputs, ..] => (6.0 / ((n_outputs + n_inputs) * taps) as f32).sqrt(),
            _ => 0.05,
        };
        let values = (0..n_values).map(|_| uniform(limit)).collect();
        (name, Weight { shape, values })
    };
    Ok(weight_shapes(architecture, width)
        .into_iter()
        .map(of_shape)
        .collect())
}

/// Architecture, width and weights of a safetensors file of ours.
///
/// # Errors
///
/// Where the file cannot be read, names no architecture of ours or holds something else than f32.
pub fn read_weights(path: &Path) -> anyhow::Result<(&'static Architecture, f64, Weights)> {
    let bytes =
        std::fs::read(path).with_context(|| format!("reading weights {}", path.display()))?;
    let (_, header) = SafeTensors::read_metadata(&bytes)
        .with_context(|| format!("reading weights {}", path.display()))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let name = metadata
        .get("architecture")
        .context("the weights name no architecture")?;
    let architecture = architecture::find(name)
        .with_context(|| format!("the weights are of the unknown architecture {name:?}"))?;
    let width: f64 = metadata
        .get("width")
        .context("the weights name no width")?
        .parse()
        .context("reading the width of the weights")?;
    let mut weights = Weights::new();
    for (name, view) in SafeTensors::deserialize(&bytes)?.tensors() {
        ensure!(
            view.dtype() == Dtype::F32,
            "{name} is {:?}, expected F32",
            view.dtype()
        );
        let values = view
            .data()
            .as_chunks()
            .0
            .iter()
            .map(|&value| f32::from_le_bytes(value))
            .collect();
        weights.insert(
            name,
            Weight {
                shape: view.shape().to_vec(),
                values,
            },
        );
    }
    Ok((architecture, width, weights))
}
