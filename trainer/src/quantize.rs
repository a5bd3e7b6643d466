//! `trainer quantize`: an f32 file to an int8 file, by calibration alone.
//!
//! In: an f32 file of [`crate::export`] and calibration images. Out: the int8 graph in QDQ form that every runtime turns into integer
//! kernels: `image` u8 -> DequantizeLinear(1/255, 0) -> Conv -> Q -> DQ -> MaxPool -> Q -> DQ -> ... -> Flatten -> Q -> DQ -> Gemm -> Q -> DQ
//! -> Gemm -> `logit`. Activations are u8; where a ReLU follows, the zero point is 0 and the saturation is the ReLU.
//! Weights are s8 in [-127, 127], symmetric, one scale an output channel; biases are i32 at the scale input x weight.
//! MaxPool and Flatten keep their input's scale. The last Gemm has one weight scale and no quantization behind it. No input can
//! make an i32 accumulator overflow. Profile `tensorrt` instead quantizes the inputs of Conv and Gemm to symmetric s8
//! and leaves biases alone. Whether the result is good enough is [`crate::verify`]'s question.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use rayon::prelude::*;
use serde::Serialize;
use shared::manifest::{METADATA_KEY, Manifest, Precision, SelfTest, Validation};

use crate::cache::Cache;
use crate::calibrate::{self, Method, Observation, Range};
use crate::execute::{ExecuteError, FloatGraph, Tensor};
use crate::exit::{Exit, fault};
use crate::export::{IMAGE, IMAGE_SCALE, LOGIT, write_file};
use crate::index::Part;
use crate::onnx::{
    self, DataType, GraphProto, ModelProto, NodeProto, OnnxError, TensorProto, ValueInfoProto,
};
use crate::quantization_aware::{self, TrainedRanges};

/// Key in the manifest's `tools` of a file whose channels were equalised: its tensors differ from the f32 file's by a factor a channel.
pub const EQUALISED: &str = "equalised";
/// Images of the self-test that the manifest states.
const SELF_TESTS: usize = 3;
/// Largest factor by which equalisation moves a channel.
const MAX_EQUALISATION: f32 = 64.0;

/// For whom the file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Our engine, ONNX Runtime, OpenVINO: u8 activations, i32 biases.
    Standard,
    /// TensorRT: symmetric s8 activations, f32 biases.
    Tensorrt,
}

/// Whether a step is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// Where it makes the logit's error smaller.
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

impl Choice {
    fn tried(self) -> &'static [bool] {
        match self {
            Self::Auto => &[false, true],
            Self::On => &[true],
            Self::Off => &[false],
        }
    }
}

/// How to quantize.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// For whom the file is.
    pub profile: Profile,
    /// One method for every tensor; `None` tries all and takes for each tensor the one with the smallest error of the logit.
    pub method: Option<Method>,
    /// Training slices to calibrate on, half of them positive.
    pub n_calibration: usize,
    /// Images, the last ones of those given, on which errors of the logit are compared and biases corrected.
    pub n_selection: usize,
    /// Cross-layer equalisation.
    pub equalise: Choice,
    /// Bias correction.
    pub correct_bias: Choice,
}

/// What was chosen, and what it costs.
#[derive(Clone, Debug, Serialize)]
pub struct QuantizeReport {
    /// Images that the ranges were observed on.
    pub n_calibration: usize,
    /// Images that errors were compared on.
    pub n_selection: usize,
    /// Whether equalisation was applied.
    pub is_equalised: bool,
    /// Whether biases were corrected.
    pub is_bias_corrected: bool,
    /// Root mean squared error of the logit on the selection images, for every combination tried.
    pub tried: Vec<Trial>,
    /// Every activation that got a range.
    pub tensors: Vec<TensorReport>,
}

/// One combination that was tried.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Trial {
    /// Whether equalisation was applied.
    pub is_equalised: bool,
    /// Whether biases were corrected.
    pub is_bias_corrected: bool,
    /// Root mean squared error of the logit.
    pub logit_rmse: f64,
}

/// One activation's quantization.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// Name of the tensor in the f32 file.
    pub tensor: String,
    /// How its range was found.
    pub method: Method,
    /// The range.
    pub range: Range,
    /// Root mean squared error of the logit with this tensor and those before it quantized; NaN where nothing was compared.
    pub logit_rmse: f64,
}

/// Why a file cannot be quantized.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// The file is malformed.
    #[error(transparent)]
    Onnx(#[from] OnnxError),
    /// The graph cannot be run.
    #[error(transparent)]
    Execute(#[from] ExecuteError),
    /// A tensor was not observed.
    #[error("tensor {name} has no observed range")]
    Unobserved {
        /// Its name.
        name: String,
    },
    /// No scale keeps an accumulator within i32.
    #[error(
        "node {node}: no weight scale keeps the accumulator of output channel {channel} within i32"
    )]
    Overflow {
        /// Its name.
        node: String,
        /// Output channel.
        channel: usize,
    },
    /// There was nothing to calibrate on.
    #[error("no calibration images")]
    NoImages,
}

type Ranges = BTreeMap<String, (Method, Range, f64)>;

/// Quantizes `model`, an f32 file of ours, on `images`, each u8 `[3, 256, 256]`, balanced by class at best. Metadata is left behind.
/// The result depends on the arguments alone. `progress` is called once an image and pass.
///
/// # Errors
///
/// [`QuantizeError`] where the graph holds what is not supported or no scale fits.
pub fn quantize_model(
    model: &ModelProto,
    images: &[&[u8]],
    options: &Options,
    progress: &(dyn Fn() + Sync),
) -> Result<(ModelProto, QuantizeReport), QuantizeError> {
    let selection = &images[images.len().saturating_sub(options.n_selection.max(1))..];
    if selection.is_empty() {
        return Err(QuantizeError::NoImages);
    }
    let plan = Plan::of(model.graph()?);
    let exported = FloatGraph::new(model)?;
    let reference = logits(&exported, selection)?;
    let as_exported = calibrate::observe(&exported, &plan.leaders, images, progress)?;
    drop(exported);
    let mut best: Option<(ModelProto, QuantizeReport, f64)> = None;
    let mut tried = Vec::new();
    for &is_equalised in options.equalise.tried() {
        let mut float = model.clone();
        let after_equalising;
        let observed = if is_equalised {
            equalise(&mut float, &plan, &as_exported)?;
            let equalised = FloatGraph::new(&float)?;
            after_equalising = calibrate::observe(&equalised, &plan.leaders, images, progress)?;
            &after_equalising
        } else {
            &as_exported
        };
        let ranges = choose_ranges(&float, &plan, observed, selection, &reference, options)?;
        for &is_bias_corrected in options.correct_bias.tried() {
            if is_bias_corrected {
                correct_biases(&mut float, &plan, &ranges, selection, options)?;
            }
            let quantized = emit(&float, &plan, &ranges, options.profile)?;
            let logit_rmse = rmse(
                &logits(&FloatGraph::new(&quantized)?, selection)?,
                &reference,
            );
            tried.push(Trial {
                is_equalised,
                is_bias_corrected,
                logit_rmse,
            });
            if best
                .as_ref()
                .is_none_or(|(_, _, least)| logit_rmse < *least)
            {
                let report = report(
                    images.len(),
                    selection.len(),
                    is_equalised,
                    is_bias_corrected,
                    &ranges,
                    &plan,
                );
                best = Some((quantized, report, logit_rmse));
            }
        }
    }
    let (quantized, mut report, _) = best.ok_or(QuantizeError::NoImages)?;
    report.tried = tried;
    Ok((quantized, report))
}

