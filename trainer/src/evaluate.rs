//! `trainer evaluate`: how good a model is on slices and studies it was not trained on.
//!
//! In: a model and a cache. Everything that is chosen (thresholds for target sensitivities, the temperature, the study rule) is
//! chosen on the validation part and then frozen; the figures come from the part asked for, with 95 % intervals by bootstrap over studies. Out: an
//! [`Evaluation`], as `metrics.json`, `report.html`, plots and `model-card.md`. Positive means PE present.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use shared::RESEARCH_USE;
use shared::manifest::{DataKind, Level, Metric, OperatingPoint};
use shared::study::{self, StudyRule};

use crate::bootstrap::{Interval, intervals};
use crate::cache::{Cache, write_atomically};
use crate::controls::{self, Control, Draw};
use crate::exit::{Exit, fault};
use crate::index::{EXAM_LABELS, Part};
use crate::metrics::{Confusion, NAMES, Sample, Sorted};
use crate::predict::Predictor;
use crate::{model_card, plots, report, split};

/// Sensitivities that operating points are chosen for; the first decides.
pub const TARGET_SENSITIVITIES: [f64; 3] = [0.90, 0.95, 0.80];
/// Misses of each kind that the report shows.
const SHOWN_MISSES: usize = 4;
/// Fewest studies of each outcome for a subgroup to have figures.
const MIN_SUBGROUP_SLICES: usize = 5;

/// Arguments of `trainer evaluate`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Example:\n  trainer evaluate --model runs/demo/model-int8.onnx --data runs/demo/cache --part test"
)]
pub struct EvaluateArgs {
    /// Model file: .onnx (through the engine) or .safetensors (through candle)
    #[arg(long, value_name = "FILE")]
    pub model: PathBuf,
    /// Cache folder
    #[arg(long, value_name = "CACHE")]
    pub data: PathBuf,
    /// Part to measure on
    #[arg(long, value_enum, default_value_t = Part::Test)]
    pub part: Part,
    /// How the model's training was split; `image` marks the figures as leaking
    #[arg(long, value_enum, default_value_t = split::SplitBy::Study)]
    pub split: split::SplitBy,
    /// Seed of the bootstrap, the balanced sample and the shuffled control
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Folder for metrics.json, report.html, plots and model-card.md; default: the model's folder
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Print metrics.json
    #[arg(long)]
    pub json: bool,
}

/// Figures of one level.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// Each figure of [`NAMES`] with its interval.
    #[serde(flatten)]
    pub values: BTreeMap<&'static str, Interval>,
    /// Counts at the threshold.
    pub confusion: Counts,
    /// Logit or score at and above which the answer is positive.
    pub threshold: f32,
    /// Slices or studies.
    pub n: usize,
    /// Of these with an embolus.
    pub n_positive: usize,
    /// Studies.
    pub n_studies: usize,
}

/// A confusion matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Counts {
    /// PE present, called positive.
    pub true_positive: u64,
    /// No PE, called positive.
    pub false_positive: u64,
    /// No PE, called negative.
    pub true_negative: u64,
    /// PE present, called negative.
    pub false_negative: u64,
}

/// Figures of the slices that one label or maker singles out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Subgroup {
    /// Column and value.
    pub name: String,
    /// Slices of the subgroup.
    pub slice: Figures,
}

/// What a control reaches.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ControlFigure {
    /// Which control.
    pub name: &'static str,
    /// Its AUROC on slices.
    pub auroc: Interval,
}

/// A slice that was judged badly.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Miss {
    /// Row of the cache.
    pub row: usize,
    /// SOP Instance UID.
    pub sop_uid: String,
    /// Whether an embolus is visible.
    pub pe_present: bool,
    /// The model's probability after the temperature.
    pub probability: f32,
}

