//! Reads a TOML file section by section and keeps every fault that it meets, each with its line and column.
//!
//! In: the file's text. Out: values, and a list of [`Fault`]s. A deserialiser stops at its first fault; an engineer who mends a
//! configuration at night wants all of them, so the sections are taken from the parsed table one key at a time. What the keys
//! mean is [`super`]'s business.

use std::cell::RefCell;
use std::fmt;
use std::ops::{Range, RangeInclusive};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Faults that are kept; a file with more is not worth reading further.
const MAX_FAULTS: usize = 100;

/// One fault of a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// Line, from 1.
    pub(crate) line: usize,
    /// Column, from 1, in characters.
    pub(crate) column: usize,
    /// What is wrong and what would be right.
    pub(crate) message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "line {}, column {}: {}",
            self.line, self.column, self.message
        )
    }
}

/// The faults of one file.
#[derive(Debug)]
pub(super) struct Faults<'a> {
    text: &'a str,
    list: RefCell<Vec<Fault>>,
}

impl<'a> Faults<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self {
            text,
            list: RefCell::new(Vec::new()),
        }
    }

    /// Keeps a fault at a place of the text.
    pub(super) fn push(&self, at: &Range<usize>, message: impl Into<String>) {
        let mut list = self.list.borrow_mut();
        if list.len() >= MAX_FAULTS {
            return;
        }
        let before = self.text.get(..at.start).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let column = before.get(line_start..).unwrap_or("").chars().count() + 1;
        list.push(Fault {
            line: before.matches('\n').count() + 1,
            column,
            message: message.into(),
        });
    }

    /// The faults in the order of the file.
    pub(super) fn into_list(self) -> Vec<Fault> {
        let mut list = self.list.into_inner();
        list.sort_by_key(|fault| (fault.line, fault.column));
        list
    }
}

/// A table of the file, or its absence, and the keys that were asked of it.
#[derive(Debug)]
pub(super) struct Section<'a> {
    name: String,
    table: Option<(&'a DeTable<'a>, Range<usize>)>,
    faults: &'a Faults<'a>,
    asked: Vec<&'static str>,
}

impl<'a> Section<'a> {
    /// The whole file.
    pub(super) fn root(table: &'a DeTable<'a>, span: Range<usize>, faults: &'a Faults<'a>) -> Self {
        Self::new(String::new(), Some((table, span)), faults)
    }

    fn new(
        name: String,
        table: Option<(&'a DeTable<'a>, Range<usize>)>,
        faults: &'a Faults<'a>,
    ) -> Self {
        Self {
            name,
            table,
            faults,
            asked: Vec::new(),
        }
    }

    /// The section `[key]` within this one.
    pub(super) fn section(&mut self, key: &'static str) -> Section<'a> {
        let table = self.find(key).and_then(|value| {
            let table = value.get_ref().as_table();
            if table.is_none() {
                self.wrong_type(value, key, "a section");
            }
            table.map(|table| (table, value.span()))
        });
        Section::new(self.within(key), table, self.faults)
    }

    /// The sections `[key.NAME]`, each with its name and where the name stands.
    pub(super) fn named_sections(
        &mut self,
        key: &'static str,
    ) -> Vec<(String, Range<usize>, Section<'a>)> {
        let outer = self.section(key);
        let Some((table, _)) = outer.table else {
            return Vec::new();
        };
        let mut sections = Vec::new();
        for (name, value) in table {
            match value.get_ref().as_table() {
                Some(inner) => {
                    let path = format!("{key}.{}", name.get_ref());
                    let section = Section::new(path, Some((inner, value.span())), self.faults);
                    sections.push((name.get_ref().to_string(), name.span(), section));
                }
                None => self.faults.push(
                    &name.span(),
                    format!(
                        "[{key}] holds one section for each AE title: write [{key}.{}]",
                        name.get_ref()
                    ),
                ),
            }
        }
        sections
    }

    /// A text.
    pub(super) fn text(&mut self, key: &'static str) -> Option<String> {
        self.checked_text(key, |_| Ok(()))
    }

    /// A text that passes a check.
    pub(super) fn checked_text(
        &mut self,
        key: &'static str,
        check: impl Fn(&str) -> Result<(), String>,
    ) -> Option<String> {
        self.parsed(key, |text| check(text).map(|()| text.to_owned()))
    }

    /// A text that is turned into something else.
    pub(super) fn parsed<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let value = self.find(key)?;
        let Some(text) = value.get_ref().as_str() else {
            self.wrong_type(value, key, "a text in quotation marks");
            return None;
        };
        parse(text)
            .map_err(|message| self.faults.push(&value.span(), format!("{key}: {message}")))
            .ok()
    }

    /// One text or a list of texts, each turned into something else.
    pub(super) fn list<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Vec<T> {
        let Some(value) = self.find(key) else {
            return Vec::new();
        };
        let one = std::slice::from_ref(value);
        let values: &[Spanned<DeValue<'_>>] = match value.get_ref() {
            DeValue::Array(array) => array,
            _ => one,
        };
        let mut list = Vec::new();
        for value in values {
            match value.get_ref().as_str().map(&parse) {
                Some(Ok(parsed)) => list.push(parsed),
                Some(Err(message)) => {
                    self.faults.push(&value.span(), format!("{key}: {message}"));
                }
                None => self.wrong_type(value, key, "a text in quotation marks"),
            }
        }
        list
    }