/// Quantizes `model`, whose weights were trained with `ranges`: nothing is calibrated, equalised or corrected.
///
/// # Errors
///
/// As [`quantize_model`]; an activation without range.
pub fn quantize_with(
    model: &ModelProto,
    ranges: &TrainedRanges,
) -> Result<(ModelProto, QuantizeReport), QuantizeError> {
    let plan = Plan::of(model.graph()?);
    let of_leader = |name: &String| {
        let range = ranges
            .get(name)
            .ok_or_else(|| QuantizeError::Unobserved { name: name.clone() })?;
        Ok((name.clone(), (Method::Trained, *range, f64::NAN)))
    };
    let ranges: Ranges = plan
        .leaders
        .iter()
        .map(of_leader)
        .collect::<Result<_, QuantizeError>>()?;
    let quantized = emit(model, &plan, &ranges, Profile::Standard)?;
    Ok((quantized, report(0, 0, false, false, &ranges, &plan)))
}

fn report(
    n_calibration: usize,
    n_selection: usize,
    is_equalised: bool,
    is_bias_corrected: bool,
    ranges: &Ranges,
    plan: &Plan,
) -> QuantizeReport {
    let in_order = plan
        .leaders
        .iter()
        .filter_map(|name| Some((name, ranges.get(name)?)));
    let tensors = in_order
        .map(|(name, &(method, range, logit_rmse))| TensorReport {
            tensor: name.clone(),
            method,
            range,
            logit_rmse,
        })
        .collect();
    QuantizeReport {
        n_calibration,
        n_selection,
        is_equalised,
        is_bias_corrected,
        tried: Vec::new(),
        tensors,
    }
}

/// Which tensors are quantized, and with whose range.
struct Plan {
    /// Tensors with a range of their own, in graph order.
    leaders: Vec<String>,
    /// For every quantized tensor the one whose range it shares.
    leader_of: BTreeMap<String, String>,
    /// For the output of a node that a ReLU alone reads: the ReLU's output.
    relu_of: BTreeMap<String, String>,
}

impl Plan {
    fn of(graph: &GraphProto) -> Self {
        let mut readers: BTreeMap<&str, Vec<&NodeProto>> = BTreeMap::new();
        for node in &graph.node {
            for input in &node.input {
                readers.entry(input).or_default().push(node);
            }
        }
        let mut plan = Self {
            leaders: Vec::new(),
            leader_of: BTreeMap::new(),
            relu_of: BTreeMap::new(),
        };
        let mut fused = BTreeSet::new();
        for node in &graph.node {
            let output = node.output[0].as_str();
            match node.op_type.as_str() {
                "Cast" | "Mul" | "Sigmoid" => continue,
                "MaxPool" | "Flatten" => {
                    let leader = plan
                        .leader_of
                        .get(&node.input[0])
                        .unwrap_or(&node.input[0])
                        .clone();
                    plan.leader_of.insert(output.to_owned(), leader);
                    continue;
                }
                _ if output == LOGIT || fused.contains(output) => continue,
                _ => {}
            }
            let relu = match readers.get(output).map(Vec::as_slice) {
                Some([only]) if only.op_type == "Relu" && node.op_type != "Relu" => {
                    Some(only.output[0].clone())
                }
                _ => None,
            };
            let name = relu.clone().unwrap_or_else(|| output.to_owned());
            if let Some(relu) = relu {
                fused.insert(only_name(&relu, graph));
                plan.relu_of.insert(output.to_owned(), relu);
            }
            plan.leader_of.insert(name.clone(), name.clone());
            plan.leaders.push(name);
        }
        plan
    }

    fn parameters(&self, tensor: &str, ranges: &Ranges) -> Result<Parameters, QuantizeError> {
        let leader = self.leader_of.get(tensor).map_or(tensor, String::as_str);
        if leader == "image_scaled" {
            return Ok(Parameters {
                scale: IMAGE_SCALE,
                zero_point: 0,
            });
        }
        let (_, range, _) = ranges
            .get(leader)
            .ok_or_else(|| QuantizeError::Unobserved {
                name: leader.to_owned(),
            })?;
        Ok(Parameters::of(*range))
    }
}

/// The string as it stands in the graph, so that a set of borrowed names can hold it.
fn only_name<'a>(name: &str, graph: &'a GraphProto) -> &'a str {
    let outputs = graph.node.iter().flat_map(|node| &node.output);
    outputs
        .into_iter()
        .find(|output| *output == name)
        .map_or("", String::as_str)
}

/// Scale and zero point of a u8 activation: value = (integer - zero point) x scale.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Parameters {
    scale: f32,
    zero_point: u8,
}

impl Parameters {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 0..=255"
    )]
    fn of(range: Range) -> Self {
        let width = range.high - range.low;
        let scale = if width > 0.0 {
            (width / 255.0).max(f32::MIN_POSITIVE)
        } else {
            IMAGE_SCALE
        };
        Self {
            scale,
            zero_point: (-range.low / scale).round_ties_even().clamp(0.0, 255.0) as u8,
        }
    }

    /// Rounds values to what the integers can say.
    fn apply(self, values: &mut [f32]) {
        let zero_point = f32::from(self.zero_point);
        for value in values {
            *value = (((*value / self.scale).round_ties_even() + zero_point).clamp(0.0, 255.0)
                - zero_point)
                * self.scale;
        }
    }
}

/// What one integer step of an activation of that range stands for.
pub(crate) fn activation_scale(range: Range) -> f32 {
    Parameters::of(range).scale
}

/// Symmetric s8: value = integer x scale.
fn symmetric_scale(range: Range) -> f32 {
    let magnitude = range.high.max(-range.low);
    if magnitude > 0.0 {
        (magnitude / 127.0).max(f32::MIN_POSITIVE)
    } else {
        1.0 / 127.0
    }
}

fn logits(graph: &FloatGraph, images: &[&[u8]]) -> Result<Vec<f32>, ExecuteError> {
    images
        .par_iter()
        .map(|image| graph.logit(image, &mut |_, _| {}))
        .collect()
}

fn rmse(logits: &[f32], reference: &[f32]) -> f64 {
    let squares = logits
        .iter()
        .zip(reference)
        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    (squares.sum::<f64>() / logits.len().max(1) as f64).sqrt()
}

