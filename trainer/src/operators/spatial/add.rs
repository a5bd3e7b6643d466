//! The sum of two feature maps with a ReLU: a residual connection.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::relu;
use crate::operators::{values, with_values};

/// Sum of two feature maps, negative values become 0.
#[derive(Debug, Clone, Copy)]
pub struct AddRelu;

impl CustomOp2 for AddRelu {
    fn name(&self) -> &'static str {
        "add-relu"
    }

    fn cpu_fwd(
        &self,
        left: &CpuStorage,
        left_layout: &Layout,
        right: &CpuStorage,
        right_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if left_layout.shape() != right_layout.shape() {
            bail!(
                "{:?} and {:?} do not add",
                left_layout.shape(),
                right_layout.shape()
            )
        }
        let (left, right) = (
            values::<f32>(left, left_layout)?,
            values::<f32>(right, right_layout)?,
        );
        let mut sums: Vec<f32> = left.iter().zip(right).map(|(a, b)| a + b).collect();
        relu(&mut sums);
        Ok((CpuStorage::F32(sums), left_layout.shape().clone()))
    }

    fn bwd(
        &self,
        _left: &Tensor,
        _right: &Tensor,
        sums: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let opened: Vec<f32> = with_values::<f32, _>(sums, |sums| {
            with_values::<f32, _>(&gradient.contiguous()?, |gradient| {
                let pairs = gradient.iter().zip(sums);
                pairs
                    .map(|(&gradient, &sum)| if sum > 0.0 { gradient } else { 0.0 })
                    .collect()
            })
        })??;
        let opened = Tensor::from_vec(opened, sums.shape(), sums.device())?;
        Ok((Some(opened.clone()), Some(opened)))
    }
}
