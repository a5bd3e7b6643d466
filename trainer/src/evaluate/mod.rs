//! `trainer evaluate`: how good a model is on slices and studies it was not trained on.
//!
//! In: a model and a cache. Everything that is chosen (thresholds for target sensitivities, the temperature, the study rule) is
//! chosen on the validation part and then frozen; a model file with operating points has that behind it and is measured with its own. The figures come from the part asked for, with 95 % intervals by bootstrap over studies. Out: an
//! [`Evaluation`], as `metrics.json`, `report.html`, plots, tables of predictions and `model-card.md`. Positive means PE present.

mod breakdown;
mod choose;
mod evaluation;
mod exams;
mod folder;
mod measure;
mod warnings;

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, ensure};
use shared::RESEARCH_USE;
use shared::manifest::Level;

use self::breakdown::{control_figures, misses, subgroups};
use self::choose::{choose, frozen};
pub use self::evaluation::{ControlFigure, Counts, Curves, Evaluation, Figures, Miss, Subgroup};
pub use self::exams::RsnaLoss;
use self::exams::rsna_loss;
pub use self::folder::{complete, manifest_of, write_all, write_manifest};
use self::measure::{false_positives, measure};
use crate::bootstrap::Interval;
use crate::cache::{Cache, refuse_as_output};
use crate::exit::{Exit, fault};
use crate::index::Part;
use crate::metrics::{NAMES, Sample};
use crate::predict::Predictor;
use crate::split::Split;
use crate::{provenance, split};

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
    /// Folder for metrics.json, report.html, plots, predictions.csv, studies.csv and model-card.md; default: the model's folder
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Print metrics.json
    #[arg(long)]
    pub json: bool,
}

/// Logits of one part.
#[derive(Clone, Debug, Default)]
pub struct Judged {
    /// Rows of the cache.
    pub rows: Vec<usize>,
    /// The logit of each.
    pub logits: Vec<f32>,
}

/// Runs the command.
///
/// # Errors
/// Model or cache cannot be read; a part is empty or has one outcome alone.
pub fn run(args: &EvaluateArgs) -> Result<ExitCode> {
    // The training curves lie beside the model, wherever the report goes.
    let run = args.model.parent().unwrap_or(Path::new("."));
    let out = args.out.as_deref().unwrap_or(run);
    refuse_as_output(out)?;
    let cache = Cache::open(&args.data)?;
    let mut predictor = Predictor::open(&args.model)?;
    let split = provenance::split(predictor.provenance(), args.split, args.seed)?;
    let evaluation = evaluate(&mut predictor, &cache, args.part, split, args.seed)?;
    let manifest = match predictor.manifest() {
        Some(manifest) => manifest.clone(),
        None => manifest_of(&args.model, &evaluation, &cache)?,
    };
    write_all(&evaluation, &cache, &manifest, run, out)?;
    let is_weights = predictor.manifest().is_none();
    if is_weights && provenance::is_of_other_data(predictor.provenance(), &cache) {
        writeln!(
            std::io::stderr(),
            "manifest.json is left as it is: the model was trained on other data"
        )?;
    } else if is_weights {
        write_manifest(&manifest, out)?;
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
    for warning in &evaluation.warnings {
        _ = writeln!(text, "warning: {warning}");
    }
    text.push_str(RESEARCH_USE);
    text.push('\n');
    text
}

/// A figure with its interval: `0.912 [0.871, 0.944]`; `0.912 [unknown]` where too few studies carry it.
#[must_use]
pub fn show(interval: &Interval) -> String {
    if interval.value.is_nan() {
        return "-".into();
    }
    if interval.low.is_nan() {
        return format!("{:.3} [unknown]", interval.value);
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
    for (judged, part) in [(&validation, Part::Val), (&measured, part)] {
        needs_both_kinds(cache, judged, part)?;
    }
    let manifest = predictor.manifest();
    let chosen = match manifest.and_then(|manifest| frozen(manifest, cache, &validation)) {
        Some(frozen) => frozen,
        None => choose(cache, &validation)?,
    };
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
        data_split: split.in_words(cache),
        split,
        seed,
        trainer: env!("CARGO_PKG_VERSION"),
        warnings: warnings::of(cache, &validation, &measured, &chosen),
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
        judged: measured,
        provenance: predictor.provenance().clone(),
    })
}

/// Thresholds and areas under curves are of slices with and without embolus.
fn needs_both_kinds(cache: &Cache, judged: &Judged, part: Part) -> Result<()> {
    let rows = judged.rows.iter().map(|&row| &cache.rows()[row]);
    let (n_positive, n) = (rows.filter(|row| row.pe_present).count(), judged.rows.len());
    if n_positive == 0 || n_positive == n {
        return Err(fault(
            Exit::BadData,
            format!(
                "part {} has {n_positive} positive slices of {n}; both kinds are needed: prepare more studies, or with another --seed, which draws the parts",
                part.name()
            ),
        ));
    }
    Ok(())
}

