//! Heat maps: where in a slice the network's answer comes from, as a picture.
//!
//! In: the slice's tensor and the logit's contributions at the last feature map ([`engine::Contributions`]). Out: a PNG of 256 x 256
//! pixels, RGB: the PE window in grey, contributions towards "present" in colour over it, from transparent through red to yellow at
//! the slice's own greatest, so that colour says where and not how much. "Research use only" is burnt in. Contributions are
//! upsampled bilinearly between the centres of what each position sees; beyond the outermost centres they stay as they are there.

use std::io::Cursor;

use engine::Contributions;
use image::{ImageFormat, Rgb, RgbImage};
use shared::SIDE;

/// Channel of the tensor that is shown: the PE window.
pub(crate) const SHOWN_CHANNEL: usize = 1;
/// Rows and columns of the picture: [`SIDE`].
const PICTURE_SIDE: u32 = 256;
/// Greatest opacity of the colour.
const OPACITY: f32 = 0.6;
/// Lines burnt in, at the top left.
const BURNT_IN: [&str; 2] = ["RESEARCH USE ONLY", "NOT A MEDICAL DEVICE"];

/// The heat map over the PE window of `tensor`, u8 `[3, 256, 256]`, as a PNG file.
///
/// # Errors
/// Where the PNG cannot be written.
pub(crate) fn png(tensor: &[u8], contributions: &Contributions) -> image::ImageResult<Vec<u8>> {
    picture(tensor, SHOWN_CHANNEL, Some(contributions))
}

/// One channel of `tensor`, u8 `[3, 256, 256]`, and the heat map over it where there is one, as a PNG file.
///
/// # Errors
/// Where the PNG cannot be written.
pub(crate) fn picture(
    tensor: &[u8],
    channel: usize,
    contributions: Option<&Contributions>,
) -> image::ImageResult<Vec<u8>> {
    let mut file = Cursor::new(Vec::new());
    let picture = drawn(tensor, channel, contributions);
    picture.write_to(&mut file, ImageFormat::Png)?;
    Ok(file.into_inner())
}

/// As [`picture`], not encoded.
pub(crate) fn drawn(
    tensor: &[u8],
    channel: usize,
    contributions: Option<&Contributions>,
) -> RgbImage {
    let grey = &tensor[channel * SIDE * SIDE..][..SIDE * SIDE];
    let heat = contributions.map_or_else(|| vec![0.0; SIDE * SIDE], upsample);
    let greatest = heat.iter().copied().fold(0.0, f32::max);
    let mut picture = RgbImage::new(PICTURE_SIDE, PICTURE_SIDE);
    for ((pixel, &grey), &heat) in picture.pixels_mut().zip(grey).zip(&heat) {
        let share = if greatest > 0.0 {
            heat.max(0.0) / greatest
        } else {
            0.0
        };
        *pixel = blend(grey, share);
    }
    for (top, text) in (2..).step_by(GLYPH_ROWS as usize + 2).zip(BURNT_IN) {
        burn_in(&mut picture, text, top);
    }
    picture
}

/// Contributions at each pixel, `[row, column]`.
pub(crate) fn upsample(contributions: &Contributions) -> Vec<f32> {
    let Contributions { rows, columns, .. } = *contributions;
    let at = |row: usize, column: usize| contributions.values[row * columns + column];
    let mut heat = Vec::with_capacity(SIDE * SIDE);
    for row in 0..SIDE {
        let (top, bottom, down) = between(row, rows, contributions);
        for column in 0..SIDE {
            let (left, right, across) = between(column, columns, contributions);
            let upper = at(top, left) * (1.0 - across) + at(top, right) * across;
            let lower = at(bottom, left) * (1.0 - across) + at(bottom, right) * across;
            heat.push(upper * (1.0 - down) + lower * down);
        }
    }
    heat
}

/// The two positions around a pixel and how far it lies from the first to the second, 0 to 1.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "pixels and positions lie between 0 and 256"
)]
fn between(pixel: usize, n_positions: usize, contributions: &Contributions) -> (usize, usize, f32) {
    let last = n_positions.saturating_sub(1);
    let position = (pixel as f32 - contributions.centre) / contributions.stride as f32;
    let position = position.clamp(0.0, last as f32);
    let first = position as usize;
    (first, (first + 1).min(last), position - first as f32)
}

/// Grey under a colour of the given share.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a mean of values from 0 to 255"
)]
fn blend(grey: u8, share: f32) -> Rgb<u8> {
    let opacity = OPACITY * share.sqrt();
    let colour = [255.0, 255.0 * share, 0.0];
    Rgb(colour.map(|colour| (f32::from(grey) * (1.0 - opacity) + colour * opacity) as u8))
}

const GLYPH_ROWS: u32 = 7;
const GLYPH_COLUMNS: u32 = 5;

