//! `model-card.md`: intended use, data, figures and limits of a model (Mitchell et al. 2019).

use std::fmt::Write as _;

use shared::RESEARCH_USE;
use shared::manifest::{DataKind, Manifest};

use crate::evaluate::{Evaluation, show};
use crate::metrics::NAMES;

/// The card as Markdown.
#[must_use]
pub fn text(evaluation: &Evaluation, manifest: &Manifest) -> String {
    let mut text = format!(
        "# Model card: {}\n\n**{RESEARCH_USE}**\n\n",
        evaluation.model
    );
    let mut line = |content: &str| {
        text.push_str(content);
        text.push('\n');
    };
    if let Some(leak) = evaluation.leak {
        line(&format!("> {leak}\n"));
    }
    for warning in &evaluation.warnings {
        line(&format!("> Warning: {warning}.\n"));
    }
    line("## Intended use\n");
    line(
        "Research on the triage of CT pulmonary angiographies: which study to look at first. It marks axial slices and studies; it does not",
    );
    line(
        "exclude pulmonary embolism, says nothing about other findings, and decides nothing about a patient.\n",
    );
    line("## Model\n");
    line(&format!(
        "Architecture `{}` at width {}, {:?}. Input: u8 `[N, 3, 256, 256]` (lung, PE and mediastinal window); output: one logit a slice, positive = embolus present.",
        manifest.architecture, manifest.width, manifest.precision
    ));
    line(&format!(
        "File `{}`, BLAKE3 `{}`.\n",
        evaluation.model, evaluation.model_digest
    ));
    line("## Data\n");
    line(&format!(
        "{}. Split: {}.",
        evaluation.data_source, evaluation.data_split
    ));
    line(&format!(
        "Cache digest `{}`. Measured on part `{}`: {} studies, {} slices, {} of them positive.\n",
        evaluation.data_digest,
        evaluation.part.name(),
        evaluation.slice.n_studies,
        evaluation.slice.n,
        evaluation.slice.n_positive
    ));
    if evaluation.data_kind == DataKind::Phantom {
        line(
            "**Trained on synthetic data.** The phantom is drawn by a program; no figure below says anything about patients.\n",
        );
    }
    line("## Figures\n");
    line(
        "95 % intervals by bootstrap over studies. Thresholds were chosen on the validation part and frozen.\n",
    );
    line("| | slices | slices, balanced | studies |");
    line("|---|---|---|---|");
    for name in NAMES {
        let cell = |figures: &crate::evaluate::Figures| {
            figures.values.get(name).map_or_else(String::new, show)
        };
        line(&format!(
            "| {name} | {} | {} | {} |",
            cell(&evaluation.slice),
            cell(&evaluation.slice_balanced),
            cell(&evaluation.study)
        ));
    }
    line("\n## Operating points\n");
    if manifest.operating_points.is_empty() {
        line(
            "The file holds none and decides nothing. The figures above are at these, chosen for them:\n",
        );
    }
    for point in &evaluation.operating_points {
        line(&format!(
            "- `{}`: positive from logit {:.3}; on the validation part sensitivity {:.3}, specificity {:.3}",
            point.name, point.logit_threshold, point.sensitivity, point.specificity
        ));
    }
    let rule = evaluation.study_rule;
    line(&format!(
        "- a study is positive where the mean of its {} highest logits, smoothed over {} slices, is at least {:.3}",
        rule.top_slices, rule.smoothing_slices, rule.logit_threshold
    ));
    line(&format!(
        "\nAt the first one {:.2} slices of a study without embolus are called positive on average. Temperature {:.3}.",
        evaluation.false_positive_slices_per_negative_study, evaluation.temperature
    ));
    line("\n## Subgroups, slices\n");
    line("| | positive | AUROC | sensitivity | specificity |");
    line("|---|---|---|---|---|");
    for group in &evaluation.subgroups {
        let cell = |name| group.slice.values.get(name).map_or_else(String::new, show);
        line(&format!(
            "| {} | {} of {} | {} | {} | {} |",
            group.name,
            group.slice.n_positive,
            group.slice.n,
            cell("auroc"),
            cell("sensitivity"),
            cell("specificity")
        ));
    }
    line("\n## Controls\n");
    for control in &evaluation.controls {
        line(&format!(
            "- {}: AUROC {}",
            control.name,
            show(&control.auroc)
        ));
    }
    if let Some(rsna) = &evaluation.rsna_loss {
        line(&format!(
            "\n{}. Exam labels other than `negative_exam_for_pe` are predicted by their share in the training part.",
            rsna.sentence()
        ));
    }
    line("\n## Limits\n");
    line(
        "- One slice at a time: an embolus that shows only in the course of a vessel through several slices is seen late or not at all.",
    );
    line(
        "- Input of 256 x 256: emboli of small subsegmental vessels cover less than a pixel or two.",
    );
    line(
        "- Not validated on other scanners, protocols, populations or contrast timings than those of the data above.",
    );
    line("- Exams that the data calls indeterminate count as negative here.");
    line("\n## Reproduce\n");
    // Writing to a String does not fail.
    _ = writeln!(
        text,
        "trainer {}, seed {}.",
        evaluation.trainer, evaluation.seed
    );
    text
}
