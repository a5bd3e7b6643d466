//! A slice to the network's input: stored values, HU, windows and resize in one pass.
//!
//! The definition, pixel by pixel: HU = slope x stored + intercept; each channel's [`crate::window::Window::apply`];
//! padding is 0 in all channels; then, per channel and on the u8 values, aligned-corner bilinear interpolation in exact
//! arithmetic, rounded as `floor(x + 0.5)`, centred, 0 outside. `tests/definition.rs` holds that definition in its plain form, and
//! `tests/reference.rs` compares with Python.
//!
//! The fast way gives the same bytes: a table holds the three windowed values of each stored code, packed into one word,
//! and the resize of [`crate::resample`] reads it. It stays while format, padding and rescale stay, as through a series.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

pub use crate::stored::PixelError;

use crate::hounsfield::Rescale;
use crate::resample::{FilteredRow, LANE_BITS, Packed, Plan, Rows, resize};
use crate::spec::{Normalisation, PreprocessSpec, SpecError};
use crate::stored::{ByteOrder, PixelFormat, PixelPadding, SlicePixels};
use crate::window::Window;
use crate::{CHANNELS, TENSOR_BYTES, mask};

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

/// Brings slices to tensors by one [`PreprocessSpec`]; owns the table and the scratch rows, so make one a thread.
///
/// After [`Preprocessor::new`] nothing is allocated, whatever slices come (without `body_mask`).
#[derive(Clone, Debug)]
pub struct Preprocessor {
    spec: PreprocessSpec,
    table: Table,
    plan: Option<(usize, usize, Plan)>,
    rows: Box<Rows>,
}

/// The packed channels of every stored code, kept from slice to slice.
#[derive(Clone, Debug)]
struct Table {
    meaning: Option<Meaning>,
    packed: Vec<Packed>,
}

/// All that the channels of a stored code depend on.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Meaning {
    windows: [Window; CHANNELS],
    format: PixelFormat,
    padding: Option<PixelPadding>,
    rescale: Rescale,
    range: Option<SeriesRange>,
}

impl Preprocessor {
    /// A preprocessor for `spec`.
    ///
    /// # Errors
    /// A spec that this build cannot do.
    pub fn new(spec: &PreprocessSpec) -> Result<Self, SpecError> {
        spec.check()?;
        let table = Table {
            meaning: None,
            packed: vec![0; 1 << MAX_TABLE_BITS],
        };
        Ok(Self {
            spec: spec.clone(),
            table,
            plan: None,
            rows: Box::new(Rows::EMPTY),
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
            plan,
            rows,
        } = self;
        let plan = kept_plan(plan, slice)?;
        let SlicePixels {
            format,
            padding,
            rescale,
            ..
        } = *slice;
        let meaning = Meaning {
            windows: spec.windows,
            format,
            padding,
            rescale,
            range,
        };
        if spec.body_mask {
            let kept = body_mask(slice);
            let air = meaning.of_hounsfield(mask::AIR_HU);
            let packed = |index: usize| {
                if kept[index] {
                    meaning.of_index(slice, index)
                } else {
                    air
                }
            };
            resize_by_index(plan, rows, slice, packed, out);
        } else if format.bits_stored > MAX_TABLE_BITS {
            resize_by_index(
                plan,
                rows,
                slice,
                |index| meaning.of_index(slice, index),
                out,
            );
        } else {
            table.prepare(meaning);
            resize_by_table(plan, rows, slice, table, out);
        }
        Ok(())
    }
}

impl Meaning {
    /// The packed channels of a stored code.
    fn of_code(&self, code: u32) -> Packed {
        let stored_value = self.format.stored_value(code);
        match self.padding {
            Some(padding) if padding.contains(stored_value) => 0,
            _ => self.of_hounsfield(self.rescale.hounsfield(stored_value)),
        }
    }

    /// The packed channels of a pixel, the slow way.
    fn of_index(&self, slice: &SlicePixels<'_>, index: usize) -> Packed {
        self.of_code(self.format.code(self.format.cell(slice.bytes, index)))
    }

