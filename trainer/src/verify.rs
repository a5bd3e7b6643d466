//! `trainer verify`: is the int8 file as good as the f32 file it was made from?
//!
//! In: both files and a cache. Out: on the validation part, the change of AUROC, of sensitivity and specificity at the frozen operating
//! point with paired bootstrap intervals by study, agreement, the largest change of a logit, the signal-to-noise ratio of every
//! quantized tensor, a temperature refitted to the int8 logits, sizes. The int8 logits are those of the engine that the
//! board runs; the f32 logits are [`crate::execute`]'s. The gate: sensitivity at the operating point may fall by a stated margin; beyond it
//! no deployable file is written, unless forced, and then the manifest says so.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use rayon::prelude::*;
use serde::Serialize;
use shared::manifest::{Level, METADATA_KEY, Manifest, Metric, Precision, Validation};

use crate::bootstrap::{self, Interval, RESAMPLES};
use crate::cache::Cache;
use crate::execute::FloatGraph;
use crate::exit::Exit;
use crate::export::{LOGIT, write_file};
use crate::index::Part;
use crate::metrics::{Measures, NAMES, Sample, Sorted};
use crate::onnx::{self, ModelProto};
use crate::quantize::{EQUALISED, FLOAT_FILE};

/// Sensitivity that quantization may cost, in percentage points, where nothing else is said.
pub const DEFAULT_MARGIN_POINTS: f64 = 0.5;
/// A tensor below this signal-to-noise ratio is named in the report.
pub const SNR_TARGET_DB: f64 = 25.0;
const BOOTSTRAP_SEED: u64 = 1;

/// One figure of both files.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Pair {
    /// Of the f32 file.
    pub float: f64,
    /// Of the int8 file.
    pub int8: f64,
    /// int8 minus f32.
    pub change: f64,
    /// 2.5th percentile of the change over resampled studies.
    pub low: f64,
    /// 97.5th percentile of the change over resampled studies.
    pub high: f64,
}

/// Both files at the operating point.
#[derive(Clone, Debug, Serialize)]
pub struct AtOperatingPoint {
    /// Its name.
    pub name: String,
    /// A slice is positive when its logit is at least this.
    pub logit_threshold: f32,
    /// Sensitivity, 0 to 1.
    pub sensitivity: Pair,
    /// Specificity, 0 to 1.
    pub specificity: Pair,
}

/// How far a tensor of the int8 file is from the f32 file's.
#[derive(Clone, Debug, Serialize)]
pub struct TensorNoise {
    /// Name in both files.
    pub tensor: String,
    /// 10 log10(sum of squares of the f32 values / sum of squares of the differences).
    pub snr_db: f64,
}

/// What `trainer verify` found.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// Part of the cache that was used.
    pub part: &'static str,
    /// Whether the int8 file says that it was made of this f32 file; false where it says nothing.
    pub is_pair_known: bool,
    /// Slices of it.
    pub n_slices: usize,
    /// Studies of it.
    pub n_studies: usize,
    /// Digest of the cache.
    pub data_digest: String,
    /// Size of the f32 file.
    pub float_bytes: usize,
    /// Size of the int8 file.
    pub int8_bytes: usize,
    /// Area under the ROC curve.
    pub auroc: Pair,
    /// At the first operating point; `None` where the model has none.
    pub operating_point: Option<AtOperatingPoint>,
    /// Share of slices on which both files decide alike, at the operating point or else at logit 0.
    pub agreement: f64,
    /// Largest absolute change of a logit.
    pub max_logit_change: f64,
    /// Root mean squared change of the logit.
    pub logit_rmse: f64,
    /// Noise of every tensor, in graph order.
    pub tensors: Vec<TensorNoise>,
    /// Slices that the noise was measured on.
    pub n_noise_slices: usize,
    /// Temperature of least cross-entropy for the f32 logits; NaN where one class is missing.
    pub float_temperature: f64,
    /// The same for the int8 logits.
    pub int8_temperature: f64,
    /// Sensitivity that may be lost, in percentage points.
    pub margin_points: f64,
    /// Whether the gate lets the file through; a model without operating point is let through unvalidated.
    pub is_good_enough: bool,
    /// [`shared::RESEARCH_USE`].
    pub notice: &'static str,
}

