//! The publication's table with ours beside it, as Markdown.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use shared::RESEARCH_USE;

use super::{CompareArgs, Compared};
use crate::architecture::{Architecture, Published};
use crate::backbone::backbone;
use crate::evaluate;

const HEADER: &str = "\
| # | system | published accuracy | published recall, as printed | published recall of the other class | published precision, as printed | published F1 | ours: images x epochs | ours: accuracy | ours: sensitivity | ours: specificity | ours: precision | ours: F1 | ours: AUROC | ours: AUROC of studies |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
";

/// Our figures, in the order of the header.
const FIGURES: [&str; 7] = [
    "accuracy",
    "sensitivity",
    "specificity",
    "precision",
    "f1",
    "auroc",
    "study_auroc",
];

const BOTH_READINGS: &str = "
The published recall in both readings: as printed it is the sensitivity for what the publication calls positive. Its positive is column 0 of \
the folders `no_pe`, `pe_present`, so it is *no PE* (inferred from the folder names): read so, the printed recall is the specificity for embolus, to be compared \
with our specificity, and the recall of the other class, which follows from the printed figures to about 0.01, with our sensitivity. For the final model the \
confusion matrix 2207 / 283 / 137 / 2373 then gives a sensitivity for embolus of 2207/2490 = 0.886 and a specificity of 0.945. The publication split by image: slices of one patient stood on both sides.
";

pub(super) fn table(
    args: &CompareArgs,
    source: &str,
    rows: &[(&'static Architecture, Compared)],
) -> String {
    let mut text = format!(
        "# The publication's table with ours beside it\n\n**{RESEARCH_USE}**\n\n{source}; width {}, seed {}; test part, balanced sample, probability 0.5 \
         (row 0: natural prevalence). Positive: embolus present.\n\n",
        args.width, args.seed
    );
    // Writing to a String does not fail, here and below.
    if let Some(warning) = args.split.warning() {
        _ = writeln!(text, "> {warning}\n");
    }
    text.push_str(HEADER);
    for (system, row) in rows {
        text.push_str(&line(system, row));
    }
    for (system, row) in rows {
        if let Some(reason) = &row.reason {
            _ = writeln!(text, "\n{}: not trained: {reason}", system.name);
        }
    }
    text.push_str(&warnings(rows));
    let has_transfer = rows
        .iter()
        .any(|(system, _)| backbone(system.family, 1.0).is_some());
    if has_transfer {
        text.push_str(if args.imagenet.is_some() {
            "\nThe transfer learners have width 1 and begin with ImageNet's weights."
        } else {
            "\nThe transfer learners began with random weights at the width above: nothing was transferred (`--imagenet DIR` gives ImageNet's)."
        });
        text.push_str(
            " The publication says neither their images nor their epochs: 1,000 and 5 here.\n",
        );
    }
    text.push_str(BOTH_READINGS);
    text
}

/// A system's line.
fn line(system: &Architecture, row: &Compared) -> String {
    let published = system.published.as_ref().map_or_else(
        || ["-"; 5].map(str::to_owned),
        |found| {
            let other = other_recall(found);
            [
                found.accuracy,
                found.recall,
                other,
                found.precision,
                found.f1,
            ]
            .map(|value| {
                if value.is_finite() {
                    format!("{value:.3}")
                } else {
                    "-".into()
                }
            })
        },
    );
    let trained = row.trained.map_or_else(
        || "-".to_owned(),
        |(images, epochs)| format!("{images} x {epochs}"),
    );
    let ours = FIGURES.map(|name| {
        row.figures
            .get(name)
            .map_or_else(|| "-".into(), evaluate::show)
    });
    format!(
        "| {} | {} | {} | {trained} | {} |\n",
        system.row,
        system.title,
        published.join(" | "),
        ours.join(" | ")
    )
}

/// What the rows' evaluations warn of, each warning once with its rows.
fn warnings(rows: &[(&'static Architecture, Compared)]) -> String {
    let mut warned: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (_, row) in rows {
        for warning in &row.warnings {
            warned.entry(warning).or_default().push(&row.name);
        }
    }
    let mut text = String::new();
    for (warning, names) in warned {
        _ = writeln!(text, "\nWarning, {}: {warning}.", names.join(", "));
    }
    text
}

/// The recall of the class that the publication does not call positive, from its accuracy a, recall r and precision p: with n negatives for each
/// positive, r (1 - p) / p of them are false positives, and a (1 + n) = r + n - r (1 - p) / p. NaN where nothing was called positive.
fn other_recall(published: &Published) -> f64 {
    let Published {
        accuracy,
        recall,
        precision,
        ..
    } = *published;
    let n_false = recall * (1.0 - precision) / precision;
    let n_negative = (accuracy - recall + n_false) / (1.0 - accuracy);
    1.0 - n_false / n_negative
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architecture;

    #[test]
    fn recall_of_the_other_class_follows_from_the_printed_figures() {
        let published = |name| architecture::find(name).unwrap().published.unwrap();
        // Of the confusion matrix 2207 / 283 / 137 / 2373.
        let found = other_recall(&published("final"));
        assert!((found - 2207.0 / 2490.0).abs() < 0.005, "{found}");
        assert!(other_recall(&published("baseline")).is_nan());
    }
}
