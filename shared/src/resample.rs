//! Where the output's pixels come from: aligned-corner bilinear, centred, exact.

use alloc::vec::Vec;

use crate::SIDE;

/// How one axis of the image is brought to the output.
///
/// Output pixel `i` of `output` lies at source position `i x (input - 1) / (output - 1)`; its value is
/// `(a x (denominator - weight) + b x weight) / denominator` of the two source pixels around it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Axis {
    /// First of the two source pixels, by output pixel.
    pub first: Vec<usize>,
    /// Second of the two source pixels: the next one, or the first again at the end.
    pub second: Vec<usize>,
    /// Weight of the second pixel, by output pixel: 0 to `denominator - 1`.
    pub weight: Vec<u32>,
    /// `output - 1`, 1 to 255.
    pub denominator: u32,
    /// First output pixel: `(SIDE - output) div 2`; what lies outside is 0.
    pub offset: usize,
}

/// Output length of a side: `round_half_even(side x 256 / longer)`, 0 for no pixels at all.
#[must_use]
pub fn output_length(side: usize, longer: usize) -> usize {
    if longer == 0 {
        return 0;
    }
    let scaled = side.saturating_mul(SIDE);
    let (quotient, remainder) = (scaled / longer, scaled % longer);
    match (remainder * 2).cmp(&longer) {
        core::cmp::Ordering::Less => quotient,
        core::cmp::Ordering::Equal => quotient + quotient % 2,
        core::cmp::Ordering::Greater => quotient + 1,
    }
}

impl Axis {
    /// The axis from `input` source pixels to `output` pixels, 2 to [`SIDE`]; `None` outside that range or for no input.
    #[must_use]
    pub fn new(input: usize, output: usize) -> Option<Self> {
        if input == 0 || !(2..=SIDE).contains(&output) {
            return None;
        }
        let steps = output - 1;
        let first: Vec<usize> = (0..output).map(|i| i * (input - 1) / steps).collect();
        let second = first.iter().map(|f| (f + 1).min(input - 1)).collect();
        let weight = (0..output)
            .map(|i| u32::try_from(i * (input - 1) % steps))
            .collect::<Result<_, _>>()
            .ok()?;
        Some(Self {
            first,
            second,
            weight,
            denominator: u32::try_from(steps).ok()?,
            offset: (SIDE - output) / 2,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_length_rounds_half_to_even() {
        assert_eq!(output_length(512, 512), 256);
        assert_eq!(output_length(341, 512), 170); // 170.5
        assert_eq!(output_length(343, 512), 172); // 171.5
        assert_eq!(output_length(1, 512), 0); // 0.5
        assert_eq!(output_length(3, 512), 2); // 1.5
    }

    #[test]
    fn corners_stay_corners() {
        let axis = Axis::new(512, 256).unwrap();
        assert_eq!((axis.first[0], axis.weight[0]), (0, 0));
        assert_eq!((axis.first[255], axis.weight[255]), (511, 0));
        assert_eq!(
            (axis.first[1], axis.weight[1], axis.denominator),
            (2, 1, 255)
        );
    }

    #[test]
    fn fewer_than_two_output_pixels_are_refused() {
        assert_eq!(Axis::new(512, 1), None);
        assert_eq!(Axis::new(0, 256), None);
    }
}