/// All that is measured.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluation {
    /// [`RESEARCH_USE`].
    pub notice: &'static str,
    /// The leakage warning, where the split was by image.
    pub leak: Option<&'static str>,
    /// Part the figures were measured on.
    pub part: Part,
    /// Level of the figures at the top.
    pub level: Level,
    /// The figures at the top: slices at natural prevalence, at the first operating point.
    #[serde(flatten)]
    pub headline: BTreeMap<&'static str, Interval>,
    /// File name of the model.
    pub model: String,
    /// BLAKE3 of the model file.
    pub model_digest: String,
    /// BLAKE3 of the cache.
    pub data_digest: String,
    /// Kind of the data.
    pub data_kind: DataKind,
    /// What the data is.
    pub data_source: String,
    /// Split of the cache.
    pub data_split: String,
    /// Seed of bootstrap and samples.
    pub seed: u64,
    /// Version of this program.
    pub trainer: &'static str,
    /// Chosen on the validation part.
    pub operating_points: Vec<OperatingPoint>,
    /// Fitted on the validation part.
    pub temperature: f64,
    /// Learnt on the validation part.
    pub study_rule: StudyRule,
    /// Slices at natural prevalence.
    pub slice: Figures,
    /// As many negative slices as positive ones, drawn by the seed.
    pub slice_balanced: Figures,
    /// As `slice_balanced`, at probability 0.5, as the publication decides.
    pub slice_balanced_half: Figures,
    /// Studies by the study rule.
    pub study: Figures,
    /// Mean number of slices called positive in a study without embolus.
    pub false_positive_slices_per_negative_study: f64,
    /// By every label column and maker.
    pub subgroups: Vec<Subgroup>,
    /// Controls.
    pub controls: Vec<ControlFigure>,
    /// The worst misses.
    pub misses: Vec<Miss>,
    /// Curves for the plots.
    #[serde(skip)]
    pub curves: Curves,
}

/// Points of the plots.
#[derive(Clone, Debug, Default)]
pub struct Curves {
    /// ROC of the slices.
    pub slice_roc: Vec<(f64, f64)>,
    /// ROC of the studies.
    pub study_roc: Vec<(f64, f64)>,
    /// Precision over sensitivity of the slices.
    pub slice_precision_recall: Vec<(f64, f64)>,
    /// Mean probability, share of positives, count; after the temperature.
    pub reliability: Vec<(f64, f64, f64)>,
    /// Scores of studies without and with embolus.
    pub study_scores: Vec<(f32, bool)>,
}

/// Logits of one part.
#[derive(Clone, Debug)]
struct Judged {
    rows: Vec<usize>,
    logits: Vec<f32>,
}

/// Runs the command.
///
/// # Errors
/// Model or cache cannot be read; a part is empty or has one outcome alone.
pub fn run(args: &EvaluateArgs) -> Result<ExitCode> {
    let cache = Cache::open(&args.data)?;
    let mut predictor = Predictor::open(&args.model)?;
    let evaluation = evaluate(&mut predictor, &cache, args.part, args.split, args.seed)?;
    let out = match (&args.out, args.model.parent()) {
        (Some(out), _) => out.clone(),
        (None, Some(folder)) => folder.to_owned(),
        (None, None) => PathBuf::from("."),
    };
    write_all(&evaluation, &cache, predictor.manifest(), &out)?;
    if predictor.manifest().is_none() {
        write_manifest(&args.model, &evaluation, &cache, &out)?;
    }
    let mut stdout = std::io::stdout().lock();
    if args.json {
        writeln!(stdout, "{}", serde_json::to_string_pretty(&evaluation)?)?;
    } else {
        write!(stdout, "{}", table(&evaluation))?;
        writeln!(stdout, "report: {}", out.join("report.html").display())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes `manifest.json` of a weights file into `out`: `trainer export --run` takes figures and operating points from there.
fn write_manifest(
    weights: &Path,
    evaluation: &Evaluation,
    cache: &Cache,
    out: &Path,
) -> Result<()> {
    let (architecture, width, _) = crate::export::read_weights(weights)?;
    let mut manifest = crate::export::new_manifest(architecture, width);
    complete(&mut manifest, evaluation, cache);
    let path = out.join("manifest.json");
    write_atomically(&path, manifest.to_json().as_bytes())
        .with_context(|| format!("writing {}", path.display()))
}

/// Writes `metrics.json`, `report.html`, the plots and `model-card.md` into `out`.
///
/// # Errors
/// The folder cannot be written.
pub fn write_all(
    evaluation: &Evaluation,
    cache: &Cache,
    manifest: Option<&shared::manifest::Manifest>,
    out: &Path,
) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("making {}", out.display()))?;
    let json = serde_json::to_string_pretty(evaluation)?;
    write_atomically(&out.join("metrics.json"), json.as_bytes())?;
    for (name, svg) in plots::all(evaluation) {
        write_atomically(&out.join(name), svg.as_bytes())?;
    }
    let page = report::page(evaluation, cache, out)?;
    write_atomically(&out.join("report.html"), page.as_bytes())?;
    let card = model_card::text(evaluation, manifest);
    write_atomically(&out.join("model-card.md"), card.as_bytes())
}

