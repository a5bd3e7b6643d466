//! Quantization-aware fine-tuning: the ranges with which the last epochs train, and a layer as the int8 graph computes it.
//!
//! In: weights after the epochs before. Out: `ranges.json` in the run folder, one range for each quantized activation, found as `trainer quantize`
//! finds them and fixed from then on. The forward pass then computes what the int8 file of these weights and ranges computes: the same s8 weights, i32
//! biases and u8 activations (`trainer quantize --ranges`); what gradients do with that is [`crate::operators::straight_through`]'s.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use candle_core::{Tensor, bail};
use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::calibrate::Range;
use crate::checkpoint::write_atomically;
use crate::export::{IMAGE_SCALE, float_file, new_manifest, weights_of};
use crate::network::{Network, Parameter};
use crate::operators::straight_through::{Replaced, RoundedActivation};
use crate::provenance;
use crate::quantize::{self, Choice, Options, QuantizedLayer, WeightBits, activation_scale};

/// The file in a run folder.
pub const FILE_NAME: &str = "ranges.json";

/// Key of the digest of a run's ranges in the metadata of its weights and in `tools` of a model file's manifest.
pub const DIGEST: &str = "trained_ranges_blake3";

/// What the last epochs train with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainedRanges {
    /// Bits of a weight.
    pub weight_bits: WeightBits,
    /// Range of each quantized activation, by its name in the f32 file: `relu1`, ...
    pub ranges: BTreeMap<String, Range>,
}

/// Reads a file of ranges.
///
/// # Errors
/// A file that cannot be read or holds something else; a range without 0 in it.
pub fn read(path: &Path) -> Result<TrainedRanges> {
    let context = || format!("reading {}", path.display());
    let text = std::fs::read_to_string(path).with_context(context)?;
    let ranges: TrainedRanges = serde_json::from_str(&text).with_context(context)?;
    for (name, range) in &ranges.ranges {
        let is_sound =
            range.low <= 0.0 && range.high >= 0.0 && (range.high - range.low).is_finite();
        ensure!(
            is_sound,
            "{}: range of {name} does not hold 0",
            path.display()
        );
    }
    Ok(ranges)
}

/// BLAKE3 of the ranges, hexadecimal: by it a model's weights name the ranges that they were trained with.
///
/// # Errors
/// The ranges cannot be written as JSON.
pub fn digest(ranges: &TrainedRanges) -> Result<String> {
    Ok(blake3::hash(&serde_json::to_vec(ranges)?)
        .to_hex()
        .to_string())
}

/// Finds the ranges of a network's activations on training slices and writes them into the run folder.
///
/// # Errors
/// What exporting and quantizing say; a file that cannot be written.
pub fn calibrate(
    network: &Network,
    cache: &Cache,
    weight_bits: WeightBits,
    run: &Path,
) -> Result<TrainedRanges> {
    let (architecture, width) = (network.architecture(), network.width());
    let weights = weights_of(network)?;
    let mut manifest = new_manifest(architecture, width);
    provenance::tell(&network.provenance, &mut manifest)?;
    let float = float_file(architecture, width, &weights, &manifest)?;
    let options = Options {
        weight_bits,
        equalise: Choice::Off,
        correct_bias: Choice::Off,
        ..Options::default()
    };
    let (_, report) = quantize::quantize(&float, cache, &options)?;
    let of_tensor = |tensor: quantize::TensorReport| (tensor.tensor, tensor.range);
    let ranges = TrainedRanges {
        weight_bits,
        ranges: report.tensors.into_iter().map(of_tensor).collect(),
    };
    let path = run.join(FILE_NAME);
    write_atomically(&path, serde_json::to_string_pretty(&ranges)?.as_bytes())
        .with_context(|| format!("writing {}", path.display()))?;
    Ok(ranges)
}

