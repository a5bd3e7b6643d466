//! `model-card.md`: intended use, data, figures and limits of a model (Mitchell et al. 2019).

use std::fmt::Write as _;

use shared::RESEARCH_USE;
use shared::manifest::{DataKind, Manifest};

use crate::bootstrap::ECE_NOTE;
use crate::evaluate::{Evaluation, Figures, show};
use crate::metrics::NAMES;

const INTENDED_USE: &str = "\
## Intended use

Research on the triage of CT pulmonary angiographies: which study to look at first. It marks axial slices and studies; it does not
exclude pulmonary embolism, says nothing about other findings, and decides nothing about a patient.
";

const LIMITS: &str = "\
## Limits

- One slice at a time: an embolus that shows only in the course of a vessel through several slices is seen late or not at all.
- Input of 256 x 256: emboli of small subsegmental vessels cover less than a pixel or two.
- Not validated on other scanners, protocols, populations or contrast timings than those of the data above.
- Exams that the data calls indeterminate count as negative here.
";

/// The card as Markdown.
#[must_use]
pub fn text(evaluation: &Evaluation, manifest: &Manifest) -> String {
    let limits = format!(
        "{LIMITS}- Measured on studies of {} slices on average. The more slices a study has, the more easily its highest ones reach the study threshold.\n",
        evaluation.slice.n / evaluation.slice.n_studies.max(1)
    );
    let reproduce = format!(
        "## Reproduce\n\n`trainer evaluate --model {} --data CACHE --part {} --seed {}` on the cache with the digest above, trainer {}.\n",
        evaluation.model,
        evaluation.part.name(),
        evaluation.seed,
        evaluation.trainer
    );
    [
        head(evaluation),
        INTENDED_USE.to_owned(),
        model(evaluation, manifest),
        data(evaluation, manifest),
        figures(evaluation),
        operating_points(evaluation, manifest),
        subgroups(evaluation),
        controls(evaluation),
        limits,
        reproduce,
    ]
    .join("\n")
}

fn head(evaluation: &Evaluation) -> String {
    let mut text = format!("# Model card: {}\n\n**{RESEARCH_USE}**\n", evaluation.model);
    // Writing to a String does not fail, here and below.
    if let Some(leak) = evaluation.leak {
        _ = writeln!(text, "\n> {leak}");
    }
    for warning in &evaluation.warnings {
        _ = writeln!(text, "\n> Warning: {warning}.");
    }
    text
}

fn model(evaluation: &Evaluation, manifest: &Manifest) -> String {
    format!(
        "## Model\n\n\
         Architecture `{}` at width {}, {:?}. Input: u8 `[N, 3, 256, 256]` (lung, PE and mediastinal window); output: one logit a slice, positive = embolus present.\n\
         File `{}`, BLAKE3 `{}`.\n",
        manifest.architecture,
        manifest.width,
        manifest.precision,
        evaluation.model,
        evaluation.model_digest
    )
}

/// What the weights were trained on, as they say themselves, and what the figures were measured on, which may be other data.
fn data(evaluation: &Evaluation, manifest: &Manifest) -> String {
    let mut text = String::from("## Data\n\n");
    let known = &manifest.training_data;
    let on_trained = format!(
        "{} studies, {} slices of a cache with digest `{}`",
        known.n_studies, known.n_slices, known.digest
    );
    let trained = match known.kind {
        DataKind::None => {
            "Trained on: not known, or not at all; the file says nothing of it.".to_owned()
        }
        DataKind::Phantom => format!("**Trained on synthetic data**: {on_trained}."),
        DataKind::Rsna => format!("Trained on the RSNA data set: {on_trained}."),
        DataKind::Jpeg => format!("Trained on the JPEG copy of the RSNA data set: {on_trained}."),
        DataKind::Folders => format!("Trained on two folders of images: {on_trained}."),
    };
    _ = writeln!(
        text,
        "{trained}\n\nMeasured on: {}. Split: {}. Cache digest `{}`, part `{}`: {} studies, {} slices, {} of them positive.",
        evaluation.data_source,
        evaluation.data_split,
        evaluation.data_digest,
        evaluation.part.name(),
        evaluation.slice.n_studies,
        evaluation.slice.n,
        evaluation.slice.n_positive
    );
    if evaluation.data_kind == DataKind::Phantom {
        text.push_str(
            "\n**Measured on synthetic data.** The phantom is drawn by a program; no figure below says anything about patients.\n",
        );
    }
    text
}

fn figures(evaluation: &Evaluation) -> String {
    let mut text = format!(
        "## Figures\n\n\
         95 % intervals by bootstrap over studies. Thresholds were chosen on the validation part and frozen. {ECE_NOTE}\n\n\
         | | slices | slices, balanced | studies |\n|---|---|---|---|\n"
    );
    let columns = [
        &evaluation.slice,
        &evaluation.slice_balanced,
        &evaluation.study,
    ];
    for name in NAMES {
        let [slices, balanced, studies] = columns.map(|figures| cell(figures, name));
        _ = writeln!(text, "| {name} | {slices} | {balanced} | {studies} |");
    }
    text
}

/// A figure with its interval; empty where it was not measured.
fn cell(figures: &Figures, name: &str) -> String {
    figures.values.get(name).map_or_else(String::new, show)
}

fn operating_points(evaluation: &Evaluation, manifest: &Manifest) -> String {
    let mut text = String::from("## Operating points\n\n");
    if manifest.operating_points.is_empty() {
        text.push_str(
            "The file holds none and decides nothing. The figures above are at these, chosen for them:\n\n",
        );
    }
    for point in &evaluation.operating_points {
        _ = writeln!(
            text,
            "- `{}`: positive from logit {:.3}; on the validation part sensitivity {:.3}, specificity {:.3}",
            point.name, point.logit_threshold, point.sensitivity, point.specificity
        );
    }
    let rule = evaluation.study_rule;
    _ = writeln!(
        text,
        "- a study is positive where the mean of its {} highest logits, smoothed over {} slices, is at least {:.3}",
        rule.top_slices, rule.smoothing_slices, rule.logit_threshold
    );
    _ = writeln!(
        text,
        "\n{} Temperature {:.3}.",
        evaluation.false_positives_sentence(),
        evaluation.temperature
    );
    text
}

fn subgroups(evaluation: &Evaluation) -> String {
    let mut text = String::from(
        "## Subgroups, slices\n\n| | positive | AUROC | sensitivity | specificity |\n|---|---|---|---|---|\n",
    );
    for group in &evaluation.subgroups {
        let [auroc, sensitivity, specificity] =
            ["auroc", "sensitivity", "specificity"].map(|name| cell(&group.slice, name));
        _ = writeln!(
            text,
            "| {} | {} of {} | {auroc} | {sensitivity} | {specificity} |",
            group.name, group.slice.n_positive, group.slice.n
        );
    }
    text
}

fn controls(evaluation: &Evaluation) -> String {
    let mut text = String::from("## Controls\n\n");
    for control in &evaluation.controls {
        _ = writeln!(text, "- {}: AUROC {}", control.name, show(&control.auroc));
    }
    if let Some(rsna) = &evaluation.rsna_loss {
        _ = writeln!(
            text,
            "\n{}. Exam labels other than `negative_exam_for_pe` are predicted by their share in the training part.",
            rsna.sentence()
        );
    }
    text
}
