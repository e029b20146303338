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

/// Place of element `i` of a unit.
#[inline(always)]
const fn place(i: usize, bits: usize) -> usize {
    if bits == 4 { (i % 2) * 64 + i / 2 } else { i }
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
    for (b, values) in row.chunks(block).enumerate() {
        let largest = values
            .iter()
            .fold(0.0f32, |m, v| if v.abs() > m { v.abs() } else { m });
        let scale = largest / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let start = b * block;
        for (i, v) in values.iter().enumerate() {
            let at = start + i;
            out[at / unit * unit + place(at % unit, BITS)] = (v * inverse).round_ties_even() as i8;
        }
        let lanes = start / lane..(start + block).div_ceil(lane).min(scales.len());
        scales[lanes].fill(scale);
    }
    for (values, sums) in out.chunks_exact(unit).zip(sums.chunks_exact_mut(LANES)) {
        for half in values.chunks_exact(64) {
            for (four, sum) in half.as_chunks::<4>().0.iter().zip(sums.iter_mut()) {
                *sum -= four.iter().map(|v| i32::from(*v)).sum::<i32>();
            }
        }
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
