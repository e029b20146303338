//! `QuantizeEmbeddingInt8` and `ShareEmbeddingLmHead`: the embedding in 8 bits, and the head reading it.

use std::sync::Arc;

use olive_core::{Error, Result};
use rayon::prelude::*;
use serde::Deserialize;

use super::super::rewrite::{FreshNames, constants, declare_opset, is_contrib, is_op, remove_dead};
use super::super::weight_only::unpack;
use super::tie::{embedding, head, reshape_for_head};
use super::{Draft, FromArguments, Surgery};
use crate::ir::{Graph, MICROSOFT, Node, OnnxType, Tensor};

const BLOCK: usize = 32;
/// The integer that stands for 0.
const MIDDLE: u8 = 128;
/// A head further from the embedding than this, relative to its size, is not its rounded form.
const MAX_RELATIVE_ERROR: f64 = 0.25;

/// `QuantizeEmbeddingInt8`: the token embedding in blocks of 32, `scale = max|x| / 127` rounded to the model's type,
/// `q = round(x / scale) + 128` with halves to even.
#[derive(Deserialize)]
pub struct QuantizeEmbedding {}

impl FromArguments for QuantizeEmbedding {}

impl Surgery for QuantizeEmbedding {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &draft.model.graph;
        let Some(index) = embedding(graph).filter(|index| is_op(&graph.nodes[*index], "Gather")) else {
            return Ok(false);
        };
        let node = graph.nodes[index].clone();
        let table = constants(graph)[node.inputs[0].as_str()].clone();
        let fits = matches!(table.dtype(), OnnxType::Float | OnnxType::Float16) && table.shape().len() == 2;
        if !fits || !table.shape()[1].is_multiple_of(BLOCK) || !matches!(node.int("axis")?, None | Some(0)) {
            tracing::warn!("the embedding stays: it is no float matrix with rows of whole blocks of {BLOCK}");
            return Ok(false);
        }
        let [rows, cols] = [table.shape()[0], table.shape()[1]];
        let blocks = cols / BLOCK;
        let mut names = FreshNames::new(graph);
        let [q, s, z] = ["Q8", "scales", "zp"].map(|suffix| names.make(&format!("{}_{suffix}", table.name)));
        let scales = block_scales(&table)?;
        let bytes = table
            .dtype()
            .to_core()
            .and_then(|dtype| dtype.from_f32(&scales))
            .unwrap_or_default();
        let stored = Tensor::inline(&s, table.dtype(), [rows, blocks], bytes)?;
        let rounded = stored.to_f32()?;
        let integers = move || {
            let values = table.to_f32()?;
            let codes = values
                .par_chunks_exact(BLOCK)
                .zip(&rounded)
                .flat_map_iter(|(block, scale)| {
                    let scale = if *scale == 0.0 { 1.0 } else { *scale };
                    block.iter().map(move |value| {
                        ((value / scale).round_ties_even().clamp(-128.0, 127.0) + f32::from(MIDDLE)) as u8
                    })
                });
            Ok(codes.collect())
        };
        let new = Node::new(
            node.name.replace("Gather", "GatherBlockQuantized"),
            "GatherBlockQuantized",
            &[&q, &node.inputs[1], &s, &z],
            &[&node.outputs[0]],
        )
        .in_domain(MICROSOFT)
        .with("bits", 8)
        .with("block_size", BLOCK as i64)
        .with("gather_axis", 0)
        .with("quantize_axis", 1);
        let graph = &mut draft.model.graph;
        graph.nodes[index] = new;
        graph.initializers.push(Tensor::produced(
            &q,
            OnnxType::Uint8,
            [rows, cols],
            Arc::new(integers),
        )?);
        graph.initializers.push(stored);
        graph.initializers.push(Tensor::inline(
            &z,
            OnnxType::Uint8,
            [rows, blocks],
            vec![MIDDLE; rows * blocks],
        )?);
        remove_dead(graph);
        declare_opset(&mut draft.model, MICROSOFT, 1);
        Ok(true)
    }
}

fn block_scales(table: &Tensor) -> Result<Vec<f32>> {
    let values = table.to_f32()?;
    let wrong = values.iter().filter(|value| !value.is_finite()).count();
    if wrong > 0 {
        return Err(Error::NotFinite {
            what: format!("tensor `{}`", table.name),
            found: wrong,
        });
    }
    let largest = |block: &[f32]| block.iter().fold(0f32, |most, value| most.max(value.abs()));
    Ok(values
        .par_chunks_exact(BLOCK)
        .map(|block| largest(block) / 127.0)
        .collect())
}

/// `ShareEmbeddingLmHead`: the head multiplies by the embedding's 8-bit integers. A head that is not the embedding in
/// other integers is refused.
#[derive(Deserialize)]
pub struct ShareHead {}

impl FromArguments for ShareHead {}