/// For each tensor in graph order the candidate with the smallest error of the logit, everything before it and all weights being quantized.
fn choose_ranges(
    model: &ModelProto,
    plan: &Plan,
    observed: &Observation,
    selection: &[&[u8]],
    reference: &[f32],
    options: &Options,
) -> Result<Ranges, QuantizeError> {
    let mut ranges = Ranges::new();
    let fake = FloatGraph::with_weights(model, &fake_quantized_weights(model)?)?;
    for leader in &plan.leaders {
        let histogram =
            observed
                .histograms
                .get(leader)
                .ok_or_else(|| QuantizeError::Unobserved {
                    name: leader.clone(),
                })?;
        let candidates = histogram.ranges();
        if let Some(method) = options.method {
            ranges.insert(leader.clone(), (method, candidates[&method], f64::NAN));
            continue;
        }
        let candidates: Vec<(Method, Range)> = candidates.into_iter().collect();
        let errors = candidate_errors(&fake, leader, &candidates, &ranges, selection, reference)?;
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

/// Root mean squared error of the logit for each candidate of `leader`.
fn candidate_errors(
    fake: &FloatGraph,
    leader: &str,
    candidates: &[(Method, Range)],
    chosen: &Ranges,
    selection: &[&[u8]],
    reference: &[f32],
) -> Result<Vec<f64>, QuantizeError> {
    let of_image = |(image, reference): (&&[u8], &f32)| -> Result<Vec<f64>, ExecuteError> {
        let mut run = fake.begin(image);
        fake.advance(&mut run, Some(leader), &mut |name, tensor| {
            if let Some((_, range, _)) = chosen.get(name) {
                Parameters::of(*range).apply(&mut tensor.values);
            }
        })?;
        let mut errors = Vec::with_capacity(candidates.len());
        for (_, range) in candidates {
            let mut run = run.clone();
            if let Some(tensor) = fake.value_mut(&mut run, leader) {
                Parameters::of(*range).apply(&mut tensor.values);
            }
            fake.advance(&mut run, None, &mut |_, _| {})?;
            let logit = fake
                .value(&run, LOGIT)
                .and_then(|tensor| tensor.values.first().copied());
            errors.push((f64::from(logit.unwrap_or(f32::NAN)) - f64::from(*reference)).powi(2));
        }
        Ok(errors)
    };
    let of_images: Vec<Vec<f64>> = selection
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

/// Weights of Conv and Gemm, rounded to what s8 can say.
fn fake_quantized_weights(model: &ModelProto) -> Result<BTreeMap<String, Tensor>, QuantizeError> {
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
            let scale = weight_scale(row);
            row.iter_mut().for_each(|value| {
                *value = (*value / scale).round_ties_even().clamp(-127.0, 127.0) * scale
            });
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

fn weight_scale(row: &[f32]) -> f32 {
    let magnitude = row
        .iter()
        .fold(0.0_f32, |largest, value| largest.max(value.abs()));
    if magnitude > 0.0 {
        (magnitude / 127.0).max(f32::MIN_POSITIVE)
    } else {
        1.0 / 127.0
    }
}

fn is_weighted(node: &NodeProto) -> bool {
    matches!(node.op_type.as_str(), "Conv" | "Gemm")
}

fn constant<'a>(
    constants: &BTreeMap<&str, &'a TensorProto>,
    name: &str,
) -> Result<&'a TensorProto, OnnxError> {
    constants
        .get(name)
        .copied()
        .ok_or_else(|| OnnxError::Undefined {
            name: name.to_owned(),
        })
}

/// Moves factors between a layer's output channels and the next layer's input channels, through ReLU, MaxPool and Flatten, so that channels
/// of small range use more of the tensor's common scale (Nagel et al., "Data-free quantization", 2019, section 4.1, with the observed
/// range of the activation in place of the first layer's weights, whose scales are free per channel).
fn equalise(
    model: &mut ModelProto,
    plan: &Plan,
    observed: &Observation,
) -> Result<(), QuantizeError> {
    let graph = model.graph()?.clone();
    for (first, second) in equalised_pairs(&graph) {
        let activation = plan
            .relu_of
            .get(&first.output[0])
            .unwrap_or(&first.output[0]);
        let Some(magnitudes) = observed.channel_magnitudes.get(activation) else {
            continue;
        };
        let Some(graph) = model.graph.as_mut() else {
            return Err(OnnxError::NoGraph.into());
        };
        let mut of_first = take_float(graph, &first.input[1])?;
        let mut bias = take_float(graph, &first.input[2])?;
        let mut of_second = take_float(graph, &second.input[1])?;
        let n_channels = magnitudes.len();
        let n_outputs = of_second.shape.first().copied().unwrap_or(1).max(1);
        let a_channel = of_second.values.len() / n_outputs / n_channels;
        if of_first.shape.first() == Some(&n_channels)
            && a_channel > 0
            && a_channel * n_channels * n_outputs == of_second.values.len()
        {
            let mut reads = vec![0.0_f32; n_channels];
            for (index, weights) in of_second.values.chunks_exact(a_channel).enumerate() {
                let read = &mut reads[index % n_channels];
                *read = weights
                    .iter()
                    .fold(*read, |largest, value| largest.max(value.abs()));
            }
            let factors = equalisation_factors(magnitudes, &reads);
            let a_row = of_first.values.len() / n_channels;
            for (channel, &factor) in factors.iter().enumerate() {
                of_first.values[channel * a_row..][..a_row]
                    .iter_mut()
                    .for_each(|value| *value /= factor);
                bias.values[channel] /= factor;
            }
            for (index, weights) in of_second.values.chunks_exact_mut(a_channel).enumerate() {
                weights
                    .iter_mut()
                    .for_each(|value| *value *= factors[index % n_channels]);
            }
        }
        put_float(graph, &first.input[1], &of_first);
        put_float(graph, &first.input[2], &bias);
        put_float(graph, &second.input[1], &of_second);
    }
    Ok(())
}

/// Factor a channel's activation is divided by: sqrt(activation magnitude / weight magnitude of the reader), normalised to geometric mean 1.
fn equalisation_factors(magnitudes: &[f32], reads: &[f32]) -> Vec<f32> {
    let raw = magnitudes
        .iter()
        .zip(reads)
        .map(|(magnitude, read)| (magnitude / read).sqrt());
    let raw: Vec<Option<f32>> = raw
        .map(|factor| (factor.is_finite() && factor > 0.0).then_some(factor))
        .collect();
    let used: Vec<f32> = raw
        .iter()
        .filter_map(|factor| factor.map(f32::ln))
        .collect();
    let mean = if used.is_empty() {
        0.0
    } else {
        used.iter().sum::<f32>() / used.len() as f32
    };
    let normalised = raw
        .into_iter()
        .map(|factor| factor.map_or(1.0, |factor| factor / mean.exp()));
    normalised
        .map(|factor| factor.clamp(1.0 / MAX_EQUALISATION, MAX_EQUALISATION))
        .collect()
}

/// Layers whose output goes, through ReLU, MaxPool and Flatten alone, to one other layer.
fn equalised_pairs(graph: &GraphProto) -> Vec<(NodeProto, NodeProto)> {
    let only_reader = |name: &str| {
        let mut readers = graph
            .node
            .iter()
            .filter(|node| node.input.iter().any(|input| input == name));
        let first = readers.next();
        if readers.next().is_some() {
            None
        } else {
            first
        }
    };
    let weighted = graph
        .node
        .iter()
        .filter(|node| is_weighted(node) && node.output[0] != LOGIT && node.input.len() == 3);
    let pair = |first: &NodeProto| {
        let mut reader = only_reader(&first.output[0])?;
        while matches!(reader.op_type.as_str(), "Relu" | "MaxPool" | "Flatten") {
            reader = only_reader(&reader.output[0])?;
        }
        is_weighted(reader).then(|| (first.clone(), reader.clone()))
    };
    weighted.filter_map(pair).collect()
}

fn take_float(graph: &mut GraphProto, name: &str) -> Result<Tensor, OnnxError> {
    let proto = graph
        .initializer
        .iter_mut()
        .find(|tensor| tensor.name == name);
    let proto = proto.ok_or_else(|| OnnxError::Undefined {
        name: name.to_owned(),
    })?;
    Ok(Tensor {
        shape: proto.shape()?,
        values: proto.to_f32()?,
    })
}

fn put_float(graph: &mut GraphProto, name: &str, tensor: &Tensor) {
    if let Some(proto) = graph
        .initializer
        .iter_mut()
        .find(|candidate| candidate.name == name)
    {
        *proto = TensorProto::float(name, &tensor.shape, &tensor.values);
    }
}

/// Adds to every bias, layer after layer, what quantization takes from the mean of its output channel (Nagel et al. 2019, section 4.2,
/// by observation).
fn correct_biases(
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

/// Name of a node's output before its quantization. Behind it stands a tensor with the name and meaning that it has in the f32 file.
fn raw_name(output: &str, plan: &Plan, profile: Profile) -> String {
    if output == LOGIT || profile == Profile::Tensorrt || plan.relu_of.contains_key(output) {
        output.to_owned()
    } else {
        format!("{output}_unquantized")
    }
}

/// The int8 graph.
fn emit(
    model: &ModelProto,
    plan: &Plan,
    ranges: &Ranges,
    profile: Profile,
) -> Result<ModelProto, QuantizeError> {
    let float = model.graph()?;
    let mut emitter = Emitter {
        constants: float.initializers(),
        dims: float
            .value_info
            .iter()
            .filter_map(|value| Some((value.name.as_str(), value.dims()?)))
            .collect(),
        plan,
        ranges,
        declared: BTreeSet::new(),
        graph: GraphProto {
            name: float.name.clone(),
            input: float.input.clone(),
            output: float.output.clone(),
            ..GraphProto::default()
        },
    };
    for node in &float.node {
        match profile {
            Profile::Standard => emitter.standard(node)?,
            Profile::Tensorrt => emitter.tensorrt(node)?,
        }
    }
    let mut quantized = ModelProto::new(emitter.graph);
    quantized.doc_string.clone_from(&model.doc_string);
    Ok(quantized)
}

struct Emitter<'a> {
    constants: BTreeMap<&'a str, &'a TensorProto>,
    dims: BTreeMap<&'a str, Vec<usize>>,
    plan: &'a Plan,
    ranges: &'a Ranges,
    declared: BTreeSet<String>,
    graph: GraphProto,
}

impl Emitter<'_> {
    fn standard(&mut self, node: &NodeProto) -> Result<(), QuantizeError> {
        let output = node.output[0].as_str();
        match node.op_type.as_str() {
            "Cast" => Ok(()),
            "Mul" => {
                self.declare(
                    "image",
                    Parameters {
                        scale: IMAGE_SCALE,
                        zero_point: 0,
                    },
                );
                self.push(
                    NodeProto::new(
                        "DequantizeLinear",
                        "image_dequantize",
                        &[IMAGE, "image_scale", "image_zero_point"],
                        output,
                    ),
                    output,
                    DataType::Float,
                );
                Ok(())
            }
            "Sigmoid" => {
                self.push(node.clone(), output, DataType::Float);
                Ok(())
            }
            "Relu" if self.plan.relu_of.values().any(|relu| relu == output) => Ok(()),
            _ => {
                let mut quantized = node.clone();
                if is_weighted(node) {
                    self.weights(node)?;
                }
                quantized.output[0] = raw_name(output, self.plan, Profile::Standard);
                let raw = quantized.output[0].clone();
                self.push(quantized, output, DataType::Float);
                if output == LOGIT {
                    Ok(())
                } else {
                    self.requantize(&raw, output)
                }
            }
        }
    }

    /// Q and DQ behind `raw`; what comes out has the name that the f32 file gives it.
    fn requantize(&mut self, raw: &str, output: &str) -> Result<(), QuantizeError> {
        let name = self.plan.relu_of.get(output).map_or(output, String::as_str);
        let leader = self.plan.leader_of.get(name).map_or(name, String::as_str);
        let parameters = self.plan.parameters(name, self.ranges)?;
        let prefix = if leader == "image_scaled" {
            "image"
        } else {
            leader
        };
        self.declare(prefix, parameters);
        let (scale, zero_point, integers) = (
            format!("{prefix}_scale"),
            format!("{prefix}_zero_point"),
            format!("{name}_quantized"),
        );
        self.push(
            NodeProto::new(
                "QuantizeLinear",
                &format!("{name}_quantize"),
                &[raw, &scale, &zero_point],
                &integers,
            ),
            output,
            DataType::Uint8,
        );
        self.push(
            NodeProto::new(
                "DequantizeLinear",
                &format!("{name}_dequantize"),
                &[&integers, &scale, &zero_point],
                name,
            ),
            output,
            DataType::Float,
        );
        Ok(())
    }

    /// Declares scale and zero point of an activation once.
    fn declare(&mut self, prefix: &str, parameters: Parameters) {
        if self.declared.insert(prefix.to_owned()) {
            self.graph.initializer.push(TensorProto::float(
                &format!("{prefix}_scale"),
                &[],
                &[parameters.scale],
            ));
            self.graph.initializer.push(TensorProto::uint8(
                &format!("{prefix}_zero_point"),
                &[],
                &[parameters.zero_point],
            ));
        }
    }

    /// Adds a node whose output has the shape of `like` in the f32 file.
    fn push(&mut self, node: NodeProto, like: &str, element: DataType) {
        if let Some(dims) = self.dims.get(like) {
            self.graph
                .value_info
                .push(ValueInfoProto::batched(&node.output[0], element, dims));
        }
        self.graph.node.push(node);
    }

    /// s8 weights and i32 bias of `node` with their DQ, under the names that the node reads.
    fn weights(&mut self, node: &NodeProto) -> Result<(), QuantizeError> {
        let input = self.plan.parameters(&node.input[0], self.ranges)?;
        let weight = constant(&self.constants, &node.input[1])?;
        let shape = weight.shape()?;
        let n_outputs = shape.first().copied().unwrap_or(1).max(1);
        let bias = match node.input.get(2) {
            Some(name) => constant(&self.constants, name)?.to_f32()?,
            None => vec![0.0; n_outputs],
        };
        let is_per_tensor = node.output[0] == LOGIT;
        let layer = QuantizedLayer::of(&weight.to_f32()?, &bias, input.scale, is_per_tensor);
        let layer = layer.map_err(|channel| QuantizeError::Overflow {
            node: node.name.clone(),
            channel,
        })?;
        let scale_dims: &[usize] = if is_per_tensor { &[] } else { &[n_outputs] };
        let zeros = vec![0; layer.scales.len()];
        let name = &node.input[1];
        self.graph.initializer.push(TensorProto::int8(
            &format!("{name}_quantized"),
            &shape,
            &layer.weights,
        ));
        self.graph.initializer.push(TensorProto::float(
            &format!("{name}_scale"),
            scale_dims,
            &layer.scales,
        ));
        self.graph.initializer.push(TensorProto::int8(
            &format!("{name}_zero_point"),
            scale_dims,
            &zeros,
        ));
        self.dequantize_constant(name);
        if let Some(name) = node.input.get(2) {
            let scales: Vec<f32> = layer
                .scales
                .iter()
                .map(|scale| input.scale * scale)
                .collect();
            self.graph.initializer.push(TensorProto::int32(
                &format!("{name}_quantized"),
                &[n_outputs],
                &layer.bias,
            ));
            self.graph.initializer.push(TensorProto::float(
                &format!("{name}_scale"),
                scale_dims,
                &scales,
            ));
            self.graph.initializer.push(TensorProto::int32(
                &format!("{name}_zero_point"),
                scale_dims,
                &vec![0; scales.len()],
            ));
            self.dequantize_constant(name);
        }
        Ok(())
    }

    fn dequantize_constant(&mut self, name: &str) {
        let inputs = [
            format!("{name}_quantized"),
            format!("{name}_scale"),
            format!("{name}_zero_point"),
        ];
        let inputs = [inputs[0].as_str(), inputs[1].as_str(), inputs[2].as_str()];
        self.graph.node.push(
            NodeProto::new(
                "DequantizeLinear",
                &format!("{name}_dequantize"),
                &inputs,
                name,
            )
            .with_int("axis", 0),
        );
    }

    fn tensorrt(&mut self, node: &NodeProto) -> Result<(), QuantizeError> {
        let output = node.output[0].as_str();
        for name in node.input.iter().skip(1).filter(|_| !is_weighted(node)) {
            if let Some(&constant) = self.constants.get(name.as_str()) {
                self.graph.initializer.push(constant.clone());
            }
        }
        let mut node = node.clone();
        if is_weighted(&node) {
            let input = node.input[0].clone();
            node.input[0] = format!("{input}_dequantized");
            if self.declared.insert(input.clone()) {
                self.symmetric_input(&input)?;
            }
            let weight = constant(&self.constants, &node.input[1])?;
            let (shape, values) = (weight.shape()?, weight.to_f32()?);
            let n_outputs = shape.first().copied().unwrap_or(1).max(1);
            let rows = values.chunks_exact((values.len() / n_outputs).max(1));
            let scales: Vec<f32> = rows.clone().map(weight_scale).collect();
            let integers: Vec<i8> = rows
                .zip(&scales)
                .flat_map(|(row, &scale)| row.iter().map(move |&value| to_s8(value, scale)))
                .collect();
            let name = node.input[1].clone();
            self.graph.initializer.push(TensorProto::int8(
                &format!("{name}_quantized"),
                &shape,
                &integers,
            ));
            self.graph.initializer.push(TensorProto::float(
                &format!("{name}_scale"),
                &[n_outputs],
                &scales,
            ));
            self.graph.initializer.push(TensorProto::int8(
                &format!("{name}_zero_point"),
                &[n_outputs],
                &vec![0; n_outputs],
            ));
            self.dequantize_constant(&name);
            if let Some(name) = node.input.get(2) {
                self.graph
                    .initializer
                    .push(constant(&self.constants, name)?.clone());
            }
        }
        self.push(node, output, DataType::Float);
        Ok(())
    }

    /// s8 Q and DQ of a layer's input.
    fn symmetric_input(&mut self, input: &str) -> Result<(), QuantizeError> {
        let leader = self.plan.leader_of.get(input).map_or(input, String::as_str);
        let range = if leader == "image_scaled" {
            Range {
                low: 0.0,
                high: 1.0,
            }
        } else {
            self.ranges
                .get(leader)
                .ok_or_else(|| QuantizeError::Unobserved {
                    name: leader.to_owned(),
                })?
                .1
        };
        let (scale, zero_point, integers) = (
            format!("{input}_scale"),
            format!("{input}_zero_point"),
            format!("{input}_quantized"),
        );
        self.graph
            .initializer
            .push(TensorProto::float(&scale, &[], &[symmetric_scale(range)]));
        self.graph
            .initializer
            .push(TensorProto::int8(&zero_point, &[], &[0]));
        self.push(
            NodeProto::new(
                "QuantizeLinear",
                &format!("{input}_quantize"),
                &[input, &scale, &zero_point],
                &integers,
            ),
            input,
            DataType::Int8,
        );
        let output = format!("{input}_dequantized");
        self.push(
            NodeProto::new(
                "DequantizeLinear",
                &format!("{input}_dequantize"),
                &[&integers, &scale, &zero_point],
                &output,
            ),
            input,
            DataType::Float,
        );
        Ok(())
    }
}

#[expect(clippy::cast_possible_truncation, reason = "clamped to -127..=127")]
fn to_s8(value: f32, scale: f32) -> i8 {
    (value / scale).round_ties_even().clamp(-127.0, 127.0) as i8
}

/// Integers of one layer.
pub(crate) struct QuantizedLayer {
    weights: Vec<i8>,
    scales: Vec<f32>,
    bias: Vec<i32>,
}

impl QuantizedLayer {
    /// Quantizes `weights [output, inputs]`; a scale is doubled until no accumulator can overflow. The error is the channel for which
    /// that does not help.
    pub(crate) fn of(
        weights: &[f32],
        bias: &[f32],
        input_scale: f32,
        is_per_tensor: bool,
    ) -> Result<Self, usize> {
        let n_outputs = bias.len().max(1);
        let n_groups = if is_per_tensor { 1 } else { n_outputs };
        let (a_group, biases_a_group) = ((weights.len() / n_groups).max(1), n_outputs / n_groups);
        let groups = weights
            .par_chunks_exact(a_group)
            .zip(bias.par_chunks_exact(biases_a_group))
            .enumerate();
        let of_groups: Vec<(Vec<i8>, f32, Vec<i32>)> = groups
            .map(|(group, (weights, bias))| {
                let mut scale = weight_scale(weights);
                for _ in 0..64 {
                    let integers: Vec<i8> =
                        weights.iter().map(|&value| to_s8(value, scale)).collect();
                    let quantized_bias: Option<Vec<i32>> = bias
                        .iter()
                        .map(|&value| to_i32(value, input_scale * scale))
                        .collect();
                    let fits = |bias: &Vec<i32>| {
                        shared::quantize::check_accumulators(&integers, bias).is_ok()
                    };
                    if let Some(bias) = quantized_bias.filter(fits) {
                        return Ok((integers, scale, bias));
                    }
                    scale *= 2.0;
                }
                Err(group)
            })
            .collect::<Result<_, usize>>()?;
        let mut layer = Self {
            weights: Vec::with_capacity(weights.len()),
            scales: Vec::new(),
            bias: Vec::new(),
        };
        for (weights, scale, bias) in of_groups {
            layer.weights.extend(weights);
            layer.scales.push(scale);
            layer.bias.extend(bias);
        }
        Ok(layer)
    }
}

impl QuantizedLayer {
    /// What the integers stand for: weights and biases.
    pub(crate) fn values(&self, input_scale: f32) -> (Vec<f32>, Vec<f32>) {
        let n_groups = self.scales.len().max(1);
        let of_weights = self.weights.chunks((self.weights.len() / n_groups).max(1));
        let weights = of_weights
            .zip(&self.scales)
            .flat_map(|(weights, scale)| weights.iter().map(move |&w| f32::from(w) * scale));
        let of_biases = self.bias.chunks((self.bias.len() / n_groups).max(1));
        #[expect(
            clippy::cast_precision_loss,
            reason = "a bias beyond 2^24 loses bits that f32 sums lose anyway"
        )]
        let biases = of_biases.zip(&self.scales).flat_map(|(biases, scale)| {
            let scale = input_scale * scale;
            biases.iter().map(move |&bias| bias as f32 * scale)
        });
        (weights.collect(), biases.collect())
    }
}

