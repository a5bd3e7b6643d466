//! Pixels without a file: the same integers as in `tests/reference/preprocess.py`.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    dead_code,
    reason = "numbers chosen to fit, and not every user needs every scene"
)]

use shared::hounsfield::Rescale;
use shared::stored::{ByteOrder, PixelFormat, PixelPadding, SlicePixels};

/// Rows and columns of [`chest`].
pub(crate) const CHEST_SIDE: usize = 512;

/// `n_bytes` of SplitMix64's output, little-endian.
pub(crate) fn noise(seed: u64, n_bytes: usize) -> Vec<u8> {
    let word = |index: u64| {
        let mut z = seed.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    (1..)
        .flat_map(|index| word(index).to_le_bytes())
        .take(n_bytes)
        .collect()
}

/// 512 x 512 signed cells of 16 bits: body, lungs, a table below, air, and -2000 outside of the field of view.
pub(crate) fn chest() -> Vec<u8> {
    let n_pixels = (CHEST_SIDE * CHEST_SIDE) as i32;
    (0..n_pixels)
        .flat_map(|index| chest_pixel(index).to_le_bytes())
        .collect()
}

fn chest_pixel(index: i32) -> i16 {
    let (y, x) = (index / 512 - 256, index % 512 - 256);
    let grain = (index.cast_unsigned().wrapping_mul(2_654_435_761) >> 24) as i32 - 128;
    let is_lung = [-100, 100]
        .iter()
        .any(|centre| (x - centre) * (x - centre) * 2 + y * y < 20_000);
    let is_table = (230..240).contains(&y) && x.abs() < 80;
    let stored = match x * x + y * y {
        distance if distance > 65_000 => -2000,
        distance if distance > 45_000 && is_table => 1064,
        distance if distance > 45_000 => 24 + grain / 8,
        _ if is_lung => 200 + grain,
        _ => 1064 + grain,
    };
    stored as i16
}

/// [`chest`]'s bytes as a slice.
pub(crate) fn chest_slice(bytes: &[u8]) -> SlicePixels<'_> {
    SlicePixels {
        rows: CHEST_SIDE,
        columns: CHEST_SIDE,
        format: PixelFormat {
            bits_allocated: 16,
            bits_stored: 16,
            high_bit: 15,
            is_signed: true,
            byte_order: ByteOrder::LittleEndian,
        },
        padding: Some(PixelPadding {
            value: -2000,
            range_limit: None,
        }),
        rescale: Rescale {
            slope: 1.0,
            intercept: -1024.0,
        },
        bytes,
    }
}
