//! What there is to prepare: a source's studies and slices with their labels, listed but not yet decoded.
//!
//! In: an RSNA tree of DICOM with `train.csv`, the 256x256 JPEG copy with the same `train.csv`, two folders `no_pe` and
//! `pe_present` of images or DICOM, or a phantom's numbers. Out: a [`Source`] of [`Unit`]s in a fixed order; a unit is what is decoded,
//! written and, after a kill, resumed as a whole. Columns of `train.csv` are found by name. Decoding is left to [`crate::prepare`].

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use shared::manifest::DataKind;
use shared::uid::Uid;

use crate::cache::LeftOut;
use crate::exit::{Exit, fault};
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
    /// One of the folders is missing or empty.
    pub fn folders(folder: &Path) -> Result<Self> {
        let mut units = Vec::new();
        for (name, pe_present) in [("no_pe", false), ("pe_present", true)] {
            let mut files = Vec::new();
            walk(&folder.join(name), name, &mut files)?;
            ensure!(!files.is_empty(), "{name} holds no file");
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

fn walk(folder: &Path, below: &str, files: &mut Vec<String>) -> Result<()> {
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
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
            walk(&entry.path(), &name_below, files)?;
        } else if !name.starts_with('.') {
            files.push(name_below);
        }
    }
    Ok(())
}

/// The series of `train.csv`, in order of study and series; slices in the file's order.
fn read_train_csv(path: &Path) -> Result<Vec<Unit>> {
    let file = File::open(path).map_err(|error| {
        fault(
            Exit::BadData,
            format!("{}: {error}; the labels stand in it", path.display()),
        )
    })?;
    let mut reader = csv::ReaderBuilder::new()
        .buffer_capacity(1 << 20)
        .from_reader(file);
    let header = reader.headers()?.clone();
    let column = |name: &str| {
        header
            .iter()
            .position(|found| found.trim().eq_ignore_ascii_case(name))
            .with_context(|| format!("{} has no column {name}", path.display()))
    };
    let study = column("StudyInstanceUID")?;
    let series = column("SeriesInstanceUID")?;
    let sop = column("SOPInstanceUID")?;
    let present = column("pe_present_on_image")?;
    let label_columns: Vec<usize> = EXAM_LABELS
        .iter()
        .map(|name| column(name))
        .collect::<Result<_>>()?;
    let mut units: Vec<Unit> = Vec::new();
    let mut unit_of: HashMap<Box<[u8]>, usize> = HashMap::new();
    let mut current = None;
    let mut record = csv::ByteRecord::new();
    let mut key = Vec::new();
    while reader.read_byte_record(&mut record)? {
        let line = record.position().map_or(0, csv::Position::line);
        let place = || format!("{} line {line}", path.display());
        let field = |index: usize| record.get(index).unwrap_or_default();
        key.clear();
        key.extend_from_slice(field(study));
        key.push(b'/');
        key.extend_from_slice(field(series));
        let is_current = current.is_some_and(|index: usize| {
            let unit: &Unit = &units[index];
            unit.study.as_bytes() == field(study) && unit.series.as_bytes() == field(series)
        });
        let mut labels = Labels::default();
        for (label, &index) in labels.iter_mut().zip(&label_columns) {
            *label = flag(field(index)).with_context(place)?;
        }
        if !is_current {
            let next = units.len();
            let index = *unit_of.entry(key.as_slice().into()).or_insert(next);
            if index == next {
                units.push(Unit {
                    study: name(field(study)).with_context(place)?,
                    series: name(field(series)).with_context(place)?,
                    labels: Some(labels),
                    slices: Vec::new(),
                    left_out: Vec::new(),
                });
            }
            current = Some(index);
        }
        let slice = Listed {
            name: name(field(sop)).with_context(place)?,
            pe_present: flag(field(present)).with_context(place)?,
        };
        if let Some(index) = current {
            ensure!(
                units[index].labels == Some(labels),
                "{}: the exam's labels contradict those of the series' first line",
                place()
            );
            units[index].slices.push(slice);
        }
    }
    units.iter_mut().for_each(settle_repeats);
    units.sort_by(|a, b| (&a.study, &a.series).cmp(&(&b.study, &b.series)));
    Ok(units)
}

/// A slice that is listed again with the same label counts once; one with both labels not at all. Either is listed with its reason.
fn settle_repeats(unit: &mut Unit) {
    let mut n_lines: HashMap<Box<str>, [usize; 2]> = HashMap::new();
    for slice in &unit.slices {
        n_lines.entry(slice.name.clone()).or_default()[usize::from(slice.pe_present)] += 1;
    }
    if n_lines.len() == unit.slices.len() {
        return;
    }
    unit.slices.retain(|slice| {
        let Some([negative, positive]) = n_lines.remove(&slice.name) else {
            return false;
        };
        let (n, is_contradiction) = (negative + positive, negative > 0 && positive > 0);
        if n > 1 {
            unit.left_out.push(LeftOut {
                file: format!("{}/{}/{}", unit.study, unit.series, slice.name),
                reason: if is_contradiction {
                    format!(
                        "label: {positive} lines say that PE is present, {negative} that it is not"
                    )
                } else {
                    format!("repeated: {n} lines list it; it is used once")
                },
            });
        }
        !is_contradiction
    });
}

