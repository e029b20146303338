//! Block-quantized kernels for AVX-512 with VNNI.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::activation::{FloatActivations, LANES, QuantActivations, unit_elements};
use super::super::nbits::{NBitsWeight, ZeroPoints};
use super::super::panel::Panel;
use super::avx2;

/// Integer products of few rows; `out` is `[features, rows]`.
///
/// # Safety
/// The processor must have what [`Isa::Avx512Vnni`](super::super::Isa) stands for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub unsafe fn integer_piece(
    weight: &NBitsWeight,
    features: Range<usize>,
    acts: &QuantActivations,
    out: &mut [f32],
) {
    if weight.bits == 4 {
        integer_features::<4>(weight, features, acts, out);
    } else {
        integer_features::<8>(weight, features, acts, out);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn integer_features<const BITS: usize>(
    weight: &NBitsWeight,
    features: Range<usize>,
    acts: &QuantActivations,
    out: &mut [f32],
) {
    let rows = acts.rows;
    let end = features.end;
    let mut n = features.start;
    while n < end {
        let at = (n - features.start) * rows;
        let step = match (end - n, rows) {
            (4.., 1) => {
                integer_tile::<BITS, 4, 1>(weight, n, acts, 0, &mut out[at..]);
                n += 4;
                continue;
            }
            (2.., _) => 2,
            _ => 1,
        };
        let mut m = 0;
        while m < rows {
            let out = &mut out[at..];
            let wide = rows - m >= 4;
            match (step, wide) {
                (2, true) => integer_tile::<BITS, 2, 4>(weight, n, acts, m, out),
                (2, false) => integer_tile::<BITS, 2, 1>(weight, n, acts, m, out),
                (_, true) => integer_tile::<BITS, 1, 4>(weight, n, acts, m, out),
                (_, false) => integer_tile::<BITS, 1, 1>(weight, n, acts, m, out),
            }
            m += if wide { 4 } else { 1 };
        }
        n += step;
    }
}

/// `N` output features from `n` on with `M` rows from `m` on; `out` starts at feature `n` and is `[features, rows]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn integer_tile<const BITS: usize, const N: usize, const M: usize>(
    weight: &NBitsWeight,
    n: usize,
    acts: &QuantActivations,
    m: usize,
    out: &mut [f32],
) {
    let unit = unit_elements(BITS);
    let bytes = weight.row_bytes();
    let rows: [&[u8]; N] = std::array::from_fn(|r| weight.row(n + r));
    let scales: [&[f32]; N] = std::array::from_fn(|r| weight.row_scales(n + r));
    let lane_blocks = weight.lane_blocks();
    // SAFETY: `lane_blocks` is 64 bytes long.
    let index = unsafe { _mm512_loadu_si512(lane_blocks.as_ptr().cast()) };
    let nibble = _mm512_set1_epi8(15);
    let (constant, points) = match &weight.zero_points {
        ZeroPoints::Constant(z) => (_mm512_set1_epi32(i32::from(*z)), None),
        ZeroPoints::Bytes(bytes) => (_mm512_setzero_si512(), Some(bytes)),
        ZeroPoints::Floats(_) => (_mm512_setzero_si512(), None),
    };
    let mut sums = [[_mm512_setzero_ps(); M]; N];
    for u in 0..acts.units {
        let left = (bytes - u * 64).min(64);
        let mask = if left == 64 { !0u64 } else { (1u64 << left) - 1 };
        let blocks = weight.unit_blocks(u);
        let block_mask = ((1u32 << blocks.len()) - 1) as u16;
        for r in 0..N {
            // SAFETY: `mask` selects bytes of the row, `block_mask` scales of the row; masked lanes are not read.
            let (packed, scale) = unsafe {
                (
                    _mm512_maskz_loadu_epi8(mask, rows[r].as_ptr().add(u * 64).cast()),
                    _mm512_maskz_loadu_ps(block_mask, scales[r].as_ptr().add(blocks.start)),
                )
            };
            let scale = _mm512_permutexvar_ps(index, scale);
            let zero = match points {
                None => constant,
                Some(points) => {
                    // SAFETY: `points` ends with 8 bytes of padding behind the last block's point.
                    let eight = unsafe {
                        _mm_loadl_epi64(points.as_ptr().add((n + r) * weight.blocks + blocks.start).cast())
                    };
                    _mm512_permutexvar_epi32(index, _mm512_cvtepu8_epi32(eight))
                }
            };
            for (c, sum) in sums[r].iter_mut().enumerate() {
                let at = (m + c) * acts.units + u;
                // SAFETY: `values` holds `unit` bytes, `negative_sums` and `scales` 16 values for every unit `at`.
                let (values, negative, act_scale) = unsafe {
                    (
                        acts.values.as_ptr().add(at * unit),
                        _mm512_loadu_si512(acts.negative_sums.as_ptr().add(at * LANES).cast()),
                        _mm512_loadu_ps(acts.scales.as_ptr().add(at * LANES)),
                    )
                };
                let mut dot = _mm512_madd_epi16(negative, zero);
                // SAFETY: as above.
                let first = unsafe { _mm512_loadu_si512(values.cast()) };
                if BITS == 4 {
                    // SAFETY: a 4-bit unit is 128 bytes.
                    let second = unsafe { _mm512_loadu_si512(values.add(64).cast()) };
                    let low = _mm512_and_si512(packed, nibble);
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(packed), nibble);
                    dot = _mm512_dpbusd_epi32(dot, low, first);
                    dot = _mm512_dpbusd_epi32(dot, high, second);
                } else {
                    dot = _mm512_dpbusd_epi32(dot, packed, first);
                }
                let dot = _mm512_cvtepi32_ps(dot);
                *sum = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale, act_scale), *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (c, sum) in sums.iter().enumerate() {
            out[r * acts.rows + m + c] = reduce(*sum);
        }
    }
}

/// Integer products of unpacked features with many rows; `out` is `[features, rows]`.
///
/// # Safety
/// The processor must have what [`Isa::Avx512Vnni`](super::super::Isa) stands for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub unsafe fn panel_piece(bits: usize, panel: &Panel, acts: &QuantActivations, out: &mut [f32]) {
    if bits == 4 {
        panel_rows::<4>(panel, acts, out);
    } else {
        panel_rows::<8>(panel, acts, out);
    }
}

