//! How a model's weights came about: the split it was trained with, on which data, preprocessed how.
//!
//! In: what `train` knows. Out: entries of a weights file's metadata and of a model file's `tools`, from which `evaluate` takes the
//! split, so that slices that were trained on are never measured on unawares. Files from before say nothing, and the caller decides.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use shared::manifest::{Manifest, TrainingData};

use crate::cache::Cache;
use crate::exit::{Exit, fault};
use crate::index::Part;
use crate::split::{self, Split, SplitBy};

/// `study` or `image`.
const SPLIT: &str = "split";
/// The seed that the split was drawn with.
const SPLIT_SEED: &str = "split_seed";
/// Digest of the cache that was trained on.
const DATA: &str = "data_digest";
/// The same with kind and counts, as JSON.
const TRAINING_DATA: &str = "training_data";
/// BLAKE3 of the weights file that a manifest was written for.
pub const WEIGHTS: &str = "weights_blake3";
/// The preprocessing as JSON.
const PREPROCESS: &str = "preprocess";

/// What a run that trains on `cache` writes beside its weights.
///
/// # Errors
/// The preprocessing cannot be written as JSON.
pub fn of_training(split: Split, cache: &Cache) -> Result<BTreeMap<String, String>> {
    let mut entries = of_split(split);
    entries.insert(DATA.to_owned(), cache.digest());
    entries.insert(
        TRAINING_DATA.to_owned(),
        serde_json::to_string(&training_data(split, cache))?,
    );
    entries.insert(
        PREPROCESS.to_owned(),
        serde_json::to_string(&cache.manifest().preprocess)?,
    );
    Ok(entries)
}

/// The training part of `cache`.
#[must_use]
pub fn training_data(split: Split, cache: &Cache) -> TrainingData {
    let trained = split::rows(cache, split.by, split.seed, Part::Train);
    let studies: BTreeSet<&str> = trained
        .iter()
        .map(|&row| cache.rows()[row].study_uid.as_str())
        .collect();
    TrainingData {
        kind: cache.manifest().kind,
        digest: cache.digest(),
        n_studies: studies.len() as u64,
        n_slices: trained.len() as u64,
    }
}

/// The split alone.
#[must_use]
pub fn of_split(split: Split) -> BTreeMap<String, String> {
    let by = match split.by {
        SplitBy::Study => "study",
        SplitBy::Image => "image",
    };
    BTreeMap::from([
        (SPLIT.to_owned(), by.to_owned()),
        (SPLIT_SEED.to_owned(), split.seed.to_string()),
    ])
}

/// Says in a model's manifest what is known of its weights' training: preprocessing, data and split.
///
/// # Errors
/// An entry cannot be read.
pub fn tell(known: &BTreeMap<String, String>, manifest: &mut Manifest) -> Result<()> {
    if let Some(preprocess) = known.get(PREPROCESS) {
        manifest.preprocess =
            serde_json::from_str(preprocess).context("the preprocessing of the weights")?;
    }
    if let Some(data) = known.get(TRAINING_DATA) {
        manifest.training_data =
            serde_json::from_str(data).context("the training data of the weights")?;
    }
    // By study is what a file that says nothing means.
    let split = split(known, None, 0)?;
    if split.by == SplitBy::Image {
        manifest.tools.extend(of_split(split));
    }
    Ok(())
}

/// The split to measure with: the one the model was trained with, or `asked` where nothing is known of that.
///
/// # Errors
/// Another one is asked for, or the entry cannot be read.
pub fn split(known: &BTreeMap<String, String>, asked: Option<SplitBy>, seed: u64) -> Result<Split> {
    let Some(name) = known.get(SPLIT) else {
        let by = asked.unwrap_or(SplitBy::Study);
        return Ok(Split { by, seed });
    };
    let by = SplitBy::from_str(name, false)
        .map_err(anyhow::Error::msg)
        .context("the model's split")?;
    if asked.is_some_and(|asked| asked != by) {
        return Err(fault(
            Exit::Usage,
            format!("the model was trained with --split {name}; leave --split out"),
        ));
    }
    let seed = known
        .get(SPLIT_SEED)
        .context("the model's split has no seed")?;
    let seed = seed.parse().context("the seed of the model's split")?;
    Ok(Split { by, seed })
}

/// Whether the model is known to have been trained on other data than `cache`.
#[must_use]
pub fn is_of_other_data(known: &BTreeMap<String, String>, cache: &Cache) -> bool {
    known
        .get(DATA)
        .is_some_and(|digest| *digest != cache.digest())
}

/// Holds the model's preprocessing to the cache's.
///
/// # Errors
/// They differ.
pub fn check_preprocess(known: &BTreeMap<String, String>, cache: &Cache) -> Result<()> {
    let Some(wanted) = known.get(PREPROCESS) else {
        return Ok(());
    };
    let found = serde_json::to_string(&cache.manifest().preprocess)?;
    ensure!(
        *wanted == found,
        "the model was trained on slices prepared with {wanted}, the cache was made with {found}: prepare it as the model's data was"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_is_the_one_of_training() {
        let image = Split {
            by: SplitBy::Image,
            seed: 7,
        };
        let known = of_split(image);
        assert_eq!(split(&known, None, 0).unwrap(), image);
        assert_eq!(split(&known, Some(SplitBy::Image), 0).unwrap(), image);
        assert!(split(&known, Some(SplitBy::Study), 0).is_err());
    }

    #[test]
    fn split_is_asked_for_where_the_file_says_nothing() {
        let nothing = BTreeMap::new();
        let by = |asked| split(&nothing, asked, 3).unwrap();
        assert_eq!(by(None).by, SplitBy::Study);
        let asked = by(Some(SplitBy::Image));
        assert_eq!((asked.by, asked.seed), (SplitBy::Image, 3));
    }
}
