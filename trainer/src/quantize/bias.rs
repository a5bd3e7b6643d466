//! Bias correction: what quantization takes from the mean of a channel is given back by its bias.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;

use crate::execute::{ExecuteError, FloatGraph};
use crate::onnx::{ModelProto, NodeProto, OnnxError};

use super::equalise::{put_float, take_float};
use super::graph::{emit, is_weighted, raw_name};
use super::plan::Plan;
use super::{Options, QuantizeError, Ranges};

/// Adds to every bias, layer after layer, what quantization takes from the mean of its output channel (Nagel et al. 2019, section 4.2,
/// by observation).
pub(super) fn correct_biases(
    model: &mut ModelProto,
    plan: &Plan,
    ranges: &Ranges,
    images: &[&[u8]],
    options: &Options,
) -> Result<(), QuantizeError> {
    let layers: Vec<NodeProto> = model
        .graph()?
        .node
        .iter()
        .filter(|node| is_weighted(node) && node.input.len() == 3)
        .cloned()
        .collect();
    let wanted: BTreeSet<String> = layers.iter().map(|node| node.output[0].clone()).collect();
    let float = channel_means(&FloatGraph::new(model)?, &wanted, None, images)?;
    for layer in &layers {
        let quantized = emit(model, plan, ranges, options.profile)?;
        let raw = raw_name(&layer.output[0], plan, options.profile);
        let means = channel_means(
            &FloatGraph::new(&quantized)?,
            &BTreeSet::from([raw.clone()]),
            Some(&raw),
            images,
        )?;
        let (Some(float), Some(quantized)) = (float.get(&layer.output[0]), means.get(&raw)) else {
            continue;
        };
        let Some(graph) = model.graph.as_mut() else {
            return Err(OnnxError::NoGraph.into());
        };
        let mut bias = take_float(graph, &layer.input[2])?;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a mean of f32 values fits f32"
        )]
        for (bias, (float, quantized)) in bias.values.iter_mut().zip(float.iter().zip(quantized)) {
            *bias += (float - quantized) as f32;
        }
        put_float(graph, &layer.input[2], &bias);
    }
    Ok(())
}

/// Mean of each channel of the tensors in `wanted`, over `images`.
fn channel_means(
    graph: &FloatGraph,
    wanted: &BTreeSet<String>,
    until: Option<&str>,
    images: &[&[u8]],
) -> Result<BTreeMap<String, Vec<f64>>, ExecuteError> {
    let of_image = |image: &&[u8]| {
        let mut means = BTreeMap::new();
        let mut run = graph.begin(image);
        graph.advance(&mut run, until, &mut |name, tensor| {
            if wanted.contains(name) {
                let a_channel = (tensor.values.len()
                    / tensor.shape.first().copied().unwrap_or(1).max(1))
                .max(1);
                let planes = tensor.values.chunks_exact(a_channel);
                let mean = |plane: &[f32]| {
                    plane.iter().map(|&value| f64::from(value)).sum::<f64>() / a_channel as f64
                };
                means.insert(name.to_owned(), planes.map(mean).collect::<Vec<f64>>());
            }
        })?;
        Ok(means)
    };
    let of_images: Vec<BTreeMap<String, Vec<f64>>> = images
        .par_iter()
        .map(of_image)
        .collect::<Result<_, ExecuteError>>()?;
    let mut total: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (name, means) in of_images.into_iter().flatten() {
        let sums = total.entry(name).or_insert_with(|| vec![0.0; means.len()]);
        sums.iter_mut()
            .zip(means)
            .for_each(|(sum, mean)| *sum += mean / images.len() as f64);
    }
    Ok(total)
}
