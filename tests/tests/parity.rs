//! The same weights in four arithmetics: candle f32, the exported f32 file on our float kernels and through tract alone, the int8 file on our integer
//! kernels. `tests/reference/onnx_check.py` holds onnxruntime and `OpenVINO` to candle's logits.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at the first fault; its helpers too"
)]

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use engine::{Model, Options};
use shared::phantom::{Finding, StudyPlan, UidRole};
use shared::preprocess::Preprocessor;
use shared::spec::PreprocessSpec;
use shared::{CHANNELS, SIDE, TENSOR_BYTES};
use tract_onnx::prelude::{Datum, Framework, InferenceFact, InferenceModelExt, IntoRunnable, tvec};
use trainer::architecture::{ARCHITECTURES, Family, Units};
use trainer::export::{float_file, new_manifest, weights_of};
use trainer::network::Network;
use trainer::onnx::{self, Dimension};
use trainer::{architecture, quantize};

/// Candle, the engine and tract sum in different orders: 115,200 products of f32 at most, so a few units in the fifth digit.
const FLOAT_TOLERANCE: f32 = 1e-4;

/// Share of the logits' range over the images that quantization may move a logit by. Eight bits a tensor and a channel
/// leave about 1 % on an untrained network; more says that a scale or a bias is wrong.
const INT8_TOLERANCE: f32 = 0.05;

/// Width at which the convolutional networks are tried.
const NARROW: f64 = 1.0 / 32.0;

/// Width at which the transfer learners are: layers of four channels and random weights, fifty in a row, magnify the last digit past the tolerance.
const LESS_NARROW: f64 = 1.0 / 8.0;

/// Folder for [`write_files`], by environment.
const OUT: &str = "PE_EDGE_PARITY_OUT";

/// Slices of the images: positive and negative studies alternate.
const N_IMAGES: u32 = 12;

