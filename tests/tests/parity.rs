//! The same weights in three arithmetics: candle f32, the exported f32 file on our float kernels, the int8 file on our integer ones.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at the first fault; its helpers too"
)]

use candle_core::{Device, Tensor};
use engine::{Model, Options};
use shared::phantom::{Finding, StudyPlan, UidRole};
use shared::preprocess::Preprocessor;
use shared::spec::PreprocessSpec;
use shared::{CHANNELS, SIDE, TENSOR_BYTES};
use trainer::export::{float_model, weights_of};
use trainer::network::Network;
use trainer::onnx::{self, ModelProto};
use trainer::{architecture, quantize};

/// Candle and the engine sum in different orders: 115,200 products of f32 at most, so a few units in the fifth digit.
const FLOAT_TOLERANCE: f32 = 1e-4;

/// Share of the logits' range over the images that quantization may move a logit by. Eight bits a tensor and a channel
/// leave about 1 % on an untrained network; more says that a scale or a bias is wrong.
const INT8_TOLERANCE: f32 = 0.05;

/// Slices of the images: positive and negative studies alternate.
const N_IMAGES: u32 = 12;

/// Real slices that are added where `PE_EDGE_REAL_DATA` names the folder that holds them.
const N_REAL: usize = 4;
const REAL_SERIES: &str = "chest_ct_contrast_series";

/// u8 `[n, 3, 256, 256]` from phantoms, and from a real series where there is one.
fn images() -> Vec<u8> {
    let mut images = phantoms();
    images.extend(real_slices());
    images
}

fn real_slices() -> Vec<u8> {
    let Some(folder) = std::env::var_os("PE_EDGE_REAL_DATA") else {
        return Vec::new();
    };
    let folder = std::path::Path::new(&folder).join(REAL_SERIES);
    let files = std::fs::read_dir(&folder).unwrap();
    let mut files: Vec<_> = files.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut preprocessor = Preprocessor::new(&PreprocessSpec::default()).unwrap();
    let mut images = vec![0; N_REAL * TENSOR_BYTES];
    for (index, image) in images.chunks_exact_mut(TENSOR_BYTES).enumerate() {
        let bytes = std::fs::read(&files[index * files.len() / N_REAL]).unwrap();
        let object = shared::dicom::read(&bytes).unwrap();
        let slice = object.frame(0).unwrap();
        preprocessor.tensor(&slice.pixels(), image).unwrap();
    }
    images
}

/// u8 `[N_IMAGES, 3, 256, 256]` from phantoms.
fn phantoms() -> Vec<u8> {
    let mut preprocessor = Preprocessor::new(&PreprocessSpec::default()).unwrap();
    let mut images = vec![0; N_IMAGES as usize * TENSOR_BYTES];
    for (index, image) in (0..N_IMAGES).zip(images.chunks_exact_mut(TENSOR_BYTES)) {
        let finding = if index % 2 == 0 {
            Finding::Positive
        } else {
            Finding::Negative
        };
        let slice = StudyPlan::with_finding(9, index, 30, 256, finding).slice(10 + index);
        preprocessor
            .tensor(&slice.pixels(&slice.bytes()), image)
            .unwrap();
    }
    images
}

fn engine_logits(file: &[u8], images: &[u8]) -> Vec<f32> {
    let mut logits = vec![0.0; images.len() / TENSOR_BYTES];
    let model = Model::load(
        file,
        &Options {
            kernel: None,
            threads: 2,
            ..Options::default()
        },
    )
    .unwrap();
    model.session().logits(images, &mut logits).unwrap();
    logits
}

/// Candle's logits of `images` and the exported file, once tract agreed.
#[track_caller]
fn check_float(name: &str, width: f64, images: &[u8]) -> (Vec<f32>, ModelProto) {
    let network = Network::new(architecture::find(name).unwrap(), width, 11, &Device::Cpu).unwrap();
    let shape = (images.len() / TENSOR_BYTES, CHANNELS, SIDE, SIDE);
    let batch = Tensor::from_slice(images, shape, &Device::Cpu).unwrap();
    // Statistics for the transfer learners' random weights.
    network.settle(&batch).unwrap();
    let candle: Vec<f32> = network
        .forward(&batch)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap();

    let float = float_model(
        network.architecture(),
        width,
        &weights_of(&network).unwrap(),
    );
    let float = float.unwrap();
    let tract = engine_logits(&onnx::write(&float).unwrap(), images);
    for (candle, tract) in candle.iter().zip(&tract) {
        let allowed = FLOAT_TOLERANCE * candle.abs().max(1.0);
        assert!(
            (candle - tract).abs() <= allowed,
            "{name}: candle {candle}, tract {tract}"
        );
    }
    (candle, float)
}

#[track_caller]
fn check(name: &str, width: f64) {
    let images = images();
    let (candle, float) = check_float(name, width, &images);
    let calibration: Vec<&[u8]> = images.chunks_exact(TENSOR_BYTES).collect();
    let (int8, _) =
        quantize::quantize_model(&float, &calibration, &quantize::Options::default(), &|| ())
            .unwrap();
    let int8 = engine_logits(&onnx::write(&int8).unwrap(), &images);
    let range = candle.iter().copied().fold(f32::MIN, f32::max)
        - candle.iter().copied().fold(f32::MAX, f32::min);
    for (candle, int8) in candle.iter().zip(&int8) {
        assert!(
            (candle - int8).abs() <= INT8_TOLERANCE * range,
            "{name}: f32 {candle}, int8 {int8}, range {range}"
        );
    }
}

#[test]
fn final_model_gives_the_same_logits_in_candle_tract_and_int8() {
    check("final", 1.0 / 16.0);
}

#[test]
fn a_two_convolution_model_gives_the_same_logits_in_candle_tract_and_int8() {
    check("two-conv", 1.0 / 32.0);
}

#[test]
fn transfer_learners_give_the_same_logits_in_candle_and_tract() {
    let images = images();
    check_float("resnet50", 1.0 / 32.0, &images);
    check_float("inception-v3", 1.0 / 32.0, &images);
}

#[test]
fn phantom_studies_have_distinct_identifiers() {
    let uids: Vec<String> = (0..20)
        .map(|study| StudyPlan::new(9, study, 30, 256).uid(UidRole::Study))
        .collect();
    let distinct: std::collections::BTreeSet<&String> = uids.iter().collect();
    assert_eq!(distinct.len(), uids.len());
}
