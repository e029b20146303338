//! `OnnxBlockWiseRtnQuantization`: round to nearest, the arithmetic of ONNX Runtime's default quantizer.
//!
//! Symmetric: `scale = w / -2^(bits-1)` for the `w` of largest magnitude, its sign kept (the smallest element wins a
//! tie), `q = clip(round(w · (1 / scale)) + 2^(bits-1))`. Asymmetric: from the smallest to the largest element, zero
//! included, `scale = (max - min) / (2^bits - 1)`, `zero = round(-min / scale)`. All in `f32`; halves round away from
//! zero.

use std::sync::Arc;

use olive_core::{Error, ParamKind, ParamSpec, PassConfig, Result};
use rayon::prelude::*;
use serde::Deserialize;

use super::super::params::{ACCURACY_LEVEL, NODES_TO_EXCLUDE, param, with_external_data};
use super::super::{Draft, GraphPass, OnnxPass};
use super::blocks::{BlockQuantizer, Integers, Layout, Zeros};
use super::{Selection, quantize_model};

const PARAMS: [ParamSpec; 12] = with_external_data([
    param("bits", ParamKind::OneOfInt(&[4, 8]), "4", "Bits of a weight."),
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
    param(
        "is_symmetric",
        ParamKind::Bool,
        "true",
        "Whether blocks have no zero point of their own.",
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
pub const PASS: OnnxPass = OnnxPass::new("OnnxBlockWiseRtnQuantization", &PARAMS, parse);

#[derive(Deserialize)]
struct Parameters {
    bits: usize,
    block_size: i64,
    is_symmetric: bool,
    accuracy_level: i64,
    nodes_to_exclude: Option<Vec<String>>,
    nodes_to_include: Option<Vec<String>>,
}

struct RtnPass {
    symmetric: bool,
    selection: Selection,
}

fn parse(origin: &str, config: &PassConfig) -> Result<Box<dyn GraphPass>> {
    let given: Parameters = config.parse(origin)?;
    let selection = Selection {
        include: given.nodes_to_include.map(|names| names.into_iter().collect()),
        exclude: given.nodes_to_exclude.unwrap_or_default(),
        layout: layout(origin, given.bits, given.block_size)?,
        overrides: Default::default(),
        accuracy_level: given.accuracy_level,
        gathers: true,
    };
    Ok(Box::new(RtnPass {
        symmetric: given.is_symmetric,
        selection,
    }))
}

/// A checked layout.
pub(super) fn layout(origin: &str, bits: usize, block_size: i64) -> Result<Layout> {
    let block_size = usize::try_from(block_size).map_err(|_| {
        Error::config(
            origin,
            "block_size",
            "a power of two, at least 16",
            block_size.to_string(),
        )
    })?;
    Layout { bits, block_size }.check(origin)
}

impl GraphPass for RtnPass {
    fn apply(&self, draft: &mut Draft) -> Result<bool> {
        let quantizer: Arc<dyn BlockQuantizer> = Arc::new(Rtn {
            symmetric: self.symmetric,
        });
        quantize_model(&mut draft.model, &quantizer, &self.selection)
    }
}

/// Round to nearest.
pub struct Rtn {
    /// Whether blocks have no zero point of their own.
    pub symmetric: bool,
}

impl BlockQuantizer for Rtn {
    fn zeros(&self) -> Zeros {
        if self.symmetric {
            Zeros::Middle
        } else {
            Zeros::Packed
        }
    }

    fn quantize(&self, weight: &[f32], shape: [usize; 2], layout: Layout) -> Integers {
        by_block(weight, shape, layout, |block, codes| {
            round_to_nearest(block, codes, layout, self.symmetric)
        })
    }
}

/// 2^23.
const SHIFT: f32 = 8_388_608.0;

/// Rounds one block to nearest; scale and zero point.
pub fn round_to_nearest(block: &[f32], codes: &mut [u8], layout: Layout, symmetrical: bool) -> (f32, f32) {
    let (scale, zero) = match symmetrical {
        true => symmetric(block, layout),
        false => asymmetric(block, layout),
    };
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let most = layout.max();
    for (code, value) in codes.iter_mut().zip(block) {
        let exact = (value * inverse + zero).max(0.0).min(most);
        // Beside 2^23 a float has no fraction: the sum rounds halves to even, and its low bits are the integer. One that
        // was rounded down at a half goes up, away from zero.
        let shifted = exact + SHIFT;
        let up = exact - (shifted - SHIFT) >= 0.5;
        *code = shifted.to_bits() as u8 + u8::from(up);
    }
    (scale, zero)
}

/// Quantizes each block on its own with `quantize`, which writes the integers and gives scale and zero point.
pub(super) fn by_block(
    weight: &[f32],
    shape: [usize; 2],
    layout: Layout,
    quantize: impl Fn(&[f32], &mut [u8]) -> (f32, f32) + Sync,
) -> Integers {
    let [rows, cols] = shape;
    let blocks = cols.div_ceil(layout.block_size);
    let width = blocks * layout.block_size;
    let mut out = Integers {
        values: vec![0; rows * width],
        scales: vec![0.0; rows * blocks],
        zeros: vec![0.0; rows * blocks],
    };
    let lines = out
        .values
        .par_chunks_exact_mut(width)
        .zip(out.scales.par_chunks_exact_mut(blocks));
    let lines = lines
        .zip(out.zeros.par_chunks_exact_mut(blocks))
        .zip(weight.par_chunks_exact(cols));
    lines.for_each(|(((codes, scales), zeros), row)| {
        for (index, block) in row.chunks(layout.block_size).enumerate() {
            let codes = &mut codes[index * layout.block_size..];
            (scales[index], zeros[index]) = quantize(block, codes);
        }
    });
    out
}

fn symmetric(block: &[f32], layout: Layout) -> (f32, f32) {
    let (min, max) = extremes(block);
    let middle = (1u32 << (layout.bits - 1)) as f32;
    let widest = if max.abs() > min.abs() { max } else { min };
    (widest / -middle, middle)
}

fn asymmetric(block: &[f32], layout: Layout) -> (f32, f32) {
    let (min, max) = extremes(block);
    let (min, max) = (min.min(0.0), max.max(0.0));
    let scale = (max - min) / layout.max();
    let zero = if scale == 0.0 {
        0.0
    } else {
        (-min / scale).round().clamp(0.0, layout.max())
    };
    (scale, zero)
}

/// The smallest and the largest element.
pub fn extremes(block: &[f32]) -> (f32, f32) {
    const LANES: usize = 8;
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let (chunks, rest) = block.as_chunks::<LANES>();
    for chunk in chunks {
        for ((low, high), value) in low.iter_mut().zip(&mut high).zip(chunk) {
            *low = if *value < *low { *value } else { *low };
            *high = if *value > *high { *value } else { *high };
        }
    }
    let fold = |(min, max): (f32, f32), value: &f32| (min.min(*value), max.max(*value));
    let ends = low.iter().chain(&high).filter(|value| value.is_finite());
    rest.iter()
        .chain(ends)
        .fold((f32::INFINITY, f32::NEG_INFINITY), fold)
}
