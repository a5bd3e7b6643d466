//! Where a run computes: what the command line says, and what this machine has.

use anyhow::Result;

use crate::exit::{Exit, fault};

/// How a GPU stores activations, their gradients and the weights that multiply them; sums and master weights are f32 in both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Precision {
    /// 8 bits of mantissa, on the matrix units.
    #[default]
    Bf16,
    /// 24 bits of mantissa; no TF32.
    F32,
}

impl Precision {
    /// Bytes of a value.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Processor {
    /// The CPU, in f32.
    #[default]
    Cpu,
    /// An NVIDIA GPU.
    Gpu {
        /// Its number, from 0.
        ordinal: usize,
        /// How it stores.
        precision: Precision,
    },
}

/// What a run came to on the GPU, for the record.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct GpuFigures {
    /// The card.
    pub device: String,
    /// `bf16` or `f32`.
    pub precision: String,
    /// Bytes in use on the card at the end of the run, by this and other processes and by CUDA itself.
    pub used_bytes: usize,
    /// Bytes of the images that lie on the card.
    pub image_bytes: usize,
    /// Bytes of cuDNN's workspace.
    pub workspace_bytes: usize,
}

impl Processor {
    /// The GPU of this process' local rank where there is one that this build can use, else the CPU.
    #[must_use]
    pub fn here(precision: Precision) -> Self {
        match n_gpus() {
            0 => Self::Cpu,
            n => Self::Gpu {
                ordinal: local_rank(|name| std::env::var(name).ok()) % n,
                precision,
            },
        }
    }

    /// What `--device` means: `cpu`, `cuda:N`, or `cuda` and nothing for the GPU that the launcher's local rank stands for. Nothing is the CPU where there is no GPU that could do it.
    ///
    /// # Errors
    /// Another word; a GPU for what only the CPU computes, or from a build without CUDA (exit code 69).
    pub fn choose(device: Option<&str>, precision: Precision, has_qat: bool) -> Result<Self> {
        let here = Self::here(precision);
        let Some(device) = device else {
            return Ok(if has_qat { Self::Cpu } else { here });
        };
        let ordinal = match device.split_once(':') {
            None if device == "cpu" => return Ok(Self::Cpu),
            None if device == "cuda" => match here {
                Self::Gpu { ordinal, .. } => Some(ordinal),
                // Opening it says what is missing.
                Self::Cpu => Some(0),
            },
            Some(("cuda", number)) => number.parse().ok(),
            _ => None,
        };
        let Some(ordinal) = ordinal else {
            let message = format!("device `{device}`: say `cpu` or `cuda:N`");
            return Err(fault(Exit::Usage, message));
        };
        can_be_used()?;
        if has_qat {
            let message =
                "--qat computes on the CPU; fine-tune with it after a run on the GPU: --device cpu";
            return Err(fault(Exit::Usage, message));
        }
        Ok(Self::Gpu { ordinal, precision })
    }
}

/// Whether this build can use a GPU.
#[cfg(feature = "cuda")]
#[expect(clippy::unnecessary_wraps, reason = "other builds refuse")]
fn can_be_used() -> Result<()> {
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn can_be_used() -> Result<()> {
    let message = "this build computes on `cpu` only; one for GPUs is made by `cargo build --release -p trainer --features cuda`";
    Err(fault(Exit::PeerDown, message))
}

#[cfg(feature = "cuda")]
fn n_gpus() -> usize {
    crate::gpu::count()
}

#[cfg(not(feature = "cuda"))]
fn n_gpus() -> usize {
    0
}

/// This process' number on its machine, as torchrun, `srun` or `mpirun` say it; else 0.
fn local_rank(variable: impl Fn(&str) -> Option<String>) -> usize {
    let names = ["LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"];
    let found = names.iter().find_map(|name| variable(name)?.parse().ok());
    found.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::code_of;

    #[test]
    fn words_are_understood_or_named() {
        let choose = |device, has_qat| Processor::choose(device, Precision::Bf16, has_qat);
        assert_eq!(choose(Some("cpu"), false).unwrap(), Processor::Cpu);
        for word in ["gpu", "cuda:x", "cuda:-1", "rocm:0"] {
            let error = choose(Some(word), false).unwrap_err();
            assert_eq!(code_of(&error), Exit::Usage);
            assert!(error.to_string().contains(word), "{error}");
        }
        // Quantization-aware training takes the CPU by itself.
        assert_eq!(choose(None, true).unwrap(), Processor::Cpu);
        let error = choose(Some("cuda:0"), true).unwrap_err();
        let expected = if cfg!(feature = "cuda") {
            Exit::Usage
        } else {
            Exit::PeerDown
        };
        assert_eq!(code_of(&error), expected);
    }

    #[test]
    fn a_launcher_gives_each_process_its_gpu() {
        let of = |set: &'static str| move |name: &str| (name == set).then(|| "3".to_owned());
        assert_eq!(local_rank(of("LOCAL_RANK")), 3);
        assert_eq!(local_rank(of("SLURM_LOCALID")), 3);
        assert_eq!(local_rank(of("OMPI_COMM_WORLD_LOCAL_RANK")), 3);
        assert_eq!(local_rank(of("RANK")), 0);
    }
}
