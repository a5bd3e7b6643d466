//! Convolutions by cuDNN: forward, gradient of the input, gradient of the filter.
//!
//! cuDNN's backend interface is used, not `cudnnConvolutionForward` and its kin: it reaches the Hopper kernels in bf16 and lets us choose among the proposals
//! by time. Feature maps are `[image, row, column, channel]` and filters `[out, row, column, in]` in memory; cuDNN names sizes and strides in the order
//! image (out), channel (in), row, column whatever the memory's. Products are summed in f32; alpha is 1 and beta 0, both f32. Proposals that sum in fewer bits
//! are left out, in f32 also those that round their inputs (TF32).
#![expect(
    unsafe_code,
    reason = "calls of cuDNN, whose descriptors are owned here and whose memory is the caller's"
)]

use std::collections::HashMap;
use std::ffi::c_void;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use cudarc::cudnn::result;
use cudarc::cudnn::sys::{
    self, cudnnBackendAttributeName_t as Name, cudnnBackendAttributeType_t as Type,
    cudnnBackendDescriptorType_t as Kind,
};
use cudarc::driver::CudaStream;

use super::device::{Device, Memory};
use crate::train::Precision;

/// Proposals that cuDNN is asked for.
const MOST_PROPOSALS: usize = 128;
/// Runs of which the fastest counts, after one that does not.
const TIMED_RUNS: usize = 3;
/// A proposal that takes that many times the fastest one so far is not run again.
const HOPELESS: f32 = 1.5;
/// Most bytes of workspace: in f32 the final model's proposals without TF32 want 2.5 GB at batch 50, and in less there are only the slowest.
const MOST_WORKSPACE: usize = 4 << 30;
/// Alignment of all memory that the plans are given, in bytes.
const ALIGNMENT: i64 = 16;

/// Bytes that plans may take of the memory beside everything else.
#[expect(clippy::cast_precision_loss, reason = "a bound of a few gigabytes")]
pub(crate) fn most_workspace() -> f64 {
    MOST_WORKSPACE as f64
}

/// What is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Pass {
    Forward,
    InputGradient,
    FilterGradient,
}

/// Sizes of one convolution. Rows and columns, first rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub(crate) n_images: usize,
    pub(crate) channels_in: usize,
    pub(crate) channels_out: usize,
    pub(crate) input: [usize; 2],
    pub(crate) window: [usize; 2],
    pub(crate) stride: [usize; 2],
    pub(crate) padding: [usize; 2],
}

impl Shape {
    /// Rows and columns of the output.
    pub(crate) fn output(&self) -> [usize; 2] {
        [0, 1].map(|d| (self.input[d] + 2 * self.padding[d] - self.window[d]) / self.stride[d] + 1)
    }
}

/// Memory of one application: input, filter, output, of which one is written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensors {
    pub(crate) input: u64,
    pub(crate) filter: u64,
    pub(crate) output: u64,
}

/// A cuDNN descriptor.
struct Descriptor(sys::cudnnBackendDescriptor_t);

/// A chosen way to compute, with everything it refers to.
struct Plan {
    plan: Descriptor,
    workspace_bytes: usize,
    _configuration: Descriptor,
    _graph: Rc<Graph>,
}

/// One operation and the descriptors it is made of.
struct Graph {
    graph: Descriptor,
    _parts: Vec<Descriptor>,
}

/// cuDNN on a device, with the plans made so far.
pub(crate) struct Convolutions {
    handle: sys::cudnnHandle_t,
    stream: Arc<CudaStream>,
    precision: Precision,
    plans: HashMap<(Shape, Pass), Plan>,
    workspace: Memory,
}

impl Descriptor {
    fn new(kind: Kind) -> Result<Self> {
        let mut descriptor = std::ptr::null_mut();
        // SAFETY: the place for the descriptor is a variable of ours.
        let status = unsafe { sys::cudnnBackendCreateDescriptor(kind, &raw mut descriptor) };
        status.result()?;
        Ok(Self(descriptor))
    }

