//! What there is to prepare: a source's studies and slices with their labels, listed but not yet decoded.
//!
//! In: an RSNA tree of DICOM with `train.csv`, the 256x256 JPEG copy with the same `train.csv`, two folders `no_pe` and
//! `pe_present` of images or DICOM, or a phantom's numbers. Out: a [`Source`] of [`Unit`]s in a fixed order; a unit is what is decoded,
//! written and, after a kill, resumed as a whole. Decoding is left to [`crate::prepare`].

mod train_csv;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use shared::manifest::DataKind;
use shared::uid::Uid;

use self::train_csv::read_train_csv;
use crate::cache::LeftOut;
use crate::index::EXAM_LABELS;

/// Exam labels in the order of [`EXAM_LABELS`].
pub type Labels = [bool; EXAM_LABELS.len()];

/// Files of a unit of the two-folder source, which has no studies.
const FOLDER_UNIT: usize = 64;

/// Where slices come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Origin {
    /// `[train/]<Study>/<Series>/<SOP>.dcm` below the folder.
    Rsna(PathBuf),
    /// `[train-jpegs/]<Study>/<Series>/NNNN_<SOP>.jpg` below the folder.
    Jpeg(PathBuf),
    /// `no_pe/*` and `pe_present/*` below the folder.
    Folders(PathBuf),
    /// Painted: nothing is read.
    Phantom {
        /// Seed.
        seed: u64,
        /// Slices of a study.
        n_slices: u32,
        /// Rows and columns of a slice.
        matrix: u16,
        /// Whether most of what a small training run does not need is left unpainted: see [`NEGATIVES_KEPT`] and [`HELD_OUT_KEPT`].
        is_thin: bool,
    },
}

/// Of the negative slices of a thin phantom's training studies one in this many is painted, beside each positive slice's twin without the embolus.
pub const NEGATIVES_KEPT: u64 = 24;
/// Of a thin phantom's studies for validation and test one in this many is painted, whole.
pub const HELD_OUT_KEPT: u64 = 5;

/// One slice that the source lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// SOP Instance UID as the source writes it, or the file's path below the folder.
    pub name: Box<str>,
    /// Whether an embolus is visible.
    pub pe_present: bool,
}

/// Slices that are prepared together: a series, or some files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Study as the source writes it; empty where the source has none.
    pub study: Box<str>,
    /// Series as the source writes it; empty where the source has none.
    pub series: Box<str>,
    /// Labels of the exam.
    pub labels: Option<Labels>,
    /// The slices. A phantom's are known when they are painted: there it is empty.
    pub slices: Vec<Listed>,
    /// What the list itself says wrongly, with its reason.
    pub left_out: Vec<LeftOut>,
}

/// A listed source.
#[derive(Clone, Debug)]
pub struct Source {
    /// Where from.
    pub origin: Origin,
    /// Units in the order of the cache.
    pub units: Vec<Unit>,
}

impl Source {
    /// Lists an RSNA tree. Only `train.csv` is read: a file that is missing is found when it is decoded.
    ///
    /// # Errors
    /// `train.csv` is missing, lacks a column, or holds a value that is none.
    pub fn rsna(folder: &Path) -> Result<Self> {
        let below = folder.join("train");
        Ok(Self {
            origin: Origin::Rsna(if below.is_dir() { below } else { folder.into() }),
            units: read_train_csv(&folder.join("train.csv"))?,
        })
    }

    /// Lists the JPEG copy, whose labels stand in the same `train.csv`.
    ///
    /// # Errors
    /// As [`Source::rsna`].
    pub fn jpeg(folder: &Path) -> Result<Self> {
        let below = folder.join("train-jpegs");
        Ok(Self {
            origin: Origin::Jpeg(if below.is_dir() { below } else { folder.into() }),
            units: read_train_csv(&folder.join("train.csv"))?,
        })
    }

    /// Lists the files of `no_pe` and `pe_present`, in order of their names.
    ///
    /// # Errors
    /// One of the folders is missing or empty, or a link leads to a folder that was listed already.
    pub fn folders(folder: &Path) -> Result<Self> {
        let (mut units, mut listed) = (Vec::new(), HashSet::new());
        for (name, pe_present) in [("no_pe", false), ("pe_present", true)] {
            let mut files = Vec::new();
            walk(&folder.join(name), name, &mut files, &mut listed)?;
            ensure!(
                !files.is_empty(),
                "{} holds no file",
                folder.join(name).display()
            );
            files.sort();
            for names in files.chunks(FOLDER_UNIT) {
                units.push(Unit {
                    study: "".into(),
                    series: "".into(),
                    labels: None,
                    slices: names
                        .iter()
                        .map(|name| Listed {
                            name: name.as_str().into(),
                            pe_present,
                        })
                        .collect(),
                    left_out: Vec::new(),
                });
            }
        }
        Ok(Self {
            origin: Origin::Folders(folder.into()),
            units,
        })
    }

