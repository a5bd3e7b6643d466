//! The tensors of `tests/reference/preprocess-cases.csv` are, byte for byte, those of the float64 reference in Python.
//!
//! The digests in the table were written by `tests/reference/preprocess.py cases --write`, never by this crate.
#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers stop it at the first fault"
)]

mod scene;

use shared::TENSOR_BYTES;
use shared::hounsfield::Rescale;
use shared::preprocess::Preprocessor;
use shared::spec::{Normalisation, PreprocessSpec};
use shared::stored::{ByteOrder, PixelError, PixelFormat, PixelPadding, SlicePixels};

const CASES: &str = include_str!("../../tests/reference/preprocess-cases.csv");

/// One line of the table, by column.
struct Case<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Case<'a> {
    fn text(&self, column: &str) -> &'a str {
        self.0
            .iter()
            .find(|(name, _)| *name == column)
            .expect(column)
            .1
    }

    fn number<T: std::str::FromStr<Err: std::fmt::Debug>>(&self, column: &str) -> T {
        self.text(column).parse().expect(column)
    }

    fn padding(&self) -> Option<PixelPadding> {
        let value = |column| (!self.text(column).is_empty()).then(|| self.number(column));
        Some(PixelPadding {
            value: value("padding")?,
            range_limit: value("range_limit"),
        })
    }

    fn spec(&self) -> PreprocessSpec {
        let normalisation = match self.text("normalisation") {
            "window" => Normalisation::Window,
            _ => Normalisation::SeriesMinmax,
        };
        PreprocessSpec {
            normalisation,
            body_mask: self.text("body_mask") == "1",
            ..PreprocessSpec::default()
        }
    }

    fn bytes(&self, seed_offset: u64) -> Vec<u8> {
        if self.text("scene") == "chest" {
            return scene::chest();
        }
        let n_pixels = self.number::<usize>("rows") * self.number::<usize>("columns");
        scene::noise(
            self.number::<u64>("seed") + seed_offset,
            n_pixels * self.number::<usize>("bits_allocated") / 8,
        )
    }

    fn slice<'b>(&self, bytes: &'b [u8]) -> SlicePixels<'b> {
        let byte_order = match self.text("byte_order") {
            "little" => ByteOrder::LittleEndian,
            _ => ByteOrder::BigEndian,
        };
        let format = PixelFormat {
            bits_allocated: self.number("bits_allocated"),
            bits_stored: self.number("bits_stored"),
            high_bit: self.number("high_bit"),
            is_signed: self.text("signed") == "1",
            byte_order,
        };
        let rescale = Rescale {
            slope: self.number("slope"),
            intercept: self.number("intercept"),
        };
        let (rows, columns) = (self.number("rows"), self.number("columns"));
        SlicePixels {
            rows,
            columns,
            format,
            padding: self.padding(),
            rescale,
            bytes,
        }
    }

    /// The tensor's digest, or `refused`. `out` holds what was there before, so that a byte left out shows.
    fn digest(&self, out: &mut [u8]) -> String {
        let (bytes, next) = (self.bytes(0), self.bytes(1));
        let (slice, next) = (self.slice(&bytes), self.slice(&next));
        let mut preprocessor = Preprocessor::new(&self.spec()).unwrap();
        let done = match self.spec().normalisation {
            Normalisation::Window => preprocessor.tensor(&slice, out),
            Normalisation::SeriesMinmax => {
                let range = preprocessor.series_range(&slice, None).unwrap();
                let range = preprocessor.series_range(&next, range).unwrap().unwrap();
                preprocessor.tensor_in_series(&slice, &range, out)
            }
        };
        match done {
            Ok(()) => blake3::hash(out).to_string(),
            Err(PixelError::Size { .. }) => "refused".to_owned(),
            Err(error) => panic!("{}: {error}", self.text("name")),
        }
    }
}

#[test]
fn tensors_are_those_of_the_float64_reference() {
    let mut lines = CASES.lines();
    let columns: Vec<&str> = lines.next().unwrap().split(',').collect();
    let mut out = vec![0; TENSOR_BYTES];
    let mut n_cases = 0;
    for line in lines {
        let case = Case(columns.iter().copied().zip(line.split(',')).collect());
        assert_eq!(
            case.digest(&mut out),
            case.text("digest"),
            "{}",
            case.text("name")
        );
        n_cases += 1;
    }
    assert!(n_cases >= 25, "{n_cases} cases");
}
