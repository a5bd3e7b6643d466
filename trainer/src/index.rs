//! What is known of each slice of a cache: `index.csv`, one row a slice, in the order of `tensors.u8`.
//!
//! In: rows from any source. Out: the same rows, checked. Columns are read by name. `pe_present` is 1 where an embolus
//! is visible on the slice: positive means PE present, everywhere in this project.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use shared::uid::Uid;

/// The labels of an exam, named as the columns of the RSNA data set's `train.csv`.
pub const EXAM_LABELS: [&str; 13] = [
    "negative_exam_for_pe",
    "qa_motion",
    "qa_contrast",
    "flow_artifact",
    "rv_lv_ratio_gte_1",
    "rv_lv_ratio_lt_1",
    "leftsided_pe",
    "chronic_pe",
    "true_filling_defect_not_pe",
    "rightsided_pe",
    "acute_and_chronic_pe",
    "central_pe",
    "indeterminate",
];

/// The part of the data a slice belongs to.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// Weights are fitted on it.
    Train,
    /// Thresholds, temperature and study rule are chosen on it.
    Val,
    /// Figures are reported on it.
    Test,
}

/// One slice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Study Instance UID (0020,000D).
    pub study_uid: Uid,
    /// Series Instance UID (0020,000E).
    pub series_uid: Uid,
    /// SOP Instance UID (0008,0018).
    pub sop_uid: Uid,
    /// Part of the data.
    pub part: Part,
    /// Whether an embolus is visible on the slice.
    pub pe_present: bool,
    /// The exam's labels in the order of [`EXAM_LABELS`], where the source has them.
    pub exam_labels: Option<[bool; EXAM_LABELS.len()]>,
    /// Position along the stack in mm, where the source has it.
    pub z_mm: Option<f64>,
    /// Manufacturer (0008,0070), where the source has it.
    pub manufacturer: Option<String>,
    /// Spacing of the rows in mm (0028,0030), where the source has it.
    pub spacing_mm: Option<f64>,
}

const PLAIN_COLUMNS: [&str; 9] = [
    "row",
    "study_uid",
    "series_uid",
    "sop_uid",
    "part",
    "pe_present",
    "z_mm",
    "manufacturer",
    "spacing_mm",
];

/// The rows as the text of `index.csv`.
///
/// # Errors
/// None in practice: the text is built in memory.
pub fn to_csv(rows: &[Row]) -> Result<Vec<u8>> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(PLAIN_COLUMNS.iter().chain(&EXAM_LABELS))?;
    for (number, row) in rows.iter().enumerate() {
        let number_text = |value: Option<f64>| value.map(|v| v.to_string()).unwrap_or_default();
        let mut record = vec![
            number.to_string(),
            row.study_uid.to_string(),
            row.series_uid.to_string(),
            row.sop_uid.to_string(),
            row.part.name().to_owned(),
            flag(row.pe_present).to_owned(),
            number_text(row.z_mm),
            row.manufacturer.clone().unwrap_or_default(),
            number_text(row.spacing_mm),
        ];
        record.extend((0..EXAM_LABELS.len()).map(|k| {
            row.exam_labels
                .map_or("", |labels| flag(labels[k]))
                .to_owned()
        }));
        writer.write_record(&record)?;
    }
    Ok(writer.into_inner()?)
}

