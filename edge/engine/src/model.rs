//! Loads a model file and hands out sessions.
//!
//! In: the bytes of an ONNX file. Out: a [`Model`], which holds everything that does not change, and [`Session`]s, which hold
//! the buffers of a run. A file that is one chain of layers, quantized or float, runs on our kernels alone; any other runs through tract.

use std::collections::HashSet;
use std::sync::Arc;

use prost::Message as _;
use shared::manifest::{METADATA_KEY, Manifest, ManifestError};
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{AttributeProto, ModelProto, TensorProto};

use crate::chain::recognise;
use crate::contract;
use crate::contributions::Contributions;
use crate::float::{self, FloatNetwork, FloatRunner};
use crate::graph::Graph;
use crate::kernels::Kernel;
use crate::kernels::float::FloatKernel;
use crate::network::Network;
use crate::session::Runner;
use crate::tract::TractModel;

/// Most threads of a session.
pub const MAX_THREADS: usize = 64;

/// Largest image, in bytes.
pub const MAX_IMAGE_BYTES: u64 = 64 << 20;

/// Most memory of a network's feature maps, in bytes; where tract runs it, of one tensor.
pub const MAX_MAP_BYTES: u64 = 1 << 30;

/// How a model is to run. `Options::default()` takes the fastest kernel, one thread and the file's own arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The kernel; `None` for the fastest that this CPU runs.
    pub kernel: Option<Kernel>,
    /// Threads of a session, 1 to [`MAX_THREADS`].
    pub threads: usize,
    /// Whether a chain of quantized layers runs in f32, its weights in real numbers and its activations not quantized. As fast as the exact
    /// way on CPUs without a dot product; the bits then differ between CPUs, and the self-test of the file does not hold.
    pub is_float: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            kernel: None,
            threads: 1,
            is_float: false,
        }
    }
}

