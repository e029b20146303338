//! Dense rows to blocks of integers, a row at a time, with the arithmetic of onnxruntime-genai's builder.
//!
//! - *default* is ONNX Runtime's own: the element of largest magnitude is the lowest integer (see
//!   [`crate::passes`]'s block-wise round to nearest, which is the same);
//! - *rtn* is neural-compressor's: `scale = 2 · max |w| / (2^bits - 1)` in `f64`, `q = round(w / scale + zero)`, halves to
//!   even; asymmetric from the smallest to the largest element, zero not included;
//! - *k_quant* is the weighted least squares of [`crate::passes`]'s k-quant.

use rayon::prelude::*;

use super::options::Algorithm;
use crate::passes::blocks::{self, Layout};

/// Integers, scales and zero points in the order of MatMulNBits.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockQuantized {
    /// `[rows, blocks, block_size · bits / 8]`, the first in the low bits.
    pub values: Vec<u8>,
    /// `[rows, blocks]`.
    pub scales: Vec<f32>,
    /// `[rows, ceil(blocks · bits / 8)]`, packed as the values; empty where every zero point is the middle.
    pub zeros: Vec<u8>,
}

/// How a weight is quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Method {
    /// How blocks are rounded.
    pub algorithm: Algorithm,
    /// 4 or 8.
    pub bits: usize,
    /// Inputs that share a scale.
    pub block_size: usize,
    /// Whether every zero point is the middle; k-quant has zero points of its own all the same.
    pub symmetric: bool,
}

impl Method {
    /// Whether zero points are stored.
    pub fn has_zeros(self) -> bool {
        !self.symmetric || self.algorithm == Algorithm::KQuant
    }

    /// Quantizes one block of at most `block_size` elements; scale and zero point.
    fn block(self, block: &[f32], codes: &mut [u8]) -> (f32, f32) {
        let layout = Layout {
            bits: self.bits,
            block_size: self.block_size,
        };
        match self.algorithm {
            Algorithm::Default => blocks::round_to_nearest(block, codes, layout, self.symmetric),
            Algorithm::Rtn => neural_rtn(block, codes, layout, self.symmetric),
            Algorithm::KQuant => blocks::k_quant(block, codes, layout),
        }
    }
}

/// Quantizes a weight `[rows, cols]` whose rows `read` gives. A last block that a row does not fill is padded, with
/// integers that nothing reads.
pub fn quantize_rows(
    shape: [usize; 2],
    method: Method,
    read: &(dyn Fn(usize, &mut [f32]) + Sync),
) -> BlockQuantized {
    let [rows, cols] = shape;
    let Method { bits, block_size, .. } = method;
    let blocks = cols.div_ceil(block_size);
    let row_bytes = blocks * block_size * bits / 8;
    let zero_bytes = match method.has_zeros() {
        true => (blocks * bits).div_ceil(8),
        false => 0,
    };
    let mut out = BlockQuantized {
        values: vec![0; rows * row_bytes],
        scales: vec![0.0; rows * blocks],
        zeros: vec![0; rows * zero_bytes],
    };
    // The reference pads weights with zeros before all but its own arithmetic.
    let padded = match method.algorithm {
        Algorithm::Default => cols,
        Algorithm::Rtn | Algorithm::KQuant => blocks * block_size,
    };
    let mut no_zeros = vec![[0u8; 0]; if zero_bytes == 0 { rows } else { 0 }];
    let zeros: Vec<&mut [u8]> = match zero_bytes {
        0 => no_zeros.iter_mut().map(|none| none.as_mut_slice()).collect(),
        width => out.zeros.chunks_exact_mut(width).collect(),
    };
    let lines = out
        .values
        .par_chunks_exact_mut(row_bytes)
        .zip(out.scales.par_chunks_exact_mut(blocks))
        .zip(zeros)
        .enumerate();
    lines.for_each_init(
        || (vec![0f32; padded], vec![0u8; block_size]),
        |(values, codes), (row, ((bytes, scales), zeros))| {
            read(row, &mut values[..cols]);
            let packed = bytes.chunks_exact_mut(block_size * bits / 8);
            for (index, (block, bytes)) in values.chunks(block_size).zip(packed).enumerate() {
                let (scale, zero) = method.block(block, codes);
                codes[block.len()..].fill(0);
                scales[index] = scale;
                match bits {
                    4 => {
                        if let Some(byte) = zeros.get_mut(index / 2) {
                            *byte |= (zero as u8) << (4 * (index % 2));
                        }
                        for (byte, pair) in bytes.iter_mut().zip(codes.as_chunks::<2>().0) {
                            *byte = pair[0] | (pair[1] << 4);
                        }
                    }
                    _ => {
                        if let Some(byte) = zeros.get_mut(index) {
                            *byte = zero as u8;
                        }
                        bytes.copy_from_slice(codes);
                    }
                }
            }
        },
    );
    out
}

/// Quantizes `weight [rows, cols]` to 4 bits with ONNX Runtime's own arithmetic.
///
/// # Panics
/// If `weight` is not `rows · cols` long or `block_size` is odd.
pub fn quantize_blocks(
    weight: &[f32],
    shape: [usize; 2],
    block_size: usize,
    symmetric: bool,
) -> BlockQuantized {
    let [rows, cols] = shape;
    assert_eq!(weight.len(), rows * cols, "invariant: a full matrix");
    assert!(block_size.is_multiple_of(2), "invariant: whole bytes");
    let method = Method {
        algorithm: Algorithm::Default,
        bits: 4,
        block_size,
        symmetric,
    };
    quantize_rows(shape, method, &|row, out| {
        out.copy_from_slice(&weight[row * cols..(row + 1) * cols]);
    })
}

