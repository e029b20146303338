//! Surgeries on quantized nodes.

use std::collections::HashMap;

use olive_core::{Error, Result};
use serde::Deserialize;

use super::super::rewrite::{constants, is_contrib, is_op, output_names, producers, redirect, remove_dead};
use super::{Draft, FromArguments, Surgery};

/// `RemoveGidxFromMatMulNBits`: the index of groups, where it says what the order says anyway.
#[derive(Deserialize)]
pub struct RemoveGroupIndex {}

impl FromArguments for RemoveGroupIndex {}

impl Surgery for RemoveGroupIndex {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &draft.model.graph;
        let constants = constants(graph);
        let mut places = Vec::new();
        for (index, node) in graph.nodes.iter().enumerate() {
            let Some(name) = node.input(4).filter(|_| is_contrib(node, "MatMulNBits")) else {
                continue;
            };
            let block_size = node.int("block_size")?.unwrap_or(0).max(1);
            let groups = constants.get(name).map(|tensor| tensor.to_i64()).transpose()?;
            let in_order = groups.is_some_and(|groups| {
                groups
                    .iter()
                    .enumerate()
                    .all(|(k, group)| *group == k as i64 / block_size)
            });
            if !in_order {
                tracing::warn!("node `{}` keeps its group index, which reorders", node.name);
                continue;
            }
            places.push(index);
        }
        let graph = &mut draft.model.graph;
        for index in &places {
            let inputs = &mut graph.nodes[*index].inputs;
            inputs[4].clear();
            while inputs.last().is_some_and(String::is_empty) {
                inputs.pop();
            }
        }
        if !places.is_empty() {
            remove_dead(graph);
        }
        Ok(!places.is_empty())
    }
}

/// `RemoveQDQ`: pairs of `QuantizeLinear` and `DequantizeLinear` of activations. Dequantized constants stay.
#[derive(Deserialize)]
pub struct RemoveQdq {
    #[serde(default)]
    keep_clip_after_inputs: bool,
}

impl FromArguments for RemoveQdq {
    fn checked(self, _origin: &str) -> Result<Self> {
        match self.keep_clip_after_inputs {
            false => Ok(self),
            true => Err(Error::unsupported(
                "keep_clip_after_inputs",
                "pairs are removed without a trace",
            )),
        }
    }
}

impl Surgery for RemoveQdq {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &mut draft.model.graph;
        let map: HashMap<String, String> = {
            let made_by = producers(graph);
            let outputs = output_names(graph);
            let pairs = graph
                .nodes
                .iter()
                .filter(|node| is_op(node, "DequantizeLinear"))
                .filter_map(|node| {
                    let quantize = &graph.nodes[*made_by.get(node.inputs[0].as_str())?];
                    let fits =
                        is_op(quantize, "QuantizeLinear") && !outputs.contains(node.outputs[0].as_str());
                    fits.then(|| (node.outputs[0].clone(), quantize.inputs[0].clone()))
                });
            pairs.collect()
        };
        if map.is_empty() {
            return Ok(false);
        }
        // A pair may read what another pair gives.
        let resolved = map.iter().map(|(old, new)| {
            let mut target = new;
            while let Some(next) = map.get(target) {
                target = next;
            }
            (old.clone(), target.clone())
        });
        let resolved: HashMap<String, String> = resolved.collect();
        redirect(graph, &resolved);
        remove_dead(graph);
        Ok(true)
    }
}
