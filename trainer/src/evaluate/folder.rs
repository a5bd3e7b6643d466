//! What an evaluation leaves in a folder: `metrics.json`, `report.html`, plots, `model-card.md`, the logits it rests on as `predictions.csv` and
//! `studies.csv`, and for a run's weights the `manifest.json` that `trainer export --run` takes.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use shared::manifest::Manifest;
use shared::probability::sigmoid;

use super::Evaluation;
use super::choose::study_scores;
use super::measure::tempered_logit;
use crate::cache::{Cache, make_folder, write_atomically};
use crate::{export, model_card, plots, provenance, report};

/// The manifest of a weights file that was evaluated.
///
/// # Errors
/// The weights cannot be read.
pub fn manifest_of(weights: &Path, evaluation: &Evaluation, cache: &Cache) -> Result<Manifest> {
    let (architecture, width, _) = export::read_weights(weights)?;
    let mut manifest = export::new_manifest(architecture, width);
    complete(&mut manifest, evaluation, cache)?;
    Ok(manifest)
}

/// Writes `manifest.json` into `out`: `trainer export --run` takes figures and operating points from there.
///
/// # Errors
/// The folder cannot be written.
pub fn write_manifest(manifest: &Manifest, out: &Path) -> Result<()> {
    write_atomically(&out.join("manifest.json"), manifest.to_json().as_bytes())
}

/// Writes the files of an evaluation into `out`. `run` is the folder of the model, whose training curves the report shows where it has some.
///
/// # Errors
/// The folder cannot be written.
pub fn write_all(
    evaluation: &Evaluation,
    cache: &Cache,
    manifest: &Manifest,
    run: &Path,
    out: &Path,
) -> Result<()> {
    make_folder(out)?;
    let json = serde_json::to_string_pretty(evaluation)?;
    write_atomically(&out.join("metrics.json"), json.as_bytes())?;
    for (name, svg) in plots::all(evaluation) {
        write_atomically(&out.join(name), svg.as_bytes())?;
    }
    let page = report::page(evaluation, cache, run)?;
    write_atomically(&out.join("report.html"), page.as_bytes())?;
    let card = model_card::text(evaluation, manifest);
    write_atomically(&out.join("model-card.md"), card.as_bytes())?;
    let slices = predictions(evaluation, cache);
    write_atomically(&out.join("predictions.csv"), slices.as_bytes())?;
    write_atomically(
        &out.join("studies.csv"),
        studies(evaluation, cache).as_bytes(),
    )
}

/// Writes what was found into a model's manifest: figures, operating points, temperature and study rule, of which weights it is true, and what these
/// say of the data they were trained on.
///
/// # Errors
/// The weights' provenance cannot be read.
pub fn complete(manifest: &mut Manifest, evaluation: &Evaluation, cache: &Cache) -> Result<()> {
    if evaluation.leak.is_some() {
        manifest
            .tools
            .extend(provenance::of_split(evaluation.split));
    }
    let weights = evaluation.model_digest.clone();
    manifest
        .tools
        .insert(provenance::WEIGHTS.to_owned(), weights);
    manifest.preprocess = cache.manifest().preprocess.clone();
    provenance::tell(&evaluation.provenance, manifest)?;
    manifest.metrics = evaluation.manifest_metrics();
    manifest.operating_points = evaluation.operating_points.clone();
    manifest.temperature = Some(evaluation.temperature);
    manifest.study_rule = Some(evaluation.study_rule);
    Ok(())
}

/// One line a slice. The probability is the one that is shown, after the temperature; `called_positive` is decided on the logit.
fn predictions(evaluation: &Evaluation, cache: &Cache) -> String {
    let mut text = String::from(
        "row,study_uid,series_uid,sop_uid,part,pe_present,logit,probability,called_positive,notice\n",
    );
    let (judged, notices) = (&evaluation.judged, evaluation.notices());
    for (&number, &logit) in judged.rows.iter().zip(&judged.logits) {
        let row = &cache.rows()[number];
        // Writing to a String does not fail.
        _ = writeln!(
            text,
            "{number},{},{},{},{},{},{logit},{},{},\"{notices}\"",
            row.study_uid,
            row.series_uid,
            row.sop_uid,
            evaluation.part.name(),
            u8::from(row.pe_present),
            sigmoid(tempered_logit(logit, evaluation.temperature)),
            u8::from(logit >= evaluation.slice.threshold)
        );
    }
    text
}

/// One line a study, with the score of the study rule.
fn studies(evaluation: &Evaluation, cache: &Cache) -> String {
    let mut text = String::from("study_uid,pe_present,score,called_positive,notice\n");
    let notices = evaluation.notices();
    for (study, sample) in study_scores(cache, &evaluation.judged, &evaluation.study_rule) {
        // As above.
        _ = writeln!(
            text,
            "{study},{},{},{},\"{notices}\"",
            u8::from(sample.pe_present),
            sample.logit,
            u8::from(sample.logit >= evaluation.study.threshold)
        );
    }
    text
}