/// The letters of [`BURNT_IN`], 7 rows of 5 bits, the left column in the highest bit.
const GLYPHS: [(char, [u8; 7]); 16] = [
    ('A', [0x0E, 0x11, 0x11, 0x1F, 0x11, 0x11, 0x11]),
    ('C', [0x0E, 0x11, 0x10, 0x10, 0x10, 0x11, 0x0E]),
    ('D', [0x1E, 0x11, 0x11, 0x11, 0x11, 0x11, 0x1E]),
    ('E', [0x1F, 0x10, 0x10, 0x1E, 0x10, 0x10, 0x1F]),
    ('H', [0x11, 0x11, 0x11, 0x1F, 0x11, 0x11, 0x11]),
    ('I', [0x0E, 0x04, 0x04, 0x04, 0x04, 0x04, 0x0E]),
    ('L', [0x10, 0x10, 0x10, 0x10, 0x10, 0x10, 0x1F]),
    ('M', [0x11, 0x1B, 0x15, 0x15, 0x11, 0x11, 0x11]),
    ('N', [0x11, 0x19, 0x15, 0x13, 0x11, 0x11, 0x11]),
    ('O', [0x0E, 0x11, 0x11, 0x11, 0x11, 0x11, 0x0E]),
    ('R', [0x1E, 0x11, 0x11, 0x1E, 0x14, 0x12, 0x11]),
    ('S', [0x0F, 0x10, 0x10, 0x0E, 0x01, 0x01, 0x1E]),
    ('T', [0x1F, 0x04, 0x04, 0x04, 0x04, 0x04, 0x04]),
    ('U', [0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x0E]),
    ('V', [0x11, 0x11, 0x11, 0x11, 0x11, 0x0A, 0x04]),
    ('Y', [0x11, 0x11, 0x0A, 0x04, 0x04, 0x04, 0x04]),
];

