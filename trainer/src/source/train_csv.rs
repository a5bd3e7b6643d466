//! `train.csv`: the labels of the RSNA data set. Columns are found by name, for their order differs between copies.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::{Labels, Listed, Unit};
use crate::cache::LeftOut;
use crate::exit::{Exit, fault};
use crate::index::EXAM_LABELS;

/// The series of `train.csv`, in order of study and series; slices in the file's order.
pub(super) fn read_train_csv(path: &Path) -> Result<Vec<Unit>> {
    let file = File::open(path).map_err(|error| {
        fault(
            Exit::BadData,
            format!("{}: {error}; the labels stand in it", path.display()),
        )
    })?;
    let mut reader = csv::ReaderBuilder::new()
        .buffer_capacity(1 << 20)
        .from_reader(file);
    let context = || format!("reading {}", path.display());
    let columns = Columns::find(reader.headers().with_context(context)?).with_context(context)?;
    let mut series = AllSeries::default();
    let mut record = csv::ByteRecord::new();
    while reader.read_byte_record(&mut record).with_context(context)? {
        let line = record.position().map_or(0, csv::Position::line);
        let added = columns.line(&record).and_then(|found| series.add(&found));
        added.with_context(|| format!("{} line {line}", path.display()))?;
    }
    let mut units = series.units;
    ensure!(
        !units.is_empty(),
        "{} has no line behind its header",
        path.display()
    );
    units.iter_mut().for_each(settle_repeats);
    units.sort_by(|a, b| (&a.study, &a.series).cmp(&(&b.study, &b.series)));
    Ok(units)
}

/// Where the columns stand.
struct Columns {
    study: usize,
    series: usize,
    sop: usize,
    present: usize,
    labels: [usize; EXAM_LABELS.len()],
}

/// One line, its identifiers as they stand in the file.
struct Line<'a> {
    study: &'a [u8],
    series: &'a [u8],
    sop: &'a [u8],
    pe_present: bool,
    labels: Labels,
}

impl Columns {
    fn find(header: &csv::StringRecord) -> Result<Self> {
        let n_columns = header.len();
        let column = |name: &str| {
            header
                .iter()
                .position(|found| found.trim().eq_ignore_ascii_case(name))
                .with_context(|| {
                    format!("it has no column {name} among {n_columns}, separated by commas")
                })
        };
        let mut labels = [0; EXAM_LABELS.len()];
        for (index, name) in labels.iter_mut().zip(EXAM_LABELS) {
            *index = column(name)?;
        }
        Ok(Self {
            study: column("StudyInstanceUID")?,
            series: column("SeriesInstanceUID")?,
            sop: column("SOPInstanceUID")?,
            present: column("pe_present_on_image")?,
            labels,
        })
    }

    fn line<'a>(&self, record: &'a csv::ByteRecord) -> Result<Line<'a>> {
        let field = |index: usize| record.get(index).unwrap_or_default();
        let mut labels = Labels::default();
        for ((label, index), column) in labels.iter_mut().zip(self.labels).zip(EXAM_LABELS) {
            *label = flag(field(index)).with_context(|| format!("column {column}"))?;
        }
        Ok(Line {
            study: field(self.study),
            series: field(self.series),
            sop: field(self.sop),
            pe_present: flag(field(self.present)).context("column pe_present_on_image")?,
            labels,
        })
    }
}

/// The series as their lines come: mostly those of one series behind each other.
#[derive(Default)]
struct AllSeries {
    units: Vec<Unit>,
    places: HashMap<Box<[u8]>, usize>,
    /// Place of the last line's series.
    last: usize,
}

impl AllSeries {
    fn add(&mut self, line: &Line<'_>) -> Result<()> {
        let is_of_last = self.units.get(self.last).is_some_and(|unit| {
            unit.study.as_bytes() == line.study && unit.series.as_bytes() == line.series
        });
        if !is_of_last {
            let (next, key) = (self.units.len(), [line.study, b"/", line.series].concat());
            self.last = *self.places.entry(key.into()).or_insert(next);
            if self.last == next {
                self.units.push(Unit {
                    study: name(line.study)?,
                    series: name(line.series)?,
                    labels: Some(line.labels),
                    slices: Vec::new(),
                    left_out: Vec::new(),
                });
            }
        }
        let unit = &mut self.units[self.last];
        ensure!(
            unit.labels == Some(line.labels),
            "the exam's labels contradict those of the series' first line"
        );
        unit.slices.push(Listed {
            name: name(line.sop)?,
            pe_present: line.pe_present,
        });
        Ok(())
    }
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
    fn a_table_of_nothing_and_one_of_other_columns_say_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.csv");
        let order: Vec<usize> = (0..17).collect();
        let refused = |text: &str| {
            std::fs::write(&path, text).unwrap();
            format!("{:#}", read_train_csv(&path).unwrap_err())
        };
        let nothing = refused(&table(&order, &[]));
        assert!(
            nothing.ends_with("train.csv has no line behind its header"),
            "{nothing}"
        );
        let semicolons = refused(&table(&order, &[]).replace(',', ";"));
        assert!(
            semicolons.contains("among 1, separated by commas"),
            "{semicolons}"
        );
    }

    #[test]
    fn an_identifier_cannot_leave_the_folder() {
        assert!(name(b"..").is_err());
        assert!(name(b"a/b").is_err());
        assert!(name(b"6897fa9de148").is_ok());
    }
}