/// The headline figures as text.
#[must_use]
pub fn table(evaluation: &Evaluation) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    let levels = [
        ("slice", &evaluation.slice),
        ("slice, balanced", &evaluation.slice_balanced),
        ("study", &evaluation.study),
    ];
    let mut line = |cells: [&str; 4]| {
        let [name, a, b, c] = cells;
        // Writing to a String does not fail.
        _ = writeln!(text, "{name:<12} {a:<21} {b:<21} {c:<21}");
    };
    line(["", levels[0].0, levels[1].0, levels[2].0]);
    for name in NAMES {
        let [a, b, c] =
            levels.map(|(_, figures)| figures.values.get(name).map_or_else(String::new, show));
        line([name, &a, &b, &c]);
    }
    let counts = levels.map(|(_, figures)| format!("{} of {}", figures.n_positive, figures.n));
    line(["positive", &counts[0], &counts[1], &counts[2]]);
    if let Some(leak) = evaluation.leak {
        text.push_str(leak);
        text.push('\n');
    }
    text.push_str(RESEARCH_USE);
    text.push('\n');
    text
}

/// A figure with its interval: `0.912 [0.871, 0.944]`.
#[must_use]
pub fn show(interval: &Interval) -> String {
    if interval.value.is_nan() {
        return "-".into();
    }
    format!(
        "{:.3} [{:.3}, {:.3}]",
        interval.value, interval.low, interval.high
    )
}

/// Measures a model on a part of a cache.
///
/// # Errors
/// The validation part or the part asked for lacks positive or negative slices; the network fails.
pub fn evaluate(
    predictor: &mut Predictor,
    cache: &Cache,
    part: Part,
    split_by: split::SplitBy,
    seed: u64,
) -> Result<Evaluation> {
    let rows_of = |part: Part| split::rows(cache, split_by, seed, part);
    let validation = judge(predictor, cache, rows_of(Part::Val))?;
    let measured = if part == Part::Val {
        validation.clone()
    } else {
        judge(predictor, cache, rows_of(part))?
    };
    for (judged, name) in [(&validation, "val"), (&measured, part.name())] {
        let n_positive = judged
            .rows
            .iter()
            .filter(|&&row| cache.rows()[row].pe_present)
            .count();
        if n_positive == 0 || n_positive == judged.rows.len() {
            return Err(fault(
                Exit::BadData,
                format!(
                    "part {name} has {n_positive} positive slices of {}; both kinds are needed",
                    judged.rows.len()
                ),
            ));
        }
    }
    let chosen = choose(cache, &validation)?;
    let (figures, curves) = measure(cache, &measured, &chosen, seed);
    let controls = control_figures(cache, &rows_of(Part::Train), &measured, seed);
    Ok(Evaluation {
        notice: RESEARCH_USE,
        leak: split_by.warning(),
        part,
        level: Level::Slice,
        headline: figures.slice.values.clone(),
        model: predictor.name().to_owned(),
        model_digest: predictor.digest().to_owned(),
        data_digest: cache.digest(),
        data_kind: cache.manifest().kind,
        data_source: cache.manifest().source.clone(),
        data_split: cache.manifest().split.clone(),
        seed,
        trainer: env!("CARGO_PKG_VERSION"),
        subgroups: subgroups(cache, &measured, chosen.threshold, seed),
        misses: misses(cache, &measured, chosen.temperature),
        false_positive_slices_per_negative_study: false_positives(
            cache,
            &measured,
            chosen.threshold,
        ),
        operating_points: chosen.points,
        temperature: chosen.temperature,
        study_rule: chosen.rule,
        slice: figures.slice,
        slice_balanced: figures.balanced,
        slice_balanced_half: figures.balanced_half,
        study: figures.study,
        controls,
        curves,
    })
}

