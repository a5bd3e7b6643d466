//! The gate: which images are analysed, as a table.
//!
//! In: one frame's attributes. Out: what the pixels need to become HU, or the first row of [`ROWS`] that the image breaks, with
//! its reason code, the tag, what was found and what is allowed. PS3.3 C.7.6.3 (Image Pixel), C.8.2.1 (CT Image), C.8.15
//! (Enhanced CT), C.11.1 (Modality LUT). What belongs to a series (coverage, spacing, repeated positions, which series is judged)
//! is left to the caller; so is every decision about Body Part Examined, which is advisory.
//!
//! Two decisions that the standard leaves open:
//! - An image without Image Orientation (Patient) is refused: the attribute is mandatory for CT, and without it a coronal reformat
//!   cannot be told from an axial slice.
//! - An image whose rows do not run towards the patient's left and whose columns do not run towards the back (flipped, rotated,
//!   or prone with the patient's axes) is refused, not turned: the network has seen one orientation only.

use super::attributes::{self as tag, Attributes};
use crate::hounsfield::Rescale;
use crate::stored::{ByteOrder, PixelFormat, PixelPadding};
use dicom_core::Tag;

/// Smallest number of rows or columns of an image that is analysed; a chest at 64 pixels has 6 mm pixels, and thumbnails end there.
pub const MIN_SIDE: u16 = 64;
/// Largest number of rows or columns; current scanners reach 2,048.
pub const MAX_SIDE: u16 = 4_096;
/// Fewest bits stored; fewer cannot hold lung and contrast medium at once.
pub const MIN_BITS_STORED: u16 = 8;
/// Largest angle between the slice's normal and the patient's axis, and between the slice's axes and the patient's, in degrees.
pub const MAX_TILT_DEGREES: f64 = 15.0;
/// Largest gantry tilt in degrees, either way.
pub const MAX_GANTRY_TILT_DEGREES: f64 = 15.0;
/// Largest rescale slope; the largest honest one met is 32 (12 bits of HU squeezed into 8).
pub const MAX_RESCALE_SLOPE: f64 = 64.0;
/// Largest absolute rescale intercept in HU.
pub const MAX_RESCALE_INTERCEPT_HU: f64 = 65_536.0;
/// Largest deviation from unit length and from perpendicularity of the orientation's two vectors.
pub const ORIENTATION_TOLERANCE: f64 = 1e-2;
/// Longest excerpt of a found value in a message, in characters.
pub const MAX_FOUND_CHARACTERS: usize = 64;

/// CT Image Storage.
pub const CT_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.2";
/// Enhanced CT Image Storage.
pub const ENHANCED_CT_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.2.1";
/// Legacy Converted Enhanced CT Image Storage.
pub const LEGACY_CONVERTED_ENHANCED_CT_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.2.2";

/// Words in the third and later values of Image Type or Frame Type that name something else than a slice of the patient:
/// scouts, projections, derived contrasts, dose and screen pages. Values are taken apart at spaces, underscores and slashes.
pub const REFUSED_IMAGE_TYPES: [&str; 34] = [
    "LOCALIZER",
    "SCOUT",
    "TOPOGRAM",
    "TOP",
    "SURVIEW",
    "SCANOGRAM",
    "FLUOROSCOPY",
    "MIP",
    "MAXIP",
    "MAXIMUM",
    "MINIP",
    "MINIMUM",
    "PROJECTION",
    "VRT",
    "VR",
    "VOLREN",
    "SSD",
    "3D",
    "SCREEN",
    "DOSE",
    "SUMMARY",
    "REPORT",
    "PROTOCOL",
    "GRAPH",
    "SUBTRACTION",
    "MULTIPLICATION",
    "DIVISION",
    "PERFUSION",
    "RCBF",
    "RCBV",
    "MTT",
    "TTP",
    "COLOR",
    "PARAMETRIC",
];

/// A row of the gate.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Stable, machine-readable reason.
    pub code: &'static str,
    /// The element looked at, as (group, element).
    pub tag: (u16, u16),
    /// Its name in PS3.6.
    pub name: &'static str,
    /// What passes, in words.
    pub allowed: &'static str,
    /// What was found, where it does not pass.
    violation: fn(&Facts<'_>) -> Option<String>,
}

/// What the rows look at.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    /// The frame's attributes.
    pub(super) attributes: &'a Attributes,
    /// Whether the object has pixel data.
    pub(super) has_pixel_data: bool,
    /// Whether a Modality LUT Sequence is present.
    pub(super) has_modality_lut: bool,
    /// Items of the Per-Frame Functional Groups Sequence.
    pub(super) n_functional_groups: usize,
}