/// What a model computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// Integers, on our kernels: the same bits on every CPU.
    Exact,
    /// f32, on our kernels: the bits differ between CPUs.
    Float,
    /// tract, with our operator where it fits: the bits may differ between CPUs.
    Tract,
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
    /// A real constant is NaN or infinite: a ReLU or a max pool would make a number of it again.
    #[error("{tensor}: a value is not finite")]
    NotFinite {
        /// Name of the ONNX tensor.
        tensor: String,
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
    /// Two constants, nodes or inputs have the same name, so that nobody knows which is meant.
    #[error("value {value} is defined twice")]
    DefinedTwice {
        /// Name of the ONNX value.
        value: String,
    },
    /// The image or the feature maps are larger than anything that is meant to run here.
    #[error("{what}: {bytes} bytes, at most {limit} are allowed")]
    Size {
        /// The image, or the name of an ONNX node.
        what: String,
        /// Bytes that it takes; [`u64::MAX`] where they are beyond.
        bytes: u64,
        /// Bytes that it may take.
        limit: u64,
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
    contract_fault: Option<String>,
    digest: String,
    program: Program,
    threads: usize,
}

/// What runs the model.
#[derive(Clone, Debug)]
pub(crate) enum Program {
    /// Our kernels from end to end.
    Network(Arc<Network>),
    /// Our float kernels from end to end.
    Float(Arc<FloatNetwork>),
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
        check_finite(&proto)?;
        check_names(&proto)?;
        let text = proto
            .metadata_props
            .iter()
            .find(|entry| entry.key == METADATA_KEY);
        let manifest = text
            .map(|entry| Manifest::from_json(&entry.value))
            .transpose()?;
        let contract_fault = contract::fault(&proto);
        let program = program(&mut proto, kernel, options)?;
        Ok(Self {
            manifest: manifest.map(Arc::new),
            contract_fault,
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

    /// What in the file is not as `docs/model-file.md` says of every file: operator set, names and types, weights inside. Such a file
    /// runs all the same.
    #[must_use]
    pub fn contract_fault(&self) -> Option<&str> {
        self.contract_fault.as_deref()
    }

    /// BLAKE3 of the file's bytes, 64 lower-case hexadecimal digits.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The kernel that runs the network; `None` where it does not run in integers.
    #[must_use]
    pub fn kernel(&self) -> Option<Kernel> {
        match &self.program {
            Program::Network(network) => Some(network.kernel),
            Program::Float(_) | Program::Tract(_) => None,
        }
    }

    /// What the network computes with.
    #[must_use]
    pub fn arithmetic(&self) -> Arithmetic {
        match &self.program {
            Program::Network(_) => Arithmetic::Exact,
            Program::Float(_) => Arithmetic::Float,
            Program::Tract(_) => Arithmetic::Tract,
        }
    }

    /// Kernel and, where it is not the exact one, arithmetic, for people: `avx2`, `f32 avx2`, `tract`.
    #[must_use]
    pub fn runs_on(&self) -> String {
        match &self.program {
            Program::Network(network) => network.kernel.to_string(),
            Program::Float(network) => format!("f32 {}", network.kernel),
            Program::Tract(_) => "tract".into(),
        }
    }

    /// Whether all of it is integer arithmetic, so that every CPU and every number of threads give the same logit bits.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        match &self.program {
            Program::Network(_) => true,
            Program::Float(_) => false,
            Program::Tract(model) => model.is_exact(),
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

/// ONNX gives every value one definition (IR specification, "SSA"). A constant may be listed among the inputs too.
fn check_names(proto: &ModelProto) -> Result<(), LoadError> {
    let Some(graph) = &proto.graph else {
        return Ok(());
    };
    let mut constants = HashSet::new();
    let initializers = graph.initializer.iter().map(|tensor| tensor.name.as_str());
    let twice = initializers.clone().find(|name| !constants.insert(*name));
    let inputs = graph.input.iter().map(|input| input.name.as_str());
    let inputs = inputs.filter(|name| !constants.contains(name));
    // An output that nobody wants has no name.
    let outputs = graph.node.iter().flat_map(|node| &node.output);
    let outputs = outputs.map(String::as_str).filter(|name| !name.is_empty());
    let mut defined = constants.clone();
    let twice = twice.or_else(|| inputs.chain(outputs).find(|name| !defined.insert(name)));
    match twice {
        Some(value) => Err(LoadError::DefinedTwice {
            value: value.to_owned(),
        }),
        None => Ok(()),
    }
}

/// Refuses what is larger than a limit.
pub(crate) fn check_size(what: &str, bytes: Option<u64>, limit: u64) -> Result<(), LoadError> {
    match bytes {
        Some(bytes) if bytes <= limit => Ok(()),
        _ => Err(LoadError::Size {
            what: what.to_owned(),
            bytes: bytes.unwrap_or(u64::MAX),
            limit,
        }),
    }
}

/// Constants stand among the initializers or, each by itself, in a node (ONNX Constant-13).
fn check_finite(proto: &ModelProto) -> Result<(), LoadError> {
    let Some(graph) = &proto.graph else {
        return Ok(());
    };
    let mut initializers = graph.initializer.iter();
    let bad = initializers.find(|tensor| !is_finite(tensor));
    let bad = bad.map(|tensor| &tensor.name);
    let is_sound = |value: &AttributeProto| {
        value.f.is_finite()
            && value.floats.iter().all(|value| value.is_finite())
            && value.t.as_ref().is_none_or(is_finite)
    };
    let mut nodes = graph.node.iter();
    let bad_node =
        nodes.find(|node| node.op_type == "Constant" && !node.attribute.iter().all(is_sound));
    match bad.or(bad_node.map(|node| &node.name)) {
        Some(name) => Err(LoadError::NotFinite {
            tensor: name.clone(),
        }),
        None => Ok(()),
    }
}

/// Whether a tensor, where it is of f32, holds finite values only.
fn is_finite(tensor: &TensorProto) -> bool {
    let mut raw = tensor.raw_data.as_chunks().0.iter();
    tensor.data_type != DataType::Float as i32
        || raw.all(|&bytes| f32::from_le_bytes(bytes).is_finite())
            && tensor.float_data.iter().all(|value| value.is_finite())
}

fn program(
    proto: &mut ModelProto,
    kernel: Kernel,
    options: &Options,
) -> Result<Program, LoadError> {
    let Some(graph) = &proto.graph else {
        return Err(LoadError::Shape {
            layer: "the file has no graph".into(),
        });
    };
    let float_kernel = || FloatKernel::like(options.kernel).ok_or(LoadError::Kernel(kernel));
    let graph = Graph::new(graph);
    if let Some(image) = graph.image_input().and_then(|input| input.image()) {
        let bytes = image
            .iter()
            .try_fold(1, |n: u64, &size| n.checked_mul(size as u64));
        check_size("the image", bytes, MAX_IMAGE_BYTES)?;
    }
    let reason = match recognise(&graph) {
        Ok(chain) if options.is_float => {
            let network = FloatNetwork::of_quantized(chain, proto, float_kernel()?)?;
            return Ok(Program::Float(Arc::new(network)));
        }
        Ok(chain) => {
            return Ok(Program::Network(Arc::new(Network::new(
                chain, proto, kernel,
            )?)));
        }
        Err(reason) => reason,
    };
    match float::recognise(&graph) {
        Ok(chain) => {
            let network = FloatNetwork::new(chain, proto, float_kernel()?)?;
            Ok(Program::Float(Arc::new(network)))
        }
        Err(_) => {
            let model = TractModel::new(proto, reason.to_string(), kernel)?;
            Ok(Program::Tract(Arc::new(model)))
        }
    }
}

/// The buffers and threads of one caller. `Send`, not shared.
#[derive(Debug)]
pub struct Session {
    program: Program,
    threads: usize,
    runner: Option<AnyRunner>,
}

/// The buffers and threads of a program of ours.
#[derive(Debug)]
enum AnyRunner {
    Exact(Runner),
    Float(FloatRunner),
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
            Program::Float(network) => network.image_bytes(),
            Program::Tract(model) => model.image_bytes(),
        };
        if logits.len().checked_mul(image_bytes) != Some(images.len()) {
            return Err(RunError::Length {
                images: images.len(),
                logits: logits.len(),
                image_bytes,
            });
        }
        let mut pairs = images.chunks_exact(image_bytes).zip(logits);
        if self.runner.is_none() {
            self.runner = AnyRunner::new(&self.program, self.threads).map_err(RunError::Thread)?;
        }
        match (&self.program, &mut self.runner) {
            (_, Some(AnyRunner::Exact(runner))) => {
                pairs.for_each(|(image, logit)| *logit = runner.logit(image));
                Ok(())
            }
            (_, Some(AnyRunner::Float(runner))) => {
                pairs.for_each(|(image, logit)| *logit = runner.logit(image));
                Ok(())
            }
            (Program::Tract(model), None) => pairs.try_for_each(|(image, logit)| {
                *logit = model.logit(image)?;
                Ok(())
            }),
            (_, None) => unreachable!("every program of ours has a runner"),
        }
    }

    /// Share, 0 to 1, of the pooled columns of the first convolutions that needed no computing so far, because all that they see is of one
    /// value; on several threads that of the calling one. `None` before the first run and where the network does not run in integers.
    #[must_use]
    pub fn idle_share(&self) -> Option<f64> {
        self.exact()?.idle_share()
    }

    /// Where the logit of the latest image comes from.
    ///
    /// `None` before the first run, where the network does not run in integers, and for networks without exactly two dense layers.
    #[must_use]
    pub fn contributions(&self) -> Option<Contributions> {
        self.exact()?.contributions()
    }

    fn exact(&self) -> Option<&Runner> {
        match &self.runner {
            Some(AnyRunner::Exact(runner)) => Some(runner),
            _ => None,
        }
    }
}

impl AnyRunner {
    /// `None` where tract runs the program.
    fn new(program: &Program, threads: usize) -> std::io::Result<Option<Self>> {
        Ok(match program {
            Program::Network(network) => {
                Some(Self::Exact(Runner::new(Arc::clone(network), threads)?))
            }
            Program::Float(network) => {
                Some(Self::Float(FloatRunner::new(Arc::clone(network), threads)?))
            }
            Program::Tract(_) => None,
        })
    }
}