/// The bias as integer at `scale`; `None` where it leaves i32.
fn to_i32(value: f32, scale: f32) -> Option<i32> {
    let integer = (f64::from(value) / f64::from(scale)).round_ties_even();
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the range is checked in the same line"
    )]
    (integer.abs() <= f64::from(i32::MAX)).then_some(integer as i32)
}

/// Arguments of `trainer quantize`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  trainer quantize --model model.onnx --data cache --out model-int8.onnx\n  \
    trainer quantize --model model.onnx --data cache --out model-trt.onnx --profile tensorrt\n\n\
    Research use only, not a medical device."
)]
pub struct QuantizeArgs {
    /// The f32 file of `trainer export`.
    #[arg(long)]
    pub model: PathBuf,
    /// `ranges.json` of a run that was trained with `--qat`: nothing else is calibrated.
    #[arg(long, conflicts_with_all = ["data", "method", "profile"])]
    pub ranges: Option<PathBuf>,
    /// Cache whose training part calibrates; without it the self-test's images do, which is good enough for random weights alone.
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// The int8 file to write.
    #[arg(long)]
    pub out: PathBuf,
    /// For whom the file is.
    #[arg(long, value_enum, default_value_t = Profile::Standard)]
    pub profile: Profile,
    /// One method for every tensor; without it each tensor gets the one with the smallest error of the logit.
    #[arg(long, value_enum)]
    pub method: Option<Method>,
    /// Training slices, half of them positive, on which ranges are observed.
    #[arg(long, default_value_t = 256)]
    pub calibration_slices: usize,
    /// Of these, slices on which errors are compared and biases corrected.
    #[arg(long, default_value_t = 16)]
    pub selection_slices: usize,
    /// Cross-layer equalisation.
    #[arg(long, value_enum, default_value_t = Choice::Auto)]
    pub equalise: Choice,
    /// Bias correction.
    #[arg(long, value_enum, default_value_t = Choice::Auto)]
    pub correct_bias: Choice,
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            profile: Profile::Standard,
            method: None,
            n_calibration: 256,
            n_selection: 16,
            equalise: Choice::Auto,
            correct_bias: Choice::Auto,
        }
    }
}

