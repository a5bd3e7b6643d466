//! What our kernels do not run, tract runs: float files, and graphs of another form.
//!
//! In: the ONNX protobuf. Out: a plan for one image. The bits of float files differ between CPUs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use tract_onnx::pb::tensor_shape_proto::dimension;
use tract_onnx::pb::{ModelProto, type_proto};
use tract_onnx::prelude::{
    Datum, Framework, InferenceFact, InferenceModelExt, IntoRunnable, Tensor, TractError,
    TypedModel, TypedRunnableModel, tvec,
};

use tract_onnx::tract_core;

use crate::graph::Graph;
use crate::kernels::{Kernel, cpu_time};
use crate::model::{LoadError, MAX_MAP_BYTES, RunError};
use crate::operator::{Operator, register};
use crate::partial::{Replaced, replace_layers};

/// Output that is the logit, where the graph names its outputs as `trainer export` does.
const LOGIT: &str = "logit";

/// One node of a run.
#[derive(Debug)]
pub(crate) struct NodeTime {
    pub(crate) name: String,
    pub(crate) operator: String,
    pub(crate) time: Duration,
    /// Multiply-accumulates, where it is a layer of ours.
    pub(crate) macs: u64,
    /// Bytes of parameters, where it is a layer of ours.
    pub(crate) parameter_bytes: usize,
}

/// A graph that tract has optimised for images of one fixed shape.
#[derive(Debug)]
pub(crate) struct TractModel {
    plan: Arc<TypedRunnableModel>,
    shape: [usize; 4],
    reason: String,
    replaced: Replaced,
    kernel: Kernel,
}

impl TractModel {
    /// Optimises a graph for one image a run; its first output, or the one named `logit`, is the logit.
    ///
    /// `reason` says why the graph does not run on our kernels.
    pub(crate) fn new(
        proto: &mut ModelProto,
        reason: String,
        kernel: Kernel,
    ) -> Result<Self, LoadError> {
        caught(|| Self::optimise(proto, reason, kernel))
            .map_err(|error| LoadError::Tract(error.into()))
    }

    fn optimise(
        proto: &mut ModelProto,
        reason: String,
        kernel: Kernel,
    ) -> Result<Self, TractError> {
        let graph = proto
            .graph
            .as_ref()
            .ok_or_else(|| TractError::msg("the file has no graph"))?;
        let graph = Graph::new(graph);
        let image = graph.image_input().and_then(|input| input.image());
        let Some([channels, rows, columns]) = image else {
            return Err(TractError::msg(
                "the graph has not one u8 input of fixed channels, rows and columns",
            ));
        };
        let shape = [1, channels, rows, columns];
        let logit = graph.outputs().position(|name| name == LOGIT).unwrap_or(0);

        fix_batch(proto);
        let graph = proto
            .graph
            .as_mut()
            .ok_or_else(|| TractError::msg("the file has no graph"))?;
        let replaced = replace_layers(graph, kernel);
        let mut onnx = tract_onnx::onnx().with_ignore_value_info(true);
        register(&mut onnx);
        let mut model = onnx.model_for_proto_model(proto)?;
        let output = model.output_outlets()?.get(logit).copied();
        model.select_output_outlets(output.as_slice())?;
        let model = model.with_input_fact(0, InferenceFact::dt_shape(u8::datum_type(), shape))?;
        let model = model.into_typed()?;
        check_tensors(&model)?;
        Ok(Self {
            plan: model.into_optimized()?.into_runnable()?,
            shape,
            reason,
            replaced,
            kernel,
        })
    }

    /// Why the graph does not run on our kernels.
    pub(crate) fn reason(&self) -> &str {
        &self.reason
    }

    /// The kernel of our operators.
    pub(crate) fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// Quantized convolutions that our operator runs.
    pub(crate) fn n_replaced(&self) -> usize {
        self.replaced.n_convolutions
    }

    /// Whether every layer is integer arithmetic, so that all CPUs give the same bits.
    pub(crate) fn is_exact(&self) -> bool {
        self.replaced.is_all
    }