/// What passed the gate.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Accepted {
    pub(super) rows: u16,
    pub(super) columns: u16,
    pub(super) format: PixelFormat,
    pub(super) padding: Option<PixelPadding>,
    pub(super) rescale: Rescale,
    pub(super) orientation: [f64; 6],
    pub(super) position_mm: Option<[f64; 3]>,
    pub(super) pixel_spacing_mm: Option<[f64; 2]>,
}

/// A row that refused, with what it found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Violation {
    pub(super) row: &'static Row,
    pub(super) found: String,
}

impl PartialEq for Row {
    fn eq(&self, other: &Self) -> bool {
        self.code == other.code && self.tag == other.tag
    }
}

impl Eq for Row {}

/// The gate, in the order in which rows are asked; the first that is broken is reported.
pub static ROWS: [Row; 29] = [
    row(
        "sop-class",
        tag::SOP_CLASS_UID,
        "SOP Class UID",
        "CT, Enhanced CT or Legacy Converted Enhanced CT Image Storage",
        |facts| {
            let is_ct = |uid: &str| {
                [
                    CT_IMAGE,
                    ENHANCED_CT_IMAGE,
                    LEGACY_CONVERTED_ENHANCED_CT_IMAGE,
                ]
                .contains(&uid)
            };
            unless(facts.attributes.text(tag::SOP_CLASS_UID), is_ct)
        },
    ),
    row("modality", tag::MODALITY, "Modality", "\"CT\"", |facts| {
        unless(facts.attributes.text(tag::MODALITY), |modality| {
            modality == "CT"
        })
    }),
    row(
        "no-pixel-data",
        Tag(0x7FE0, 0x0010),
        "Pixel Data",
        "present",
        |facts| (!facts.has_pixel_data).then(absent),
    ),
    row(
        "samples-per-pixel",
        tag::SAMPLES_PER_PIXEL,
        "Samples per Pixel",
        "1",
        |facts| {
            number_unless(facts.attributes.u16(tag::SAMPLES_PER_PIXEL), |samples| {
                samples == 1
            })
        },
    ),
    row(
        "photometric-interpretation",
        tag::PHOTOMETRIC_INTERPRETATION,
        "Photometric Interpretation",
        "\"MONOCHROME1\" or \"MONOCHROME2\"",
        |facts| {
            unless(
                facts.attributes.text(tag::PHOTOMETRIC_INTERPRETATION),
                |name| ["MONOCHROME1", "MONOCHROME2"].contains(&name),
            )
        },
    ),
    row(
        "pixel-presentation",
        tag::PIXEL_PRESENTATION,
        "Pixel Presentation",
        "\"MONOCHROME\" or absent",
        |facts| {
            unless_absent_or(facts.attributes.text(tag::PIXEL_PRESENTATION), |name| {
                name == "MONOCHROME"
            })
        },
    ),
    row(
        "image-type",
        tag::IMAGE_TYPE,
        "Image Type",
        "no localizer, projection, derived contrast or report in value 3 and later",
        |facts| refused_image_type(facts.attributes, tag::IMAGE_TYPE),
    ),
    row(
        "image-type",
        tag::FRAME_TYPE,
        "Frame Type",
        "no localizer, projection, derived contrast or report in value 3 and later",
        |facts| refused_image_type(facts.attributes, tag::FRAME_TYPE),
    ),
    row(
        "volume-based-calculation",
        tag::VOLUME_BASED_CALCULATION,
        "Volume Based Calculation Technique",
        "\"NONE\" or absent",
        |facts| {
            unless_absent_or(
                facts.attributes.text(tag::VOLUME_BASED_CALCULATION),
                |name| name == "NONE",
            )
        },
    ),
    row(
        "number-of-frames",
        tag::NUMBER_OF_FRAMES,
        "Number of Frames",
        "1 or absent for CT Image Storage, otherwise one functional group item a frame",
        |facts| {
            let n_frames = facts.attributes.text(tag::NUMBER_OF_FRAMES);
            if is_multi_frame(facts.attributes) {
                let is_one_each = |text: &str| text.parse() == Ok(facts.n_functional_groups);
                unless(n_frames, is_one_each)
                    .map(|found| format!("{found}, with {} items", facts.n_functional_groups))
            } else {
                unless_absent_or(n_frames, |text| text.parse() == Ok(1))
            }
        },
    ),
    row("rows", tag::ROWS, "Rows", "64 to 4096", |facts| {
        number_unless(facts.attributes.u16(tag::ROWS), |rows| {
            (MIN_SIDE..=MAX_SIDE).contains(&rows)
        })
    }),
    row("columns", tag::COLUMNS, "Columns", "64 to 4096", |facts| {
        number_unless(facts.attributes.u16(tag::COLUMNS), |columns| {
            (MIN_SIDE..=MAX_SIDE).contains(&columns)
        })
    }),
    row(
        "bits-allocated",
        tag::BITS_ALLOCATED,
        "Bits Allocated",
        "8, 16 or 32",
        |facts| {
            number_unless(facts.attributes.u16(tag::BITS_ALLOCATED), |bits| {
                [8, 16, 32].contains(&bits)
            })
        },
    ),
    row(
        "bits-stored",
        tag::BITS_STORED,
        "Bits Stored",
        "8 to Bits Allocated",
        |facts| {
            let allocated = facts.attributes.u16(tag::BITS_ALLOCATED).unwrap_or(0);
            number_unless(facts.attributes.u16(tag::BITS_STORED), |bits| {
                (MIN_BITS_STORED..=allocated).contains(&bits)
            })
        },
    ),
    row(
        "high-bit",
        tag::HIGH_BIT,
        "High Bit",
        "Bits Stored - 1 to Bits Allocated - 1",
        |facts| {
            let allocated = facts.attributes.u16(tag::BITS_ALLOCATED).unwrap_or(0);
            let stored = facts.attributes.u16(tag::BITS_STORED).unwrap_or(u16::MAX);
            number_unless(facts.attributes.u16(tag::HIGH_BIT), |bit| {
                bit < allocated && u32::from(bit) + 1 >= u32::from(stored)
            })
        },
    ),
    row(
        "pixel-representation",
        tag::PIXEL_REPRESENTATION,
        "Pixel Representation",
        "0 or 1",
        |facts| {
            number_unless(
                facts.attributes.u16(tag::PIXEL_REPRESENTATION),
                |representation| representation <= 1,
            )
        },
    ),
    row(
        "modality-lut",
        Tag(0x0028, 0x3000),
        "Modality LUT Sequence",
        "absent",
        |facts| facts.has_modality_lut.then(|| "present".to_owned()),
    ),
    row(
        "rescale-type",
        tag::RESCALE_TYPE,
        "Rescale Type",
        "\"HU\" or absent",
        |facts| {
            unless_absent_or(facts.attributes.text(tag::RESCALE_TYPE), |name| {
                name == "HU"
            })
        },
    ),
    row(
        "rescale-slope-missing",
        tag::RESCALE_SLOPE,
        "Rescale Slope",
        "present",
        |facts| missing(facts, tag::RESCALE_SLOPE),
    ),
    row(
        "rescale-intercept-missing",
        tag::RESCALE_INTERCEPT,
        "Rescale Intercept",
        "present",
        |facts| missing(facts, tag::RESCALE_INTERCEPT),
    ),
    row(
        "rescale-slope",
        tag::RESCALE_SLOPE,
        "Rescale Slope",
        "one number above 0, at most 64",
        |facts| {
            out_of_range(facts.attributes.number(tag::RESCALE_SLOPE), |slope| {
                slope > 0.0 && slope <= MAX_RESCALE_SLOPE
            })
        },
    ),
    row(
        "rescale-intercept",
        tag::RESCALE_INTERCEPT,
        "Rescale Intercept",
        "one number of at most 65536 either way",
        |facts| {
            out_of_range(
                facts.attributes.number(tag::RESCALE_INTERCEPT),
                |intercept| intercept.abs() <= MAX_RESCALE_INTERCEPT_HU,
            )
        },
    ),
    row(
        "orientation-missing",
        tag::IMAGE_ORIENTATION,
        "Image Orientation (Patient)",
        "present",
        |facts| missing(facts, tag::IMAGE_ORIENTATION),
    ),
    row(
        "orientation-malformed",
        tag::IMAGE_ORIENTATION,
        "Image Orientation (Patient)",
        "two perpendicular unit vectors",
        |facts| out_of_range_text(facts, tag::IMAGE_ORIENTATION, is_orthonormal),
    ),
    row(
        "not-axial",
        tag::IMAGE_ORIENTATION,
        "Image Orientation (Patient)",
        "normal within 15 degrees of the patient's axis",
        |facts| {
            out_of_range_text(facts, tag::IMAGE_ORIENTATION, |axes: [f64; 6]| {
                normal(&axes)[2].abs() >= MAX_TILT_DEGREES.to_radians().cos()
            })
        },
    ),
    row(
        "in-plane-axes",
        tag::IMAGE_ORIENTATION,
        "Image Orientation (Patient)",
        "rows towards the left and columns towards the back within 15 degrees",
        |facts| {
            let limit = MAX_TILT_DEGREES.to_radians().cos();
            out_of_range_text(facts, tag::IMAGE_ORIENTATION, |axes: [f64; 6]| {
                axes[0] >= limit && axes[4] >= limit
            })
        },
    ),
    row(
        "gantry-tilt",
        tag::GANTRY_TILT,
        "Gantry/Detector Tilt",
        "15 degrees or less either way, or absent",
        |facts| {
            out_of_range(facts.attributes.number(tag::GANTRY_TILT), |tilt| {
                tilt.abs() <= MAX_GANTRY_TILT_DEGREES
            })
        },
    ),
    row(
        "position-malformed",
        tag::IMAGE_POSITION,
        "Image Position (Patient)",
        "three numbers, or absent",
        |facts| out_of_range_text(facts, tag::IMAGE_POSITION, |_: [f64; 3]| true),
    ),
    row(
        "pixel-spacing-malformed",
        tag::PIXEL_SPACING,
        "Pixel Spacing",
        "two numbers above 0, or absent",
        |facts| {
            out_of_range_text(facts, tag::PIXEL_SPACING, |spacing: [f64; 2]| {
                spacing.iter().all(|&side_mm| side_mm > 0.0)
            })
        },
    ),
];