/// Runs `trainer quantize`.
///
/// # Errors
///
/// Where a file cannot be read, is no f32 file of ours, or cannot be written.
pub fn run(args: &QuantizeArgs) -> anyhow::Result<ExitCode> {
    let options = Options {
        profile: args.profile,
        method: args.method,
        n_calibration: args.calibration_slices,
        n_selection: args.selection_slices,
        equalise: args.equalise,
        correct_bias: args.correct_bias,
    };
    let float =
        std::fs::read(&args.model).with_context(|| format!("reading {}", args.model.display()))?;
    let (bytes, report) = match (&args.ranges, &args.data) {
        (Some(path), _) => quantize_trained(&float, &quantization_aware::read(path)?)?,
        (None, Some(folder)) => quantize(&float, &Cache::open(folder)?, &options)?,
        (None, None) => {
            let images = self_test_images(options.n_calibration.min(16));
            let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
            quantize_file(&float, &images, &options)?
        }
    };
    write_file(&args.out, &bytes)?;
    let mut stdout = std::io::stdout().lock();
    if args.json {
        let object = serde_json::json!({
            "file": args.out, "bytes": bytes.len(), "float_bytes": float.len(), "report": report, "notice": shared::RESEARCH_USE,
        });
        writeln!(stdout, "{object}")?;
        return Ok(ExitCode::SUCCESS);
    }
    for tensor in &report.tensors {
        let Range { low, high } = tensor.range;
        writeln!(
            stdout,
            "{:<24} {:<10} {low:>10.4} to {high:>10.4}",
            tensor.tensor,
            format!("{:?}", tensor.method)
        )?;
    }
    for trial in &report.tried {
        let (equalised, corrected) = (trial.is_equalised, trial.is_bias_corrected);
        writeln!(
            stdout,
            "logit RMSE {:.6} (equalised: {equalised}, biases corrected: {corrected})",
            trial.logit_rmse
        )?;
    }
    let (n, m) = (report.n_calibration, report.n_selection);
    writeln!(
        stdout,
        "{}: {} bytes ({} as f32), calibrated on {n} slices, compared on {m}",
        args.out.display(),
        bytes.len(),
        float.len()
    )?;
    writeln!(stdout, "{}", shared::RESEARCH_USE)?;
    Ok(ExitCode::SUCCESS)
}

