//! Block-quantized kernels for AVX2.
//!
//! A unit of 16 lanes is two vectors. Their sums are kept apart, so that lanes add up as they do in one wide vector and
//! every instruction set gives the same integer products.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::activation::{FloatActivations, LANES, QuantActivations, unit_elements};
use super::super::nbits::{NBitsWeight, ZeroPoints};
use super::super::panel::Panel;

/// Integer products of few rows; `out` is `[features, rows]`.
///
/// # Safety
/// The processor must have what [`Isa::Avx2`](super::super::Isa) stands for.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn integer_piece(
    weight: &NBitsWeight,
    features: Range<usize>,
    acts: &QuantActivations,
    out: &mut [f32],
) {
    for (n, out) in features.zip(out.chunks_exact_mut(acts.rows)) {
        let mut m = 0;
        while m < acts.rows {
            let wide = acts.rows - m >= 4;
            match (weight.bits, wide) {
                (4, true) => integer_row::<4, 4>(weight, n, acts, m, out),
                (4, false) => integer_row::<4, 1>(weight, n, acts, m, out),
                (_, true) => integer_row::<8, 4>(weight, n, acts, m, out),
                (_, false) => integer_row::<8, 1>(weight, n, acts, m, out),
            }
            m += if wide { 4 } else { 1 };
        }
    }
}

/// Output feature `n` with `M` rows from `m` on.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn integer_row<const BITS: usize, const M: usize>(
    weight: &NBitsWeight,
    n: usize,
    acts: &QuantActivations,
    m: usize,
    out: &mut [f32],
) {
    let unit = unit_elements(BITS);
    let (row, scales) = (weight.row(n), weight.row_scales(n));
    let lane_blocks = weight.lane_blocks();
    // SAFETY: `lane_blocks` is 64 bytes long.
    let index: [__m256i; 2] = std::array::from_fn(|half| unsafe {
        _mm256_loadu_si256(lane_blocks.as_ptr().cast::<__m256i>().add(half))
    });
    let (constant, points) = match &weight.zero_points {
        ZeroPoints::Constant(z) => (_mm256_set1_epi32(i32::from(*z)), None),
        ZeroPoints::Bytes(bytes) => (_mm256_setzero_si256(), Some(bytes)),
        ZeroPoints::Floats(_) => (_mm256_setzero_si256(), None),
    };
    // A unit has no more than eight blocks.
    let numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let mut sums = [[_mm256_setzero_ps(); 2]; M];
    for u in 0..acts.units {
        let blocks = weight.unit_blocks(u);
        let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(blocks.len() as i32), numbers);
        // SAFETY: `mask` selects scales of the row; masked lanes are not read.
        let unit_scales = unsafe { _mm256_maskload_ps(scales.as_ptr().add(blocks.start), mask) };
        let unit_zeros = match points {
            None => constant,
            Some(points) => {
                // SAFETY: `points` ends with 8 bytes of padding behind the last block's point.
                let eight =
                    unsafe { _mm_loadl_epi64(points.as_ptr().add(n * weight.blocks + blocks.start).cast()) };
                _mm256_cvtepu8_epi32(eight)
            }
        };
        for half in 0..2 {
            let start = u * 64 + half * 32;
            if start >= row.len() {
                break;
            }
            let scale = _mm256_permutevar8x32_ps(unit_scales, index[half]);
            let zero = _mm256_permutevar8x32_epi32(unit_zeros, index[half]);
            let weights = split::<BITS>(load_padded(&row[start..]));
            for (c, sum) in sums.iter_mut().enumerate() {
                let values = RowValues::load(acts, unit, (m + c) * acts.units + u, half);
                sum[half] = values.add_products::<BITS>(weights, zero, scale, sum[half]);
            }
        }
    }
    for (out, [lower, upper]) in out[m..].iter_mut().zip(sums) {
        *out = reduce(lower, upper);
    }
}

