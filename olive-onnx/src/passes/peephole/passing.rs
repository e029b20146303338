//! Nodes that give what they read: `Identity`, `Cast` to the same type, `Dropout` outside of training, `Transpose` in
//! order, and `Concat`, `Sum`, `Max`, `Min`, `Mean` of one value.

use std::collections::HashMap;

use olive_core::Result;

use super::super::rewrite::{output_names, producers, redirect, rename_value};
use super::super::types::{Types, infer};
use crate::ir::{Graph, Node, OnnxType};

/// Removes them. Whether there was one.
pub fn remove(graph: &mut Graph) -> Result<bool> {
    // Types are known where the graph declares them or the operators settle them; without them casts stay.
    let types = infer(graph, &Types::new()).unwrap_or_default();
    let mut changed = false;
    let mut index = 0;
    while index < graph.nodes.len() {
        if passes_on(&graph.nodes[index], &types)? && bypass(graph, index) {
            changed = true;
        } else {
            index += 1;
        }
    }
    Ok(changed)
}

fn passes_on(node: &Node, types: &Types) -> Result<bool> {
    if !node.domain.is_empty() {
        return Ok(false);
    }
    Ok(match node.op_type.as_str() {
        "Identity" => true,
        "Cast" => {
            let to = node.int("to")?.and_then(|code| OnnxType::from_code(code as i32));
            to.is_some() && to == types.get(&node.inputs[0]).copied()
        }
        "Dropout" => node.inputs.len() < 3 && node.output(1).is_none(),
        "Transpose" => node
            .ints("perm")?
            .is_some_and(|perm| perm.iter().enumerate().all(|(i, axis)| *axis == i as i64)),
        "Concat" | "Sum" | "Max" | "Min" | "Mean" => node.inputs.len() == 1,
        _ => false,
    })
}

/// Lets readers of the node's output read its first input, and removes the node. `false` where the output's name and
/// the input's both have to stay.
pub fn bypass(graph: &mut Graph, index: usize) -> bool {
    let (from, to) = (
        graph.nodes[index].inputs[0].clone(),
        graph.nodes[index].outputs[0].clone(),
    );
    let outputs = output_names(graph);
    if !outputs.contains(to.as_str()) {
        redirect(graph, &HashMap::from([(to, from)]));
        graph.nodes.remove(index);
        return true;
    }
    let made_here = producers(graph).contains_key(from.as_str());
    if !made_here || outputs.contains(from.as_str()) {
        return false;
    }
    graph.nodes.remove(index);
    graph
        .value_infos
        .retain(|info| info.name != to && info.name != from);
    rename_value(graph, &from, &to);
    true
}