/// Writes capital letters in white on black.
fn burn_in(picture: &mut RgbImage, text: &str, top: u32) {
    for (letter, left) in text
        .chars()
        .zip((2_u32..).step_by(GLYPH_COLUMNS as usize + 1))
    {
        let glyph = GLYPHS.iter().find(|(of, _)| *of == letter);
        let rows = glyph.map_or([0; 7], |(_, rows)| *rows);
        for (row, bits) in (top..).zip(rows) {
            for column in 0..=GLYPH_COLUMNS {
                let is_set = (bits << 1) >> (GLYPH_COLUMNS - column) & 1 == 1;
                let value = if is_set { 255 } else { 0 };
                if let Some(pixel) = picture.get_pixel_mut_checked(left + column, row) {
                    *pixel = Rgb([value; 3]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::TENSOR_BYTES;

    fn contributions(hot: usize) -> Contributions {
        let mut values = vec![-0.5; 900];
        values[hot] = 2.0;
        Contributions {
            rows: 30,
            columns: 30,
            values,
            bias: 0.0,
            stride: 8,
            centre: 10.5,
        }
    }

    #[test]
    fn the_hottest_pixel_lies_where_the_position_looks() {
        let heat = upsample(&contributions(12 * 30 + 20));
        let hottest = (0..heat.len()).max_by(|&a, &b| heat[a].total_cmp(&heat[b]));
        let (row, column) = (hottest.unwrap() / SIDE, hottest.unwrap() % SIDE);
        // Centre 8 x 12 + 10.5 = 106.5 and 8 x 20 + 10.5 = 170.5: the four pixels around it are equally near.
        assert!(
            (106..=107).contains(&row) && (170..=171).contains(&column),
            "{row} {column}"
        );
    }

    #[test]
    fn the_picture_is_a_png_of_the_tensors_size_with_words_and_colour() {
        let file = png(&vec![100; TENSOR_BYTES], &contributions(450)).unwrap();
        let picture = image::load_from_memory(&file).unwrap().to_rgb8();
        assert_eq!(picture.dimensions(), (256, 256));
        let is_coloured = |pixel: &&Rgb<u8>| pixel[0] > pixel[2];
        assert!(picture.pixels().filter(is_coloured).count() > 20);
        assert!(picture.pixels().any(|pixel| pixel.0 == [255; 3]));
    }

    #[test]
    fn nothing_is_coloured_where_nothing_speaks_for_it() {
        let mut cold = contributions(0);
        cold.values.fill(-1.0);
        let file = png(&vec![100; TENSOR_BYTES], &cold).unwrap();
        let picture = image::load_from_memory(&file).unwrap().to_rgb8();
        assert!(picture.pixels().all(|pixel| pixel[0] == pixel[2]));
    }

    #[test]
    fn contributions_of_a_real_run_add_up_to_its_logit() {
        for threads in [1, 3] {
            let options = engine::Options {
                threads,
                ..engine::Options::default()
            };
            let ready = crate::model::ReadyModel::load(None, &options).unwrap();
            let mut session = ready.model.session();
            assert!(session.contributions().is_none());
            let mut image = vec![0; TENSOR_BYTES];
            shared::selftest::image(5, &mut image);
            let mut logit = [0.0];
            session.logits(&image, &mut logit).unwrap();
            let divided = session.contributions().unwrap();
            let sum: f64 = divided.values.iter().copied().map(f64::from).sum();
            let error = (sum + f64::from(divided.bias) - f64::from(logit[0])).abs();
            assert!(
                error <= 1e-4 * f64::from(logit[0].abs()).max(1.0),
                "{error}"
            );
        }
    }

    /// Emboli of a phantom's slice and the hottest point of its heat map, x and y in mm; and whether the slice is called positive.
    struct Found {
        emboli_mm: Vec<[f64; 3]>,
        hottest_mm: [f64; 2],
        is_called: bool,
    }

    /// At least `n_slices` slices with an embolus, of studies that the demonstration model has not seen: another seed.
    fn found(n_slices: usize) -> Vec<Found> {
        let options = engine::Options::default();
        let ready = crate::model::ReadyModel::load(None, &options).unwrap();
        let mut session = ready.model.session();
        let spec = &ready.manifest.preprocess;
        let mut preprocessor = shared::preprocess::Preprocessor::new(spec).unwrap();
        let threshold = ready.manifest.logit_threshold().unwrap();
        let mut found = Vec::new();
        for study_index in 0.. {
            if found.len() >= n_slices {
                break;
            }
            let finding = shared::phantom::Finding::Positive;
            let plan =
                shared::phantom::StudyPlan::with_finding(4711, study_index, 24, 512, finding);
            for index in (0..plan.n_slices()).filter(|&index| plan.pe_present(index)) {
                let slice = plan.slice(index);
                let (bytes, mut tensor) = (slice.bytes(), vec![0; TENSOR_BYTES]);
                preprocessor
                    .tensor(&slice.pixels(&bytes), &mut tensor)
                    .unwrap();
                let mut logit = [0.0];
                session.logits(&tensor, &mut logit).unwrap();
                let heat = upsample(&session.contributions().unwrap());
                let hottest = (0..heat.len()).max_by(|&a, &b| heat[a].total_cmp(&heat[b]));
                // Each pixel of the tensor is two by two of the slice's.
                let place = |pixel: usize, axis: usize| {
                    let pixel = 2.0 * f64::from(u32::try_from(pixel).unwrap()) + 0.5;
                    slice.position_mm[axis] + slice.pixel_spacing_mm[0] * pixel
                };
                let (row, column) = (hottest.unwrap() / SIDE, hottest.unwrap() % SIDE);
                found.push(Found {
                    emboli_mm: slice.emboli_mm,
                    hottest_mm: [place(column, 0), place(row, 1)],
                    is_called: logit[0] >= threshold,
                });
            }
        }
        found
    }

    /// Of pairs of a point and a slice's emboli, those within 20 mm of one, in percent.
    fn share_near<'a>(pairs: impl Iterator<Item = ([f64; 2], &'a [[f64; 3]])>) -> f64 {
        let (mut n_pairs, mut n_near) = (0_u32, 0_u32);
        for ([x, y], emboli_mm) in pairs {
            let is_near = |embolus: &[f64; 3]| (embolus[0] - x).hypot(embolus[1] - y) <= 20.0;
            n_pairs += 1;
            n_near += u32::from(emboli_mm.iter().any(is_near));
        }
        100.0 * f64::from(n_near) / f64::from(n_pairs)
    }

    /// Chance here is the strictest: the hottest points of all the other slices, which lie where emboli usually lie.
    #[test]
    fn the_hottest_point_lies_at_an_embolus_far_more_often_than_chance() {
        let found = found(120);
        let own = |found: &'_ [&'_ Found]| {
            let pairs = found.iter().map(|one| (one.hottest_mm, &one.emboli_mm[..]));
            share_near(pairs)
        };
        let all: Vec<&Found> = found.iter().collect();
        let called: Vec<&Found> = found.iter().filter(|one| one.is_called).collect();
        let others = all.iter().enumerate().flat_map(|(index, one)| {
            let others = all
                .iter()
                .enumerate()
                .filter(move |(other, _)| *other != index);
            others.map(|(_, other)| (other.hottest_mm, &one.emboli_mm[..]))
        });
        let (chance, on_all, on_called) = (share_near(others), own(&all), own(&called));
        assert!(
            on_all > 2.0 * chance && on_called > 2.0 * chance,
            "{on_all} % of all, {on_called} % of {} called positive, {chance} % by chance",
            called.len()
        );
    }

    #[test]
    fn every_letter_burnt_in_has_a_glyph() {
        for letter in BURNT_IN.concat().chars().filter(|letter| *letter != ' ') {
            assert!(GLYPHS.iter().any(|(of, _)| *of == letter), "{letter}");
        }
    }
}
