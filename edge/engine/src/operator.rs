//! Our convolution as an operator of tract.
//!
//! In: nodes that [`crate::partial`] wrote. tract gives u8 `[image, channel, row, column]` and takes the same.

use std::sync::Arc;

use tract_onnx::Onnx;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
#[allow(
    clippy::wildcard_imports,
    reason = "tract's macros expand to these names; clippy does not warn in test builds"
)]
use tract_onnx::tract_hir::internal::*;

use crate::convolution::GeneralConvolution;
use crate::partial::{OPERATOR, convolution};

/// Makes tract know the operator.
pub(crate) fn register(onnx: &mut Onnx) {
    onnx.op_register.insert(OPERATOR, parse);
}

/// Our convolution, as tract loads, types and runs it.
#[derive(Clone, Debug)]
pub(crate) struct Operator(Arc<GeneralConvolution>);

impl Operator {
    /// The convolution.
    pub(crate) fn convolution(&self) -> &GeneralConvolution {
        &self.0
    }

    /// Shape of the output for an input shape; `None` where the convolution does not fit it.
    fn output_shape(&self, input: &[TDim]) -> Option<TVec<TDim>> {
        let [images, channels, rows, columns] = input else {
            return None;
        };
        let size = |dimension: &TDim| dimension.to_usize().ok();
        if size(channels)? != self.0.n_inputs() {
            return None;
        }
        let [rows, columns] = self.0.output_size([size(rows)?, size(columns)?])?;
        Some(tvec![
            images.clone(),
            self.0.n_outputs().to_dim(),
            rows.to_dim(),
            columns.to_dim()
        ])
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
    let Some(convolution) = convolution(node) else {
        bail!("{}: not a convolution of ours", node.name);
    };
    Ok((expand(Operator(Arc::new(convolution))), vec![]))
}

impl Expansion for Operator {
    fn name(&self) -> StaticName {
        OPERATOR.into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, 1)?;
        check_output_arity(outputs, 1)?;
        solver.equals(&inputs[0].datum_type, u8::datum_type())?;
        solver.equals(&outputs[0].datum_type, u8::datum_type())?;
        solver.equals(&inputs[0].rank, 4)?;
        solver.given(&inputs[0].shape, move |solver, shape| {
            match self.output_shape(&shape) {
                Some(shape) => solver.equals(&outputs[0].shape, shape),
                None => bail!("the convolution does not fit {shape:?}"),
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
        OPERATOR.into()
    }

    op_as_typed_op!();
}

impl EvalOp for Operator {
    op_out_of_plan!();

    fn eval(&self, _context: &EvalContext<'_>, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let input = args_1!(inputs);
        let &[images, channels, rows, columns] = input.shape() else {
            bail!("not [image, channel, row, column]");
        };
        let Some(size) = self
            .0
            .output_size([rows, columns])
            .filter(|_| channels == self.0.n_inputs())
        else {
            bail!("the convolution does not fit {:?}", input.shape());
        };
        let mut output = Tensor::zero::<u8>(&[images, self.0.n_outputs(), size[0], size[1]])?;
        {
            let mut view = output.try_as_plain_ram_mut()?;
            let out = view
                .as_slice_mut::<u8>()?
                .chunks_exact_mut(self.0.n_outputs() * size[0] * size[1]);
            let from = input.try_as_plain_ram()?;
            let images = from
                .as_slice::<u8>()?
                .chunks_exact(channels * rows * columns);
            for (image, out) in images.zip(out) {
                self.0.run(image, [rows, columns], out);
            }
        }
        Ok(tvec!(output.into_tvalue()))
    }
}

impl TypedOp for Operator {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        match self.output_shape(&inputs[0].shape) {
            Some(shape) => Ok(tvec!(u8::fact(shape))),
            None => bail!("the convolution does not fit {:?}", inputs[0].shape),
        }
    }
}