    /// True or false.
    pub(super) fn flag(&mut self, key: &'static str, default: bool) -> bool {
        let Some(value) = self.find(key) else {
            return default;
        };
        value.get_ref().as_bool().unwrap_or_else(|| {
            self.wrong_type(value, key, "true or false");
            default
        })
    }

    /// A whole number in a range.
    pub(super) fn integer<T>(&mut self, key: &'static str, range: RangeInclusive<T>) -> Option<T>
    where
        T: TryFrom<i64> + PartialOrd + fmt::Display,
    {
        let value = self.find(key)?;
        let Some(integer) = value.get_ref().as_integer() else {
            self.wrong_type(value, key, "a whole number");
            return None;
        };
        let number = i64::from_str_radix(integer.as_str(), integer.radix())
            .ok()
            .and_then(|number| T::try_from(number).ok())
            .filter(|number| range.contains(number));
        if number.is_none() {
            let message = format!(
                "{key} = {} is outside {} to {}",
                integer.as_str(),
                range.start(),
                range.end()
            );
            self.faults.push(&value.span(), message);
        }
        number
    }

    /// A number, whole or not, in a range.
    pub(super) fn number(&mut self, key: &'static str, range: RangeInclusive<f64>) -> Option<f64> {
        let value = self.find(key)?;
        let text = match value.get_ref() {
            DeValue::Integer(integer) if integer.radix() == 10 => integer.as_str(),
            DeValue::Float(float) => float.as_str(),
            _ => {
                self.wrong_type(value, key, "a number");
                return None;
            }
        };
        let number: Option<f64> = text.parse().ok().filter(|number| range.contains(number));
        if number.is_none() {
            let message = format!(
                "{key} = {text} is outside {} to {}",
                range.start(),
                range.end()
            );
            self.faults.push(&value.span(), message);
        }
        number
    }

    /// Keeps a fault where the key must be there and is not; where it is there and wrong, its own fault was kept.
    pub(super) fn require(&self, key: &'static str) {
        if let Some((table, span)) = &self.table
            && table.get(key).is_none()
        {
            self.faults
                .push(span, format!("[{}] needs {key}", self.name));
        }
    }

    /// Keeps a fault at a key's value.
    pub(super) fn fault(&self, key: &str, message: impl Into<String>) {
        if let Some((table, span)) = &self.table {
            let at = table.get(key).map_or_else(|| span.clone(), Spanned::span);
            self.faults.push(&at, message);
        }
    }

    /// Keeps a fault for every key that was never asked for.
    pub(super) fn finish(self) {
        let Some((table, _)) = self.table else {
            return;
        };
        for key in table.keys() {
            let unknown = key.get_ref().as_ref();
            if self.asked.contains(&unknown) {
                continue;
            }
            let place = if self.name.is_empty() {
                String::new()
            } else {
                format!(" in [{}]", self.name)
            };
            let advice = nearest(unknown, &self.asked).map_or_else(
                || format!("; known are {}", self.asked.join(", ")),
                |known| format!("; did you mean `{known}`?"),
            );
            self.faults.push(
                &key.span(),
                format!("unknown key `{unknown}`{place}{advice}"),
            );
        }
    }

    fn find(&mut self, key: &'static str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.asked.push(key);
        self.table.as_ref().and_then(|(table, _)| table.get(key))
    }

    fn within(&self, key: &str) -> String {
        if self.name.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.name)
        }
    }

    fn wrong_type(&self, value: &Spanned<DeValue<'_>>, key: &str, wanted: &str) {
        let message = format!(
            "{key} must be {wanted}, found {}",
            value.get_ref().type_str()
        );
        self.faults.push(&value.span(), message);
    }
}

/// The known key that a slip of the fingers away gives `unknown`.
fn nearest<'k>(unknown: &str, known: &[&'k str]) -> Option<&'k str> {
    let most = (unknown.chars().count() / 3).clamp(1, 3);
    known
        .iter()
        .map(|key| (edit_distance(unknown, key), *key))
        .filter(|(distance, _)| *distance <= most)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, key)| key)
}

/// How many slips of the fingers lie between two keys: a letter more, less or other, two letters exchanged; `-` and `_` are alike.
fn edit_distance(left: &str, right: &str) -> usize {
    let same = |character: char| {
        if character == '-' {
            '_'
        } else {
            character.to_ascii_lowercase()
        }
    };
    let left: Vec<char> = left.chars().map(same).collect();
    let right: Vec<char> = right.chars().map(same).collect();
    // Row `i`, column `j`: the distance of the first `i` letters to the first `j`.
    let mut rows = vec![(0..=right.len()).collect::<Vec<usize>>()];
    for i in 1..=left.len() {
        let mut row = vec![i];
        for j in 1..=right.len() {
            let other = usize::from(left[i - 1] != right[j - 1]);
            let mut least = (rows[i - 1][j - 1] + other).min(rows[i - 1][j] + 1);
            least = least.min(row[j - 1] + 1);
            let is_exchanged =
                i > 1 && j > 1 && left[i - 1] == right[j - 2] && left[i - 2] == right[j - 1];
            if is_exchanged {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[left.len()][right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_key_is_a_slip_away_and_no_further() {
        let known = ["ae_title", "dicom_port", "http_bind"];
        assert_eq!(nearest("ae-titel", &known), Some("ae_title"));
        assert_eq!(nearest("dicomport", &known), Some("dicom_port"));
        assert_eq!(nearest("prot", &["host", "port"]), Some("port"));
        assert_eq!(nearest("colour", &known), None);
    }
}
