use super::*;
use crate::dicom;

/// HU of one frame as the reader sees them.
fn hu(file: &[u8], frame_index: u32) -> Vec<i32> {
    let object = dicom::read(file).expect("a readable object");
    let slice = object.frame(frame_index).expect("an accepted frame");
    let (slope, intercept) = (slice.rescale.slope, slice.rescale.intercept);
    let cell = usize::from(slice.format.bits_allocated / 8);
    let value = |cell: &[u8]| match (cell, slice.format.byte_order, slice.format.is_signed) {
        (&[byte], ..) => i32::from(byte),
        (&[a, b], crate::stored::ByteOrder::LittleEndian, true) => {
            i32::from(i16::from_le_bytes([a, b]))
        }
        (&[a, b], crate::stored::ByteOrder::LittleEndian, false) => {
            i32::from(u16::from_le_bytes([a, b]))
        }
        (&[a, b], crate::stored::ByteOrder::BigEndian, true) => {
            i32::from(i16::from_be_bytes([a, b]))
        }
        (&[a, b], crate::stored::ByteOrder::BigEndian, false) => {
            i32::from(u16::from_be_bytes([a, b]))
        }
        _ => panic!("cells of {} bytes", cell.len()),
    };
    let hu = |cell| super::super::canvas::round_i32(f64::from(value(cell)) * slope + intercept);
    slice
        .pixels
        .chunks_exact(cell)
        .map(hu)
        .take(slice.rows * slice.columns)
        .collect()
}

fn syntaxes() -> Vec<&'static str> {
    let mut syntaxes = TRANSFER_SYNTAXES.to_vec();
    if cfg!(feature = "deflate") {
        syntaxes.push(uids::DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN);
    }
    syntaxes
}

#[test]
fn every_transfer_syntax_reads_back_to_the_same_hu() {
    let mut storages = Vec::new();
    for study_index in 0..8 {
        let plan = StudyPlan::new(5, study_index, 6, 96);
        storages.push(plan.storage());
        let expected: Vec<i32> = plan.slice(3).hu.iter().map(|&hu| i32::from(hu)).collect();
        for syntax in syntaxes() {
            let file = dicom_file(&plan, 3, syntax).expect("a syntax of the table");
            let read = hu(&file, 0);
            assert_eq!(read.len(), expected.len());
            let tolerance = if syntax == uids::JPEG_BASELINE8_BIT {
                150
            } else {
                0
            };
            for (read, &expected) in read.iter().zip(&expected) {
                // Eight bits hold -1024 to 1016 HU.
                let expected = if tolerance > 0 {
                    expected.clamp(-1024, 1016)
                } else {
                    expected
                };
                assert!(
                    (read - expected).abs() <= tolerance,
                    "{syntax}: {read} for {expected} in study {study_index}"
                );
            }
        }
    }
    for storage in [
        Storage::Unsigned12,
        Storage::Signed16,
        Storage::Signed16Shifted,
    ] {
        assert!(storages.contains(&storage), "no study stores {storage:?}");
    }
}

#[test]
fn frames_of_a_multi_frame_file_equal_the_slices() {
    let plan = StudyPlan::new(5, 1, 6, 64);
    for syntax in syntaxes()
        .into_iter()
        .filter(|&syntax| syntax != uids::JPEG_BASELINE8_BIT)
    {
        let file = multi_frame_file(&plan, 4, syntax).expect("a syntax of the table");
        let object = dicom::read(&file).expect("a readable object");
        assert_eq!(object.n_frames(), 4);
        for frame_index in 0..4 {
            let expected: Vec<i32> = plan
                .slice(frame_index)
                .hu
                .iter()
                .map(|&hu| i32::from(hu))
                .collect();
            assert_eq!(
                hu(&file, frame_index),
                expected,
                "{syntax} frame {frame_index}"
            );
            let position = object
                .frame(frame_index)
                .expect("an accepted frame")
                .attributes
                .position_mm
                .expect("a position");
            assert!((position[2] - plan.z_mm(frame_index)).abs() < 1e-5);
        }
    }
}

#[test]
fn a_foreign_transfer_syntax_is_refused_by_name() {
    let plan = StudyPlan::new(1, 0, 1, 64);
    let error = dicom_file(&plan, 0, "1.2.3").expect_err("not a syntax of the table");
    assert!(error.to_string().contains("1.2.3"));
    assert!(multi_frame_file(&plan, 1, uids::JPEG_BASELINE8_BIT).is_err());
}
