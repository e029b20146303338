//! `OnnxKQuantQuantization`: for each block the scale and minimum, out of 20 ranges around the block's own, with the
//! least weighted squared error, as ONNX Runtime's k-quant does it.
//!
//! With `m = 2^bits - 1`, weights `w = sqrt(mean x²) + |x|` and the current minimum `r`, candidate `i` takes
//! `l = clip(round((m - 1 + 0.1 i) / (max - r) · (x - r)))`, solves the weighted least squares of `x ≈ s·l + r` for
//! `s` and `r`, and replaces both if the error falls. At the end `zero = clip(round(-r / s))`,
//! `q = clip(round(x / s + zero))`, the last in `f64`. Halves round to even; the range is not extended to zero.
//!
//! Sums are taken in the order of NumPy's pairwise summation: blocks of 16 and 32 get the reference's very bits; in
//! larger ones its order depends on the processor, and scales may differ in the last bit. A short last block is padded
//! with zeros, as in the reference. One deviation: a block of one value that is not zero, which the reference rounds at
//! scale 1, is kept exactly.

use std::collections::HashMap;
use std::sync::Arc;

use olive_core::{Error, ParamKind, ParamSpec, PassConfig, Result};
use serde::Deserialize;

use super::super::params::{ACCURACY_LEVEL, NODES_TO_EXCLUDE, param, with_external_data};
use super::super::{Draft, GraphPass, OnnxPass};
use super::blocks::{BlockQuantizer, Integers, Layout, Zeros};
use super::rtn::{by_block, layout};
use super::{Selection, quantize_model};

const PARAMS: [ParamSpec; 10] = with_external_data([
    param("bits", ParamKind::OneOfInt(&[4, 8]), "4", "Bits of a weight."),
    param(
        "block_size",
        ParamKind::Int,
        "32",
        "Inputs that share a scale: a power of two, at least 16.",
    ),
    ACCURACY_LEVEL,
    param(
        "customized_weight_config",
        ParamKind::Object,
        "null",
        "Other `bits` and `group_size` for some nodes, by name.",
    ),
    NODES_TO_EXCLUDE,
]);

/// The pass.
pub const PASS: OnnxPass = OnnxPass::new("OnnxKQuantQuantization", &PARAMS, parse);

#[derive(Deserialize)]
struct Parameters {
    bits: usize,
    block_size: i64,
    accuracy_level: i64,
    customized_weight_config: Option<HashMap<String, Override>>,
    nodes_to_exclude: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Override {
    bits: Option<usize>,
    group_size: Option<i64>,
}

struct KQuantPass {
    selection: Selection,
}

fn parse(origin: &str, config: &PassConfig) -> Result<Box<dyn GraphPass>> {
    let given: Parameters = config.parse(origin).map_err(|error| {
        Error::config(
            origin,
            "customized_weight_config",
            "nodes with bits and group_size",
            error.to_string(),
        )
    })?;
    let mut overrides = HashMap::new();
    for (node, other) in given.customized_weight_config.unwrap_or_default() {
        let (bits, block_size) = (
            other.bits.unwrap_or(given.bits),
            other.group_size.unwrap_or(given.block_size),
        );
        overrides.insert(node, layout(origin, bits, block_size)?);
    }
    let selection = Selection {
        include: None,
        exclude: given.nodes_to_exclude.unwrap_or_default(),
        layout: layout(origin, given.bits, given.block_size)?,
        overrides,
        accuracy_level: given.accuracy_level,
        gathers: false,
    };
    Ok(Box::new(KQuantPass { selection }))
}

impl GraphPass for KQuantPass {
    fn apply(&self, draft: &mut Draft) -> Result<bool> {
        let quantizer: Arc<dyn BlockQuantizer> = Arc::new(KQuant);
        quantize_model(&mut draft.model, &quantizer, &self.selection)
    }
}

/// The search.
pub struct KQuant;

/// Ranges that are tried.
const CANDIDATES: usize = 20;

impl BlockQuantizer for KQuant {
    fn zeros(&self) -> Zeros {
        Zeros::Packed
    }