impl Surgery for ShareHead {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &draft.model.graph;
        let found = embedding(graph).filter(|index| is_contrib(&graph.nodes[*index], "GatherBlockQuantized"));
        let (Some(look), Some(head)) = (found, head(graph)) else {
            return Ok(false);
        };
        let (embed, old) = (graph.nodes[look].clone(), graph.nodes[head].clone());
        if !is_contrib(&old, "MatMulNBits") || embed.int("bits")? != Some(8) {
            tracing::warn!("the head stays: it is no MatMulNBits, or the embedding has no 8 bits");
            return Ok(false);
        }
        if old.input(2) == embed.input(2) {
            return Ok(false);
        }
        let constants = constants(graph);
        let table = constants
            .get(embed.inputs[0].as_str())
            .map(|tensor| tensor.shape().to_vec())
            .unwrap_or_default();
        let (&[rows, cols], block) = (table.as_slice(), embed.int("block_size")?.unwrap_or(BLOCK as i64))
        else {
            return Ok(false);
        };
        let distance = distance(
            &Packed::of(graph, &embed, [rows, cols])?,
            &Packed::of(graph, &old, [rows, cols])?,
            [rows, cols],
        )?;
        if distance > MAX_RELATIVE_ERROR {
            let what = format!(
                "sharing the embedding with a head that differs from it by {:.0} %",
                distance * 100.0
            );
            return Err(Error::unsupported(what, "the model's embeddings are not tied"));
        }
        let mut new = Node::new(
            format!("{}_shared", old.name),
            "MatMulNBits",
            &[&old.inputs[0], "", &embed.inputs[2]],
            &[&old.outputs[0]],
        )
        .in_domain(MICROSOFT)
        .with("K", cols as i64)
        .with("N", rows as i64);
        new.inputs.extend(embed.input(3).map(str::to_owned));
        if let Some(level) = old.int("accuracy_level")? {
            new = new.with("accuracy_level", level);
        }
        new = new.with("bits", 8).with("block_size", block);
        let graph = &mut draft.model.graph;
        let shape = [rows, cols / (block.max(1) as usize), block.max(1) as usize];
        let value = reshape_for_head(graph, head, &embed.inputs[0], &shape)?;
        new.inputs[1] = value;
        graph.nodes[head + 1] = new;
        remove_dead(graph);
        Ok(true)
    }
}

/// The constants of a quantized node.
struct Packed {
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<f32>,
    block: usize,
    width: usize,
}

impl Packed {
    fn of(graph: &Graph, node: &Node, shape: [usize; 2]) -> Result<Self> {
        let constants = constants(graph);
        let [rows, cols] = shape;
        let places = if node.op_type == "MatMulNBits" {
            [1, 2, 3]
        } else {
            [0, 2, 3]
        };
        let part = |place: usize| node.input(place).and_then(|name| constants.get(name).copied());
        let bits = node.int("bits")?.unwrap_or(4);
        let block = usize::try_from(node.int("block_size")?.unwrap_or(0)).unwrap_or(0);
        let refuse = || {
            Error::unsupported(
                format!("the layout of node `{}`", node.name),
                "4 or 8 bits with integer zero points",
            )
        };
        let (Some(values), Some(scales), true, true) =
            (part(places[0]), part(places[1]), matches!(bits, 4 | 8), block > 0)
        else {
            return Err(refuse());
        };
        let bits = bits as usize;
        let blocks = cols.div_ceil(block);
        let in_row = (blocks * bits).div_ceil(8);
        let zeros = match part(places[2]) {
            None => vec![(1u32 << (bits - 1)) as f32; rows * blocks],
            Some(zeros) if zeros.dtype() == OnnxType::Uint8 && zeros.len() == rows * in_row => zeros
                .bytes()?
                .chunks_exact(in_row)
                .flat_map(|row| unpack(row, bits, blocks))
                .map(f32::from)
                .collect(),
            Some(_) => return Err(refuse()),
        };
        let width = blocks * block;
        if values.len() * 8 != rows * width * bits || scales.len() != rows * blocks {
            return Err(refuse());
        }
        Ok(Self {
            codes: unpack(&values.bytes()?, bits, rows * width),
            scales: scales.to_f32()?,
            zeros,
            block,
            width,
        })
    }

    fn value(&self, row: usize, col: usize) -> f32 {
        let block = row * (self.width / self.block) + col / self.block;
        (f32::from(self.codes[row * self.width + col]) - self.zeros[block]) * self.scales[block]
    }
}

/// The root mean square difference of two matrices, relative to the first.
fn distance(a: &Packed, b: &Packed, shape: [usize; 2]) -> Result<f64> {
    let [rows, cols] = shape;
    let by_row: Vec<(f64, f64)> = (0..rows)
        .into_par_iter()
        .map(|row| {
            (0..cols).fold((0.0, 0.0), |(difference, size), col| {
                let (x, y) = (f64::from(a.value(row, col)), f64::from(b.value(row, col)));
                (difference + (x - y) * (x - y), size + x * x)
            })
        })
        .collect();
    let (difference, size) = by_row
        .into_iter()
        .fold((0.0, 0.0), |sum, row| (sum.0 + row.0, sum.1 + row.1));
    Ok(if size == 0.0 {
        difference
    } else {
        (difference / size).sqrt()
    })
}
