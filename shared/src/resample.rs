//! From any size to 256 x 256: bilinear interpolation with aligned corners, on u8 values, in exact arithmetic.
//!
//! For each side of `n` pixels, the longer side being `m`, the output side is `o = round_half_even(n x 256 / m)`; under 2
//! it is refused. Output pixel `i` lies at the source position `i x (n - 1) / (o - 1)`. Its value is the bilinear mean of
//! the four source pixels around it, rounded as `floor(x + 0.5)`. The result stands at offset `(256 - o) div 2` of each
//! axis; around it is 0. There is no antialiasing: that is the recipe of the data of the reference classifier.
//!
//! All positions of an axis are multiples of `1 / (o - 1)`, so the weights are integers and the sum is exact. Rows are
//! filtered first, with the three channels packed into one u64, 16 bits each: `255 x 255` fits.

use core::cmp::Ordering;

use crate::{CHANNELS, SIDE, TENSOR_BYTES, stored::PixelError};

/// Greatest side of an image: Rows and Columns are VR US (PS3.3 C.7.6.3).
pub const MAX_SIDE: usize = 65_535;

/// Bits of one channel of a packed pixel.
pub(crate) const LANE_BITS: usize = 16;

/// Three channels in one word: channel `c` at bit `16 c`.
pub(crate) type Packed = u64;

/// One row after the pass along it: packed sums, each channel 0 to `255 x (o - 1)`.
pub(crate) type FilteredRow = [Packed; SIDE];

/// Where an output pixel of one axis reads: pixels `first` and `second`, weights `denominator - weight` and `weight`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tap {
    /// The pixel at or before the source position.
    pub(crate) first: u32,
    /// The pixel after it, or the same one at the end of the axis.
    pub(crate) second: u32,
    /// Weight of `second`; `denominator - weight` is that of `first`.
    pub(crate) weight: u8,
}

/// One axis of the resize: from `n` source pixels to `n_output` pixels at `offset`.
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    taps: [Tap; SIDE],
    n_output: usize,
    offset: usize,
    denominator: u8,
}

/// Both axes, for one size of image.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    rows: Axis,
    columns: Axis,
    division: Division,
}

/// `floor(x + 0.5)` of a quotient, without dividing: `floor((2 s + d) / (2 d)) = ((2 s + d) x magic) >> shift`.
///
/// With `shift = 30 + bits(2 d)`, `magic = floor(2^shift / 2d) + 1` is below `2^32` and exceeds `2^shift / 2d` by `e / 2d`,
/// `0 < e <= 2d`. The result is right while `(2 s + d) x e < 2^shift`, and `511 d x 2d < 2^30 x 2d` for every `d <= 255^2`.
/// A `magic` of 32 bits lets the compiler multiply several pixels at once.
#[derive(Clone, Copy, Debug)]
struct Division {
    half: u32,
    magic: u32,
    shift: u32,
}

/// Two filtered rows and which source rows they are.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    filtered: [FilteredRow; 2],
    source: [Option<u32>; 2],
}

/// Output pixels for `n` source pixels where the longer side has `longer`: `round_half_even(n x 256 / longer)`; 0 for no
/// pixel at all.
#[must_use]
pub fn output_length(n: usize, longer: usize) -> usize {
    if longer == 0 {
        return 0;
    }
    let scaled = n.saturating_mul(SIDE);
    let (quotient, remainder) = (scaled / longer, scaled % longer);
    quotient
        + match remainder.cmp(&(longer - remainder)) {
            Ordering::Less => 0,
            Ordering::Equal => quotient % 2,
            Ordering::Greater => 1,
        }
}

impl Plan {
    /// # Errors
    /// [`PixelError::Size`] where a side has no pixel, more than [`MAX_SIDE`], or would have fewer than 2 output pixels.
    pub(crate) fn new(rows: usize, columns: usize) -> Result<Self, PixelError> {
        let longer = rows.max(columns);
        let (Some(row_axis), Some(column_axis)) =
            (Axis::new(rows, longer), Axis::new(columns, longer))
        else {
            return Err(PixelError::Size {
                rows,
                columns,
                side: SIDE,
            });
        };
        let division =
            Division::new(u32::from(row_axis.denominator) * u32::from(column_axis.denominator));
        Ok(Self {
            rows: row_axis,
            columns: column_axis,
            division,
        })
    }

    /// Filters one source row; `pixel` gives the packed pixel of a column.
    #[inline(always)]
    pub(crate) fn filter_row(&self, pixel: impl Fn(usize) -> Packed, row: &mut FilteredRow) {
        let denominator = u64::from(self.columns.denominator);
        for (sum, tap) in row.iter_mut().zip(self.columns.taps()) {
            let weight = u64::from(tap.weight);
            *sum = pixel(tap.first as usize) * (denominator - weight)
                + pixel(tap.second as usize) * weight;
        }
    }
}

impl Axis {
    /// `None` where `n` is not 1 to [`MAX_SIDE`] or fewer than 2 output pixels remain. `longer` is at least `n`.
    fn new(n: usize, longer: usize) -> Option<Self> {
        let n_output = output_length(n, longer);
        let last = u32::try_from(n.checked_sub(1).filter(|last| *last < MAX_SIDE)?).ok()?;
        let denominator = u8::try_from(n_output.checked_sub(1)?)
            .ok()
            .filter(|steps| *steps > 0)?;
        let mut taps = [Tap::default(); SIDE];
        for (index, tap) in (0..=u32::from(denominator)).zip(&mut taps) {
            let (first, rest) = (
                index * last / u32::from(denominator),
                index * last % u32::from(denominator),
            );
            *tap = Tap {
                first,
                second: (first + 1).min(last),
                weight: u8::try_from(rest).ok()?,
            };
        }
        Some(Self {
            taps,
            n_output,
            offset: (SIDE - n_output) / 2,
            denominator,
        })
    }

