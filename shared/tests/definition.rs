//! The definition of preprocessing in its plain form, from the bytes on, and the proof that the fast way equals it.
//!
//! Nothing of the crate is called by the definition: one pixel, one channel and one output byte at a time, HU and
//! windows in f64, the resize in i128.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test's helpers stop it at the first fault"
)]

mod scene;

use proptest::prelude::{
    Just, ProptestConfig, Strategy, any, prop_assert_eq, prop_oneof, proptest,
};
use shared::hounsfield::Rescale;
use shared::preprocess::{Preprocessor, SeriesRange};
use shared::spec::{Normalisation, PreprocessSpec};
use shared::stored::{ByteOrder, PixelError, PixelFormat, PixelPadding, SlicePixels};
use shared::window::Window;
use shared::{SIDE, TENSOR_BYTES};

/// Stored value of a pixel: its bytes joined, the field cut out, then sign extension.
fn stored_value(slice: &SlicePixels<'_>, row: usize, column: usize) -> i128 {
    let format = slice.format;
    let n_bytes = usize::from(format.bits_allocated / 8);
    let mut bytes = slice.bytes[(row * slice.columns + column) * n_bytes..][..n_bytes].to_vec();
    if format.byte_order == ByteOrder::LittleEndian {
        bytes.reverse();
    }
    let cell = bytes
        .iter()
        .fold(0_i128, |cell, byte| cell * 256 + i128::from(*byte));
    let n_values = 1_i128 << format.bits_stored;
    let field = cell / (1 << (format.high_bit + 1 - format.bits_stored)) % n_values;
    if format.is_signed && field >= n_values / 2 {
        field - n_values
    } else {
        field
    }
}

fn is_padding(slice: &SlicePixels<'_>, stored: i128) -> bool {
    slice.padding.is_some_and(|padding| {
        let ends = [padding.value, padding.range_limit.unwrap_or(padding.value)].map(i128::from);
        stored >= ends[0].min(ends[1]) && stored <= ends[0].max(ends[1])
    })
}

/// Windowed value of a pixel: `trunc(((clamp(HU) - lo) x 255) / (hi - lo))`, or by the range of the series.
fn windowed(
    window: Window,
    range: Option<(f64, f64)>,
    slice: &SlicePixels<'_>,
    row: usize,
    column: usize,
) -> i128 {
    let stored = stored_value(slice, row, column);
    if is_padding(slice, stored) {
        return 0;
    }
    let hu = slice.rescale.slope * stored as f64 + slice.rescale.intercept;
    let (low, high) = (
        window.level_hu - window.width_hu / 2.0,
        window.level_hu + window.width_hu / 2.0,
    );
    let clip = |hu: f64| {
        if hu < low {
            low
        } else if hu > high {
            high
        } else {
            hu
        }
    };
    let scaled = match range {
        None => ((clip(hu) - low) * 255.0) / (high - low),
        Some((min_hu, max_hu)) if clip(min_hu) >= clip(max_hu) => 0.0,
        Some((min_hu, max_hu)) => (clip(hu) - clip(min_hu)) / (clip(max_hu) - clip(min_hu)) * 255.0,
    };
    scaled.trunc() as i128
}

/// `round_half_even(side x 256 / longer)`, by looking for the nearest.
fn output_side(side: usize, longer: usize) -> usize {
    let distance = |o: &usize| (o * longer).abs_diff(side * SIDE);
    let even_first = (0..=SIDE).step_by(2).chain((1..SIDE).step_by(2));
    even_first.min_by_key(distance).unwrap()
}

/// The tensor by definition, or `None` where a side would have fewer than 2 pixels.
fn definition(
    spec: &PreprocessSpec,
    range: Option<(f64, f64)>,
    slice: &SlicePixels<'_>,
) -> Option<Vec<u8>> {
    let longer = slice.rows.max(slice.columns);
    let (height, width) = (
        output_side(slice.rows, longer),
        output_side(slice.columns, longer),
    );
    if height < 2 || width < 2 {
        return None;
    }
    let mut out = vec![0; TENSOR_BYTES];
    for (channel, window) in spec.windows.iter().enumerate() {
        let value = |row: usize, column: usize| windowed(*window, range, slice, row, column);
        for index in 0..height * width {
            let (row, column) = (index / width, index % width);
            let (y, next_y, fy, dy) = place(row, slice.rows, height);
            let (x, next_x, fx, dx) = place(column, slice.columns, width);
            let sum = value(y, x) * (dy - fy) * (dx - fx)
                + value(y, next_x) * (dy - fy) * fx
                + value(next_y, x) * fy * (dx - fx)
                + value(next_y, next_x) * fy * fx;
            let rounded = (2 * sum + dy * dx) / (2 * dy * dx);
            let (top, left) = ((SIDE - height) / 2, (SIDE - width) / 2);
            out[(channel * SIDE + top + row) * SIDE + left + column] =
                u8::try_from(rounded).unwrap();
        }
    }
    Some(out)
}

/// The two pixels around `output x (n - 1) / (n_output - 1)`, the numerator and the denominator of the fraction.
fn place(output: usize, n: usize, n_output: usize) -> (usize, usize, i128, i128) {
    let (position, steps) = (output * (n - 1), n_output - 1);
    let first = position / steps;
    (
        first,
        (first + 1).min(n - 1),
        (position % steps) as i128,
        steps as i128,
    )
}

