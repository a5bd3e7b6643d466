//! What makes an evaluation's figures say less than they seem to.

use std::collections::BTreeSet;

use super::choose::{Chosen, TEMPERATURES};
use super::{Judged, TARGET_SENSITIVITIES};
use crate::cache::Cache;

/// Positive studies of the validation part below which a target sensitivity cannot be told from the next.
const FEW_STUDIES: usize = 10;
/// How near to the search's bound a temperature is no minimum.
const NEAR: f64 = 1.01;

pub(super) fn of(
    cache: &Cache,
    validation: &Judged,
    measured: &Judged,
    chosen: &Chosen,
) -> Vec<String> {
    let mut warnings = Vec::new();
    if measured
        .logits
        .windows(2)
        .all(|pair| pair[0].to_bits() == pair[1].to_bits())
    {
        warnings.push(
            "every slice has the same logit: the network answers whatever it sees; its units may have died (a smaller learning rate, a greater width)"
                .to_owned(),
        );
    }
    warnings.extend(temperature(chosen.temperature));
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

fn temperature(found: f64) -> Option<String> {
    let (low, high) = TEMPERATURES;
    let is_at_bound = found < low * NEAR || found > high / NEAR;
    is_at_bound.then(|| {
        format!(
            "the temperature {found:.2} is the bound of its search ({low} to {high}): none between makes probabilities of these logits, and those shown are not calibrated"
        )
    })
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
    use crate::evaluate::choose;
    use crate::metrics::Sample;

    #[test]
    fn a_temperature_at_the_bound_of_its_search_is_warned_of() {
        let sample = |logit, pe_present| Sample {
            logit,
            pe_present,
            study: 0,
        };
        let of = |samples: &[Sample]| temperature(choose::temperature(samples));
        let overlapping = [
            sample(2.0, true),
            sample(-1.0, true),
            sample(1.0, false),
            sample(-2.0, false),
        ];
        assert_eq!(of(&overlapping), None);
        let contrary = [sample(-2.0, true), sample(1.0, false)];
        assert!(of(&contrary).unwrap().contains("temperature 20.00"));
        let separable = [sample(2.0, true), sample(-1.0, false)];
        assert!(of(&separable).unwrap().contains("temperature 0.05"));
    }
}
