//! The body mask: what is not the patient becomes air before windowing (option `body_mask`, off by default).
//!
//! A pixel is dense when its HU is at least [`BODY_HU`]. The mask is found by integer arithmetic alone:
//! 1. opening: erosion, then dilation by the 3x3 square, [`OPENING_PIXELS`] times each (pixels outside the image count as not dense);
//! 2. the largest 4-connected region (the first in row-major order among equals);
//! 3. hole filling: what cannot be reached from the border over pixels outside the region belongs to it;
//! 4. margin: dilation by the 3x3 square, [`MARGIN_PIXELS`] times.
//!
//! An image without a dense region keeps every pixel: a mask that finds no body must not hide one.

use alloc::vec;
use alloc::vec::Vec;

/// Least HU of a dense pixel.
pub const BODY_HU: f64 = -300.0;

/// HU that a pixel outside the mask is given.
pub const AIR_HU: f64 = -1000.0;

/// Times that the opening erodes and dilates: cuts the table and tubes from the body.
pub const OPENING_PIXELS: usize = 2;

/// Times that the region is dilated at last.
pub const MARGIN_PIXELS: usize = 4;

/// The body mask of an image: `true` where the pixel is kept; `[rows, columns]`.
///
/// `is_dense` says for each pixel whether its HU is at least [`BODY_HU`] (padding is not dense).
///
/// # Panics
/// When `is_dense` has another length than `rows x columns`.
#[must_use]
pub fn body(is_dense: &[bool], rows: usize, columns: usize) -> Vec<bool> {
    assert_eq!(is_dense.len(), rows * columns, "one entry a pixel");
    let mut mask = is_dense.to_vec();
    for grow in [false, true] {
        for _ in 0..OPENING_PIXELS {
            mask = spread(&mask, rows, columns, grow);
        }
    }
    let Some(region) = largest_region(&mask, rows, columns) else {
        return vec![true; rows * columns];
    };
    let mut mask = fill_holes(&region, rows, columns);
    for _ in 0..MARGIN_PIXELS {
        mask = spread(&mask, rows, columns, true);
    }
    mask
}

/// Dilation (`grow`) or erosion by the 3x3 square, one axis after the other.
fn spread(mask: &[bool], rows: usize, columns: usize, grow: bool) -> Vec<bool> {
    let along = |mask: &[bool], length: usize, step: usize| -> Vec<bool> {
        (0..mask.len())
            .map(|index| {
                let position = index / step % length;
                let before = position > 0 && mask[index - step];
                let after = position + 1 < length && mask[index + step];
                if grow {
                    before || mask[index] || after
                } else {
                    before && mask[index] && after
                }
            })
            .collect()
    };
    along(&along(mask, columns, 1), rows, columns)
}

/// The largest 4-connected region of `mask`, or `None` when it is empty.
fn largest_region(mask: &[bool], rows: usize, columns: usize) -> Option<Vec<bool>> {
    let mut label = vec![0_u32; mask.len()];
    let (mut best, mut best_pixels, mut next) = (0, 0, 1);
    let mut stack = Vec::new();
    for start in 0..mask.len() {
        if !mask[start] || label[start] != 0 {
            continue;
        }
        let pixels = flood(&mut stack, start, rows, columns, |index| {
            let is_new = mask[index] && label[index] == 0;
            if is_new {
                label[index] = next;
            }
            is_new
        });
        if pixels > best_pixels {
            (best, best_pixels) = (next, pixels);
        }
        next += 1;
    }
    (best_pixels > 0).then(|| label.iter().map(|l| *l == best).collect())
}

/// `region` and everything that the border cannot reach over pixels outside it.
fn fill_holes(region: &[bool], rows: usize, columns: usize) -> Vec<bool> {
    let mut outside = vec![false; region.len()];
    let mut stack = Vec::new();
    for index in 0..region.len() {
        let (row, column) = (index / columns, index % columns);
        if row == 0 || column == 0 || row + 1 == rows || column + 1 == columns {
            flood(&mut stack, index, rows, columns, |index| {
                let is_new = !region[index] && !outside[index];
                outside[index] |= is_new;
                is_new
            });
        }
    }
    outside.iter().map(|o| !o).collect()
}

/// Visits the 4-connected pixels from `start` for which `take` answers true; returns how many there were.
fn flood(
    stack: &mut Vec<usize>,
    start: usize,
    rows: usize,
    columns: usize,
    mut take: impl FnMut(usize) -> bool,
) -> usize {
    let mut pixels = 0;
    stack.push(start);
    while let Some(index) = stack.pop() {
        if !take(index) {
            continue;
        }
        pixels += 1;
        let (row, column) = (index / columns, index % columns);
        if column > 0 {
            stack.push(index - 1);
        }
        if column + 1 < columns {
            stack.push(index + 1);
        }
        if row > 0 {
            stack.push(index - columns);
        }
        if row + 1 < rows {
            stack.push(index + columns);
        }
    }
    pixels
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `#` dense; 40 x 40: a ring (body with lungs) and a thin table below it.
    fn scene() -> Vec<bool> {
        let mut dense = vec![false; 40 * 40];
        for (index, pixel) in dense.iter_mut().enumerate() {
            let (row, column) = (index / 40, index % 40);
            let in_body = (8..26).contains(&row) && (8..32).contains(&column);
            let in_lung = (14..20).contains(&row) && (14..20).contains(&column);
            *pixel = (in_body && !in_lung) || row == 34;
        }
        dense
    }

    #[test]
    fn holes_belong_to_the_body_and_the_table_does_not() {
        let mask = body(&scene(), 40, 40);
        assert!(mask[16 * 40 + 16], "lung");
        assert!(mask[10 * 40 + 10], "soft tissue");
        assert!(mask[5 * 40 + 16], "margin");
        assert!(!mask[34 * 40 + 16], "table");
        assert!(!mask[0], "air");
    }

    #[test]
    fn an_image_without_a_body_keeps_every_pixel() {
        assert!(body(&[false; 100], 10, 10).iter().all(|kept| *kept));
    }
}
