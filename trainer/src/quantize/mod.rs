//! `trainer quantize`: an f32 file to an int8 file, by calibration alone.
//!
//! In: an f32 file of [`crate::export`] and calibration images. Out: the int8 graph in QDQ form that every runtime turns into integer
//! kernels: `image` u8 -> DequantizeLinear(1/255, 0) -> Conv -> Q -> DQ -> MaxPool -> Q -> DQ -> ... -> Flatten -> Q -> DQ -> Gemm -> Q -> DQ
//! -> Gemm -> `logit`. Activations are u8; where a ReLU follows, the zero point is 0 and the saturation is the ReLU.
//! Weights are s8 in [-127, 127], symmetric, one scale an output channel; biases are i32 at the scale input x weight.
//! MaxPool and Flatten keep their input's scale. The last Gemm has one weight scale and no quantization behind it. No input can
//! make an i32 accumulator overflow. Profile `tensorrt` instead quantizes the inputs of Conv and Gemm to symmetric s8
//! and leaves biases alone. Whether the result is good enough is [`crate::verify`]'s question.

mod bias;
mod command;
mod equalise;
mod graph;
mod integers;
mod plan;
mod ranges;
mod tensorrt;

use std::collections::BTreeMap;

use serde::Serialize;

use crate::calibrate::{self, Method, Observation, Range};
use crate::execute::{ExecuteError, FloatGraph};
use crate::onnx::{ModelProto, OnnxError};
use crate::quantization_aware::TrainedRanges;

use bias::correct_biases;
pub use command::{QuantizeArgs, quantize, quantize_file, quantize_trained, run};
use equalise::equalise;
use graph::emit;
pub use integers::WeightBits;
pub(crate) use integers::{QuantizedLayer, activation_scale};
use plan::Plan;
use ranges::{choose_ranges, logits, rmse};

/// Key in the manifest's `tools` of a file whose channels were equalised: its tensors differ from the f32 file's by a factor a channel.
pub const EQUALISED: &str = "equalised";

/// Key of `tools` in the manifest of an int8 file: BLAKE3 of the f32 file it was made of, hexadecimal.
pub const FLOAT_FILE: &str = "float_file_blake3";

/// Key of `tools` in the manifest of an int8 file whose weights have fewer than 8 bits: how many.
pub const WEIGHT_BITS: &str = "weight_bits";

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
    /// Bits of a weight.
    pub weight_bits: WeightBits,
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
    /// Root mean squared error of the logit on the selection images: with and without equalisation, then with and without bias correction.
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
    /// Whether all ranges were the selection images' min-max, to decide on equalisation.
    pub is_min_max: bool,
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
    let reference = logits(&FloatGraph::new(model)?, selection)?;
    let mut tried = Vec::new();
    let mut float = model.clone();
    let is_equalised = equalise_where_better(
        &mut float, &plan, selection, &reference, options, &mut tried,
    )?;
    let observed = observe(&float, &plan, images, progress)?;
    let ranges = choose_ranges(&float, &plan, &observed, selection, &reference, options)?;
    let mut best: Option<(ModelProto, bool, f64)> = None;
    for &is_bias_corrected in options.correct_bias.tried() {
        if is_bias_corrected {
            correct_biases(&mut float, &plan, &ranges, selection, options.weight_bits)?;
        }
        let quantized = emit(&float, &plan, &ranges, options.profile, options.weight_bits)?;
        let logit_rmse = error_of(&quantized, selection, &reference)?;
        tried.push(Trial {
            is_equalised,
            is_bias_corrected,
            is_min_max: false,
            logit_rmse,
        });
        if best
            .as_ref()
            .is_none_or(|(_, _, least)| logit_rmse < *least)
        {
            best = Some((quantized, is_bias_corrected, logit_rmse));
        }
    }
    let (quantized, is_bias_corrected, _) = best.ok_or(QuantizeError::NoImages)?;
    let mut report = report(
        images.len(),
        selection.len(),
        is_equalised,
        is_bias_corrected,
        &ranges,
        &plan,
    );
    report.tried = tried;
    Ok((quantized, report))
}

