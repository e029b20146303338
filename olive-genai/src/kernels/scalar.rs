//! The plain versions of the block-quantized kernels.

use std::ops::Range;

use super::activation::{FloatActivations, LANES, QuantActivations, unit_elements};
use super::nbits::NBitsWeight;

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
    let mut sums = [0.0f32; LANES];
    for (u, bytes) in packed.chunks(64).enumerate() {
        let blocks = weight.unit_blocks(u);
        let values = &acts.values[(m * acts.units + u) * unit..][..unit];
        let at = (m * acts.units + u) * LANES;
        for (l, bytes) in bytes.chunks(4).enumerate() {
            let block = blocks.start + lane_blocks[l] as usize;
            let mut dot = acts.negative_sums[at + l] * weight.integer_zero_point(n, block);
            for (i, byte) in bytes.iter().enumerate() {
                if weight.bits == 4 {
                    dot += i32::from(byte & 15) * i32::from(values[l * 4 + i]);
                    dot += i32::from(byte >> 4) * i32::from(values[64 + l * 4 + i]);
                } else {
                    dot += i32::from(*byte) * i32::from(values[l * 4 + i]);
                }
            }
            sums[l] = (dot as f32).mul_add(scales[block] * acts.scales[at + l], sums[l]);
        }
    }
    // The order in which vectors add up: halves, until one is left.
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            sums[l] += sums[l + width];
        }
        width /= 2;
    }
    sums[0]
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
