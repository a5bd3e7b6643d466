//! Reading DICOM: encodings, the gate's rows, functional groups, fragments.
#![cfg(feature = "std")]
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod data_set;

use data_set::{
    CT_IMAGE, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE, PIXEL_DATA, RLE, SIDE, bare, ct, encapsulate,
    enhanced_ct, functional_groups, little_endian, number, part10, part10_header, rle_frame,
    sequence, stored_values, text,
};
use dicom_core::{DataElement, PrimitiveValue, Tag, VR};
use dicom_object::InMemDicomObject;
use shared::dicom::{self, Refusal, Slice, gate};
use shared::stored::PixelPadding;

fn slice(bytes: &[u8]) -> Slice {
    dicom::read(bytes).unwrap().frame(0).unwrap()
}

fn refusal(object: &InMemDicomObject) -> Refusal {
    let bytes = part10(object, EXPLICIT_LE);
    dicom::read(&bytes).unwrap().frame(0).unwrap_err()
}

#[test]
fn every_encoding_gives_the_same_slice() {
    let expected = slice(&part10(&ct(), EXPLICIT_LE));
    assert_eq!(expected.pixels, little_endian(&stored_values()));
    assert_eq!((expected.rows, expected.columns), (64, 64));
    assert_eq!(expected.attributes.z_mm, Some(-75.5));
    for syntax in [IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE] {
        assert_eq!(slice(&part10(&ct(), syntax)), expected, "Part 10 {syntax}");
        let bytes = bare(&ct(), syntax);
        assert_eq!(slice(&bytes), expected, "bare {syntax}");
        assert_eq!(
            dicom::read(&bytes).unwrap().identity().transfer_syntax,
            syntax
        );
    }
    let mut rle = ct();
    encapsulate(&mut rle, &[], &[rle_frame(&expected.pixels)]);
    assert_eq!(slice(&part10(&rle, RLE)), expected);
}

#[test]
fn file_without_preamble_or_with_wrong_group_length_is_read() {
    let file = part10(&ct(), EXPLICIT_LE);
    let expected = slice(&file);
    assert_eq!(slice(&file[128..]), expected, "prefix without preamble");
    assert_eq!(slice(&file[132..]), expected, "file meta information alone");
    let mut wrong_length = file[..132].to_vec();
    wrong_length.extend([0x02, 0, 0, 0, b'U', b'L', 4, 0, 0xFF, 0xFF, 0, 0]);
    wrong_length.extend(&file[132..]);
    assert_eq!(slice(&wrong_length), expected, "group length of 65535");
    let mut group_length_in_data_set = part10_header(EXPLICIT_LE);
    group_length_in_data_set.extend([0x08, 0, 0, 0, b'U', b'L', 4, 0, 1, 0, 0, 0]);
    group_length_in_data_set.extend(bare(&ct(), EXPLICIT_LE));
    assert_eq!(
        slice(&group_length_in_data_set),
        expected,
        "group length in the data set"
    );
}

#[test]
fn identity_names_the_uids() {
    let bytes = part10(&ct(), EXPLICIT_LE);
    let object = dicom::read(&bytes).unwrap();
    let identity = object.identity();
    let uids = [
        &identity.study_uid,
        &identity.series_uid,
        &identity.sop_uid,
        &identity.sop_class,
    ];
    let uids = uids.map(|uid| uid.as_ref().map(ToString::to_string).unwrap());
    assert_eq!(uids, ["1.2.3", "1.2.3.4", "1.2.3.4.5", CT_IMAGE]);
    assert_eq!((object.n_frames(), object.is_multi_frame()), (1, false));
    assert_eq!(object.frame(1).unwrap_err().code(), "frame-index");
}