impl Evaluation {
    /// The figures as the model file's manifest holds them.
    #[must_use]
    pub fn manifest_metrics(&self) -> Vec<Metric> {
        let levels = [(Level::Slice, &self.slice), (Level::Study, &self.study)];
        levels
            .iter()
            .flat_map(|(level, figures)| {
                figures
                    .values
                    .iter()
                    .filter(|(_, interval)| interval.value.is_finite() && interval.low.is_finite())
                    .map(|(name, interval)| Metric {
                        name: (*name).to_owned(),
                        level: *level,
                        part: self.part.name().to_owned(),
                        value: interval.value,
                        low: interval.low,
                        high: interval.high,
                    })
            })
            .collect()
    }
}

/// Writes what was found into a model's manifest: data, figures, operating points, temperature and study rule.
pub fn complete(manifest: &mut shared::manifest::Manifest, evaluation: &Evaluation, cache: &Cache) {
    let trained = cache.rows().iter().filter(|row| row.part == Part::Train);
    let mut studies: Vec<&str> = trained.clone().map(|row| row.study_uid.as_str()).collect();
    studies.sort_unstable();
    studies.dedup();
    manifest.preprocess = cache.manifest().preprocess.clone();
    manifest.training_data = shared::manifest::TrainingData {
        kind: cache.manifest().kind,
        digest: cache.digest(),
        n_studies: studies.len() as u64,
        n_slices: trained.count() as u64,
    };
    manifest.metrics = evaluation.manifest_metrics();
    manifest.operating_points = evaluation.operating_points.clone();
    manifest.temperature = Some(evaluation.temperature);
    manifest.study_rule = Some(evaluation.study_rule);
}

fn judge(predictor: &mut Predictor, cache: &Cache, rows: Vec<usize>) -> Result<Judged> {
    let logits = predictor.logits(cache, &rows)?;
    let n_bad = logits.iter().filter(|logit| !logit.is_finite()).count();
    ensure!(n_bad == 0, "{n_bad} logits are not finite");
    Ok(Judged { rows, logits })
}

/// Samples with studies numbered from 0.
fn samples(cache: &Cache, judged: &Judged) -> Vec<Sample> {
    let mut numbers = HashMap::new();
    judged
        .rows
        .iter()
        .zip(&judged.logits)
        .map(|(&row, &logit)| {
            let row = &cache.rows()[row];
            let next = numbers.len();
            Sample {
                logit,
                pe_present: row.pe_present,
                study: *numbers.entry(&row.study_uid).or_insert(next),
            }
        })
        .collect()
}

/// What was chosen on the validation part.
struct Chosen {
    points: Vec<OperatingPoint>,
    threshold: f32,
    temperature: f64,
    rule: StudyRule,
}

fn choose(cache: &Cache, validation: &Judged) -> Result<Chosen> {
    let sorted = Sorted::new(samples(cache, validation));
    let points = TARGET_SENSITIVITIES
        .iter()
        .filter_map(|&target| {
            let logit_threshold = sorted.threshold_for_sensitivity(target)?;
            let values = sorted.measure(logit_threshold).values;
            Some(OperatingPoint {
                name: format!("sensitivity-{target:.2}"),
                logit_threshold,
                sensitivity: values[2],
                specificity: values[3],
            })
        })
        .collect::<Vec<_>>();
    let threshold = points
        .first()
        .map(|point| point.logit_threshold)
        .context("the validation part has no positive slice")?;
    Ok(Chosen {
        points,
        threshold,
        temperature: temperature(sorted.samples()),
        rule: study_rule(cache, validation),
    })
}

