//! Hostile bytes: never a panic, never deep recursion, never much memory, always an answer.
#![cfg(feature = "std")]
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod data_set;

use data_set::{
    EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE, RLE, bare, ct, encapsulate, enhanced_ct, little_endian,
    part10, part10_header, rle_frame, stored_values,
};
use proptest::prelude::{ProptestConfig, any, prop};
use proptest::test_runner::{RngSeed, TestRunner};
use shared::dicom;

/// Stack of the thread that reads hostile bytes: an eighth of the usual.
const STACK_BYTES: usize = 256 << 10;

/// Reads and decodes all that can be; the answer's code, or "ok".
fn code(bytes: &[u8]) -> &'static str {
    match dicom::read(bytes) {
        Err(error) => error.code(),
        Ok(object) => {
            let frames = 0..object.n_frames();
            frames
                .filter_map(|frame_index| object.frame(frame_index).err())
                .map(|refusal| refusal.code())
                .next()
                .unwrap_or("ok")
        }
    }
}

/// Runs `test` on a small stack.
fn on_small_stack(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
    thread.spawn(test).unwrap().join().unwrap();
}

/// An element of explicit VR with a 32-bit length.
fn long_element(tag: [u8; 4], vr: [u8; 2], length: u32) -> Vec<u8> {
    let mut bytes = tag.to_vec();
    bytes.extend(vr);
    bytes.extend([0, 0]);
    bytes.extend(length.to_le_bytes());
    bytes
}

#[test]
fn claimed_lengths_are_held_against_the_bytes_left() {
    let with = |syntax: &str, element: &[u8]| [part10_header(syntax), element.to_vec()].concat();
    let private = [0x09, 0, 0x01, 0x10];
    let pixel_data = [0xE0, 0x7F, 0x10, 0];
    let frames = [0x00, 0x52, 0x30, 0x92];
    for length in [0xFFFF_FFFE, 0x7FFF_FFFF, 5] {
        for (tag, vr) in [
            (private, *b"UN"),
            (private, *b"OB"),
            (private, *b"XX"),
            (pixel_data, *b"OW"),
            (frames, *b"SQ"),
        ] {
            let mut bytes = with(EXPLICIT_LE, &long_element(tag, vr, length));
            bytes.extend([0; 4]);
            assert_eq!(code(&bytes), "length", "{tag:02X?} {length}");
        }
        let implicit = [&private[..], &length.to_le_bytes()].concat();
        assert_eq!(code(&with(IMPLICIT_LE, &implicit)), "length");
    }
    let mut meta = part10_header(EXPLICIT_LE);
    meta.extend(long_element([2, 0, 1, 0], *b"OB", 0xFFFF_FFFE));
    assert_eq!(code(&meta), "length");
    let undefined_text = [&[8, 0, 8, 0][..], b"UT\0\0", &[0xFF; 4]].concat();
    assert_eq!(code(&with(EXPLICIT_LE, &undefined_text)), "length");
}

#[test]
fn claimed_fragment_length_is_held_against_the_bytes_left() {
    let mut object = ct();
    encapsulate(&mut object, &[], &[vec![0; 64]]);
    let mut bytes = part10(&object, RLE);
    let length = bytes.len() - 8 - 64 - 4;
    bytes[length..length + 4].copy_from_slice(&0xFFFF_FFF0_u32.to_le_bytes());
    assert_eq!(code(&bytes), "length");
}