#[test]
fn malformed_uid_is_unknown_and_no_reason_to_refuse() {
    let mut object = ct();
    text(&mut object, (0x0008, 0x0018), VR::UI, "dccc9599");
    let bytes = part10(&object, EXPLICIT_LE);
    let object = dicom::read(&bytes).unwrap();
    assert_eq!(object.identity().sop_uid, None);
    assert!(object.frame(0).is_ok());
}

/// A change of the accepted image that one row of the gate refuses.
type Breaking = (&'static str, fn(&mut InMemDicomObject));

const BREAKING: &[Breaking] = &[
    ("sop-class", |o| {
        text(o, (0x0008, 0x0016), VR::UI, "1.2.840.10008.5.1.4.1.1.7")
    }),
    ("sop-class", |o| {
        text(o, (0x0008, 0x0016), VR::UI, "1.2.840.10008.5.1.4.1.1.4")
    }),
    ("sop-class", |o| remove(o, (0x0008, 0x0016))),
    ("modality", |o| text(o, (0x0008, 0x0060), VR::CS, "PT")),
    ("modality", |o| remove(o, (0x0008, 0x0060))),
    ("no-pixel-data", |o| remove(o, (0x7FE0, 0x0010))),
    ("samples-per-pixel", |o| number(o, (0x0028, 0x0002), 3)),
    ("samples-per-pixel", |o| remove(o, (0x0028, 0x0002))),
    ("photometric-interpretation", |o| {
        text(o, (0x0028, 0x0004), VR::CS, "PALETTE COLOR")
    }),
    ("photometric-interpretation", |o| {
        remove(o, (0x0028, 0x0004))
    }),
    ("pixel-presentation", |o| {
        text(o, (0x0008, 0x9205), VR::CS, "COLOR")
    }),
    ("image-type", |o| {
        text(o, (0x0008, 0x0008), VR::CS, "ORIGINAL\\PRIMARY\\LOCALIZER")
    }),
    ("image-type", |o| {
        text(o, (0x0008, 0x0008), VR::CS, "DERIVED\\SECONDARY\\MIP")
    }),
    ("image-type", |o| {
        text(o, (0x0008, 0x0008), VR::CS, "DERIVED\\SECONDARY\\MAX_IP")
    }),
    ("image-type", |o| {
        text(
            o,
            (0x0008, 0x0008),
            VR::CS,
            "DERIVED\\SECONDARY\\AXIAL\\CT_SOM5 MINIP",
        )
    }),
    ("image-type", |o| {
        text(
            o,
            (0x0008, 0x0008),
            VR::CS,
            "DERIVED\\SECONDARY\\SCREEN SAVE",
        )
    }),
    ("image-type", |o| {
        text(o, (0x0008, 0x0008), VR::CS, "DERIVED\\SECONDARY\\DOSE_INFO")
    }),
    ("image-type", |o| {
        text(
            o,
            (0x0008, 0x9007),
            VR::CS,
            "ORIGINAL\\PRIMARY\\LOCALIZER\\NONE",
        )
    }),
    ("volume-based-calculation", |o| {
        text(o, (0x0008, 0x9207), VR::CS, "MAX_IP")
    }),
    ("number-of-frames", |o| {
        text(o, (0x0028, 0x0008), VR::IS, "2")
    }),
    ("number-of-frames", |o| {
        text(o, (0x0028, 0x0008), VR::IS, "1A")
    }),
    ("rows", |o| number(o, (0x0028, 0x0010), 16)),
    ("rows", |o| number(o, (0x0028, 0x0010), 65535)),
    ("rows", |o| remove(o, (0x0028, 0x0010))),
    ("columns", |o| {
        number(o, (0x0028, 0x0011), gate::MIN_SIDE - 1)
    }),
    ("columns", |o| {
        number(o, (0x0028, 0x0011), gate::MAX_SIDE + 1)
    }),
    ("bits-allocated", |o| number(o, (0x0028, 0x0100), 12)),
    ("bits-allocated", |o| number(o, (0x0028, 0x0100), 1)),
    ("bits-stored", |o| number(o, (0x0028, 0x0101), 17)),
    ("bits-stored", |o| number(o, (0x0028, 0x0101), 0)),
    ("high-bit", |o| number(o, (0x0028, 0x0102), 14)),
    ("high-bit", |o| number(o, (0x0028, 0x0102), 16)),
    ("pixel-representation", |o| number(o, (0x0028, 0x0103), 2)),
    ("pixel-representation", |o| remove(o, (0x0028, 0x0103))),
    ("modality-lut", |o| {
        sequence(o, (0x0028, 0x3000), vec![functional_groups(0)])
    }),
    ("rescale-type", |o| text(o, (0x0028, 0x1054), VR::LO, "US")),
    ("rescale-type", |o| {
        text(o, (0x0028, 0x1054), VR::LO, "MGML")
    }),
    ("rescale-type", |o| {
        text(o, (0x0028, 0x1054), VR::LO, "HU_MOD")
    }),
    ("rescale-slope-missing", |o| remove(o, (0x0028, 0x1053))),
    ("rescale-slope-missing", |o| {
        text(o, (0x0028, 0x1053), VR::DS, "")
    }),
    ("rescale-intercept-missing", |o| remove(o, (0x0028, 0x1052))),
    ("rescale-slope", |o| text(o, (0x0028, 0x1053), VR::DS, "0")),
    ("rescale-slope", |o| text(o, (0x0028, 0x1053), VR::DS, "-1")),
    ("rescale-slope", |o| {
        text(o, (0x0028, 0x1053), VR::DS, "NaN")
    }),
    ("rescale-slope", |o| {
        text(o, (0x0028, 0x1053), VR::DS, "1\\1")
    }),
    ("rescale-intercept", |o| {
        text(o, (0x0028, 0x1052), VR::DS, "1e9")
    }),
    ("rescale-intercept", |o| {
        text(o, (0x0028, 0x1052), VR::DS, "-1024 HU")
    }),
    ("orientation-missing", |o| remove(o, (0x0020, 0x0037))),
    ("orientation-malformed", |o| {
        text(o, (0x0020, 0x0037), VR::DS, "1\\0\\0\\0\\1")
    }),
    ("orientation-malformed", |o| {
        text(o, (0x0020, 0x0037), VR::DS, "1\\0\\0\\1\\0\\0")
    }),
    ("orientation-malformed", |o| {
        text(o, (0x0020, 0x0037), VR::DS, "2\\0\\0\\0\\2\\0")
    }),
    ("not-axial", |o| {
        text(o, (0x0020, 0x0037), VR::DS, "1\\0\\0\\0\\0\\-1")
    }),
    ("not-axial", |o| {
        text(o, (0x0020, 0x0037), VR::DS, "0\\1\\0\\0\\0\\-1")
    }),
    ("not-axial", |o| {
        text(o, (0x0020, 0x0037), VR::DS, "1\\0\\0\\0\\0.9272\\-0.3746")
    }),
    ("in-plane-axes", |o| {
        text(o, (0x0020, 0x0037), VR::DS, "1\\0\\0\\0\\-1\\0")
    }),
    ("in-plane-axes", |o| {
        text(o, (0x0020, 0x0037), VR::DS, "-1\\0\\0\\0\\1\\0")
    }),
    ("in-plane-axes", |o| {
        text(o, (0x0020, 0x0037), VR::DS, "-1\\0\\0\\0\\-1\\0")
    }),
    ("in-plane-axes", |o| {
        text(o, (0x0020, 0x0037), VR::DS, "0\\1\\0\\-1\\0\\0")
    }),
    ("gantry-tilt", |o| text(o, (0x0018, 0x1120), VR::DS, "-22")),
    ("gantry-tilt", |o| {
        text(o, (0x0018, 0x1120), VR::DS, "tilted")
    }),
    ("position-malformed", |o| {
        text(o, (0x0020, 0x0032), VR::DS, "1\\2")
    }),
    ("pixel-spacing-malformed", |o| {
        text(o, (0x0028, 0x0030), VR::DS, "0.7\\0")
    }),
];

fn remove(object: &mut InMemDicomObject, tag: (u16, u16)) {
    object.remove_element(Tag(tag.0, tag.1));
}

#[test]
fn each_row_of_the_gate_refuses_with_its_code_and_tag() {
    for (index, (code, break_it)) in BREAKING.iter().enumerate() {
        let mut object = ct();
        break_it(&mut object);
        let refusal = refusal(&object);
        assert_eq!(refusal.code(), *code, "case {index}: {refusal}");
        let Refusal::Gate { row, .. } = &refusal else {
            panic!("case {index} is no row: {refusal}");
        };
        let message = refusal.to_string();
        let tag = format!("({:04X},{:04X})", row.tag.0, row.tag.1);
        assert!(message.starts_with(&tag), "{message}");
        assert!(
            message.contains("found") && message.contains("allowed"),
            "{message}"
        );
        assert!(
            !message.contains("DOE") && !message.contains("JANE"),
            "{message}"
        );
    }
}

#[test]
fn each_row_of_the_gate_has_a_case() {
    for row in &gate::ROWS {
        assert!(
            BREAKING.iter().any(|(code, _)| *code == row.code),
            "{}",
            row.code
        );
    }
}

#[test]
fn what_the_gate_lets_pass() {
    let passing: &[fn(&mut InMemDicomObject)] = &[
        |o| text(o, (0x0028, 0x0004), VR::CS, "MONOCHROME1"),
        |o| text(o, (0x0008, 0x0008), VR::CS, "DERIVED\\SECONDARY"),
        |o| {
            text(
                o,
                (0x0008, 0x0008),
                VR::CS,
                "DERIVED\\SECONDARY\\AXIAL\\CT_SOM5 SPI",
            )
        },
        |o| text(o, (0x0028, 0x1054), VR::LO, "HU"),
        |o| text(o, (0x0028, 0x0008), VR::IS, "1"),
        |o| text(o, (0x0018, 0x0015), VR::CS, "HEAD"),
        |o| text(o, (0x0018, 0x1120), VR::DS, "15.0"),
        |o| text(o, (0x0020, 0x0037), VR::DS, "1\\0\\0\\0\\0.97437\\-0.22495"),
        |o| remove(o, (0x0020, 0x0032)),
        |o| remove(o, (0x0028, 0x0030)),
        |o| number(o, (0x0028, 0x0101), 12),
        |o| sequence(o, (0x0028, 0x3000), vec![]),
    ];
    for (index, change) in passing.iter().enumerate() {
        let mut object = ct();
        change(&mut object);
        let bytes = part10(&object, EXPLICIT_LE);
        let outcome = dicom::read(&bytes).unwrap().frame(0);
        // An empty Modality LUT Sequence of undefined length counts as present.
        let expected = if index + 1 == passing.len() {
            Some("modality-lut")
        } else {
            None
        };
        assert_eq!(
            outcome.err().map(|refusal| refusal.code()),
            expected,
            "case {index}"
        );
    }
}

#[test]
fn padding_is_read_by_pixel_representation_whatever_vr_was_written() {
    let padding = |value: i32| {
        Some(PixelPadding {
            value,
            range_limit: None,
        })
    };
    let cases: &[(u16, u16, u16, Option<PixelPadding>)] = &[
        // (Pixel Representation, Bits Stored, value written as US, padding)
        (1, 16, 63536, padding(-2000)),
        (1, 16, 32768, padding(-32768)),
        (1, 12, 63536, padding(-2000)),
        (1, 12, 2096, padding(-2000)),
        (0, 16, 63536, padding(63536)),
        (0, 12, 4095, padding(4095)),
        (0, 12, 63536, None),
    ];
    for &(representation, bits_stored, written, expected) in cases {
        for syntax in [EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE] {
            let mut object = ct();
            number(&mut object, (0x0028, 0x0103), representation);
            number(&mut object, (0x0028, 0x0101), bits_stored);
            number(&mut object, (0x0028, 0x0120), written);
            assert_eq!(
                slice(&part10(&object, syntax)).padding,
                expected,
                "{written} {syntax}"
            );
        }
    }
    let mut range = ct();
    number(&mut range, (0x0028, 0x0120), 63536);
    number(&mut range, (0x0028, 0x0121), 63000);
    let expected = PixelPadding {
        value: -2000,
        range_limit: Some(-2536),
    };
    assert_eq!(slice(&part10(&range, EXPLICIT_LE)).padding, Some(expected));
}

#[test]
fn eight_bit_words_in_big_endian_are_swapped_back() {
    let mut object = ct();
    number(&mut object, (0x0028, 0x0100), 8);
    number(&mut object, (0x0028, 0x0101), 8);
    number(&mut object, (0x0028, 0x0102), 7);
    // One word each: the first pixel is the low byte.
    let words = (0..usize::from(SIDE) * usize::from(SIDE) / 2)
        .map(|_| 0x0201_u16)
        .collect();
    object.put(DataElement::new(
        PIXEL_DATA,
        VR::OW,
        PrimitiveValue::U16(words),
    ));
    for syntax in [EXPLICIT_LE, EXPLICIT_BE] {
        assert_eq!(
            slice(&part10(&object, syntax)).pixels[..4],
            [1, 2, 1, 2],
            "{syntax}"
        );
    }
}

#[test]
fn lossy_input_is_recorded() {
    let mut object = ct();
    text(&mut object, (0x0028, 0x2110), VR::CS, "01");
    assert!(slice(&part10(&object, EXPLICIT_LE)).attributes.is_lossy);
    text(&mut object, (0x0028, 0x2110), VR::CS, "YES");
    assert!(slice(&part10(&object, EXPLICIT_LE)).attributes.is_lossy);
    text(&mut object, (0x0028, 0x2110), VR::CS, "00");
    assert!(!slice(&part10(&object, EXPLICIT_LE)).attributes.is_lossy);
    assert!(!slice(&part10(&ct(), EXPLICIT_LE)).attributes.is_lossy);
}

#[test]
fn values_written_as_un_are_read() {
    let mut object = ct();
    let intercept = PrimitiveValue::from(b"-1000 ".to_vec());
    object.put(DataElement::new(Tag(0x0028, 0x1052), VR::UN, intercept));
    let intercept = slice(&part10(&object, EXPLICIT_LE)).rescale.intercept;
    assert!((intercept + 1000.0).abs() < f64::EPSILON);
}

#[test]
fn each_frame_of_an_enhanced_ct_is_a_slice() {
    for syntax in [IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE] {
        let bytes = part10(&enhanced_ct(3), syntax);
        let object = dicom::read(&bytes).unwrap();
        assert_eq!((object.n_frames(), object.is_multi_frame()), (3, true));
        for frame_index in 0..3_u16 {
            let slice = object.frame(u32::from(frame_index)).unwrap();
            assert_eq!(slice.attributes.z_mm, Some(10.0 * f64::from(frame_index)));
            assert_eq!(slice.attributes.pixel_spacing_mm, Some([0.8, 0.8]));
            assert!((slice.rescale.intercept + 1000.0 + f64::from(frame_index)).abs() < 1e-9);
            let first = i16::from_le_bytes([slice.pixels[0], slice.pixels[1]]);
            assert_eq!(
                first,
                stored_values()[0] + i16::try_from(frame_index).unwrap()
            );
        }
        assert_eq!(object.frame(3).unwrap_err().code(), "frame-index");
    }
}

#[test]
fn legacy_converted_enhanced_ct_is_read_like_enhanced_ct() {
    let mut object = enhanced_ct(2);
    text(
        &mut object,
        (0x0008, 0x0016),
        VR::UI,
        gate::LEGACY_CONVERTED_ENHANCED_CT_IMAGE,
    );
    let bytes = part10(&object, EXPLICIT_LE);
    let object = dicom::read(&bytes).unwrap();
    assert_eq!(object.frame(1).unwrap().attributes.z_mm, Some(10.0));
}

#[test]
fn functional_groups_are_gated_frame_by_frame() {
    let mut broken = functional_groups(1);
    let mut frame_type = InMemDicomObject::new_empty();
    text(&mut frame_type, (0x0008, 0x9207), VR::CS, "MAX_IP");
    sequence(&mut broken, (0x0018, 0x9329), vec![frame_type]);
    let mut object = enhanced_ct(2);
    sequence(
        &mut object,
        (0x5200, 0x9230),
        vec![functional_groups(0), broken],
    );
    let bytes = part10(&object, EXPLICIT_LE);
    let object = dicom::read(&bytes).unwrap();
    assert!(object.frame(0).is_ok());
    assert_eq!(
        object.frame(1).unwrap_err().code(),
        "volume-based-calculation"
    );
}

#[test]
fn rescale_of_an_enhanced_ct_comes_from_its_functional_group_alone() {
    let mut groups = functional_groups(0);
    groups.remove_element(Tag(0x0028, 0x9145));
    let mut object = enhanced_ct(1);
    sequence(&mut object, (0x5200, 0x9230), vec![groups]);
    text(&mut object, (0x0028, 0x1052), VR::DS, "-1024");
    text(&mut object, (0x0028, 0x1053), VR::DS, "1");
    assert_eq!(refusal(&object).code(), "rescale-slope-missing");
}

#[test]
fn number_of_frames_must_agree_with_the_functional_groups() {
    for claimed in ["1", "3", "4000000000", "-1", "x"] {
        let mut object = enhanced_ct(2);
        text(&mut object, (0x0028, 0x0008), VR::IS, claimed);
        let bytes = part10(&object, EXPLICIT_LE);
        let object = dicom::read(&bytes).unwrap();
        assert_eq!(object.n_frames(), 1, "{claimed}");
        assert_eq!(
            object.frame(0).unwrap_err().code(),
            "number-of-frames",
            "{claimed}"
        );
    }
}

/// RLE frames of a 2-frame object in four fragments of its own; expects frame 1's values.
#[track_caller]
fn check_fragments(offset_table: &[u32], fragments: &[Vec<u8>], expected: Result<i16, &str>) {
    let mut object = enhanced_ct(2);
    encapsulate(&mut object, offset_table, fragments);
    let bytes = part10(&object, RLE);
    let object = dicom::read(&bytes).unwrap();
    let first = |slice: Slice| i16::from_le_bytes([slice.pixels[0], slice.pixels[1]]);
    assert_eq!(
        object.frame(1).map(first).map_err(|refusal| refusal.code()),
        expected
    );
}

#[test]
fn frames_are_found_among_fragments() {
    let frame = |value: i16| {
        rle_frame(&little_endian(&vec![
            value;
            usize::from(SIDE) * usize::from(SIDE)
        ]))
    };
    let (first, second) = (frame(7), frame(-8));
    let split = |frame: &[u8]| vec![frame[..100].to_vec(), frame[100..].to_vec()];
    let fragments = [split(&first), split(&second)].concat();
    let second_offset = u32::try_from(first.len() + 16).unwrap();
    check_fragments(&[], &[first.clone(), second.clone()], Ok(-8));
    check_fragments(&[0, second_offset], &fragments, Ok(-8));
    check_fragments(&[], &fragments, Err("frame-bounds"));
    check_fragments(&[0, second_offset + 2], &fragments, Err("frame-bounds"));
    check_fragments(&[0, u32::MAX], &fragments, Err("frame-bounds"));
    check_fragments(&[second_offset, 0], &fragments, Err("frame-bounds"));
    check_fragments(&[], &[], Err("frame-bounds"));
}

#[test]
fn frames_without_offset_table_are_found_by_their_codestreams() {
    let mut object = enhanced_ct(2);
    for (tag, value) in [(0x0100, 8), (0x0101, 8), (0x0102, 7), (0x0103, 0)] {
        number(&mut object, (0x0028, tag), value);
    }
    let frame = data_set::jpeg_frame();
    let halves = [frame[..200].to_vec(), frame[200..].to_vec()];
    encapsulate(&mut object, &[], &[halves.clone(), halves].concat());
    let bytes = part10(&object, data_set::JPEG_BASELINE);
    let object = dicom::read(&bytes).unwrap();
    let frames = [0, 1].map(|index| object.frame(index).unwrap().pixels);
    assert_eq!(frames[0].len(), 64 * 64);
    assert_eq!(frames[0], frames[1]);
}

#[test]
fn pixel_data_must_fit_the_frame_and_the_transfer_syntax() {
    let mut short = ct();
    short.put(DataElement::new(
        PIXEL_DATA,
        VR::OW,
        PrimitiveValue::U16(vec![0; 100].into()),
    ));
    assert_eq!(refusal(&short).code(), "pixel-bytes");
    let native = part10(&ct(), RLE);
    assert_eq!(
        dicom::read(&native).unwrap().frame(0).unwrap_err().code(),
        "encapsulation"
    );
    let mut fragments = ct();
    encapsulate(&mut fragments, &[], &[vec![0; 4]]);
    assert_eq!(refusal(&fragments).code(), "encapsulation");
    for (syntax, fragment) in [
        (RLE, vec![0; 80]),
        (data_set::JPEG_BASELINE, vec![0xFF, 0xD8, 0xFF, 0xD9]),
    ] {
        encapsulate(&mut fragments, &[], &[fragment]);
        let bytes = part10(&fragments, syntax);
        assert_eq!(
            dicom::read(&bytes).unwrap().frame(0).unwrap_err().code(),
            "codestream"
        );
    }
}

#[test]
fn transfer_syntax_of_another_build_is_named() {
    let check = |syntax: &str, expected: &str| {
        let mut object = ct();
        encapsulate(&mut object, &[], &[vec![0; 4]]);
        let bytes = part10(&object, syntax);
        let message = match dicom::read(&bytes) {
            Ok(object) => object.frame(0).unwrap_err().to_string(),
            Err(error) => error.to_string(),
        };
        assert_eq!(message, expected);
    };
    check(
        "1.2.840.10008.1.2.4.102",
        "transfer syntax 1.2.840.10008.1.2.4.102 not supported",
    );
    if cfg!(not(feature = "jpegls")) {
        check(
            "1.2.840.10008.1.2.4.80",
            "transfer syntax JPEG-LS Lossless not supported in this build (feature jpegls)",
        );
    }
    if cfg!(not(feature = "jpeg2000")) {
        check(
            "1.2.840.10008.1.2.4.90",
            "transfer syntax JPEG 2000 Lossless not supported in this build (feature jpeg2000)",
        );
    }
    if cfg!(not(feature = "deflate")) {
        let name = "Deflated Explicit VR Little Endian";
        check(
            "1.2.840.10008.1.2.1.99",
            &format!("transfer syntax {name} not supported in this build (feature deflate)"),
        );
    }
}

#[test]
fn every_reason_of_the_gate_is_documented() {
    let page = include_str!("../../docs/reading-dicom.md");
    for row in &gate::ROWS {
        let line = format!(
            "| `{}` | ({:04X},{:04X}) {} | {} |",
            row.code, row.tag.0, row.tag.1, row.name, row.allowed
        );
        assert!(page.contains(&line), "{line}");
    }
}
