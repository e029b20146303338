//! The plain versions of the block-quantized kernels.

use std::ops::Range;

use super::activation::{FloatActivations, LANES, QuantActivations, unit_elements};
use super::nbits::NBitsWeight;
use super::panel::Panel;

/// Integer products of unpacked features with all rows; `out` is `[features, rows]`.
pub fn panel_piece(bits: usize, panel: &Panel, acts: &QuantActivations, out: &mut [f32]) {
    for (n, out) in (0..panel.features).zip(out.chunks_exact_mut(acts.rows)) {
        for (m, out) in out.iter_mut().enumerate() {
            *out = if bits == 4 {
                panel_dot::<4>(panel, n, acts, m)
            } else {
                panel_dot::<8>(panel, n, acts, m)
            };
        }
    }
}

/// Feature `n` of the panel with row `m`. Loops have fixed lengths, so that the compiler makes vectors of them.
fn panel_dot<const BITS: usize>(panel: &Panel, n: usize, acts: &QuantActivations, m: usize) -> f32 {
    let unit = unit_elements(BITS);
    let mut sums = [0.0f32; LANES];
    for u in 0..panel.units {
        let (at, row_at) = (n * panel.units + u, m * acts.units + u);
        let zeros = &panel.zeros[at * LANES..][..LANES];
        let scales = &panel.scales[at * LANES..][..LANES];
        let negative = &acts.negative_sums[row_at * LANES..][..LANES];
        let row_scales = &acts.scales[row_at * LANES..][..LANES];
        let mut dots = [0i32; LANES];
        for l in 0..LANES {
            dots[l] = negative[l] * zeros[l];
        }
        let elements = panel.elements[at * unit..][..unit].as_chunks::<64>().0;
        let values = acts.values[row_at * unit..][..unit].as_chunks::<64>().0;
        for (elements, values) in elements.iter().zip(values) {
            // At most 255 · 127 each, which fits 16 bits.
            let mut products = [0i16; 64];
            for i in 0..64 {
                products[i] = i16::from(elements[i]) * i16::from(values[i]);
            }
            for (dot, four) in dots.iter_mut().zip(products.as_chunks::<4>().0) {
                *dot += four.iter().map(|p| i32::from(*p)).sum::<i32>();
            }
        }
        for l in 0..LANES {
            sums[l] = (dots[l] as f32).mul_add(scales[l] * row_scales[l], sums[l]);
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