#[test]
fn nested_sequences_end_at_the_depth_bound() {
    on_small_stack(|| {
        let item = [0xFE, 0xFF, 0x00, 0xE0, 0xFF, 0xFF, 0xFF, 0xFF];
        let nested = [0x09, 0, 0x01, 0x10];
        for (outer, inner) in [
            (nested, nested),
            ([0, 0x52, 0x29, 0x92], [0x28, 0, 0x45, 0x91]),
            ([0, 0x52, 0x30, 0x92], nested),
        ] {
            let level = |tag| [long_element(tag, *b"SQ", u32::MAX), item.to_vec()].concat();
            let bytes = [
                part10_header(EXPLICIT_LE),
                level(outer),
                level(inner).repeat(2000),
            ]
            .concat();
            assert_eq!(code(&bytes), "nesting-depth");
            let implicit = |tag: [u8; 4]| [&tag[..], &[0xFF; 4], &item].concat();
            let bytes = [
                part10_header(IMPLICIT_LE),
                implicit(outer),
                implicit(inner).repeat(2000),
            ]
            .concat();
            assert_eq!(code(&bytes), "nesting-depth");
        }
        // Sequences of defined length inside the functional groups, each as long as what is left.
        let mut defined = Vec::new();
        for _ in 0..2000 {
            let length = u32::try_from(defined.len()).unwrap();
            let item = [&[0xFE, 0xFF, 0x00, 0xE0][..], &length.to_le_bytes()].concat();
            defined = [
                long_element([0x28, 0, 0x45, 0x91], *b"SQ", length + 8),
                item,
                defined,
            ]
            .concat();
        }
        let length = u32::try_from(defined.len()).unwrap();
        let bytes = [
            part10_header(EXPLICIT_LE),
            long_element([0, 0x52, 0x29, 0x92], *b"SQ", length),
            defined,
        ]
        .concat();
        assert_ne!(code(&bytes), "ok");
    });
}

#[test]
fn counts_are_bounded() {
    let empty = [0x09, 0, 0x01, 0x10, b'L', b'O', 0, 0];
    let bytes = [
        part10_header(EXPLICIT_LE),
        empty.repeat(dicom::prescan::MAX_ELEMENTS + 1),
    ]
    .concat();
    assert_eq!(code(&bytes), "too-many");
    let item = [0xFE, 0xFF, 0x00, 0xE0, 0, 0, 0, 0];
    let frames = long_element([0, 0x52, 0x30, 0x92], *b"SQ", u32::MAX);
    let bytes = [
        part10_header(EXPLICIT_LE),
        frames,
        item.repeat(dicom::prescan::MAX_FRAMES + 1),
    ]
    .concat();
    assert_eq!(code(&bytes), "too-many");
    let pixels = long_element([0xE0, 0x7F, 0x10, 0], *b"OB", u32::MAX);
    let bytes = [
        part10_header(RLE),
        pixels,
        item.repeat(dicom::prescan::MAX_FRAGMENTS + 2),
    ]
    .concat();
    assert_eq!(code(&bytes), "too-many");
}

#[test]
fn element_that_is_read_must_not_appear_twice() {
    let slope = [0x28, 0, 0x53, 0x10, b'D', b'S', 2, 0, b'2', b' '];
    let mut bytes = part10_header(EXPLICIT_LE);
    bytes.extend(slope);
    bytes.extend(bare(&ct(), EXPLICIT_LE));
    assert_eq!(code(&bytes), "duplicate-element");
}

#[test]
fn value_that_is_read_must_not_be_long() {
    let mut bytes = part10_header(EXPLICIT_LE);
    bytes.extend([0x08, 0, 0x08, 0, b'C', b'S', 0x02, 0x04]);
    bytes.extend([b'\\'; 0x402]);
    assert_eq!(code(&bytes), "value-length");
}

#[test]
fn truncation_at_every_offset_is_answered() {
    on_small_stack(|| {
        for syntax in [IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE] {
            let bytes = part10(&enhanced_ct(1), syntax);
            assert_eq!(code(&bytes), "ok");
            for end in 0..bytes.len() {
                assert_ne!(
                    code(&bytes[..end]),
                    "ok",
                    "{end} of {} in {syntax}",
                    bytes.len()
                );
            }
        }
        let mut object = ct();
        encapsulate(
            &mut object,
            &[],
            &[rle_frame(&little_endian(&stored_values()))],
        );
        let bytes = part10(&object, RLE);
        assert_eq!(code(&bytes), "ok");
        for end in 0..bytes.len() {
            assert_ne!(code(&bytes[..end]), "ok", "{end} of {} in RLE", bytes.len());
        }
    });
}

#[test]
fn arbitrary_bytes_are_answered() {
    on_small_stack(|| {
        let strategy = (
            prop::sample::select(vec![IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE, RLE]),
            prop::collection::vec(any::<u8>(), 0..512),
        );
        runner(2000)
            .run(&strategy, |(syntax, bytes)| {
                code(&bytes);
                code(&[part10_header(syntax), bytes].concat());
                Ok(())
            })
            .unwrap();
    });
}

