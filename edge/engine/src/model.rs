//! Loads a model file and hands out sessions.
//!
//! In: the bytes of an ONNX file. Out: a [`Model`], which holds everything that does not change, and [`Session`]s, which hold
//! the buffers of a run. A file that is one chain of quantized layers runs on our kernels alone; any other runs through tract.

use std::sync::Arc;

use prost::Message as _;
use shared::manifest::{METADATA_KEY, Manifest, ManifestError};
use tract_onnx::pb::ModelProto;

use crate::chain::recognise;
use crate::contributions::Contributions;
use crate::graph::Graph;
use crate::kernels::Kernel;
use crate::network::Network;
use crate::session::Runner;
use crate::tract::TractModel;

/// Most threads of a session.
pub const MAX_THREADS: usize = 64;

/// How a model is to run. `Options::default()` takes the fastest kernel and one thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The kernel; `None` for the fastest that this CPU runs.
    pub kernel: Option<Kernel>,
    /// Threads of a session, 1 to [`MAX_THREADS`].
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            kernel: None,
            threads: 1,
        }
    }
}

/// Why a model file is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The bytes are no ONNX protobuf.
    #[error("not an ONNX file")]
    Onnx(#[from] prost::DecodeError),
    /// The manifest in `metadata_props` is faulty.
    #[error("faulty manifest in metadata {METADATA_KEY}")]
    Manifest(#[from] ManifestError),
    /// A weight is -128, outside the symmetric range.
    #[error("layer {layer}: a weight is -128, allowed are -127 to 127")]
    Weight {
        /// Name of the ONNX node.
        layer: String,
    },
    /// An accumulator could leave i32.
    #[error(
        "layer {layer}, output channel {channel}: the accumulator can reach {reach}, outside i32"
    )]
    Overflow {
        /// Name of the ONNX node.
        layer: String,
        /// Output channel, counted from 0.
        channel: usize,
        /// The value furthest from 0.
        reach: i64,
    },
    /// Sizes of consecutive layers do not fit, or the network does not end in one logit.
    #[error("layer {layer}: sizes do not fit")]
    Shape {
        /// Name of the ONNX node.
        layer: String,
    },
    /// This CPU lacks the instructions of the kernel that was asked for.
    #[error("kernel {0} cannot run on this CPU")]
    Kernel(Kernel),
    /// The number of threads is out of range.
    #[error("threads: {0}, allowed are 1 to {MAX_THREADS}")]
    Threads(usize),
    /// tract refuses the graph.
    #[error("tract cannot run the graph")]
    Tract(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The slices' lengths do not fit together.
    #[error("{images} bytes of images for {logits} logits, expected {image_bytes} a logit")]
    Length {
        /// Bytes of images.
        images: usize,
        /// Logits asked for.
        logits: usize,
        /// Bytes of one image.
        image_bytes: usize,
    },
    /// The system refused a thread.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    /// tract failed.
    #[error("tract failed")]
    Tract(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A loaded model, ready for sessions. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Model {
    manifest: Option<Arc<Manifest>>,
    digest: String,
    program: Program,
    threads: usize,
}

/// What runs the model.
#[derive(Clone, Debug)]
pub(crate) enum Program {
    /// Our kernels from end to end.
    Network(Arc<Network>),
    /// tract.
    Tract(Arc<TractModel>),
}

impl Model {
    /// Loads an ONNX file.
    ///
    /// # Errors
    ///
    /// [`LoadError`]: not ONNX, faulty manifest, weights outside the exact domain, graph that neither we nor tract can run, or
    /// options that this CPU cannot follow.
    pub fn load(onnx: &[u8], options: &Options) -> Result<Self, LoadError> {
        let kernel = options.kernel.unwrap_or_else(Kernel::fastest);
        if !kernel.is_available() {
            return Err(LoadError::Kernel(kernel));
        }
        if !(1..=MAX_THREADS).contains(&options.threads) {
            return Err(LoadError::Threads(options.threads));
        }
        let mut proto = ModelProto::decode(onnx)?;
        let text = proto
            .metadata_props
            .iter()
            .find(|entry| entry.key == METADATA_KEY);
        let manifest = text
            .map(|entry| Manifest::from_json(&entry.value))
            .transpose()?;
        let chain = proto
            .graph
            .as_ref()
            .map(|graph| recognise(&Graph::new(graph)));
        let program = match chain {
            Some(Ok(chain)) => Program::Network(Arc::new(Network::new(chain, &mut proto, kernel)?)),
            Some(Err(reason)) => Program::Tract(Arc::new(TractModel::new(
                &mut proto,
                reason.to_string(),
                kernel,
            )?)),
            None => {
                return Err(LoadError::Shape {
                    layer: "the file has no graph".into(),
                });
            }
        };
        Ok(Self {
            manifest: manifest.map(Arc::new),
            digest: blake3::hash(onnx).to_hex().to_string(),
            program,
            threads: options.threads,
        })
    }

    /// What the file says of itself; `None` where it carries no manifest.
    #[must_use]
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_deref()
    }

    /// BLAKE3 of the file's bytes, 64 lower-case hexadecimal digits.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The kernel that runs the network; `None` where tract runs it.
    #[must_use]
    pub fn kernel(&self) -> Option<Kernel> {
        match &self.program {
            Program::Network(network) => Some(network.kernel),
            Program::Tract(_) => None,
        }
    }

    /// A session with its own buffers and threads. The first run starts them.
    #[must_use]
    pub fn session(&self) -> Session {
        Session {
            program: self.program.clone(),
            threads: self.threads,
            runner: None,
        }
    }

    pub(crate) fn program(&self) -> &Program {
        &self.program
    }
}

/// The buffers and threads of one caller. `Send`, not shared.
#[derive(Debug)]
pub struct Session {
    program: Program,
    threads: usize,
    runner: Option<Runner>,
}

impl Session {
    /// The logit of each image.
    ///
    /// `images` is u8 `[n, channel, row, column]`, `n` the length of `logits`. After the first call nothing is allocated
    /// where the network runs on our kernels.
    ///
    /// # Errors
    ///
    /// [`RunError::Length`] where the lengths do not fit, [`RunError::Thread`] where the system refuses a thread at the first
    /// call, [`RunError::Tract`] where tract fails.
    pub fn logits(&mut self, images: &[u8], logits: &mut [f32]) -> Result<(), RunError> {
        let image_bytes = match &self.program {
            Program::Network(network) => network.image_bytes(),
            Program::Tract(model) => model.image_bytes(),
        };
        if logits.len().checked_mul(image_bytes) != Some(images.len()) {
            return Err(RunError::Length {
                images: images.len(),
                logits: logits.len(),
                image_bytes,
            });
        }
        let pairs = images.chunks_exact(image_bytes).zip(logits);
        match &self.program {
            Program::Network(network) => {
                let runner = match &mut self.runner {
                    Some(runner) => runner,
                    empty => empty.insert(
                        Runner::new(Arc::clone(network), self.threads).map_err(RunError::Thread)?,
                    ),
                };
                pairs.for_each(|(image, logit)| *logit = runner.logit(image));
            }
            Program::Tract(model) => {
                for (image, logit) in pairs {
                    *logit = model.logit(image)?;
                }
            }
        }
        Ok(())
    }

    /// Share, 0 to 1, of the pooled columns of the first convolutions that needed no computing so far, because all that they see is of one
    /// value; on several threads that of the calling one. `None` before the first run and where tract runs the network.
    #[must_use]
    pub fn idle_share(&self) -> Option<f64> {
        self.runner.as_ref()?.idle_share()
    }

    /// Where the logit of the latest image comes from.
    ///
    /// `None` before the first run, where tract runs the network, and for networks without exactly two dense layers.
    #[must_use]
    pub fn contributions(&self) -> Option<Contributions> {
        self.runner.as_ref()?.contributions()
    }
}
