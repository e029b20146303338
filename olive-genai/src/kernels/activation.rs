//! Activations in the order in which the block-quantized kernels read them.
//!
//! A *unit* is what 64 bytes of packed weights cover: 128 elements of 4 bits or 64 of 8 bits. A packed byte holds two
//! neighbouring 4-bit elements, so for 4 bits the even elements of a unit come first, then the odd ones. A unit has 16
//! *lanes*; a lane is the elements of four packed bytes, the piece that one 32-bit sum of a vector holds.

use rayon::prelude::*;

use super::aligned::Aligned;
use super::isa::{isa, multiversion};

/// Lanes of a unit.
pub const LANES: usize = 16;

/// Rows that a thread rounds at least.
const ROWS: usize = 8;

/// Elements of a unit.
pub const fn unit_elements(bits: usize) -> usize {
    512 / bits
}

/// Activations rounded to 8 bits, a scale for each block: `scale = max|a| / 127`, round half to even.
#[derive(Debug, Default)]
pub struct QuantActivations {
    /// Rows.
    pub rows: usize,
    /// Units of a row.
    pub units: usize,
    /// `[rows, units, unit]`, zero behind the row's end.
    pub values: Aligned<i8>,
    /// `[rows, units, 16]`: minus the sum of the lane's values.
    pub negative_sums: Aligned<i32>,
    /// `[rows, units, 16]`: the scale of the lane's block.
    pub scales: Aligned<f32>,
}

impl QuantActivations {
    /// Rounds `[rows, k]` values for weights of `bits` bits in blocks of `block` elements.
    pub fn new(values: &[f32], k: usize, bits: usize, block: usize) -> Self {
        let rows = values.len().checked_div(k).unwrap_or(0);
        let unit = unit_elements(bits);
        let units = k.next_multiple_of(block).div_ceil(unit);
        let mut this = Self {
            rows,
            units,
            values: Aligned::new(rows * units * unit),
            negative_sums: Aligned::new(rows * units * LANES),
            scales: Aligned::new(rows * units * LANES),
        };
        let isa = isa();
        let lanes = (units * LANES).max(1);
        let quantize = if bits == 4 { quantize_row_4 } else { quantize_row_8 };
        if rows == 1 {
            let (scales, sums) = (&mut this.scales, &mut this.negative_sums);
            quantize(isa, &values[..k], &mut this.values, scales, sums, block);
        } else {
            let values = values.par_chunks_exact(k.max(1));
            let quantized = this.values.par_chunks_exact_mut((units * unit).max(1));
            let scales = this.scales.par_chunks_exact_mut(lanes);
            let sums = this.negative_sums.par_chunks_exact_mut(lanes);
            let rows = values.zip(quantized).zip(scales.zip(sums));
            rows.with_min_len(ROWS)
                .for_each(|((row, quantized), (scales, sums))| {
                    quantize(isa, row, quantized, scales, sums, block);
                });
        }
        this
    }
}

multiversion! {
    fn quantize_row_4(isa; row: &[f32], out: &mut [i8], scales: &mut [f32], sums: &mut [i32], block: usize)
        = quantize_row::<4>
}

multiversion! {
    fn quantize_row_8(isa; row: &[f32], out: &mut [i8], scales: &mut [f32], sums: &mut [i32], block: usize)
        = quantize_row::<8>
}

#[inline(always)]
fn quantize_row<const BITS: usize>(
    row: &[f32],
    out: &mut [i8],
    scales: &mut [f32],
    sums: &mut [i32],
    block: usize,
) {
    let unit = unit_elements(BITS);
    let lane = unit / LANES;
    for (b, (values, out)) in row.chunks(block).zip(out.chunks_mut(block)).enumerate() {
        let scale = largest_size(values) / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        for (out, v) in out.iter_mut().zip(values) {
            *out = round(v * inverse);
        }
        let start = b * block;
        let lanes = start / lane..(start + block).div_ceil(lane).min(scales.len());
        scales[lanes].fill(scale);
    }
    for (values, sums) in out.chunks_exact_mut(unit).zip(sums.chunks_exact_mut(LANES)) {
        for (values, sum) in values.chunks_exact(lane).zip(sums) {
            *sum = -values.iter().map(|v| i32::from(*v)).sum::<i32>();
        }
        if let ([values], []) = values.as_chunks_mut::<128>() {
            split_pairs(values);
        }
    }
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

/// Moves the even elements of a unit of 4-bit weights to the front.
#[inline(always)]
fn split_pairs(values: &mut [i8; 128]) {
    let pairs = *values;
    let (even, odd) = values.split_at_mut(64);
    for i in 0..64 {
        even[i] = pairs[2 * i];
        odd[i] = pairs[2 * i + 1];
    }
}

/// Float activations of a few rows. For 4 bits, groups of 32 elements with the 16 even ones first; zero behind the
/// row's end.
#[derive(Debug, Default)]
pub struct FloatActivations {
    /// Rows.
    pub rows: usize,
    /// Elements of a row with the padding, a multiple of 32.
    pub width: usize,
    /// `[rows, width]`.
    pub values: Vec<f32>,
}

impl FloatActivations {
    /// Reorders `[rows, k]` values for weights of `bits` bits.
    pub fn new(values: &[f32], k: usize, bits: usize) -> Self {
        let rows = values.len().checked_div(k).unwrap_or(0);
        let width = k.next_multiple_of(32);
        let mut out = vec![0.0; rows * width];
        for (row, out) in values
            .chunks_exact(k.max(1))
            .zip(out.chunks_exact_mut(width.max(1)))
        {
            for (i, v) in row.iter().enumerate() {
                let at = if bits == 4 {
                    i / 32 * 32 + (i % 2) * 16 + i % 32 / 2
                } else {
                    i
                };
                out[at] = *v;
            }
        }
        Self {
            rows,
            width,
            values: out,
        }
    }
}

#[cfg(test)]
mod tests {
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
}
