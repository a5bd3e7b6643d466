//! What makes an evaluation's figures say less than they seem to.

use std::collections::BTreeSet;

use super::choose::Chosen;
use super::{Judged, TARGET_SENSITIVITIES};
use crate::cache::Cache;
use crate::temperature;

/// Positive studies of the validation part below which a target sensitivity cannot be told from the next.
const FEW_STUDIES: usize = 10;

pub(super) fn of(
    cache: &Cache,
    validation: &Judged,
    measured: &Judged,
    chosen: &Chosen,
) -> Vec<String> {
    let mut warnings = Vec::new();
    if is_constant(&measured.logits) {
        warnings.push(
            "every slice has the same logit: the network answers whatever it sees; its units may have died (a smaller learning rate, a greater width)"
                .to_owned(),
        );
    }
    warnings.extend(temperature::warning(chosen.temperature));
    let n_positive = n_studies(cache, validation, true);
    if n_positive < FEW_STUDIES {
        let [first, ..] = TARGET_SENSITIVITIES;
        warnings.push(format!(
            "the validation part has {n_positive} studies with an embolus: thresholds for a sensitivity of {first:.2} and the study rule rest on these few"
        ));
    }
    for (pe_present, kind) in [(true, "with"), (false, "without")] {
        let n = n_studies(cache, measured, pe_present);
        if n < 2 {
            warnings.push(format!(
                "{n} of the measured studies have slices {kind} an embolus: figures that rest on them have no interval"
            ));
        }
    }
    warnings
}

/// Whether several slices have one logit; a single one says nothing of the next.
fn is_constant(logits: &[f32]) -> bool {
    let mut pairs = logits.windows(2);
    logits.len() > 1 && pairs.all(|pair| pair[0].to_bits() == pair[1].to_bits())
}

/// Studies with a slice of that kind.
fn n_studies(cache: &Cache, judged: &Judged, pe_present: bool) -> usize {
    let rows = judged.rows.iter().map(|&row| &cache.rows()[row]);
    let of_kind = rows.filter(|row| row.pe_present == pe_present);
    of_kind
        .map(|row| row.study_uid.as_str())
        .collect::<BTreeSet<_>>()
        .len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slice_is_no_constant_answer() {
        assert!(!is_constant(&[]) && !is_constant(&[1.0]) && !is_constant(&[1.0, 2.0]));
        assert!(is_constant(&[1.0, 1.0]));
    }
}
