//! A slice to the network's input: stored values, HU, windows and resize in one pass.
//!
//! The definition, pixel by pixel: HU = slope x stored + intercept; each channel's [`crate::window::Window::apply`];
//! padding is 0 in all channels; then, per channel and on the u8 values, aligned-corner bilinear interpolation in exact
//! arithmetic, rounded as `floor(x + 0.5)`, centred, 0 outside. The tests hold that definition in its plain form.
//!
//! The fast way gives the same bytes: a table maps each stored code to its three windowed values, packed; a source row is
//! interpolated along the row in packed form, two such rows are combined per output row. All sums are integers
//! (at most 255 x 255 x 255), the division by the constant denominator is a multiplication by its reciprocal.

use alloc::boxed::Box;
use alloc::vec::Vec;

pub use crate::stored::PixelError;

use crate::hounsfield::Rescale;
use crate::resample::{Axis, output_length};
use crate::spec::{Normalisation, PreprocessSpec, SpecError};
use crate::stored::{ByteOrder, PixelFormat, PixelPadding, SlicePixels};
use crate::window::Window;
use crate::{CHANNELS, SIDE, TENSOR_BYTES, mask};

/// Largest Bits Stored that is windowed through a table; wider values are windowed one by one.
const MAX_TABLE_BITS: u16 = 16;

/// The range that `series-minmax` divides by, gathered over all slices of a series.
///
/// Per channel, over the non-padding pixels, of HU clipped to the window's bounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SeriesRange {
    /// Least clipped HU, by channel.
    pub min_hu: [f64; CHANNELS],
    /// Greatest clipped HU, by channel.
    pub max_hu: [f64; CHANNELS],
}

/// Brings slices to tensors by one [`PreprocessSpec`]; keeps its tables from slice to slice.
///
/// Slices of the same format, rescale, padding and size cause no heap allocation after the first (without `body_mask`).
#[derive(Debug)]
pub struct Preprocessor {
    spec: PreprocessSpec,
    table: Option<Table>,
    geometry: Option<Geometry>,
    rows: Box<RowPair>,
}

/// Windowed values of every stored code: channel `c` in bits `8c..8c + 8`.
#[derive(Debug)]
struct Table {
    key: (
        PixelFormat,
        Rescale,
        Option<PixelPadding>,
        Option<SeriesRange>,
    ),
    packed: Vec<u32>,
}

#[derive(Debug)]
struct Geometry {
    rows: usize,
    columns: usize,
    vertical: Axis,
    horizontal: Axis,
}

/// Two source rows after horizontal interpolation, `[channel, column]`, each value at most 255 x 255.
#[derive(Debug)]
struct RowPair {
    source: [Option<usize>; 2],
    values: [[[u16; SIDE]; CHANNELS]; 2],
}

impl Preprocessor {
    /// A preprocessor for `spec`.
    ///
    /// # Errors
    /// A spec that this build cannot do.
    pub fn new(spec: &PreprocessSpec) -> Result<Self, SpecError> {
        spec.check()?;
        let rows = Box::new(RowPair {
            source: [None; 2],
            values: [[[0; SIDE]; CHANNELS]; 2],
        });
        Ok(Self {
            spec: spec.clone(),
            table: None,
            geometry: None,
            rows,
        })
    }

    /// The spec.
    #[must_use]
    pub fn spec(&self) -> &PreprocessSpec {
        &self.spec
    }

    /// One slice to `out`, u8 `[3, 256, 256]`, with normalisation `window`.
    ///
    /// # Errors
    /// Pixels that do not fit their description, an image too thin, an `out` of another length than [`TENSOR_BYTES`],
    /// a spec with `series-minmax`.
    pub fn tensor(&mut self, slice: &SlicePixels<'_>, out: &mut [u8]) -> Result<(), PixelError> {
        if self.spec.normalisation != Normalisation::Window {
            return Err(PixelError::Normalisation {
                needed: "the range of the whole series",
            });
        }
        self.run(slice, None, out)
    }

