//! `TieWordEmbeddings`: embedding and head share one constant where they hold the same.
//!
//! Floats: the head multiplies by the transposed embedding. Integers (`GatherBlockQuantized` and `MatMulNBits`): the head
//! reads the embedding's integers through a `Reshape`, and its scales and zero points. A model whose two weights differ
//! is left as it is.

use olive_core::Result;
use serde::Deserialize;

use super::super::rewrite::{FreshNames, constants, is_contrib, is_op, producers, remove_dead};
use super::{Draft, FromArguments, Surgery};
use crate::ir::{Graph, Node, Tensor};

/// The surgery.
#[derive(Deserialize)]
pub struct TieEmbeddings {}

impl FromArguments for TieEmbeddings {}

impl Surgery for TieEmbeddings {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &mut draft.model.graph;
        let (Some(embed), Some(head)) = (embedding(graph), head(graph)) else {
            return Ok(false);
        };
        let changed = match is_op(&graph.nodes[embed], "Gather") && is_op(&graph.nodes[head], "MatMul") {
            true => tie_floats(graph, embed, head)?,
            false
                if is_contrib(&graph.nodes[embed], "GatherBlockQuantized")
                    && is_contrib(&graph.nodes[head], "MatMulNBits") =>
            {
                tie_integers(graph, embed, head)?
            }
            false => false,
        };
        if changed {
            remove_dead(graph);
        } else {
            tracing::warn!(
                "embedding and head are not tied: they are shared already, or hold different weights"
            );
        }
        Ok(changed)
    }
}

/// The node that looks tokens up.
pub(super) fn embedding(graph: &Graph) -> Option<usize> {
    let constants = constants(graph);
    let reads_tokens = |node: &Node| matches!(node.input(1), Some("input_ids"));
    graph.nodes.iter().position(|node| {
        (is_op(node, "Gather") || is_contrib(node, "GatherBlockQuantized"))
            && (reads_tokens(node) || node.name.contains("embed_tokens"))
            && node.input(0).is_some_and(|name| constants.contains_key(name))
    })
}

/// The node that makes the logits.
pub(super) fn head(graph: &Graph) -> Option<usize> {
    let by_output = producers(graph).get("logits").copied();
    let multiplies = |index: &usize| {
        is_op(&graph.nodes[*index], "MatMul") || is_contrib(&graph.nodes[*index], "MatMulNBits")
    };
    let by_name = || {
        graph.nodes.iter().position(|node| {
            node.name.contains("lm_head") && (is_op(node, "MatMul") || is_contrib(node, "MatMulNBits"))
        })
    };
    by_output.filter(multiplies).or_else(by_name)
}

fn tie_floats(graph: &mut Graph, embed: usize, head: usize) -> Result<bool> {
    let constants = constants(graph);
    let (Some(table), Some(weight)) = (
        constants.get(graph.nodes[embed].inputs[0].as_str()),
        constants.get(graph.nodes[head].inputs[1].as_str()),
    ) else {
        return Ok(false);
    };
    let ([rows, cols], true) = (
        <[usize; 2]>::try_from(table.shape()).unwrap_or([0, 0]),
        table.dtype() == weight.dtype(),
    ) else {
        return Ok(false);
    };
    if weight.shape() != [cols, rows] || !transposes(table, weight, [rows, cols])? {
        return Ok(false);
    }
    let table = graph.nodes[embed].inputs[0].clone();
    let mut names = FreshNames::new(graph);
    let (name, value) = (
        names.make("/lm_head/Transpose_tied"),
        names.make("/lm_head/Transpose_tied/output_0"),
    );
    graph.nodes[head].inputs[1].clone_from(&value);
    graph.nodes.insert(
        head,
        Node::new(name, "Transpose", &[&table], &[&value]).with("perm", vec![1, 0]),
    );
    Ok(true)
}

/// Whether `b [cols, rows]` is the transpose of `a [rows, cols]`.
fn transposes(a: &Tensor, b: &Tensor, shape: [usize; 2]) -> Result<bool> {
    let [rows, cols] = shape;
    let size = a.dtype().bits() / 8;
    let (a, b) = (a.bytes()?, b.bytes()?);
    let element = |bytes: &[u8], index: usize| -> [u8; 8] {
        let mut element = [0; 8];
        element[..size].copy_from_slice(&bytes[index * size..(index + 1) * size]);
        element
    };
    Ok(size > 0
        && (0..rows)
            .all(|row| (0..cols).all(|col| element(&a, row * cols + col) == element(&b, col * rows + row))))
}

fn tie_integers(graph: &mut Graph, embed: usize, head: usize) -> Result<bool> {
    let constants = constants(graph);
    let (look, multiply) = (&graph.nodes[embed], &graph.nodes[head]);
    let setting =
        |node: &Node, name: &str, default: i64| -> Result<i64> { Ok(node.int(name)?.unwrap_or(default)) };
    let same_layout = setting(look, "bits", 4)? == setting(multiply, "bits", 4)?
        && setting(look, "block_size", 128)? == setting(multiply, "block_size", 32)?;
    let pairs = [(0, 1), (2, 2), (3, 3)];
    for (a, b) in pairs {
        let (a, b) = (look.input(a), multiply.input(b));
        let same = match (
            a.and_then(|name| constants.get(name)),
            b.and_then(|name| constants.get(name)),
        ) {
            (Some(a), Some(b)) => a.dtype() == b.dtype() && a.bytes()? == b.bytes()?,
            _ => a.is_none() && b.is_none(),
        };
        if !same || !same_layout {
            return Ok(false);
        }
    }
    let Some(shape) = constants
        .get(multiply.inputs[1].as_str())
        .map(|tensor| tensor.shape().to_vec())
    else {
        return Ok(false);
    };
    let shared: Vec<String> = [0, 2, 3]
        .iter()
        .filter_map(|place| look.input(*place).map(str::to_owned))
        .collect();
    if multiply.inputs[1] == shared[0] {
        return Ok(false);
    }
    let value = reshape_for_head(graph, head, &shared[0], &shape)?;
    let inputs = &mut graph.nodes[head + 1].inputs;
    inputs[1] = value;
    for (place, name) in shared.iter().enumerate().skip(1) {
        inputs[place + 1].clone_from(name);
    }
    Ok(true)
}

/// Puts a `Reshape` of `table` before the head; the name of its result.
pub(super) fn reshape_for_head(
    graph: &mut Graph,
    head: usize,
    table: &str,
    shape: &[usize],
) -> Result<String> {
    let mut names = FreshNames::new(graph);
    let [name, value, sizes] =
        ["", "/output_0", "/shape"].map(|suffix| names.make(&format!("/lm_head/Reshape_tied{suffix}")));
    let sizes_values: Vec<i64> = shape.iter().map(|size| *size as i64).collect();
    graph
        .initializers
        .push(Tensor::ints(&sizes, [shape.len()], &sizes_values)?);
    graph
        .nodes
        .insert(head, Node::new(name, "Reshape", &[table, &sizes], &[&value]));
    Ok(value)
}
