//! Our layers as operators of tract.
//!
//! In: nodes that [`crate::partial`] wrote. tract gives u8 `[image, channel, row, column]` or `[image, feature]` and takes the same, f32 of the
//! last layer.

use std::sync::Arc;

use tract_onnx::Onnx;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
#[allow(
    clippy::wildcard_imports,
    reason = "tract's macros expand to these names; clippy does not warn in test builds"
)]
use tract_onnx::tract_hir::internal::*;

use crate::attributes::{self, layer};
use crate::convolution::GeneralConvolution;
use crate::gemm::Gemm;
use crate::mean::Mean;
use crate::sum::SumTable;

/// Makes tract know the operators.
pub(crate) fn register(onnx: &mut Onnx) {
    for name in [
        attributes::CONVOLUTION,
        attributes::SUM,
        attributes::MEAN,
        attributes::GEMM,
    ] {
        onnx.op_register.insert(name, parse);
    }
}

/// What an operator of ours computes.
#[derive(Debug)]
pub(crate) enum Layer {
    /// u8 to u8.
    Convolution(GeneralConvolution),
    /// Two u8 to u8.
    Sum(SumTable),
    /// u8 to u8.
    Mean(Mean),
    /// u8 to u8, or to f32 where it is the last.
    Gemm(Gemm),
}

impl Layer {
    fn name(&self) -> &'static str {
        match self {
            Self::Convolution(_) => attributes::CONVOLUTION,
            Self::Sum(_) => attributes::SUM,
            Self::Mean(_) => attributes::MEAN,
            Self::Gemm(_) => attributes::GEMM,
        }
    }

    fn n_inputs(&self) -> usize {
        if matches!(self, Self::Sum(_)) { 2 } else { 1 }
    }

    fn output_type(&self) -> DatumType {
        match self {
            Self::Gemm(gemm) if gemm.is_last() => f32::datum_type(),
            _ => u8::datum_type(),
        }
    }

    /// Shape of an output behind the batch, for such inputs; `None` where they do not fit or hold nothing.
    fn output_shape(&self, inputs: &[&[usize]]) -> Option<Vec<usize>> {
        match (self, inputs) {
            _ if inputs.iter().any(|size| size.contains(&0)) => None,
            (Self::Convolution(convolution), &[&[channels, rows, columns]]) => {
                let [rows, columns] = convolution.output_size([rows, columns])?;
                let shape = vec![convolution.n_outputs(), rows, columns];
                (channels == convolution.n_inputs()).then_some(shape)
            }
            (Self::Sum(_), [first, second]) => (first == second).then(|| first.to_vec()),
            (Self::Mean(mean), &[&[channels, rows, columns]]) => {
                let [rows, columns] = mean.output_size([rows, columns])?;
                Some(vec![channels, rows, columns])
            }
            (Self::Gemm(gemm), &[&[features]]) => {
                (features == gemm.n_inputs()).then(|| vec![gemm.n_outputs()])
            }
            _ => None,
        }
    }

    /// Computes one image whose inputs have the shape `size` behind the batch.
    fn run(&self, inputs: &[&[u8]], size: &[usize], out: &mut [u8]) {
        match (self, inputs, size) {
            (Self::Convolution(convolution), [image], &[_, rows, columns]) => {
                convolution.run(image, [rows, columns], out);
            }
            (Self::Mean(mean), [image], &[_, rows, columns]) => {
                mean.run(image, [rows, columns], out);
            }
            (Self::Sum(sum), [first, second], _) => sum.run(first, second, out),
            (Self::Gemm(gemm), [features], _) => gemm.run_hidden(features, out),
            _ => unreachable!("output_shape has checked the inputs"),
        }
    }
}

/// Our layer, as tract loads, types and runs it.
#[derive(Clone, Debug)]
pub(crate) struct Operator(Arc<Layer>);

impl Operator {
    /// Multiply-accumulates for an input of this shape, batch included.
    pub(crate) fn macs(&self, input: &[usize]) -> u64 {
        match (&*self.0, input) {
            (Layer::Convolution(convolution), &[_, _, rows, columns]) => {
                convolution.macs([rows, columns])
            }
            (Layer::Gemm(gemm), _) => (gemm.n_inputs() * gemm.n_outputs()) as u64,
            _ => 0,
        }
    }

    /// Bytes of parameters.
    pub(crate) fn parameter_bytes(&self) -> usize {
        match &*self.0 {
            Layer::Convolution(convolution) => convolution.parameter_bytes(),
            Layer::Gemm(gemm) => gemm.parameter_bytes(),
            Layer::Sum(sum) => sum.bytes(),
            Layer::Mean(_) => 0,
        }
    }

