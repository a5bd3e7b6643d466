//! `trainer compare`: the publication's table with ours beside it.
//!
//! In: a cache and names of systems. Out: a run folder for each, and `compare.md` and `compare.json`. Each system is trained on the same data and
//! judged on the same balanced sample of the test part at probability 0.5, as the publication judges. A killed comparison goes on where it was: finished
//! runs are read, the interrupted one is resumed.
//!
//! The publication's positive class is *no PE*: its column index 0 of the folders `no_pe`, `pe_present`. So its recall is printed here in both
//! readings: as printed, and as what it is for embolus, the specificity. Here positive always means PE present.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use shared::RESEARCH_USE;

use crate::architecture::{ARCHITECTURES, Architecture, Family, Published};
use crate::backbone::backbone;
use crate::bootstrap::{Interval, intervals};
use crate::cache::{Cache, write_atomically};
use crate::evaluate;
use crate::exit::{Exit, fault};
use crate::index::Part;
use crate::metrics::{NAMES, Sample, Sorted};
use crate::predict::Predictor;
use crate::split::{self, Split, SplitBy};
use crate::train::{self, TrainOptions};

/// Of the images that the publication drew for training and validation, the share it trained on.
const TRAINED_SHARE: f64 = 0.8;
const RESULT_FILE: &str = "compared.json";

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
    #[arg(long, value_name = "F", default_value_t = 1.0)]
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

/// One row of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Compared {
    /// What must be equal for a finished row to be taken as it is.
    work: String,
    name: String,
    /// Figures by name; empty where the system could not be trained.
    figures: BTreeMap<String, Interval>,
    /// Why there are none.
    reason: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// A name that is none, a cache that cannot be used, a folder that cannot be written.
pub fn run(args: &CompareArgs) -> Result<ExitCode> {
    let systems = systems(&args.models)?;
    let cache = Cache::open(&args.data)?;
    cache.check_digests()?;
    let stop = crate::interrupt::watch().context("waiting for Ctrl-C")?;
    let mut rows = Vec::new();
    for system in systems {
        let Some(row) = compare_one(args, &cache, system, stop)? else {
            let mut stdout = std::io::stdout().lock();
            writeln!(stdout, "stopped; the same command continues")?;
            return Ok(ExitCode::SUCCESS);
        };
        rows.push((system, row));
    }
    let text = table(args, &cache, &rows);
    write_atomically(&args.out.join("compare.md"), text.as_bytes())?;
    let only: Vec<&Compared> = rows.iter().map(|(_, row)| row).collect();
    let json = serde_json::to_string_pretty(&only)?;
    write_atomically(&args.out.join("compare.json"), json.as_bytes())?;
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", if args.json { json } else { text })?;
    Ok(ExitCode::SUCCESS)
}

fn systems(names: &[String]) -> Result<Vec<&'static Architecture>> {
    if names.is_empty() {
        return Ok(ARCHITECTURES.iter().collect());
    }
    let find = |name: &String| {
        crate::architecture::find(name)
            .ok_or_else(|| fault(Exit::Usage, format!("no model {name:?}")))
    };
    names.iter().map(find).collect()
}

/// A row: read where it is finished, else trained; `None` where the user stopped it.
fn compare_one(
    args: &CompareArgs,
    cache: &Cache,
    system: &'static Architecture,
    stop: &std::sync::atomic::AtomicBool,
) -> Result<Option<Compared>> {
    let folder = args.out.join(system.name);
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let work = format!(
        "data {} width {} epochs {:?} batch {} seed {} split {:?} imagenet {:?}",
        cache.digest(),
        args.width,
        args.epochs,
        args.batch,
        args.seed,
        args.split,
        args.imagenet
    );
    let finished = folder.join(RESULT_FILE);
    if let Ok(text) = std::fs::read_to_string(&finished)
        && let Ok(row) = serde_json::from_str::<Compared>(&text)
        && row.work == work
    {
        return Ok(Some(row));
    }
    let row = |mut figures: BTreeMap<String, Interval>, reason: Option<String>| {
        // An undefined figure would be null in JSON and not come back.
        figures.retain(|_, found| {
            [found.value, found.low, found.high]
                .iter()
                .all(|x| x.is_finite())
        });
        Compared {
            work: work.clone(),
            name: system.name.to_owned(),
            figures,
            reason,
        }
    };
    let row = if system.family == Family::Majority {
        row(majority(args, cache), None)
    } else {
        match train_one(args, cache, system, &folder, stop) {
            Ok(None) => return Ok(None),
            Ok(Some(figures)) => row(figures, None),
            // A system that this build or this folder cannot train is a row with a reason; the others go on.
            Err(error) => return Ok(Some(row(BTreeMap::new(), Some(format!("{error:#}"))))),
        }
    };
    write_atomically(&finished, serde_json::to_string_pretty(&row)?.as_bytes())?;
    Ok(Some(row))
}

