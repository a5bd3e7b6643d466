//! The temperature of a file's logits.

use crate::metrics::Sample;

/// The temperature T of least mean cross-entropy of sigmoid(logit / T) (Guo et al. 2017, section 4.2), in [0.01, 100]; NaN where one class is
/// missing or the least lies at an end. Golden section search: the cross-entropy is convex in 1/T.
pub(super) fn temperature(samples: &[Sample]) -> f64 {
    if samples.iter().all(|sample| sample.pe_present)
        || samples.iter().all(|sample| !sample.pe_present)
    {
        return f64::NAN;
    }
    let loss = |inverse: f64| -> f64 {
        let of_sample = |sample: &Sample| {
            let logit = f64::from(sample.logit) * inverse;
            logit.max(0.0) - if sample.pe_present { logit } else { 0.0 }
                + (-logit.abs()).exp().ln_1p()
        };
        samples.iter().map(of_sample).sum()
    };
    let golden = (5.0_f64.sqrt() - 1.0) / 2.0;
    // The search runs over ln(1/T), a monotone change of the variable, which keeps one minimum.
    let (mut low, mut high) = ((0.01_f64).ln(), (100.0_f64).ln());
    for _ in 0..60 {
        let (left, right) = (high - golden * (high - low), low + golden * (high - low));
        if loss(left.exp()) <= loss(right.exp()) {
            high = right
        } else {
            low = left
        }
    }
    let temperature = (-(low + high) / 2.0).exp();
    // At an end of the interval nothing was found: the logits need a shift that a temperature cannot give.
    if (0.0101..99.0).contains(&temperature) {
        temperature
    } else {
        f64::NAN
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::samples;
    use super::*;

    #[test]
    fn temperature_undoes_a_scaling_of_the_logits() {
        let calibrated = temperature(&samples(1.0));
        assert!((calibrated - 1.0).abs() < 0.1, "{calibrated}");
        assert!((temperature(&samples(3.0)) / calibrated - 3.0).abs() < 1e-3);
    }

    #[test]
    fn temperature_needs_both_classes() {
        let one_class: Vec<Sample> = samples(1.0)
            .into_iter()
            .filter(|sample| sample.pe_present)
            .collect();
        assert!(temperature(&one_class).is_nan());
    }
}