    fn quantize(&self, weight: &[f32], shape: [usize; 2], layout: Layout) -> Integers {
        by_block(weight, shape, layout, |block, codes| {
            quantize_block(block, codes, layout)
        })
    }
}

/// Quantizes one block, padded with zeros if it is short; scale and zero point.
pub fn quantize_block(block: &[f32], codes: &mut [u8], layout: Layout) -> (f32, f32) {
    let (scale, zero) = match block.len() == layout.block_size {
        true => search(block, layout.max()),
        false => {
            let mut padded = block.to_vec();
            padded.resize(layout.block_size, 0.0);
            search(&padded, layout.max())
        }
    };
    for (code, value) in codes.iter_mut().zip(block) {
        let q = f64::from(*value) / f64::from(scale) + f64::from(zero);
        *code = q.round_ties_even().clamp(0.0, f64::from(layout.max())) as u8;
    }
    (scale, zero)
}

fn search(x: &[f32], most: f32) -> (f32, f32) {
    let n = x.len();
    let sum = |f: &dyn Fn(usize) -> f32| pairwise_sum(&(0..n).map(f).collect::<Vec<f32>>());
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut min = x.iter().copied().fold(f32::INFINITY, f32::min);
    if min == max {
        return constant_block(min, most);
    }
    let average = (sum(&|i| x[i] * x[i]) / n as f32).sqrt();
    let w: Vec<f32> = x.iter().map(|value| average + value.abs()).collect();
    let sum_w = pairwise_sum(&w);
    let sum_x = sum(&|i| w[i] * x[i]);
    let inverse = most / (max - min);
    let mut scale = 1.0 / inverse;
    let levels = |inverse: f32, min: f32| -> Vec<f32> {
        x.iter()
            .map(|value| (inverse * (value - min)).round_ties_even().clamp(0.0, most))
            .collect()
    };
    let error = |l: &[f32], scale: f32, min: f32| {
        sum(&|i| {
            let difference = scale * l[i] + min - x[i];
            w[i] * (difference * difference)
        })
    };
    let mut best = error(&levels(inverse, min), scale, min);
    for candidate in 0..CANDIDATES {
        if min == max {
            break;
        }
        let factor = (-1.0 + 0.1 * candidate as f64 + f64::from(most)) as f32;
        let l = levels(factor / (max - min), min);
        let weighted: Vec<f32> = w.iter().zip(&l).map(|(w, l)| w * l).collect();
        let sum_l = pairwise_sum(&weighted);
        let sum_l2 = sum(&|i| weighted[i] * l[i]);
        let sum_xl = sum(&|i| weighted[i] * x[i]);
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        let this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let this_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        let this = error(&l, this_scale, this_min);
        if this < best {
            (best, scale, min) = (this, this_scale, this_min);
        }
    }
    (scale, (-min / scale).round_ties_even().clamp(0.0, most))
}

/// Scale and zero point at which a block of one value is exact.
fn constant_block(value: f32, most: f32) -> (f32, f32) {
    if value == 0.0 {
        (1.0, 0.0)
    } else if value > 0.0 {
        (value / most, 0.0)
    } else {
        (-value / most, most)
    }
}

/// The sum in the order that NumPy takes it: eight running sums up to 128 elements, halves beyond.
fn pairwise_sum(values: &[f32]) -> f32 {
    let n = values.len();
    if n < 8 {
        return values.iter().fold(0.0, |sum, value| sum + value);
    }
    if n > 128 {
        let half = n / 2 - (n / 2) % 8;
        return pairwise_sum(&values[..half]) + pairwise_sum(&values[half..]);
    }
    let mut r = [0f32; 8];
    r.copy_from_slice(&values[..8]);
    let mut chunks = values[8..].chunks_exact(8);
    for chunk in &mut chunks {
        for (sum, value) in r.iter_mut().zip(chunk) {
            *sum += value;
        }
    }
    let total = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
    chunks.remainder().iter().fold(total, |sum, value| sum + value)
}