/// Quantizes the f32 file `float`, calibrated on the training part of `cache`, and states the self-test's logits in its manifest.
///
/// # Errors
///
/// Where the file is no f32 file of ours, its graph cannot be quantized, or the cache has no training slices.
pub fn quantize(
    float: &[u8],
    cache: &Cache,
    options: &Options,
) -> anyhow::Result<(Vec<u8>, QuantizeReport)> {
    let rows = calibration_rows(cache, options.n_calibration);
    let images: Vec<&[u8]> = rows.into_iter().map(|row| cache.tensor(row)).collect();
    quantize_file(float, &images, options)
}

/// The same on given images, each u8 `[3, 256, 256]`.
///
/// # Errors
///
/// As [`quantize`].
pub fn quantize_file(
    float: &[u8],
    images: &[&[u8]],
    options: &Options,
) -> anyhow::Result<(Vec<u8>, QuantizeReport)> {
    quantize_bytes(float, options.profile, |model| {
        quantize_model(model, images, options, &|| {})
    })
}

/// The same with the ranges that the weights were trained with, as [`quantize_with`].
///
/// # Errors
///
/// As [`quantize`].
pub fn quantize_trained(
    float: &[u8],
    ranges: &TrainedRanges,
) -> anyhow::Result<(Vec<u8>, QuantizeReport)> {
    quantize_bytes(float, Profile::Standard, |model| {
        quantize_with(model, ranges)
    })
}

fn quantize_bytes(
    float: &[u8],
    profile: Profile,
    quantize: impl FnOnce(&ModelProto) -> Result<(ModelProto, QuantizeReport), QuantizeError>,
) -> anyhow::Result<(Vec<u8>, QuantizeReport)> {
    let model = onnx::read(float)?;
    let manifest = Manifest::from_json(
        model
            .metadata(METADATA_KEY)
            .context("the file has no pe.manifest")?,
    )?;
    ensure!(
        manifest.precision == Precision::Float32,
        "the file is quantized already"
    );
    if profile == Profile::Standard
        && let Some(node) = branch(model.graph()?)
    {
        return Err(fault(
            Exit::Usage,
            format!(
                "{}: node {} ({}) is no link of a chain of layers, and the int8 engine computes nothing else in integers; its logits would not be \
                 the same on every machine. Deploy the f32 file, or quantize for TensorRT with --profile tensorrt",
                manifest.architecture, node.name, node.op_type
            ),
        ));
    }
    let (mut quantized, report) = quantize(&model)?;
    drop(model);
    let mut manifest = Manifest {
        precision: Precision::Int8,
        validation: Validation::Unvalidated,
        self_test: Vec::new(),
        ..manifest
    };
    manifest
        .tools
        .insert("quantizer".to_owned(), env!("CARGO_PKG_VERSION").to_owned());
    manifest.tools.insert(
        "calibration_slices".to_owned(),
        report.n_calibration.to_string(),
    );
    if report.is_equalised {
        manifest
            .tools
            .insert(EQUALISED.to_owned(), "true".to_owned());
    }
    if profile == Profile::Tensorrt {
        manifest
            .tools
            .insert("profile".to_owned(), "tensorrt".to_owned());
    }
    quantized.set_metadata(METADATA_KEY, manifest.to_json());
    if profile == Profile::Standard {
        manifest.self_test = self_test(&onnx::write(&quantized)?)?;
        quantized.set_metadata(METADATA_KEY, manifest.to_json());
    }
    Ok((onnx::write(&quantized)?, report))
}