    /// Sets an attribute; `T` must be what cuDNN takes for `kind`.
    fn set<T>(&self, name: Name, kind: Type, values: &[T]) -> Result<()> {
        let (n, values) = (length(values.len()), values.as_ptr().cast::<c_void>());
        // SAFETY: cuDNN copies `n` values of the type that `kind` names.
        let status = unsafe { sys::cudnnBackendSetAttribute(self.0, name, kind, n, values) };
        status
            .result()
            .map_err(|error| anyhow!("cuDNN refuses {name:?}: {error}"))
    }

    fn set_descriptor(&self, name: Name, descriptor: &Self) -> Result<()> {
        self.set(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &[descriptor.0])
    }

    fn finalize(self) -> Result<Self> {
        // SAFETY: the descriptor is ours.
        unsafe { sys::cudnnBackendFinalize(self.0) }.result()?;
        Ok(self)
    }

    /// Reads an attribute into `values`; how many there are.
    fn get<T>(&self, name: Name, kind: Type, values: &mut [T]) -> Result<usize> {
        let (requested, mut n) = (length(values.len()), 0);
        let to = values.as_mut_ptr().cast::<c_void>();
        // SAFETY: cuDNN writes at most `requested` values of the type that `kind` names.
        let status =
            unsafe { sys::cudnnBackendGetAttribute(self.0, name, kind, requested, &raw mut n, to) };
        status.result()?;
        Ok(usize::try_from(n)?.min(values.len()))
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: it is destroyed here alone. There is nothing to do about a failure.
        let _status = unsafe { sys::cudnnBackendDestroyDescriptor(self.0) };
    }
}

fn length(n: usize) -> i64 {
    i64::try_from(n).expect("sizes in memory are below 2^63")
}