    /// Widens `range` by one slice of a series; start with `None`. A slice of padding alone changes nothing.
    ///
    /// # Errors
    /// Pixels that do not fit their description.
    pub fn series_range(
        &self,
        slice: &SlicePixels<'_>,
        range: Option<SeriesRange>,
    ) -> Result<Option<SeriesRange>, PixelError> {
        slice.check()?;
        let mut hu_range: Option<(f64, f64)> = None;
        for hu in (0..slice.rows * slice.columns).filter_map(|index| slice.hounsfield(index)) {
            hu_range = Some(hu_range.map_or((hu, hu), |(min, max)| (hu.min(min), hu.max(max))));
        }
        let Some((min, max)) = hu_range else {
            return Ok(range);
        };
        let clipped = |hu: f64| -> [f64; CHANNELS] {
            self.spec.windows.map(|window| {
                let (low, high) = window.bounds_hu();
                hu.clamp(low, high)
            })
        };
        let mut wider = range.unwrap_or(SeriesRange {
            min_hu: clipped(min),
            max_hu: clipped(max),
        });
        for channel in 0..CHANNELS {
            wider.min_hu[channel] = wider.min_hu[channel].min(clipped(min)[channel]);
            wider.max_hu[channel] = wider.max_hu[channel].max(clipped(max)[channel]);
        }
        Ok(Some(wider))
    }

    /// One slice to `out`, u8 `[3, 256, 256]`, with normalisation `series-minmax` and the range of its series.
    ///
    /// # Errors
    /// As [`Self::tensor`]; here a spec with `window` is refused.
    pub fn tensor_in_series(
        &mut self,
        slice: &SlicePixels<'_>,
        range: &SeriesRange,
        out: &mut [u8],
    ) -> Result<(), PixelError> {
        if self.spec.normalisation != Normalisation::SeriesMinmax {
            return Err(PixelError::Normalisation {
                needed: "each slice on its own",
            });
        }
        self.run(slice, Some(*range), out)
    }

    fn run(
        &mut self,
        slice: &SlicePixels<'_>,
        range: Option<SeriesRange>,
        out: &mut [u8],
    ) -> Result<(), PixelError> {
        if out.len() != TENSOR_BYTES {
            return Err(PixelError::Output {
                found: out.len(),
                needed: TENSOR_BYTES,
            });
        }
        slice.check()?;
        let Self {
            spec,
            table,
            geometry,
            rows,
        } = self;
        let geometry = Geometry::kept(geometry, slice)?;
        let windowing = Windowing {
            windows: &spec.windows,
            rescale: slice.rescale,
            padding: slice.padding,
            range,
        };
        let one_by_one =
            |index: usize| slice.hounsfield(index).map_or(0, |hu| windowing.packed(hu));
        if spec.body_mask {
            let kept = body_mask(slice);
            let air = windowing.packed(mask::AIR_HU);
            resample(
                geometry,
                rows,
                |index| if kept[index] { one_by_one(index) } else { air },
                out,
            );
            return Ok(());
        }
        if slice.format.bits_stored > MAX_TABLE_BITS {
            resample(geometry, rows, one_by_one, out);
            return Ok(());
        }
        let packed = Table::kept(table, slice.format, &windowing);
        let (format, bytes) = (slice.format, slice.bytes);
        let look_up = |cell: u32| packed[format.code(cell) as usize];
        match (format.bits_allocated, format.byte_order) {
            (16, ByteOrder::LittleEndian) => {
                resample(
                    geometry,
                    rows,
                    |i| look_up(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).into()),
                    out,
                );
            }
            (16, ByteOrder::BigEndian) => {
                resample(
                    geometry,
                    rows,
                    |i| look_up(u16::from_be_bytes([bytes[2 * i], bytes[2 * i + 1]]).into()),
                    out,
                );
            }
            _ => resample(geometry, rows, |i| look_up(format.cell(bytes, i)), out),
        }
        Ok(())
    }
}

/// What turns a stored value into three windowed values.
struct Windowing<'a> {
    windows: &'a [Window; CHANNELS],
    rescale: Rescale,
    padding: Option<PixelPadding>,
    range: Option<SeriesRange>,
}

