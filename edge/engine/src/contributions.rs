//! Where in the image a logit comes from: its exact division over the positions of the last feature map.
//!
//! In: the last feature map, the two dense layers and the hidden activations of the run just done. Out: one number a position;
//! together with the biases' part they add up to the logit. No run of the network is repeated and none of its arithmetic is touched:
//! this is off the path of the decision.

use crate::network::Dense;

/// A logit, divided over positions.
#[derive(Clone, Debug, PartialEq)]
pub struct Contributions {
    /// Rows of the last feature map.
    pub rows: usize,
    /// Columns of the last feature map.
    pub columns: usize,
    /// Contribution of each position, `[row, column]`, in units of the logit.
    pub values: Vec<f32>,
    /// What comes from the biases, in units of the logit.
    pub bias: f32,
    /// Pixels of the input from one position to the next.
    pub stride: usize,
    /// Row (and column) of the input at the centre of what position 0 sees, in pixels.
    pub centre: f32,
}

/// Divides the logit of one run.
///
/// With `a_h` the hidden activations, `w` and `b` the hidden layer's weights and biases, `x` the features, `v` and `d` those of the last
/// layer and `s` its scale: `logit = s (d + sum_h v_h a_h)`, and `a_h` stands for the accumulator `A_h = b_h + sum_p sum_c
/// w_hcp x_cp`, requantized. Position `p` is given `s sum_h v_h a_h (sum_c w_hcp x_cp) / A_h` over the neurons with `a_h > 0`, which have
/// `A_h > 0`. Sums over channels are exact integers; the rest is f64, rounded once to f32.
///
/// `features` is `[channel, row, column]` with `map = [rows, columns]`; `n_convolutions` tells stride and centre.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "one rounding to f32; sizes of images are far below 2^24"
)]
pub(crate) fn divide(
    hidden: &Dense,
    last: &Dense,
    features: &[u8],
    activations: &[u8],
    map: [usize; 2],
    n_convolutions: usize,
) -> Contributions {
    let n_positions = map[0] * map[1];
    let logit_scale = f64::from(last.scale[0]);
    let mut values = vec![0.0_f64; n_positions];
    let mut bias = logit_scale * f64::from(last.bias[0]);
    let mut partial = vec![0_i32; n_positions];
    let rows = hidden.weights.chunks_exact(hidden.n_inputs);
    for (neuron, (weights, &activation)) in rows.zip(activations).enumerate() {
        let weight = f64::from(last.weights[neuron].cast_signed());
        if activation == 0 {
            continue;
        }
        partial.fill(0);
        let planes = weights
            .chunks_exact(n_positions)
            .zip(features.chunks_exact(n_positions));
        for (weights, features) in planes {
            for ((sum, &weight), &feature) in partial.iter_mut().zip(weights).zip(features) {
                *sum += i32::from(weight.cast_signed()) * i32::from(feature);
            }
        }
        let accumulator = partial.iter().sum::<i32>() + hidden.bias[neuron];
        let share = logit_scale * weight * f64::from(activation) / f64::from(accumulator);
        for (value, &sum) in values.iter_mut().zip(&partial) {
            *value += share * f64::from(sum);
        }
        bias += share * f64::from(hidden.bias[neuron]);
    }
    // A 3 x 3 convolution widens the field by 2 of its steps, the pool after it by 1.
    let stride = 1_usize << n_convolutions;
    let field = 1 + 3 * (stride - 1);
    Contributions {
        rows: map[0],
        columns: map[1],
        values: values.into_iter().map(|value| value as f32).collect(),
        bias: bias as f32,
        stride,
        centre: (field - 1) as f32 / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dense(weights: &[i8], bias: &[i32], scale: f32) -> Dense {
        Dense {
            name: String::new(),
            weights: weights
                .iter()
                .map(|weight| weight.cast_unsigned())
                .collect(),
            n_inputs: weights.len() / bias.len(),
            bias: bias.to_vec(),
            scale: vec![scale; bias.len()],
        }
    }

    #[test]
    fn contributions_and_bias_add_up_to_the_logit() {
        // Two neurons over one channel of 1 x 2 positions; the second is not active.
        let hidden = dense(&[2, 1, -3, -3], &[4, 0], 0.5);
        let last = dense(&[10, 7], &[6], 0.25);
        let divided = divide(&hidden, &last, &[5, 6], &[10, 0], [1, 2], 3);
        // Accumulator 10 + 6 + 4 = 20, activation 10, logit 0.25 (6 + 100) = 26.5.
        assert_eq!(
            divided
                .values
                .iter()
                .map(|value| value.to_bits())
                .collect::<Vec<_>>(),
            [12.5_f32, 7.5].map(f32::to_bits)
        );
        let sum = divided.values.iter().sum::<f32>() + divided.bias;
        assert!((sum - 26.5).abs() < 1e-5, "{sum}");
    }

    #[test]
    fn three_layers_see_22_pixels_every_8() {
        let divided = divide(
            &dense(&[1], &[0], 1.0),
            &dense(&[1], &[0], 1.0),
            &[1],
            &[1],
            [1, 1],
            3,
        );
        assert_eq!(
            (divided.stride, divided.centre.to_bits()),
            (8, 10.5_f32.to_bits())
        );
    }
}
