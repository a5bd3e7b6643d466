//! Which tensors of a graph are quantized, and with whose range.

use std::collections::{BTreeMap, BTreeSet};

use crate::calibrate::Observation;
use crate::export::{IMAGE_SCALE, LOGIT};
use crate::onnx::{GraphProto, NodeProto};

use super::integers::Parameters;
use super::{QuantizeError, Ranges};

/// Which tensors are quantized, and with whose range.
pub(super) struct Plan {
    /// Tensors with a range of their own, in graph order.
    pub(super) leaders: Vec<String>,
    /// Tensors whose values make the ranges.
    pub(super) observed: Vec<String>,
    /// For every quantized tensor the one whose range it shares.
    pub(super) leader_of: BTreeMap<String, String>,
    /// For the output of a node that a ReLU alone reads: the ReLU's output.
    pub(super) relu_of: BTreeMap<String, String>,
}

impl Plan {
    pub(super) fn of(graph: &GraphProto) -> Self {
        let mut readers: BTreeMap<&str, Vec<&NodeProto>> = BTreeMap::new();
        for node in &graph.node {
            for input in &node.input {
                readers.entry(input).or_default().push(node);
            }
        }
        let mut plan = Self {
            leaders: Vec::new(),
            observed: Vec::new(),
            leader_of: BTreeMap::new(),
            relu_of: BTreeMap::new(),
        };
        let mut fused: BTreeSet<String> = BTreeSet::new();
        for node in &graph.node {
            let output = node.output[0].as_str();
            match node.op_type.as_str() {
                "Cast" | "Mul" | "Sigmoid" => continue,
                "Concat" => {
                    plan.unite(&node.input, output);
                    continue;
                }
                "MaxPool" | "AveragePool" | "Flatten" => {
                    let leader = plan
                        .leader_of
                        .get(&node.input[0])
                        .unwrap_or(&node.input[0])
                        .clone();
                    plan.leader_of.insert(output.to_owned(), leader);
                    continue;
                }
                _ if output == LOGIT || fused.contains(output) => continue,
                _ => {}
            }
            let relu = match readers.get(output).map(Vec::as_slice) {
                Some([only]) if only.op_type == "Relu" && node.op_type != "Relu" => {
                    Some(only.output[0].clone())
                }
                _ => None,
            };
            let name = relu.clone().unwrap_or_else(|| output.to_owned());
            if let Some(relu) = relu {
                fused.insert(relu.clone());
                plan.relu_of.insert(output.to_owned(), relu);
            }
            plan.leader_of.insert(name.clone(), name.clone());
            plan.observed.push(name.clone());
            plan.leaders.push(name);
        }
        plan
    }

    /// Gives the inputs of a Concat and its output one range, that of the first of them, where all are behind a ReLU: a range that holds
    /// negative values would move their zero point from 0, which is their ReLU. Otherwise the output has a range of its own.
    fn unite(&mut self, inputs: &[String], output: &str) {
        let leaders: BTreeSet<String> = inputs
            .iter()
            .map(|input| self.leader_of.get(input).unwrap_or(input).clone())
            .collect();
        let is_positive = |leader: &String| self.relu_of.values().any(|relu| relu == leader);
        let first = self.leaders.iter().find(|leader| leaders.contains(*leader));
        let Some(first) = first.filter(|_| leaders.iter().all(is_positive)).cloned() else {
            self.leader_of.insert(output.to_owned(), output.to_owned());
            self.observed.push(output.to_owned());
            self.leaders.push(output.to_owned());
            return;
        };
        for leader in self.leader_of.values_mut() {
            if leaders.contains(leader) {
                leader.clone_from(&first);
            }
        }
        self.leaders
            .retain(|leader| *leader == first || !leaders.contains(leader));
        self.leader_of.insert(output.to_owned(), first);
    }

    /// Adds what was seen of tensors that share a range to its leader's.
    pub(super) fn gather(&self, observation: &mut Observation) {
        for (name, leader) in self
            .leader_of
            .iter()
            .filter(|(name, leader)| name != leader)
        {
            if let Some(histogram) = observation.histograms.remove(name) {
                let of_leader = observation.histograms.entry(leader.clone()).or_default();
                of_leader.merge(histogram);
            }
        }
    }

    /// The tensor before the ReLU whose output is `tensor`; itself where there is none.
    pub(super) fn raw<'a>(&'a self, tensor: &'a str) -> &'a str {
        let raw = self.relu_of.iter().find(|(_, relu)| *relu == tensor);
        raw.map_or(tensor, |(raw, _)| raw)
    }

    /// Rounds a tensor as the graph will, where its range was chosen.
    pub(super) fn round(&self, ranges: &Ranges, name: &str, values: &mut [f32]) {
        let leader = self.leader_of.get(name);
        if let Some((_, range, _)) = leader.and_then(|leader| ranges.get(leader)) {
            Parameters::of(*range).apply(values);
        }
    }

    pub(super) fn parameters(
        &self,
        tensor: &str,
        ranges: &Ranges,
    ) -> Result<Parameters, QuantizeError> {
        let leader = self.leader_of.get(tensor).map_or(tensor, String::as_str);
        if leader == "image_scaled" {
            return Ok(Parameters {
                scale: IMAGE_SCALE,
                zero_point: 0,
            });
        }
        let (_, range, _) = ranges
            .get(leader)
            .ok_or_else(|| QuantizeError::Unobserved {
                name: leader.to_owned(),
            })?;
        Ok(Parameters::of(*range))
    }
}