    /// Shape of the output for input shapes with the batch; `None` where they do not fit.
    fn output_shape(&self, inputs: &[&[TDim]]) -> Option<TVec<TDim>> {
        let batch = inputs.first()?.first()?.clone();
        let behind = |shape: &&[TDim]| -> Option<Vec<usize>> {
            let sizes = shape.get(1..)?.iter();
            sizes.map(|dimension| dimension.to_usize().ok()).collect()
        };
        let behind: Vec<Vec<usize>> = inputs.iter().map(behind).collect::<Option<_>>()?;
        let behind: Vec<&[usize]> = behind.iter().map(Vec::as_slice).collect();
        let shape = self.0.output_shape(&behind)?;
        let sizes = shape.iter().map(ToDim::to_dim);
        Some(std::iter::once(batch).chain(sizes).collect())
    }
}

impl PartialEq for Operator {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Operator {}

fn parse(
    _context: &ParsingContext<'_>,
    node: &NodeProto,
) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let Some(layer) = layer(node) else {
        bail!("{}: not a layer of ours", node.name);
    };
    Ok((expand(Operator(Arc::new(layer))), vec![]))
}

impl Expansion for Operator {
    fn name(&self) -> StaticName {
        self.0.name().into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, self.0.n_inputs())?;
        check_output_arity(outputs, 1)?;
        for input in inputs {
            solver.equals(&input.datum_type, u8::datum_type())?;
        }
        solver.equals(&outputs[0].datum_type, self.0.output_type())?;
        let shapes = inputs.iter().map(|input| &input.shape);
        solver.given_all(shapes, move |solver, shapes: Vec<TVec<TDim>>| {
            let shapes: Vec<&[TDim]> = shapes.iter().map(|shape| &shape[..]).collect();
            match self.output_shape(&shapes) {
                Some(shape) => solver.equals(&outputs[0].shape, shape),
                None => bail!("{} does not fit {shapes:?}", self.0.name()),
            }
        })
    }

    fn wire(
        &self,
        prefix: &str,
        model: &mut TypedModel,
        inputs: &[OutletId],
    ) -> TractResult<TVec<OutletId>> {
        model.wire_node(prefix, self.clone(), inputs)
    }
}

impl Op for Operator {
    fn name(&self) -> StaticName {
        self.0.name().into()
    }

    op_as_typed_op!();
}

impl EvalOp for Operator {
    op_out_of_plan!();

    fn eval(&self, _context: &EvalContext<'_>, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let layer = &*self.0;
        let shapes: Vec<&[usize]> = inputs.iter().map(|input| &input.shape()[1..]).collect();
        let Some(shape) = layer.output_shape(&shapes) else {
            bail!("{} does not fit {shapes:?}", layer.name());
        };
        let n_images = inputs[0].shape()[0];
        let whole: Vec<usize> = std::iter::once(n_images)
            .chain(shape.iter().copied())
            .collect();
        let values: Vec<&[u8]> = inputs
            .iter()
            .map(|input| input.try_as_plain_ram()?.as_slice::<u8>())
            .collect::<TractResult<_>>()?;
        let image = |index: usize| -> Vec<&[u8]> {
            let n = values[0].len() / n_images;
            values
                .iter()
                .map(|values| &values[index * n..][..n])
                .collect()
        };
        let a_image = shape.iter().product::<usize>();
        let mut output = Tensor::zero_dt(layer.output_type(), &whole)?;
        {
            let mut view = output.try_as_plain_ram_mut()?;
            match layer {
                Layer::Gemm(gemm) if gemm.is_last() => {
                    let out = view.as_slice_mut::<f32>()?.chunks_exact_mut(a_image);
                    for (index, out) in out.enumerate() {
                        gemm.run_last(image(index)[0], out);
                    }
                }
                _ => {
                    let out = view.as_slice_mut::<u8>()?.chunks_exact_mut(a_image);
                    for (index, out) in out.enumerate() {
                        layer.run(&image(index), shapes[0], out);
                    }
                }
            }
        }
        Ok(tvec!(output.into_tvalue()))
    }
}

impl TypedOp for Operator {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let shapes: Vec<&[TDim]> = inputs.iter().map(|input| &input.shape[..]).collect();
        match self.output_shape(&shapes) {
            Some(shape) => Ok(tvec!(self.0.output_type().fact(shape))),
            None => bail!("{} does not fit {shapes:?}", self.0.name()),
        }
    }
}
