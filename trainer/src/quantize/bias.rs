//! Bias correction: what quantization takes from the mean of a channel is given back by its bias.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::execute::{ExecuteError, FloatGraph, Run, Tensor};
use crate::onnx::{ModelProto, NodeProto, OnnxError};

use super::equalise::{put_float, take_float};
use super::graph::is_weighted;
use super::integers::WeightBits;
use super::plan::Plan;
use super::ranges::fake_quantized_weights;
use super::{QuantizeError, Ranges};

/// Mean of each channel, by tensor.
type Means = BTreeMap<String, Vec<f64>>;

/// Adds to every bias, layer after layer, what quantization takes from the mean of its output channel (Nagel et al. 2019, section 4.2,
/// by observation). Each image's run waits in front of the layer at work, with everything before it quantized and corrected.
pub(super) fn correct_biases(
    model: &mut ModelProto,
    plan: &Plan,
    ranges: &Ranges,
    images: &[&[u8]],
    bits: WeightBits,
) -> Result<(), QuantizeError> {
    let layers: Vec<NodeProto> = model
        .graph()?
        .node
        .iter()
        .filter(|node| is_weighted(node) && node.input.len() == 3)
        .cloned()
        .collect();
    let wanted: Vec<&str> = layers.iter().map(|node| node.output[0].as_str()).collect();
    let float = float_means(&FloatGraph::new(model)?, &wanted, images)?;
    let fake = FloatGraph::with_weights(model, fake_quantized_weights(model, bits)?)?;
    let mut runs: Vec<Run> = images.iter().map(|image| fake.begin(image)).collect();
    let mut corrections = Means::new();
    for layer in &layers {
        let output = layer.output[0].as_str();
        runs.par_iter_mut().try_for_each(|run| {
            fake.advance_to(run, output, &mut |name, tensor| {
                if let Some(correction) = corrections.get(name) {
                    shift(tensor, correction);
                }
                plan.round(ranges, name, &mut tensor.values);
            })
        })?;
        let of_run = |run: &Run| {
            let (mut run, mut means) = (run.clone(), Vec::new());
            fake.advance(&mut run, Some(output), &mut |_, tensor| {
                means = channel_means(tensor);
            })?;
            Ok(means)
        };
        let means: Vec<Vec<f64>> = runs
            .par_iter()
            .map(of_run)
            .collect::<Result<_, ExecuteError>>()?;
        let Some(mut correction) = float.get(output).cloned() else {
            continue;
        };
        for (channel, correction) in correction.iter_mut().enumerate() {
            let sum: f64 = means.iter().map(|means| means[channel]).sum();
            *correction -= sum / images.len() as f64;
        }
        corrections.insert(output.to_owned(), correction);
    }
    let graph = model.graph.as_mut().ok_or(OnnxError::NoGraph)?;
    for layer in &layers {
        if let Some(correction) = corrections.get(&layer.output[0]) {
            let mut bias = take_float(graph, &layer.input[2])?;
            shift(&mut bias, correction);
            put_float(graph, &layer.input[2], &bias);
        }
    }
    Ok(())
}

/// Adds to each channel its value.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a mean of f32 values fits f32"
)]
fn shift(tensor: &mut Tensor, of_channels: &[f64]) {
    let a_channel = (tensor.values.len() / of_channels.len().max(1)).max(1);
    let planes = tensor.values.chunks_exact_mut(a_channel);
    for (plane, &shift) in planes.zip(of_channels) {
        plane.iter_mut().for_each(|value| *value += shift as f32);
    }
}

fn channel_means(tensor: &Tensor) -> Vec<f64> {
    let n_channels = tensor.shape.first().copied().unwrap_or(1).max(1);
    let a_channel = (tensor.values.len() / n_channels).max(1);
    let planes = tensor.values.chunks_exact(a_channel);
    let mean =
        |plane: &[f32]| plane.iter().map(|&value| f64::from(value)).sum::<f64>() / a_channel as f64;
    planes.map(mean).collect()
}

/// Mean of each channel of the tensors in `wanted`, over `images`.
fn float_means(
    graph: &FloatGraph,
    wanted: &[&str],
    images: &[&[u8]],
) -> Result<Means, ExecuteError> {
    let of_image = |image: &&[u8]| {
        let mut means = Means::new();
        graph.logit(image, &mut |name, tensor| {
            if wanted.contains(&name) {
                means.insert(name.to_owned(), channel_means(tensor));
            }
        })?;
        Ok(means)
    };
    let of_images: Vec<Means> = images
        .par_iter()
        .map(of_image)
        .collect::<Result<_, ExecuteError>>()?;
    let mut total = Means::new();
    for (name, means) in of_images.into_iter().flatten() {
        let sums = total.entry(name).or_insert_with(|| vec![0.0; means.len()]);
        sums.iter_mut()
            .zip(means)
            .for_each(|(sum, mean)| *sum += mean / images.len() as f64);
    }
    Ok(total)
}
