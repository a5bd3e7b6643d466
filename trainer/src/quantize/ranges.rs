//! The range of every activation: candidates of [`crate::calibrate`], the one with the smallest error of the logit taken.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::calibrate::{Method, Observation, Range};
use crate::execute::{ExecuteError, FloatGraph, Run, Tensor};
use crate::export::LOGIT;
use crate::onnx::ModelProto;

use super::graph::{constant, is_weighted};
use super::integers::{Parameters, WeightBits};
use super::plan::Plan;
use super::{Options, QuantizeError, Ranges};

pub(super) fn logits(graph: &FloatGraph, images: &[&[u8]]) -> Result<Vec<f32>, ExecuteError> {
    images
        .par_iter()
        .map(|image| graph.logit(image, &mut |_, _| {}))
        .collect()
}

pub(super) fn rmse(logits: &[f32], reference: &[f32]) -> f64 {
    let squares = logits
        .iter()
        .zip(reference)
        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    (squares.sum::<f64>() / logits.len().max(1) as f64).sqrt()
}

/// For each tensor in graph order the candidate with the smallest error of the logit, everything before it and all weights being quantized.
/// Each image's run waits in front of the layer whose output is to be decided, so that no layer is computed from the image again.
pub(super) fn choose_ranges(
    model: &ModelProto,
    plan: &Plan,
    observed: &Observation,
    selection: &[&[u8]],
    reference: &[f32],
    options: &Options,
) -> Result<Ranges, QuantizeError> {
    let mut ranges = Ranges::new();
    if let Some(method) = options.method {
        for leader in &plan.leaders {
            let range = candidates(observed, leader)?[&method];
            ranges.insert(leader.clone(), (method, range, f64::NAN));
        }
        return Ok(ranges);
    }
    let fake =
        FloatGraph::with_weights(model, fake_quantized_weights(model, options.weight_bits)?)?;
    let mut runs: Vec<Run> = selection.iter().map(|image| fake.begin(image)).collect();
    for leader in &plan.leaders {
        runs.par_iter_mut().try_for_each(|run| {
            fake.advance_to(run, plan.raw(leader), &mut |name, tensor| {
                plan.round(&ranges, name, &mut tensor.values);
            })
        })?;
        let candidates = distinct(candidates(observed, leader)?);
        let errors = candidate_errors(&fake, plan, leader, &candidates, &runs, reference)?;
        let best = candidates
            .into_iter()
            .zip(errors)
            .min_by(|a, b| a.1.total_cmp(&b.1));
        if let Some(((method, range), error)) = best {
            ranges.insert(leader.clone(), (method, range, error));
        }
    }
    Ok(ranges)
}

fn candidates(
    observed: &Observation,
    leader: &str,
) -> Result<BTreeMap<Method, Range>, QuantizeError> {
    let histogram = observed.histograms.get(leader);
    let unobserved = || QuantizeError::Unobserved {
        name: leader.to_owned(),
    };
    Ok(histogram.ok_or_else(unobserved)?.ranges())
}

/// The candidates without those that lie within a hundredth of an earlier one: half a step of 255, which cannot be told apart.
fn distinct(candidates: BTreeMap<Method, Range>) -> Vec<(Method, Range)> {
    let mut kept: Vec<(Method, Range)> = Vec::new();
    for (method, range) in candidates {
        let near = |a: f32, b: f32| (a - b).abs() <= 0.01 * (range.high - range.low);
        let is_known = |(_, known): &(Method, Range)| {
            near(known.low, range.low) && near(known.high, range.high)
        };
        if !kept.iter().any(is_known) {
            kept.push((method, range));
        }
    }
    kept
}

/// Root mean squared error of the logit for each candidate of `leader`, on runs that wait in front of its layer.
fn candidate_errors(
    fake: &FloatGraph,
    plan: &Plan,
    leader: &String,
    candidates: &[(Method, Range)],
    runs: &[Run],
    reference: &[f32],
) -> Result<Vec<f64>, QuantizeError> {
    let of_image = |(run, reference): (&Run, &f32)| -> Result<Vec<f64>, ExecuteError> {
        let mut run = run.clone();
        fake.advance(&mut run, Some(leader), &mut |_, _| {})?;
        let mut errors = Vec::with_capacity(candidates.len());
        for (_, range) in candidates {
            let (mut run, parameters) = (run.clone(), Parameters::of(*range));
            if let Some(tensor) = fake.value_mut(&mut run, leader) {
                parameters.apply(&mut tensor.values);
            }
            fake.advance(&mut run, None, &mut |name, tensor| {
                if plan.leader_of.get(name) == Some(leader) {
                    parameters.apply(&mut tensor.values);
                }
            })?;
            let logit = fake
                .value(&run, LOGIT)
                .and_then(|tensor| tensor.values.first().copied());
            errors.push((f64::from(logit.unwrap_or(f32::NAN)) - f64::from(*reference)).powi(2));
        }
        Ok(errors)
    };
    let of_images: Vec<Vec<f64>> = runs
        .par_iter()
        .zip(reference)
        .map(of_image)
        .collect::<Result<_, _>>()?;
    let mean = |index: usize| {
        of_images.iter().map(|errors| errors[index]).sum::<f64>() / of_images.len() as f64
    };
    Ok((0..candidates.len())
        .map(|index| mean(index).sqrt())
        .collect())
}

/// Weights of Conv and Gemm, rounded to what their integers can say.
pub(super) fn fake_quantized_weights(
    model: &ModelProto,
    bits: WeightBits,
) -> Result<BTreeMap<String, Tensor>, QuantizeError> {
    let graph = model.graph()?;
    let constants = graph.initializers();
    let mut weights = BTreeMap::new();
    for node in graph.node.iter().filter(|node| is_weighted(node)) {
        let proto = constant(&constants, &node.input[1])?;
        let mut values = proto.to_f32()?;
        let n_scales = if node.output[0] == LOGIT {
            1
        } else {
            proto.shape()?.first().copied().unwrap_or(1).max(1)
        };
        let a_scale = (values.len() / n_scales).max(1);
        for row in values.chunks_exact_mut(a_scale) {
            let scale = bits.scale(row);
            row.iter_mut()
                .for_each(|value| *value = f32::from(bits.integer(*value, scale)) * scale);
        }
        weights.insert(
            node.input[1].clone(),
            Tensor {
                shape: proto.shape()?,
                values,
            },
        );
    }
    Ok(weights)
}