impl Windowing<'_> {
    /// The windowed values of `hu`, channel `c` in bits `8c..8c + 8`.
    fn packed(&self, hu: f64) -> u32 {
        let value = |channel: usize| match &self.range {
            None => self.windows[channel].apply(hu),
            Some(range) => in_series(
                &self.windows[channel],
                hu,
                range.min_hu[channel],
                range.max_hu[channel],
            ),
        };
        u32::from_le_bytes([value(0), value(1), value(2), 0])
    }

    /// The table over all codes of `format`, in the memory of `packed`.
    fn table(&self, format: PixelFormat, mut packed: Vec<u32>) -> Vec<u32> {
        packed.clear();
        packed.extend((0..1_u32 << format.bits_stored).map(|code| {
            let stored_value = format.stored_value(code);
            match self.padding {
                Some(padding) if padding.contains(stored_value) => 0,
                _ => self.packed(self.rescale.hounsfield(stored_value)),
            }
        }));
        packed
    }
}

/// `trunc(((clip(hu) - min) / (max - min)) x 255)`, in f64; 0 where the series has one value only.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float that is cast to u8 saturates; the cast is the truncation"
)]
fn in_series(window: &Window, hu: f64, min_hu: f64, max_hu: f64) -> u8 {
    let (low, high) = window.bounds_hu();
    if max_hu <= min_hu {
        return 0;
    }
    (((hu.clamp(low, high) - min_hu) / (max_hu - min_hu)) * 255.0) as u8
}

impl Table {
    /// The table for these parameters: the kept one, or a new one in its memory.
    fn kept<'t>(
        kept: &'t mut Option<Self>,
        format: PixelFormat,
        windowing: &Windowing<'_>,
    ) -> &'t [u32] {
        let key = (
            format,
            windowing.rescale,
            windowing.padding,
            windowing.range,
        );
        let table = match kept.take() {
            Some(table) if table.key == key => table,
            Some(table) => Self {
                key,
                packed: windowing.table(format, table.packed),
            },
            None => Self {
                key,
                packed: windowing.table(format, Vec::new()),
            },
        };
        &kept.insert(table).packed
    }
}

impl Geometry {
    /// The geometry for this size of image: the kept one, or a new one.
    fn kept<'g>(
        kept: &'g mut Option<Self>,
        slice: &SlicePixels<'_>,
    ) -> Result<&'g Self, PixelError> {
        let (rows, columns) = (slice.rows, slice.columns);
        let geometry = match kept.take() {
            Some(geometry) if (geometry.rows, geometry.columns) == (rows, columns) => geometry,
            _ => Self::new(rows, columns).ok_or(PixelError::Size {
                rows,
                columns,
                side: SIDE,
            })?,
        };
        Ok(kept.insert(geometry))
    }

    fn new(rows: usize, columns: usize) -> Option<Self> {
        let longer = rows.max(columns);
        let vertical = Axis::new(rows, output_length(rows, longer))?;
        let horizontal = Axis::new(columns, output_length(columns, longer))?;
        Some(Self {
            rows,
            columns,
            vertical,
            horizontal,
        })
    }
}

/// The body mask of a slice, `[rows, columns]`.
fn body_mask(slice: &SlicePixels<'_>) -> Vec<bool> {
    let n_pixels = slice.rows * slice.columns;
    let is_dense: Vec<bool> = (0..n_pixels)
        .map(|i| slice.hounsfield(i).is_some_and(|hu| hu >= mask::BODY_HU))
        .collect();
    mask::body(&is_dense, slice.rows, slice.columns)
}

