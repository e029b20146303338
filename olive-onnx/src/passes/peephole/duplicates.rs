//! Nodes that compute the same, and constants that hold the same.

use std::collections::{HashMap, HashSet};

use olive_core::Result;

use super::super::rewrite::{branches, output_names, redirect};
use crate::ir::{Attribute, Graph, Node, OnnxType, Tensor};

/// Bytes that are compared before the rest is looked at.
const PREFIX: usize = 256;

/// Lets readers of a node that does what an earlier one does read the earlier one. Nodes that make a graph output,
/// have branches or draw random numbers stay.
pub fn nodes(graph: &mut Graph) -> bool {
    let mut map: HashMap<String, String> = HashMap::new();
    let mut dropped: HashSet<usize> = HashSet::new();
    let outputs: HashSet<String> = output_names(graph).into_iter().map(str::to_owned).collect();
    let mut seen: HashMap<(String, String, Vec<String>), Vec<usize>> = HashMap::new();
    for index in 0..graph.nodes.len() {
        for input in &mut graph.nodes[index].inputs {
            if let Some(new) = map.get(input.as_str()) {
                input.clone_from(new);
            }
        }
        let node = &graph.nodes[index];
        if branches(node).next().is_some() || draws_numbers(node) {
            continue;
        }
        let key = (node.domain.clone(), node.op_type.clone(), node.inputs.clone());
        let earlier = seen.entry(key).or_default();
        let same = earlier
            .iter()
            .copied()
            .find(|other| same_node(&graph.nodes[*other], node));
        match same {
            Some(other) if !node.outputs.iter().any(|name| outputs.contains(name)) => {
                let pairs = node.outputs.iter().zip(&graph.nodes[other].outputs);
                map.extend(
                    pairs
                        .filter(|(old, _)| !old.is_empty())
                        .map(|(old, new)| (old.clone(), new.clone())),
                );
                dropped.insert(index);
            }
            Some(_) => {}
            None => earlier.push(index),
        }
    }
    if dropped.is_empty() {
        return false;
    }
    redirect(graph, &map);
    let mut index = 0;
    graph.nodes.retain(|_| {
        index += 1;
        !dropped.contains(&(index - 1))
    });
    true
}

fn draws_numbers(node: &Node) -> bool {
    node.op_type.starts_with("Random")
        || matches!(node.op_type.as_str(), "Multinomial" | "Bernoulli" | "Dropout")
}

/// Whether `later` computes what `earlier` does, and nothing that `earlier` leaves out.
fn same_node(earlier: &Node, later: &Node) -> bool {
    let covered = later
        .outputs
        .iter()
        .enumerate()
        .all(|(i, name)| name.is_empty() || earlier.output(i).is_some());
    covered
        && earlier.attributes.len() == later.attributes.len()
        && earlier
            .attributes
            .iter()
            .all(|(name, value)| match (value, later.attribute(name)) {
                (Attribute::Tensor(a), Some(Attribute::Tensor(b))) => same_tensor(a, b),
                (a, Some(b)) => a == b,
                (_, None) => false,
            })
}

fn same_tensor(a: &Tensor, b: &Tensor) -> bool {
    a.dtype() == b.dtype()
        && a.shape() == b.shape()
        && matches!((a.borrowed(), b.borrowed()), (Some(a), Some(b)) if a == b)
}

/// Type, shape and first bytes of an initializer.
type Likeness<'a> = (OnnxType, &'a [usize], &'a [u8]);

/// Lets readers of an initializer read the first that holds the same. Those that are made when asked for, that are
/// defaults of inputs or that are outputs stay.
pub fn constants(graph: &mut Graph) -> Result<bool> {
    let map: HashMap<String, String> = {
        let mut kept = output_names(graph);
        kept.extend(graph.inputs.iter().map(|input| input.name.as_str()));
        let mut groups: HashMap<Likeness<'_>, Vec<&Tensor>> = HashMap::new();
        let mut map = HashMap::new();
        for tensor in graph
            .initializers
            .iter()
            .filter(|tensor| !kept.contains(tensor.name.as_str()))
        {
            let Some(bytes) = tensor.borrowed() else { continue };
            let key = (tensor.dtype(), tensor.shape(), &bytes[..bytes.len().min(PREFIX)]);
            let group = groups.entry(key).or_default();
            match group.iter().find(|first| first.borrowed() == Some(bytes)) {
                Some(first) => _ = map.insert(tensor.name.clone(), first.name.clone()),
                None => group.push(tensor),
            }
        }
        map
    };
    if map.is_empty() {
        return Ok(false);
    }
    redirect(graph, &map);
    graph
        .initializers
        .retain(|tensor| !map.contains_key(&tensor.name));
    graph.value_infos.retain(|info| !map.contains_key(&info.name));
    Ok(true)
}