    /// Runs one image and reports each node with its CPU time, in order of execution.
    pub(crate) fn layer_times(&self, image: &[u8]) -> Result<Vec<NodeTime>, RunError> {
        caught(|| self.time(image)).map_err(|error| RunError::Tract(error.into()))
    }

    fn time(&self, image: &[u8]) -> Result<Vec<NodeTime>, TractError> {
        let image = Tensor::from_shape(&self.shape, image)?;
        let mut times = Vec::new();
        let mut state = self.plan.spawn()?;
        state.run_plan_with_eval(tvec!(image.into()), |context, op_state, node, inputs| {
            let size = inputs.first().map(|input| input.shape().to_vec());
            let started = cpu_time();
            let result = tract_core::plan::eval(context, op_state, node, inputs);
            let time = cpu_time().saturating_sub(started);
            let ours = node.op_as::<Operator>();
            times.push(NodeTime {
                name: node.name.clone(),
                operator: node.op().name().into_owned(),
                time,
                macs: ours
                    .zip(size.as_deref())
                    .map_or(0, |(ours, size)| ours.macs(size)),
                parameter_bytes: ours.map_or(0, Operator::parameter_bytes),
            });
            result
        })?;
        Ok(times)
    }

    /// Bytes of one image.
    pub(crate) fn image_bytes(&self) -> usize {
        self.shape.iter().product()
    }

    /// The logit of one image.
    pub(crate) fn logit(&self, image: &[u8]) -> Result<f32, RunError> {
        caught(|| self.run(image)).map_err(|error| RunError::Tract(error.into()))
    }

    fn run(&self, image: &[u8]) -> Result<f32, TractError> {
        let image = Tensor::from_shape(&self.shape, image)?;
        let outputs = self.plan.run(tvec!(image.into()))?;
        let logit = outputs.first().and_then(|output| {
            output
                .try_as_plain_ram()
                .ok()?
                .as_slice::<f32>()
                .ok()?
                .first()
        });
        logit
            .copied()
            .ok_or_else(|| TractError::msg("the graph has no f32 output"))
    }
}

/// tract panics at some graphs that make no sense, where an error is due.
fn caught<T>(work: impl FnOnce() -> Result<T, TractError>) -> Result<T, TractError> {
    // Nothing that the work had in hand is used once it has panicked, but for a plan, which runs do not change.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(TractError::msg(format!(
            "the graph makes no sense to it: {}",
            text.unwrap_or("it panicked")
        )))
    })
}

/// Refuses a graph with a tensor larger than [`MAX_MAP_BYTES`]: sizes stand in the file and cost nothing there.
fn check_tensors(model: &TypedModel) -> Result<(), TractError> {
    for node in &model.nodes {
        for output in &node.outputs {
            let sizes = output.fact.shape.as_concrete();
            let bytes = sizes.and_then(|sizes| {
                let of_one = output.fact.datum_type.size_of();
                sizes
                    .iter()
                    .try_fold(of_one, |n, &size| n.checked_mul(size))
            });
            if bytes.is_none_or(|bytes| bytes as u64 > MAX_MAP_BYTES) {
                return Err(TractError::msg(format!(
                    "{}: its output {:?} is not of fixed size or takes more than {MAX_MAP_BYTES} bytes",
                    node.name, output.fact
                )));
            }
        }
    }
    Ok(())
}

/// Sets the first dimension of every input to 1: a plan is for one image, and tract keeps a named dimension apart from a number.
fn fix_batch(proto: &mut ModelProto) {
    let inputs = proto.graph.iter_mut().flat_map(|graph| &mut graph.input);
    for r#type in inputs.filter_map(|input| input.r#type.as_mut()) {
        if let Some(type_proto::Value::TensorType(tensor)) = &mut r#type.value
            && let Some(batch) = tensor
                .shape
                .as_mut()
                .and_then(|shape| shape.dim.first_mut())
        {
            batch.value = Some(dimension::Value::DimValue(1));
        }
    }
}