/// Asks every row.
///
/// # Errors
///
/// The first row that is broken.
pub(super) fn accept(facts: &Facts<'_>) -> Result<Accepted, Violation> {
    for row in &ROWS {
        if let Some(found) = (row.violation)(facts) {
            return Err(Violation {
                row,
                found: excerpt(&found),
            });
        }
    }
    let attributes = facts.attributes;
    let bits = |tag| attributes.u16(tag).unwrap_or_default();
    let format = PixelFormat {
        bits_allocated: bits(tag::BITS_ALLOCATED),
        bits_stored: bits(tag::BITS_STORED),
        high_bit: bits(tag::HIGH_BIT),
        is_signed: bits(tag::PIXEL_REPRESENTATION) == 1,
        byte_order: ByteOrder::LittleEndian,
    };
    let required = |tag, code| {
        attributes
            .number(tag)
            .ok()
            .flatten()
            .ok_or_else(|| unmet(code))
    };
    Ok(Accepted {
        rows: bits(tag::ROWS),
        columns: bits(tag::COLUMNS),
        format,
        padding: padding(attributes, &format),
        rescale: Rescale {
            slope: required(tag::RESCALE_SLOPE, "rescale-slope-missing")?,
            intercept: required(tag::RESCALE_INTERCEPT, "rescale-intercept-missing")?,
        },
        orientation: attributes
            .numbers(tag::IMAGE_ORIENTATION)
            .ok()
            .flatten()
            .ok_or_else(|| unmet("orientation-missing"))?,
        position_mm: attributes.numbers(tag::IMAGE_POSITION).ok().flatten(),
        pixel_spacing_mm: attributes.numbers(tag::PIXEL_SPACING).ok().flatten(),
    })
}

