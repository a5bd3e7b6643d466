//! `trainer compare`: the publication's table with ours beside it.
//!
//! In: a cache and names of systems. Out: a run folder for each, and `compare.md` and `compare.json`. Each system is trained on the same data and
//! judged on the same balanced sample of the test part at probability 0.5, as the publication judges. A killed comparison goes on where it was: finished
//! runs are read, the interrupted one is resumed. `compare.toml` says what the folder's rows have in common; a call with other settings is refused,
//! and one with other systems adds its rows to those that are finished.
//!
//! The publication's positive class is *no PE*: its column index 0 of the folders `no_pe`, `pe_present`. So its recall is printed here in both
//! readings: as printed, and as what it is for embolus, the specificity. Here positive always means PE present.

mod table;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use shared::RESEARCH_USE;

use self::table::table;
use crate::architecture::{self, ARCHITECTURES, Architecture, Family};
use crate::backbone::backbone;
use crate::bootstrap::{Interval, intervals};
use crate::cache::{Cache, file_digest, make_folder, refuse_as_output, write_atomically};
use crate::claim::claim;
use crate::evaluate;
use crate::exit::{Exit, fault};
use crate::index::Part;
use crate::metrics::{NAMES, Sample, Sorted};
use crate::predict::Predictor;
use crate::split::{self, Split, SplitBy};
use crate::train::{self, Diverged, Precision, Processor, TrainOptions};

/// Of the images that the publication drew for training and validation, the share it trained on.
const TRAINED_SHARE: f64 = 0.8;
const RESULT_FILE: &str = "compared.json";
const CONFIG_FILE: &str = "compare.toml";

/// Arguments of `trainer compare`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Example:\n  trainer compare --data cache --models baseline,adam,final --width 0.0625 --epochs 2 --out runs/compare"
)]
pub struct CompareArgs {
    /// Cache folder
    #[arg(long, value_name = "CACHE")]
    pub data: PathBuf,
    /// Systems; all rows of the table where absent
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub models: Vec<String>,
    /// Factor on the units of every convolution and hidden dense layer
    #[arg(long, value_name = "F", default_value_t = 1.0, value_parser = architecture::parse_width)]
    pub width: f64,
    /// Passes over the training part; the publication's where absent
    #[arg(long, value_name = "N")]
    pub epochs: Option<u32>,
    /// Images in a step
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub batch: usize,
    /// Seed of weights, samples and bootstrap
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub seed: u64,
    /// `image` reproduces the publication's leakage
    #[arg(long, value_enum, default_value_t = SplitBy::Study)]
    pub split: SplitBy,
    /// Folder with ImageNet weights in torchvision's naming, `resnet50.safetensors` and `inception_v3.safetensors`; the transfer learners
    /// then have width 1. Without it they learn from random weights at `--width`
    #[arg(long, value_name = "DIR")]
    pub imagenet: Option<PathBuf>,
    /// Folder of the runs and the table
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

/// What all rows of a folder have in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Config {
    /// Digest of the cache.
    data: String,
    width: f64,
    /// The publication's where absent.
    epochs: Option<u32>,
    batch: usize,
    seed: u64,
    split: SplitBy,
    /// Whether the transfer learners begin with ImageNet's weights.
    imagenet: bool,
}

/// One row of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Compared {
    name: String,
    /// Digest of the ImageNet weights that it began with.
    imagenet: Option<String>,
    /// Images trained on, and whole epochs.
    trained: Option<(usize, u32)>,
    /// What its evaluation warns of.
    warnings: Vec<String>,
    /// Figures by name; empty where training failed.
    figures: BTreeMap<String, Interval>,
    /// Why there are none.
    reason: Option<String>,
}

/// `compare.json`.
#[derive(Debug, Serialize)]
struct Comparison<'a> {
    /// [`RESEARCH_USE`].
    notice: &'static str,
    /// The leakage warning, where the split was by image.
    leak: Option<&'static str>,
    rows: Vec<&'a Compared>,
}