/// Integer products of unpacked features with many rows; `out` is `[features, rows]`.
///
/// # Safety
/// The processor must have what [`Isa::Avx2`](super::super::Isa) stands for.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn panel_piece(bits: usize, panel: &Panel, acts: &QuantActivations, out: &mut [f32]) {
    let mut m = 0;
    while m < acts.rows {
        let wide = acts.rows - m >= 4;
        for n in 0..panel.features {
            match (bits, wide) {
                (4, true) => panel_row::<4, 4>(panel, n, acts, m, out),
                (4, false) => panel_row::<4, 1>(panel, n, acts, m, out),
                (_, true) => panel_row::<8, 4>(panel, n, acts, m, out),
                (_, false) => panel_row::<8, 1>(panel, n, acts, m, out),
            }
        }
        m += if wide { 4 } else { 1 };
    }
}

/// Feature `n` of the panel with `M` rows from `m` on.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn panel_row<const BITS: usize, const M: usize>(
    panel: &Panel,
    n: usize,
    acts: &QuantActivations,
    m: usize,
    out: &mut [f32],
) {
    let unit = unit_elements(BITS);
    let units = panel.units;
    assert!(
        acts.units == units && n < panel.features && m + M <= acts.rows,
        "invariant: the tile lies in both matrices"
    );
    let mut sums = [[_mm256_setzero_ps(); 2]; M];
    for u in 0..units {
        let at = n * units + u;
        for half in 0..2 {
            // SAFETY: `elements` holds `unit` bytes, `zeros` and `scales` 16 values for every unit `at`; a 4-bit unit
            // is 128 bytes, an 8-bit unit 64.
            let (first, second, zero, scale) = unsafe {
                let elements = panel.elements.as_ptr().add(at * unit + half * 32);
                let lanes = at * LANES + half * 8;
                (
                    _mm256_loadu_si256(elements.cast()),
                    _mm256_loadu_si256(elements.add(unit - 64).cast()),
                    _mm256_loadu_si256(panel.zeros.as_ptr().add(lanes).cast()),
                    _mm256_loadu_ps(panel.scales.as_ptr().add(lanes)),
                )
            };
            let weights = if BITS == 4 {
                [first, second]
            } else {
                split::<8>(first)
            };
            for (c, sum) in sums.iter_mut().enumerate() {
                let values = RowValues::load(acts, unit, (m + c) * units + u, half);
                sum[half] = values.add_products::<BITS>(weights, zero, scale, sum[half]);
            }
        }
    }
    let out = &mut out[n * acts.rows + m..][..M];
    for (out, [lower, upper]) in out.iter_mut().zip(sums) {
        *out = reduce(lower, upper);
    }
}

/// Rounded activations of eight lanes of a row.
struct RowValues {
    first: __m256i,
    second: __m256i,
    negative: __m256i,
    scale: __m256,
}

impl RowValues {
    /// Half `half` of the unit with number `at`, counted over all rows.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn load(acts: &QuantActivations, unit: usize, at: usize, half: usize) -> Self {
        debug_assert!(at < acts.rows * acts.units && half < 2);
        let lanes = at * LANES + half * 8;
        // SAFETY: `values` holds `unit` bytes, `negative_sums` and `scales` 16 values for every unit `at`; a 4-bit unit
        // is 128 bytes, an 8-bit unit 64.
        unsafe {
            let values = acts.values.as_ptr().add(at * unit + half * 32);
            Self {
                first: _mm256_loadu_si256(values.cast()),
                second: _mm256_loadu_si256(values.add(unit - 64).cast()),
                negative: _mm256_loadu_si256(acts.negative_sums.as_ptr().add(lanes).cast()),
                scale: _mm256_loadu_ps(acts.scales.as_ptr().add(lanes)),
            }
        }
    }

    /// `sum + (weights − zero) · values` in each lane, with weights from [`split`].
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn add_products<const BITS: usize>(
        &self,
        weights: [__m256i; 2],
        zero: __m256i,
        scale: __m256,
        sum: __m256,
    ) -> __m256 {
        let ones = _mm256_set1_epi16(1);
        let dot = if BITS == 4 {
            // At most 2 · 2 · 15 · 127, which fits 16 bits.
            let low = _mm256_maddubs_epi16(weights[0], self.first);
            let high = _mm256_maddubs_epi16(weights[1], self.second);
            _mm256_madd_epi16(_mm256_add_epi16(low, high), ones)
        } else {
            let low = _mm256_maddubs_epi16(weights[0], self.first);
            let top = _mm256_maddubs_epi16(weights[1], self.first);
            _mm256_add_epi32(
                _mm256_madd_epi16(low, ones),
                _mm256_madd_epi16(top, _mm256_set1_epi16(128)),
            )
        };
        let dot = _mm256_add_epi32(dot, _mm256_madd_epi16(self.negative, zero));
        _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(scale, self.scale), sum)
    }
}

