//! The temperature of a file's logits, by `evaluate` and again by `verify` for the int8 file (Guo et al. 2017, section 4.2).

use crate::metrics::Sample;

/// Between these it is searched.
const BOUNDS: (f64, f64) = (0.05, 20.0);
/// How near to a bound it is no minimum.
const NEAR: f64 = 1.01;

/// The temperature T of least cross-entropy of sigmoid(logit / T), in [0.05, 20]; NaN where one class is missing. Golden-section search on its
/// logarithm: the cross-entropy is convex in 1/T, so that there is one minimum, or none and the search ends at a bound.
#[must_use]
pub fn temperature(samples: &[Sample]) -> f64 {
    let n_positive = samples.iter().filter(|sample| sample.pe_present).count();
    if n_positive == 0 || n_positive == samples.len() {
        return f64::NAN;
    }
    let loss = |log_temperature: f64| -> f64 {
        let temperature = log_temperature.exp();
        samples
            .iter()
            .map(|sample| {
                let logit = f64::from(sample.logit) / temperature;
                let signed = if sample.pe_present { -logit } else { logit };
                signed.max(0.0) + (-signed.abs()).exp().ln_1p()
            })
            .sum()
    };
    let ratio = (5.0_f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = (BOUNDS.0.ln(), BOUNDS.1.ln());
    for _ in 0..60 {
        let (a, b) = (high - ratio * (high - low), low + ratio * (high - low));
        if loss(a) < loss(b) {
            high = b;
        } else {
            low = a;
        }
    }
    ((low + high) / 2.0).exp()
}

/// Whether the search found no minimum.
#[must_use]
pub fn is_at_bound(temperature: f64) -> bool {
    temperature < BOUNDS.0 * NEAR || temperature > BOUNDS.1 / NEAR
}

/// What is to be said of a temperature at a bound.
#[must_use]
pub fn warning(temperature: f64) -> Option<String> {
    let (low, high) = BOUNDS;
    is_at_bound(temperature).then(|| {
        format!(
            "the temperature {temperature:.2} is the bound of its search ({low} to {high}): none between makes probabilities of these logits, and those shown are not calibrated"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(logit: f32, pe_present: bool) -> Sample {
        Sample {
            logit,
            pe_present,
            study: 0,
        }
    }

    #[test]
    fn temperature_undoes_a_scaling() {
        let scaled = |scale: f32| {
            let mut samples = Vec::new();
            for k in -20..=20_i16 {
                let logit = f32::from(k) / 5.0;
                let probability = shared::probability::sigmoid(logit);
                for n in 0..100_u8 {
                    let pe_present = f32::from(n) < probability * 100.0;
                    samples.push(sample(scale * logit, pe_present));
                }
            }
            temperature(&samples)
        };
        assert!((scaled(3.0) - 3.0).abs() < 0.15);
        assert!((scaled(3.0) / scaled(1.0) - 3.0).abs() < 1e-3);
    }

    #[test]
    fn temperature_needs_both_classes() {
        assert!(temperature(&[sample(1.0, true), sample(-1.0, true)]).is_nan());
        assert!(temperature(&[sample(1.0, false)]).is_nan());
        assert_eq!(warning(f64::NAN), None);
    }

    #[test]
    fn a_temperature_at_the_bound_of_its_search_is_warned_of() {
        let of = |samples: &[Sample]| warning(temperature(samples));
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