/// Fills `out` from the packed values that `packed` gives for a source pixel's index.
fn resample(
    geometry: &Geometry,
    pair: &mut RowPair,
    packed: impl Fn(usize) -> u32,
    out: &mut [u8],
) {
    let (vertical, horizontal) = (&geometry.vertical, &geometry.horizontal);
    if vertical.offset > 0 || horizontal.offset > 0 {
        out.fill(0);
    }
    pair.source = [None; 2];
    let rounding = Rounding::new(vertical.denominator * horizontal.denominator);
    for row in 0..vertical.first.len() {
        let upper = pair.hold(vertical.first[row], vertical.second[row], geometry, &packed);
        let lower = pair.hold(vertical.second[row], vertical.first[row], geometry, &packed);
        let weight = vertical.weight[row];
        for (channel, plane) in out.chunks_exact_mut(SIDE * SIDE).enumerate() {
            let start = (vertical.offset + row) * SIDE + horizontal.offset;
            let line = &mut plane[start..start + horizontal.first.len()];
            let (a, b) = (&pair.values[upper][channel], &pair.values[lower][channel]);
            for ((out, a), b) in line.iter_mut().zip(a).zip(b) {
                *out = rounding.divide(
                    u32::from(*a) * (vertical.denominator - weight) + u32::from(*b) * weight,
                );
            }
        }
    }
}

impl RowPair {
    /// Holds source row `row`, without giving up `other`; returns where it is.
    fn hold(
        &mut self,
        row: usize,
        other: usize,
        geometry: &Geometry,
        packed: &impl Fn(usize) -> u32,
    ) -> usize {
        if let Some(place) = self.source.iter().position(|source| *source == Some(row)) {
            return place;
        }
        let place = usize::from(self.source[0] == Some(other));
        self.source[place] = Some(row);
        interpolate_row(
            row * geometry.columns,
            &geometry.horizontal,
            packed,
            &mut self.values[place],
        );
        place
    }
}

/// Interpolates one source row: three sums of at most 255 x 255 at once, 21 bits apart in a u64.
#[expect(
    clippy::cast_possible_truncation,
    reason = "each sum is at most 255 x 255, the low 16 bits of its 21"
)]
fn interpolate_row(
    start: usize,
    axis: &Axis,
    packed: &impl Fn(usize) -> u32,
    values: &mut [[u16; SIDE]; CHANNELS],
) {
    let spread = |packed: u32| {
        let packed = u64::from(packed);
        (packed & 0xFF) | ((packed & 0xFF00) << 13) | ((packed & 0x00FF_0000) << 26)
    };
    let [red, green, blue] = values;
    for (column, ((first, second), weight)) in axis
        .first
        .iter()
        .zip(&axis.second)
        .zip(&axis.weight)
        .enumerate()
    {
        let near = u64::from(axis.denominator - weight);
        let sums = spread(packed(start + first)) * near
            + spread(packed(start + second)) * u64::from(*weight);
        red[column] = sums as u16;
        green[column] = (sums >> 21) as u16;
        blue[column] = (sums >> 42) as u16;
    }
}

/// `floor(sum / denominator + 0.5)` as a multiplication by the reciprocal.
struct Rounding {
    denominator: u32,
    reciprocal: u64,
}

/// Bits of the reciprocal. It is exact, because the numerator is below 2^25 and the divisor below 2^17.
const RECIPROCAL_BITS: u32 = 44;

impl Rounding {
    /// `denominator` is 1 to 255 x 255.
    fn new(denominator: u32) -> Self {
        Self {
            denominator,
            reciprocal: (1_u64 << RECIPROCAL_BITS).div_ceil(2 * u64::from(denominator)),
        }
    }

