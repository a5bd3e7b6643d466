//! Objects that are read from a source are read as from memory, and only in parts.
#![cfg(all(feature = "phantom", feature = "std"))]
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::cell::RefCell;

use shared::dicom::{self, Source};
use shared::phantom::{StudyPlan, TRANSFER_SYNTAXES, dicom_file, multi_frame_file};

/// Remembers what it was asked for; ends early where `n_given` says so.
struct Asked {
    bytes: Vec<u8>,
    n_given: usize,
    asked: RefCell<Vec<usize>>,
}

impl Asked {
    fn new(bytes: Vec<u8>) -> Self {
        Self {
            n_given: bytes.len(),
            bytes,
            asked: RefCell::default(),
        }
    }
}

impl Source for Asked {
    fn n_bytes(&self) -> usize {
        self.bytes.len()
    }

    fn read_at(&self, offset: usize, buffer: &mut [u8]) -> bool {
        self.asked.borrow_mut().push(buffer.len());
        let given = self.bytes.get(offset..offset + buffer.len());
        match given.filter(|_| offset + buffer.len() <= self.n_given) {
            Some(bytes) => {
                buffer.copy_from_slice(bytes);
                true
            }
            None => false,
        }
    }
}

#[track_caller]
fn check(bytes: &[u8]) {
    let source = Asked::new(bytes.to_vec());
    let object = dicom::read_from(&source).unwrap();
    let twin = dicom::read(bytes).unwrap();
    assert_eq!(object.identity(), twin.identity());
    assert_eq!(object.copied(), twin.copied());
    assert_eq!(object.n_frames(), twin.n_frames());
    for frame_index in 0..object.n_frames() {
        assert_eq!(object.frame(frame_index), twin.frame(frame_index));
    }
}

#[test]
fn every_transfer_syntax_reads_the_same_from_a_source() {
    let plan = StudyPlan::new(3, 0, 3, 64);
    for syntax in TRANSFER_SYNTAXES {
        check(&dicom_file(&plan, 1, syntax).unwrap());
        // The phantom writes no JPEG of several frames.
        if let Ok(bytes) = multi_frame_file(&plan, 3, syntax) {
            check(&bytes);
        }
    }
}

#[test]
fn an_object_of_many_frames_is_never_asked_for_as_a_whole() {
    let plan = StudyPlan::new(3, 0, 40, 64);
    let bytes = multi_frame_file(&plan, 40, "1.2.840.10008.1.2.1").unwrap();
    let source = Asked::new(bytes);
    let object = dicom::read_from(&source).unwrap();
    let n_headers: usize = source.asked.take().iter().sum();
    assert!(n_headers < source.bytes.len() / 2, "{n_headers}");
    object.frame(17).unwrap();
    let frame = source.asked.take();
    assert_eq!(frame.iter().max(), Some(&(64 * 64 * 2)));
}

#[test]
fn a_source_that_ends_early_is_a_reason() {
    let plan = StudyPlan::new(3, 0, 1, 64);
    let bytes = dicom_file(&plan, 0, "1.2.840.10008.1.2.1").unwrap();
    for n_given in [0, 131, 400, 1_000, bytes.len() - 1] {
        let source = Asked {
            n_given,
            ..Asked::new(bytes.clone())
        };
        let read = dicom::read_from(&source);
        assert!(
            read.is_err() || read.unwrap().frame(0).is_err(),
            "{n_given}"
        );
    }
}