/// The temperature of least log loss, 0.05 to 20: golden-section search on its logarithm (Guo et al. 2017).
fn temperature(samples: &[Sample]) -> f64 {
    let loss = |log_temperature: f64| -> f64 {
        let temperature = log_temperature.exp();
        samples
            .iter()
            .map(|sample| {
                let logit = f64::from(sample.logit) / temperature;
                let signed = if sample.pe_present { -logit } else { logit };
                signed.max(0.0) + (-signed.abs()).exp().ln_1p()
            })
            .sum()
    };
    let ratio = (5.0_f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = (0.05_f64.ln(), 20.0_f64.ln());
    for _ in 0..60 {
        let (a, b) = (high - ratio * (high - low), low + ratio * (high - low));
        if loss(a) < loss(b) {
            high = b;
        } else {
            low = a;
        }
    }
    ((low + high) / 2.0).exp()
}

/// The rule of highest AUROC over studies, the simplest among equals; its threshold reaches the first target sensitivity.
fn study_rule(cache: &Cache, validation: &Judged) -> StudyRule {
    let mut best = (
        f64::NEG_INFINITY,
        StudyRule {
            smoothing_slices: 1,
            top_slices: 1,
            logit_threshold: 0.0,
        },
    );
    for smoothing_slices in [1, 3, 5] {
        for top_slices in [1, 2, 3, 5, 8] {
            let mut rule = StudyRule {
                smoothing_slices,
                top_slices,
                logit_threshold: 0.0,
            };
            let sorted = Sorted::new(study_samples(cache, validation, &rule));
            let auroc = sorted.measure(0.0).values[0];
            rule.logit_threshold = sorted
                .threshold_for_sensitivity(TARGET_SENSITIVITIES[0])
                .unwrap_or(0.0);
            if auroc > best.0 + 1e-9 || best.0 == f64::NEG_INFINITY {
                best = (
                    if auroc.is_nan() {
                        f64::NEG_INFINITY
                    } else {
                        auroc
                    },
                    rule,
                );
            }
        }
    }
    best.1
}

/// One sample a study: the score of its best series, and whether any slice shows an embolus.
fn study_samples(cache: &Cache, judged: &Judged, rule: &StudyRule) -> Vec<Sample> {
    let mut studies: BTreeMap<&str, Sample> = BTreeMap::new();
    let pairs: Vec<(usize, f32)> = judged
        .rows
        .iter()
        .copied()
        .zip(judged.logits.iter().copied())
        .collect();
    let rows = cache.rows();
    for series in pairs.chunk_by(|a, b| rows[a.0].series_uid == rows[b.0].series_uid) {
        let logits: Vec<Option<f32>> = series.iter().map(|(_, logit)| Some(*logit)).collect();
        let Some(score) = study::score(rule, &logits) else {
            continue;
        };
        let pe_present = series.iter().any(|(row, _)| rows[*row].pe_present);
        let next = studies.len();
        let study = studies
            .entry(rows[series[0].0].study_uid.as_str())
            .or_insert(Sample {
                logit: score,
                pe_present,
                study: next,
            });
        study.logit = study.logit.max(score);
        study.pe_present |= pe_present;
    }
    studies.into_values().collect()
}

struct AllFigures {
    slice: Figures,
    balanced: Figures,
    balanced_half: Figures,
    study: Figures,
}

fn measure(cache: &Cache, judged: &Judged, chosen: &Chosen, seed: u64) -> (AllFigures, Curves) {
    let slices = samples(cache, judged);
    let balanced = balanced(&slices, seed);
    let studies = study_samples(cache, judged, &chosen.rule);
    let natural = Sorted::new(slices.clone());
    let sorted_studies = Sorted::new(studies.clone());
    let tempered = Sorted::new(
        slices
            .iter()
            .map(|sample| Sample {
                logit: tempered_logit(sample.logit, chosen.temperature),
                ..*sample
            })
            .collect(),
    );
    let curves = Curves {
        slice_roc: natural.roc(),
        study_roc: sorted_studies.roc(),
        slice_precision_recall: natural.precision_recall(),
        reliability: tempered.reliability(),
        study_scores: studies
            .iter()
            .map(|study| (study.logit, study.pe_present))
            .collect(),
    };
    let calibrated = |mut figures: Figures, samples: &[Sample]| {
        // Brier and ECE are those of the probability that is shown, after the temperature.
        let samples = samples
            .iter()
            .map(|sample| Sample {
                logit: tempered_logit(sample.logit, chosen.temperature),
                ..*sample
            })
            .collect();
        let with_temperature = figures_of(samples, 0.0, seed);
        for name in ["brier", "ece"] {
            if let Some(interval) = with_temperature.values.get(name) {
                figures.values.insert(name, *interval);
            }
        }
        figures
    };
    let figures = AllFigures {
        slice: calibrated(figures_of(slices.clone(), chosen.threshold, seed), &slices),
        balanced: calibrated(
            figures_of(balanced.clone(), chosen.threshold, seed),
            &balanced,
        ),
        balanced_half: figures_of(balanced.clone(), 0.0, seed),
        study: figures_of(studies, chosen.rule.logit_threshold, seed),
    };
    (figures, curves)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a logit is shown and binned in f32"
)]
fn tempered_logit(logit: f32, temperature: f64) -> f32 {
    (f64::from(logit) / temperature) as f32
}