/// Arguments of `trainer verify`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  trainer verify --float model.onnx --int8 model-int8.onnx --data cache\n  \
    trainer verify --float model.onnx --int8 model-int8.onnx --data cache --out deploy.onnx --plot snr.svg --json\n\n\
    Exit 1 where sensitivity at the operating point falls by more than the margin. Research use only, not a medical device."
)]
pub struct VerifyArgs {
    /// The f32 file.
    #[arg(long)]
    pub float: PathBuf,
    /// The int8 file made from it.
    #[arg(long)]
    pub int8: PathBuf,
    /// Cache whose validation part is used.
    #[arg(long)]
    pub data: PathBuf,
    /// Sensitivity at the operating point that may be lost, in percentage points.
    #[arg(long, default_value_t = DEFAULT_MARGIN_POINTS, value_parser = margin)]
    pub margin: f64,
    /// Slices on which the noise of every tensor is measured.
    #[arg(long, default_value_t = 8)]
    pub noise_slices: usize,
    /// The deployable file: the int8 file with what was found in its manifest. Not written where the gate fails.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Write the deployable file although the gate fails, and say so in its manifest.
    #[arg(long, requires = "out")]
    pub force: bool,
    /// SVG plot of the signal-to-noise ratios.
    #[arg(long)]
    pub plot: Option<PathBuf>,
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

/// Runs `trainer verify`.
///
/// # Errors
///
/// Where a file cannot be read, written, or is not what it should be.
pub fn run(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let read =
        |path: &Path| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
    let (float, int8) = (read(&args.float)?, read(&args.int8)?);
    let report = verify(
        &float,
        &int8,
        &Cache::open(&args.data)?,
        args.margin,
        args.noise_slices,
    )?;
    if let Some(path) = &args.plot {
        write_file(path, noise_plot(&report.tensors).as_bytes())?;
    }
    let deployable = deployable(&int8, &report, args.force)?;
    if let (Some(path), Some(bytes)) = (&args.out, &deployable) {
        write_file(path, bytes)?;
    }
    let mut stdout = std::io::stdout().lock();
    if args.json {
        writeln!(stdout, "{}", serde_json::to_string(&report)?)?;
    } else {
        write!(stdout, "{}", text(&report))?;
        if let Some(path) = &args.out {
            let said = if deployable.is_some() {
                "written"
            } else {
                "NOT written: the gate failed (--force writes it all the same)"
            };
            writeln!(stdout, "{}: {said}", path.display())?;
        }
        writeln!(stdout, "{}", shared::RESEARCH_USE)?;
    }
    Ok(if report.is_good_enough {
        ExitCode::SUCCESS
    } else {
        Exit::FailedCheck.into()
    })
}

/// Compares the files on the validation part of `cache`; see the module's page for what is measured.
///
/// # Errors
///
/// Where a file is not what it should be, or the cache has no validation slices.
pub fn verify(
    float: &[u8],
    int8: &[u8],
    cache: &Cache,
    margin_points: f64,
    n_noise_slices: usize,
) -> anyhow::Result<VerifyReport> {
    let rows = cache.part(Part::Val);
    ensure!(!rows.is_empty(), "the cache has no validation slices");
    let images: Vec<&[u8]> = rows.iter().map(|&row| cache.tensor(row)).collect();
    let (float_model, int8_model) = (
        onnx::read(float).context("the f32 file")?,
        onnx::read(int8).context("the int8 file")?,
    );
    let manifest = manifest(&int8_model)?;
    ensure!(
        manifest.precision == Precision::Int8,
        "the int8 file says that it is f32"
    );
    let is_pair_known = is_pair_known(float, &manifest)?;
    let (wanted, found) = (&manifest.preprocess, &cache.manifest().preprocess);
    ensure!(
        wanted == found,
        "the model wants {wanted:?}, the cache was made with {found:?}"
    );
    let is_equalised = manifest.tools.contains_key(EQUALISED);
    let tensors = noise(
        &float_model,
        &int8_model,
        is_equalised,
        &images[..n_noise_slices.min(images.len())],
    )?;
    drop(int8_model);
    let float_logits = float_logits(&float_model, &images)?;
    drop(float_model);
    let int8_logits = int8_logits(int8, &images)?;
    let studies = studies(cache, &rows);
    let samples = |logits: &[f32]| {
        let rows = rows.iter().zip(logits).zip(&studies);
        Sorted::new(
            rows.map(|((&row, &logit), &study)| Sample {
                logit,
                pe_present: cache.rows()[row].pe_present,
                study,
            })
            .collect(),
        )
    };
    let both = Both {
        float: samples(&float_logits),
        int8: samples(&int8_logits),
        n_studies: studies.iter().max().map_or(0, |last| last + 1),
    };
    let point = manifest.operating_points.first();
    let threshold = point.map_or(0.0, |point| point.logit_threshold);
    let [auroc, sensitivity, specificity] = both.compare(threshold);
    let operating_point = point.map(|point| AtOperatingPoint {
        name: point.name.clone(),
        logit_threshold: point.logit_threshold,
        sensitivity,
        specificity,
    });
    let changes = || {
        float_logits
            .iter()
            .zip(&int8_logits)
            .map(|(float, int8)| (f64::from(*float) - f64::from(*int8)).abs())
    };
    let n_alike = float_logits
        .iter()
        .zip(&int8_logits)
        .filter(|(float, int8)| (**float >= threshold) == (**int8 >= threshold))
        .count();
    // A sensitivity that does not exist (no positive slice) cannot have fallen, but neither was it shown to stand: it fails.
    let is_good_enough = operating_point
        .as_ref()
        .is_none_or(|point| point.sensitivity.change * 100.0 >= -margin_points);
    Ok(VerifyReport {
        part: "val",
        is_pair_known,
        n_slices: rows.len(),
        n_studies: both.n_studies,
        data_digest: cache.digest(),
        float_bytes: float.len(),
        int8_bytes: int8.len(),
        auroc,
        operating_point,
        agreement: n_alike as f64 / rows.len() as f64,
        max_logit_change: changes().fold(0.0, f64::max),
        logit_rmse: (changes().map(|change| change * change).sum::<f64>() / rows.len() as f64)
            .sqrt(),
        tensors,
        n_noise_slices: n_noise_slices.min(rows.len()),
        float_temperature: temperature(both.float.samples()),
        int8_temperature: temperature(both.int8.samples()),
        margin_points,
        is_good_enough,
        notice: shared::RESEARCH_USE,
    })
}

/// Whether the int8 file says that it was made of this f32 file; files from before it was written down say nothing.
///
/// # Errors
///
/// Where it was made of another one.
fn is_pair_known(float: &[u8], int8: &Manifest) -> anyhow::Result<bool> {
    let Some(parent) = int8.tools.get(FLOAT_FILE) else {
        return Ok(false);
    };
    let found = blake3::hash(float).to_hex();
    ensure!(
        *parent == *found,
        "the int8 file was made of the f32 file with BLAKE3 {parent}, this one has {found}: give that one, or quantize this one"
    );
    Ok(true)
}

/// The int8 file with the report's findings in its manifest: validation, temperature, metrics, and the operating point's figures. `None` where the
/// gate failed and nobody forced it.
///
/// # Errors
///
/// Where the file has no readable manifest.
pub fn deployable(
    int8: &[u8],
    report: &VerifyReport,
    is_forced: bool,
) -> anyhow::Result<Option<Vec<u8>>> {
    if !report.is_good_enough && !is_forced {
        return Ok(None);
    }
    let mut model = onnx::read(int8)?;
    let mut manifest = manifest(&model)?;
    manifest.validation = match (&report.operating_point, report.is_good_enough) {
        (_, false) => Validation::Forced,
        (None, true) => Validation::Unvalidated,
        (Some(_), true) => Validation::Validated,
    };
    if report.int8_temperature.is_finite() && report.operating_point.is_some() {
        manifest.temperature = Some(report.int8_temperature);
    }
    if let (Some(found), Some(point)) = (
        &report.operating_point,
        manifest.operating_points.first_mut(),
    ) {
        point.sensitivity = found.sensitivity.int8;
        point.specificity = found.specificity.int8;
    }
    let change = |name: &str, pair: Pair| Metric {
        name: name.to_owned(),
        level: Level::Slice,
        part: report.part.to_owned(),
        value: pair.change,
        low: pair.low,
        high: pair.high,
    };
    let mut found = vec![change("auroc-change-int8", report.auroc)];
    if let Some(point) = &report.operating_point {
        found.push(change("sensitivity-change-int8", point.sensitivity));
        found.push(change("specificity-change-int8", point.specificity));
    }
    manifest
        .metrics
        .retain(|metric| found.iter().all(|new| new.name != metric.name));
    manifest.metrics.extend(found.into_iter().filter(|metric| {
        metric.value.is_finite() && metric.low.is_finite() && metric.high.is_finite()
    }));
    model.set_metadata(METADATA_KEY, manifest.to_json());
    Ok(Some(onnx::write(&model)?))
}

fn manifest(model: &ModelProto) -> anyhow::Result<Manifest> {
    Ok(Manifest::from_json(
        model
            .metadata(METADATA_KEY)
            .context("the file has no pe.manifest")?,
    )?)
}

fn float_logits(model: &ModelProto, images: &[&[u8]]) -> anyhow::Result<Vec<f32>> {
    let graph = FloatGraph::new(model)?;
    Ok(images
        .par_iter()
        .map(|image| graph.logit(image, &mut |_, _| {}))
        .collect::<Result<_, _>>()?)
}

fn int8_logits(int8: &[u8], images: &[&[u8]]) -> anyhow::Result<Vec<f32>> {
    let options = engine::Options {
        kernel: None,
        threads: rayon::current_num_threads(),
        ..engine::Options::default()
    };
    let model = engine::Model::load(int8, &options).context("loading the int8 file")?;
    let mut session = model.session();
    let mut logits = vec![0.0; images.len()];
    for (image, logit) in images.iter().zip(logits.chunks_exact_mut(1)) {
        session.logits(image, logit)?;
    }
    Ok(logits)
}

/// For each row a number of its study, counted from 0 in order of appearance.
fn studies(cache: &Cache, rows: &[usize]) -> Vec<usize> {
    let mut numbers = BTreeMap::new();
    let of_row = |&row: &usize| {
        let next = numbers.len();
        *numbers.entry(&cache.rows()[row].study_uid).or_insert(next)
    };
    rows.iter().map(of_row).collect()
}

/// The same slices through both files.
struct Both {
    float: Sorted,
    int8: Sorted,
    n_studies: usize,
}

impl Both {
    /// AUROC, sensitivity and specificity at `threshold`; the intervals resample studies, the same ones for both files.
    fn compare(&self, threshold: f32) -> [Pair; 3] {
        let figures = ["auroc", "sensitivity", "specificity"]
            .map(|name| NAMES.iter().position(|known| *known == name).unwrap_or(0));
        let pick = |measures: &Measures| figures.map(|index| measures.values[index]);
        let draws: Vec<[f64; 3]> = (0..RESAMPLES)
            .into_par_iter()
            .map(|resample| {
                let weights = bootstrap::study_weights(self.n_studies, BOOTSTRAP_SEED, resample);
                let measure = |sorted: &Sorted| {
                    pick(&sorted.measure_weighted(threshold, |study| weights[study]))
                };
                let (float, int8) = (measure(&self.float), measure(&self.int8));
                [0, 1, 2].map(|index| int8[index] - float[index])
            })
            .collect();
        let (float, int8) = (
            pick(&self.float.measure(threshold)),
            pick(&self.int8.measure(threshold)),
        );
        [0, 1, 2].map(|index| {
            let change = int8[index] - float[index];
            let Interval { low, high, .. } = bootstrap::percentile_interval(
                change,
                draws.iter().map(|draw| draw[index]).collect(),
            );
            Pair {
                float: float[index],
                int8: int8[index],
                change,
                low,
                high,
            }
        })
    }
}

/// Signal-to-noise ratio of every tensor that both files compute under the same name and that is quantized in the int8 file, and of the logit.
/// Flatten is left out: it is its input. Where the file was equalised, each channel is first brought back by the factor that fits best,
/// and the one degree of freedom this takes is given back.
fn noise(
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

/// The temperature T of least mean cross-entropy of sigmoid(logit / T) (Guo et al. 2017, section 4.2), in [0.01, 100]; NaN where one class is
/// missing or the least lies at an end. Golden section search: the cross-entropy is convex in 1/T.
fn temperature(samples: &[Sample]) -> f64 {
    if samples.iter().all(|sample| sample.pe_present)
        || samples.iter().all(|sample| !sample.pe_present)
    {
        return f64::NAN;
    }
    let loss = |inverse: f64| -> f64 {
        let of_sample = |sample: &Sample| {
            let logit = f64::from(sample.logit) * inverse;
            logit.max(0.0) - if sample.pe_present { logit } else { 0.0 }
                + (-logit.abs()).exp().ln_1p()
        };
        samples.iter().map(of_sample).sum()
    };
    let golden = (5.0_f64.sqrt() - 1.0) / 2.0;
    // The search runs over ln(1/T), a monotone change of the variable, which keeps one minimum.
    let (mut low, mut high) = ((0.01_f64).ln(), (100.0_f64).ln());
    for _ in 0..60 {
        let (left, right) = (high - golden * (high - low), low + golden * (high - low));
        if loss(left.exp()) <= loss(right.exp()) {
            high = right
        } else {
            low = left
        }
    }
    let temperature = (-(low + high) / 2.0).exp();
    // At an end of the interval nothing was found: the logits need a shift that a temperature cannot give.
    if (0.0101..99.0).contains(&temperature) {
        temperature
    } else {
        f64::NAN
    }
}

fn text(report: &VerifyReport) -> String {
    let mut text = String::new();
    let mut line = |content: String| {
        text.push_str(&content);
        text.push('\n');
    };
    let pair = |pair: Pair| {
        format!(
            "{:.4} -> {:.4}, change {:+.4} [{:+.4}, {:+.4}]",
            pair.float, pair.int8, pair.change, pair.low, pair.high
        )
    };
    line(format!(
        "validation part: {} slices of {} studies, f32 -> int8",
        report.n_slices, report.n_studies
    ));
    line(format!("AUROC        {}", pair(report.auroc)));
    match &report.operating_point {
        Some(point) => {
            line(format!(
                "operating point {} (logit >= {})",
                point.name, point.logit_threshold
            ));
            line(format!("sensitivity  {}", pair(point.sensitivity)));
            line(format!("specificity  {}", pair(point.specificity)));
        }
        None => line("no operating point: the file is unvalidated".to_owned()),
    }
    line(format!("agreement    {:.4}", report.agreement));
    line(format!(
        "logit change {:.5} at most, {:.5} RMS",
        report.max_logit_change, report.logit_rmse
    ));
    line(format!(
        "temperature  {:.3} -> {:.3}",
        report.float_temperature, report.int8_temperature
    ));
    line(format!(
        "bytes        {} -> {}",
        report.float_bytes, report.int8_bytes
    ));
    for tensor in &report.tensors {
        let mark = if tensor.snr_db < SNR_TARGET_DB {
            "  below target"
        } else {
            ""
        };
        line(format!(
            "SNR {:<24} {:>6.1} dB{mark}",
            tensor.tensor, tensor.snr_db
        ));
    }
    if !report.is_pair_known {
        line("the int8 file does not say which f32 file it was made of: not checked".to_owned());
    }
    line(gate(report));
    text
}

/// What the gate says, with its reason.
fn gate(report: &VerifyReport) -> String {
    match &report.operating_point {
        None => "gate: none, without an operating point".to_owned(),
        Some(_) if report.is_good_enough => "gate: passed".to_owned(),
        Some(point) if point.sensitivity.change.is_nan() => {
            "gate: FAILED, no positive slice shows the sensitivity".to_owned()
        }
        Some(_) => format!(
            "gate: FAILED, sensitivity fell by more than {} points",
            report.margin_points
        ),
    }
}

/// Points of sensitivity that may be lost: 0 to 100.
fn margin(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(points) if (0.0..=100.0).contains(&points) => Ok(points),
        _ => Err("a number of points from 0 to 100 is wanted".to_owned()),
    }
}

/// Bars of the signal-to-noise ratio of each tensor, with a line at [`SNR_TARGET_DB`], as SVG.
#[must_use]
pub fn noise_plot(tensors: &[TensorNoise]) -> String {
    const ROW: usize = 22;
    const LEFT: f64 = 190.0;
    const PER_DB: f64 = 8.0;
    let height = tensors.len() * ROW + 50;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"760\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\
         <rect width=\"760\" height=\"{height}\" fill=\"white\"/><text x=\"8\" y=\"18\">Signal-to-noise ratio of the int8 file, dB ({})</text>",
        shared::RESEARCH_USE
    );
    for (index, tensor) in tensors.iter().enumerate() {
        let y = index * ROW + 30;
        let width = if tensor.snr_db.is_finite() {
            tensor.snr_db.clamp(0.0, 65.0) * PER_DB
        } else {
            65.0 * PER_DB
        };
        let colour = if tensor.snr_db < SNR_TARGET_DB {
            "#b2182b"
        } else {
            "#2166ac"
        };
        let name = tensor.tensor.replace('&', "&amp;").replace('<', "&lt;");
        // Writing to a string cannot fail.
        let _written = write!(
            svg,
            "<text x=\"8\" y=\"{}\">{name}</text><rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.1}\" height=\"16\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{}\">{:.1}</text>",
            y + 13,
            LEFT + width + 4.0,
            y + 13,
            tensor.snr_db
        );
    }
    let x = LEFT + SNR_TARGET_DB * PER_DB;
    let _written = write!(
        svg,
        "<line x1=\"{x}\" x2=\"{x}\" y1=\"26\" y2=\"{}\" stroke=\"black\" stroke-dasharray=\"4 3\"/></svg>",
        height - 16
    );
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(scale: f32) -> Vec<Sample> {
        let of_index = |index: u32| {
            let logit = (index as f32 / 500.0 - 1.0) * 4.0;
            // A label with the probability sigmoid(logit), by a low-discrepancy sequence.
            let draw = f64::from(index) * 0.618_033_988_749_894_8 % 1.0;
            Sample {
                logit: logit * scale,
                pe_present: draw < 1.0 / (1.0 + (-f64::from(logit)).exp()),
                study: 0,
            }
        };
        (0..1000).map(of_index).collect()
    }

