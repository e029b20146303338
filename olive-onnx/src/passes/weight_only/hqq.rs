//! `OnnxHqqQuantization`: half-quadratic quantization (<https://mobiusml.github.io/hqq_blog/>), 4 bits with zero points
//! that are floats. No calibration.
//!
//! With the inverse scale `s = min(15 / (max - min), 2e4)` and `z = round(-min · s)` of a block, up to 20 times:
//! `q = clip(round(w·s + z))`, `r = (q - z) / s`, `e = shrink(w - r)`, `z = mean(q - (w - e)·s)` over the block, where
//! `shrink(x) = sign(x) · relu(|x| - (|x| + 1e-8)^(-0.3) / β)` and `β` grows from 10 by 1 % a time. It ends when the mean
//! of `|w - r|` over the weight no longer falls; the `z` of that turn is kept, as the reference does. In `f32`, means in
//! `f64` in a fixed order; halves round to even. The stored scale is `1 / s`.

use std::sync::Arc;

use olive_core::{ParamKind, ParamSpec, PassConfig, Result};
use rayon::prelude::*;
use serde::Deserialize;

use super::super::params::{ACCURACY_LEVEL, NODES_TO_EXCLUDE, param, with_external_data};
use super::super::{Draft, GraphPass, OnnxPass};
use super::blocks::{BlockQuantizer, Integers, Layout, Zeros};
use super::rtn::layout;
use super::{Selection, quantize_model};

const PARAMS: [ParamSpec; 10] = with_external_data([
    param(
        "block_size",
        ParamKind::Int,
        "128",
        "Inputs that share a scale: a power of two, at least 16.",
    ),
    param(
        "axis",
        ParamKind::OneOfInt(&[0]),
        "0",
        "The axis of a weight `[in, out]` along which blocks lie; only the inputs.",
    ),
    ACCURACY_LEVEL,
    NODES_TO_EXCLUDE,
    param(
        "nodes_to_include",
        ParamKind::TextList,
        "null",
        "Names of the only nodes to quantize.",
    ),
]);

/// The pass.
pub const PASS: OnnxPass = OnnxPass::new("OnnxHqqQuantization", &PARAMS, parse);

#[derive(Deserialize)]
struct Parameters {
    block_size: i64,
    accuracy_level: i64,
    nodes_to_exclude: Option<Vec<String>>,
    nodes_to_include: Option<Vec<String>>,
}

struct HqqPass {
    selection: Selection,
}

fn parse(origin: &str, config: &PassConfig) -> Result<Box<dyn GraphPass>> {
    let given: Parameters = config.parse(origin)?;
    let selection = Selection {
        include: given.nodes_to_include.map(|names| names.into_iter().collect()),
        exclude: given.nodes_to_exclude.unwrap_or_default(),
        layout: layout(origin, 4, given.block_size)?,
        overrides: Default::default(),
        accuracy_level: given.accuracy_level,
        gathers: false,
    };
    Ok(Box::new(HqqPass { selection }))
}

impl GraphPass for HqqPass {
    fn apply(&self, draft: &mut Draft) -> Result<bool> {
        let quantizer: Arc<dyn BlockQuantizer> = Arc::new(Hqq);
        quantize_model(&mut draft.model, &quantizer, &self.selection)
    }
}

/// The iteration.
pub struct Hqq;

const ITERATIONS: usize = 20;
const MAX_INVERSE_SCALE: f32 = 2e4;
const FIRST_BETA: f64 = 10.0;
const BETA_GROWTH: f64 = 1.01;
/// The norm's exponent is 0.7; the shrinkage has it less one.
const SHRINK_EXPONENT: f32 = 0.7 - 1.0;

impl BlockQuantizer for Hqq {
    fn zeros(&self) -> Zeros {
        Zeros::Float
    }

    fn quantize(&self, weight: &[f32], shape: [usize; 2], layout: Layout) -> Integers {
        let [_, cols] = shape;
        let size = layout.block_size;
        let width = cols.div_ceil(size) * size;
        let padded: Vec<f32> = weight
            .par_chunks_exact(cols)
            .flat_map_iter(|row| row.iter().copied().chain(std::iter::repeat_n(0.0, width - cols)))
            .collect();
        let blocks = padded.par_chunks_exact(size);
        let start: Vec<(f32, f32)> = blocks.map(|block| first_grid(block, layout.max())).collect();
        let (scales, mut zeros): (Vec<f32>, Vec<f32>) = start.into_iter().unzip();
        let mut beta = FIRST_BETA;
        let mut best = 1e4;
        for _ in 0..ITERATIONS {
            let turn = padded.par_chunks_exact(size).zip(scales.par_iter().zip(&zeros));
            let turn: Vec<(f32, f64)> = turn
                .map(|(block, (scale, zero))| refine(block, *scale, *zero, layout.max(), beta as f32))
                .collect();
            let error = turn.iter().map(|(_, error)| error).sum::<f64>() / padded.len() as f64;
            zeros = turn.into_iter().map(|(zero, _)| zero).collect();
            beta *= BETA_GROWTH;
            if error >= best {
                break;
            }
            best = error;
        }
        let grids = scales.par_iter().zip(&zeros).zip(padded.par_chunks_exact(size));
        let values = grids.flat_map_iter(|((scale, zero), block)| {
            let (scale, zero, most) = (*scale, *zero, layout.max());
            block
                .iter()
                .map(move |value| code(*value, scale, zero, most) as u8)
        });
        Integers {
            values: values.collect(),
            scales: scales.iter().map(|scale| 1.0 / scale).collect(),
            zeros,
        }
    }
}

fn first_grid(block: &[f32], most: f32) -> (f32, f32) {
    let min = block.iter().copied().fold(f32::INFINITY, f32::min);
    let max = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let range = if max == min { most } else { max - min };
    let scale = (most / range).min(MAX_INVERSE_SCALE);
    (scale, (-min * scale).round_ties_even())
}

fn code(value: f32, scale: f32, zero: f32, most: f32) -> f32 {
    (value * scale + zero).round_ties_even().clamp(0.0, most)
}

/// The next zero point of a block, and the sum of its absolute errors at this one.
fn refine(block: &[f32], scale: f32, zero: f32, most: f32, beta: f32) -> (f32, f64) {
    let (mut sum, mut error) = (0f64, 0f64);
    for value in block {
        let q = code(*value, scale, zero, most);
        let difference = value - (q - zero) / scale;
        let size = difference.abs();
        let shrunk = (size - (1.0 / beta) * (size + 1e-8).powf(SHRINK_EXPONENT)).max(0.0);
        let expected = if difference < 0.0 { -shrunk } else { shrunk };
        sum += f64::from(q - (value - expected) * scale);
        error += f64::from(size);
    }
    ((sum / block.len() as f64) as f32, error)
}
