//! What a core multiplies at most, measured.

use super::float::FloatKernel;
use super::{Kernel, cpu_time};

/// Repetitions of a run.
const REPETITIONS: u32 = 200_000;

/// Multiply-accumulates a second of CPU time of one core doing nothing but the kernel's multiplication, the best of several short runs; `None` for scalar code.
pub(crate) fn peak_macs_per_second(kernel: Kernel) -> Option<f64> {
    assert!(kernel.is_available(), "kernel {kernel} runs on this CPU");
    best_rate(|| peak(kernel, REPETITIONS))
}

/// As [`peak_macs_per_second`], for the multiplication of floats.
pub(crate) fn float_peak_macs_per_second(kernel: FloatKernel) -> Option<f64> {
    best_rate(|| kernel.peak(REPETITIONS))
}

fn best_rate(run: impl Fn() -> Option<u32>) -> Option<f64> {
    let rate = || {
        let started = cpu_time();
        let macs = run()?;
        Some(f64::from(macs) / (cpu_time() - started).as_secs_f64())
    };
    (0..25)
        .map(|_| rate())
        .reduce(|best, next| if next > best { next } else { best })
        .flatten()
}

/// Repeats the kernel's multiplication on registers; returns the multiply-accumulates done.
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(
        unused_variables,
        reason = "measured on x86 alone, where the kernels are tuned"
    )
)]
fn peak(kernel: Kernel, repetitions: u32) -> Option<u32> {
    match kernel {
        // SAFETY: the CPU has the instructions, asserted by the only caller.
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx2 => Some(unsafe { super::avx2::peak(repetitions) }),
        // SAFETY: the CPU has the instructions, asserted by the only caller.
        #[cfg(target_arch = "x86_64")]
        Kernel::AvxVnni => Some(unsafe { super::avxvnni::peak(repetitions) }),
        // SAFETY: the CPU has the instructions, asserted by the only caller.
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx512Vnni => Some(unsafe { super::avx512vnni::peak(repetitions) }),
        _ => None,
    }
}