/// Whether the object's frames are described by functional groups.
pub(super) fn is_multi_frame(attributes: &Attributes) -> bool {
    attributes.text(tag::SOP_CLASS_UID).is_some_and(|uid| {
        [ENHANCED_CT_IMAGE, LEGACY_CONVERTED_ENHANCED_CT_IMAGE].contains(&uid.as_str())
    })
}

/// The normal of a slice: row direction x column direction. Axial slices of a patient have (0, 0, 1).
pub(super) fn normal(axes: &[f64; 6]) -> [f64; 3] {
    let [rx, ry, rz, cx, cy, cz] = *axes;
    [ry * cz - rz * cy, rz * cx - rx * cz, rx * cy - ry * cx]
}

/// Pixel padding as a stored value (PS3.3 C.7.5.1.1.2): the 16 bits are read by Pixel Representation and extended from Bits
/// Stored, whatever VR was written, so that 63536 in a signed image is -2000. A value that an unsigned image cannot hold pads
/// nothing.
fn padding(attributes: &Attributes, format: &PixelFormat) -> Option<PixelPadding> {
    let stored = |tag| stored_value(attributes.u16(tag)?, format);
    Some(PixelPadding {
        value: stored(tag::PIXEL_PADDING_VALUE)?,
        range_limit: stored(tag::PIXEL_PADDING_RANGE_LIMIT),
    })
}

