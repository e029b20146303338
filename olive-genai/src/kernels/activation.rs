//! Activations rounded to 8 bits, in the order in which the block-quantized kernels read them.
//!
//! Kernels take four values of a row at a time, a *quad*. A step of 4-bit weights holds eight neighbouring elements of
//! an output feature in four bytes, the even ones in the low nibbles: so of every eight values the even ones come
//! first, then the odd ones. For 8-bit weights the order is that of the row.

use super::aligned::Aligned;
use super::isa::{isa, multiversion};
use super::parallel::{self, Parts};

/// Rows that a piece of work rounds.
const ROWS: usize = 8;

/// Activations rounded to 8 bits, a scale for each block: `scale = max|a| / 127`, round half to even.
#[derive(Debug, Default)]
pub struct QuantActivations {
    /// Rows.
    pub rows: usize,
    /// Blocks of a row.
    pub blocks: usize,
    /// Values of a block.
    pub block: usize,
    /// Bits of the weights that the order is made for.
    pub bits: usize,
    /// `[rows, blocks, block]`, zero behind the row's end.
    pub values: Aligned<i8>,
    /// `[rows, blocks]`: the scales.
    pub scales: Aligned<f32>,
    /// `[rows, blocks]`: `−2^(bits − 1)` times the sum of the block's values, what a product with weights around that
    /// number has too much.
    pub centres: Aligned<i32>,
}

impl QuantActivations {
    /// Rounds `[rows, k]` values for weights of `bits` bits in blocks of `block` elements.
    pub fn new(values: &[f32], k: usize, bits: usize, block: usize) -> Self {
        let mut this = Self::default();
        this.fill(values, k, bits, block);
        this
    }

    /// [`QuantActivations::new`] in the same buffers.
    pub fn fill(&mut self, values: &[f32], k: usize, bits: usize, block: usize) {
        let rows = values.len().checked_div(k).unwrap_or(0);
        let blocks = k.div_ceil(block);
        let width = blocks * block;
        (self.rows, self.blocks, self.block, self.bits) = (rows, blocks, block, bits);
        self.values.resize(rows * width);
        self.scales.resize(rows * blocks);
        self.centres.resize(rows * blocks);
        let isa = isa();
        let quantize = if bits == 4 { quantize_row_4 } else { quantize_row_8 };
        let out = Parts::new(&mut self.values);
        let (scales, centres) = (Parts::new(&mut self.scales), Parts::new(&mut self.centres));
        parallel::for_each(rows.div_ceil(ROWS), rows * k, |piece| {
            for row in piece * ROWS..(piece * ROWS + ROWS).min(rows) {
                let of_row = row * blocks..(row + 1) * blocks;
                // SAFETY: every row is done once, and rows do not overlap.
                let (out, scales, centres) = unsafe {
                    (
                        out.slice(row * width..(row + 1) * width),
                        scales.slice(of_row.clone()),
                        centres.slice(of_row),
                    )
                };
                quantize(isa, &values[row * k..(row + 1) * k], out, scales, centres, block);
            }
        });
    }
}

multiversion! {
    fn quantize_row_4(isa; row: &[f32], out: &mut [i8], scales: &mut [f32], centres: &mut [i32], block: usize)
        = quantize_row::<4>
}

multiversion! {
    fn quantize_row_8(isa; row: &[f32], out: &mut [i8], scales: &mut [f32], centres: &mut [i32], block: usize)
        = quantize_row::<8>
}

#[inline(always)]
fn quantize_row<const BITS: usize>(
    row: &[f32],
    out: &mut [i8],
    scales: &mut [f32],
    centres: &mut [i32],
    block: usize,
) {
    for (b, (values, out)) in row.chunks(block).zip(out.chunks_exact_mut(block)).enumerate() {
        let scale = largest_size(values) / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        // Blocks of 32 are the common ones, and a known length makes short vectors of them.
        let sum = match (
            <&[f32; 32]>::try_from(values),
            <&mut [i8; 32]>::try_from(&mut *out),
        ) {
            (Ok(values), Ok(out)) => round_block(values, out, inverse),
            _ => round_block(values, out, inverse),
        };
        if BITS == 4 {
            out.as_chunks_mut::<8>().0.iter_mut().for_each(split_pairs);
        }
        scales[b] = scale;
        centres[b] = -(sum << (BITS - 1));
    }
}

