//! Whole float networks: every kernel and every number of threads agrees with f64 arithmetic, and a kernel with itself bit for bit.
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "the reference arithmetic of the test"
)]
#![allow(clippy::unwrap_used, reason = "test code")]

mod model_file;

use engine::{Arithmetic, Kernel, Model, Options};
use model_file::{Network, Random};

/// Most that the probability may change.
const TOLERANCE: f64 = 1e-5;

fn probability(logit: f64) -> f64 {
    1.0 / (1.0 + (-logit).exp())
}

fn logits(file: &[u8], images: &[u8], options: &Options) -> Vec<f32> {
    let model = Model::load(file, options).unwrap();
    assert_eq!(model.arithmetic(), Arithmetic::Float);
    assert_eq!(model.kernel(), None, "the bits are this CPU's");
    assert!(model.runs_on().starts_with("f32 "), "results say so");
    let mut session = model.session();
    let mut logits = vec![0.0; 2];
    session.logits(images, &mut logits).unwrap();
    let first = logits.clone();
    session.logits(images, &mut logits).unwrap();
    assert_eq!(logits, first, "a second run gives the same bits");
    logits
}

#[track_caller]
fn check(seed: u64, image: [usize; 3], convolutions: &[usize], dense: &[usize]) {
    let network = Network::random(seed, image, convolutions, dense);
    let images = Random::new(seed + 1).bytes(2 * image.iter().product::<usize>());
    let expected = images.chunks_exact(images.len() / 2);
    let expected: Vec<f64> = expected.map(|image| network.float_logit(image)).collect();
    assert!(
        (expected[0] - expected[1]).abs() > 1e-3,
        "the logit depends on the image"
    );
    for kernel in Kernel::available() {
        for (file, is_float) in [(network.float_file(), false), (network.file(), true)] {
            let options = |threads| Options {
                kernel: Some(kernel),
                threads,
                is_float,
            };
            let found = logits(&file, &images, &options(1));
            for (&found, &expected) in found.iter().zip(&expected) {
                let change = probability(f64::from(found)) - probability(expected);
                assert!(
                    change.abs() <= TOLERANCE,
                    "{kernel}: {found} and {expected}"
                );
            }
            for threads in [2, 3] {
                assert_eq!(
                    logits(&file, &images, &options(threads)),
                    found,
                    "{kernel}, {threads} threads"
                );
            }
        }
    }
}

#[test]
fn three_convolutions_of_odd_widths_agree() {
    check(1, [3, 50, 46], &[20, 9, 5], &[7, 1]);
}

#[test]
fn one_and_two_convolutions_agree() {
    check(2, [3, 21, 33], &[33], &[4, 1]);
    check(3, [3, 30, 27], &[16, 40], &[1]);
}

#[test]
fn the_narrowest_network_agrees() {
    check(4, [1, 22, 22], &[4, 4, 4], &[4, 4, 1]);
}

#[test]
fn full_blocks_of_channels_agree() {
    // Those of the first layer, then those of the later ones; six tiles, as many as stand in registers.
    check(5, [3, 54, 54], &[130, 9], &[32, 1]);
    check(8, [3, 54, 54], &[20, 72, 130], &[32, 1]);
}

#[test]
fn a_float_graph_of_another_form_runs_through_tract() {
    let network = Network::random(6, [3, 22, 22], &[4], &[4, 1]);
    let mut file = network.float_file();
    while let Some(at) = file.windows(4).position(|bytes| bytes == b"Relu") {
        file[at..at + 4].copy_from_slice(b"Tanh");
    }
    let model = Model::load(&file, &Options::default()).unwrap();
    assert_eq!(model.arithmetic(), Arithmetic::Tract);
    assert_eq!(model.runs_on(), "tract");
}