fn formats() -> impl Strategy<Value = PixelFormat> {
    let order = prop_oneof![Just(ByteOrder::LittleEndian), Just(ByteOrder::BigEndian)];
    let allocated = prop_oneof![Just(8_u16), Just(16), Just(16), Just(32)];
    let bits = allocated.prop_flat_map(|allocated| (Just(allocated), 1..=allocated));
    let bits = bits.prop_flat_map(|(allocated, stored)| {
        (Just(allocated), Just(stored), stored - 1..allocated)
    });
    (bits, any::<bool>(), order).prop_map(
        |((bits_allocated, bits_stored, high_bit), is_signed, byte_order)| PixelFormat {
            bits_allocated,
            bits_stored,
            high_bit,
            is_signed,
            byte_order,
        },
    )
}

/// Slopes as scanners have them, and slopes that spread the stored values over `span` HU.
fn slopes() -> impl Strategy<Value = (f64, bool)> {
    let plain = proptest::sample::select(vec![1.0, -1.0, 0.5, 2.3, 0.1, 1e-3])
        .prop_map(|slope| (slope, false));
    let span = (500.0..8000.0_f64, any::<bool>())
        .prop_map(|(span, is_mirrored)| (if is_mirrored { -span } else { span }, true));
    prop_oneof![plain, span]
}

fn rescale(format: PixelFormat, (slope, is_span): (f64, bool), intercept: f64) -> Rescale {
    let n_values = (1_u64 << format.bits_stored) as f64;
    Rescale {
        slope: if is_span { slope / n_values } else { slope },
        intercept,
    }
}

/// Padding within the values of the format, from two fractions of them.
fn padding(format: PixelFormat, ends: (f64, Option<f64>)) -> PixelPadding {
    let n_values = (1_u64 << format.bits_stored.min(31)) as f64;
    let stored = |share: f64| {
        (share * n_values
            - if format.is_signed {
                n_values / 2.0
            } else {
                0.0
            }) as i32
    };
    PixelPadding {
        value: stored(ends.0),
        range_limit: ends.1.map(stored),
    }
}

fn windows() -> impl Strategy<Value = [Window; 3]> {
    let window = (-1000.0..1000.0_f64, 0.5..3000.0_f64)
        .prop_map(|(level_hu, width_hu)| Window { level_hu, width_hu });
    prop_oneof![
        Just(PreprocessSpec::default().windows),
        proptest::array::uniform3(window)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_fast_way_equals_the_definition(
        format in formats(),
        rows in 2_usize..600,
        columns in 2_usize..600,
        slope in slopes(),
        intercept in -2000.0..1000.0_f64,
        ends in proptest::option::of((0.0..1.0_f64, proptest::option::of(0.0..1.0_f64))),
        windows in windows(),
        seed in any::<u64>(),
    ) {
        let bytes = scene::noise(seed, rows * columns * format.bytes_per_pixel());
        let (rescale, padding) = (rescale(format, slope, intercept), ends.map(|ends| padding(format, ends)));
        let slice = SlicePixels { rows, columns, format, padding, rescale, bytes: &bytes };
        let spec = PreprocessSpec { windows, ..PreprocessSpec::default() };
        let mut out = vec![7; TENSOR_BYTES];
        match Preprocessor::new(&spec).unwrap().tensor(&slice, &mut out) {
            Ok(()) => prop_assert_eq!(Some(out), definition(&spec, None, &slice)),
            Err(error) => {
                prop_assert_eq!(error, PixelError::Size { rows, columns, side: SIDE });
                prop_assert_eq!(None, definition(&spec, None, &slice));
            }
        }
    }

    #[test]
    fn the_fast_way_equals_the_definition_in_a_series(
        format in formats(),
        slope in slopes(),
        intercept in -2000.0..1000.0_f64,
        ends in proptest::option::of((0.0..1.0_f64, proptest::option::of(0.0..1.0_f64))),
        seed in any::<u64>(),
    ) {
        let (rows, columns) = (40, 30);
        let bytes = scene::noise(seed, 2 * rows * columns * format.bytes_per_pixel());
        let (rescale, padding) = (rescale(format, slope, intercept), ends.map(|ends| padding(format, ends)));
        let (first, second) = bytes.split_at(bytes.len() / 2);
        let series = [first, second].map(|bytes| SlicePixels { rows, columns, format, padding, rescale, bytes });
        let spec = PreprocessSpec { normalisation: Normalisation::SeriesMinmax, ..PreprocessSpec::default() };
        let mut preprocessor = Preprocessor::new(&spec).unwrap();
        let range: Option<SeriesRange> =
            series.iter().try_fold(None, |range, slice| preprocessor.series_range(slice, range)).unwrap();
        prop_assert_eq!(range.is_some(), range_hu(&series).is_some());
        if let Some(range) = range {
            let mut out = vec![7; TENSOR_BYTES];
            preprocessor.tensor_in_series(&series[1], &range, &mut out).unwrap();
            prop_assert_eq!(Some(out), definition(&spec, range_hu(&series), &series[1]));
        }
    }
}

/// The least and the greatest HU of the pixels that are not padding.
fn range_hu(series: &[SlicePixels<'_>]) -> Option<(f64, f64)> {
    let pixels = series.iter().flat_map(|slice| {
        let stored = (0..slice.rows * slice.columns)
            .map(|i| stored_value(slice, i / slice.columns, i % slice.columns));
        let stored = stored.filter(|stored| !is_padding(slice, *stored));
        stored.map(|stored| slice.rescale.slope * stored as f64 + slice.rescale.intercept)
    });
    pixels.fold(None, |range, hu| {
        let (least, most) = range.unwrap_or((hu, hu));
        Some((
            if hu < least { hu } else { least },
            if hu > most { hu } else { most },
        ))
    })
}
