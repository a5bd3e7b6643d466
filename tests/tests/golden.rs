//! From the bytes of a DICOM file to the logit's bits: the same on every CPU, in every build, for every kernel.
//!
//! The files are phantoms of fixed seeds, written in every transfer syntax that this build can write. `golden/tensors.csv`
//! holds the BLAKE3 digest of each tensor, `golden/logits.csv` the bits of the demonstration model's logits. Both are
//! exact: there is no tolerance. `UPDATE_GOLDEN=1` rewrites them; review the difference.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at the first fault; its helpers too"
)]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use engine::{Kernel, Model, Options};
use shared::phantom::{StudyPlan, TRANSFER_SYNTAXES, dicom_file, multi_frame_file};
use shared::preprocess::Preprocessor;
use shared::spec::PreprocessSpec;
use shared::{TENSOR_BYTES, dicom};

/// Seed, number of the study, slices, matrix, slice.
const SLICES: [(u64, u32, u32, u16, u32); 6] = [
    (1, 0, 40, 512, 11),
    (1, 1, 40, 512, 20),
    (2, 2, 24, 512, 3),
    (3, 3, 24, 256, 12),
    (4, 4, 24, 320, 7),
    (5, 5, 24, 768, 19),
];

/// The model that is embedded in the daemon.
const MODEL: &[u8] = include_bytes!("../../edge/model/demo.onnx");

fn tensor(file: &[u8], frame_index: u32) -> Vec<u8> {
    let object = dicom::read(file).expect("a phantom is readable");
    let slice = object
        .frame(frame_index)
        .expect("a phantom passes the gate");
    let mut tensor = vec![0; TENSOR_BYTES];
    let spec = PreprocessSpec::default();
    Preprocessor::new(&spec)
        .unwrap()
        .tensor(&slice.pixels(), &mut tensor)
        .expect("a phantom fits its description");
    tensor
}

fn golden_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("golden")
        .join(name)
}

#[track_caller]
fn check_golden(name: &str, found: &str) {
    let path = golden_path(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, found).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    for (line, (found, expected)) in found.lines().zip(expected.lines()).enumerate() {
        assert_eq!(found, expected, "{name} line {}", line + 1);
    }
    assert_eq!(
        found.lines().count(),
        expected.lines().count(),
        "lines of {name}"
    );
}

#[test]
fn every_transfer_syntax_gives_its_golden_tensor() {
    let mut found = "seed,study,slices,matrix,slice,transfer_syntax,tensor_blake3\n".to_owned();
    for (seed, study, n_slices, matrix, slice) in SLICES {
        let plan = StudyPlan::new(seed, study, n_slices, matrix);
        for syntax in TRANSFER_SYNTAXES {
            let digest = blake3::hash(&tensor(&dicom_file(&plan, slice, syntax).unwrap(), 0));
            writeln!(
                found,
                "{seed},{study},{n_slices},{matrix},{slice},{syntax},{digest}"
            )
            .unwrap();
        }
    }
    check_golden("tensors.csv", &found);
}

#[test]
fn lossless_transfer_syntaxes_and_multi_frame_objects_give_the_same_tensor() {
    let (seed, study, n_slices, matrix, _) = SLICES[0];
    let plan = StudyPlan::new(seed, study, n_slices, matrix);
    let expected = tensor(&dicom_file(&plan, 2, TRANSFER_SYNTAXES[0]).unwrap(), 0);
    for syntax in &TRANSFER_SYNTAXES[..4] {
        assert!(
            tensor(&dicom_file(&plan, 2, syntax).unwrap(), 0) == expected,
            "{syntax}"
        );
        assert!(
            tensor(&multi_frame_file(&plan, 3, syntax).unwrap(), 2) == expected,
            "{syntax}, frame 3"
        );
    }
}

#[test]
fn every_kernel_and_number_of_threads_gives_the_golden_logits() {
    let slices = &SLICES[..4];
    let images: Vec<u8> = slices
        .iter()
        .flat_map(|(seed, study, n_slices, matrix, slice)| {
            let plan = StudyPlan::new(*seed, *study, *n_slices, *matrix);
            tensor(&dicom_file(&plan, *slice, TRANSFER_SYNTAXES[1]).unwrap(), 0)
        })
        .collect();
    for kernel in Kernel::available() {
        for threads in [1, 3] {
            let model = Model::load(
                MODEL,
                &Options {
                    kernel: Some(kernel),
                    threads,
                    ..Options::default()
                },
            )
            .unwrap();
            let mut logits = vec![0.0; slices.len()];
            model.session().logits(&images, &mut logits).unwrap();
            let mut found = format!("model_blake3,{}\nlogit,bits\n", model.digest());
            for logit in logits {
                writeln!(found, "{logit},{:08x}", logit.to_bits()).unwrap();
            }
            check_golden("logits.csv", &found);
        }
    }
}

#[test]
fn the_model_passes_its_own_self_test() {
    let model = Model::load(
        MODEL,
        &Options {
            kernel: None,
            threads: 1,
            ..Options::default()
        },
    )
    .unwrap();
    let self_test = &model
        .manifest()
        .expect("the demonstration model has a manifest")
        .self_test;
    assert!(!self_test.is_empty());
    for test in self_test {
        let mut image = vec![0; TENSOR_BYTES];
        shared::selftest::image(test.seed, &mut image);
        let mut logit = [0.0];
        model.session().logits(&image, &mut logit).unwrap();
        assert_eq!(logit[0].to_bits(), test.logit_bits, "seed {}", test.seed);
    }
}