/// A name that is safe as one component of a path.
fn name(bytes: &[u8]) -> Result<Box<str>> {
    let text = std::str::from_utf8(bytes).context("an identifier is not UTF-8")?;
    let is_safe = !text.is_empty()
        && text.len() <= 128
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        && !text.starts_with('.');
    ensure!(
        is_safe,
        "an identifier is empty, too long or has characters other than letters, digits, '.', '_' and '-'"
    );
    Ok(text.into())
}

fn flag(bytes: &[u8]) -> Result<bool> {
    match bytes {
        b"0" => Ok(false),
        b"1" => Ok(true),
        _ => bail!("{:?} is not 0 or 1", String::from_utf8_lossy(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(order: &[usize], rows: &[[&str; 17]]) -> String {
        let names: Vec<&str> = [
            "StudyInstanceUID",
            "SeriesInstanceUID",
            "SOPInstanceUID",
            "pe_present_on_image",
        ]
        .into_iter()
        .chain(EXAM_LABELS)
        .collect();
        let line = |cells: &[&str]| {
            order
                .iter()
                .map(|&i| cells[i])
                .collect::<Vec<_>>()
                .join(",")
                + "\n"
        };
        rows.iter()
            .fold(line(&names), |text, row| text + &line(row))
    }

    #[test]
    fn columns_are_found_by_name_whatever_their_order() {
        let mut row = ["0"; 17];
        row[..4].copy_from_slice(&["b", "s", "i", "1"]);
        row[4 + 11] = "1";
        let mut other = ["0"; 17];
        other[..3].copy_from_slice(&["a", "s", "i"]);
        let mut next = row;
        next[2] = "j";
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.csv");
        let forward: Vec<usize> = (0..17).collect();
        let backward: Vec<usize> = (0..17).rev().collect();
        let mut read = Vec::new();
        for order in [forward, backward] {
            std::fs::write(&path, table(&order, &[row, other, next])).unwrap();
            read.push(read_train_csv(&path).unwrap());
        }
        assert_eq!(read[0], read[1]);
        assert_eq!(&*read[0][0].study, "a");
        assert_eq!(read[0][1].slices.len(), 2);
        assert!(read[0][1].slices[0].pe_present);
        assert!(read[0][1].labels.unwrap()[11]);
    }

    #[test]
    fn a_repeated_slice_counts_once_and_a_contradictory_one_not_at_all() {
        let line = |sop, present| {
            let mut row = ["0"; 17];
            row[..4].copy_from_slice(&["a", "s", sop, present]);
            row
        };
        let rows = [
            line("twice", "1"),
            line("good", "0"),
            line("both", "0"),
            line("twice", "1"),
            line("both", "1"),
        ];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.csv");
        let order: Vec<usize> = (0..17).collect();
        std::fs::write(&path, table(&order, &rows)).unwrap();
        let unit = read_train_csv(&path).unwrap().remove(0);
        let names: Vec<&str> = unit.slices.iter().map(|slice| &*slice.name).collect();
        assert_eq!(names, ["twice", "good"]);
        assert_eq!(unit.left_out.len(), 2);
        assert_eq!(unit.left_out[0].file, "a/s/twice");
        assert!(unit.left_out[0].reason.starts_with("repeated: 2 lines"));
        assert!(unit.left_out[1].reason.starts_with("label: 1 lines"));
        let mut contradiction = line("other", "0");
        contradiction[9] = "1";
        std::fs::write(&path, table(&order, &[rows[0], contradiction])).unwrap();
        let error = format!("{:#}", read_train_csv(&path).unwrap_err());
        assert!(
            error.contains("line 3: the exam's labels contradict"),
            "{error}"
        );
    }

    #[test]
    fn an_identifier_cannot_leave_the_folder() {
        assert!(name(b"..").is_err());
        assert!(name(b"a/b").is_err());
        assert!(name(b"6897fa9de148").is_ok());
    }

    #[test]
    fn a_hexadecimal_word_becomes_a_uid() {
        assert_eq!(identifier("1.2.3").as_str(), "1.2.3");
        assert!(identifier("6897fa9de148").as_str().starts_with("2.25."));
        assert_ne!(identifier("6897fa9de148"), identifier("6897fa9de149"));
    }
}