/// Neural-compressor's round to nearest, in `f64`.
fn neural_rtn(block: &[f32], codes: &mut [u8], layout: Layout, symmetric: bool) -> (f32, f32) {
    let (min, max) = blocks::extremes(block);
    let most = f64::from(layout.max());
    let (scale, zero) = if symmetric {
        let range = min.abs().max(max.abs());
        let scale = if range > 0.0 {
            f64::from(range * 2.0) / most
        } else {
            1.0
        };
        (scale, f64::from(1u32 << (layout.bits - 1)))
    } else {
        let scale = if min == max {
            1.0
        } else {
            f64::from(max - min) / most
        };
        let zero = ((0.0 - f64::from(min)) / scale)
            .round_ties_even()
            .clamp(0.0, most);
        (scale, zero)
    };
    for (code, value) in codes.iter_mut().zip(block) {
        let exact = f64::from(*value) / scale + zero;
        *code = exact.round_ties_even().clamp(0.0, most) as u8;
    }
    (scale as f32, zero as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The plainest form, a block at a time and one integer a byte.
    fn reference(block: &[f32], symmetric: bool) -> (Vec<u8>, f32, u8) {
        let min = block.iter().copied().fold(f32::INFINITY, f32::min);
        let max = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (scale, zero) = if symmetric {
            ((if max.abs() > min.abs() { max } else { min }) / -8.0, 8.0)
        } else {
            let scale = (max.max(0.0) - min.min(0.0)) / 15.0;
            (
                scale,
                if scale > 0.0 {
                    (-min.min(0.0) / scale).round()
                } else {
                    0.0
                },
            )
        };
        let quantize = |w: &f32| {
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            (w * inverse + zero).round().clamp(0.0, 15.0) as u8
        };
        (block.iter().map(quantize).collect(), scale, zero as u8)
    }

    fn weights(count: usize) -> Vec<f32> {
        (0..count)
            .map(|i| ((i * 7919 % 1013) as f32 - 500.0) / 300.0)
            .collect()
    }

    #[test]
    fn every_block_is_the_reference() {
        for (rows, cols, block_size) in [
            (1, 32, 32),
            (3, 64, 16),
            (5, 96, 32),
            (2, 40, 32),
            (4, 256, 128),
            (2, 33, 16),
        ] {
            let weight = weights(rows * cols);
            for symmetric in [true, false] {
                let blocks = cols.div_ceil(block_size);
                let got = quantize_blocks(&weight, [rows, cols], block_size, symmetric);
                for (row, line) in weight.chunks(cols).enumerate() {
                    for (block, chunk) in line.chunks(block_size).enumerate() {
                        let (values, scale, zero) = reference(chunk, symmetric);
                        assert_eq!(got.scales[row * blocks + block], scale);
                        for (i, value) in values.iter().enumerate() {
                            let at = (row * blocks + block) * block_size + i;
                            assert_eq!((got.values[at / 2] >> (4 * (at % 2))) & 15, *value);
                        }
                        if !symmetric {
                            let byte = got.zeros[row * blocks.div_ceil(2) + block / 2];
                            assert_eq!((byte >> (4 * (block % 2))) & 15, zero);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_block_of_zeros_stays_zero() {
        for symmetric in [true, false] {
            let got = quantize_blocks(&[0.0; 32], [1, 32], 32, symmetric);
            let zero = if symmetric {
                8.0
            } else {
                f32::from(got.zeros[0] & 15)
            };
            assert!(
                got.values
                    .iter()
                    .all(|byte| (f32::from(byte & 15) - zero) * got.scales[0] == 0.0)
            );
        }
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let weight = weights(64 * 128);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| quantize_blocks(&weight, [64, 128], 32, false))
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn neural_compressors_grid_is_even_around_the_middle() {
        let method = |symmetric, bits| Method {
            algorithm: Algorithm::Rtn,
            bits,
            block_size: 16,
            symmetric,
        };
        let weight = weights(3 * 40);
        for (bits, symmetric) in [(4, true), (8, true), (4, false), (8, false)] {
            let got = quantize_rows([3, 40], method(symmetric, bits), &|row, out| {
                out.copy_from_slice(&weight[row * 40..(row + 1) * 40]);
            });
            let most = f64::from((1u32 << bits) - 1);
            for row in 0..3 {
                for block in 0..3 {
                    let mut padded = weight[row * 40..(row + 1) * 40].to_vec();
                    padded.resize(48, 0.0);
                    let part = &padded[block * 16..(block + 1) * 16];
                    let max = part.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let min = part.iter().copied().fold(f32::INFINITY, f32::min);
                    let scale = match symmetric {
                        true => f64::from(2.0 * max.max(-min)) / most,
                        false => f64::from(max - min) / most,
                    };
                    assert_eq!(got.scales[row * 3 + block], scale as f32);
                    let zero = match symmetric {
                        true => f64::from(1 << (bits - 1)),
                        false => (-f64::from(min) / scale).round_ties_even().clamp(0.0, most),
                    };
                    for (i, value) in part.iter().enumerate().take(40 - block * 16) {
                        let at = (row * 3 + block) * 16 + i;
                        let code = match bits {
                            4 => (got.values[at / 2] >> (4 * (at % 2))) & 15,
                            _ => got.values[at],
                        };
                        let back = (f64::from(code) - zero) * scale;
                        let room = if symmetric || min <= 0.0 && max >= 0.0 {
                            0.51
                        } else {
                            1e9
                        };
                        assert!(
                            (back - f64::from(*value)).abs() <= room * scale,
                            "{bits} {symmetric}"
                        );
                    }
                }
            }
        }
    }
}