fn train_one(
    args: &CompareArgs,
    cache: &Cache,
    system: &'static Architecture,
    folder: &Path,
    stop: &std::sync::atomic::AtomicBool,
) -> Result<Option<BTreeMap<String, Interval>>> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of at most 5,000 images"
    )]
    let n_images = (f64::from(system.n_images) * TRAINED_SHARE) as usize;
    let init = match (backbone(system.family, 1.0), &args.imagenet) {
        (Some(backbone), Some(folder)) => {
            Some(folder.join(format!("{}.safetensors", backbone.weights_name)))
        }
        _ => None,
    };
    let options = TrainOptions {
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
        ..TrainOptions::default()
    };
    let summary = train::train_until(&options, cache, folder, stop)?;
    if summary.is_stopped {
        return Ok(None);
    }
    let mut predictor = Predictor::open(&summary.weights)?;
    let split = Split {
        by: args.split,
        seed: args.seed,
    };
    let evaluation = evaluate::evaluate(&mut predictor, cache, Part::Test, split, args.seed)?;
    evaluate::write_all(&evaluation, cache, None, folder)?;
    let mut figures: BTreeMap<String, Interval> = evaluation
        .slice_balanced_half
        .values
        .iter()
        .map(|(name, figure)| ((*name).to_owned(), *figure))
        .collect();
    if let Some(study) = evaluation.study.values.get("auroc") {
        figures.insert("study_auroc".to_owned(), *study);
    }
    Ok(Some(figures))
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
    let names = NAMES.into_iter().map(str::to_owned);
    names.zip(figures).collect()
}

/// The recall of the class that the publication does not call positive, from its accuracy a, recall r and precision p: with n negatives for each
/// positive, r (1 - p) / p of them are false positives, and a (1 + n) = r + n - r (1 - p) / p. NaN where nothing was called positive.
fn other_recall(published: &Published) -> f64 {
    let Published {
        accuracy,
        recall,
        precision,
        ..
    } = *published;
    let n_false = recall * (1.0 - precision) / precision;
    let n_negative = (accuracy - recall + n_false) / (1.0 - accuracy);
    1.0 - n_false / n_negative
}

fn table(args: &CompareArgs, cache: &Cache, rows: &[(&'static Architecture, Compared)]) -> String {
    let mut text = format!(
        "# The publication's table with ours beside it\n\n**{RESEARCH_USE}**\n\n{}; width {}, seed {}; test part, balanced sample, probability 0.5 \
         (row 0: natural prevalence). Positive: embolus present.\n\n",
        cache.manifest().source,
        args.width,
        args.seed
    );
    if let Some(warning) = args.split.warning() {
        _ = writeln!(text, "> {warning}\n");
    }
    text.push_str(
        "| # | system | published accuracy | published recall, as printed | published recall of the other class | published precision, as printed | published F1 | ours: accuracy | ours: sensitivity | ours: specificity | ours: precision | ours: F1 | ours: AUROC | ours: AUROC of studies |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for (system, row) in rows {
        let published = system.published.map_or_else(
            || ["-"; 5].map(str::to_owned),
            |found| {
                let other = other_recall(&found);
                [
                    found.accuracy,
                    found.recall,
                    other,
                    found.precision,
                    found.f1,
                ]
                .map(|value| {
                    if value.is_finite() {
                        format!("{value:.3}")
                    } else {
                        "-".into()
                    }
                })
            },
        );
        // Writing to a String does not fail.
        _ = write!(text, "| {} | {} |", system.row, system.title);
        for value in published {
            _ = write!(text, " {value} |");
        }
        for name in [
            "accuracy",
            "sensitivity",
            "specificity",
            "precision",
            "f1",
            "auroc",
            "study_auroc",
        ] {
            let figure = row
                .figures
                .get(name)
                .map_or_else(|| "-".into(), evaluate::show);
            _ = write!(text, " {figure} |");
        }
        text.push('\n');
    }
    for (system, row) in rows {
        if let Some(reason) = &row.reason {
            _ = writeln!(text, "\n{}: not trained: {reason}", system.name);
        }
    }
    if rows
        .iter()
        .any(|(system, _)| backbone(system.family, 1.0).is_some())
    {
        text.push_str(if args.imagenet.is_some() {
            "\nThe transfer learners have width 1 and begin with ImageNet's weights."
        } else {
            "\nThe transfer learners began with random weights at the width above: nothing was transferred (`--imagenet DIR` gives ImageNet's)."
        });
        text.push_str(
            " The publication says neither their images nor their epochs: 1,000 and 5 here.\n",
        );
    }
    text.push_str(
        "\nThe published recall in both readings: as printed it is the sensitivity for what the publication calls positive. Its positive is column 0 of \
         the folders `no_pe`, `pe_present`, so it is *no PE* (inferred from the folder names): read so, the printed recall is the specificity for embolus, to be compared \
         with our specificity, and the recall of the other class, which follows from the printed figures to about 0.01, with our sensitivity. For the final model the \
         confusion matrix 2207 / 283 / 137 / 2373 then gives a sensitivity for embolus of 2207/2490 = 0.886 and a specificity of 0.945. The publication split by image: slices of one patient stood on both sides.\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recall_of_the_other_class_follows_from_the_printed_figures() {
        let published = |name| crate::architecture::find(name).unwrap().published.unwrap();
        // Of the confusion matrix 2207 / 283 / 137 / 2373.
        let found = other_recall(&published("final"));
        assert!((found - 2207.0 / 2490.0).abs() < 0.005, "{found}");
        assert!(other_recall(&published("baseline")).is_nan());
    }

    #[test]
    fn without_names_every_row_is_compared_and_a_wrong_name_is_refused() {
        assert_eq!(systems(&[]).unwrap().len(), ARCHITECTURES.len());
        let error = systems(&["Final".to_owned()]).unwrap_err();
        assert_eq!(crate::exit::code_of(&error), Exit::Usage);
    }
}
