//! Block-quantized kernels for AVX2.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::activation::{FloatActivations, LANES, QuantActivations, unit_elements};
use super::super::nbits::{NBitsWeight, ZeroPoints};

/// Integer products; `out` is `[features, rows]`. The processor must have AVX2 and FMA.
pub fn integer_piece(weight: &NBitsWeight, features: Range<usize>, acts: &QuantActivations, out: &mut [f32]) {
    for (n, out) in features.zip(out.chunks_exact_mut(acts.rows)) {
        let mut m = 0;
        while m < acts.rows {
            // SAFETY: only called for `Isa::Avx2`, which is used where the processor has these instructions.
            unsafe {
                match (weight.bits, acts.rows - m) {
                    (4, 4..) => integer_row::<4, 4>(weight, n, acts, m, &mut out[m..]),
                    (4, _) => integer_row::<4, 1>(weight, n, acts, m, &mut out[m..]),
                    (_, 4..) => integer_row::<8, 4>(weight, n, acts, m, &mut out[m..]),
                    _ => integer_row::<8, 1>(weight, n, acts, m, &mut out[m..]),
                }
            }
            m += if acts.rows - m >= 4 { 4 } else { 1 };
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
    let mut sums = [_mm256_setzero_ps(); M];
    for u in 0..acts.units {
        let blocks = weight.unit_blocks(u);
        for half in 0..2 {
            let start = u * 64 + half * 32;
            if start >= row.len() {
                break;
            }
            let packed = load_padded(&row[start..]);
            let (scale, zero) = block_lanes(weight, n, scales, blocks.clone(), &lane_blocks[half * 8..]);
            for (c, sum) in sums.iter_mut().enumerate() {
                let at = (m + c) * acts.units + u;
                let lanes = at * LANES + half * 8;
                // SAFETY: `values` holds `unit` bytes, `negative_sums` and `scales` 16 values for every unit `at`.
                let (values, negative, act_scale) = unsafe {
                    (
                        acts.values.as_ptr().add(at * unit + half * 32),
                        _mm256_loadu_si256(acts.negative_sums.as_ptr().add(lanes).cast()),
                        _mm256_loadu_ps(acts.scales.as_ptr().add(lanes)),
                    )
                };
                // SAFETY: as above; a 4-bit unit is 128 bytes, an 8-bit unit 64.
                let dot = unsafe {
                    let first = _mm256_loadu_si256(values.cast());
                    if BITS == 4 {
                        dot_nibbles(packed, first, _mm256_loadu_si256(values.add(64).cast()))
                    } else {
                        dot_bytes(packed, first)
                    }
                };
                let dot = _mm256_add_epi32(dot, _mm256_madd_epi16(negative, zero));
                *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(scale, act_scale), *sum);
            }
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = reduce(sum);
    }
}

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

/// Scale and zero point of the blocks of eight lanes.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn block_lanes(
    weight: &NBitsWeight,
    n: usize,
    scales: &[f32],
    blocks: Range<usize>,
    lane_blocks: &[i32],
) -> (__m256, __m256i) {
    let block = |l: usize| (blocks.start + lane_blocks[l] as usize).min(blocks.end - 1);
    let point = |block: usize| match &weight.zero_points {
        ZeroPoints::Bytes(bytes) => i32::from(bytes[n * weight.blocks + block]),
        _ => weight.zero_point(n, block) as i32,
    };
    if lane_blocks[0] == lane_blocks[7] {
        let block = block(0);
        return (_mm256_set1_ps(scales[block]), _mm256_set1_epi32(point(block)));
    }
    let mut s = [0.0f32; 8];
    let mut z = [0i32; 8];
    for l in 0..8 {
        s[l] = scales[block(l)];
        z[l] = point(block(l));
    }
    // SAFETY: both arrays are 32 bytes long.
    unsafe { (_mm256_loadu_ps(s.as_ptr()), _mm256_loadu_si256(z.as_ptr().cast())) }
}

/// Sums of four low nibbles with `even` and four high ones with `odd` in each lane: at most 4 · 2 · 15 · 127.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn dot_nibbles(packed: __m256i, even: __m256i, odd: __m256i) -> __m256i {
    let nibble = _mm256_set1_epi8(15);
    let low = _mm256_maddubs_epi16(_mm256_and_si256(packed, nibble), even);
    let high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16::<4>(packed), nibble), odd);
    _mm256_madd_epi16(_mm256_add_epi16(low, high), _mm256_set1_epi16(1))
}

/// Sums of four products in each lane. The highest bit is multiplied apart: 2 · 127 · 127 fits 16 bits, 2 · 255 · 127
/// does not.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn dot_bytes(packed: __m256i, values: __m256i) -> __m256i {
    let low = _mm256_maddubs_epi16(_mm256_and_si256(packed, _mm256_set1_epi8(0x7f)), values);
    let top = _mm256_and_si256(_mm256_srli_epi16::<7>(packed), _mm256_set1_epi8(1));
    let top = _mm256_maddubs_epi16(top, values);
    _mm256_add_epi32(
        _mm256_madd_epi16(low, _mm256_set1_epi16(1)),
        _mm256_madd_epi16(top, _mm256_set1_epi16(128)),
    )
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn reduce(sum: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}

/// Float products; `out` is `[features, rows]`. The processor must have AVX2 and FMA.
pub fn float_piece(weight: &NBitsWeight, features: Range<usize>, acts: &FloatActivations, out: &mut [f32]) {
    for (n, out) in features.zip(out.chunks_exact_mut(acts.rows)) {
        for (m, out) in out.iter_mut().enumerate() {
            let values = &acts.values[m * acts.width..(m + 1) * acts.width];
            // SAFETY: only called for `Isa::Avx2`, which is used where the processor has these instructions.
            *out = unsafe { float_dot(weight, n, values) };
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
    reduce(sum)
}