/// What one integer step of each layer's output stands for, in the order the data meets them; the last layer's is not quantized.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scales {
    weight_bits: WeightBits,
    of_output: Vec<f32>,
}

impl Scales {
    /// Of a network of `n_hidden` quantized layers.
    pub(crate) fn new(ranges: &TrainedRanges, n_hidden: usize) -> candle_core::Result<Self> {
        let mut of_output = Vec::new();
        for number in 1..=n_hidden {
            let Some(&range) = ranges.ranges.get(&format!("relu{number}")) else {
                bail!("no range of relu{number}")
            };
            of_output.push(activation_scale(range));
        }
        Ok(Self {
            weight_bits: ranges.weight_bits,
            of_output,
        })
    }

    /// Weight and bias of layer `index` (from 0) as its integers say them.
    pub(crate) fn layer(
        &self,
        index: usize,
        layer: &[Parameter],
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let [weight, bias] = layer else {
            bail!("a layer has a weight and a bias")
        };
        let input_scale = match index
            .checked_sub(1)
            .and_then(|before| self.of_output.get(before))
        {
            Some(&scale) => scale,
            None => IMAGE_SCALE,
        };
        let values = |parameter: &Parameter| parameter.variable.flatten_all()?.to_vec1::<f32>();
        let is_last = index == self.of_output.len();
        let (weights, biases) = (values(weight)?, values(bias)?);
        let layer = QuantizedLayer::of(&weights, &biases, input_scale, is_last, self.weight_bits);
        let layer = match layer {
            Ok(layer) => layer,
            Err(channel) => bail!("{}: output {channel} leaves i32", weight.name),
        };
        let (weights, biases) = layer.values(input_scale);
        Ok((
            weight.variable.apply_op1(Replaced { values: weights })?,
            bias.variable.apply_op1(Replaced { values: biases })?,
        ))
    }

    /// The output of layer `index` as its integers say it.
    pub(crate) fn activation(&self, index: usize, map: &Tensor) -> candle_core::Result<Tensor> {
        match self.of_output.get(index) {
            Some(&scale) => map.apply_op1(RoundedActivation { scale }),
            None => Ok(map.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::architecture::find;
    use crate::execute::FloatGraph;
    use crate::export::float_model;

    #[test]
    fn training_computes_what_the_int8_file_computes() {
        let mut network = Network::new(find("final").unwrap(), 0.03125, 5, &Device::Cpu).unwrap();
        let mut ranges = TrainedRanges {
            weight_bits: WeightBits::try_from(6).unwrap(),
            ranges: [
                ("relu1", 0.7),
                ("relu2", 0.5),
                ("relu3", 0.3),
                ("relu4", 0.2),
            ]
            .map(|(name, high)| (name.to_owned(), Range { low: 0.0, high }))
            .into(),
        };
        network.quantize(&ranges).unwrap();
        let mut image = vec![0; shared::TENSOR_BYTES];
        shared::selftest::image(4, &mut image);
        let images = Tensor::from_slice(&image, (1, 3, 256, 256), &Device::Cpu).unwrap();
        let logits = network.forward(&images).unwrap();
        let float = float_model(
            network.architecture(),
            0.03125,
            &weights_of(&network).unwrap(),
        );
        let (int8, _) = quantize::quantize_with(&float.unwrap(), &ranges).unwrap();
        let file = FloatGraph::new(&int8)
            .unwrap()
            .logit(&image, &mut |_, _| {})
            .unwrap();
        let trained = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0];
        // Sums in another order may round an activation the other way: a step of relu4 moves the logit by about 1e-4.
        assert!((trained - file).abs() < 1e-3, "{trained} {file}");
        let gradients = logits.sum_all().unwrap().backward().unwrap();
        for parameter in network.parameters() {
            assert!(
                gradients.get(&parameter.variable).is_some(),
                "{}",
                parameter.name
            );
        }
        ranges.ranges.clear();
        network.quantize(&ranges).unwrap_err();
    }
}
