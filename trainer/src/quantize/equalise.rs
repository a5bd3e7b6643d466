//! Cross-layer equalisation of channels, before anything is quantized.

use crate::calibrate::Observation;
use crate::execute::Tensor;
use crate::export::LOGIT;
use crate::onnx::{GraphProto, ModelProto, NodeProto, OnnxError, TensorProto};

use super::QuantizeError;
use super::graph::is_weighted;
use super::plan::Plan;

/// Largest factor by which equalisation moves a channel.
const MAX_EQUALISATION: f32 = 64.0;

/// Moves factors between a layer's output channels and the next layer's input channels, through ReLU, MaxPool and Flatten, so that channels
/// of small range use more of the tensor's common scale (Nagel et al., "Data-free quantization", 2019, section 4.1, with the observed
/// range of the activation in place of the first layer's weights, whose scales are free per channel).
pub(super) fn equalise(
    model: &mut ModelProto,
    plan: &Plan,
    observed: &Observation,
) -> Result<(), QuantizeError> {
    let graph = model.graph()?.clone();
    for (first, second) in equalised_pairs(&graph) {
        let activation = plan
            .relu_of
            .get(&first.output[0])
            .unwrap_or(&first.output[0]);
        let Some(magnitudes) = observed.channel_magnitudes.get(activation) else {
            continue;
        };
        let Some(graph) = model.graph.as_mut() else {
            return Err(OnnxError::NoGraph.into());
        };
        let mut of_first = take_float(graph, &first.input[1])?;
        let mut bias = take_float(graph, &first.input[2])?;
        let mut of_second = take_float(graph, &second.input[1])?;
        let n_channels = magnitudes.len();
        let n_outputs = of_second.shape.first().copied().unwrap_or(1).max(1);
        let a_channel = of_second.values.len() / n_outputs / n_channels;
        if of_first.shape.first() == Some(&n_channels)
            && a_channel > 0
            && a_channel * n_channels * n_outputs == of_second.values.len()
        {
            let mut reads = vec![0.0_f32; n_channels];
            for (index, weights) in of_second.values.chunks_exact(a_channel).enumerate() {
                let read = &mut reads[index % n_channels];
                *read = weights
                    .iter()
                    .fold(*read, |largest, value| largest.max(value.abs()));
            }
            let factors = equalisation_factors(magnitudes, &reads);
            let a_row = of_first.values.len() / n_channels;
            for (channel, &factor) in factors.iter().enumerate() {
                of_first.values[channel * a_row..][..a_row]
                    .iter_mut()
                    .for_each(|value| *value /= factor);
                bias.values[channel] /= factor;
            }
            for (index, weights) in of_second.values.chunks_exact_mut(a_channel).enumerate() {
                weights
                    .iter_mut()
                    .for_each(|value| *value *= factors[index % n_channels]);
            }
        }
        put_float(graph, &first.input[1], &of_first);
        put_float(graph, &first.input[2], &bias);
        put_float(graph, &second.input[1], &of_second);
    }
    Ok(())
}

/// Factor a channel's activation is divided by: sqrt(activation magnitude / weight magnitude of the reader), normalised to geometric mean 1.
fn equalisation_factors(magnitudes: &[f32], reads: &[f32]) -> Vec<f32> {
    let raw = magnitudes
        .iter()
        .zip(reads)
        .map(|(magnitude, read)| (magnitude / read).sqrt());
    let raw: Vec<Option<f32>> = raw
        .map(|factor| (factor.is_finite() && factor > 0.0).then_some(factor))
        .collect();
    let used: Vec<f32> = raw
        .iter()
        .filter_map(|factor| factor.map(f32::ln))
        .collect();
    let mean = if used.is_empty() {
        0.0
    } else {
        used.iter().sum::<f32>() / used.len() as f32
    };
    let normalised = raw
        .into_iter()
        .map(|factor| factor.map_or(1.0, |factor| factor / mean.exp()));
    normalised
        .map(|factor| factor.clamp(1.0 / MAX_EQUALISATION, MAX_EQUALISATION))
        .collect()
}

/// Layers whose output goes, through ReLU, MaxPool and Flatten alone, to one other layer.
fn equalised_pairs(graph: &GraphProto) -> Vec<(NodeProto, NodeProto)> {
    let only_reader = |name: &str| {
        let mut readers = graph
            .node
            .iter()
            .filter(|node| node.input.iter().any(|input| input == name));
        let first = readers.next();
        if readers.next().is_some() {
            None
        } else {
            first
        }
    };
    let weighted = graph
        .node
        .iter()
        .filter(|node| is_weighted(node) && node.output[0] != LOGIT && node.input.len() == 3);
    let pair = |first: &NodeProto| {
        let mut reader = only_reader(&first.output[0])?;
        while matches!(reader.op_type.as_str(), "Relu" | "MaxPool" | "Flatten") {
            reader = only_reader(&reader.output[0])?;
        }
        is_weighted(reader).then(|| (first.clone(), reader.clone()))
    };
    weighted.filter_map(pair).collect()
}

pub(super) fn take_float(graph: &mut GraphProto, name: &str) -> Result<Tensor, OnnxError> {
    let proto = graph
        .initializer
        .iter_mut()
        .find(|tensor| tensor.name == name);
    let proto = proto.ok_or_else(|| OnnxError::Undefined {
        name: name.to_owned(),
    })?;
    Ok(Tensor {
        shape: proto.shape()?,
        values: proto.to_f32()?,
    })
}

pub(super) fn put_float(graph: &mut GraphProto, name: &str, tensor: &Tensor) {
    if let Some(proto) = graph
        .initializer
        .iter_mut()
        .find(|candidate| candidate.name == name)
    {
        *proto = TensorProto::float(name, &tensor.shape, &tensor.values);
    }
}

#[cfg(test)]
mod tests {
    use super::super::command::self_test_images;
    use super::super::ranges::logits;
    use super::super::tests::float_model;
    use super::*;
    use crate::calibrate;
    use crate::execute::FloatGraph;

    #[test]
    fn equalisation_does_not_change_the_float_logit() {
        let mut model = float_model("final", 0.03125);
        let images = self_test_images(2);
        let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
        let graph = FloatGraph::new(&model).unwrap();
        let plan = Plan::of(model.graph().unwrap());
        let observed = calibrate::observe(&graph, &plan.leaders, &images, &|| {}).unwrap();
        let before = logits(&graph, &images).unwrap();
        equalise(&mut model, &plan, &observed).unwrap();
        let after = logits(&FloatGraph::new(&model).unwrap(), &images).unwrap();
        for (before, after) in before.iter().zip(&after) {
            assert!(
                (before - after).abs() <= 1e-5 * before.abs().max(1.0),
                "{before} {after}"
            );
        }
    }
}
