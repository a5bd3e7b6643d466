//! Phantom slices, written as DICOM files and read back, have the tensors that the float64 reference in Python computes
//! from the same files.
//!
//! The digests of `tests/reference/phantom-digests.csv` are the reference's. To make them anew after the phantom has
//! changed: `UPDATE_GOLDEN=1 cargo test -p shared --features phantom --test phantom_reference` writes the files and says
//! where, then `tests/reference/preprocess.py digest FOLDER > tests/reference/phantom-digests.csv`.
#![cfg(all(feature = "std", feature = "phantom"))]
#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers stop it at the first fault"
)]

use std::path::PathBuf;

use shared::phantom::{StudyPlan, dicom_file};
use shared::preprocess::Preprocessor;
use shared::spec::PreprocessSpec;
use shared::{TENSOR_BYTES, dicom};

const DIGESTS: &str = include_str!("../../tests/reference/phantom-digests.csv");
const EXPLICIT_LITTLE_ENDIAN: &str = "1.2.840.10008.1.2.1";
const SEED: u64 = 20;
const N_STUDIES: u32 = 4;
const N_SLICES: u32 = 9;

/// Whole files: two slices of each of the first studies, at 512 x 512.
fn files() -> impl Iterator<Item = Vec<u8>> {
    let slices = (0..N_STUDIES).flat_map(|study| [3, 5].map(|slice| (study, slice)));
    slices.map(|(study, slice)| {
        let plan = StudyPlan::new(SEED, study, N_SLICES, 512);
        dicom_file(&plan, slice, EXPLICIT_LITTLE_ENDIAN).unwrap()
    })
}

#[test]
fn phantom_tensors_are_those_of_the_float64_reference() {
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        return write_files();
    }
    let mut preprocessor = Preprocessor::new(&PreprocessSpec::default()).unwrap();
    let mut out = vec![0; TENSOR_BYTES];
    for file in files() {
        let object = dicom::read(&file).unwrap();
        preprocessor
            .tensor(&object.frame(0).unwrap().pixels(), &mut out)
            .unwrap();
        let sop_uid = object.identity().sop_uid.clone().unwrap();
        let line = format!("{},{sop_uid},", blake3::hash(&out).to_hex());
        assert!(
            DIGESTS.lines().any(|known| known.starts_with(&line)),
            "{line} is not the reference's"
        );
    }
    let n_known = DIGESTS.lines().count();
    assert_eq!(n_known, files().count());
}

fn write_files() {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("phantom");
    std::fs::create_dir_all(&folder).unwrap();
    for (index, file) in files().enumerate() {
        std::fs::write(folder.join(format!("{index}.dcm")), file).unwrap();
    }
    panic!("files for the reference are in {}", folder.display());
}
