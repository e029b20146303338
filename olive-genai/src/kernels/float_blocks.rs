//! Products of packed weights with float activations, for every instruction set.

use std::ops::Range;

use super::isa::{Isa, multiversion_fused};
use super::nbits::{GROUP, NBitsWeight};
use super::parallel::Columns;

/// Whether the sums of eight rows fit the registers: not where a vector holds four floats.
const EIGHT_ROWS: bool = !cfg!(target_arch = "aarch64");

/// Products of some groups of features with all rows.
pub fn piece(isa: Isa, weight: &NBitsWeight, groups: Range<usize>, values: &[f32], out: &mut Columns<'_>) {
    let rows = values.len() / weight.k;
    for (i, group) in groups.enumerate() {
        let columns = i * GROUP..(i * GROUP + GROUP).min(out.width());
        let mut row = 0;
        while row < rows {
            let count = match rows - row {
                8.. if EIGHT_ROWS => 8,
                4.. => 4,
                _ => 1,
            };
            let of_rows = &values[row * weight.k..(row + count) * weight.k];
            let mut sums = [[0.0; GROUP]; 8];
            match (weight.bits, count) {
                (4, 8) => rows_4_8(isa, weight, group, of_rows, &mut sums),
                (4, 4) => rows_4_4(isa, weight, group, of_rows, &mut sums),
                (4, _) => rows_4_1(isa, weight, group, of_rows, &mut sums),
                (_, 8) => rows_8_8(isa, weight, group, of_rows, &mut sums),
                (_, 4) => rows_8_4(isa, weight, group, of_rows, &mut sums),
                _ => rows_8_1(isa, weight, group, of_rows, &mut sums),
            }
            for (r, sums) in sums.iter().take(count).enumerate() {
                out.row(row + r, columns.clone())
                    .copy_from_slice(&sums[..columns.len()]);
            }
            row += count;
        }
    }
}

type Sums = [[f32; GROUP]; 8];

multiversion_fused! {
    fn rows_4_8(isa; weight: &NBitsWeight, group: usize, values: &[f32], out: &mut Sums) = group_rows::<4, 8>
}
multiversion_fused! {
    fn rows_4_4(isa; weight: &NBitsWeight, group: usize, values: &[f32], out: &mut Sums) = group_rows::<4, 4>
}
multiversion_fused! {
    fn rows_4_1(isa; weight: &NBitsWeight, group: usize, values: &[f32], out: &mut Sums) = group_rows::<4, 1>
}
multiversion_fused! {
    fn rows_8_8(isa; weight: &NBitsWeight, group: usize, values: &[f32], out: &mut Sums) = group_rows::<8, 8>
}
multiversion_fused! {
    fn rows_8_4(isa; weight: &NBitsWeight, group: usize, values: &[f32], out: &mut Sums) = group_rows::<8, 4>
}
multiversion_fused! {
    fn rows_8_1(isa; weight: &NBitsWeight, group: usize, values: &[f32], out: &mut Sums) = group_rows::<8, 1>
}

/// A group's features with `ROWS` rows. Scales are put on the sums of a block.
#[inline(always)]
fn group_rows<const BITS: usize, const ROWS: usize, const FUSED: bool>(
    weight: &NBitsWeight,
    group: usize,
    values: &[f32],
    out: &mut Sums,
) {
    let k = weight.k;
    let rows: [&[f32]; ROWS] = std::array::from_fn(|r| &values[r * k..(r + 1) * k]);
    let mut sums = [[0.0f32; GROUP]; ROWS];
    for b in 0..weight.blocks {
        let steps = weight.steps(group, b).as_chunks::<64>().0;
        let zeros = weight.points(group, b);
        let scales = weight.scales(group, b);
        let mut dots = [[0.0f32; GROUP]; ROWS];
        for (s, step) in steps.iter().enumerate() {
            let first = b * weight.block + s * (32 / BITS);
            let mut words = [0u32; GROUP];
            for (word, bytes) in words.iter_mut().zip(step.as_chunks::<4>().0) {
                *word = u32::from_le_bytes(*bytes);
            }
            // All steps but the last one are whole; a known number of elements is unrolled.
            if first + 32 / BITS <= k {
                for j in 0..32 / BITS {
                    add_element::<BITS, ROWS, FUSED>(&words, &zeros, j, &rows, first + j, &mut dots);
                }
            } else {
                for j in 0..k.saturating_sub(first) {
                    add_element::<BITS, ROWS, FUSED>(&words, &zeros, j, &rows, first + j, &mut dots);
                }
            }
        }
        for r in 0..ROWS {
            for l in 0..GROUP {
                sums[r][l] = add_product::<FUSED>(dots[r][l], scales[l], sums[r][l]);
            }
        }
    }
    out[..ROWS].copy_from_slice(&sums);
}

/// Adds the products of element `j` of a step with value `at` of each row.
#[inline(always)]
fn add_element<const BITS: usize, const ROWS: usize, const FUSED: bool>(
    words: &[u32; GROUP],
    zeros: &[f32; GROUP],
    j: usize,
    rows: &[&[f32]; ROWS],
    at: usize,
    dots: &mut [[f32; GROUP]; ROWS],
) {
    let mut weights = [0.0f32; GROUP];
    for l in 0..GROUP {
        let q = words[l] >> (j * BITS) & ((1 << BITS) - 1);
        weights[l] = q as i32 as f32 - zeros[l];
    }
    for r in 0..ROWS {
        let v = rows[r][at];
        for l in 0..GROUP {
            dots[r][l] = add_product::<FUSED>(v, weights[l], dots[r][l]);
        }
    }
}

/// `a · b + c`, with one rounding where the processor does that as fast.
#[inline(always)]
pub fn add_product<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}
