//! DICOM files through the trained model, as the board does it: read, preprocess, engine, study rule.
//!
//! In: files or folders. Out: a verdict for each slice and each series, or the reason why there is none. The board's own command is `edge
//! classify`; this is the proof at the end of the demo that the exported file works on real input.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use shared::manifest::Manifest;
use shared::preprocess::Preprocessor;
use shared::probability::sigmoid;
use shared::{RESEARCH_USE, TENSOR_BYTES, dicom, study};

use crate::predict::Predictor;

/// Files that are read at most.
const MAX_FILES: usize = 20_000;
/// Largest file that is read.
const MAX_FILE_BYTES: u64 = 512 << 20;

/// One frame.
#[derive(Clone, Debug)]
pub struct Judged {
    /// Study and series, where known.
    pub series: (String, String),
    /// File, relative to the folder asked for.
    pub file: String,
    /// Position along the patient's axis, mm.
    pub z_mm: Option<f64>,
    /// The logit, or why there is none.
    pub outcome: std::result::Result<f32, String>,
}

/// Classifies every file below `folder`.
///
/// # Errors
/// The folder cannot be listed or the network fails; a file that cannot be read is an outcome, no error.
pub fn folder(predictor: &mut Predictor, folder: &Path) -> Result<Vec<Judged>> {
    let mut files = Vec::new();
    list(folder, &mut files).with_context(|| format!("reading {}", folder.display()))?;
    files.sort();
    let spec = predictor
        .manifest()
        .map(|manifest| manifest.preprocess.clone())
        .unwrap_or_default();
    let mut preprocessor = Preprocessor::new(&spec)?;
    let mut judged = Vec::new();
    for path in &files {
        let name = path.strip_prefix(folder).unwrap_or(path);
        judged.extend(file(
            predictor,
            &mut preprocessor,
            path,
            &name.to_string_lossy(),
        )?);
    }
    Ok(judged)
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    if folder.is_file() {
        files.push(folder.to_owned());
        return Ok(());
    }
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if files.len() >= MAX_FILES {
            break;
        }
        if path.is_dir() {
            list(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

fn file(
    predictor: &mut Predictor,
    preprocessor: &mut Preprocessor,
    path: &Path,
    name: &str,
) -> Result<Vec<Judged>> {
    let refused = |reason: String| Judged {
        series: (String::new(), String::new()),
        file: name.to_owned(),
        z_mm: None,
        outcome: Err(reason),
    };
    let bytes = match std::fs::metadata(path) {
        Ok(metadata) if metadata.len() > MAX_FILE_BYTES => {
            return Ok(vec![refused(format!("{} bytes", metadata.len()))]);
        }
        // Opening a pipe would wait for whoever writes into it.
        Ok(metadata) if !metadata.is_file() => {
            return Ok(vec![refused("not a regular file".to_owned())]);
        }
        _ => std::fs::read(path),
    };
    let bytes = match bytes {
        Ok(bytes) => bytes,
        Err(error) => return Ok(vec![refused(error.to_string())]),
    };
    let object = match dicom::read(&bytes) {
        Ok(object) => object,
        Err(error) => return Ok(vec![refused(error.to_string())]),
    };
    let text =
        |uid: &Option<shared::uid::Uid>| uid.as_ref().map_or_else(String::new, ToString::to_string);
    let identity = object.identity();
    let series = (text(&identity.study_uid), text(&identity.series_uid));
    let mut judged = Vec::new();
    let mut tensor = vec![0; TENSOR_BYTES];
    for frame_index in 0..object.n_frames() {
        let mut one = Judged {
            series: series.clone(),
            ..refused(String::new())
        };
        one.outcome = match object.frame(frame_index) {
            Err(refusal) => Err(refusal.to_string()),
            Ok(slice) => {
                one.z_mm = slice.attributes.z_mm;
                match preprocessor.tensor(&slice.pixels(), &mut tensor) {
                    Err(error) => Err(error.to_string()),
                    Ok(()) => Ok(predictor.batch(&tensor, 1)?[0]),
                }
            }
        };
        judged.push(one);
    }
    Ok(judged)
}

/// A table: one line a series with its score, and the reasons why slices were not analysed.
#[must_use]
pub fn table(judged: &[Judged], manifest: Option<&Manifest>) -> String {
    let mut series: BTreeMap<&(String, String), Vec<&Judged>> = BTreeMap::new();
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for one in judged {
        if let Err(reason) = &one.outcome {
            *reasons.entry(reason).or_default() += 1;
        }
        if one.outcome.is_ok() || !one.series.0.is_empty() {
            series.entry(&one.series).or_default().push(one);
        }
    }
    let mut text = String::new();
    for ((study_uid, _), slices) in series {
        text += &line(study_uid, slices, manifest);
    }
    // Writing to a String does not fail.
    for (reason, n) in reasons {
        _ = writeln!(text, "not analysed: {n} ({reason})");
    }
    _ = writeln!(text, "{RESEARCH_USE}");
    text
}

/// A series' line.
fn line(study_uid: &str, mut slices: Vec<&Judged>, manifest: Option<&Manifest>) -> String {
    let z = |one: &Judged| one.z_mm.unwrap_or(f64::NEG_INFINITY);
    slices.sort_by(|a, b| z(a).total_cmp(&z(b)));
    let logits: Vec<Option<f32>> = slices
        .iter()
        .map(|one| one.outcome.as_ref().ok().copied())
        .collect();
    let analysed = || logits.iter().flatten().copied();
    let (n_analysed, n_slices) = (analysed().count(), logits.len());
    if n_analysed == 0 {
        return format!("study {study_uid}: none of {n_slices} slices analysed\n");
    }
    let threshold = manifest
        .and_then(|manifest| manifest.logit_threshold())
        .unwrap_or(0.0);
    let temperature = manifest
        .and_then(|manifest| manifest.temperature)
        .unwrap_or(1.0);
    let n_positive = analysed().filter(|logit| *logit >= threshold).count();
    let highest = analysed().fold(f32::NEG_INFINITY, f32::max);
    let scored = manifest.and_then(|manifest| {
        let rule = manifest.study_rule?;
        Some((study::score(&rule, &logits)?, rule.logit_threshold))
    });
    let verdict = match scored {
        Some((score, threshold)) if score >= threshold => {
            format!("study score {score:.3}: suspected")
        }
        Some((score, _)) => {
            format!("study score {score:.3}: not detected on {n_analysed} of {n_slices} slices")
        }
        None => "no study rule".to_owned(),
    };
    format!(
        "study {study_uid}: {n_analysed} of {n_slices} slices analysed, {n_positive} positive, highest probability {:.3}; {verdict}\n",
        sigmoid(tempered(highest, temperature))
    )
}

#[expect(clippy::cast_possible_truncation, reason = "shown with three digits")]
fn tempered(logit: f32, temperature: f64) -> f32 {
    (f64::from(logit) / temperature) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architecture::find;
    use crate::export::new_manifest;

    #[test]
    fn not_detected_is_said_of_so_many_slices_of_so_many() {
        let slice = |index: u32, outcome: std::result::Result<f32, &str>| Judged {
            series: ("1.2".into(), "1.2.3".into()),
            file: format!("{index}.dcm"),
            z_mm: Some(f64::from(index)),
            outcome: outcome.map_err(str::to_owned),
        };
        let judged = [
            slice(0, Ok(-3.0)),
            slice(1, Err("truncated")),
            slice(2, Ok(-2.0)),
        ];
        let mut manifest = new_manifest(find("final").unwrap(), 0.125);
        manifest.study_rule = Some(study::StudyRule {
            smoothing_slices: 1,
            top_slices: 1,
            logit_threshold: 0.0,
        });
        let text = table(&judged, Some(&manifest));
        assert!(text.contains("2 of 3 slices analysed"), "{text}");
        assert!(text.contains("not detected on 2 of 3 slices"), "{text}");
        assert!(text.contains("not analysed: 1 (truncated)"), "{text}");
    }
}