fn judge(predictor: &mut Predictor, cache: &Cache, rows: Vec<usize>) -> Result<Judged> {
    let logits = predictor.logits(cache, &rows)?;
    let n_bad = logits.iter().filter(|logit| !logit.is_finite()).count();
    ensure!(
        n_bad == 0,
        "{}: {n_bad} of {} logits are not finite; its weights are too large, train anew with a smaller learning rate",
        predictor.name(),
        logits.len()
    );
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

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use shared::manifest::{DataKind, Manifest, OperatingPoint};
    use shared::study::StudyRule;

    use super::*;
    use crate::network::Network;
    use crate::{architecture, export, model_card};

    /// A cache of phantom studies, and a model file of random weights with what `tell` writes into its manifest.
    fn prepared(folder: &Path, tell: impl FnOnce(&mut Manifest)) -> (Cache, Predictor) {
        let source = crate::source::Source::phantom(24, 4, 6, 64, false);
        let spec = shared::spec::PreprocessSpec::default();
        let cache = folder.join("cache");
        crate::prepare::prepare(&source, &spec, 4, None, &cache).unwrap();
        let architecture = architecture::find("vanilla").unwrap();
        let network = Network::new(architecture, 0.001, 3, &Device::Cpu).unwrap();
        let mut manifest = export::new_manifest(architecture, 0.001);
        tell(&mut manifest);
        let weights = export::weights_of(&network).unwrap();
        let bytes = export::float_file(architecture, 0.001, &weights, &manifest).unwrap();
        let file = folder.join("model.onnx");
        std::fs::write(&file, bytes).unwrap();
        (
            Cache::open(&cache).unwrap(),
            Predictor::open(&file).unwrap(),
        )
    }

    const BY_STUDY: Split = Split {
        by: split::SplitBy::Study,
        seed: 4,
    };

    #[test]
    fn a_model_file_is_measured_with_its_own_thresholds() {
        let folder = tempfile::tempdir().unwrap();
        let point = OperatingPoint {
            name: "sensitivity-0.90".to_owned(),
            logit_threshold: -40.5,
            sensitivity: 0.9,
            specificity: 0.1,
        };
        let rule = StudyRule {
            smoothing_slices: 3,
            top_slices: 2,
            logit_threshold: 41.5,
        };
        let (cache, mut model) = prepared(folder.path(), |manifest| {
            manifest.operating_points = vec![point.clone()];
            manifest.temperature = Some(7.0);
            manifest.study_rule = Some(rule);
        });
        let found = evaluate(&mut model, &cache, Part::Test, BY_STUDY, 0).unwrap();
        assert_eq!(found.operating_points, [point]);
        assert_eq!(found.slice.threshold.to_bits(), (-40.5_f32).to_bits());
        assert_eq!(found.temperature.to_bits(), 7.0_f64.to_bits());
        assert_eq!(found.study_rule, rule);
        let card = model_card::text(&found, model.manifest().unwrap());
        assert!(card.contains("positive from logit -40.500"), "{card}");
        write_all(
            &found,
            &cache,
            model.manifest().unwrap(),
            folder.path(),
            folder.path(),
        )
        .unwrap();
        let ending = |name: &str, ending: &str| {
            let text = std::fs::read_to_string(folder.path().join(name)).unwrap();
            assert!(
                text.lines().skip(1).all(|line| line.ends_with(ending)),
                "{text}"
            );
        };
        ending("predictions.csv", &format!(",1,\"{RESEARCH_USE}\""));
        ending("studies.csv", &format!(",0,\"{RESEARCH_USE}\""));
    }

    #[test]
    fn the_card_of_a_file_without_operating_points_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let (cache, mut model) = prepared(folder.path(), |_| ());
        let found = evaluate(&mut model, &cache, Part::Test, BY_STUDY, 0).unwrap();
        let card = model_card::text(&found, model.manifest().unwrap());
        assert!(
            card.contains("The file holds none and decides nothing"),
            "{card}"
        );
    }

    #[test]
    fn a_card_tells_what_was_trained_on_from_what_was_measured_on() {
        let folder = tempfile::tempdir().unwrap();
        let (cache, mut model) = prepared(folder.path(), |manifest| {
            manifest.training_data.kind = DataKind::Rsna;
            manifest.training_data.n_slices = 77;
        });
        let found = evaluate(&mut model, &cache, Part::Test, BY_STUDY, 0).unwrap();
        let card = model_card::text(&found, model.manifest().unwrap());
        assert!(
            card.contains("Trained on the RSNA data set: 0 studies, 77 slices"),
            "{card}"
        );
        assert!(card.contains("**Measured on synthetic data.**"), "{card}");
        assert!(!card.contains("Trained on synthetic"), "{card}");
    }

    #[test]
    fn a_leak_is_told_in_every_table() {
        let folder = tempfile::tempdir().unwrap();
        let (cache, mut model) = prepared(folder.path(), |_| ());
        let by_image = Split {
            by: split::SplitBy::Image,
            seed: 4,
        };
        let found = evaluate(&mut model, &cache, Part::Test, by_image, 0).unwrap();
        let out = folder.path().join("out");
        write_all(&found, &cache, model.manifest().unwrap(), &out, &out).unwrap();
        let mut n_files = 0;
        for entry in std::fs::read_dir(&out).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains("SPLIT BY IMAGE"), "{}", path.display());
            n_files += 1;
        }
        assert_eq!(n_files, 9);
    }

    #[test]
    fn training_data_is_what_the_weights_say_not_what_they_are_measured_on() {
        let folder = tempfile::tempdir().unwrap();
        let (cache, _) = prepared(folder.path(), |_| ());
        let architecture = architecture::find("vanilla").unwrap();
        let mut network = Network::new(architecture, 0.001, 3, &Device::Cpu).unwrap();
        let weights = folder.path().join("model.safetensors");
        let mut told = || {
            network.save(&weights).unwrap();
            let mut model = Predictor::open(&weights).unwrap();
            let found = evaluate(&mut model, &cache, Part::Test, BY_STUDY, 0).unwrap();
            network.provenance = provenance::of_training(BY_STUDY, &cache).unwrap();
            manifest_of(&weights, &found, &cache).unwrap().training_data
        };
        let (silent, trained) = (told(), told());
        assert_eq!((silent.kind, silent.n_slices), (DataKind::None, 0));
        assert_eq!(trained, provenance::training_data(BY_STUDY, &cache));
    }
}