fn figures_of(samples: Vec<Sample>, threshold: f32, seed: u64) -> Figures {
    let n = samples.len();
    let n_positive = samples.iter().filter(|sample| sample.pe_present).count();
    let n_studies = samples
        .iter()
        .map(|sample| sample.study)
        .collect::<std::collections::HashSet<_>>()
        .len();
    let sorted = Sorted::new(renumbered(samples));
    Figures {
        values: NAMES
            .into_iter()
            .zip(intervals(&sorted, threshold, seed))
            .collect(),
        confusion: counts(&sorted.measure(threshold).confusion),
        threshold,
        n,
        n_positive,
        n_studies,
    }
}

/// Studies numbered without gaps, so that the bootstrap draws as many as there are.
fn renumbered(mut samples: Vec<Sample>) -> Vec<Sample> {
    let mut numbers = HashMap::new();
    for sample in &mut samples {
        let next = numbers.len();
        sample.study = *numbers.entry(sample.study).or_insert(next);
    }
    samples
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sums of ones"
)]
fn counts(confusion: &Confusion) -> Counts {
    Counts {
        true_positive: confusion.true_positive as u64,
        false_positive: confusion.false_positive as u64,
        true_negative: confusion.true_negative as u64,
        false_negative: confusion.false_negative as u64,
    }
}

/// All samples of the rarer kind and as many of the other, drawn by the seed.
fn balanced(samples: &[Sample], seed: u64) -> Vec<Sample> {
    let (mut positive, mut negative): (Vec<Sample>, Vec<Sample>) =
        samples.iter().partition(|sample| sample.pe_present);
    let n = positive.len().min(negative.len());
    let mut draw = Draw(seed);
    for kind in [&mut positive, &mut negative] {
        for place in 0..n {
            let other = place + draw.below(kind.len() - place);
            kind.swap(place, other);
        }
        kind.truncate(n);
    }
    positive.append(&mut negative);
    positive
}

fn false_positives(cache: &Cache, judged: &Judged, threshold: f32) -> f64 {
    let mut studies: HashMap<&str, (bool, u32)> = HashMap::new();
    for (&row, &logit) in judged.rows.iter().zip(&judged.logits) {
        let row = &cache.rows()[row];
        let study = studies.entry(row.study_uid.as_str()).or_default();
        study.0 |= row.pe_present;
        study.1 += u32::from(logit >= threshold);
    }
    let negative: Vec<u32> = studies
        .values()
        .filter(|(pe_present, _)| !pe_present)
        .map(|(_, n_called)| *n_called)
        .collect();
    f64::from(negative.iter().sum::<u32>()) / negative.len() as f64
}

/// For a label of embolus: its positive slices among all negative ones. For any other label and for makers: the slices of those exams.
fn subgroups(cache: &Cache, judged: &Judged, threshold: f32, seed: u64) -> Vec<Subgroup> {
    let all = samples(cache, judged);
    let pick = |keep: &dyn Fn(&crate::index::Row) -> bool| -> Vec<Sample> {
        all.iter()
            .zip(&judged.rows)
            .filter(|(_, row)| keep(&cache.rows()[**row]))
            .map(|(sample, _)| *sample)
            .collect()
    };
    let mut groups = Vec::new();
    for (index, name) in EXAM_LABELS.into_iter().enumerate() {
        let has = |row: &crate::index::Row| row.exam_labels.is_some_and(|labels| labels[index]);
        let is_of_embolus = ![
            "negative_exam_for_pe",
            "qa_motion",
            "qa_contrast",
            "flow_artifact",
            "true_filling_defect_not_pe",
            "indeterminate",
        ]
        .contains(&name);
        let samples = if is_of_embolus {
            pick(&|row| !row.pe_present || has(row))
        } else {
            pick(&has)
        };
        let n_of_group = if is_of_embolus {
            samples.iter().filter(|sample| sample.pe_present).count()
        } else {
            samples.len()
        };
        if n_of_group >= MIN_SUBGROUP_SLICES {
            groups.push((name.to_owned(), samples));
        }
    }
    let mut makers: Vec<&str> = judged
        .rows
        .iter()
        .filter_map(|&row| cache.rows()[row].manufacturer.as_deref())
        .collect();
    makers.sort_unstable();
    makers.dedup();
    for maker in makers {
        let samples = pick(&|row| row.manufacturer.as_deref() == Some(maker));
        groups.push((format!("manufacturer: {maker}"), samples));
    }
    groups
        .into_iter()
        .map(|(name, samples)| Subgroup {
            name,
            slice: figures_of(samples, threshold, seed),
        })
        .collect()
}