/// Four rows stay in the first-level cache while the panel passes by. The sums of two features, with what is loaded of
/// four rows, fill the registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn panel_rows<const BITS: usize>(panel: &Panel, acts: &QuantActivations, out: &mut [f32]) {
    let mut m = 0;
    while m < acts.rows {
        let wide = acts.rows - m >= 4;
        let mut n = 0;
        while n < panel.features {
            let step = if panel.features - n >= 2 { 2 } else { 1 };
            match (step, wide) {
                (2, true) => panel_tile::<BITS, 2, 4>(panel, n, acts, m, out),
                (2, false) => panel_tile::<BITS, 2, 1>(panel, n, acts, m, out),
                (_, true) => panel_tile::<BITS, 1, 4>(panel, n, acts, m, out),
                (_, false) => panel_tile::<BITS, 1, 1>(panel, n, acts, m, out),
            }
            n += step;
        }
        m += if wide { 4 } else { 1 };
    }
}

/// `N` features of the panel from `n` on with `M` rows from `m` on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn panel_tile<const BITS: usize, const N: usize, const M: usize>(
    panel: &Panel,
    n: usize,
    acts: &QuantActivations,
    m: usize,
    out: &mut [f32],
) {
    let unit = unit_elements(BITS);
    let units = panel.units;
    assert!(
        acts.units == units && n + N <= panel.features && m + M <= acts.rows,
        "invariant: the tile lies in both matrices"
    );
    let mut sums = [[_mm512_setzero_ps(); M]; N];
    for u in 0..units {
        for (r, sums) in sums.iter_mut().enumerate() {
            let at = (n + r) * units + u;
            // SAFETY: `elements` holds `unit` bytes, `zeros` and `scales` 16 values for every unit `at`; a 4-bit unit
            // is 128 bytes, an 8-bit unit 64.
            let (low, high, zero, scale) = unsafe {
                let elements = panel.elements.as_ptr().add(at * unit);
                (
                    _mm512_loadu_si512(elements.cast()),
                    _mm512_loadu_si512(elements.add(unit - 64).cast()),
                    _mm512_loadu_si512(panel.zeros.as_ptr().add(at * LANES).cast()),
                    _mm512_loadu_ps(panel.scales.as_ptr().add(at * LANES)),
                )
            };
            for (c, sum) in sums.iter_mut().enumerate() {
                let at = (m + c) * units + u;
                // SAFETY: `values` holds `unit` bytes, `negative_sums` and `scales` 16 values for every unit `at`.
                let (first, second, negative, act_scale) = unsafe {
                    let values = acts.values.as_ptr().add(at * unit);
                    (
                        _mm512_loadu_si512(values.cast()),
                        _mm512_loadu_si512(values.add(unit - 64).cast()),
                        _mm512_loadu_si512(acts.negative_sums.as_ptr().add(at * LANES).cast()),
                        _mm512_loadu_ps(acts.scales.as_ptr().add(at * LANES)),
                    )
                };
                let mut dot = _mm512_madd_epi16(zero, negative);
                dot = _mm512_dpbusd_epi32(dot, low, first);
                if BITS == 4 {
                    dot = _mm512_dpbusd_epi32(dot, high, second);
                }
                let dot = _mm512_cvtepi32_ps(dot);
                *sum = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale, act_scale), *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let out = &mut out[(n + r) * acts.rows + m..][..M];
        if let (Ok(sums), Ok(out)) = (
            <&[__m512; 4]>::try_from(&sums[..]),
            <&mut [f32; 4]>::try_from(&mut *out),
        ) {
            reduce_four(sums, out);
        } else {
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = reduce(*sum);
            }
        }
    }
}

/// The sum of the lanes: halves are added until one is left.
#[target_feature(enable = "avx512f")]
#[inline]
fn reduce(sum: __m512) -> f32 {
    let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(sum)));
    avx2::reduce(_mm512_castps512_ps256(sum), upper)
}

