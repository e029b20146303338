//! A node behind another of the same kind: `Cast`, `Transpose`, `Reshape`.

use std::collections::HashMap;

use olive_core::Result;

use super::super::rewrite::{constants, is_op, producers, set_attribute};
use super::super::types::{Types, infer};
use crate::ir::{Graph, Node, OnnxType};

/// Lets the second `Cast` of a chain read what the first one read, where the first loses nothing; with `lossy`, also
/// where a float is cast back to the type that it had.
pub fn casts(graph: &mut Graph, lossy: bool) -> Result<bool> {
    let types = infer(graph, &Types::new()).unwrap_or_default();
    rewire(graph, "Cast", |first, second| {
        let to = |node: &Node| {
            node.int("to")
                .map(|code| code.and_then(|code| OnnxType::from_code(code as i32)))
        };
        let (Some(start), Some(middle), Some(end)) = (types.get(&first.inputs[0]), to(first)?, to(second)?)
        else {
            return Ok(false);
        };
        let round_trip = *start == end && is_float(*start) && is_float(middle);
        Ok(keeps(*start, middle) || (lossy && round_trip))
    })
}

fn is_float(dtype: OnnxType) -> bool {
    matches!(
        dtype,
        OnnxType::Float | OnnxType::Float16 | OnnxType::Bfloat16 | OnnxType::Double
    )
}

/// Whether every value of `from` is one of `to`.
fn keeps(from: OnnxType, to: OnnxType) -> bool {
    use OnnxType as T;
    from == to
        || match from {
            T::Bool => !matches!(to, T::Uint4 | T::Int4),
            T::Float16 | T::Bfloat16 => matches!(to, T::Float | T::Double),
            T::Float => to == T::Double,
            T::Uint8 => matches!(
                to,
                T::Uint16 | T::Uint32 | T::Uint64 | T::Int16 | T::Int32 | T::Int64 | T::Float | T::Double
            ),
            T::Int8 => matches!(to, T::Int16 | T::Int32 | T::Int64 | T::Float | T::Double),
            T::Int32 => matches!(to, T::Int64 | T::Double),
            _ => false,
        }
}

/// Composes two `Transpose` into the second.
pub fn transposes(graph: &mut Graph) -> Result<bool> {
    rewire(graph, "Transpose", |first, second| {
        let (Some(a), Some(b)) = (first.ints("perm")?, second.ints("perm")?) else {
            return Ok(false);
        };
        let composed: Option<Vec<i64>> = b
            .iter()
            .map(|axis| a.get(usize::try_from(*axis).ok()?).copied())
            .collect();
        let Some(composed) = composed.filter(|_| a.len() == b.len()) else {
            return Ok(false);
        };
        set_attribute(second, "perm", composed);
        Ok(true)
    })
}

/// Lets a `Reshape` of a `Reshape` read what the first one read: its own shape settles the result unless it copies
/// sizes (a 0 in it).
pub fn reshapes(graph: &mut Graph) -> Result<bool> {
    let shapes: HashMap<String, Vec<i64>> = constants(graph)
        .into_iter()
        .filter(|(_, tensor)| {
            tensor.dtype() == OnnxType::Int64 && tensor.shape().len() == 1 && tensor.borrowed().is_some()
        })
        .filter_map(|(name, tensor)| Some((name.to_owned(), tensor.to_i64().ok()?)))
        .collect();
    rewire(graph, "Reshape", |_, second| {
        Ok(shapes
            .get(&second.inputs[1])
            .is_some_and(|shape| !shape.contains(&0)))
    })
}

/// For each pair of nodes of this kind, the second of which reads the first: if `fuses` says so (it may change the
/// second), the second reads the first's input.
fn rewire(
    graph: &mut Graph,
    op_type: &str,
    fuses: impl Fn(&Node, &mut Node) -> Result<bool>,
) -> Result<bool> {
    let mut changed = false;
    for index in 0..graph.nodes.len() {
        if !is_op(&graph.nodes[index], op_type) {
            continue;
        }
        let Some(first) = producers(graph)
            .get(graph.nodes[index].inputs[0].as_str())
            .copied()
        else {
            continue;
        };
        if !is_op(&graph.nodes[first], op_type) {
            continue;
        }
        let mut second = graph.nodes[index].clone();
        if fuses(&graph.nodes[first], &mut second)? {
            second.inputs[0] = graph.nodes[first].inputs[0].clone();
            graph.nodes[index] = second;
            changed = true;
        }
    }
    Ok(changed)
}