/// Runs the command.
///
/// # Errors
/// A name that is none, options out of range, a cache that cannot be used, a folder that cannot be written or holds another comparison.
pub fn run(args: &CompareArgs) -> Result<ExitCode> {
    let systems = systems(&args.models)?;
    for system in systems.iter().filter(|s| s.family != Family::Majority) {
        train::checked(&options(args, system))?;
        if let Some(missing) = imagenet_file(args, system).filter(|file| !file.exists()) {
            let name = system.name;
            let message = format!("{} is not there; {name} begins with it", missing.display());
            return Err(fault(Exit::Usage, message));
        }
    }
    let cache = Cache::open(&args.data)?;
    cache.check_digests()?;
    take(&args.out, &config(args, &cache))?;
    let _claim = claim(&args.out)?;
    let stop = crate::interrupt::watch().context("waiting for Ctrl-C")?;
    for system in systems {
        if !is_finished(args, &cache, system, stop)? {
            let mut stdout = std::io::stdout().lock();
            writeln!(stdout, "stopped; the same command continues")?;
            return Ok(ExitCode::SUCCESS);
        }
    }
    let mut rows = Vec::new();
    for system in ARCHITECTURES {
        rows.extend(row(&args.out, system)?.map(|row| (system, row)));
    }
    let text = table(args, &cache.manifest().source, &rows);
    write_atomically(&args.out.join("compare.md"), text.as_bytes())?;
    let json = serde_json::to_string_pretty(&Comparison {
        notice: RESEARCH_USE,
        leak: args.split.warning(),
        rows: rows.iter().map(|(_, row)| row).collect(),
    })?;
    write_atomically(&args.out.join("compare.json"), json.as_bytes())?;
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", if args.json { json } else { text })?;
    Ok(ExitCode::SUCCESS)
}

fn systems(names: &[String]) -> Result<Vec<&'static Architecture>> {
    if names.is_empty() {
        return Ok(ARCHITECTURES.iter().collect());
    }
    names.iter().map(|name| architecture::named(name)).collect()
}

/// Where ImageNet's weights of a transfer learner lie.
fn imagenet_file(args: &CompareArgs, system: &Architecture) -> Option<PathBuf> {
    let backbone = backbone(system.family, 1.0)?;
    let folder = args.imagenet.as_ref()?;
    Some(folder.join(format!("{}.safetensors", backbone.weights_name)))
}

fn config(args: &CompareArgs, cache: &Cache) -> Config {
    Config {
        data: cache.digest(),
        width: args.width,
        epochs: args.epochs,
        batch: args.batch,
        seed: args.seed,
        split: args.split,
        imagenet: args.imagenet.is_some(),
    }
}

/// Makes the folder one of this comparison, or finds that it is.
fn take(out: &Path, config: &Config) -> Result<()> {
    refuse_as_output(out)?;
    let path = out.join(CONFIG_FILE);
    let text = toml::to_string(config)?;
    match std::fs::read_to_string(&path) {
        Ok(found) if found == text => Ok(()),
        Ok(found) => Err(fault(
            Exit::CannotWrite,
            format!(
                "{} holds a comparison with other settings ({}); give them again, or another --out",
                out.display(),
                other_lines(&found, &text)
            ),
        )),
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("reading {}", path.display()))
        }
        Err(_) if has_rows(out) => Err(fault(
            Exit::CannotWrite,
            format!(
                "{} holds rows without {CONFIG_FILE}, so that nobody knows their settings; give another --out",
                out.display()
            ),
        )),
        Err(_) => {
            make_folder(out)?;
            write_atomically(&path, text.as_bytes())
        }
    }
}

fn has_rows(out: &Path) -> bool {
    let mut files = ARCHITECTURES
        .iter()
        .map(|system| out.join(system.name).join(RESULT_FILE));
    files.any(|file| file.exists())
}

/// The lines that are not in the other text.
fn other_lines(found: &str, wanted: &str) -> String {
    let others = found
        .lines()
        .filter(|line| !wanted.lines().any(|w| w == *line));
    others.collect::<Vec<_>>().join(", ")
}

