//! A study's result as pictures: a page of words, then the key slices with their heat maps.
//!
//! In: the result and, for each of its highest slices, the picture that [`crate::heatmap`] draws. Out: a Multi-frame True Color Secondary Capture Image
//! (PS3.3 section A.8.5), 512 x 512 pixels. "Research use only, not a medical device" is burnt into every frame; nothing of the patient is.

use std::convert::Infallible;

use dicom_core::VR;
use dicom_dictionary_std::{tags, uids};
use embedded_graphics::Pixel;
use embedded_graphics::geometry::{OriginDimensions, Point, Size};
use embedded_graphics::mono_font::MonoTextStyleBuilder;
use embedded_graphics::mono_font::ascii::FONT_10X20;
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::prelude::DrawTarget;
use embedded_graphics::text::{Baseline, Text};
use image::RgbImage;
use image::imageops::{self, FilterType};
use shared::probability::sigmoid;

use super::content;
use super::data_set::DataSet;
use super::equipment::{self, Device};
use super::identity;
use super::structured_report;
use crate::result::{SliceResult, StudyResult};

/// Multi-frame True Color Secondary Capture Image Storage.
pub(crate) const SOP_CLASS_UID: &str = uids::MULTI_FRAME_TRUE_COLOR_SECONDARY_CAPTURE_IMAGE_STORAGE;
/// Key slices at most.
pub(crate) const MAX_SLICES: usize = 5;
/// Rows and columns of a frame.
const SIDE: u16 = 512;
/// Bytes of a frame.
const FRAME_BYTES: usize = SIDE as usize * SIDE as usize * 3;
/// Letters of a line, in a font 10 pixels wide, between margins.
const LINE_LETTERS: usize = 48;
/// Pixels from one line to the next.
const LINE_ROWS: i32 = 24;
/// What every frame says.
const NOTICE: &str = "Research use only, not a medical device";

/// A slice and its picture.
#[derive(Clone, Debug)]
pub(crate) struct KeySlice<'a> {
    /// The slice.
    pub(crate) slice: &'a SliceResult,
    /// It, with its heat map.
    pub(crate) picture: RgbImage,
}

/// The highest slices of a result, the highest first.
pub(crate) fn key_slices(result: &StudyResult) -> impl Iterator<Item = &SliceResult> {
    let top = result.top.iter().take(MAX_SLICES);
    top.filter_map(|&index| result.slices.get(index))
}