fn stored_value(bits: u16, format: &PixelFormat) -> Option<i32> {
    let value = i32::from(bits);
    // Pixels of more than 16 bits stored have padding values of 16 bits all the same.
    let width = u32::from(format.bits_stored.min(16));
    if format.is_signed {
        let shift = i32::BITS - width;
        Some((value << shift) >> shift)
    } else {
        (value >> width == 0).then_some(value)
    }
}

const fn row(
    code: &'static str,
    tag: Tag,
    name: &'static str,
    allowed: &'static str,
    violation: fn(&Facts<'_>) -> Option<String>,
) -> Row {
    Row {
        code,
        tag: (tag.0, tag.1),
        name,
        allowed,
        violation,
    }
}

/// The row of a code, for a value that its row had already passed.
fn unmet(code: &str) -> Violation {
    let row = ROWS.iter().find(|row| row.code == code).unwrap_or(&ROWS[0]);
    Violation {
        row,
        found: absent(),
    }
}

fn absent() -> String {
    "absent".to_owned()
}

fn quoted(text: &str) -> String {
    format!("\"{text}\"")
}

fn unless(text: Option<String>, is_allowed: impl Fn(&str) -> bool) -> Option<String> {
    match text {
        None => Some(absent()),
        Some(text) => (!is_allowed(&text)).then(|| quoted(&text)),
    }
}

fn unless_absent_or(text: Option<String>, is_allowed: impl Fn(&str) -> bool) -> Option<String> {
    text.filter(|text| !is_allowed(text))
        .map(|text| quoted(&text))
}

fn number_unless(number: Option<u16>, is_allowed: impl Fn(u16) -> bool) -> Option<String> {
    match number {
        None => Some(absent()),
        Some(number) => (!is_allowed(number)).then(|| number.to_string()),
    }
}

fn missing(facts: &Facts<'_>, tag: Tag) -> Option<String> {
    facts.attributes.text(tag).is_none().then(absent)
}

fn out_of_range(
    number: Result<Option<f64>, String>,
    is_allowed: impl Fn(f64) -> bool,
) -> Option<String> {
    match number {
        Ok(None) => None,
        Ok(Some(number)) => (!is_allowed(number)).then(|| number.to_string()),
        Err(text) => Some(quoted(&text)),
    }
}

fn out_of_range_text<const N: usize>(
    facts: &Facts<'_>,
    tag: Tag,
    is_allowed: impl Fn([f64; N]) -> bool,
) -> Option<String> {
    match facts.attributes.numbers(tag) {
        Ok(None) => None,
        Ok(Some(numbers)) if is_allowed(numbers) => None,
        Ok(Some(_)) => facts.attributes.text(tag).map(|text| quoted(&text)),
        Err(text) => Some(quoted(&text)),
    }
}

fn refused_image_type(attributes: &Attributes, tag: Tag) -> Option<String> {
    let values = attributes.texts(tag);
    let is_refused = |value: &String| {
        let value = value.to_ascii_uppercase();
        // "MAX_IP" and "MIN_IP" fall apart at the underscore otherwise.
        matches!(value.as_str(), "MAX_IP" | "MIN_IP")
            || value
                .split([' ', '_', '/'])
                .any(|word| REFUSED_IMAGE_TYPES.contains(&word))
    };
    values
        .iter()
        .skip(2)
        .any(is_refused)
        .then(|| quoted(&values.join("\\")))
}

fn is_orthonormal(axes: [f64; 6]) -> bool {
    let [rx, ry, rz, cx, cy, cz] = axes;
    let is_near = |value: f64, wanted: f64| (value - wanted).abs() <= ORIENTATION_TOLERANCE;
    is_near(rx * rx + ry * ry + rz * rz, 1.0)
        && is_near(cx * cx + cy * cy + cz * cz, 1.0)
        && is_near(rx * cx + ry * cy + rz * cz, 0.0)
}

/// At most [`MAX_FOUND_CHARACTERS`] of a found value.
fn excerpt(found: &str) -> String {
    found.chars().take(MAX_FOUND_CHARACTERS).collect()
}