/// A system's row, where it is finished.
fn row(out: &Path, system: &Architecture) -> Result<Option<Compared>> {
    let path = out.join(system.name).join(RESULT_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let context = || format!("reading {}", path.display());
    let text = std::fs::read_to_string(&path).with_context(context)?;
    serde_json::from_str(&text).with_context(context)
}

/// Makes a system's row where it is not there; false where the user stopped it.
fn is_finished(
    args: &CompareArgs,
    cache: &Cache,
    system: &'static Architecture,
    stop: &AtomicBool,
) -> Result<bool> {
    let folder = args.out.join(system.name);
    let imagenet = imagenet_file(args, system);
    let imagenet = imagenet.as_deref().map(file_digest).transpose()?;
    if let Some(row) = row(&args.out, system)? {
        return if row.imagenet == imagenet {
            Ok(true)
        } else {
            Err(fault(
                Exit::CannotWrite,
                format!(
                    "{} began with other ImageNet weights; give another --out",
                    folder.display()
                ),
            ))
        };
    }
    make_folder(&folder)?;
    let mut row = Compared {
        name: system.name.to_owned(),
        imagenet,
        trained: None,
        warnings: Vec::new(),
        figures: BTreeMap::new(),
        reason: None,
    };
    if system.family == Family::Majority {
        row.figures = majority(args, cache);
    } else {
        match train_one(args, cache, system, &folder, stop, &mut row) {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            // A row without figures, which the same command would find again; any other fault ends the comparison.
            Err(error) if error.is::<Diverged>() => row.reason = Some(format!("{error:#}")),
            Err(error) => return Err(error.context(system.name)),
        }
    }
    write_atomically(
        &folder.join(RESULT_FILE),
        serde_json::to_string_pretty(&row)?.as_bytes(),
    )?;
    Ok(true)
}

fn options(args: &CompareArgs, system: &Architecture) -> TrainOptions {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of at most 5,000 images"
    )]
    let n_images = (f64::from(system.n_images) * TRAINED_SHARE) as usize;
    let init = imagenet_file(args, system);
    TrainOptions {
        model: system.name.to_owned(),
        width: if init.is_some() { 1.0 } else { args.width },
        random_init: init.is_none(),
        init,
        epochs: args.epochs,
        batch: args.batch,
        seed: args.seed,
        split: args.split,
        images: (n_images > 0).then_some(n_images),
        resume: true,
        processor: Processor::here(Precision::default()),
        ..TrainOptions::default()
    }
}

fn train_one(
    args: &CompareArgs,
    cache: &Cache,
    system: &'static Architecture,
    folder: &Path,
    stop: &AtomicBool,
    row: &mut Compared,
) -> Result<bool> {
    let summary = train::train_until(&options(args, system), cache, folder, stop)?;
    if summary.is_stopped {
        return Ok(false);
    }
    row.trained = Some((summary.n_train.0 + summary.n_train.1, summary.epochs));
    let mut predictor = Predictor::open(&summary.weights)?;
    let split = Split {
        by: args.split,
        seed: args.seed,
    };
    let evaluation = evaluate::evaluate(&mut predictor, cache, Part::Test, split, args.seed)?;
    let manifest = evaluate::manifest_of(&summary.weights, &evaluation, cache)?;
    evaluate::write_all(&evaluation, cache, &manifest, folder, folder)?;
    evaluate::write_manifest(&manifest, folder)?;
    row.figures = evaluation
        .slice_balanced_half
        .values
        .iter()
        .map(|(name, figure)| ((*name).to_owned(), *figure))
        .collect();
    if let Some(study) = evaluation.study.values.get("auroc") {
        row.figures.insert("study_auroc".to_owned(), *study);
    }
    row.warnings = evaluation.warnings;
    Ok(true)
}