/// The capture.
pub(crate) fn capture(result: &StudyResult, device: &Device, slices: &[KeySlice<'_>]) -> DataSet {
    let mut pixels = summary(result).bytes;
    for (rank, key) in slices.iter().enumerate() {
        pixels.extend(key_frame(key, rank + 1).bytes);
    }
    let n_frames = pixels.len() / FRAME_BYTES;
    let mut set = DataSet::default();
    equipment::copy_patient(&mut set, result);
    equipment::describe(&mut set, result, device);
    let uid = identity::document_uid(result, SOP_CLASS_UID);
    let series_uid = identity::series_uid(result, "OT");
    set.text(tags::SOP_CLASS_UID, VR::UI, SOP_CLASS_UID)
        .text(tags::SOP_INSTANCE_UID, VR::UI, uid.as_str())
        .text(tags::MODALITY, VR::CS, "OT")
        .text(tags::SERIES_INSTANCE_UID, VR::UI, series_uid.as_str())
        .text(tags::SERIES_NUMBER, VR::IS, "9802")
        .text(
            tags::SERIES_DESCRIPTION,
            VR::LO,
            "PE-Edge summary, research use only",
        )
        .text(tags::INSTANCE_NUMBER, VR::IS, &result.revision.to_string())
        .text(tags::BODY_PART_EXAMINED, VR::CS, "CHEST")
        .text(tags::CONVERSION_TYPE, VR::CS, "WSD")
        .text(tags::IMAGE_TYPE, VR::CS, "DERIVED\\SECONDARY")
        .text(tags::PATIENT_ORIENTATION, VR::CS, "")
        .text(
            tags::DERIVATION_DESCRIPTION,
            VR::ST,
            "Key slices with heat maps of a neural network",
        )
        .text(tags::BURNED_IN_ANNOTATION, VR::CS, "YES")
        .text(tags::NUMBER_OF_FRAMES, VR::IS, &n_frames.to_string());
    if n_frames > 1 {
        number_pages(&mut set, n_frames);
    }
    if !slices.is_empty() {
        set.items(tags::SOURCE_IMAGE_SEQUENCE, sources(slices));
    }
    if result.is_lossy {
        set.text(tags::LOSSY_IMAGE_COMPRESSION, VR::CS, "01");
    }
    image_pixel(&mut set, pixels);
    set
}

/// Image Pixel module (PS3.3 C.7.6.3).
fn image_pixel(set: &mut DataSet, pixels: Vec<u8>) {
    set.text(tags::PHOTOMETRIC_INTERPRETATION, VR::CS, "RGB")
        .u16(tags::SAMPLES_PER_PIXEL, 3)
        .u16(tags::PLANAR_CONFIGURATION, 0)
        .u16(tags::ROWS, SIDE)
        .u16(tags::COLUMNS, SIDE)
        .u16(tags::BITS_ALLOCATED, 8)
        .u16(tags::BITS_STORED, 8)
        .u16(tags::HIGH_BIT, 7)
        .u16(tags::PIXEL_REPRESENTATION, 0)
        .bytes(tags::PIXEL_DATA, VR::OB, pixels);
}

/// What leads from frame to frame: type 1C, with several frames alone (PS3.3 C.7.6.6, C.8.6.3).
fn number_pages(set: &mut DataSet, n_frames: usize) {
    let pages: Vec<String> = (1..=n_frames).map(|page| page.to_string()).collect();
    set.bytes(tags::FRAME_INCREMENT_POINTER, VR::AT, page_number_pointer())
        .text(tags::PAGE_NUMBER_VECTOR, VR::IS, &pages.join("\\"));
}

/// The tag of Page Number Vector as a value.
fn page_number_pointer() -> Vec<u8> {
    let tag = tags::PAGE_NUMBER_VECTOR;
    [tag.0.to_le_bytes(), tag.1.to_le_bytes()].concat()
}

/// The key slices, an instance or frame each.
fn sources(slices: &[KeySlice<'_>]) -> Vec<DataSet> {
    let referred = |key: &KeySlice<'_>| {
        let slice = key.slice;
        let mut item = content::reference(&slice.sop_class_uid, slice.sop_uid.as_str());
        if let Some(frame) = slice.frame {
            item.text(tags::REFERENCED_FRAME_NUMBER, VR::IS, &frame.to_string());
        }
        item
    };
    slices.iter().map(referred).collect()
}

/// The page of words.
fn summary(result: &StudyResult) -> Frame {
    let mut frame = Frame::black();
    let mut row = frame.lines("PE-Edge: pulmonary embolism on CT", 8, Rgb888::WHITE);
    row = frame.lines(
        &structured_report::words(result),
        row + LINE_ROWS,
        Rgb888::YELLOW,
    );
    if let (Some(score), Some(threshold)) = (result.score, result.threshold) {
        let line = format!(
            "Probability {}, threshold {}",
            percent(score),
            percent(threshold)
        );
        row = frame.lines(&line, row + LINE_ROWS, Rgb888::WHITE);
    }
    let model = format!("Model {}", result.model.name);
    frame.lines(&model, row + LINE_ROWS, Rgb888::WHITE);
    frame.lines(NOTICE, i32::from(SIDE) - LINE_ROWS, Rgb888::WHITE);
    frame
}

/// A key slice twice as large as the network saw it, its words over it.
fn key_frame(key: &KeySlice<'_>, rank: usize) -> Frame {
    let side = u32::from(SIDE);
    let large = imageops::resize(&key.picture, side, side, FilterType::Nearest);
    let mut frame = Frame {
        bytes: large.into_raw(),
    };
    let slice = key.slice;
    let probability = slice.logit.map_or("not analysed".to_owned(), percent);
    let place = match (slice.frame, slice.z_mm) {
        (Some(number), _) => format!(", frame {number}"),
        (None, Some(z_mm)) => format!(", z {z_mm:.1} mm"),
        (None, None) => String::new(),
    };
    let row = i32::from(SIDE) - 2 * LINE_ROWS;
    frame.lines(
        &format!("{rank}. {probability}{place}"),
        row,
        Rgb888::YELLOW,
    );
    frame.lines(NOTICE, row + LINE_ROWS, Rgb888::WHITE);
    frame
}

fn percent(logit: f32) -> String {
    format!("{:.1} %", f64::from(sigmoid(logit)) * 100.0)
}

/// A frame being drawn, RGB, `[row, column, colour]`.
struct Frame {
    bytes: Vec<u8>,
}

impl Frame {
    fn black() -> Self {
        Self {
            bytes: vec![0; FRAME_BYTES],
        }
    }

    /// Writes text on black from `top` on, broken between words; the row below it.
    fn lines(&mut self, text: &str, top: i32, colour: Rgb888) -> i32 {
        let style = MonoTextStyleBuilder::new()
            .font(&FONT_10X20)
            .text_color(colour)
            .background_color(Rgb888::BLACK)
            .build();
        let mut row = top;
        for line in broken(text) {
            let drawn = Text::with_baseline(&line, Point::new(8, row), style, Baseline::Top);
            let Ok(_) = embedded_graphics::Drawable::draw(&drawn, self);
            row += LINE_ROWS;
        }
        row
    }
}

/// Lines of at most [`LINE_LETTERS`] letters.
fn broken(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let word: String = word.chars().take(LINE_LETTERS).collect();
        let is_full = lines
            .last()
            .is_some_and(|line| line.len() + 1 + word.len() > LINE_LETTERS);
        match lines.last_mut() {
            Some(line) if !is_full => {
                if !line.is_empty() {
                    line.push(' ');
                }
                line.push_str(&word);
            }
            _ => lines.push(word),
        }
    }
    lines
}