/// The first node that a chain of convolutions, max pools and dense layers does not have.
fn branch(graph: &GraphProto) -> Option<&NodeProto> {
    let is_branch = |node: &&NodeProto| {
        matches!(
            node.op_type.as_str(),
            "Add" | "Concat" | "AveragePool" | "GlobalAveragePool"
        )
    };
    graph.node.iter().find(is_branch)
}

/// The logits that the scalar kernel, which is the definition, gives on the self-test's images.
fn self_test(int8: &[u8]) -> anyhow::Result<Vec<SelfTest>> {
    let options = engine::Options {
        kernel: Some(engine::Kernel::Scalar),
        threads: rayon::current_num_threads(),
        ..engine::Options::default()
    };
    let model = engine::Model::load(int8, &options).context("loading the quantized file")?;
    let mut session = model.session();
    let mut entries = Vec::new();
    for (seed, image) in (1..).zip(self_test_images(SELF_TESTS)) {
        let mut logit = [0.0];
        session.logits(&image, &mut logit)?;
        entries.push(SelfTest {
            seed,
            logit_bits: logit[0].to_bits(),
        });
    }
    Ok(entries)
}

/// Images of the seeds 1 to `n`.
fn self_test_images(n: usize) -> Vec<Vec<u8>> {
    let of_seed = |(seed, _)| {
        let mut image = vec![0; shared::TENSOR_BYTES];
        shared::selftest::image(seed, &mut image);
        image
    };
    (1..).zip(0..n).map(of_seed).collect()
}

