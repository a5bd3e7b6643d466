//! First weights, as Keras draws them: Glorot uniform for kernels, zero for biases; from a seed, on every machine the
//! same.

use crate::random::Random;

/// `n` values, uniform in [-limit, limit) with `limit = sqrt(6 / (fan_in + fan_out))` (Glorot and Bengio 2010; Keras
/// `GlorotUniform`). For a convolution the fans are 9 x channels. `stream` is the variable's number in the network, so
/// that no variable's values depend on the size of another.
#[must_use]
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "fans are small; weights are f32"
)]
pub fn glorot_uniform(n: usize, fan_in: usize, fan_out: usize, seed: u64, stream: u64) -> Vec<f32> {
    let limit = (6.0 / (fan_in + fan_out) as f64).sqrt();
    let mut random = Random::new(seed, stream);
    (0..n)
        .map(|_| ((2.0 * random.uniform() - 1.0) * limit) as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_fill_the_interval_evenly() {
        let values = glorot_uniform(10_000, 27, 576, 3, 0);
        let limit = (6.0f32 / 603.0).sqrt();
        assert!(values.iter().all(|value| value.abs() <= limit));
        let mean = values.iter().sum::<f32>() / 10_000.0;
        let square = values.iter().map(|value| value * value).sum::<f32>() / 10_000.0;
        assert!(mean.abs() < 0.02 * limit);
        assert!((square / (limit * limit / 3.0) - 1.0).abs() < 0.03);
        assert_eq!(values, glorot_uniform(10_000, 27, 576, 3, 0));
        assert_ne!(values, glorot_uniform(10_000, 27, 576, 4, 0));
    }
}
