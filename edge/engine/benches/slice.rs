//! One slice through the final architecture, kernel by kernel: first the bits, then the time.
//!
//! `cargo bench -p engine -- [DIVISOR]`: convolutions of 512, 256 and 128 channels divided by `DIVISOR` (8 unless given). Every kernel's logits
//! of a noise image and of one with a constant region must equal those of the plain definition before anything is timed. Reported is the least
//! CPU time of each layer, as `edge bench --explain` does, and the least wall time of a slice.
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::print_stdout,
    reason = "a benchmark: the definition's arithmetic, and its report"
)]
#![allow(clippy::unwrap_used, reason = "a benchmark fails loudly")]

#[path = "../tests/model_file/mod.rs"]
mod model_file;

use std::time::Instant;

use engine::{Kernel, Model, Options};
use model_file::{Network, Random};

const IMAGE: [usize; 3] = [3, 256, 256];

/// Slices of which the least time is taken.
const RUNS: usize = 15;

fn main() {
    let divisor = std::env::args()
        .skip(1)
        .find_map(|argument| argument.parse::<usize>().ok())
        .unwrap_or(8);
    let channels = [512, 256, 128].map(|n| n / divisor);
    let network = Network::random(1, IMAGE, &channels, &[256 / divisor, 1]);
    let file = network.file();
    let noise = Random::new(2).bytes(IMAGE.iter().product());
    let mut flat = noise.clone();
    flat[100_000..].fill(59);
    let expected = [&noise, &flat].map(|image| network.logit(image).to_bits());

    for kernel in Kernel::available() {
        let options = Options {
            kernel: Some(kernel),
            threads: 1,
            ..Options::default()
        };
        let model = Model::load(&file, &options).unwrap();
        let mut session = model.session();
        let mut logit = [0.0];
        for (image, expected) in [&noise, &flat].into_iter().zip(expected) {
            session.logits(image, &mut logit).unwrap();
            assert_eq!(
                logit[0].to_bits(),
                expected,
                "{kernel} differs from the definition"
            );
        }
        let mut least = f64::INFINITY;
        for _ in 0..RUNS {
            let started = Instant::now();
            session.logits(&noise, &mut logit).unwrap();
            least = least.min(started.elapsed().as_secs_f64());
        }
        println!(
            "{kernel}: {:.3} ms wall at least\n{}",
            least * 1e3,
            model.explain().unwrap()
        );
    }
}
