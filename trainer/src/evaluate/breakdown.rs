//! Figures beside the figures: subgroups, controls, the worst misses.

use super::measure::{figures_of, tempered_logit};
use super::{ControlFigure, Judged, Miss, Subgroup, samples};
use crate::bootstrap::intervals;
use crate::cache::Cache;
use crate::controls::{self, Control};
use crate::index::EXAM_LABELS;
use crate::metrics::{Sample, Sorted};

/// Misses of each kind that the report shows.
const SHOWN_MISSES: usize = 4;

/// For a label of embolus: its positive slices among all negative ones. For any other label and for makers: the slices of those exams. Every label
/// has a line, also where no slice has it.
pub(super) fn subgroups(
    cache: &Cache,
    judged: &Judged,
    threshold: f32,
    seed: u64,
) -> Vec<Subgroup> {
    let all = samples(cache, judged);
    let pick = |keep: &dyn Fn(&crate::index::Row) -> bool| -> Vec<Sample> {
        all.iter()
            .zip(&judged.rows)
            .filter(|(_, row)| keep(&cache.rows()[**row]))
            .map(|(sample, _)| *sample)
            .collect()
    };
    let mut groups = Vec::new();
    let has_labels = |row: &usize| cache.rows()[*row].exam_labels.is_some();
    let is_labelled = judged.rows.iter().any(has_labels);
    for (index, name) in EXAM_LABELS.into_iter().enumerate().filter(|_| is_labelled) {
        let has = |row: &crate::index::Row| row.exam_labels.is_some_and(|labels| labels[index]);
        let is_of_embolus = ![
            "negative_exam_for_pe",
            "qa_motion",
            "qa_contrast",
            "flow_artifact",
            "true_filling_defect_not_pe",
            "indeterminate",
        ]
        .contains(&name);
        let samples = if is_of_embolus {
            pick(&|row| !row.pe_present || has(row))
        } else {
            pick(&has)
        };
        groups.push((name.to_owned(), samples));
    }
    let mut makers: Vec<&str> = judged
        .rows
        .iter()
        .filter_map(|&row| cache.rows()[row].manufacturer.as_deref())
        .collect();
    makers.sort_unstable();
    makers.dedup();
    for maker in makers {
        let samples = pick(&|row| row.manufacturer.as_deref() == Some(maker));
        groups.push((format!("manufacturer: {maker}"), samples));
    }
    groups
        .into_iter()
        .map(|(name, samples)| Subgroup {
            name,
            slice: figures_of(samples, threshold, seed),
        })
        .collect()
}

pub(super) fn control_figures(
    cache: &Cache,
    fit_rows: &[usize],
    judged: &Judged,
    seed: u64,
) -> Vec<ControlFigure> {
    let truth = samples(cache, judged);
    let auroc = |name, samples: Vec<Sample>| ControlFigure {
        name,
        auroc: intervals(&Sorted::new(samples), 0.0, seed)[0],
    };
    let labels: Vec<bool> = truth.iter().map(|sample| sample.pe_present).collect();
    let shuffled = controls::shuffled(&labels, seed);
    let mut figures = vec![auroc(
        "shuffled labels",
        truth
            .iter()
            .zip(shuffled)
            .map(|(sample, pe_present)| Sample {
                pe_present,
                ..*sample
            })
            .collect(),
    )];
    for (name, control) in [
        ("slice position only", Control::Position),
        ("mean intensity only", Control::MeanIntensity),
    ] {
        let scores = controls::scores(cache, control, fit_rows, &judged.rows);
        let samples = truth
            .iter()
            .zip(scores)
            .map(|(sample, logit)| Sample { logit, ..*sample })
            .collect();
        figures.push(auroc(name, samples));
    }
    figures
}

/// The positive slices of lowest logit and the negative ones of highest, at most one a study and kind.
pub(super) fn misses(cache: &Cache, judged: &Judged, temperature: f64) -> Vec<Miss> {
    let mut order: Vec<(usize, f32)> = judged
        .rows
        .iter()
        .copied()
        .zip(judged.logits.iter().copied())
        .collect();
    order.sort_by(|a, b| a.1.total_cmp(&b.1));
    let rows = cache.rows();
    let mut found = Vec::new();
    for pe_present in [true, false] {
        let mut seen = std::collections::HashSet::new();
        let mut take = |(row, logit): &(usize, f32)| {
            let is_wanted =
                rows[*row].pe_present == pe_present && seen.insert(&rows[*row].study_uid);
            is_wanted.then(|| Miss {
                row: *row,
                sop_uid: rows[*row].sop_uid.to_string(),
                pe_present,
                probability: shared::probability::sigmoid(tempered_logit(*logit, temperature)),
            })
        };
        if pe_present {
            found.extend(order.iter().filter_map(&mut take).take(SHOWN_MISSES));
        } else {
            found.extend(order.iter().rev().filter_map(&mut take).take(SHOWN_MISSES));
        }
    }
    found
}