impl OriginDimensions for Frame {
    fn size(&self) -> Size {
        Size::new(SIDE.into(), SIDE.into())
    }
}

impl DrawTarget for Frame {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I>(&mut self, pixels: I) -> Result<(), Infallible>
    where
        I: IntoIterator<Item = Pixel<Rgb888>>,
    {
        for Pixel(at, colour) in pixels {
            let side = usize::from(SIDE);
            let (Ok(row), Ok(column)) = (usize::try_from(at.y), usize::try_from(at.x)) else {
                continue;
            };
            if row >= side || column >= side {
                continue;
            }
            if let Some(pixel) = self
                .bytes
                .get_mut((row * side + column) * 3..)
                .and_then(|rest| rest.get_mut(..3))
            {
                pixel.copy_from_slice(&[colour.r(), colour.g(), colour.b()]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::data_set::Syntax;
    use super::super::sample;
    use super::*;
    use image::Rgb;

    fn drawn(result: &StudyResult) -> DataSet {
        let grey = RgbImage::from_pixel(256, 256, Rgb([90; 3]));
        let slices: Vec<_> = key_slices(result)
            .map(|slice| KeySlice {
                slice,
                picture: grey.clone(),
            })
            .collect();
        capture(result, &Device::sample(), &slices)
    }

    #[test]
    fn a_page_of_words_and_each_key_slice_are_a_frame() {
        let result = sample::positive();
        let set = drawn(&result);
        let bytes = set.encode(Syntax::Explicit);
        assert_eq!(bytes, drawn(&result).encode(Syntax::Explicit));
        assert_eq!(set.string(tags::NUMBER_OF_FRAMES), Some("3"));
        assert_eq!(set.string(tags::PAGE_NUMBER_VECTOR), Some("1\\2\\3"));
        assert_eq!(set.string(tags::BURNED_IN_ANNOTATION), Some("YES"));
        assert!(bytes.len() > 3 * FRAME_BYTES && bytes.len() < 3 * FRAME_BYTES + 4096);
    }

    #[test]
    fn one_frame_has_no_pointer_to_the_next() {
        let set = capture(&sample::positive(), &Device::sample(), &[]);
        assert_eq!(set.string(tags::NUMBER_OF_FRAMES), Some("1"));
        assert_eq!(set.string(tags::PAGE_NUMBER_VECTOR), None);
        let several = drawn(&sample::positive()).encode(Syntax::Explicit);
        let pointer = [0x28, 0x00, 0x09, 0x00, b'A', b'T'];
        let has_pointer = |bytes: &[u8]| bytes.windows(6).any(|six| six == pointer);
        assert!(has_pointer(&several));
        assert!(!has_pointer(&set.encode(Syntax::Explicit)));
    }

    #[test]
    fn every_frame_bears_the_notice_in_the_same_place() {
        let result = sample::positive();
        let slice = &result.slices[0];
        let picture = RgbImage::from_pixel(256, 256, Rgb([90; 3]));
        let notice = |frame: &Frame| {
            let top = usize::from(SIDE) - 24;
            frame.bytes[top * usize::from(SIDE) * 3..][..8 * 512 * 3].to_vec()
        };
        let key = key_frame(&KeySlice { slice, picture }, 1);
        let mut expected = Frame::black();
        expected.bytes.fill(90);
        expected.lines(NOTICE, 512 - 24, Rgb888::WHITE);
        assert_eq!(notice(&key), notice(&expected));
        assert!(notice(&summary(&result)).contains(&255));
    }

    #[test]
    fn lines_are_broken_between_words_and_a_word_too_long_is_cut() {
        let text = format!("{} {}", "word ".repeat(20), "x".repeat(100));
        let lines = broken(&text);
        assert!(lines.len() > 2 && lines.iter().all(|line| line.len() <= LINE_LETTERS));
        assert_eq!(broken(""), [""]);
    }
}