/// Rows of the training part, positive and negative in turn, each class evenly spread over the part.
fn calibration_rows(cache: &Cache, n: usize) -> Vec<usize> {
    let (positive, negative): (Vec<usize>, Vec<usize>) = cache
        .part(Part::Train)
        .into_iter()
        .partition(|&row| cache.rows()[row].pe_present);
    let spread = |rows: &[usize], n: usize| -> Vec<usize> {
        let n = n.min(rows.len());
        (0..n).map(|index| rows[index * rows.len() / n]).collect()
    };
    let positive = spread(&positive, n.div_ceil(2));
    let negative = spread(&negative, n - positive.len());
    let mut rows = Vec::with_capacity(n);
    for index in 0..positive.len().max(negative.len()) {
        rows.extend(positive.get(index));
        rows.extend(negative.get(index));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{architecture, export};

    fn float_model(name: &str, width: f64) -> ModelProto {
        let architecture = architecture::find(name).unwrap();
        let weights = export::random_weights(architecture, width, 1).unwrap();
        let manifest = export::new_manifest(architecture, width);
        onnx::read(&export::float_file(architecture, width, &weights, &manifest).unwrap()).unwrap()
    }

    fn quantized(model: &ModelProto, options: &Options) -> (ModelProto, QuantizeReport) {
        let images = self_test_images(4);
        let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
        quantize_model(model, &images, options, &|| {}).unwrap()
    }

    fn fast() -> Options {
        Options {
            method: Some(Method::MinMax),
            n_selection: 2,
            equalise: Choice::Off,
            correct_bias: Choice::Off,
            ..Options::default()
        }
    }

    fn operators(model: &ModelProto) -> Vec<&str> {
        let nodes = model.graph().unwrap().node.iter();
        let on_activations = nodes.filter(|node| {
            !node.input[0].ends_with(".weight_quantized")
                && !node.input[0].ends_with(".bias_quantized")
        });
        on_activations.map(|node| node.op_type.as_str()).collect()
    }

    /// Digest of names, operators, attributes, element types and shapes, not of weights. A new digest is a new file format for whoever reads
    /// the file: change it on purpose alone, with docs/model-file.md.
    #[track_caller]
    fn check_structure(model: &ModelProto, expected: &str) {
        let structure = model.graph().unwrap().structure();
        assert_eq!(
            blake3::hash(structure.as_bytes()).to_hex().as_str(),
            expected,
            "structure:\n{structure}"
        );
    }

    #[test]
    fn float_file_has_the_recorded_structure() {
        check_structure(
            &float_model("final", 0.125),
            "1b2dcfa53bfb0275a8883d9a6351d27415c7f4ba7ee132dab1d0f7e5afc3f0e9",
        );
    }

    #[test]
    fn transfer_learners_have_the_recorded_structure_and_are_refused_by_name() {
        for (name, digest) in [
            (
                "resnet50",
                "51bae38f21e97ff531bf1e7e0ee067e4add41a0ea8b64da96531100e9cf4b217",
            ),
            (
                "inception-v3",
                "ebf6f4e1f11f53f5cb8a4d1d58f90fdd6dda99c9f01ae390d07acc0f061b54ad",
            ),
        ] {
            let model = float_model(name, 0.03125);
            check_structure(&model, digest);
            let image = vec![0; shared::TENSOR_BYTES];
            let bytes = onnx::write(&model).unwrap();
            let error = quantize_file(&bytes, &[&image], &fast()).unwrap_err();
            let message = error.to_string();
            assert!(
                message.starts_with(name) && message.contains("--profile tensorrt"),
                "{message}"
            );
        }
    }

    #[test]
    fn int8_file_has_the_recorded_structure() {
        let (model, _) = quantized(&float_model("final", 0.03125), &fast());
        check_structure(
            &model,
            "076d332b70507f62c986000613281e30941129ab4382a35a8c5d94ea9ebdf798",
        );
    }

    #[test]
    fn int8_graph_is_the_one_that_runtimes_fuse() {
        let (model, _) = quantized(&float_model("two-conv", 0.01), &fast());
        let (q, dq) = ("QuantizeLinear", "DequantizeLinear");
        let block = ["Conv", q, dq, "MaxPool", q, dq];
        let tail = ["Flatten", q, dq, "Gemm", q, dq, "Gemm", "Sigmoid"];
        assert_eq!(
            operators(&model),
            [[dq].as_slice(), &block, &block, &tail].concat()
        );
    }

    #[test]
    fn weights_are_symmetric_zero_points_are_zero_and_pools_keep_their_scale() {
        let (model, _) = quantized(&float_model("vanilla", 0.01), &fast());
        let graph = model.graph().unwrap();
        for tensor in &graph.initializer {
            if tensor.name.ends_with(".weight_quantized") {
                assert!(
                    tensor
                        .to_i8()
                        .unwrap()
                        .iter()
                        .all(|weight| *weight != i8::MIN)
                );
            } else if tensor.name.ends_with("_zero_point") {
                assert!(
                    tensor.raw_data.iter().all(|byte| *byte == 0),
                    "{}",
                    tensor.name
                );
            }
        }
        let scale_of = |name: &str| {
            graph
                .node
                .iter()
                .find(|node| node.name == name)
                .map(|node| node.input[1].as_str())
        };
        for (name, scale) in [
            ("pool1_quantize", "relu1_scale"),
            ("flatten_quantize", "relu2_scale"),
        ] {
            assert_eq!(scale_of(name), Some(scale));
        }
        let names: Vec<&str> = graph
            .output
            .iter()
            .map(|output| output.name.as_str())
            .collect();
        assert_eq!(names, ["logit", "probability"]);
    }

    #[test]
    fn best_combination_is_no_worse_than_min_max() {
        let float = float_model("final", 0.03125);
        let (_, report) = quantized(
            &float,
            &Options {
                n_selection: 2,
                ..Options::default()
            },
        );
        assert_eq!(report.tried.len(), 4);
        let chosen = report.tried.iter().find(|trial| {
            (trial.is_equalised, trial.is_bias_corrected)
                == (report.is_equalised, report.is_bias_corrected)
        });
        let least = report
            .tried
            .iter()
            .map(|trial| trial.logit_rmse)
            .fold(f64::INFINITY, f64::min);
        assert!(chosen.is_some_and(|trial| trial.logit_rmse <= least));
    }

    #[test]
    fn equalisation_does_not_change_the_float_logit() {
        let mut model = float_model("final", 0.03125);
        let images = self_test_images(2);
        let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
        let graph = FloatGraph::new(&model).unwrap();
        let plan = Plan::of(model.graph().unwrap());
        let observed = calibrate::observe(&graph, &plan.leaders, &images, &|| {}).unwrap();
        let before = logits(&graph, &images).unwrap();
        equalise(&mut model, &plan, &observed).unwrap();
        let after = logits(&FloatGraph::new(&model).unwrap(), &images).unwrap();
        for (before, after) in before.iter().zip(&after) {
            assert!(
                (before - after).abs() <= 1e-5 * before.abs().max(1.0),
                "{before} {after}"
            );
        }
    }

    #[test]
    fn engine_agrees_with_the_float_simulation_of_the_integers() {
        let architecture = architecture::find("final").unwrap();
        let weights = export::random_weights(architecture, 0.03125, 2).unwrap();
        let float = export::float_file(
            architecture,
            0.03125,
            &weights,
            &export::new_manifest(architecture, 0.03125),
        )
        .unwrap();
        let images = self_test_images(3);
        let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
        let (int8, _) = quantize_file(&float, &images, &fast()).unwrap();
        let model = onnx::read(&int8).unwrap();
        let manifest = Manifest::from_json(model.metadata(METADATA_KEY).unwrap()).unwrap();
        assert_eq!(manifest.precision, Precision::Int8);
        assert_eq!(manifest.self_test.len(), SELF_TESTS);
        let graph = FloatGraph::new(&model).unwrap();
        for (entry, image) in manifest.self_test.iter().zip(&images) {
            let (exact, simulated) = (
                f32::from_bits(entry.logit_bits),
                graph.logit(image, &mut |_, _| {}).unwrap(),
            );
            // f32 sums in place of integers flip single roundings of activations: a step of one level in a few of them.
            assert!(
                (exact - simulated).abs() < 0.01 * exact.abs().max(1.0),
                "{exact} {simulated}"
            );
        }
    }

    #[test]
    fn accumulators_that_could_overflow_get_a_coarser_scale() {
        let weights = vec![1.0; 100_000];
        let layer = QuantizedLayer::of(&weights, &[0.0], 1.0, false).unwrap();
        assert!(shared::quantize::check_accumulators(&layer.weights, &layer.bias).is_ok());
        assert!(layer.weights[0] < 127 && layer.weights[0] > 32);
        assert!((f32::from(layer.weights[0]) * layer.scales[0] - 1.0).abs() < 0.02);
    }

    #[test]
    fn tensorrt_profile_is_signed_and_leaves_biases_alone() {
        let (model, _) = quantized(
            &float_model("final", 0.03125),
            &Options {
                profile: Profile::Tensorrt,
                ..fast()
            },
        );
        let graph = model.graph().unwrap();
        let constants = graph.initializers();
        for node in graph
            .node
            .iter()
            .filter(|node| node.op_type == "QuantizeLinear")
        {
            assert_eq!(
                constants[node.input[2].as_str()].data_type,
                DataType::Int8 as i32
            );
        }
        assert!(constants["conv1.bias"].to_f32().is_ok());
        assert!(
            FloatGraph::new(&model)
                .unwrap()
                .logit(&self_test_images(1)[0], &mut |_, _| {})
                .unwrap()
                .is_finite()
        );
    }

    #[test]
    fn general_graph_with_branches_and_signed_tensors_is_quantized_rightly() {
        let float = residual_model();
        let (int8, _) = quantized(&float, &fast());
        let images = self_test_images(3);
        let (float, int8) = (
            FloatGraph::new(&float).unwrap(),
            FloatGraph::new(&int8).unwrap(),
        );
        for image in &images {
            let (a, b) = (
                float.logit(image, &mut |_, _| {}).unwrap(),
                int8.logit(image, &mut |_, _| {}).unwrap(),
            );
            assert!((a - b).abs() < 0.05 * a.abs().max(0.2), "{a} {b}");
        }
    }

    /// A strided convolution with padding, a residual branch, a concatenation and both kinds of average pool.
    fn residual_model() -> ModelProto {
        let mut model = float_model("final", 0.03125);
        let graph = model.graph.as_mut().unwrap();
        graph.node.truncate(2);
        graph.value_info.clear();
        let weight = |name: &str, shape: &[usize]| {
            let n: usize = shape.iter().product();
            let values: Vec<f32> = (0..n)
                .map(|index| (index as f32 * 0.7391).sin() * 0.2)
                .collect();
            TensorProto::float(name, shape, &values)
        };
        graph.initializer = vec![
            TensorProto::float("image_scale", &[], &[IMAGE_SCALE]),
            weight("a.weight", &[8, 3, 7, 7]),
            weight("a.bias", &[8]),
            weight("b.weight", &[8, 8, 3, 3]),
            weight("b.bias", &[8]),
            weight("c.weight", &[8, 8, 1, 1]),
            weight("c.bias", &[8]),
            weight("d.weight", &[1, 16]),
            weight("d.bias", &[1]),
        ];
        graph.node.extend([
            NodeProto::new("Conv", "a", &["image_scaled", "a.weight", "a.bias"], "a")
                .with_ints("strides", &[4, 4])
                .with_ints("pads", &[3, 3, 3, 3]),
            NodeProto::new("Relu", "relu1", &["a"], "relu1"),
            NodeProto::new("MaxPool", "pool1", &["relu1"], "pool1")
                .with_ints("kernel_shape", &[3, 3])
                .with_ints("strides", &[2, 2])
                .with_ints("pads", &[1, 1, 1, 1]),
            NodeProto::new("Conv", "b", &["pool1", "b.weight", "b.bias"], "b")
                .with_ints("pads", &[1, 1, 1, 1]),
            NodeProto::new("Add", "add", &["b", "pool1"], "add"),
            NodeProto::new("Relu", "relu2", &["add"], "relu2"),
            NodeProto::new("Conv", "c", &["relu2", "c.weight", "c.bias"], "c"),
            NodeProto::new("AveragePool", "average", &["relu2"], "average")
                .with_ints("kernel_shape", &[3, 3])
                .with_ints("pads", &[1, 1, 1, 1]),
            NodeProto::new("Concat", "concat", &["c", "average"], "concat").with_int("axis", 1),
            NodeProto::new("GlobalAveragePool", "global", &["concat"], "global"),
            NodeProto::new("Flatten", "flatten", &["global"], "flatten").with_int("axis", 1),
            NodeProto::new("Gemm", "d", &["flatten", "d.weight", "d.bias"], LOGIT)
                .with_int("transB", 1),
            NodeProto::new("Sigmoid", "probability", &[LOGIT], "probability"),
        ]);
        model
    }
}
