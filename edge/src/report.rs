//! Results as people and programs read them.
//!
//! In: slices and verdicts. Out: one JSON object a line, or a table. The JSON fields are a contract (docs/contract.md). A study is
//! never called negative: "not detected on N of M slices". File names are foreign: control characters are written as escapes.

use std::io::{self, Write};

use serde::Serialize;
use shared::probability::sigmoid;
use shared::uid::Uid;

use crate::series::{SliceRecord, Study};
use crate::study::Verdict;
use crate::wire::Reason;

/// Results go out in one of two forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// An aligned table.
    Table,
    /// One JSON object a line.
    JsonLines,
}

/// What every result says of the model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ModelWords<'a> {
    /// Its name.
    pub(crate) name: &'a str,
    /// What must be said.
    pub(crate) notice: &'a str,
    /// The logit is divided by this before the probability is shown.
    pub(crate) temperature: f64,
}

/// A slice's result.
#[derive(Debug)]
pub(crate) struct SliceResult<'a> {
    /// The file, as it was found.
    pub(crate) file: &'a str,
    /// What is known of the slice.
    pub(crate) record: &'a SliceRecord,
    /// The answer, or why there is none.
    pub(crate) answer: Result<Answer, &'a Reason>,
}

/// The network's answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer {
    /// The logit.
    pub(crate) logit: f32,
    /// Whether it reaches the model file's threshold; `None` where the file has none.
    pub(crate) is_positive: Option<bool>,
    /// Time in the network.
    pub(crate) micros: u64,
}

#[derive(Serialize)]
struct SliceJson<'a> {
    kind: &'static str,
    file: &'a str,
    frame: Option<u32>,
    study_uid: Option<&'a Uid>,
    series_uid: Option<&'a Uid>,
    sop_uid: Option<&'a Uid>,
    status: &'static str,
    reason: Option<String>,
    logit: Option<f32>,
    probability: Option<f32>,
    positive: Option<bool>,
    model: &'a str,
    micros: Option<u64>,
    notice: &'a str,
}

#[derive(Serialize)]
struct StudyJson<'a> {
    kind: &'static str,
    study_uid: &'a Uid,
    series_uid: Option<&'a Uid>,
    slices: usize,
    analysed: usize,
    not_analysed: usize,
    score: Option<f32>,
    positive: Option<bool>,
    top: Vec<TopJson<'a>>,
    duplicates: usize,
    not_judged: Vec<NotJudgedJson<'a>>,
    model: &'a str,
    notice: &'a str,
}

#[derive(Serialize)]
struct TopJson<'a> {
    sop_uid: Option<&'a Uid>,
    frame: Option<u32>,
    logit: Option<f32>,
}

#[derive(Serialize)]
struct NotJudgedJson<'a> {
    series_uid: Option<&'a Uid>,
    slices: usize,
    analysed: usize,
    reason: String,
}

/// The probability that is shown for a logit.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the division by the temperature is rounded once to f32"
)]
pub(crate) fn probability(logit: f32, temperature: f64) -> f32 {
    sigmoid((f64::from(logit) / temperature) as f32)
}

/// Writes what stands above the first slice.
///
/// # Errors
/// Where `out` cannot be written.
pub(crate) fn begin(out: &mut dyn Write, form: Form, words: &ModelWords<'_>) -> io::Result<()> {
    if form == Form::Table {
        writeln!(out, "model {}", words.name)?;
        writeln!(out, "{}\n", words.notice)?;
        writeln!(
            out,
            "{:<13} {:>10} {:>11} {:>8}  file",
            "slice", "logit", "probability", "ms"
        )?;
    }
    Ok(())
}

/// Writes one slice.
///
/// # Errors
/// Where `out` cannot be written.
pub(crate) fn slice(
    out: &mut dyn Write,
    form: Form,
    words: &ModelWords<'_>,
    result: &SliceResult<'_>,
) -> io::Result<()> {
    match form {
        Form::JsonLines => slice_json(out, words, result),
        Form::Table => slice_row(out, words, result),
    }
}

fn slice_json(
    out: &mut dyn Write,
    words: &ModelWords<'_>,
    result: &SliceResult<'_>,
) -> io::Result<()> {
    let answer = result.answer.ok();
    let record = result.record;
    let json = SliceJson {
        kind: "slice",
        file: result.file,
        frame: record.frame,
        study_uid: record.study_uid.as_ref(),
        series_uid: record.series_uid.as_ref(),
        sop_uid: record.sop_uid.as_ref(),
        status: if answer.is_some() {
            "analysed"
        } else {
            "not_analysed"
        },
        reason: result.answer.err().map(ToString::to_string),
        logit: answer.map(|answer| answer.logit),
        probability: answer.map(|answer| probability(answer.logit, words.temperature)),
        positive: answer.and_then(|answer| answer.is_positive),
        model: words.name,
        micros: answer.map(|answer| answer.micros),
        notice: words.notice,
    };
    json_line(out, &json)
}

fn slice_row(
    out: &mut dyn Write,
    words: &ModelWords<'_>,
    result: &SliceResult<'_>,
) -> io::Result<()> {
    let mut file = plain(result.file);
    if let Some(frame) = result.record.frame {
        file.push_str(&format!(" frame {frame}"));
    }
    match result.answer {
        Ok(answer) => {
            let word = match answer.is_positive {
                Some(true) => "suspected",
                Some(false) => "not detected",
                None => "no threshold",
            };
            let shown = probability(answer.logit, words.temperature);
            let ms = milliseconds(answer.micros);
            writeln!(
                out,
                "{word:<13} {:>+10.4} {shown:>11.4} {ms:>8.1}  {file}",
                answer.logit
            )
        }
        Err(reason) => writeln!(
            out,
            "{:<13} {:>10} {:>11} {:>8}  {file}: {}",
            "not analysed",
            "-",
            "-",
            "-",
            plain(&reason.to_string())
        ),
    }
}