/// A real series of 40 slices, all of which are added where `PE_EDGE_REAL_DATA` names the folder that holds it.
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
    let folder = Path::new(&folder).join(REAL_SERIES);
    let files = std::fs::read_dir(&folder).unwrap();
    let files = files.map(|entry| entry.unwrap().path());
    let is_dicom = |path: &PathBuf| path.extension().is_some_and(|end| end == "dcm");
    let mut files: Vec<_> = files.filter(is_dicom).collect();
    files.sort();
    assert_eq!(files.len(), 40, "the series is whole");
    let mut preprocessor = Preprocessor::new(&PreprocessSpec::default()).unwrap();
    let mut images = vec![0; files.len() * TENSOR_BYTES];
    for (image, file) in images.chunks_exact_mut(TENSOR_BYTES).zip(&files) {
        let bytes = std::fs::read(file).unwrap();
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

/// The float file as tract alone runs it, without a kernel of ours.
fn tract_logits(file: &[u8], images: &[u8]) -> Vec<f32> {
    let shape = [1, CHANNELS, SIDE, SIDE];
    // A plan is for one image, and tract keeps a named dimension apart from a number.
    let mut file = onnx::read(file).unwrap();
    let input = &mut file.graph.as_mut().unwrap().input[0];
    let tensor = input.r#type.as_mut().unwrap().tensor_type.as_mut().unwrap();
    tensor.shape.as_mut().unwrap().dim[0].value = Some(Dimension::Value(1));
    let file = onnx::write(&file).unwrap();
    let onnx = tract_onnx::onnx().with_ignore_value_info(true);
    let mut model = onnx.model_for_read(&mut file.as_slice()).unwrap();
    model.select_outputs_by_name(["logit"]).unwrap();
    let fact = InferenceFact::dt_shape(u8::datum_type(), shape);
    let model = model.with_input_fact(0, fact).unwrap();
    let plan = model.into_optimized().unwrap().into_runnable().unwrap();
    let logit = |image: &[u8]| {
        let image = tract_onnx::prelude::Tensor::from_shape(&shape, image).unwrap();
        let outputs = plan.run(tvec!(image.into())).unwrap();
        outputs[0]
            .try_as_plain_ram()
            .unwrap()
            .as_slice::<f32>()
            .unwrap()[0]
    };
    images.chunks_exact(TENSOR_BYTES).map(logit).collect()
}

/// Candle's logits of `images` and the exported file, once the engine and tract agreed.
#[track_caller]
fn check_float(name: &str, width: f64, images: &[u8]) -> (Vec<f32>, Vec<u8>) {
    let architecture = architecture::find(name).unwrap();
    let network = Network::new(architecture, width, 11, &Device::Cpu).unwrap();
    let shape = (images.len() / TENSOR_BYTES, CHANNELS, SIDE, SIDE);
    let batch = Tensor::from_slice(images, shape, &Device::Cpu).unwrap();
    // Statistics for the transfer learners' random weights.
    network.settle(&batch).unwrap();
    let logits = network.forward(&batch).unwrap().flatten_all().unwrap();
    let candle: Vec<f32> = logits.to_vec1().unwrap();

    let (weights, manifest) = (
        weights_of(&network).unwrap(),
        new_manifest(architecture, width),
    );
    let file = float_file(architecture, width, &weights, &manifest).unwrap();
    for (runtime, logits) in [
        ("engine", engine_logits(&file, images)),
        ("tract", tract_logits(&file, images)),
    ] {
        for (candle, other) in candle.iter().zip(&logits) {
            let allowed = FLOAT_TOLERANCE * candle.abs().max(1.0);
            assert!(
                (candle - other).abs() <= allowed,
                "{name}: candle {candle}, {runtime} {other}"
            );
        }
    }
    (candle, file)
}

/// The int8 file and the engine's logits of it.
fn quantized(float: &[u8], images: &[u8], options: &quantize::Options) -> (Vec<u8>, Vec<f32>) {
    let calibration: Vec<&[u8]> = images.chunks_exact(TENSOR_BYTES).collect();
    let (int8, _) = quantize::quantize_file(float, &calibration, options).unwrap();
    let logits = engine_logits(&int8, images);
    (int8, logits)
}

#[track_caller]
fn check(name: &str, width: f64) {
    let images = images();
    let (candle, float) = check_float(name, width, &images);
    let (_, int8) = quantized(&float, &images, &quantize::Options::default());
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

/// Rows of the publication's table that are the same network are trained differently: one of them stands for all.
#[test]
fn every_network_gives_the_same_logits_in_candle_and_tract() {
    let images = images();
    let mut known: Vec<(Family, Units)> = Vec::new();
    for architecture in ARCHITECTURES {
        let network = (architecture.family, architecture.scaled(1.0));
        if architecture.family == Family::Majority || known.contains(&network) {
            continue;
        }
        known.push(network);
        let width = match architecture.family {
            Family::Convolutional => NARROW,
            _ => LESS_NARROW,
        };
        let (candle, float) = check_float(architecture.name, width, &images);
        if let Some(folder) = std::env::var_os(OUT) {
            write_files(
                Path::new(&folder),
                architecture.name,
                &images,
                &candle,
                &float,
            );
        }
    }
    assert_eq!(known.len(), 8, "networks of the table");
}

/// What `tests/reference/onnx_check.py --parity` reads: both files, the images, candle's and the engine's logits.
fn write_files(folder: &Path, name: &str, images: &[u8], candle: &[f32], float: &[u8]) {
    let (int8, engine) = quantized(float, images, &quantize::Options::default());
    let lines =
        |logits: &[f32]| -> String { logits.iter().map(|logit| format!("{logit}\n")).collect() };
    std::fs::create_dir_all(folder).unwrap();
    for (ending, bytes) in [
        ("onnx", float),
        ("int8.onnx", &int8),
        ("candle.txt", lines(candle).as_bytes()),
        ("engine.txt", lines(&engine).as_bytes()),
    ] {
        std::fs::write(folder.join(format!("{name}.{ending}")), bytes).unwrap();
    }
    std::fs::write(folder.join("images.u8"), images).unwrap();
}

#[test]
fn phantom_studies_have_distinct_identifiers() {
    let uids: Vec<String> = (0..20)
        .map(|study| StudyPlan::new(9, study, 30, 256).uid(UidRole::Study))
        .collect();
    let distinct: std::collections::BTreeSet<&String> = uids.iter().collect();
    assert_eq!(distinct.len(), uids.len());
}
