//! The sum of two quantized tensors: a residual connection.
//!
//! In: two u8 tensors of one shape. Out: u8 of the same shape. With scales `a`, `b`, `y` and zero points `za`, `zb`, `zy`, every operation
//! rounded to f32 once: `round_half_even(fma(q_a, a / y, fma(q_b, b / y, zy - fma(a / y, za, b / y x zb))))`, clamped to
//! `lowest..=255`. It is what onnxruntime's `QLinearAdd` computes on CPUs with fused multiply-add, the constant part included, where its compiler
//! contracts the first product; `fma` is exact IEEE 754, in software where it must be, and so the same on every CPU.

/// Two inputs and an output, ONNX `Add-13` between DequantizeLinear and QuantizeLinear.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sum {
    /// Scale of the first input, the second and the output.
    pub(crate) scales: [f32; 3],
    /// Their zero points.
    pub(crate) zeros: [u8; 3],
    /// Smallest output: the zero point where a ReLU follows, else 0.
    pub(crate) lowest: u8,
}

impl Sum {
    /// Whether every term is finite.
    pub(crate) fn is_finite(&self) -> bool {
        let [a, b, y] = self.scales;
        (255.0 * (a / y)).is_finite() && (255.0 * (b / y)).is_finite()
    }

    /// The sum of two values.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 0..=255 before it becomes u8"
    )]
    fn of(&self, first: u8, second: u8) -> u8 {
        let [a, b, y] = self.scales;
        let [zero_a, zero_b, zero_y] = self.zeros.map(f32::from);
        let (a, b) = (a / y, b / y);
        let fixed = zero_y - a.mul_add(zero_a, b * zero_b);
        let sum = f32::from(first).mul_add(a, f32::from(second).mul_add(b, fixed));
        let lowest = f32::from(self.lowest);
        sum.round_ties_even().clamp(lowest, 255.0) as u8
    }
}

/// A sum, computed once for each pair of values: 64 KiB, where a multiply-add in software takes ten times as long as looking there.
#[derive(Debug)]
pub(crate) struct SumTable {
    /// `[first][second]`.
    sums: Vec<[u8; 256]>,
}

impl SumTable {
    /// Computes all pairs.
    pub(crate) fn new(sum: &Sum) -> Self {
        let all = || 0..=u8::MAX;
        let of_first = |first| {
            let mut sums = [0; 256];
            sums.iter_mut()
                .zip(all())
                .for_each(|(to, second)| *to = sum.of(first, second));
            sums
        };
        Self {
            sums: all().map(of_first).collect(),
        }
    }

    /// Bytes of the table.
    pub(crate) fn bytes(&self) -> usize {
        self.sums.as_flattened().len()
    }

    /// Adds into `out`.
    ///
    /// # Panics
    ///
    /// Where the lengths differ.
    pub(crate) fn run(&self, first: &[u8], second: &[u8], out: &mut [u8]) {
        assert!(
            first.len() == out.len() && second.len() == out.len(),
            "one shape"
        );
        for ((&first, &second), out) in first.iter().zip(second).zip(out) {
            *out = self.sums[usize::from(first)][usize::from(second)];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_values_is_the_real_sum_to_half_a_step() {
        let sum = Sum {
            scales: [0.031, 0.0473, 0.0617],
            zeros: [0, 131, 17],
            lowest: 17,
        };
        let first: Vec<u8> = (0..=255).flat_map(|a| [a; 256]).collect();
        let second: Vec<u8> = (0..256).flat_map(|_| 0..=255_u8).collect();
        let mut out = vec![0; first.len()];
        SumTable::new(&sum).run(&first, &second, &mut out);
        for ((a, b), y) in first.iter().zip(&second).zip(out) {
            let real = f64::from(*a) * 0.031 + (f64::from(*b) - 131.0) * 0.0473;
            let expected = (real / 0.0617 + 17.0).clamp(17.0, 255.0);
            assert!(
                (f64::from(y) - expected).abs() <= 0.5 + 1e-4,
                "{a} + {b}: {y}, expected {expected}"
            );
        }
    }

    #[test]
    fn a_scale_that_is_not_finite_once_divided_is_noticed() {
        let of = |scales| Sum {
            scales,
            zeros: [0; 3],
            lowest: 0,
        };
        assert!(of([0.5, 0.25, 0.125]).is_finite());
        assert!(!of([1e10, 0.25, 1e-30]).is_finite());
        assert!(!of([0.5, 1e37, 1.0]).is_finite());
    }

    /// Pairs of which another order or rounding of the constant part gives a neighbour; outputs by onnxruntime's `QLinearAdd` with AVX2.
    #[test]
    fn the_constant_part_is_rounded_as_onnxruntime_does() {
        for (scales, zeros, [first, second, expected]) in [
            (
                [0.081_428_91, 0.045_908_853, 0.063_464_85],
                [86, 246, 188],
                [2, 245, 79],
            ),
            (
                [0.054_083_463, 0.068_887_35, 0.033_521_72],
                [170, 109, 77],
                [28, 229, 95],
            ),
            (
                [0.057_209_536, 0.044_222_612, 0.075_804],
                [89, 228, 190],
                [54, 185, 138],
            ),
        ] {
            let sum = Sum {
                scales,
                zeros,
                lowest: 0,
            };
            assert_eq!(sum.of(first, second), expected);
        }
    }
}