    fn of_hounsfield(&self, hu: f64) -> Packed {
        let value = |channel: usize| match &self.range {
            None => self.windows[channel].apply(hu),
            Some(range) => {
                let (min_hu, max_hu) = (range.min_hu[channel], range.max_hu[channel]);
                in_series(&self.windows[channel], hu, min_hu, max_hu)
            }
        };
        (0..CHANNELS).rev().fold(0, |packed, channel| {
            packed << LANE_BITS | Packed::from(value(channel))
        })
    }
}

impl Table {
    /// Computes the entries for `meaning`, unless they are there already. `bits_stored` is at most [`MAX_TABLE_BITS`].
    fn prepare(&mut self, meaning: Meaning) {
        if self.meaning == Some(meaning) {
            return;
        }
        for (code, packed) in (0..1 << meaning.format.bits_stored).zip(&mut self.packed) {
            *packed = meaning.of_code(code);
        }
        self.meaning = Some(meaning);
    }
}

/// The plan for this size of image: the kept one, or a new one.
fn kept_plan<'p>(
    kept: &'p mut Option<(usize, usize, Plan)>,
    slice: &SlicePixels<'_>,
) -> Result<&'p Plan, PixelError> {
    let (rows, columns) = (slice.rows, slice.columns);
    let plan = match kept.take() {
        Some((kept_rows, kept_columns, plan)) if (kept_rows, kept_columns) == (rows, columns) => {
            plan
        }
        _ => Plan::new(rows, columns)?,
    };
    Ok(&kept.insert((rows, columns, plan)).2)
}

/// The resize of a slice whose codes have their channels in a table.
fn resize_by_table(
    plan: &Plan,
    rows: &mut Rows,
    slice: &SlicePixels<'_>,
    table: &Table,
    out: &mut [u8],
) {
    let format = slice.format;
    let packed = |cell: u32| table.packed[format.code(cell) as usize];
    match (format.bits_allocated, format.byte_order) {
        (8, _) => resize_cells(
            plan,
            rows,
            slice,
            |[byte]: [u8; 1]| packed(byte.into()),
            out,
        ),
        (16, ByteOrder::LittleEndian) => {
            resize_cells(
                plan,
                rows,
                slice,
                |cell| packed(u16::from_le_bytes(cell).into()),
                out,
            );
        }
        (16, ByteOrder::BigEndian) => {
            resize_cells(
                plan,
                rows,
                slice,
                |cell| packed(u16::from_be_bytes(cell).into()),
                out,
            );
        }
        (_, ByteOrder::LittleEndian) => resize_cells(
            plan,
            rows,
            slice,
            |cell| packed(u32::from_le_bytes(cell)),
            out,
        ),
        (_, ByteOrder::BigEndian) => resize_cells(
            plan,
            rows,
            slice,
            |cell| packed(u32::from_be_bytes(cell)),
            out,
        ),
    }
}

/// The resize over cells of `BYTES` bytes; `packed` gives the channels of one.
#[inline(always)]
fn resize_cells<const BYTES: usize>(
    plan: &Plan,
    rows: &mut Rows,
    slice: &SlicePixels<'_>,
    packed: impl Fn([u8; BYTES]) -> Packed,
    out: &mut [u8],
) {
    let (cells, _) = slice.bytes.as_chunks::<BYTES>();
    let filter = |row: usize, sums: &mut FilteredRow| {
        let cells = &cells[row * slice.columns..][..slice.columns];
        plan.filter_row(|column| packed(cells[column]), sums);
    };
    resize(plan, rows, filter, out);
}

/// The resize over pixels by their index in the image.
fn resize_by_index(
    plan: &Plan,
    rows: &mut Rows,
    slice: &SlicePixels<'_>,
    packed: impl Fn(usize) -> Packed,
    out: &mut [u8],
) {
    let filter = |row: usize, sums: &mut FilteredRow| {
        plan.filter_row(|column| packed(row * slice.columns + column), sums);
    };
    resize(plan, rows, filter, out);
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

/// The body mask of a slice, `[rows, columns]`.
fn body_mask(slice: &SlicePixels<'_>) -> Vec<bool> {
    let n_pixels = slice.rows * slice.columns;
    let is_dense: Vec<bool> = (0..n_pixels)
        .map(|i| slice.hounsfield(i).is_some_and(|hu| hu >= mask::BODY_HU))
        .collect();
    mask::body(&is_dense, slice.rows, slice.columns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SIDE;

    fn noise(seed: u32, length: u32) -> Vec<u8> {
        (0..length)
            .map(|index| {
                (index.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0]
            })
            .collect()
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
            let (mut out, mut fresh) = (vec![0; TENSOR_BYTES], vec![0; TENSOR_BYTES]);
            preprocessor.tensor(&slice, &mut out).unwrap();
            Preprocessor::new(&PreprocessSpec::default())
                .unwrap()
                .tensor(&slice, &mut fresh)
                .unwrap();
            assert!(out == fresh);
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
