//! `trainer evaluate`: how good a model is on slices and studies it was not trained on.
//!
//! In: a model and a cache. Everything that is chosen (thresholds for target sensitivities, the temperature, the study rule) is
//! chosen on the validation part and then frozen; the figures come from the part asked for, with 95 % intervals by bootstrap over studies. Out: an
//! [`Evaluation`], as `metrics.json`, `report.html`, plots and `model-card.md`. Positive means PE present.

mod breakdown;
mod choose;
mod evaluation;
mod exams;
mod measure;

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use shared::RESEARCH_USE;
use shared::manifest::Level;

use self::breakdown::{control_figures, misses, subgroups};
use self::choose::choose;
pub use self::evaluation::{ControlFigure, Counts, Curves, Evaluation, Figures, Miss, Subgroup};
pub use self::exams::RsnaLoss;
use self::exams::rsna_loss;
use self::measure::{false_positives, measure};
use crate::bootstrap::Interval;
use crate::cache::{Cache, write_atomically};
use crate::exit::{Exit, fault};
use crate::index::Part;
use crate::metrics::{NAMES, Sample};
use crate::predict::Predictor;
use crate::split::Split;
use crate::{model_card, plots, provenance, report, split};

/// Sensitivities that operating points are chosen for; the first decides.
pub const TARGET_SENSITIVITIES: [f64; 3] = [0.90, 0.95, 0.80];

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
    /// How the model's training was split, where its file does not say it (by study, then); `image` marks the figures as leaking
    #[arg(long, value_enum)]
    pub split: Option<split::SplitBy>,
    /// Seed of the bootstrap, the balanced sample and the shuffled control, and of a split by image where the model's file has none
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Folder for metrics.json, report.html, plots and model-card.md; default: the model's folder
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Print metrics.json
    #[arg(long)]
    pub json: bool,
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
    let split = provenance::split(predictor.provenance(), args.split, args.seed)?;
    let evaluation = evaluate(&mut predictor, &cache, args.part, split, args.seed)?;
    let out = match (&args.out, args.model.parent()) {
        (Some(out), _) => out.clone(),
        (None, Some(folder)) => folder.to_owned(),
        (None, None) => PathBuf::from("."),
    };
    write_all(&evaluation, &cache, predictor.manifest(), &out)?;
    let is_of_other_data = provenance::is_of_other_data(predictor.provenance(), &cache);
    if predictor.manifest().is_none() && !is_of_other_data {
        write_manifest(&args.model, &evaluation, &cache, &out)?;
    }
    let mut stdout = std::io::stdout().lock();
    if args.json {
        writeln!(stdout, "{}", serde_json::to_string_pretty(&evaluation)?)?;
    } else {
        write!(stdout, "{}", table(&evaluation))?;
        writeln!(stdout, "report: {}", out.join("report.html").display())?;
        if is_of_other_data {
            let what = "manifest.json is left as it is: the model was trained on other data";
            writeln!(stdout, "{what}")?;
        }
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
    if let Some(rsna) = &evaluation.rsna_loss {
        // As above.
        _ = writeln!(text, "{}", rsna.sentence());
    }
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
    split: Split,
    seed: u64,
) -> Result<Evaluation> {
    let rows_of = |part: Part| split::rows(cache, split.by, split.seed, part);
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
    let rsna_loss = (split.by == split::SplitBy::Study)
        .then(|| {
            let training = rows_of(Part::Train);
            rsna_loss(cache, &training, &validation, &measured, &chosen.rule, seed)
        })
        .flatten();
    let (figures, curves) = measure(cache, &measured, &chosen, seed);
    let controls = control_figures(cache, &rows_of(Part::Train), &measured, seed);
    Ok(Evaluation {
        notice: RESEARCH_USE,
        leak: split.by.warning(),
        part,
        level: Level::Slice,
        headline: figures.slice.values.clone(),
        model: predictor.name().to_owned(),
        model_digest: predictor.digest().to_owned(),
        data_digest: cache.digest(),
        data_kind: cache.manifest().kind,
        data_source: cache.manifest().source.clone(),
        data_split: match split.by {
            split::SplitBy::Study => cache.manifest().split.clone(),
            split::SplitBy::Image => format!("by image, seed {}: LEAKS", split.seed),
        },
        split,
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
        rsna_loss,
        curves,
    })
}

/// Writes what was found into a model's manifest: data, figures, operating points, temperature and study rule.
pub fn complete(manifest: &mut shared::manifest::Manifest, evaluation: &Evaluation, cache: &Cache) {
    let trained = cache.rows().iter().filter(|row| row.part == Part::Train);
    let mut studies: Vec<&str> = trained.clone().map(|row| row.study_uid.as_str()).collect();
    studies.sort_unstable();
    studies.dedup();
    if evaluation.leak.is_some() {
        manifest
            .tools
            .extend(provenance::of_split(evaluation.split));
    }
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
