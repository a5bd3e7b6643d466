//! Whole networks: every kernel and every number of threads gives the bits of the definition.
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "the reference arithmetic of the test"
)]
#![allow(clippy::unwrap_used, reason = "test code")]

mod model_file;

use engine::{Kernel, Model, Options};
use model_file::{Network, Random};
use tract_onnx::prelude::{
    Datum, Framework, InferenceFact, InferenceModelExt, IntoRunnable, Tensor, tvec,
};

#[track_caller]
fn check(seed: u64, image: [usize; 3], convolutions: &[usize], dense: &[usize]) {
    let network = Network::random(seed, image, convolutions, dense);
    let file = network.file();
    let images = Random::new(seed + 1).bytes(2 * image.iter().product::<usize>());
    let expected: Vec<u32> = images
        .chunks_exact(images.len() / 2)
        .map(|image| network.logit(image).to_bits())
        .collect();
    assert_ne!(expected[0], expected[1], "the logit depends on the image");
    for kernel in Kernel::available() {
        for threads in [1, 2, 3] {
            let model = Model::load(
                &file,
                &Options {
                    kernel: Some(kernel),
                    threads,
                    ..Options::default()
                },
            )
            .unwrap();
            assert_eq!(model.kernel(), Some(kernel), "runs on our kernels");
            let mut logits = [0.0; 2];
            let mut session = model.session();
            for _ in 0..2 {
                session.logits(&images, &mut logits).unwrap();
                assert_eq!(
                    logits.map(f32::to_bits).to_vec(),
                    expected,
                    "{kernel}, {threads} threads"
                );
            }
        }
    }
}

#[test]
fn three_convolutions_of_odd_widths_are_exact() {
    check(1, [3, 50, 46], &[20, 9, 5], &[7, 1]);
}

#[test]
fn one_and_two_convolutions_are_exact() {
    check(2, [3, 21, 33], &[33], &[4, 1]);
    check(3, [3, 30, 27], &[16, 40], &[1]);
}

#[test]
fn the_narrowest_network_is_exact() {
    check(4, [1, 22, 22], &[4, 4, 4], &[4, 4, 1]);
}

#[test]
fn full_blocks_of_channels_are_exact() {
    check(5, [3, 38, 38], &[64, 32, 16], &[32, 1]);
}

/// Images with regions of one value: of which the engine computes nothing, which must not show.
#[test]
fn constant_regions_are_exact() {
    let image = [3, 46, 58];
    let network = Network::random(6, image, &[24, 16, 8], &[5, 1]);
    let file = network.file();
    let mut random = Random::new(7);
    for case in 0..6_usize {
        let mut pixels = random.bytes(image.iter().product());
        for (channel, plane) in pixels.chunks_exact_mut(46 * 58).enumerate() {
            for (position, pixel) in plane.iter_mut().enumerate() {
                let (row, column) = (position / 58, position % 58);
                let value = match case {
                    0 => Some(0),
                    1 => (column < 37).then_some(59),
                    2 => (row >= 20).then_some(if column < 30 { 3 } else { 200 }),
                    3 => ((5..40).contains(&row) && (7..50).contains(&column))
                        .then_some(9 * (row / 12)),
                    4 => (row % 23 != 11).then_some(row / 24),
                    _ => (row * 58 + column < 1900 || channel == 0).then_some(77),
                };
                if let Some(value) = value {
                    *pixel = (value * (channel + 1)) as u8;
                }
            }
        }
        let expected = network.logit(&pixels).to_bits();
        for kernel in Kernel::available() {
            for threads in [1, 3] {
                let options = Options {
                    kernel: Some(kernel),
                    threads,
                    ..Options::default()
                };
                let mut session = Model::load(&file, &options).unwrap().session();
                let mut logit = [0.0];
                session.logits(&pixels, &mut logit).unwrap();
                assert_eq!(
                    logit[0].to_bits(),
                    expected,
                    "case {case}, {kernel}, {threads} threads"
                );
                let share = session.idle_share().unwrap();
                assert!(
                    share > 0.0 || case == 5 || threads > 1,
                    "case {case} has idle work"
                );
            }
        }
    }
}

/// A chain is read from the ONNX graph by us alone. tract, which types and runs the same file in f32, must find the same network in it.
#[test]
fn tract_reads_the_same_network_in_a_chain() {
    let image = [3, 38, 30];
    let network = Network::random(8, image, &[20, 12], &[6, 1]);
    let file = network.file();
    let shape = [1, 3, 38, 30];
    let plan = tract_onnx::onnx()
        .model_for_read(&mut file.as_slice())
        .unwrap()
        .with_input_fact(0, InferenceFact::dt_shape(u8::datum_type(), shape))
        .unwrap()
        .into_optimized()
        .unwrap()
        .into_runnable()
        .unwrap();
    let images = Random::new(9).bytes(4 * image.iter().product::<usize>());
    let (mut ours, mut tracts) = (Vec::new(), Vec::new());
    for image in images.chunks_exact(images.len() / 4) {
        let outputs = plan.run(tvec!(Tensor::from_shape(&shape, image).unwrap().into()));
        let outputs = outputs.unwrap();
        tracts.push(
            outputs[0]
                .try_as_plain_ram()
                .unwrap()
                .as_slice::<f32>()
                .unwrap()[0],
        );
        let mut logit = [0.0];
        let model = Model::load(&file, &Options::default()).unwrap();
        model.session().logits(image, &mut logit).unwrap();
        ours.push(logit[0]);
    }
    let spread = |of: &[f32]| {
        of.iter().copied().fold(f32::MIN, f32::max) - of.iter().copied().fold(f32::MAX, f32::min)
    };
    // tract rounds products of f32 where ours are integers, which moves single activations by one step.
    for (ours_of, tracts_of) in ours.iter().zip(&tracts) {
        assert!(
            (ours_of - tracts_of).abs() < 0.05 * spread(&ours),
            "{ours:?}, {tracts:?}"
        );
    }
}
