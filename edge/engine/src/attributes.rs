//! Our layers as nodes of an ONNX graph, written and read back: tract parses nodes, and takes no other payload.

use tract_onnx::pb::{AttributeProto, NodeProto};

use crate::convolution::{Definition, GeneralConvolution};
use crate::gemm::{self, Gemm};
use crate::kernels::{Kernel, Levels};
use crate::mean::Mean;
use crate::operator::Layer;
use crate::sum::{Sum, SumTable};

/// Operator type of a quantized convolution.
pub(crate) const CONVOLUTION: &str = "QuantizedConvolution";
/// Operator type of a quantized sum.
pub(crate) const SUM: &str = "QuantizedSum";
/// Operator type of a quantized mean.
pub(crate) const MEAN: &str = "QuantizedMean";
/// Operator type of a quantized dense layer.
pub(crate) const GEMM: &str = "QuantizedGemm";

fn named(name: &str) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        ..AttributeProto::default()
    }
}

fn ints(name: &str, values: &[usize]) -> Option<AttributeProto> {
    let ints = values
        .iter()
        .map(|&n| i64::try_from(n).ok())
        .collect::<Option<_>>()?;
    Some(AttributeProto {
        ints,
        ..named(name)
    })
}

fn bytes(name: &str, values: &[u8]) -> AttributeProto {
    AttributeProto {
        s: values.to_vec(),
        ..named(name)
    }
}

fn floats(name: &str, values: &[f32]) -> AttributeProto {
    AttributeProto {
        floats: values.to_vec(),
        ..named(name)
    }
}

fn biases(values: &[i32]) -> AttributeProto {
    AttributeProto {
        ints: values.iter().copied().map(i64::from).collect(),
        ..named("bias")
    }
}

/// Attributes of a node of [`CONVOLUTION`].
pub(crate) fn of_convolution(d: &Definition, kernel: Kernel) -> Option<Vec<AttributeProto>> {
    Some(vec![
        ints("shape", &d.shape)?,
        ints("groups", &[d.groups])?,
        ints("strides", &d.strides)?,
        ints("dilations", &d.dilations)?,
        ints("pads", &d.pads)?,
        bytes("zeros", &[d.input_zero]),
        bytes("levels", &[d.levels.zero, d.levels.lowest]),
        bytes("weights", &d.weights),
        biases(&d.bias),
        floats("scale", &d.scale),
        bytes("kernel", kernel.name().as_bytes()),
    ])
}

/// Attributes of a node of [`SUM`].
pub(crate) fn of_sum(sum: &Sum) -> Vec<AttributeProto> {
    vec![
        floats("scale", &sum.scales),
        bytes("zeros", &sum.zeros),
        bytes("lowest", &[sum.lowest]),
    ]
}

/// Attributes of a node of [`MEAN`].
pub(crate) fn of_mean(mean: &Mean) -> Option<Vec<AttributeProto>> {
    Some(vec![
        ints(
            "kernel_shape",
            mean.kernel.as_ref().map_or(&[], |k| k.as_slice()),
        )?,
        ints("strides", &mean.strides)?,
        ints("pads", &mean.pads)?,
        ints("counts_padding", &[usize::from(mean.counts_padding)])?,
        floats("scale", &mean.scales),
        bytes("zeros", &mean.zeros),
    ])
}

/// Attributes of a node of [`GEMM`].
pub(crate) fn of_gemm(d: &gemm::Definition, kernel: Kernel) -> Option<Vec<AttributeProto>> {
    Some(vec![
        ints("n_inputs", &[d.n_inputs])?,
        bytes("zeros", &[d.input_zero]),
        bytes(
            "levels",
            &d.output.map_or(vec![], |of| vec![of.zero, of.lowest]),
        ),
        bytes("weights", &d.weights),
        biases(&d.bias),
        floats("scale", &d.scale),
        bytes("kernel", kernel.name().as_bytes()),
    ])
}

/// The layer of a node that was made of the attributes above; `None` for any other.
pub(crate) fn layer(node: &NodeProto) -> Option<Layer> {
    let node = Attributes(node);
    match node.0.op_type.as_str() {
        CONVOLUTION => node.convolution().map(Layer::Convolution),
        SUM => node.sum().map(|sum| Layer::Sum(SumTable::new(&sum))),
        MEAN => node.mean().map(Layer::Mean),
        GEMM => node.gemm().map(Layer::Gemm),
        _ => None,
    }
}

struct Attributes<'a>(&'a NodeProto);

impl Attributes<'_> {
    fn find(&self, name: &str) -> Option<&AttributeProto> {
        let attributes = &self.0.attribute;
        attributes.iter().find(|attribute| attribute.name == name)
    }

    fn ints<const N: usize>(&self, name: &str) -> Option<[usize; N]> {
        let values = self.find(name)?.ints.iter();
        let values: Option<Vec<usize>> = values.map(|&n| usize::try_from(n).ok()).collect();
        values?.try_into().ok()
    }

    fn bytes<const N: usize>(&self, name: &str) -> Option<[u8; N]> {
        self.find(name)?.s.as_slice().try_into().ok()
    }

    fn floats<const N: usize>(&self) -> Option<[f32; N]> {
        self.find("scale")?.floats.as_slice().try_into().ok()
    }

    fn bias(&self) -> Option<Vec<i32>> {
        let bias = self.find("bias")?.ints.iter();
        bias.map(|&n| i32::try_from(n).ok()).collect()
    }

    fn levels(&self) -> Option<Levels> {
        let [zero, lowest] = self.bytes("levels")?;
        Some(Levels { zero, lowest })
    }

    fn kernel(&self) -> Option<Kernel> {
        let name = std::str::from_utf8(&self.find("kernel")?.s).ok()?;
        name.parse().ok()
    }

    fn convolution(&self) -> Option<GeneralConvolution> {
        let [groups] = self.ints("groups")?;
        let [input_zero] = self.bytes("zeros")?;
        let definition = Definition {
            shape: self.ints("shape")?,
            groups,
            strides: self.ints("strides")?,
            dilations: self.ints("dilations")?,
            pads: self.ints("pads")?,
            input_zero,
            levels: self.levels()?,
            weights: self.find("weights")?.s.clone(),
            bias: self.bias()?,
            scale: self.find("scale")?.floats.clone(),
        };
        GeneralConvolution::new(definition, self.kernel()?)
    }

    fn sum(&self) -> Option<Sum> {
        let [lowest] = self.bytes("lowest")?;
        Some(Sum {
            scales: self.floats()?,
            zeros: self.bytes("zeros")?,
            lowest,
        })
    }

    fn mean(&self) -> Option<Mean> {
        let [counts_padding] = self.ints("counts_padding")?;
        Some(Mean {
            kernel: self.ints("kernel_shape"),
            strides: self.ints("strides")?,
            pads: self.ints("pads")?,
            counts_padding: counts_padding == 1,
            scales: self.floats()?,
            zeros: self.bytes("zeros")?,
        })
    }

    fn gemm(&self) -> Option<Gemm> {
        let [n_inputs] = self.ints("n_inputs")?;
        let [input_zero] = self.bytes("zeros")?;
        let definition = gemm::Definition {
            n_inputs,
            input_zero,
            output: self.levels(),
            weights: self.find("weights")?.s.clone(),
            bias: self.bias()?,
            scale: self.find("scale")?.floats.clone(),
        };
        Gemm::new(definition, self.kernel()?)
    }
}
