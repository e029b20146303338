//! Surgeries that repair or tidy without changing what is computed.

use std::collections::HashSet;

use olive_core::Result;
use serde::Deserialize;

use super::super::peephole::bypass;
use super::super::rewrite::{branches_mut, reads};
use super::{Draft, FromArguments, Surgery};
use crate::ir::{Attribute, Graph, Tensor};

/// `DeduplicateNodes`: of nodes that define the same value, which no graph may have, the first stays.
#[derive(Deserialize)]
pub struct DuplicateNodes {}

impl FromArguments for DuplicateNodes {}

impl Surgery for DuplicateNodes {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let nodes = &mut draft.model.graph.nodes;
        let before = nodes.len();
        let mut seen: HashSet<String> = HashSet::new();
        nodes.retain(|node| {
            let outputs: Vec<&String> = node.outputs.iter().filter(|name| !name.is_empty()).collect();
            let again = outputs.iter().any(|name| seen.contains(*name));
            if !again {
                seen.extend(outputs.into_iter().cloned());
            }
            !again
        });
        Ok(nodes.len() != before)
    }
}

/// `DeduplicateSubgraphInitializers`: of constants of a branch that share a name, the first stays.
#[derive(Deserialize)]
pub struct DuplicateInitializers {}

impl FromArguments for DuplicateInitializers {}

impl Surgery for DuplicateInitializers {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        Ok(first_of_each_name(&mut draft.model.graph))
    }
}

fn first_of_each_name(graph: &mut Graph) -> bool {
    let mut changed = false;
    for branch in graph.nodes.iter_mut().flat_map(branches_mut) {
        let before = branch.initializers.len();
        let mut seen: HashSet<String> = HashSet::new();
        branch
            .initializers
            .retain(|tensor| seen.insert(tensor.name.clone()));
        changed |= branch.initializers.len() != before;
        changed |= first_of_each_name(branch);
    }
    changed
}

/// `RemoveShapes` and `RemoveAllTensorValueShapes`: declarations of values in between.
#[derive(Deserialize)]
pub struct RemoveShapes {}

impl FromArguments for RemoveShapes {}

impl Surgery for RemoveShapes {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        Ok(clear_infos(&mut draft.model.graph))
    }
}

fn clear_infos(graph: &mut Graph) -> bool {
    let mut changed = !graph.value_infos.is_empty();
    graph.value_infos.clear();
    for branch in graph.nodes.iter_mut().flat_map(branches_mut) {
        changed |= clear_infos(branch);
    }
    changed
}

/// `RemoveInitializerValueInfo`: declarations of constants, which say themselves what they are.
#[derive(Deserialize)]
pub struct RemoveInitializerInfo {}

impl FromArguments for RemoveInitializerInfo {}

impl Surgery for RemoveInitializerInfo {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        Ok(clear_constant_infos(&mut draft.model.graph))
    }
}

fn clear_constant_infos(graph: &mut Graph) -> bool {
    let before = graph.value_infos.len();
    let constants: HashSet<&str> = graph
        .initializers
        .iter()
        .map(|tensor| tensor.name.as_str())
        .collect();
    graph
        .value_infos
        .retain(|info| !constants.contains(info.name.as_str()));
    let mut changed = graph.value_infos.len() != before;
    for branch in graph.nodes.iter_mut().flat_map(branches_mut) {
        changed |= clear_constant_infos(branch);
    }
    changed
}

/// `RemoveMemcpy`: copies between devices.
#[derive(Deserialize)]
pub struct RemoveMemcpy {}

impl FromArguments for RemoveMemcpy {}

impl Surgery for RemoveMemcpy {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &mut draft.model.graph;
        let mut changed = false;
        let mut index = 0;
        while index < graph.nodes.len() {
            let copies = matches!(
                graph.nodes[index].op_type.as_str(),
                "MemcpyFromHost" | "MemcpyToHost"
            );
            if copies && bypass(graph, index) {
                changed = true;
            } else {
                index += 1;
            }
        }
        Ok(changed)
    }
}

/// `ConstantAttributesToTensor`: `Constant` nodes carry a tensor instead of numbers.
#[derive(Deserialize)]
pub struct ConstantAttributes {}

impl FromArguments for ConstantAttributes {}

impl Surgery for ConstantAttributes {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        to_tensors(&mut draft.model.graph)
    }
}

fn to_tensors(graph: &mut Graph) -> Result<bool> {
    let mut changed = false;
    for node in &mut graph.nodes {
        for branch in branches_mut(node) {
            changed |= to_tensors(branch)?;
        }
        if node.op_type != "Constant" || !node.domain.is_empty() {
            continue;
        }
        let name = node.outputs[0].as_str();
        let tensor = match node.attributes.first() {
            Some((_, Attribute::Int(value))) => Tensor::ints(name, [], &[*value])?,
            Some((_, Attribute::Ints(values))) => Tensor::ints(name, [values.len()], values)?,
            Some((_, Attribute::Float(value))) => Tensor::floats(name, [], &[*value])?,
            Some((_, Attribute::Floats(values))) => Tensor::floats(name, [values.len()], values)?,
            _ => continue,
        };
        node.attributes = vec![("value".to_owned(), Attribute::Tensor(tensor))];
        changed = true;
    }
    Ok(changed)
}

/// `RemoveUnusedNodeOutputs`: outputs that nothing reads lose their names. Only optional ones of operators that have
/// them, or of the operators that are named.
#[derive(Deserialize)]
pub struct UnusedOutputs {
    op_types: Option<Vec<String>>,
}

impl FromArguments for UnusedOutputs {}

/// Operators with the number of outputs that they always have.
const OPTIONAL_OUTPUTS: &[(&str, usize)] = &[
    ("BatchNormalization", 1),
    ("Dropout", 1),
    ("GRU", 0),
    ("GroupQueryAttention", 1),
    ("LSTM", 0),
    ("LayerNormalization", 1),
    ("MaxPool", 1),
    ("MultiHeadAttention", 1),
    ("RNN", 0),
    ("SimplifiedLayerNormalization", 1),
    ("SkipLayerNormalization", 1),
    ("SkipSimplifiedLayerNormalization", 1),
    ("Unique", 1),
];

impl Surgery for UnusedOutputs {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &mut draft.model.graph;
        let mut used: HashSet<String> = graph.nodes.iter().flat_map(reads).map(str::to_owned).collect();
        used.extend(graph.outputs.iter().map(|output| output.name.clone()));
        let mut changed = false;
        for node in &mut graph.nodes {
            let known = OPTIONAL_OUTPUTS
                .iter()
                .find(|(op, _)| *op == node.op_type)
                .map(|(_, fixed)| *fixed);
            let named = self.op_types.as_ref().map(|list| list.contains(&node.op_type));
            let fixed = match (named, known) {
                (Some(true), known) => known.unwrap_or(1),
                (None, Some(known)) => known,
                _ => continue,
            };
            // A node without any output would be no node.
            let alive = node.outputs.iter().any(|name| used.contains(name));
            for name in node
                .outputs
                .iter_mut()
                .skip(fixed)
                .filter(|name| alive && !name.is_empty() && !used.contains(*name))
            {
                name.clear();
                changed = true;
            }
            while node.outputs.len() > fixed.max(1) && node.outputs.last().is_some_and(String::is_empty) {
                node.outputs.pop();
                changed = true;
            }
        }
        if changed {
            super::super::rewrite::remove_unread(graph);
        }
        Ok(changed)
    }
}