    fn taps(&self) -> &[Tap] {
        &self.taps[..self.n_output]
    }
}

impl Division {
    /// `divisor` is 1 to `255 x 255`.
    #[expect(clippy::cast_possible_truncation, reason = "magic is at most 2^31 + 1")]
    fn new(divisor: u32) -> Self {
        let shift = 30 + (u32::BITS - (2 * divisor).leading_zeros());
        let magic = ((1_u64 << shift) / u64::from(2 * divisor) + 1) as u32;
        Self {
            half: divisor,
            magic,
            shift,
        }
    }

    /// `floor(sum / divisor + 0.5)` for `sum <= 255 x divisor`.
    #[inline(always)]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a mean of u8 values is a u8 value"
    )]
    fn round(self, sum: u32) -> u8 {
        let numerator = sum.wrapping_mul(2).wrapping_add(self.half);
        ((u64::from(numerator) * u64::from(self.magic)) >> self.shift) as u8
    }
}

impl Rows {
    /// Two empty rows.
    pub(crate) const EMPTY: Self = Self {
        filtered: [[0; SIDE]; 2],
        source: [None; 2],
    };

    /// Makes `filtered[place]` source row `row`, if need be by taking it from the other place or from `filter`.
    fn hold(&mut self, place: usize, row: u32, filter: impl FnOnce(usize, &mut FilteredRow)) {
        if self.source[place] == Some(row) {
            return;
        }
        if self.source[1 - place] == Some(row) {
            self.filtered.swap(0, 1);
            self.source.swap(0, 1);
            return;
        }
        filter(row as usize, &mut self.filtered[place]);
        self.source[place] = Some(row);
    }
}

/// Resizes an image into `out`, `[channel, row, column]` of [`TENSOR_BYTES`]; `filter` is to call [`Plan::filter_row`]
/// for a source row.
#[inline(always)]
pub(crate) fn resize(
    plan: &Plan,
    rows: &mut Rows,
    mut filter: impl FnMut(usize, &mut FilteredRow),
    out: &mut [u8],
) {
    debug_assert_eq!(out.len(), TENSOR_BYTES);
    if plan.rows.n_output < SIDE || plan.columns.n_output < SIDE {
        out.fill(0);
    }
    rows.source = [None; 2];
    let first_output = plan.rows.offset * SIDE + plan.columns.offset;
    for (output_row, tap) in plan.rows.taps().iter().enumerate() {
        rows.hold(0, tap.first, &mut filter);
        if tap.weight > 0 {
            rows.hold(1, tap.second, &mut filter);
        }
        let weights = [plan.rows.denominator - tap.weight, tap.weight];
        let start = first_output + output_row * SIDE;
        for channel in 0..CHANNELS {
            let start = channel * SIDE * SIDE + start;
            let out = &mut out[start..start + plan.columns.n_output];
            mix(&rows.filtered, channel, weights, plan.division, out);
        }
    }
}

/// One channel of one output row: the weighted mean of two filtered rows, rounded.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the lower bits are wanted")]
fn mix(
    rows: &[FilteredRow; 2],
    channel: usize,
    weights: [u8; 2],
    division: Division,
    out: &mut [u8],
) {
    let shift = LANE_BITS * channel;
    for ((byte, first), second) in out.iter_mut().zip(&rows[0]).zip(&rows[1]) {
        let lane = |packed: Packed| (packed >> shift) as u32 & 0xFFFF;
        *byte = division
            .round(lane(*first) * u32::from(weights[0]) + lane(*second) * u32::from(weights[1]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_side(n: usize, longer: usize, expected: usize) {
        assert_eq!(output_length(n, longer), expected);
    }

    #[test]
    fn sides_round_half_to_even() {
        check_side(512, 512, 256);
        check_side(1, 512, 0);
        check_side(3, 512, 2);
        check_side(5, 512, 2);
        check_side(7, 512, 4);
        check_side(301, 512, 150);
        check_side(303, 512, 152);
    }

    #[test]
    fn fewer_than_two_output_pixels_are_refused() {
        assert_eq!(
            Plan::new(2, 400).err(),
            Some(PixelError::Size {
                rows: 2,
                columns: 400,
                side: SIDE
            })
        );
        assert_eq!(Plan::new(1, 1).unwrap().rows.n_output, SIDE);
        assert_eq!(Plan::new(100, 1).unwrap().columns.n_output, 3);
    }

    #[test]
    fn corners_are_aligned() {
        for n in [2, 3, 255, 256, 257, 512, 600, 65_535] {
            let axis = Axis::new(n, n).unwrap();
            let last = u32::try_from(n - 1).unwrap();
            assert_eq!(
                axis.taps[0],
                Tap {
                    first: 0,
                    second: 1,
                    weight: 0
                }
            );
            assert_eq!(
                axis.taps[SIDE - 1],
                Tap {
                    first: last,
                    second: last,
                    weight: 0
                }
            );
        }
    }

    /// Every divisor that two axes can have, at the sums where rounding turns.
    #[test]
    fn division_rounds_half_up_for_every_divisor() {
        for rows in 1_u32..256 {
            for columns in rows..256 {
                let divisor = rows * columns;
                let division = Division::new(divisor);
                for value in 0..=255_u32 {
                    let exact = value * divisor;
                    assert_eq!(u32::from(division.round(exact)), value);
                    if value < 255 {
                        let turn = exact + divisor.div_ceil(2);
                        assert_eq!(u32::from(division.round(turn)), value + 1);
                        assert_eq!(u32::from(division.round(turn - 1)), value);
                    }
                }
            }
        }
    }
}
