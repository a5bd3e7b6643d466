//! Signal-to-noise ratio of every quantized tensor.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::execute::FloatGraph;
use crate::export::LOGIT;
use crate::onnx::ModelProto;

use super::TensorNoise;

/// Signal-to-noise ratio of every tensor that both files compute under the same name and that is quantized in the int8 file, and of the logit.
/// Flatten is left out: it is its input. Where the file was equalised, each channel is first brought back by the factor that fits best,
/// and the one degree of freedom this takes is given back.
pub(super) fn noise(
    float: &ModelProto,
    int8: &ModelProto,
    is_equalised: bool,
    images: &[&[u8]],
) -> anyhow::Result<Vec<TensorNoise>> {
    let nodes = &float.graph()?.node;
    let flattened = nodes.iter().filter(|node| node.op_type == "Flatten");
    let flattened: Vec<&str> = flattened.map(|node| node.output[0].as_str()).collect();
    let quantized = int8
        .graph()?
        .node
        .iter()
        .filter(|node| node.op_type == "DequantizeLinear");
    let mut wanted: Vec<&str> = quantized
        .map(|node| node.output[0].as_str())
        .chain([LOGIT])
        .collect();
    let (float, int8) = (FloatGraph::new(float)?, FloatGraph::new(int8)?);
    wanted.retain(|name| {
        *name != "image_scaled"
            && !flattened.contains(name)
            && float.tensors().any(|tensor| tensor == *name)
    });
    let of_image = |image: &&[u8]| -> anyhow::Result<BTreeMap<String, Vec<Sums>>> {
        let mut values = BTreeMap::new();
        float.logit(image, &mut |name, tensor| {
            if wanted.contains(&name) {
                values.insert(name.to_owned(), tensor.values.clone());
            }
        })?;
        let mut sums = BTreeMap::new();
        int8.logit(image, &mut |name, tensor| {
            let Some(reference) = values.remove(name) else {
                return;
            };
            let n_channels = tensor.shape.first().copied().unwrap_or(1).max(1);
            let a_channel = (tensor.values.len() / n_channels).max(1);
            let channels = reference
                .chunks_exact(a_channel)
                .zip(tensor.values.chunks_exact(a_channel));
            sums.insert(
                name.to_owned(),
                channels.map(|(a, b)| Sums::of(a, b)).collect(),
            );
        })?;
        Ok(sums)
    };
    let of_images: Vec<BTreeMap<String, Vec<Sums>>> =
        images.par_iter().map(of_image).collect::<Result<_, _>>()?;
    let noise_of = |name: &&str| {
        let mut total: Vec<Sums> = Vec::new();
        for sums in of_images.iter().filter_map(|sums| sums.get(*name)) {
            total.resize(sums.len(), Sums::default());
            total
                .iter_mut()
                .zip(sums)
                .for_each(|(total, sums)| total.add(sums));
        }
        let signal: f64 = total.iter().map(|sums| sums.reference).sum();
        let noise: f64 = total
            .iter()
            .map(|sums| sums.noise(is_equalised && *name != LOGIT))
            .sum();
        TensorNoise {
            tensor: (*name).to_owned(),
            snr_db: 10.0 * (signal / noise).log10(),
        }
    };
    Ok(wanted.iter().map(noise_of).collect())
}

/// Sums over the values of one channel of both files.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    n: f64,
    reference: f64,
    product: f64,
    other: f64,
}

impl Sums {
    fn of(reference: &[f32], other: &[f32]) -> Self {
        let mut sums = Self::default();
        for (&a, &b) in reference.iter().zip(other) {
            let (a, b) = (f64::from(a), f64::from(b));
            sums.add(&Self {
                n: 1.0,
                reference: a * a,
                product: a * b,
                other: b * b,
            });
        }
        sums
    }

    fn add(&mut self, more: &Self) {
        self.n += more.n;
        self.reference += more.reference;
        self.product += more.product;
        self.other += more.other;
    }

    /// Sum of squared differences, after the best factor where `is_fitted`.
    fn noise(&self, is_fitted: bool) -> f64 {
        if is_fitted && self.other > 0.0 && self.n > 1.0 {
            let left = (self.reference - self.product * self.product / self.other).max(0.0);
            left * self.n / (self.n - 1.0)
        } else {
            (self.reference - 2.0 * self.product + self.other).max(0.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channel_factor_of_an_equalised_file_is_no_noise() {
        let reference: Vec<f32> = (0..1000)
            .map(|index| (index as f32 * 0.37).sin().max(0.0))
            .collect();
        let noisy = |factor: f32| -> Vec<f32> {
            let of_index = |(index, value): (usize, &f32)| {
                factor * (value + 0.001 * (index as f32 * 1.7).cos())
            };
            reference.iter().enumerate().map(of_index).collect()
        };
        let plain = Sums::of(&reference, &noisy(1.0)).noise(false);
        let fitted = Sums::of(&reference, &noisy(3.0)).noise(true);
        assert!((fitted / plain - 1.0).abs() < 0.01, "{plain} {fitted}");
    }
}
