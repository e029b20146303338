//! Round-to-nearest 4-bit blocks, the arithmetic of ONNX Runtime's default quantizer for MatMulNBits.
//!
//! Symmetric: `scale = w / -8` for the element `w` of largest magnitude, its sign kept (the smallest element wins a
//! tie), `q = clip(round(w · (1 / scale)) + 8)`. Asymmetric: the range from the smallest to the largest element, zero
//! included, `scale = (max - min) / 15`, `zero = round(-min / scale)`. All in `f32`; halves round away from zero.

use rayon::prelude::*;

/// Integers, scales and zero points in the order of MatMulNBits.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockQuantized {
    /// `[rows, blocks, block_size / 2]`, two in a byte, the first in the low bits.
    pub values: Vec<u8>,
    /// `[rows, blocks]`.
    pub scales: Vec<f32>,
    /// `[rows, ceil(blocks / 2)]`, two in a byte; empty where every zero point is 8.
    pub zeros: Vec<u8>,
}

/// Quantizes `weight [rows, cols]`. A last block that the row does not fill is padded with integers of 0 that nothing
/// reads.
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
    let blocks = cols.div_ceil(block_size);
    let row_bytes = blocks * block_size / 2;
    let zero_bytes = if symmetric { 0 } else { blocks.div_ceil(2) };
    let mut out = BlockQuantized {
        values: vec![0; rows * row_bytes],
        scales: vec![0.0; rows * blocks],
        zeros: vec![0; rows * zero_bytes],
    };
    let mut no_zeros = vec![[0u8; 0]; if symmetric { rows } else { 0 }];
    let zeros: Vec<&mut [u8]> = match symmetric {
        true => no_zeros.iter_mut().map(|none| none.as_mut_slice()).collect(),
        false => out.zeros.chunks_exact_mut(zero_bytes).collect(),
    };
    let lines = (
        out.values.par_chunks_exact_mut(row_bytes),
        out.scales.par_chunks_exact_mut(blocks),
    );
    let lines = lines
        .into_par_iter()
        .zip(zeros)
        .zip(weight.par_chunks_exact(cols));
    lines.for_each(|(((values, scales), zeros), row)| {
        for (block, chunk) in row.chunks(block_size).enumerate() {
            let (scale, zero) = if symmetric {
                symmetric_grid(chunk)
            } else {
                asymmetric_grid(chunk)
            };
            scales[block] = scale;
            if let Some(byte) = zeros.get_mut(block / 2) {
                *byte |= (zero as u8) << (4 * (block % 2));
            }
            let reciprocal = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            for (i, value) in chunk.iter().enumerate() {
                let q = (value * reciprocal + zero).round().clamp(0.0, 15.0) as u8;
                values[(block * block_size + i) / 2] |= q << (4 * (i % 2));
            }
        }
    });
    out
}

fn symmetric_grid(block: &[f32]) -> (f32, f32) {
    let (min, max) = extremes(block);
    let widest = if max.abs() > min.abs() { max } else { min };
    (widest / -8.0, 8.0)
}

fn asymmetric_grid(block: &[f32]) -> (f32, f32) {
    let (min, max) = extremes(block);
    let (min, max) = (min.min(0.0), max.max(0.0));
    let scale = (max - min) / 15.0;
    let zero = if scale == 0.0 {
        0.0
    } else {
        (-min / scale).round().clamp(0.0, 15.0)
    };
    (scale, zero)
}

fn extremes(block: &[f32]) -> (f32, f32) {
    let fold = |(min, max): (f32, f32), value: &f32| (min.min(*value), max.max(*value));
    block.iter().fold((f32::INFINITY, f32::NEG_INFINITY), fold)
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
}
