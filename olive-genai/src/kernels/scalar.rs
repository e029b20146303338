//! The plain versions of the block-quantized kernels.

use std::ops::Range;

use super::activation::{FloatActivations, LANES, QuantActivations, unit_elements};
use super::nbits::{NBitsWeight, ZeroPoints};

/// See [`NBitsWeight::matmul`]; `out` is `[features, rows]`.
pub fn integer_piece(weight: &NBitsWeight, features: Range<usize>, acts: &QuantActivations, out: &mut [f32]) {
    for (n, out) in features.zip(out.chunks_exact_mut(acts.rows)) {
        for (m, out) in out.iter_mut().enumerate() {
            *out = integer_dot(weight, n, acts, m);
        }
    }
}

fn integer_dot(weight: &NBitsWeight, n: usize, acts: &QuantActivations, m: usize) -> f32 {
    let unit = unit_elements(weight.bits);
    let (packed, scales, lane_blocks) = (weight.row(n), weight.row_scales(n), weight.lane_blocks());
    let mut sum = 0.0;
    for (u, bytes) in packed.chunks(64).enumerate() {
        let blocks = weight.unit_blocks(u);
        let values = &acts.values[(m * acts.units + u) * unit..][..unit];
        let at = (m * acts.units + u) * LANES;
        for (l, bytes) in bytes.chunks(4).enumerate() {
            let block = blocks.start + lane_blocks[l] as usize;
            let zero = match &weight.zero_points {
                ZeroPoints::Bytes(bytes) => i32::from(bytes[n * weight.blocks + block]),
                _ => weight.zero_point(n, block) as i32,
            };
            let mut dot = acts.negative_sums[at + l] * zero;
            for (i, byte) in bytes.iter().enumerate() {
                if weight.bits == 4 {
                    dot += i32::from(byte & 15) * i32::from(values[l * 4 + i]);
                    dot += i32::from(byte >> 4) * i32::from(values[64 + l * 4 + i]);
                } else {
                    dot += i32::from(*byte) * i32::from(values[l * 4 + i]);
                }
            }
            sum += dot as f32 * (scales[block] * acts.scales[at + l]);
        }
    }
    sum
}

/// See [`NBitsWeight::matmul`]; `out` is `[features, rows]`.
pub fn float_piece(weight: &NBitsWeight, features: Range<usize>, acts: &FloatActivations, out: &mut [f32]) {
    for (n, out) in features.zip(out.chunks_exact_mut(acts.rows)) {
        for (m, out) in out.iter_mut().enumerate() {
            *out = float_dot(weight, n, &acts.values[m * acts.width..(m + 1) * acts.width]);
        }
    }
}

fn float_dot(weight: &NBitsWeight, n: usize, values: &[f32]) -> f32 {
    let (packed, scales) = (weight.row(n), weight.row_scales(n));
    let block_bytes = weight.block * weight.bits / 8;
    let mut sum = 0.0;
    for (b, bytes) in packed.chunks_exact(block_bytes).enumerate() {
        let zero = weight.zero_point(n, b);
        let mut dot = 0.0;
        for (i, byte) in bytes.iter().enumerate() {
            let at = b * block_bytes + i;
            if weight.bits == 4 {
                let even = at / 16 * 32 + at % 16;
                let Some(pair) = values.get(even..).filter(|v| v.len() > 16) else {
                    break;
                };
                dot += (f32::from(byte & 15) - zero) * pair[0] + (f32::from(byte >> 4) - zero) * pair[16];
            } else {
                let Some(value) = values.get(at) else { break };
                dot += (f32::from(*byte) - zero) * value;
            }
        }
        sum += dot * scales[b];
    }
    sum
}
