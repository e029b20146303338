//! AVX-512 micro-kernels: a tile of `MR` rows and `NV` vectors of 16 columns stays in registers while the inner
//! dimension is walked; the right side was packed into panels before, the left side is read where it lies.

use std::arch::x86_64::*;

use super::{Destination, LANES, Left};

/// Rows of the largest tile for a panel of `vectors` vectors: at most 24 of the 32 registers hold sums.
const fn tile_rows(vectors: usize) -> usize {
    if vectors == 4 { 6 } else { 8 }
}

/// `C += alpha · A · B` for one panel of `B`: `panel` is `[k, 16 · vectors]`, `c` has `columns` columns of it.
///
/// # Safety
/// The processor has AVX-512 F. `a` can be read for `rows × k` elements with its strides, `panel` for all of its
/// elements, and `c` written for `rows × columns` with its stride; none overlap.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn panel_product(
    a: Left,
    [rows, k]: [usize; 2],
    panel: *const f32,
    columns: usize,
    c: Destination,
) {
    let vectors = columns.div_ceil(LANES);
    let last = columns - (vectors - 1) * LANES;
    let mask: __mmask16 = (((1u32 << last) - 1) & 0xFFFF) as u16;
    let step = tile_rows(vectors);
    let mut row = 0;
    while row < rows {
        let count = step.min(rows - row);
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
                    match (count, vectors) {
                        $(($rows, $vectors) => tile::<$rows, $vectors>(a, k, panel, mask, c),)*
                        _ => unreachable!("invariant: every tile is listed"),
                    }
                };
            }
            tiles!(
                1 1, 2 1, 3 1, 4 1, 5 1, 6 1, 7 1, 8 1,
                1 2, 2 2, 3 2, 4 2, 5 2, 6 2, 7 2, 8 2,
                1 3, 2 3, 3 3, 4 3, 5 3, 6 3, 7 3, 8 3,
                1 4, 2 4, 3 4, 4 4, 5 4, 6 4
            );
        }
        row += count;
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn tile<const MR: usize, const NV: usize>(
    a: Left,
    k: usize,
    panel: *const f32,
    mask: __mmask16,
    c: Destination,
) {
    let mut sums = [[_mm512_setzero_ps(); NV]; MR];
    let (mut left, mut right) = (a.start, panel);
    // SAFETY: the caller promised `MR × k` elements on the left and `k × NV` vectors on the right.
    unsafe {
        for _ in 0..k {
            let mut b = [_mm512_setzero_ps(); NV];
            for (j, b) in b.iter_mut().enumerate() {
                *b = _mm512_loadu_ps(right.add(j * LANES));
            }
            for (i, row) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*left.add(i * a.row_stride));
                for (sum, b) in row.iter_mut().zip(b) {
                    *sum = _mm512_fmadd_ps(x, b, *sum);
                }
            }
            left = left.add(a.col_stride);
            right = right.add(NV * LANES);
        }
        let alpha = _mm512_set1_ps(c.alpha);
        for (i, row) in sums.iter().enumerate() {
            for (j, sum) in row.iter().enumerate() {
                let place = c.start.add(i * c.row_stride + j * LANES);
                let mask = if j + 1 == NV { mask } else { 0xFFFF };
                let value = if c.add {
                    _mm512_fmadd_ps(alpha, *sum, _mm512_maskz_loadu_ps(mask, place))
                } else {
                    _mm512_mul_ps(alpha, *sum)
                };
                _mm512_mask_storeu_ps(place, mask, value);
            }
        }
    }
}

/// Packs `16 × k` elements whose columns are `stride` apart and contiguous along `k`: `out[p * width + j] =
/// source[j * stride + p]` for the 16 columns `j`.
///
/// # Safety
/// The processor has AVX-512 F; 16 rows of `k` elements can be read `stride` apart, and `k` rows of 16 elements
/// written `width` apart.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn pack_transposed(
    source: *const f32,
    stride: usize,
    k: usize,
    out: *mut f32,
    width: usize,
) {
    let mut p = 0;
    // SAFETY: as promised by the caller.
    unsafe {
        while p < k {
            let count = LANES.min(k - p);
            let mask: __mmask16 = (((1u32 << count) - 1) & 0xFFFF) as u16;
            let mut rows = [_mm512_setzero_ps(); LANES];
            for (j, row) in rows.iter_mut().enumerate() {
                *row = _mm512_maskz_loadu_ps(mask, source.add(j * stride + p));
            }
            let columns = transpose(rows);
            for (i, column) in columns.iter().enumerate().take(count) {
                _mm512_storeu_ps(out.add((p + i) * width), *column);
            }
            p += count;
        }
    }
}

/// Transposes 16 × 16 elements.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512; LANES]) -> [__m512; LANES] {
    let mut t = [_mm512_setzero_ps(); LANES];
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    let pair = |a: __m512, b: __m512| {
        let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
        (
            _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)),
        )
    };
    let mut q = [_mm512_setzero_ps(); LANES];
    for i in 0..4 {
        (q[4 * i], q[4 * i + 1]) = pair(t[4 * i], t[4 * i + 2]);
        (q[4 * i + 2], q[4 * i + 3]) = pair(t[4 * i + 1], t[4 * i + 3]);
    }
    let mut out = [_mm512_setzero_ps(); LANES];
    for i in 0..4 {
        let low = _mm512_shuffle_f32x4::<0x88>(q[i], q[4 + i]);
        let low_odd = _mm512_shuffle_f32x4::<0xDD>(q[i], q[4 + i]);
        let high = _mm512_shuffle_f32x4::<0x88>(q[8 + i], q[12 + i]);
        let high_odd = _mm512_shuffle_f32x4::<0xDD>(q[8 + i], q[12 + i]);
        out[i] = _mm512_shuffle_f32x4::<0x88>(low, high);
        out[8 + i] = _mm512_shuffle_f32x4::<0xDD>(low, high);
        out[4 + i] = _mm512_shuffle_f32x4::<0x88>(low_odd, high_odd);
        out[12 + i] = _mm512_shuffle_f32x4::<0xDD>(low_odd, high_odd);
    }
    out
}
