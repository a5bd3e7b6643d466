//! `trainer quantize`: arguments, files, manifest and self-test around the stages.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use shared::manifest::{METADATA_KEY, Manifest, Precision, SelfTest, Validation};

use crate::cache::{Cache, write_atomically};
use crate::calibrate::{Method, Range};
use crate::index::Part;
use crate::onnx::{self, ModelProto};
use crate::quantization_aware::{self, TrainedRanges};
use crate::verify::manifest_of;
use crate::{provenance, split};

use super::{
    Choice, EQUALISED, FLOAT_FILE, Options, Profile, QuantizeReport, WEIGHT_BITS, WeightBits,
    quantize_model, quantize_with,
};

/// Images of the self-test that the manifest states.
const SELF_TESTS: usize = 3;

/// Arguments of `trainer quantize`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  trainer quantize --model model.onnx --data cache --out model-int8.onnx\n  \
    trainer quantize --model model.onnx --data cache --out model-trt.onnx --profile tensorrt\n\n\
    Research use only, not a medical device."
)]
pub struct QuantizeArgs {
    /// The f32 file of `trainer export`.
    #[arg(long, value_name = "FILE")]
    pub model: PathBuf,
    /// `ranges.json` of a run that was trained with `--qat`: nothing else is calibrated.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["data", "method", "profile", "weight_bits"])]
    pub ranges: Option<PathBuf>,
    /// Cache whose training part calibrates; without it the self-test's images do, which is good enough for random weights alone.
    #[arg(long, value_name = "CACHE")]
    pub data: Option<PathBuf>,
    /// The int8 file to write.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// For whom the file is.
    #[arg(long, value_enum, default_value_t = Profile::Standard)]
    pub profile: Profile,
    /// Bits of a weight: 7 for x86 without VNNI, where other runtimes than ours add products in 16 bits, which saturate at 8.
    #[arg(long, value_name = "BITS", default_value_t)]
    pub weight_bits: WeightBits,
    /// One method for every tensor; without it each tensor gets the one with the smallest error of the logit.
    #[arg(long, value_enum)]
    pub method: Option<Method>,
    /// Training slices, half of them positive, on which ranges are observed.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub calibration_slices: usize,
    /// Of these, slices on which errors are compared and biases corrected.
    #[arg(long, value_name = "N", default_value_t = 16)]
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
            weight_bits: WeightBits::default(),
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
        weight_bits: args.weight_bits,
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
    write_atomically(&args.out, &bytes)?;
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
        let ranges = if trial.is_min_max {
            "min-max"
        } else {
            "chosen"
        };
        writeln!(
            stdout,
            "logit RMSE {:.6} ({ranges} ranges, equalised: {equalised}, biases corrected: {corrected})",
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
    quantize_bytes(
        float,
        options.profile,
        options.weight_bits,
        |model, manifest| {
            cache.check_preprocess(&manifest.preprocess)?;
            // By study, where the file says nothing; the seed is of no account then.
            let split = provenance::split(&manifest.tools, None, 0)?;
            let trained = split::rows(cache, split.by, split.seed, Part::Train);
            let rows = calibration_rows(cache, trained, options.n_calibration);
            let images: Vec<&[u8]> = rows.into_iter().map(|row| cache.tensor(row)).collect();
            Ok(quantize_model(model, &images, options, &|| {})?)
        },
    )
}

/// The same on given images, each u8 `[3, 256, 256]`, prepared as the model wants them.
///
/// # Errors
///
/// As [`quantize`].
pub fn quantize_file(
    float: &[u8],
    images: &[&[u8]],
    options: &Options,
) -> anyhow::Result<(Vec<u8>, QuantizeReport)> {
    quantize_bytes(float, options.profile, options.weight_bits, |model, _| {
        Ok(quantize_model(model, images, options, &|| {})?)
    })
}

/// The same with the ranges that the weights were trained with, as [`quantize_with`].
///
/// # Errors
///
/// As [`quantize`]; where the file does not say that it was trained with these ranges.
pub fn quantize_trained(
    float: &[u8],
    ranges: &TrainedRanges,
) -> anyhow::Result<(Vec<u8>, QuantizeReport)> {
    let found = quantization_aware::digest(ranges)?;
    quantize_bytes(
        float,
        Profile::Standard,
        ranges.weight_bits,
        |model, manifest| {
            let wanted = manifest.tools.get(quantization_aware::DIGEST);
            let wanted = wanted.context("the f32 file was not trained with ranges (--qat)")?;
            ensure!(
                *wanted == found,
                "the f32 file was trained with the ranges with BLAKE3 {wanted}, these have {found}: give ranges.json of the run that it was exported from"
            );
            Ok(quantize_with(model, ranges)?)
        },
    )
}

fn quantize_bytes(
    float: &[u8],
    profile: Profile,
    weight_bits: WeightBits,
    quantize: impl FnOnce(&ModelProto, &Manifest) -> anyhow::Result<(ModelProto, QuantizeReport)>,
) -> anyhow::Result<(Vec<u8>, QuantizeReport)> {
    let model = onnx::read(float)?;
    let manifest = manifest_of(&model)?;
    ensure!(
        manifest.precision == Precision::Float32,
        "the file is quantized already"
    );
    let (mut quantized, report) = quantize(&model, &manifest)?;
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
        FLOAT_FILE.to_owned(),
        blake3::hash(float).to_hex().to_string(),
    );
    manifest.tools.insert(
        "calibration_slices".to_owned(),
        report.n_calibration.to_string(),
    );
    if report.is_equalised {
        manifest
            .tools
            .insert(EQUALISED.to_owned(), "true".to_owned());
    }
    if weight_bits != WeightBits::default() {
        manifest
            .tools
            .insert(WEIGHT_BITS.to_owned(), weight_bits.to_string());
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

/// The logits that the scalar kernel, which is the definition, gives on the self-test's images.
fn self_test(int8: &[u8]) -> anyhow::Result<Vec<SelfTest>> {
    let options = engine::Options {
        kernel: Some(engine::Kernel::Scalar),
        threads: rayon::current_num_threads(),
        ..engine::Options::default()
    };
    let model = engine::Model::load(int8, &options).context("loading the quantized file")?;
    ensure!(
        model.is_exact(),
        "the engine cannot compute all of the quantized file in integers; its logits would not be the same on every machine"
    );
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
pub(super) fn self_test_images(n: usize) -> Vec<Vec<u8>> {
    let of_seed = |(seed, _)| {
        let mut image = vec![0; shared::TENSOR_BYTES];
        shared::selftest::image(seed, &mut image);
        image
    };
    (1..).zip(0..n).map(of_seed).collect()
}

/// At most `n` of the rows `trained`, positive and negative in turn, each class evenly spread over them.
fn calibration_rows(cache: &Cache, trained: Vec<usize>, n: usize) -> Vec<usize> {
    let (positive, negative): (Vec<usize>, Vec<usize>) = trained
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
    use super::super::tests::{check_structure, fast, float_model};
    use super::*;
    use crate::execute::FloatGraph;
    use crate::{architecture, export};

    #[test]
    fn transfer_learners_have_the_recorded_structure_and_run_in_integers() {
        for (name, of_float, of_int8) in [
            (
                "resnet50",
                "51bae38f21e97ff531bf1e7e0ee067e4add41a0ea8b64da96531100e9cf4b217",
                "1545f7f4f7f12be4ed69b3a1a1c3d3bf54307c772fd2450eaddb713130ad4164",
            ),
            (
                "inception-v3",
                "ebf6f4e1f11f53f5cb8a4d1d58f90fdd6dda99c9f01ae390d07acc0f061b54ad",
                "7ed36da4c09ed72a53e7d87a7eda8f93becd3ab39c90bca5920f20919f4541bc",
            ),
        ] {
            let model = float_model(name, 0.03125);
            check_structure(&model, of_float);
            let images = self_test_images(2);
            let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
            let bytes = onnx::write(&model).unwrap();
            let (int8, _) = quantize_file(&bytes, &images, &fast()).unwrap();
            let int8_model = onnx::read(&int8).unwrap();
            check_structure(&int8_model, of_int8);
            check_engine(&int8_model, &images, 0.05);
        }
    }

    /// The self-test in the manifest is the engine's, within what f32 sums in place of integers do: single roundings of activations flip.
    #[track_caller]
    fn check_engine(int8: &ModelProto, images: &[&[u8]], tolerance: f32) {
        let manifest = Manifest::from_json(int8.metadata(METADATA_KEY).unwrap()).unwrap();
        assert_eq!(manifest.precision, Precision::Int8);
        assert_eq!(manifest.self_test.len(), SELF_TESTS);
        let graph = FloatGraph::new(int8).unwrap();
        for (entry, image) in manifest.self_test.iter().zip(images) {
            let (exact, simulated) = (
                f32::from_bits(entry.logit_bits),
                graph.logit(image, &mut |_, _| {}).unwrap(),
            );
            assert!(
                (exact - simulated).abs() < tolerance * exact.abs().max(1.0),
                "{exact} {simulated}"
            );
        }
    }

    /// A narrow float file that says that it was trained with `ranges`.
    fn trained(ranges: Option<&TrainedRanges>) -> Vec<u8> {
        let architecture = architecture::find("final").unwrap();
        let weights = export::random_weights(architecture, 0.01, 1).unwrap();
        let mut manifest = export::new_manifest(architecture, 0.01);
        if let Some(ranges) = ranges {
            let digest = quantization_aware::digest(ranges).unwrap();
            let key = quantization_aware::DIGEST.to_owned();
            manifest.tools.insert(key, digest);
        }
        export::float_file(architecture, 0.01, &weights, &manifest).unwrap()
    }

    #[test]
    fn only_the_ranges_that_the_weights_were_trained_with_are_taken() {
        let of = |high| TrainedRanges {
            weight_bits: WeightBits::default(),
            ranges: (1..=4)
                .map(|n| (format!("relu{n}"), Range { low: 0.0, high }))
                .collect(),
        };
        let (own, other) = (of(0.5), of(0.6));
        quantize_trained(&trained(Some(&own)), &own).unwrap();
        for file in [trained(Some(&own)), trained(None)] {
            let error = quantize_trained(&file, &other).unwrap_err().to_string();
            assert!(error.contains("trained with"), "{error}");
        }
    }

    #[test]
    fn weights_of_fewer_bits_are_no_larger_and_the_file_says_so() {
        let images = self_test_images(2);
        let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
        let options = Options {
            weight_bits: WeightBits::try_from(7).unwrap(),
            ..fast()
        };
        let (int8, _) = quantize_file(&trained(None), &images, &options).unwrap();
        let model = onnx::read(&int8).unwrap();
        assert_eq!(manifest_of(&model).unwrap().tools[WEIGHT_BITS], "7");
        let constants = model.graph().unwrap().initializer.iter();
        for weights in constants.filter(|tensor| tensor.name.ends_with(".weight_quantized")) {
            let largest = weights
                .to_i8()
                .unwrap()
                .into_iter()
                .map(i8::unsigned_abs)
                .max();
            assert_eq!(largest, Some(63), "{}", weights.name);
        }
        check_engine(&model, &images, 0.01);
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
        check_engine(&model, &images, 0.01);
    }
}
