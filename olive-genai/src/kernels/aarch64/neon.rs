//! Block-quantized kernels for processors without dot products of bytes: products of 16 bits, summed while they fit.

use std::arch::aarch64::*;
use std::ops::Range;

use super::super::activation::QuantActivations;
use super::super::nbits::{NBitsWeight, Points};
use super::super::parallel::Columns;
use super::part::Part;

/// Sixteens of values whose products with nibbles fit 16 bits together: 4 · 4 · 15 · 127 < 2^15.
const SIXTEENS: usize = 4;

/// Integer products of some groups of features with all rows.
///
/// # Safety
/// The processor must have what [`Isa::Neon`](super::super::Isa) stands for.
#[target_feature(enable = "neon")]
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

#[target_feature(enable = "neon")]
fn piece<const BITS: usize, const POINTS: bool>(
    weight: &NBitsWeight,
    groups: Range<usize>,
    acts: &QuantActivations,
    out: &mut Columns<'_>,
) {
    let first = groups.start;
    for group in groups {
        let part = |quarter| Part {
            weight,
            acts,
            group,
            quarter,
            first,
        };
        let mut row = 0;
        while row < acts.rows {
            if acts.rows - row >= 2 {
                tile::<BITS, POINTS, 2, 2>(part(0), row, out);
                tile::<BITS, POINTS, 2, 2>(part(2), row, out);
                row += 2;
            } else {
                tile::<BITS, POINTS, 4, 1>(part(0), row, out);
                row += 1;
            }
        }
    }
}

/// Products of each vector: those of its first two features and those of the other two, four of a feature.
type Products<T, const VECTORS: usize, const ROWS: usize> = [[[T; 2]; VECTORS]; ROWS];

/// `VECTORS` vectors of features with `ROWS` rows from `row` on.
#[target_feature(enable = "neon")]
fn tile<const BITS: usize, const POINTS: bool, const VECTORS: usize, const ROWS: usize>(
    part: Part<'_>,
    row: usize,
    out: &mut Columns<'_>,
) {
    let mut operands = part.operands::<ROWS>(BITS, VECTORS, row);
    let mut sums = [[vdupq_n_f32(0.0); VECTORS]; ROWS];
    // A block is a whole number of sixteens: two steps of 4-bit weights, four of 8-bit weights.
    let (blocks, sixteens) = (part.weight.blocks, part.weight.block / 16);
    for _ in 0..blocks {
        let mut pairs: Products<int32x4_t, VECTORS, ROWS> = [[[vdupq_n_s32(0); 2]; VECTORS]; ROWS];
        // SAFETY: there are `blocks` blocks of `sixteens` times sixteen values, and `POINTS` is as the weight is.
        let dots = unsafe {
            let mut left = sixteens;
            while left > 0 {
                let some = left.min(SIXTEENS);
                left -= some;
                let mut narrow: Products<int16x8_t, VECTORS, ROWS> = [[[vdupq_n_s16(0); 2]; VECTORS]; ROWS];
                for _ in 0..some {
                    let quads = operands.quads();
                    if BITS == 4 {
                        add_nibbles::<0, 1, VECTORS, ROWS>(&mut narrow, operands.bytes(), &quads);
                        add_nibbles::<2, 3, VECTORS, ROWS>(&mut narrow, operands.bytes(), &quads);
                    } else {
                        // Two products of a byte fit: 2 · 128 · 127 < 2^15.
                        add_bytes::<0, VECTORS, ROWS>(&mut narrow, operands.bytes(), &quads);
                        add_bytes::<1, VECTORS, ROWS>(&mut narrow, operands.bytes(), &quads);
                        widen(&mut narrow, &mut pairs);
                        add_bytes::<2, VECTORS, ROWS>(&mut narrow, operands.bytes(), &quads);
                        add_bytes::<3, VECTORS, ROWS>(&mut narrow, operands.bytes(), &quads);
                        widen(&mut narrow, &mut pairs);
                    }
                }
                if BITS == 4 {
                    widen(&mut narrow, &mut pairs);
                }
            }
            let mut dots = operands.starts::<BITS, POINTS, VECTORS>();
            for (dots, pairs) in dots.iter_mut().zip(pairs) {
                for (dot, [two, others]) in dots.iter_mut().zip(pairs) {
                    *dot = vaddq_s32(*dot, vpaddq_s32(two, others));
                }
            }
            dots
        };
        // SAFETY: as above.
        unsafe { operands.add_block(&dots, &mut sums) };
    }
    part.store(row, &sums, out);
}

/// Moves sums of 16 bits to sums of 32 bits, two to one.
#[target_feature(enable = "neon")]
#[inline]
fn widen<const VECTORS: usize, const ROWS: usize>(
    narrow: &mut Products<int16x8_t, VECTORS, ROWS>,
    pairs: &mut Products<int32x4_t, VECTORS, ROWS>,
) {
    for (narrow, pairs) in narrow
        .as_flattened_mut()
        .as_flattened_mut()
        .iter_mut()
        .zip(pairs.as_flattened_mut().as_flattened_mut())
    {
        *pairs = vpadalq_s16(*pairs, *narrow);
        *narrow = vdupq_n_s16(0);
    }
}

/// Low nibbles go with quad `LOW` of each row, high nibbles with quad `HIGH`.
#[target_feature(enable = "neon")]
#[inline]
fn add_nibbles<const LOW: i32, const HIGH: i32, const VECTORS: usize, const ROWS: usize>(
    sums: &mut Products<int16x8_t, VECTORS, ROWS>,
    bytes: [uint8x16_t; VECTORS],
    quads: &[int8x16_t; ROWS],
) {
    for v in 0..VECTORS {
        let low = vreinterpretq_s8_u8(vandq_u8(bytes[v], vdupq_n_u8(15)));
        let high = vreinterpretq_s8_u8(vshrq_n_u8::<4>(bytes[v]));
        for r in 0..ROWS {
            add_products::<LOW>(&mut sums[r][v], low, quads[r]);
            add_products::<HIGH>(&mut sums[r][v], high, quads[r]);
        }
    }
}

/// Bytes less 128, which have signs.
#[target_feature(enable = "neon")]
#[inline]
fn add_bytes<const QUAD: i32, const VECTORS: usize, const ROWS: usize>(
    sums: &mut Products<int16x8_t, VECTORS, ROWS>,
    bytes: [uint8x16_t; VECTORS],
    quads: &[int8x16_t; ROWS],
) {
    for v in 0..VECTORS {
        let signed = vreinterpretq_s8_u8(veorq_u8(bytes[v], vdupq_n_u8(128)));
        for r in 0..ROWS {
            add_products::<QUAD>(&mut sums[r][v], signed, quads[r]);
        }
    }
}

/// Adds the products of four features with quad `QUAD` of `values`.
#[target_feature(enable = "neon")]
#[inline]
fn add_products<const QUAD: i32>([two, others]: &mut [int16x8_t; 2], bytes: int8x16_t, values: int8x16_t) {
    let quad = vreinterpretq_s8_s32(vdupq_laneq_s32::<QUAD>(vreinterpretq_s32_s8(values)));
    *two = vmlal_s8(*two, vget_low_s8(bytes), vget_low_s8(quad));
    *others = vmlal_high_s8(*others, bytes, quad);
}