#[test]
fn flipped_bytes_are_answered() {
    on_small_stack(|| {
        let mut rle = ct();
        encapsulate(
            &mut rle,
            &[],
            &[rle_frame(&little_endian(&stored_values()))],
        );
        let files = [
            part10(&ct(), EXPLICIT_LE),
            part10(&enhanced_ct(2), IMPLICIT_LE),
            part10(&enhanced_ct(2), EXPLICIT_LE),
            part10(&ct(), EXPLICIT_BE),
            part10(&rle, RLE),
            part10(&jpeg(), data_set::JPEG_BASELINE),
        ];
        let flips = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6);
        runner(500)
            .run(&(0..files.len(), flips), |(file, flips)| {
                let mut bytes = files[file].clone();
                // Half of the flips fall on the headers, where they do most.
                for (place, (index, value)) in flips.into_iter().enumerate() {
                    let length = if place % 2 == 0 {
                        bytes.len().min(1400)
                    } else {
                        bytes.len()
                    };
                    bytes[index.index(length)] = value;
                }
                code(&bytes);
                Ok(())
            })
            .unwrap();
    });
}

/// An 8-bit image as JPEG baseline, coded by dicom-rs' writer.
fn jpeg() -> dicom_object::InMemDicomObject {
    let mut object = ct();
    data_set::number(&mut object, (0x0028, 0x0100), 8);
    data_set::number(&mut object, (0x0028, 0x0101), 8);
    data_set::number(&mut object, (0x0028, 0x0102), 7);
    data_set::number(&mut object, (0x0028, 0x0103), 0);
    encapsulate(&mut object, &[], &[data_set::jpeg_frame()]);
    object
}

#[test]
fn jpeg_baseline_is_read_within_its_tolerance() {
    let bytes = part10(&jpeg(), data_set::JPEG_BASELINE);
    let slice = dicom::read(&bytes).unwrap().frame(0).unwrap();
    assert!(slice.attributes.is_lossy);
    assert_eq!(slice.pixels.len(), 64 * 64);
    for (pixel, expected) in slice.pixels.iter().zip(data_set::jpeg_values()) {
        assert!(pixel.abs_diff(expected) <= 8, "{pixel} for {expected}");
    }
}

/// The bomb: a gigabyte of zeros in a megabyte.
#[cfg(feature = "deflate")]
#[test]
fn deflate_bomb_stops_at_the_bound() {
    use dicom_encoding::transfer_syntax::{Codec, TransferSyntaxIndex};
    use std::io::Write;
    const DEFLATED: &str = "1.2.840.10008.1.2.1.99";
    let deflated = |bytes: &[u8], times: usize| {
        let syntax = dicom_transfer_syntax_registry::TransferSyntaxRegistry
            .get(DEFLATED)
            .unwrap();
        let Codec::Dataset(Some(adapter)) = syntax.codec() else {
            panic!("no codec");
        };
        let mut file = part10_header(DEFLATED);
        let mut writer = adapter.adapt_writer(Box::new(&mut file));
        for _ in 0..times {
            writer.write_all(bytes).unwrap();
        }
        writer.flush().unwrap();
        drop(writer);
        file
    };
    assert_eq!(code(&deflated(&vec![0; 1 << 20], 80)), "inflated-size");
    assert_eq!(code(&deflated(&bare(&ct(), EXPLICIT_LE), 1)), "ok");
    let mut broken = deflated(&bare(&ct(), EXPLICIT_LE), 1);
    broken.truncate(400);
    assert_ne!(code(&broken), "ok");
}

/// Largest resident memory of this test process so far, where the system tells.
#[cfg(target_os = "linux")]
#[test]
fn memory_stays_below_the_contract() {
    counts_are_bounded();
    claimed_lengths_are_held_against_the_bytes_left();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let kibibytes: u64 = peak.trim().trim_end_matches("kB").trim().parse().unwrap();
    assert!(kibibytes < 300 << 10, "{kibibytes} KiB");
}

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(ProptestConfig {
        cases,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(20_261_123),
        ..ProptestConfig::default()
    })
}