/// [`reduce`] for four vectors at once, with the same additions.
#[target_feature(enable = "avx512f")]
#[inline]
fn reduce_four(sums: &[__m512; 4], out: &mut [f32; 4]) {
    // Quarters of two vectors, `[a0 + a2, a1 + a3, b0 + b2, b1 + b3]`.
    let [a, b, c, d] = *sums;
    let ab = _mm512_add_ps(
        _mm512_shuffle_f32x4::<0x44>(a, b),
        _mm512_shuffle_f32x4::<0xee>(a, b),
    );
    let cd = _mm512_add_ps(
        _mm512_shuffle_f32x4::<0x44>(c, d),
        _mm512_shuffle_f32x4::<0xee>(c, d),
    );
    // One quarter of each vector.
    let four = _mm512_add_ps(
        _mm512_shuffle_f32x4::<0x88>(ab, cd),
        _mm512_shuffle_f32x4::<0xdd>(ab, cd),
    );
    let two = _mm512_add_ps(four, _mm512_permute_ps::<0b11_10_11_10>(four));
    let one = _mm512_add_ps(two, _mm512_permute_ps::<0b01_01_01_01>(two));
    let firsts = _mm512_permutexvar_ps(
        _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        one,
    );
    // SAFETY: `out` holds four floats.
    unsafe { _mm_storeu_ps(out.as_mut_ptr(), _mm512_castps512_ps128(firsts)) };
}

/// Float products; `out` is `[features, rows]`.
///
/// # Safety
/// The processor must have what [`Isa::Avx512Vnni`](super::super::Isa) stands for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub unsafe fn float_piece(
    weight: &NBitsWeight,
    features: Range<usize>,
    acts: &FloatActivations,
    out: &mut [f32],
) {
    for (n, out) in features.zip(out.chunks_exact_mut(acts.rows)) {
        for (m, out) in out.iter_mut().enumerate() {
            let values = &acts.values[m * acts.width..(m + 1) * acts.width];
            *out = if weight.bits == 4 {
                float_dot4(weight, n, values)
            } else {
                float_dot8(weight, n, values)
            };
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn float_dot4(weight: &NBitsWeight, n: usize, values: &[f32]) -> f32 {
    let (packed, scales) = (weight.row(n), weight.row_scales(n));
    let table: [f32; 16] = std::array::from_fn(|q| q as f32);
    // SAFETY: `table` holds 16 floats.
    let table = unsafe { _mm512_loadu_ps(table.as_ptr()) };
    let mut sum = _mm512_setzero_ps();
    for (g, values) in values.chunks_exact(32).enumerate() {
        let left = (packed.len() - g * 16).min(16);
        let mask = ((1u32 << left) - 1) as u16;
        // SAFETY: `mask` selects bytes of the row; `values` holds 32 floats.
        let (bytes, even, odd) = unsafe {
            (
                _mm_maskz_loadu_epi8(mask, packed.as_ptr().add(g * 16).cast()),
                _mm512_loadu_ps(values.as_ptr()),
                _mm512_loadu_ps(values.as_ptr().add(16)),
            )
        };
        let first = g * 32 / weight.block;
        let mut scale = _mm512_set1_ps(scales[first]);
        let mut zero = _mm512_set1_ps(weight.zero_point(n, first));
        if weight.block == 16 && first + 1 < weight.blocks {
            scale = _mm512_mask_mov_ps(scale, 0xff00, _mm512_set1_ps(scales[first + 1]));
            zero = _mm512_mask_mov_ps(zero, 0xff00, _mm512_set1_ps(weight.zero_point(n, first + 1)));
        }
        let bytes = _mm512_cvtepu8_epi32(bytes);
        let low = _mm512_sub_ps(_mm512_permutexvar_ps(bytes, table), zero);
        let high = _mm512_sub_ps(_mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table), zero);
        let dot = _mm512_fmadd_ps(high, odd, _mm512_mul_ps(low, even));
        sum = _mm512_fmadd_ps(dot, scale, sum);
    }
    _mm512_reduce_add_ps(sum)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn float_dot8(weight: &NBitsWeight, n: usize, values: &[f32]) -> f32 {
    let (packed, scales) = (weight.row(n), weight.row_scales(n));
    let mut sum = _mm512_setzero_ps();
    for (g, (bytes, values)) in packed.chunks_exact(16).zip(values.chunks_exact(16)).enumerate() {
        let block = g * 16 / weight.block;
        // SAFETY: `bytes` holds 16 bytes and `values` 16 floats.
        let (bytes, values) = unsafe {
            (
                _mm_loadu_si128(bytes.as_ptr().cast()),
                _mm512_loadu_ps(values.as_ptr()),
            )
        };
        let weights = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
        let weights = _mm512_sub_ps(weights, _mm512_set1_ps(weight.zero_point(n, block)));
        sum = _mm512_fmadd_ps(_mm512_mul_ps(weights, values), _mm512_set1_ps(scales[block]), sum);
    }
    _mm512_reduce_add_ps(sum)
}
