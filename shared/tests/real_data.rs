//! Reading real CT files: the folder named by `PE_EDGE_REAL_DATA`. Without the variable nothing is tested, and the tests say so on
//! standard error; with it, a missing file is a failure.
#![cfg(feature = "std")]
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use shared::dicom::{self, Slice};
use std::path::{Path, PathBuf};

/// The environment variable that names the folder.
const VARIABLE: &str = "PE_EDGE_REAL_DATA";
const NEMA: &str = "nema_ct1_chest_all_syntaxes";
const CTIMAGE: &str = "ctimage_chest_all_syntaxes";

/// The folder, or `None` after saying that the test did not run.
#[expect(clippy::print_stderr, reason = "a test that did not run has to say so")]
fn folder(test: &str) -> Option<PathBuf> {
    let folder = std::env::var_os(VARIABLE).map(PathBuf::from);
    match &folder {
        None => eprintln!("{test}: did not run, {VARIABLE} is not set"),
        Some(path) => assert!(path.is_dir(), "{VARIABLE} names no folder"),
    }
    folder
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All files below `folder`, sorted.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let list = if path.is_dir() {
                &mut folders
            } else {
                &mut files
            };
            list.push(path);
        }
    }
    files.sort();
    files
}

/// Codes of the first frame: "ok" or the reason.
fn code(bytes: &[u8]) -> &'static str {
    match dicom::read(bytes).map(|object| object.frame(0).map_err(|refusal| refusal.code())) {
        Err(error) => error.code(),
        Ok(Err(code)) => code,
        Ok(Ok(_)) => "ok",
    }
}

fn hounsfield(slice: &Slice) -> Vec<f64> {
    let bytes = usize::from(slice.format.bits_allocated / 8);
    let value = |cell: &[u8]| {
        let mut wide = [0; 4];
        wide[..bytes].copy_from_slice(cell);
        let shift = 32 - u32::from(slice.format.bits_stored);
        let raised = u32::from_le_bytes(wide) << shift;
        if slice.format.is_signed {
            f64::from(raised.cast_signed() >> shift)
        } else {
            f64::from(raised >> shift)
        }
    };
    let rescale = slice.rescale;
    slice
        .pixels
        .chunks_exact(bytes)
        .map(|cell| value(cell) * rescale.slope + rescale.intercept)
        .collect()
}

