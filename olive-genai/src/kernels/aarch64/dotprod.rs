//! Block-quantized kernels with dot products of bytes (`sdot`): four products and their sum for each lane.

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use super::super::activation::QuantActivations;
use super::super::nbits::{NBitsWeight, Points};
use super::super::parallel::Columns;
use super::part::Part;

/// Integer products of some groups of features with all rows. With many rows, half a group with four of them fills the
/// registers; with one row, two groups keep enough sums going.
///
/// # Safety
/// The processor must have what [`Isa::NeonDot`](super::super::Isa) stands for.
#[target_feature(enable = "neon,dotprod")]
pub unsafe fn integer_piece(
    weight: &NBitsWeight,
    groups: Range<usize>,
    acts: &QuantActivations,
    out: &mut Columns<'_>,
) {
    match (weight.bits, weight.layout.points) {
        (4, Points::Bytes) => piece::<4, true>(weight, groups, acts, out),
        (4, _) => piece::<4, false>(weight, groups, acts, out),
        (_, Points::Bytes) => piece::<8, true>(weight, groups, acts, out),
        _ => piece::<8, false>(weight, groups, acts, out),
    }
}

#[target_feature(enable = "neon,dotprod")]
fn piece<const BITS: usize, const POINTS: bool>(
    weight: &NBitsWeight,
    groups: Range<usize>,
    acts: &QuantActivations,
    out: &mut Columns<'_>,
) {
    let (first, end) = (groups.start, groups.end);
    let mut group = first;
    while group < end {
        let part = |quarter| Part {
            weight,
            acts,
            group,
            quarter,
            first,
        };
        if acts.rows == 1 && end - group >= 2 {
            tile::<BITS, POINTS, 8, 1>(part(0), 0, out);
            group += 2;
            continue;
        }
        let mut row = 0;
        while row < acts.rows {
            row += match acts.rows - row {
                4.. => {
                    tile::<BITS, POINTS, 2, 4>(part(0), row, out);
                    tile::<BITS, POINTS, 2, 4>(part(2), row, out)
                }
                2.. => tile::<BITS, POINTS, 4, 2>(part(0), row, out),
                _ => tile::<BITS, POINTS, 4, 1>(part(0), row, out),
            };
        }
        group += 1;
    }
}

/// `VECTORS` vectors of features with `ROWS` rows from `row` on; gives `ROWS`.
#[target_feature(enable = "neon,dotprod")]
fn tile<const BITS: usize, const POINTS: bool, const VECTORS: usize, const ROWS: usize>(
    part: Part<'_>,
    row: usize,
    out: &mut Columns<'_>,
) -> usize {
    let mut operands = part.operands::<ROWS>(BITS, VECTORS, row);
    let mut sums = [[vdupq_n_f32(0.0); VECTORS]; ROWS];
    // A block is a whole number of sixteens: two steps of 4-bit weights, four of 8-bit weights.
    let (blocks, sixteens) = (part.weight.blocks, part.weight.block / 16);
    for _ in 0..blocks {
        // SAFETY: there are `blocks` blocks of `sixteens` times sixteen values, and `POINTS` is as the weight is.
        unsafe {
            let mut dots = operands.starts::<BITS, POINTS, VECTORS>();
            for _ in 0..sixteens {
                let quads = operands.quads();
                if BITS == 4 {
                    add_nibbles::<0, 1, VECTORS, ROWS>(&mut dots, operands.bytes(), &quads);
                    add_nibbles::<2, 3, VECTORS, ROWS>(&mut dots, operands.bytes(), &quads);
                } else {
                    add_bytes::<0, VECTORS, ROWS>(&mut dots, operands.bytes(), &quads);
                    add_bytes::<1, VECTORS, ROWS>(&mut dots, operands.bytes(), &quads);
                    add_bytes::<2, VECTORS, ROWS>(&mut dots, operands.bytes(), &quads);
                    add_bytes::<3, VECTORS, ROWS>(&mut dots, operands.bytes(), &quads);
                }
            }
            operands.add_block(&dots, &mut sums);
        }
    }
    part.store(row, &sums, out);
    ROWS
}

/// Low nibbles go with quad `LOW` of each row, high nibbles with quad `HIGH`.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn add_nibbles<const LOW: i32, const HIGH: i32, const VECTORS: usize, const ROWS: usize>(
    dots: &mut [[int32x4_t; VECTORS]; ROWS],
    bytes: [uint8x16_t; VECTORS],
    quads: &[int8x16_t; ROWS],
) {
    for v in 0..VECTORS {
        let low = vreinterpretq_s8_u8(vandq_u8(bytes[v], vdupq_n_u8(15)));
        for r in 0..ROWS {
            dots[r][v] = dot::<LOW>(dots[r][v], low, quads[r]);
        }
    }
    for v in 0..VECTORS {
        let high = vreinterpretq_s8_u8(vshrq_n_u8::<4>(bytes[v]));
        for r in 0..ROWS {
            dots[r][v] = dot::<HIGH>(dots[r][v], high, quads[r]);
        }
    }
}

/// Bytes less 128, which have signs.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn add_bytes<const QUAD: i32, const VECTORS: usize, const ROWS: usize>(
    dots: &mut [[int32x4_t; VECTORS]; ROWS],
    bytes: [uint8x16_t; VECTORS],
    quads: &[int8x16_t; ROWS],
) {
    for v in 0..VECTORS {
        let signed = vreinterpretq_s8_u8(veorq_u8(bytes[v], vdupq_n_u8(128)));
        for r in 0..ROWS {
            dots[r][v] = dot::<QUAD>(dots[r][v], signed, quads[r]);
        }
    }
}

/// Adds the products of four bytes of each lane with quad `QUAD` of `values`; stands for `vdotq_laneq_s32`, which is not
/// stable.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn dot<const QUAD: i32>(mut sums: int32x4_t, bytes: int8x16_t, values: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction only reads and writes these registers, and the processor has it.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {bytes:v}.16b, {values:v}.4b[{quad}]",
            sums = inout(vreg) sums,
            bytes = in(vreg) bytes,
            values = in(vreg) values,
            quad = const QUAD,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}