/// Reads `index.csv`.
///
/// # Errors
/// A missing column, a value out of its range (with the line), rows that are not numbered from 0.
pub fn read_csv(path: &Path) -> Result<Vec<Row>> {
    let mut reader =
        csv::Reader::from_path(path).with_context(|| format!("reading {}", path.display()))?;
    let headers = reader.headers()?.clone();
    let column = |name: &str| headers.iter().position(|header| header == name);
    let needed = |name: &str| {
        column(name).with_context(|| format!("{} has no column {name}", path.display()))
    };
    let [row, study, series, sop, part, present] = [
        "row",
        "study_uid",
        "series_uid",
        "sop_uid",
        "part",
        "pe_present",
    ]
    .map(needed);
    let (row, study, series, sop, part, present) = (row?, study?, series?, sop?, part?, present?);
    let optional = ["z_mm", "manufacturer", "spacing_mm"].map(column);
    let labels: Option<Vec<usize>> = EXAM_LABELS.iter().map(|name| column(name)).collect();
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record?;
        let text = |index: usize| record.get(index).unwrap_or_default();
        let read = || -> Result<Row> {
            ensure!(
                text(row).parse() == Ok(rows.len()),
                "row is {:?}; expected {}",
                text(row),
                rows.len()
            );
            let [z_mm, manufacturer, spacing_mm] =
                optional.map(|index| index.map(text).filter(|t| !t.is_empty()));
            Ok(Row {
                study_uid: Uid::new(text(study))?,
                series_uid: Uid::new(text(series))?,
                sop_uid: Uid::new(text(sop))?,
                part: Part::from_name(text(part))?,
                pe_present: parse_flag(text(present))?,
                exam_labels: labels
                    .as_ref()
                    .map(|columns| read_labels(columns, text))
                    .transpose()?
                    .flatten(),
                z_mm: z_mm.map(str::parse).transpose()?,
                manufacturer: manufacturer.map(str::to_owned),
                spacing_mm: spacing_mm.map(str::parse).transpose()?,
            })
        };
        let line = record.position().map_or(0, csv::Position::line);
        rows.push(read().with_context(|| format!("{} line {line}", path.display()))?);
    }
    Ok(rows)
}

/// A 0 or 1 as a truth value.
///
/// # Errors
/// Any other text.
pub fn parse_flag(text: &str) -> Result<bool> {
    match text.trim() {
        "0" => Ok(false),
        "1" => Ok(true),
        other => anyhow::bail!("{other:?} is not 0 or 1"),
    }
}

impl Part {
    /// `train`, `val` or `test`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Val => "val",
            Self::Test => "test",
        }
    }

    fn from_name(text: &str) -> Result<Self> {
        [Self::Train, Self::Val, Self::Test]
            .into_iter()
            .find(|part| part.name() == text)
            .with_context(|| format!("part is {text:?}; allowed are train, val, test"))
    }
}

fn flag(value: bool) -> &'static str {
    if value { "1" } else { "0" }
}

/// The exam's labels, or `None` where all its columns are empty.
fn read_labels<'t>(
    columns: &[usize],
    text: impl Fn(usize) -> &'t str,
) -> Result<Option<[bool; EXAM_LABELS.len()]>> {
    if columns.iter().all(|column| text(*column).is_empty()) {
        return Ok(None);
    }
    let mut labels = [false; EXAM_LABELS.len()];
    for (label, column) in labels.iter_mut().zip(columns) {
        *label = parse_flag(text(*column))?;
    }
    Ok(Some(labels))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(sop: &str, exam_labels: Option<[bool; 13]>) -> Row {
        let uid = |text| Uid::new(text).unwrap();
        Row {
            study_uid: uid("1.2"),
            series_uid: uid("1.2.3"),
            sop_uid: uid(sop),
            part: Part::Val,
            pe_present: true,
            exam_labels,
            z_mm: Some(-12.5),
            manufacturer: Some("A, \"quoted\" maker".to_owned()),
            spacing_mm: None,
        }
    }

    #[test]
    fn rows_survive_the_csv() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index.csv");
        let rows = [row("1.2.3.1", None), row("1.2.3.2", Some([true; 13]))];
        std::fs::write(&path, to_csv(&rows).unwrap()).unwrap();
        assert_eq!(read_csv(&path).unwrap(), rows);
    }

    #[test]
    fn a_bad_value_is_reported_with_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index.csv");
        let text = String::from_utf8(to_csv(&[row("1.2.3.1", None)]).unwrap())
            .unwrap()
            .replace("val", "validation");
        std::fs::write(&path, text).unwrap();
        let message = format!("{:#}", read_csv(&path).unwrap_err());
        assert!(
            message.contains("line 2") && message.contains("allowed are train, val, test"),
            "{message}"
        );
    }
}