/// Writes one study.
///
/// # Errors
/// Where `out` cannot be written.
pub(crate) fn study(
    out: &mut dyn Write,
    form: Form,
    words: &ModelWords<'_>,
    study: &Study,
    verdict: &Verdict,
) -> io::Result<()> {
    match form {
        Form::JsonLines => study_json(out, words, study, verdict),
        Form::Table => study_block(out, study, verdict),
    }
}

fn study_json(
    out: &mut dyn Write,
    words: &ModelWords<'_>,
    study: &Study,
    verdict: &Verdict,
) -> io::Result<()> {
    let top = verdict.top.iter().map(|slice| TopJson {
        sop_uid: slice.sop_uid.as_ref(),
        frame: slice.frame,
        logit: slice.logit,
    });
    let not_judged = study.not_judged.iter().map(|other| NotJudgedJson {
        series_uid: other.series.series_uid.as_ref(),
        slices: other.series.slices.len(),
        analysed: other.series.n_analysed(),
        reason: other.why.to_string(),
    });
    let json = StudyJson {
        kind: "study",
        study_uid: &study.study_uid,
        series_uid: verdict.series_uid.as_ref(),
        slices: verdict.n_slices,
        analysed: verdict.n_analysed,
        not_analysed: verdict.n_slices - verdict.n_analysed,
        score: verdict.score,
        positive: verdict.is_positive,
        top: top.collect(),
        duplicates: study.n_duplicates,
        not_judged: not_judged.collect(),
        model: words.name,
        notice: words.notice,
    };
    json_line(out, &json)
}

fn study_block(out: &mut dyn Write, study: &Study, verdict: &Verdict) -> io::Result<()> {
    let n_refused = verdict.n_slices - verdict.n_analysed;
    writeln!(out, "\nstudy {}", study.study_uid)?;
    writeln!(out, "  finding       {}", finding(verdict))?;
    if let Some(series_uid) = &verdict.series_uid {
        writeln!(out, "  judged series {series_uid}")?;
    }
    writeln!(
        out,
        "  slices        {}: {} analysed, {n_refused} not analysed, {} duplicates left out",
        verdict.n_slices, verdict.n_analysed, study.n_duplicates
    )?;
    for slice in &verdict.top {
        writeln!(out, "  highest       {}", highest(slice))?;
    }
    for other in &study.not_judged {
        let name = other.series.series_uid.as_ref();
        let name = name.map_or_else(|| "without UID".to_owned(), Uid::to_string);
        let n_slices = other.series.slices.len();
        writeln!(
            out,
            "  not judged    {name}, {n_slices} slices: {}",
            other.why
        )?;
    }
    Ok(())
}

fn finding(verdict: &Verdict) -> String {
    let Verdict {
        n_slices,
        n_analysed,
        ..
    } = verdict;
    match (verdict.is_positive, verdict.score) {
        (Some(true), Some(score)) => format!("suspected, score {score:+.4}"),
        (Some(false), Some(score)) => {
            format!("not detected on {n_analysed} of {n_slices} slices, score {score:+.4}")
        }
        _ if *n_analysed == 0 => format!("not analysed, none of {n_slices} slices"),
        _ if verdict.series_uid.is_none() => "not judged, no series qualifies".to_owned(),
        _ => "not judged, the model file has no study rule".to_owned(),
    }
}

fn highest(slice: &SliceRecord) -> String {
    let uid = slice.sop_uid.as_ref();
    let uid = uid.map_or_else(|| "slice without UID".to_owned(), Uid::to_string);
    let frame = slice.frame.map(|frame| format!(" frame {frame}"));
    let logit = slice.logit.unwrap_or(f32::NAN);
    format!("{logit:+.4}  {uid}{}", frame.unwrap_or_default())
}

/// Writes a value as one line of JSON.
///
/// # Errors
/// Where `out` cannot be written.
pub(crate) fn json_line(out: &mut dyn Write, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    out.write_all(&line)
}

/// Text without control characters.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            plain.extend(character.escape_default());
        } else {
            plain.push(character);
        }
    }
    plain
}

#[expect(
    clippy::cast_precision_loss,
    reason = "shown with one digit after the point"
)]
pub(crate) fn milliseconds(micros: u64) -> f64 {
    micros as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: ModelWords<'_> = ModelWords {
        name: "m",
        notice: "research use only, not a medical device",
        temperature: 1.0,
    };

    fn row(file: &str, answer: Result<Answer, &Reason>) -> String {
        let mut out = Vec::new();
        let record = SliceRecord {
            frame: Some(3),
            ..SliceRecord::default()
        };
        let result = SliceResult {
            file,
            record: &record,
            answer,
        };
        slice(&mut out, Form::Table, &WORDS, &result).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn rows_are_aligned_and_free_of_control_characters() {
        let answer = Answer {
            logit: -1.5,
            is_positive: Some(false),
            micros: 2_345,
        };
        let reason = Reason::new("not-dicom", "no");
        let analysed = row("a", Ok(answer));
        let refused = row("b\n\u{1b}[2J", Err(&reason));
        assert_eq!(
            analysed,
            "not detected     -1.5000      0.1824      2.3  a frame 3\n"
        );
        assert_eq!(
            refused,
            "not analysed           -           -        -  b\\n\\u{1b}[2J frame 3: not-dicom: no\n"
        );
    }

    #[test]
    fn temperature_changes_the_probability_shown() {
        assert!(probability(2.0, 2.0) < probability(2.0, 1.0));
        assert_eq!(probability(0.0, 3.0).to_bits(), 0.5_f32.to_bits());
    }
}