/// Sizes and strides as cuDNN names them, of memory `[first, row, column, channel]`.
fn tensor(id: i64, precision: Precision, sizes: [usize; 4]) -> Result<Descriptor> {
    let [_, channels, rows, columns] = sizes;
    let strides = [rows * columns * channels, 1, columns * channels, channels];
    let descriptor = Descriptor::new(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?;
    let data_type = match precision {
        Precision::Bf16 => sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16,
        Precision::F32 => sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
    };
    descriptor.set(
        Name::CUDNN_ATTR_TENSOR_DATA_TYPE,
        Type::CUDNN_TYPE_DATA_TYPE,
        &[data_type],
    )?;
    let integers = Type::CUDNN_TYPE_INT64;
    descriptor.set(
        Name::CUDNN_ATTR_TENSOR_DIMENSIONS,
        integers,
        &sizes.map(length),
    )?;
    descriptor.set(
        Name::CUDNN_ATTR_TENSOR_STRIDES,
        integers,
        &strides.map(length),
    )?;
    descriptor.set(Name::CUDNN_ATTR_TENSOR_UNIQUE_ID, integers, &[id])?;
    descriptor.set(
        Name::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT,
        integers,
        &[ALIGNMENT],
    )?;
    descriptor.finalize()
}

fn convolution(shape: &Shape) -> Result<Descriptor> {
    let descriptor = Descriptor::new(Kind::CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR)?;
    descriptor.set(
        Name::CUDNN_ATTR_CONVOLUTION_COMP_TYPE,
        Type::CUDNN_TYPE_DATA_TYPE,
        &[sys::cudnnDataType_t::CUDNN_DATA_FLOAT],
    )?;
    descriptor.set(
        Name::CUDNN_ATTR_CONVOLUTION_CONV_MODE,
        Type::CUDNN_TYPE_CONVOLUTION_MODE,
        &[sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION],
    )?;
    let integers = Type::CUDNN_TYPE_INT64;
    descriptor.set(Name::CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, integers, &[2i64])?;
    for (name, values) in [
        (Name::CUDNN_ATTR_CONVOLUTION_DILATIONS, [1, 1]),
        (Name::CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, shape.stride),
        (Name::CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, shape.padding),
        (Name::CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, shape.padding),
    ] {
        descriptor.set(name, integers, &values.map(length))?;
    }
    descriptor.finalize()
}

/// What names a pass' descriptor and its attributes: alpha, beta, convolution, input, filter, output.
fn names(pass: Pass) -> (Kind, [Name; 6]) {
    match pass {
        Pass::Forward => (
            Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR,
            [
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y,
            ],
        ),
        Pass::InputGradient => (
            Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR,
            [
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY,
            ],
        ),
        Pass::FilterGradient => (
            Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR,
            [
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY,
            ],
        ),
    }
}

/// Identities of input, filter and output in a graph.
const IDS: [i64; 3] = [1, 2, 3];

fn graph(
    handle: sys::cudnnHandle_t,
    shape: &Shape,
    pass: Pass,
    precision: Precision,
) -> Result<Graph> {
    let (kind, [alpha, beta, by, input, filter, output]) = names(pass);
    let [rows, columns] = shape.input;
    let [out_rows, out_columns] = shape.output();
    let [window_rows, window_columns] = shape.window;
    let (n, c, o) = (shape.n_images, shape.channels_in, shape.channels_out);
    let tensors = [
        tensor(IDS[0], precision, [n, c, rows, columns])?,
        tensor(IDS[1], precision, [o, c, window_rows, window_columns])?,
        tensor(IDS[2], precision, [n, o, out_rows, out_columns])?,
    ];
    let convolution = convolution(shape)?;
    let operation = Descriptor::new(kind)?;
    operation.set(alpha, Type::CUDNN_TYPE_FLOAT, &[1f32])?;
    operation.set(beta, Type::CUDNN_TYPE_FLOAT, &[0f32])?;
    operation.set_descriptor(by, &convolution)?;
    for (name, tensor) in [input, filter, output].into_iter().zip(&tensors) {
        operation.set_descriptor(name, tensor)?;
    }
    let operation = operation.finalize()?;
    let graph = Descriptor::new(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?;
    graph.set(
        Name::CUDNN_ATTR_OPERATIONGRAPH_HANDLE,
        Type::CUDNN_TYPE_HANDLE,
        &[handle],
    )?;
    graph.set_descriptor(Name::CUDNN_ATTR_OPERATIONGRAPH_OPS, &operation)?;
    let mut parts = Vec::from(tensors);
    parts.extend([convolution, operation]);
    Ok(Graph {
        graph: graph.finalize()?,
        _parts: parts,
    })
}

/// cuDNN's proposals, best guess first.
fn proposals(graph: &Graph) -> Result<Vec<Descriptor>> {
    let mut all = Vec::new();
    for mode in [
        sys::cudnnBackendHeurMode_t::CUDNN_HEUR_MODE_A,
        sys::cudnnBackendHeurMode_t::CUDNN_HEUR_MODE_FALLBACK,
    ] {
        let heuristic = Descriptor::new(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?;
        heuristic.set_descriptor(Name::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, &graph.graph)?;
        heuristic.set(
            Name::CUDNN_ATTR_ENGINEHEUR_MODE,
            Type::CUDNN_TYPE_HEUR_MODE,
            &[mode],
        )?;
        // A mode without proposals fails here.
        let Ok(heuristic) = heuristic.finalize() else {
            continue;
        };
        let mut found = Vec::new();
        for _ in 0..MOST_PROPOSALS {
            found.push(Descriptor::new(Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR)?);
        }
        let mut raw: Vec<_> = found.iter().map(|descriptor| descriptor.0).collect();
        let name = Name::CUDNN_ATTR_ENGINEHEUR_RESULTS;
        let n = heuristic.get(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &mut raw)?;
        found.truncate(n);
        all.extend(found);
    }
    Ok(all)
}

/// Whether a proposal computes with fewer bits than it should.
fn loses_bits(configuration: &Descriptor, precision: Precision) -> Result<bool> {
    let engine = Descriptor::new(Kind::CUDNN_BACKEND_ENGINE_DESCRIPTOR)?;
    let kind = Type::CUDNN_TYPE_BACKEND_DESCRIPTOR;
    let name = Name::CUDNN_ATTR_ENGINECFG_ENGINE;
    configuration.get(name, kind, &mut [engine.0])?;
    // As integers: a later cuDNN may know more notes than we do.
    let mut notes = [-1i32; 16];
    let (name, kind) = (
        Name::CUDNN_ATTR_ENGINE_NUMERICAL_NOTE,
        Type::CUDNN_TYPE_NUMERICAL_NOTE,
    );
    let n = engine.get(name, kind, &mut notes)?;
    let is_lossy = |note: i32| {
        note == sys::cudnnBackendNumericalNote_t::CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS as i32
            || note
                == sys::cudnnBackendNumericalNote_t::CUDNN_NUMERICAL_NOTE_REDUCED_PRECISION_REDUCTION
                    as i32
            || precision == Precision::F32
                && note
                    == sys::cudnnBackendNumericalNote_t::CUDNN_NUMERICAL_NOTE_TENSOR_CORE as i32
    };
    Ok(notes[..n].iter().any(|note| is_lossy(*note)))
}

impl Convolutions {
    /// On the device's stream.
    pub(crate) fn new(device: &Device, precision: Precision) -> Result<Self> {
        device.bind()?;
        let handle = result::create_handle().context("starting cuDNN")?;
        let convolutions = Self {
            handle,
            stream: device.stream.clone(),
            precision,
            plans: HashMap::new(),
            workspace: device.zeros(0)?,
        };
        // SAFETY: the stream lives as long as `convolutions` holds it.
        unsafe { result::set_stream(handle, device.stream.cu_stream().cast()) }?;
        Ok(convolutions)
    }

    /// Bytes of workspace that the plans made so far need.
    pub(crate) fn workspace_bytes(&self) -> usize {
        self.workspace.n_bytes()
    }

    /// Plans that can be made for a pass and whose workspace is small enough, best guess first.
    fn candidates(&self, shape: &Shape, pass: Pass, most: usize) -> Result<Vec<Plan>> {
        let graph = Rc::new(graph(self.handle, shape, pass, self.precision)?);
        let mut plans = Vec::new();
        for configuration in proposals(&graph)? {
            if loses_bits(&configuration, self.precision)? {
                continue;
            }
            let plan = Descriptor::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?;
            let handle = Name::CUDNN_ATTR_EXECUTION_PLAN_HANDLE;
            plan.set(handle, Type::CUDNN_TYPE_HANDLE, &[self.handle])?;
            plan.set_descriptor(
                Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG,
                &configuration,
            )?;
            // Not every proposal is supported.
            let Ok(plan) = plan.finalize() else { continue };
            let mut bytes = [0i64];
            let name = Name::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE;
            plan.get(name, Type::CUDNN_TYPE_INT64, &mut bytes)?;
            let workspace_bytes = usize::try_from(bytes[0])?;
            if workspace_bytes <= MOST_WORKSPACE {
                plans.push(Plan {
                    plan,
                    workspace_bytes,
                    _configuration: configuration,
                    _graph: graph.clone(),
                });
            }
            if plans.len() == most {
                break;
            }
        }
        if plans.is_empty() {
            bail!("cuDNN has no way to compute the {pass:?} of {shape:?}");
        }
        Ok(plans)
    }

    /// Chooses the fastest plan for a pass by running at most `most` proposals on `tensors`, whose written one is overwritten; waits for the device. Of two layers of one shape
    /// the first decides.
    ///
    /// # Errors
    /// No proposal works.
    pub(crate) fn tune(
        &mut self,
        device: &Device,
        shape: Shape,
        pass: Pass,
        tensors: Tensors,
        most: usize,
    ) -> Result<()> {
        if self.plans.contains_key(&(shape, pass)) {
            return Ok(());
        }
        let candidates = self.candidates(&shape, pass, most)?;
        let largest = candidates.iter().map(|plan| plan.workspace_bytes).max();
        let scratch = device.zeros(largest.unwrap_or(0))?;
        let clocks = [device.clock()?, device.clock()?];
        let mut best: Option<(f32, Plan)> = None;
        for plan in candidates {
            let mut fastest = f32::INFINITY;
            for run in 0..=TIMED_RUNS {
                clocks[0].record(&self.stream)?;
                if self.execute(&plan, &scratch, tensors).is_err() {
                    break;
                }
                clocks[1].record(&self.stream)?;
                let milliseconds = clocks[0].elapsed_ms(&clocks[1])?;
                if run == 0 {
                    continue;
                }
                fastest = fastest.min(milliseconds);
                if best
                    .as_ref()
                    .is_some_and(|(before, _)| fastest > HOPELESS * before)
                {
                    break;
                }
            }
            if best.as_ref().is_none_or(|(before, _)| fastest < *before) && fastest.is_finite() {
                best = Some((fastest, plan));
            }
        }
        drop(scratch);
        let (_, plan) =
            best.with_context(|| format!("no proposal of cuDNN for {pass:?} of {shape:?} runs"))?;
        self.keep(device, shape, pass, plan)
    }

    fn keep(&mut self, device: &Device, shape: Shape, pass: Pass, plan: Plan) -> Result<()> {
        if plan.workspace_bytes > self.workspace.n_bytes() {
            // First the old one is freed, when nothing uses it any more: freeing waits.
            self.workspace = device.zeros(0)?;
            self.workspace = device.zeros(plan.workspace_bytes)?;
        }
        self.plans.insert((shape, pass), plan);
        Ok(())
    }

    /// Computes a pass on the device's stream, by cuDNN's first proposal where no plan was chosen.
    pub(crate) fn run(
        &mut self,
        device: &Device,
        shape: Shape,
        pass: Pass,
        tensors: Tensors,
    ) -> Result<()> {
        if !self.plans.contains_key(&(shape, pass)) {
            let first = self.candidates(&shape, pass, 1)?.into_iter().next();
            let plan = first.context("a plan")?;
            self.keep(device, shape, pass, plan)?;
        }
        self.execute(&self.plans[&(shape, pass)], &self.workspace, tensors)
            .with_context(|| format!("{pass:?} of {shape:?}"))
    }

    fn execute(&self, plan: &Plan, workspace: &Memory, tensors: Tensors) -> Result<()> {
        let pack = Descriptor::new(Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?;
        let pointers = [tensors.input, tensors.filter, tensors.output];
        pack.set(
            Name::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS,
            Type::CUDNN_TYPE_INT64,
            &IDS,
        )?;
        let pointer = Type::CUDNN_TYPE_VOID_PTR;
        pack.set(
            Name::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS,
            pointer,
            &pointers,
        )?;
        let scratch = [workspace.range(0, plan.workspace_bytes)];
        pack.set(Name::CUDNN_ATTR_VARIANT_PACK_WORKSPACE, pointer, &scratch)?;
        let pack = pack.finalize()?;
        // SAFETY: the plan's tensors are as long as its shape says, for which the caller answers; the workspace was measured above.
        unsafe { sys::cudnnBackendExecute(self.handle, plan.plan.0, pack.0) }.result()?;
        Ok(())
    }
}

impl Drop for Convolutions {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: the handle is destroyed here alone.
        let _destroyed = unsafe { result::destroy_handle(self.handle) };
    }
}

impl std::fmt::Debug for Convolutions {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let plans = self.plans.iter();
        let plans = plans.map(|(key, plan)| (key, plan.workspace_bytes));
        formatter.debug_map().entries(plans).finish()
    }
}
