//! Functional groups: what an Enhanced CT says once for all frames, and what it says of each.
//!
//! In: the elements of the data set, of the shared and of one frame's functional groups (PS3.3 C.7.6.16). Out: one flat run of
//! elements for that frame, as if it were a single-frame image; a frame's own value wins over a shared one, and a value that
//! belongs into a functional group is not taken from the data set itself.

use super::attributes as tag;
use super::prescan::{Element, Scan};
use dicom_core::Tag;

/// The functional groups that are read, each with the attributes that it carries.
const GROUPS: [(Tag, &[Tag]); 7] = [
    // Pixel Measures (C.7.6.16.2.1).
    (
        Tag(0x0028, 0x9110),
        &[tag::PIXEL_SPACING, tag::SLICE_THICKNESS],
    ),
    // Plane Position (Patient) (C.7.6.16.2.3).
    (Tag(0x0020, 0x9113), &[tag::IMAGE_POSITION]),
    // Plane Orientation (Patient) (C.7.6.16.2.4).
    (Tag(0x0020, 0x9116), &[tag::IMAGE_ORIENTATION]),
    // Pixel Value Transformation (C.7.6.16.2.9).
    (
        Tag(0x0028, 0x9145),
        &[
            tag::RESCALE_INTERCEPT,
            tag::RESCALE_SLOPE,
            tag::RESCALE_TYPE,
        ],
    ),
    // CT Image Frame Type (C.8.15.3.1).
    (
        Tag(0x0018, 0x9329),
        &[
            tag::FRAME_TYPE,
            tag::PIXEL_PRESENTATION,
            tag::VOLUME_BASED_CALCULATION,
        ],
    ),
    // CT Acquisition Details (C.8.15.3.3).
    (Tag(0x0018, 0x9304), &[tag::GANTRY_TILT]),
    // CT Reconstruction (C.8.15.3.6).
    (Tag(0x0018, 0x9314), &[tag::CONVOLUTION_KERNEL]),
];

/// Attributes that may stand in the data set itself beside the functional group that refines them.
const ALSO_IN_DATA_SET: [Tag; 2] = [tag::PIXEL_PRESENTATION, tag::VOLUME_BASED_CALCULATION];

/// Whether `sequence` is a functional group that is read.
pub(super) fn is_group(sequence: Tag) -> bool {
    GROUPS.iter().any(|(group, _)| *group == sequence)
}

/// Whether the functional group `group` carries `tag` and it is read.
pub(super) fn is_wanted(group: Tag, tag: Tag) -> bool {
    GROUPS
        .iter()
        .any(|(known, tags)| *known == group && tags.contains(&tag))
}

/// The elements that describe the frame, later ones winning.
pub(super) fn elements_of_frame(scan: &Scan, frame_index: usize) -> impl Iterator<Item = &Element> {
    let own = scan
        .per_frame
        .get(frame_index)
        .map_or(&[][..], Vec::as_slice);
    scan.elements
        .iter()
        .filter(|element| {
            ALSO_IN_DATA_SET.contains(&element.tag)
                || !GROUPS.iter().any(|(_, tags)| tags.contains(&element.tag))
        })
        .chain(&scan.shared)
        .chain(own)
}