#[inline(always)]
fn round_block(values: &[f32], out: &mut [i8], inverse: f32) -> i32 {
    let mut sum = 0;
    for (out, v) in out.iter_mut().zip(values) {
        let rounded = round(v * inverse);
        sum += i32::from(rounded);
        *out = rounded;
    }
    out[values.len()..].fill(0);
    sum
}

/// The largest absolute value. Sixteen are looked for side by side; their order does not matter.
#[inline(always)]
fn largest_size(values: &[f32]) -> f32 {
    let larger = |m: f32, v: f32| if v.abs() > m { v.abs() } else { m };
    let (parts, rest) = values.as_chunks::<16>();
    let mut largest = [0.0f32; 16];
    for part in parts {
        for i in 0..16 {
            largest[i] = larger(largest[i], part[i]);
        }
    }
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            largest[i] = larger(largest[i], largest[i + width]);
        }
    }
    rest.iter().fold(largest[0], |m, v| larger(m, *v))
}

/// The nearest integer, the even one of two, for sizes up to 127: beside `1.5 · 2^23` floats are one apart, so the
/// addition rounds. A conversion that checks its range would be done one by one.
#[inline(always)]
fn round(v: f32) -> i8 {
    const BESIDE: f32 = 12_582_912.0;
    (v + BESIDE).to_bits().wrapping_sub(BESIDE.to_bits()) as i8
}

/// Moves the even ones of eight values to the front.
#[inline(always)]
fn split_pairs(values: &mut [i8; 8]) {
    let all = u64::from_le_bytes(values.map(|v| v as u8));
    let every_other = |v: u64| {
        let v = v & 0x00ff_00ff_00ff_00ff;
        let v = (v | v >> 8) & 0x0000_ffff_0000_ffff;
        (v | v >> 16) & 0x0000_0000_ffff_ffff
    };
    let split = every_other(all) | every_other(all >> 8) << 32;
    *values = split.to_le_bytes().map(|v| v as i8);
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::*;

    #[test]
    fn rounding_is_to_the_nearest_and_to_even() {
        for i in -127 * 64..=127 * 64 {
            let v = i as f32 / 64.0;
            assert_eq!(round(v), v.round_ties_even() as i8, "{v}");
        }
        assert_eq!(round(f32::NAN), 0);
    }

    #[test]
    fn the_largest_size_is_found_at_every_place() {
        for len in [1, 15, 16, 17, 48, 100] {
            for at in 0..len {
                let mut values = vec![0.5; len];
                values[at] = -3.0;
                assert_eq!(largest_size(&values), 3.0);
            }
        }
    }

    #[test]
    fn every_instruction_set_rounds_alike() {
        let values: Vec<f32> = (0..300).map(|i| ((i * i) as f32 * 0.7).sin() * 5.0).collect();
        for quantize in [quantize_row_4, quantize_row_8] {
            for block in [16, 32, 128] {
                let blocks = values.len().div_ceil(block);
                let run = |isa| {
                    let (mut out, mut scales, mut centres) = (
                        vec![1i8; blocks * block],
                        vec![1.0f32; blocks],
                        vec![1i32; blocks],
                    );
                    quantize(isa, &values, &mut out, &mut scales, &mut centres, block);
                    (out, scales, centres)
                };
                let plain = run(Isa::Scalar);
                for isa in Isa::available() {
                    assert_eq!(run(isa), plain, "{isa:?} {block}");
                }
            }
        }
    }

    #[test]
    fn even_values_go_first_and_sums_are_of_the_block() {
        let values: Vec<f32> = (0..40).map(|i| i as f32 - 20.0).collect();
        let acts = QuantActivations::new(&values, 40, 4, 16);
        assert_eq!((acts.blocks, acts.values.len()), (3, 48));
        for (b, block) in values.chunks(16).enumerate() {
            let scale = block.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0;
            assert_eq!(acts.scales[b], scale);
            let rounded: Vec<i32> = block
                .iter()
                .map(|v| (v / scale).round_ties_even() as i32)
                .collect();
            assert_eq!(acts.centres[b], -8 * rounded.iter().sum::<i32>());
            for (i, want) in rounded.iter().enumerate() {
                let at = b * 16 + i / 8 * 8 + i % 2 * 4 + i % 8 / 2;
                assert_eq!(i32::from(acts.values[at]), *want, "{i}");
            }
        }
        assert!(acts.values[40..].iter().all(|v| *v == 0));
    }
}