    /// A phantom's studies 0 to `n_studies` of a seed.
    #[must_use]
    pub fn phantom(n_studies: u32, seed: u64, n_slices: u32, matrix: u16, is_thin: bool) -> Self {
        let unit = Unit {
            study: "".into(),
            series: "".into(),
            labels: None,
            slices: Vec::new(),
            left_out: Vec::new(),
        };
        Self {
            origin: Origin::Phantom {
                seed,
                n_slices,
                matrix,
                is_thin,
            },
            units: vec![unit; n_studies as usize],
        }
    }

    /// Kind of data.
    #[must_use]
    pub const fn kind(&self) -> DataKind {
        match self.origin {
            Origin::Rsna(_) => DataKind::Rsna,
            Origin::Jpeg(_) => DataKind::Jpeg,
            Origin::Folders(_) => DataKind::Folders,
            Origin::Phantom { .. } => DataKind::Phantom,
        }
    }

    /// The source in words, without a path.
    #[must_use]
    pub fn description(&self) -> String {
        match self.origin {
            Origin::Rsna(_) => "RSNA tree of DICOM files with train.csv".into(),
            Origin::Jpeg(_) => "256x256 JPEG copy of the RSNA data with train.csv".into(),
            Origin::Folders(_) => {
                "two folders, no_pe and pe_present; patients are unknown, so each image file counts as a study of its own".into()
            }
            Origin::Phantom {
                seed,
                n_slices,
                matrix,
                is_thin,
            } => format!(
                "phantom: {} synthetic studies of {n_slices} slices, {matrix} x {matrix}, seed {seed}{}",
                self.units.len(),
                if is_thin {
                    format!("; thinned: of the training part all positive slices, the same slices without the embolus, and one negative in {NEGATIVES_KEPT}, of the other parts one study in {HELD_OUT_KEPT}, whole")
                } else {
                    String::new()
                }
            ),
        }
    }

    /// Slices listed.
    #[must_use]
    pub fn n_slices(&self) -> u64 {
        match self.origin {
            Origin::Phantom { n_slices, .. } => self.units.len() as u64 * u64::from(n_slices),
            _ => self.units.iter().map(|unit| unit.slices.len() as u64).sum(),
        }
    }

    /// BLAKE3 of names and labels, hexadecimal: two listings of the same work agree in it.
    #[must_use]
    pub fn listing_digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.description().as_bytes());
        for unit in &self.units {
            for text in [&unit.study, &unit.series] {
                hasher.update(text.as_bytes()).update(b"\n");
            }
            let labels = unit.labels.unwrap_or_default().map(u8::from);
            hasher.update(&labels);
            for slice in &unit.slices {
                hasher
                    .update(slice.name.as_bytes())
                    .update(&[u8::from(slice.pe_present)]);
            }
            for left_out in &unit.left_out {
                for text in [&left_out.file, &left_out.reason] {
                    hasher.update(text.as_bytes()).update(b"\n");
                }
            }
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// A unique identifier for what the source calls `text`: `text` itself where it is one, else `2.25.<number>` (PS3.5 B.2) with
/// the first 16 bytes, little endian, of BLAKE3(`text`). The RSNA data set's identifiers are hexadecimal words.
///
/// # Panics
/// Never: such a number has at most 39 digits.
#[must_use]
pub fn identifier(text: &str) -> Uid {
    if let Ok(uid) = Uid::new(text) {
        return uid;
    }
    let digest = blake3::hash(text.as_bytes());
    let number = digest
        .as_bytes()
        .iter()
        .take(16)
        .rev()
        .fold(0_u128, |number, &byte| (number << 8) | u128::from(byte));
    Uid::new(&format!("2.25.{number}")).expect("at most 39 digits after 2.25.")
}

/// Lists files below `folder`. `listed` are the folders that were: a link back would count files again, and under the other label.
fn walk(
    folder: &Path,
    below: &str,
    files: &mut Vec<String>,
    listed: &mut HashSet<PathBuf>,
) -> Result<()> {
    let context = || format!("reading {}", folder.display());
    let entries = std::fs::read_dir(folder).with_context(context)?;
    ensure!(
        listed.insert(folder.canonicalize().with_context(context)?),
        "{}: a link leads to a folder that was listed already; remove the link",
        folder.display()
    );
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else {
            bail!(
                "{}: the name is not UTF-8; rename the file",
                entry.path().display()
            );
        };
        let name_below = format!("{below}/{name}");
        if entry.path().is_dir() {
            walk(&entry.path(), &name_below, files, listed)?;
        } else if !name.starts_with('.') {
            files.push(name_below);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_to_a_listed_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["no_pe", "pe_present"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            std::fs::write(folder.path().join(name).join("a.jpg"), name).unwrap();
        }
        assert_eq!(Source::folders(folder.path()).unwrap().n_slices(), 2);
        std::os::unix::fs::symlink(folder.path(), folder.path().join("no_pe/b")).unwrap();
        let error = Source::folders(folder.path()).unwrap_err().to_string();
        assert!(error.contains("listed already"), "{error}");
    }

    #[test]
    fn a_hexadecimal_word_becomes_a_uid() {
        assert_eq!(identifier("1.2.3").as_str(), "1.2.3");
        assert!(identifier("6897fa9de148").as_str().starts_with("2.25."));
        assert_ne!(identifier("6897fa9de148"), identifier("6897fa9de149"));
    }
}