fn control_figures(
    cache: &Cache,
    fit_rows: &[usize],
    judged: &Judged,
    seed: u64,
) -> Vec<ControlFigure> {
    let truth = samples(cache, judged);
    let auroc = |name, samples: Vec<Sample>| ControlFigure {
        name,
        auroc: intervals(&Sorted::new(samples), 0.0, seed)[0],
    };
    let labels: Vec<bool> = truth.iter().map(|sample| sample.pe_present).collect();
    let shuffled = controls::shuffled(&labels, seed);
    let mut figures = vec![auroc(
        "shuffled labels",
        truth
            .iter()
            .zip(shuffled)
            .map(|(sample, pe_present)| Sample {
                pe_present,
                ..*sample
            })
            .collect(),
    )];
    for (name, control) in [
        ("slice position only", Control::Position),
        ("mean intensity only", Control::MeanIntensity),
    ] {
        let scores = controls::scores(cache, control, fit_rows, &judged.rows);
        let samples = truth
            .iter()
            .zip(scores)
            .map(|(sample, logit)| Sample { logit, ..*sample })
            .collect();
        figures.push(auroc(name, samples));
    }
    figures
}

/// The positive slices of lowest logit and the negative ones of highest, at most one a study and kind.
fn misses(cache: &Cache, judged: &Judged, temperature: f64) -> Vec<Miss> {
    let mut order: Vec<(usize, f32)> = judged
        .rows
        .iter()
        .copied()
        .zip(judged.logits.iter().copied())
        .collect();
    order.sort_by(|a, b| a.1.total_cmp(&b.1));
    let rows = cache.rows();
    let mut found = Vec::new();
    for pe_present in [true, false] {
        let mut seen = std::collections::HashSet::new();
        let mut take = |(row, logit): &(usize, f32)| {
            let is_wanted =
                rows[*row].pe_present == pe_present && seen.insert(&rows[*row].study_uid);
            is_wanted.then(|| Miss {
                row: *row,
                sop_uid: rows[*row].sop_uid.to_string(),
                pe_present,
                probability: shared::probability::sigmoid(tempered_logit(*logit, temperature)),
            })
        };
        if pe_present {
            found.extend(order.iter().filter_map(&mut take).take(SHOWN_MISSES));
        } else {
            found.extend(order.iter().rev().filter_map(&mut take).take(SHOWN_MISSES));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(logit: f32, pe_present: bool, study: usize) -> Sample {
        Sample {
            logit,
            pe_present,
            study,
        }
    }

    #[test]
    fn temperature_undoes_a_scaling() {
        let mut samples = Vec::new();
        for k in -20..=20_i16 {
            let logit = f32::from(k) / 5.0;
            let probability = shared::probability::sigmoid(logit);
            for n in 0..100_u8 {
                samples.push(sample(3.0 * logit, f32::from(n) < probability * 100.0, 0));
            }
        }
        assert!((temperature(&samples) - 3.0).abs() < 0.15);
    }

    #[test]
    fn a_balanced_sample_has_as_many_of_each_kind() {
        let samples: Vec<Sample> = (0..50).map(|k| sample(0.0, k % 7 == 0, k)).collect();
        let drawn = balanced(&samples, 4);
        assert_eq!(drawn.iter().filter(|sample| sample.pe_present).count(), 8);
        assert_eq!(drawn.len(), 16);
        assert_eq!(drawn, balanced(&samples, 4));
    }
}