    #[test]
    fn another_f32_file_than_the_int8_files_own_is_refused() {
        let demo = include_bytes!("../../edge/model/demo.onnx");
        let mut int8 = manifest(&onnx::read(demo).unwrap()).unwrap();
        int8.tools.remove(FLOAT_FILE);
        assert!(!is_pair_known(b"f32", &int8).unwrap(), "nothing is said");
        let parent = blake3::hash(b"f32").to_hex().to_string();
        int8.tools.insert(FLOAT_FILE.to_owned(), parent.clone());
        assert!(is_pair_known(b"f32", &int8).unwrap());
        let refused = is_pair_known(b"another", &int8).unwrap_err();
        assert!(refused.to_string().contains(&parent));
    }

    #[test]
    fn margin_is_a_number_of_points() {
        assert_eq!(margin("0.5"), Ok(0.5));
        for text in ["nan", "-5", "101", "x"] {
            assert!(margin(text).is_err(), "{text}");
        }
    }

    #[test]
    fn temperature_undoes_a_scaling_of_the_logits() {
        let calibrated = temperature(&samples(1.0));
        assert!((calibrated - 1.0).abs() < 0.1, "{calibrated}");
        assert!((temperature(&samples(3.0)) / calibrated - 3.0).abs() < 1e-3);
    }

    #[test]
    fn temperature_needs_both_classes() {
        let one_class: Vec<Sample> = samples(1.0)
            .into_iter()
            .filter(|sample| sample.pe_present)
            .collect();
        assert!(temperature(&one_class).is_nan());
    }

    #[test]
    fn identical_logits_change_nothing() {
        let both = Both {
            float: Sorted::new(samples(1.0)),
            int8: Sorted::new(samples(1.0)),
            n_studies: 1,
        };
        for pair in both.compare(0.0) {
            assert!(
                pair.change.abs() < 1e-12 && pair.low.abs() < 1e-12 && pair.high.abs() < 1e-12,
                "{pair:?}"
            );
        }
    }

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

    #[test]
    fn plot_names_every_tensor() {
        let noise = |tensor: &str, snr_db| TensorNoise {
            tensor: tensor.to_owned(),
            snr_db,
        };
        let svg = noise_plot(&[
            noise("relu1", 40.0),
            noise("a<b", f64::INFINITY),
            noise("logit", 12.0),
        ]);
        assert!(svg.contains("relu1") && svg.contains("a&lt;b") && svg.ends_with("</svg>"));
    }
}