/// Packed bytes as two factors: low and high nibbles of 4-bit elements; the lower seven bits and the highest one of
/// 8-bit elements, because 2 · 127 · 127 fits 16 bits and 2 · 255 · 127 does not.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn split<const BITS: usize>(packed: __m256i) -> [__m256i; 2] {
    if BITS == 4 {
        let nibble = _mm256_set1_epi8(15);
        [
            _mm256_and_si256(packed, nibble),
            _mm256_and_si256(_mm256_srli_epi16::<4>(packed), nibble),
        ]
    } else {
        [
            _mm256_and_si256(packed, _mm256_set1_epi8(0x7f)),
            _mm256_and_si256(_mm256_srli_epi16::<7>(packed), _mm256_set1_epi8(1)),
        ]
    }
}

/// The first 32 bytes, zero behind the last one.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn load_padded(bytes: &[u8]) -> __m256i {
    if bytes.len() >= 32 {
        // SAFETY: 32 bytes are there.
        return unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
    }
    let mut padded = [0u8; 32];
    padded[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: `padded` is 32 bytes long.
    unsafe { _mm256_loadu_si256(padded.as_ptr().cast()) }
}

/// The sum of the lanes of both halves: halves are added until one is left.
#[target_feature(enable = "avx2,fma")]
#[inline]
pub fn reduce(lower: __m256, upper: __m256) -> f32 {
    let sum = _mm256_add_ps(lower, upper);
    let four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}

/// Float products; `out` is `[features, rows]`.
///
/// # Safety
/// The processor must have what [`Isa::Avx2`](super::super::Isa) stands for.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn float_piece(
    weight: &NBitsWeight,
    features: Range<usize>,
    acts: &FloatActivations,
    out: &mut [f32],
) {
    for (n, out) in features.zip(out.chunks_exact_mut(acts.rows)) {
        for (m, out) in out.iter_mut().enumerate() {
            let values = &acts.values[m * acts.width..(m + 1) * acts.width];
            *out = float_dot(weight, n, values);
        }
    }
}

#[target_feature(enable = "avx2,fma")]
fn float_dot(weight: &NBitsWeight, n: usize, values: &[f32]) -> f32 {
    let (packed, scales) = (weight.row(n), weight.row_scales(n));
    let nibble = _mm256_set1_epi32(15);
    let mut sum = _mm256_setzero_ps();
    for (g, eight) in packed.chunks_exact(8).enumerate() {
        let block = g * 64 / weight.bits / weight.block;
        let at = if weight.bits == 4 {
            g / 2 * 32 + g % 2 * 8
        } else {
            g * 8
        };
        let needed = if weight.bits == 4 { 24 } else { 8 };
        let Some(values) = values.get(at..).filter(|v| v.len() >= needed) else {
            break;
        };
        let zero = _mm256_set1_ps(weight.zero_point(n, block));
        // SAFETY: `eight` holds 8 bytes and `values` at least 8 floats.
        let (bytes, first) = unsafe {
            (
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(eight.as_ptr().cast())),
                _mm256_loadu_ps(values.as_ptr()),
            )
        };
        let dot = if weight.bits == 4 {
            // SAFETY: `values` holds at least 24 floats.
            let odd = unsafe { _mm256_loadu_ps(values.as_ptr().add(16)) };
            let low = _mm256_cvtepi32_ps(_mm256_and_si256(bytes, nibble));
            let high = _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(bytes));
            let even = _mm256_mul_ps(_mm256_sub_ps(low, zero), first);
            _mm256_fmadd_ps(_mm256_sub_ps(high, zero), odd, even)
        } else {
            _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(bytes), zero), first)
        };
        sum = _mm256_fmadd_ps(dot, _mm256_set1_ps(scales[block]), sum);
    }
    reduce(sum, _mm256_setzero_ps())
}