fn slice(path: &Path) -> Slice {
    let bytes = read(path);
    let object = dicom::read(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    object
        .frame(0)
        .unwrap_or_else(|refusal| panic!("{}: {refusal}", path.display()))
}

/// Compares a file with its uncompressed twin, in HU.
#[track_caller]
fn check_twin(twin: &Slice, path: &Path, tolerance_hu: f64, is_lossy: bool) {
    let slice = slice(path);
    assert_eq!(slice.attributes.is_lossy, is_lossy, "{}", path.display());
    let values = hounsfield(&slice).into_iter().zip(hounsfield(twin));
    let largest = values
        .map(|(found, expected)| (found - expected).abs())
        .fold(0.0, f64::max);
    assert!(largest <= tolerance_hu, "{}: {largest} HU", path.display());
    if tolerance_hu == 0.0 {
        assert!(
            slice.pixels == twin.pixels,
            "{}: stored values differ",
            path.display()
        );
        assert_eq!(slice.padding, twin.padding);
    }
}

#[test]
fn every_file_yields_slices_or_a_reason() {
    let Some(folder) = folder("every_file_yields_slices_or_a_reason") else {
        return;
    };
    let files = files(&folder);
    assert!(files.len() >= 100, "{} files", files.len());
    for path in files {
        let bytes = read(&path);
        match dicom::read(&bytes) {
            Err(error) => assert!(!error.to_string().is_empty()),
            Ok(object) => {
                for frame_index in 0..object.n_frames() {
                    match object.frame(frame_index) {
                        Ok(slice) => assert_eq!(
                            slice.pixels.len(),
                            slice.rows
                                * slice.columns
                                * usize::from(slice.format.bits_allocated / 8)
                        ),
                        Err(refusal) => assert!(!refusal.to_string().is_empty()),
                    }
                }
            }
        }
    }
}

#[test]
fn series_are_read_whole_with_rising_positions() {
    let Some(folder) = folder("series_are_read_whole_with_rising_positions") else {
        return;
    };
    for (name, n_slices, spacing_mm) in [
        ("chest_ct_contrast_series", 40, 3.0),
        ("ct_3slice_series", 3, 1.0),
    ] {
        let files = files(&folder.join(name));
        let files = files
            .iter()
            .filter(|path| path.extension().is_some_and(|name| name == "dcm"));
        let mut z_mm: Vec<f64> = files
            .map(|path| slice(path).attributes.z_mm.unwrap())
            .collect();
        z_mm.sort_by(f64::total_cmp);
        assert_eq!(z_mm.len(), n_slices, "{name}");
        assert!(
            z_mm.windows(2)
                .all(|pair| (pair[1] - pair[0] - spacing_mm).abs() < 1e-3),
            "{name}"
        );
    }
}

#[test]
fn twins_in_other_transfer_syntaxes_give_the_same_values() {
    let Some(folder) = folder("twins_in_other_transfer_syntaxes_give_the_same_values") else {
        return;
    };
    let nema = |name: &str| folder.join(NEMA).join(name);
    let twin = slice(&nema("CT1_UNC_explicit_le.dcm"));
    for name in [
        "CT1_UNC_explicit_be.dcm",
        "CT1_UNC_implicit_le.dcm",
        "CT1_RLE.dcm",
    ] {
        check_twin(&twin, &nema(name), 0.0, false);
    }
    if cfg!(feature = "jpegls") {
        for name in [
            "fragmented_bot",
            "fragmented_no_bot",
            "not_fragmented_bot",
            "not_fragmented_no_bot",
        ] {
            check_twin(
                &twin,
                &nema(&format!("CT1_{name}_jpegls80.dcm")),
                0.0,
                false,
            );
        }
    }
    if cfg!(feature = "jpeg2000") {
        check_twin(&twin, &nema("CT1_J2KR.dcm"), 0.0, false);
        check_twin(&twin, &nema("CT1_J2KI.dcm"), 352.0, true);
    }
    let ctimage = |name: &str| folder.join(CTIMAGE).join(format!("CTImage.dcm_{name}.dcm"));
    let twin = slice(&folder.join(CTIMAGE).join("CTImage.dcm"));
    let lossless = [
        "LittleEndianExplicitTransferSyntax_1.2.840.10008.1.2.1",
        "BigEndianExplicitTransferSyntax_1.2.840.10008.1.2.2",
        "RLELosslessTransferSyntax_1.2.840.10008.1.2.5",
        "JPEGProcess14TransferSyntax_1.2.840.10008.1.2.4.57",
        "JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70",
    ];
    for name in lossless {
        check_twin(&twin, &ctimage(name), 0.0, false);
    }
    // Two steps of the slope of 32.12 HU.
    check_twin(
        &twin,
        &ctimage("JPEGProcess1TransferSyntax_1.2.840.10008.1.2.4.50"),
        64.25,
        true,
    );
    check_twin(
        &twin,
        &ctimage("JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51"),
        36.0,
        true,
    );
    if cfg!(feature = "deflate") {
        check_twin(
            &twin,
            &ctimage("DeflatedExplicitVRLittleEndianTransferSyntax_1.2.840.10008.1.2.1.99"),
            0.0,
            false,
        );
    }
    if cfg!(feature = "jpegls") {
        check_twin(
            &twin,
            &ctimage("JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80"),
            0.0,
            false,
        );
        check_twin(
            &twin,
            &ctimage("JPEGLSLossyTransferSyntax_1.2.840.10008.1.2.4.81"),
            1.0,
            true,
        );
    }
    if cfg!(feature = "jpeg2000") {
        check_twin(
            &twin,
            &ctimage("JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90"),
            0.0,
            false,
        );
        check_twin(
            &twin,
            &ctimage("JPEG2000TransferSyntax_1.2.840.10008.1.2.4.91"),
            5.0,
            true,
        );
    }
}

/// The perfusion map as if it were an axial image in HU: values of the same length in place of those that the gate refuses.
fn disguised(mut bytes: Vec<u8>) -> Vec<u8> {
    let replacements: [(&[u8], &[u8]); 5] = [
        (b"COLOR ", b"      "),
        (b"PERFUSION", b"VOLUME   "),
        (b"RCBF", b"NONE"),
        (
            b"\x28\x00\x54\x10LO\x02\x00US",
            b"\x28\x00\x54\x10LO\x02\x00HU",
        ),
        (b"-1.00000\\0.00000", b"1.000000\\0.00000"),
    ];
    for (from, to) in replacements {
        let places: Vec<usize> = (0..20_000.min(bytes.len() - from.len()))
            .filter(|&place| bytes[place..].starts_with(from))
            .collect();
        for place in places {
            bytes[place..place + to.len()].copy_from_slice(to);
        }
    }
    bytes
}

#[test]
fn frames_of_an_enhanced_ct_are_equal_in_every_coding() {
    let Some(folder) = folder("frames_of_an_enhanced_ct_are_equal_in_every_coding") else {
        return;
    };
    let frames = |name: &str| {
        let path = folder.join("multiframe_enhanced_ct").join(name);
        let bytes = disguised(read(&path));
        let object = dicom::read(&bytes).unwrap();
        assert_eq!(object.n_frames(), 2, "{name}");
        [0, 1].map(|index| {
            object
                .frame(index)
                .unwrap_or_else(|refusal| panic!("{name}: {refusal}"))
        })
    };
    let expected = frames("CT0012.not_fragmented_bot_rle.dcm");
    assert_ne!(expected[0].pixels, expected[1].pixels);
    assert_eq!(
        expected.each_ref().map(|frame| frame.attributes.z_mm),
        [Some(-159.0), Some(-149.0)]
    );
    let mut lossless = vec![
        "not_fragmented_no_bot_rle",
        "fragmented_no_bot_jpeg_lossless.57",
        "fragmented_no_bot_jpeg_lossless.70",
    ];
    if cfg!(feature = "jpegls") {
        lossless.extend([
            "fragmented_no_bot_jpeg_ls.80",
            "not_fragmented_bot_jpeg_ls.80",
        ]);
    }
    for name in lossless {
        assert!(frames(&format!("CT0012.{name}.dcm")) == expected, "{name}");
    }
    // Its writer raised all stored values by 1,024 without telling the rescale intercept; libjpeg decodes the same.
    const RAISED_HU: f64 = 1024.0;
    let lossy = frames("CT0012.fragmented_no_bot_jpeg_baseline.51.dcm");
    for (lossy, expected) in lossy.iter().zip(&expected) {
        assert!(lossy.attributes.is_lossy);
        let values = hounsfield(lossy).into_iter().zip(hounsfield(expected));
        let difference = |(found, expected): (f64, f64)| (found - expected - RAISED_HU).abs();
        let largest = values.map(difference).fold(0.0, f64::max);
        assert!(largest <= 36.0, "{largest} HU");
    }
}

/// What is refused, and why, file by file.
const REASONS: &[(&str, &str)] = &[
    ("robustness_pydicom/CT_small.dcm", "ok"),
    ("robustness_pydicom/bad_sequence.dcm", "ok"),
    ("robustness_pydicom/no_meta.dcm", "not-dicom"),
    ("robustness_pydicom/meta_missing_tsyntax.dcm", "not-dicom"),
    ("robustness_pydicom/MR_truncated.dcm", "length"),
    ("robustness_pydicom/rtplan_truncated.dcm", "length"),
    (
        "robustness_pydicom/emri_small_jpeg_2k_lossless_too_short.dcm",
        "truncated",
    ),
    ("robustness_pydicom/J2K_pixelrep_mismatch.dcm", "not-axial"),
    ("robustness_pydicom/explicit_VR-UN.dcm", "in-plane-axes"),
    (
        "robustness_pydicom/dicomdirtests_98892001_CT5N_2062.dcm",
        "rows",
    ),
    (
        "robustness_pydicom/dicomdirtests_98892001_CT2N_6293.dcm",
        "image-type",
    ),
    (
        "robustness_pydicom/dicomdirtests_TINY_ALPHA_PT000000_ST000000_SE000000_IM000000.dcm",
        "no-pixel-data",
    ),
    ("robustness_pydicom/MR_small_bigendian.dcm", "sop-class"),
    ("robustness_pydicom/SC_rgb_small_odd.dcm", "sop-class"),
    ("robustness_pydicom/ExplVR_BigEndNoMeta.dcm", "sop-class"),
    ("robustness_pydicom/UN_sequence.dcm", "sop-class"),
    (
        "multiframe_enhanced_ct/CT0012.not_fragmented_bot_rle.dcm",
        "pixel-presentation",
    ),
    (
        "multiframe_enhanced_ct/CT0012.fragmented_no_bot_jpeg_lossless.70.dcm",
        "pixel-presentation",
    ),
];

#[test]
fn reasons_are_the_expected_ones() {
    let Some(folder) = folder("reasons_are_the_expected_ones") else {
        return;
    };
    for (name, expected) in REASONS {
        assert_eq!(code(&read(&folder.join(name))), *expected, "{name}");
    }
}

/// Seeded damage and truncation of every compressed file: an answer each time, whatever the decoder makes of it.
#[test]
fn damaged_codestreams_are_answered() {
    let Some(folder) = folder("damaged_codestreams_are_answered") else {
        return;
    };
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut random = move |bound: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % u64::try_from(bound).unwrap()).unwrap()
    };
    for path in files(&folder.join(CTIMAGE)) {
        let original = read(&path);
        if original.len() > 300_000 {
            continue;
        }
        for _ in 0..8 {
            let mut bytes = original.clone();
            for _ in 0..4 {
                let place = random(bytes.len());
                bytes[place] = u8::try_from(random(256)).unwrap();
            }
            code(&bytes);
            bytes.truncate(random(bytes.len()));
            code(&bytes);
        }
    }
}
