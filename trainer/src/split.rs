//! Which part a slice belongs to.
//!
//! By study (the default) no patient's slices stand on two sides, because the part follows from a hash of seed and Study
//! Instance UID alone: it does not change when studies are added. By image is the publication's way, kept to reproduce its
//! leak: slices of one patient are trained on and tested on.

use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::index::Part;

/// What is kept together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SplitBy {
    /// All slices of a study.
    Study,
    /// Nothing: slices are drawn one by one. LEAKS between the parts.
    Image,
}

/// A split: what is kept together, and the seed it is drawn with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Split {
    /// What is kept together.
    pub by: SplitBy,
    /// The seed; a split by study is the cache's own whatever it is.
    pub seed: u64,
}

impl Split {
    /// The split in words, of a cache's slices.
    #[must_use]
    pub fn in_words(&self, cache: &Cache) -> String {
        match self.by {
            SplitBy::Study => cache.manifest().split.clone(),
            SplitBy::Image => format!("by image, seed {}: LEAKS", self.seed),
        }
    }
}

impl SplitBy {
    /// [`LEAK_WARNING`] where it applies.
    #[must_use]
    pub fn warning(self) -> Option<&'static str> {
        (self == Self::Image).then_some(LEAK_WARNING)
    }
}

/// Rows of a part, rising: by study as the cache stores it, by image by the seed.
#[must_use]
pub fn rows(cache: &Cache, by: SplitBy, seed: u64, wanted: Part) -> Vec<usize> {
    let rows = cache.rows().iter().enumerate();
    rows.filter(|(_, row)| match by {
        SplitBy::Study => row.part == wanted,
        SplitBy::Image => part(by, seed, row.study_uid.as_str(), row.sop_uid.as_str()) == wanted,
    })
    .map(|(number, _)| number)
    .collect()
}

/// Shares of the parts in percent: 64 train, 16 val, 20 test (the publication's 80/20 of what is not test).
pub const PERCENT_TRAIN_VAL: (u64, u64) = (64, 16);

/// What every output says when slices of one study stand in several parts.
pub const LEAK_WARNING: &str = "SPLIT BY IMAGE: slices of one study stand in several parts; figures are too good (reproduces the publication's leak)";

/// The part of the slice `sop_uid` of the study `study_uid`.
#[must_use]
pub fn part(by: SplitBy, seed: u64, study_uid: &str, sop_uid: &str) -> Part {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(match by {
        SplitBy::Study => study_uid.as_bytes(),
        SplitBy::Image => sop_uid.as_bytes(),
    });
    let mut head = [0; 8];
    head.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    let (train, val) = PERCENT_TRAIN_VAL;
    match u64::from_le_bytes(head) % 100 {
        percent if percent < train => Part::Train,
        percent if percent < train + val => Part::Val,
        _ => Part::Test,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_study_stays_together_and_the_shares_hold() {
        let mut counts = [0; 3];
        for study in 0..2000 {
            let study = format!("1.2.{study}");
            let parts =
                [1, 2, 3].map(|slice| part(SplitBy::Study, 7, &study, &format!("{study}.{slice}")));
            assert!(parts.iter().all(|p| *p == parts[0]));
            counts[parts[0] as usize] += 1;
        }
        for (count, expected) in counts.iter().zip([1280, 320, 400]) {
            assert!(
                (count - expected) * (count - expected) < 100 * 100,
                "{counts:?}"
            );
        }
    }

    #[test]
    fn by_image_a_study_is_torn_apart() {
        let parts: Vec<Part> = (0..100)
            .map(|s| part(SplitBy::Image, 7, "1.2", &format!("1.2.{s}")))
            .collect();
        assert!(parts.contains(&Part::Train) && parts.contains(&Part::Test));
    }
}