/// "No PE" to every slice of the test part, at natural prevalence as the publication counts it.
fn majority(args: &CompareArgs, cache: &Cache) -> BTreeMap<String, Interval> {
    let mut numbers = BTreeMap::new();
    let samples = split::rows(cache, args.split, args.seed, Part::Test)
        .into_iter()
        .map(|row| {
            let row = &cache.rows()[row];
            let next = numbers.len();
            Sample {
                logit: -1.0,
                pe_present: row.pe_present,
                study: *numbers.entry(row.study_uid.as_str()).or_insert(next),
            }
        })
        .collect();
    let figures = intervals(&Sorted::new(samples), 0.0, args.seed);
    let known = ["sensitivity", "specificity", "f1", "auroc"];
    let named = NAMES.into_iter().zip(figures).map(|(name, figure)| {
        // These follow from the answer alone, whatever studies there are.
        let figure = if known.contains(&name) {
            Interval {
                low: figure.value,
                high: figure.value,
                ..figure
            }
        } else {
            figure
        };
        (name.to_owned(), figure)
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(folder: &Path, models: &[&str]) -> CompareArgs {
        CompareArgs {
            data: folder.join("cache"),
            models: models.iter().map(|&name| name.to_owned()).collect(),
            width: 0.001,
            epochs: Some(1),
            batch: 16,
            seed: 1,
            split: SplitBy::Study,
            imagenet: None,
            out: folder.join("compare"),
            json: false,
        }
    }

    fn prepared() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let source = crate::source::Source::phantom(24, 4, 6, 64, false);
        let spec = shared::spec::PreprocessSpec::default();
        let out = folder.path().join("cache");
        crate::prepare::prepare(&source, &spec, 4, None, &out).unwrap();
        folder
    }

    fn names_in_table(folder: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(folder.join("compare/compare.json")).unwrap();
        let found: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(found["notice"], RESEARCH_USE);
        let rows = found["rows"].as_array().unwrap();
        let name = |row: &serde_json::Value| row["name"].as_str().unwrap().to_owned();
        rows.iter().map(name).collect()
    }

    #[test]
    fn another_call_adds_its_rows_and_one_with_other_settings_is_refused() {
        let folder = prepared();
        let folder = folder.path();
        run(&args(folder, &["vanilla", "baseline"])).unwrap();
        assert_eq!(names_in_table(folder), ["baseline", "vanilla"]);
        let weights = folder.join("compare/vanilla/model.safetensors");
        let before = std::fs::read(&weights).unwrap();
        run(&args(folder, &["final"])).unwrap();
        assert_eq!(names_in_table(folder), ["baseline", "vanilla", "final"]);
        let other = CompareArgs {
            seed: 2,
            ..args(folder, &["vanilla"])
        };
        let error = run(&other).unwrap_err();
        assert_eq!(crate::exit::code_of(&error), Exit::CannotWrite);
        assert!(error.to_string().contains("seed = 1"), "{error}");
        assert_eq!(names_in_table(folder), ["baseline", "vanilla", "final"]);
        assert!(std::fs::read(&weights).unwrap() == before);
    }

    #[test]
    fn settings_that_cannot_be_read_are_not_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path();
        let config = Config {
            data: "0".repeat(64),
            width: 1.0,
            epochs: None,
            batch: 50,
            seed: 1,
            split: SplitBy::Study,
            imagenet: false,
        };
        let path = out.join(CONFIG_FILE);
        std::fs::write(&path, [0xff]).unwrap();
        let error = take(out, &config).unwrap_err();
        assert!(format!("{error:#}").contains("reading "), "{error:#}");
        assert_eq!(std::fs::read(&path).unwrap(), [0xff]);
        std::fs::remove_file(&path).unwrap();
        let row = out.join("vanilla");
        std::fs::create_dir(&row).unwrap();
        std::fs::write(row.join(RESULT_FILE), "{}").unwrap();
        let error = take(out, &config).unwrap_err();
        assert_eq!(crate::exit::code_of(&error), Exit::CannotWrite);
        assert!(!path.exists());
        std::fs::remove_file(row.join(RESULT_FILE)).unwrap();
        take(out, &config).unwrap();
        take(out, &config).unwrap();
    }

    #[test]
    fn wrong_options_are_an_error_and_no_row() {
        let folder = prepared();
        let folder = folder.path();
        for wrong in [
            CompareArgs {
                batch: 0,
                ..args(folder, &["vanilla"])
            },
            CompareArgs {
                width: 0.0,
                ..args(folder, &["vanilla"])
            },
            CompareArgs {
                imagenet: Some(folder.join("none")),
                ..args(folder, &["resnet50"])
            },
        ] {
            let error = run(&wrong).unwrap_err();
            assert_eq!(crate::exit::code_of(&error), Exit::Usage, "{error:#}");
            assert!(!folder.join("compare").exists());
        }
    }

    #[test]
    fn without_names_every_row_is_compared_and_a_wrong_name_is_refused() {
        assert_eq!(systems(&[]).unwrap().len(), ARCHITECTURES.len());
        let error = systems(&["Final".to_owned()]).unwrap_err();
        assert_eq!(crate::exit::code_of(&error), Exit::Usage);
    }
}