    /// `sum` is 0 to `255 x denominator`.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the quotient is at most 255"
    )]
    fn divide(&self, sum: u32) -> u8 {
        ((u64::from(2 * sum + self.denominator) * self.reciprocal) >> RECIPROCAL_BITS) as u8
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use proptest::prelude::{ProptestConfig, Strategy, any, prop_assert_eq, proptest};

    use super::*;

    /// The definition, in its plain form: [channel, row, column], rational arithmetic in u128.
    fn definition(spec: &PreprocessSpec, slice: &SlicePixels<'_>) -> Vec<u8> {
        let longer = slice.rows.max(slice.columns);
        let (height, width) = (
            output_length(slice.rows, longer),
            output_length(slice.columns, longer),
        );
        let mut out = vec![0; TENSOR_BYTES];
        for channel in 0..CHANNELS {
            let value = |row: usize, column: usize| -> u128 {
                slice
                    .hounsfield(row * slice.columns + column)
                    .map_or(0, |hu| spec.windows[channel].apply(hu))
                    .into()
            };
            for row in 0..height {
                for column in 0..width {
                    let (y, fy, dy) = place(row, slice.rows, height);
                    let (x, fx, dx) = place(column, slice.columns, width);
                    let (y1, x1) = ((y + 1).min(slice.rows - 1), (x + 1).min(slice.columns - 1));
                    let sum = value(y, x) * (dy - fy) * (dx - fx)
                        + value(y, x1) * (dy - fy) * fx
                        + value(y1, x) * fy * (dx - fx)
                        + value(y1, x1) * fy * fx;
                    let rounded = (2 * sum + dy * dx) / (2 * dy * dx);
                    let (top, left) = ((SIDE - height) / 2, (SIDE - width) / 2);
                    out[(channel * SIDE + top + row) * SIDE + left + column] =
                        u8::try_from(rounded).unwrap();
                }
            }
        }
        out
    }

    fn place(output: usize, input_length: usize, output_length: usize) -> (usize, u128, u128) {
        let (position, steps) = (output * (input_length - 1), output_length - 1);
        (position / steps, (position % steps) as u128, steps as u128)
    }

    fn formats() -> impl Strategy<Value = PixelFormat> {
        let bits = proptest::sample::select(vec![
            (8, 8),
            (8, 6),
            (16, 12),
            (16, 16),
            (16, 10),
            (32, 20),
            (32, 32),
        ]);
        (bits, any::<bool>(), any::<bool>(), 0..4_u16).prop_map(
            |((bits_allocated, bits_stored), is_signed, big, above)| {
                let byte_order = if big {
                    ByteOrder::BigEndian
                } else {
                    ByteOrder::LittleEndian
                };
                let high_bit = (bits_stored - 1 + above).min(bits_allocated - 1);
                PixelFormat {
                    bits_allocated,
                    bits_stored,
                    high_bit,
                    is_signed,
                    byte_order,
                }
            },
        )
    }

    fn noise(seed: u64, length: usize) -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[4]
        };
        (0..length).map(|_| next()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn fast_way_equals_the_definition(
            format in formats(),
            rows in 2_usize..600,
            columns in 2_usize..600,
            slope in proptest::sample::select(vec![1.0, 0.5, -1.0, 2.3, 1e-3]),
            intercept in proptest::sample::select(vec![0.0, -1024.0, -1000.5]),
            padding in proptest::option::of((-40..40_i32, proptest::option::of(-40..40_i32))),
            seed in any::<u64>(),
        ) {
            let bytes = noise(seed, rows * columns * format.bytes_per_pixel());
            let padding = padding.map(|(value, range_limit)| PixelPadding { value, range_limit });
            let slice = SlicePixels { rows, columns, format, padding, rescale: Rescale { slope, intercept }, bytes: &bytes };
            let spec = PreprocessSpec::default();
            let mut out = vec![7; TENSOR_BYTES];
            match Preprocessor::new(&spec).unwrap().tensor(&slice, &mut out) {
                Ok(()) => prop_assert_eq!(out, definition(&spec, &slice)),
                Err(error) => prop_assert_eq!(error, PixelError::Size { rows, columns, side: SIDE }),
            }
        }
    }

    const SIGNED_16: PixelFormat = PixelFormat {
        bits_allocated: 16,
        bits_stored: 16,
        high_bit: 15,
        is_signed: true,
        byte_order: ByteOrder::LittleEndian,
    };

    fn slice(bytes: &[u8], rows: usize, columns: usize) -> SlicePixels<'_> {
        let rescale = Rescale {
            slope: 1.0,
            intercept: 0.0,
        };
        SlicePixels {
            rows,
            columns,
            format: SIGNED_16,
            padding: None,
            rescale,
            bytes,
        }
    }

    #[test]
    fn tables_follow_the_slice_and_not_the_one_before() {
        let bytes = noise(5, 64 * 64 * 2);
        let first = slice(&bytes, 64, 64);
        let second = SlicePixels {
            rescale: Rescale {
                slope: 0.1,
                intercept: -300.0,
            },
            ..first
        };
        let mut preprocessor = Preprocessor::new(&PreprocessSpec::default()).unwrap();
        for slice in [first, second, first] {
            let mut out = vec![0; TENSOR_BYTES];
            preprocessor.tensor(&slice, &mut out).unwrap();
            assert!(out == definition(&PreprocessSpec::default(), &slice));
        }
    }

    #[test]
    fn series_minmax_divides_by_the_range_of_the_whole_series() {
        let spec = PreprocessSpec {
            normalisation: Normalisation::SeriesMinmax,
            ..Default::default()
        };
        let mut preprocessor = Preprocessor::new(&spec).unwrap();
        let slices: Vec<Vec<u8>> = [[-1000_i16, 100], [-500, 3000]]
            .iter()
            .map(|ends| {
                ends.repeat(50)
                    .iter()
                    .flat_map(|v| v.to_le_bytes())
                    .collect()
            })
            .collect();
        let range = slices
            .iter()
            .try_fold(None, |range, bytes| {
                preprocessor.series_range(&slice(bytes, 10, 10), range)
            })
            .unwrap()
            .unwrap();
        assert_eq!(
            (range.min_hu, range.max_hu),
            ([-1000.0, -250.0, -160.0], [150.0, 450.0, 240.0])
        );
        let mut out = vec![0; TENSOR_BYTES];
        preprocessor
            .tensor_in_series(&slice(&slices[1], 10, 10), &range, &mut out)
            .unwrap();
        assert_eq!(out[0], 110); // trunc(500 / 1150 x 255)
        assert!(matches!(
            preprocessor.tensor(&slice(&slices[0], 10, 10), &mut out),
            Err(PixelError::Normalisation { .. })
        ));
    }

    #[test]
    fn images_that_do_not_fit_their_description_are_refused() {
        let mut preprocessor = Preprocessor::new(&PreprocessSpec::default()).unwrap();
        let mut out = vec![0; TENSOR_BYTES];
        let bytes = vec![0; 2 * 512 * 512];
        assert_eq!(
            preprocessor.tensor(&slice(&bytes[..100], 10, 10), &mut out),
            Err(PixelError::Length {
                found: 100,
                needed: 200
            })
        );
        assert_eq!(
            preprocessor.tensor(&slice(&bytes, 2, 512), &mut out),
            Err(PixelError::Size {
                rows: 2,
                columns: 512,
                side: SIDE
            })
        );
        assert_eq!(
            preprocessor.tensor(&slice(&bytes, 512, 512), &mut out[1..]),
            Err(PixelError::Output {
                found: TENSOR_BYTES - 1,
                needed: TENSOR_BYTES
            })
        );
    }

    #[test]
    fn body_mask_turns_what_is_not_the_body_into_air() {
        let mut bytes = Vec::new();
        for index in 0..128 * 128_i32 {
            let is_body = (32..96).contains(&(index / 128)) && (32..96).contains(&(index % 128));
            let is_table = index / 128 == 120;
            let hu: i16 = if is_body || is_table { 40 } else { -2000 };
            bytes.extend(hu.to_le_bytes());
        }
        let spec = PreprocessSpec {
            body_mask: true,
            ..Default::default()
        };
        let mut out = vec![0; TENSOR_BYTES];
        Preprocessor::new(&spec)
            .unwrap()
            .tensor(&slice(&bytes, 128, 128), &mut out)
            .unwrap();
        let lung = |row: usize, column: usize| out[row * SIDE + column];
        assert_eq!(lung(128, 128), spec.windows[0].apply(40.0));
        assert_eq!(lung(241, 128), spec.windows[0].apply(mask::AIR_HU));
        assert_eq!(lung(0, 0), spec.windows[0].apply(mask::AIR_HU));
    }
}
