//! NEON micro-kernels: a tile of `MR` rows and `NV` vectors of four columns stays in registers while the inner dimension
//! is walked; the right side was packed into panels of 16 columns before, the left side is read where it lies.

use std::arch::aarch64::*;

use super::{Destination, LANES, Left, PANEL};

/// Columns of a vector.
const WIDTH: usize = 4;
/// Rows of the largest tile: with four vectors each they take 24 of the 32 registers, four go to the right side.
const TILE_ROWS: usize = 6;

const _: () = assert!(PANEL == LANES, "a tile takes a whole panel");

/// `C += alpha · A · B` for one panel of `B`: `panel` is `[k, 16]`, `c` has `columns` columns of it.
///
/// # Safety
/// `a` can be read for `rows × k` elements with its strides, `panel` for all of its elements, and `c` written for
/// `rows × columns` with its stride; none overlap. `columns` is 1 to 16.
#[target_feature(enable = "neon")]
pub(super) unsafe fn panel_product(
    a: Left,
    [rows, k]: [usize; 2],
    panel: *const f32,
    columns: usize,
    c: Destination,
) {
    let mut row = 0;
    while row < rows {
        let count = TILE_ROWS.min(rows - row);
        // SAFETY: rows `row..row + count` lie in what the caller promised.
        unsafe {
            let a = Left {
                start: a.start.add(row * a.row_stride),
                ..a
            };
            let c = Destination {
                start: c.start.add(row * c.row_stride),
                ..c
            };
            macro_rules! tiles {
                ($($rows:literal $vectors:literal),*) => {
                    match (count, columns.div_ceil(WIDTH)) {
                        $(($rows, $vectors) => tile::<$rows, $vectors>(a, k, panel, columns, c),)*
                        _ => unreachable!("invariant: every tile is listed"),
                    }
                };
            }
            tiles!(
                1 1, 2 1, 3 1, 4 1, 5 1, 6 1,
                1 2, 2 2, 3 2, 4 2, 5 2, 6 2,
                1 3, 2 3, 3 3, 4 3, 5 3, 6 3,
                1 4, 2 4, 3 4, 4 4, 5 4, 6 4
            );
        }
        row += count;
    }
}

/// # Safety
/// As [`panel_product`], with `MR` rows; `columns` fills `NV` vectors, the last one perhaps in part.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn tile<const MR: usize, const NV: usize>(
    a: Left,
    k: usize,
    panel: *const f32,
    columns: usize,
    c: Destination,
) {
    let mut sums = [[vdupq_n_f32(0.0); NV]; MR];
    let (mut left, mut right) = (a.start, panel);
    // SAFETY: the caller promised `MR × k` elements on the left and `k × 16` on the right.
    unsafe {
        for _ in 0..k {
            let b: [float32x4_t; NV] = std::array::from_fn(|j| vld1q_f32(right.add(j * WIDTH)));
            for (i, row) in sums.iter_mut().enumerate() {
                let x = *left.add(i * a.row_stride);
                for (sum, b) in row.iter_mut().zip(b) {
                    *sum = vfmaq_n_f32(*sum, b, x);
                }
            }
            left = left.wrapping_add(a.col_stride);
            right = right.add(PANEL);
        }
    }
    for (i, row) in sums.iter().enumerate() {
        for (j, sum) in row.iter().enumerate() {
            let count = WIDTH.min(columns - j * WIDTH);
            // SAFETY: the caller promised `MR` rows of `columns` columns, and these are `count` of them.
            unsafe {
                let place = c.start.add(i * c.row_stride + j * WIDTH);
                if count == WIDTH {
                    vst1q_f32(place, finished(*sum, vld1q_f32(place), c));
                } else {
                    let mut four = [0.0f32; WIDTH];
                    place.copy_to_nonoverlapping(four.as_mut_ptr(), count);
                    let value = finished(*sum, vld1q_f32(four.as_ptr()), c);
                    vst1q_f32(four.as_mut_ptr(), value);
                    place.copy_from_nonoverlapping(four.as_ptr(), count);
                }
            }
        }
    }
}

/// `alpha · sum`, added to what is there if asked.
#[inline]
#[target_feature(enable = "neon")]
fn finished(sum: float32x4_t, there: float32x4_t, c: Destination) -> float32x4_t {
    if c.add {
        vfmaq_n_f32(there, sum, c.alpha)
    } else {
        vmulq_n_f32(sum, c.alpha)
    }
}

/// Packs `16 × k` elements whose columns are `stride` apart and contiguous along `k`: `out[p * width + j] =
/// source[j * stride + p]` for the 16 columns `j`.
///
/// # Safety
/// 16 rows of `k` elements can be read `stride` apart, and `k` rows of 16 elements written `width` apart.
#[target_feature(enable = "neon")]
pub(super) unsafe fn pack_transposed(
    source: *const f32,
    stride: usize,
    k: usize,
    out: *mut f32,
    width: usize,
) {
    let whole = k / WIDTH * WIDTH;
    // SAFETY: as promised by the caller.
    unsafe {
        for p in (0..whole).step_by(WIDTH) {
            for j in (0..LANES).step_by(WIDTH) {
                let rows = std::array::from_fn(|i| vld1q_f32(source.add((j + i) * stride + p)));
                for (i, column) in transpose(rows).into_iter().enumerate() {
                    vst1q_f32(out.add((p + i) * width + j), column);
                }
            }
        }
        for p in whole..k {
            for j in 0..LANES {
                *out.add(p * width + j) = *source.add(j * stride + p);
            }
        }
    }
}

/// Transposes 4 × 4 elements.
#[inline]
#[target_feature(enable = "neon")]
fn transpose([a, b, c, d]: [float32x4_t; WIDTH]) -> [float32x4_t; WIDTH] {
    let pairs = |a, b| {
        (
            vreinterpretq_f64_f32(vtrn1q_f32(a, b)),
            vreinterpretq_f64_f32(vtrn2q_f32(a, b)),
        )
    };
    let ((ab_even, ab_odd), (cd_even, cd_odd)) = (pairs(a, b), pairs(c, d));
    [
        vzip1q_f64(ab_even, cd_even),
        vzip1q_f64(ab_odd, cd_odd),
        vzip2q_f64(ab_even, cd_even),
        vzip2q_f64(ab_odd, cd_odd),
    ]
    .map(|column| vreinterpretq_f32_f64(column))
}