/// Equalises `float` where that is asked for, or where min-max ranges of the selection images give the smaller error of the logit with it.
fn equalise_where_better(
    float: &mut ModelProto,
    plan: &Plan,
    selection: &[&[u8]],
    reference: &[f32],
    options: &Options,
    tried: &mut Vec<Trial>,
) -> Result<bool, QuantizeError> {
    if options.equalise == Choice::Off {
        return Ok(false);
    }
    let as_exported = observe(float, plan, selection, &|| {})?;
    let mut equalised = float.clone();
    equalise(&mut equalised, plan, &as_exported)?;
    if options.equalise == Choice::Auto {
        let of_equalised = observe(&equalised, plan, selection, &|| {})?;
        let mut errors = [0.0; 2];
        for (is_equalised, model, observed) in [
            (false, &*float, &as_exported),
            (true, &equalised, &of_equalised),
        ] {
            let min_max = Options {
                method: Some(Method::MinMax),
                ..*options
            };
            let ranges = choose_ranges(model, plan, observed, selection, reference, &min_max)?;
            let quantized = emit(model, plan, &ranges, options.profile, options.weight_bits)?;
            let logit_rmse = error_of(&quantized, selection, reference)?;
            errors[usize::from(is_equalised)] = logit_rmse;
            tried.push(Trial {
                is_equalised,
                is_bias_corrected: false,
                is_min_max: true,
                logit_rmse,
            });
        }
        if errors[0] <= errors[1] {
            return Ok(false);
        }
    }
    *float = equalised;
    Ok(true)
}

/// Observes every tensor that makes a range.
fn observe(
    float: &ModelProto,
    plan: &Plan,
    images: &[&[u8]],
    progress: &(dyn Fn() + Sync),
) -> Result<Observation, QuantizeError> {
    let graph = FloatGraph::new(float)?;
    let mut observed = calibrate::observe(&graph, &plan.observed, images, progress)?;
    plan.gather(&mut observed);
    Ok(observed)
}

/// Root mean squared error of the logit of a quantized graph.
fn error_of(
    quantized: &ModelProto,
    selection: &[&[u8]],
    reference: &[f32],
) -> Result<f64, QuantizeError> {
    Ok(rmse(
        &logits(&FloatGraph::new(quantized)?, selection)?,
        reference,
    ))
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
            .ranges
            .get(name)
            .ok_or_else(|| QuantizeError::Unobserved { name: name.clone() })?;
        Ok((name.clone(), (Method::Trained, *range, f64::NAN)))
    };
    let of_leaders: Ranges = plan
        .leaders
        .iter()
        .map(of_leader)
        .collect::<Result<_, QuantizeError>>()?;
    let bits = ranges.weight_bits;
    let quantized = emit(model, &plan, &of_leaders, Profile::Standard, bits)?;
    Ok((quantized, report(0, 0, false, false, &of_leaders, &plan)))
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

#[cfg(test)]
mod tests {
    use super::command::self_test_images;
    use super::*;
    use crate::export::{IMAGE_SCALE, LOGIT};
    use crate::onnx::{NodeProto, TensorProto};
    use crate::{architecture, export, onnx};

    pub(super) fn float_model(name: &str, width: f64) -> ModelProto {
        let architecture = architecture::find(name).unwrap();
        let weights = export::random_weights(architecture, width, 1).unwrap();
        let manifest = export::new_manifest(architecture, width);
        onnx::read(&export::float_file(architecture, width, &weights, &manifest).unwrap()).unwrap()
    }

    pub(super) fn quantized(model: &ModelProto, options: &Options) -> (ModelProto, QuantizeReport) {
        let images = self_test_images(4);
        let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
        quantize_model(model, &images, options, &|| {}).unwrap()
    }

    pub(super) fn fast() -> Options {
        Options {
            method: Some(Method::MinMax),
            n_selection: 2,
            equalise: Choice::Off,
            correct_bias: Choice::Off,
            ..Options::default()
        }
    }

    /// A strided convolution with padding, a residual branch, a concatenation and both kinds of average pool.
    pub(super) fn residual_model() -> ModelProto {
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

    /// Digest of names, operators, attributes, element types and shapes, not of weights. A new digest is a new file format for whoever reads
    /// the file: change it on purpose alone, with docs/model-file.md.
    #[track_caller]
    pub(super) fn check_structure(model: &ModelProto, expected: &str) {
        let structure = model.graph().unwrap().structure();
        assert_eq!(
            blake3::hash(structure.as_bytes()).to_hex().as_str(),
            expected,
            "structure:\n{structure}"
        );
    }

    #[test]
    fn smallest_error_of_the_logit_decides() {
        let float = float_model("final", 0.03125);
        let (_, report) = quantized(
            &float,
            &Options {
                n_selection: 2,
                ..Options::default()
            },
        );
        assert_eq!(report.tried.len(), 4);
        let (min_max, whole): (Vec<&Trial>, Vec<&Trial>) =
            report.tried.iter().partition(|trial| trial.is_min_max);
        let least = |trials: &[&Trial]| {
            let errors = trials.iter().map(|trial| trial.logit_rmse);
            errors.fold(f64::INFINITY, f64::min)
        };
        let of_min_max = min_max
            .iter()
            .find(|trial| trial.is_equalised == report.is_equalised);
        assert!(of_min_max.is_some_and(|trial| trial.logit_rmse <= least(&min_max)));
        let chosen = whole
            .iter()
            .find(|trial| trial.is_bias_corrected == report.is_bias_corrected);
        assert!(chosen.is_some_and(|trial| trial.logit_rmse <= least(&whole)));
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
}
