//! How long a 512 x 512 slice of 16 bits takes to become a tensor, on one core.
//!
//! `cargo bench -p shared --no-default-features`, or with `--profile dev`. Prints the median and the spread over
//! repetitions, after the result was compared with the digest of the float64 reference (`tests/reference/preprocess.py
//! time` runs numpy and scipy on the same pixels and prints the same digest).
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark reports to its user and stops at the first fault"
)]

#[path = "../tests/scene/mod.rs"]
mod scene;

use std::time::{Duration, Instant};

use shared::TENSOR_BYTES;
use shared::hounsfield::Rescale;
use shared::preprocess::Preprocessor;
use shared::spec::PreprocessSpec;
use shared::stored::SlicePixels;

const N_WARM_UP: usize = 50;
const N_TIMED: usize = 500;

fn main() {
    let bytes = scene::chest();
    let slice = scene::chest_slice(&bytes);
    let mut preprocessor = Preprocessor::new(&PreprocessSpec::default()).unwrap();
    let mut out = vec![0; TENSOR_BYTES];
    preprocessor.tensor(&slice, &mut out).unwrap();
    let digest = blake3::hash(&out).to_hex();
    assert_eq!(digest.as_str(), DIGEST);
    let kept = time(|| preprocessor.tensor(&slice, &mut out).unwrap());
    report("table kept", &kept);
    let mut intercept = -1024.0;
    let rebuilt = time(|| {
        intercept = -2025.0 - intercept;
        let rescale = Rescale {
            slope: 1.0,
            intercept,
        };
        preprocessor
            .tensor(&SlicePixels { rescale, ..slice }, &mut out)
            .unwrap();
    });
    report("new table a slice", &rebuilt);
    println!(
        "target {}-{}, {}, digest {digest}",
        std::env::consts::ARCH,
        std::env::consts::OS,
        cpu()
    );
}

/// BLAKE3 of the tensor that the float64 reference computes.
const DIGEST: &str = "f29d663c29da4a02e83ffcb53d54616b953178f55b38e0588d76dc74fb6b1e6b";

/// Times each of [`N_TIMED`] calls after [`N_WARM_UP`]; sorted.
fn time(mut call: impl FnMut()) -> Vec<Duration> {
    let mut once = || {
        let start = Instant::now();
        call();
        start.elapsed()
    };
    for _ in 0..N_WARM_UP {
        once();
    }
    let mut times: Vec<Duration> = (0..N_TIMED).map(|_| once()).collect();
    times.sort_unstable();
    times
}

fn report(what: &str, times: &[Duration]) {
    let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64() * 1e6;
    println!(
        "{what}: median {:.0} us, least {:.0}, 10 % {:.0}, 90 % {:.0}",
        at(50),
        at(0),
        at(10),
        at(90)
    );
}

/// The CPU's name, where the system tells it.
fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or("unknown CPU");
    name.trim_start_matches([' ', '\t', ':']).to_owned()
}
