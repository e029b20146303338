//! Block-quantized kernels for AVX2. Two vectors are a group: eight features each.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::activation::QuantActivations;
use super::super::nbits::{GROUP, NBitsWeight};
use super::super::parallel::Columns;

/// Steps whose products fit 16 bits together: 4 · 2 · 2 · 15 · 127 < 2^15.
const STEPS: usize = 4;

/// Integer products of some groups of features with all rows.
///
/// # Safety
/// The processor must have what [`Isa::Avx2`](super::super::Isa) stands for.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn integer_piece(
    weight: &NBitsWeight,
    groups: Range<usize>,
    acts: &QuantActivations,
    out: &mut Columns<'_>,
) {
    let first = groups.start;
    for group in groups {
        for half in 0..2 {
            let start = (group - first) * GROUP + half * 8;
            if start >= out.width() {
                break;
            }
            let part = Part {
                weight,
                acts,
                group,
                half,
            };
            let mut row = 0;
            while row < acts.rows {
                row += match (weight.bits, acts.rows - row) {
                    (4, 4..) => part.tile::<4, 4>(row, start, out),
                    (4, _) => part.tile::<4, 1>(row, start, out),
                    (_, 4..) => part.tile::<8, 4>(row, start, out),
                    _ => part.tile::<8, 1>(row, start, out),
                };
            }
        }
    }
}

/// Eight features of a group.
struct Part<'a> {
    weight: &'a NBitsWeight,
    acts: &'a QuantActivations,
    group: usize,
    half: usize,
}

impl Part<'_> {
    /// The features with `ROWS` rows from `row` on, to the columns from `start` on; gives `ROWS`.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn tile<const BITS: usize, const ROWS: usize>(
        &self,
        row: usize,
        start: usize,
        out: &mut Columns<'_>,
    ) -> usize {
        let (weight, acts) = (self.weight, self.acts);
        let (blocks, steps) = (weight.blocks, weight.block_steps());
        assert!(
            row + ROWS <= acts.rows && steps * 32 == weight.block * BITS,
            "invariant: the tile lies in both matrices"
        );
        let mut sums = [_mm256_setzero_ps(); ROWS];
        for b in 0..blocks {
            let mut dots: [__m256i; ROWS] = std::array::from_fn(|r| self.first_sum::<BITS>(row + r, b));
            let packed = weight.steps(self.group, b);
            for s in (0..steps).step_by(STEPS) {
                let some = s..(s + STEPS).min(steps);
                if BITS == 4 {
                    self.add_nibbles(&mut dots, packed, row, b, some);
                } else {
                    self.add_bytes(&mut dots, packed, row, b, some);
                }
            }
            let scales = weight.scales(self.group, b);
            let scales = &scales[self.half * 8..][..8];
            // SAFETY: `scales` holds eight floats.
            let scales = unsafe { _mm256_loadu_ps(scales.as_ptr()) };
            for (r, (sum, dot)) in sums.iter_mut().zip(dots).enumerate() {
                let factor = _mm256_mul_ps(scales, _mm256_set1_ps(acts.scales[(row + r) * blocks + b]));
                *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), factor, *sum);
            }
        }
        for (r, sum) in sums.iter().enumerate() {
            let mut eight = [0.0f32; 8];
            // SAFETY: `eight` holds eight floats.
            unsafe { _mm256_storeu_ps(eight.as_mut_ptr(), *sum) };
            let columns = out.row(row + r, start..(start + 8).min(out.width()));
            columns.copy_from_slice(&eight[..columns.len()]);
        }
        ROWS
    }

    /// What the zero points take off a block; bytes are multiplied as what they are above 128.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn first_sum<const BITS: usize>(&self, row: usize, b: usize) -> __m256i {
        let centre = self.acts.centres[row * self.weight.blocks + b];
        let minus_sum = _mm256_set1_epi32(centre >> (BITS - 1));
        let beyond = if BITS == 4 { 0 } else { 128 };
        match self.weight.point_bytes(self.group, b) {
            Some(points) => {
                let eight = &points[self.half * 8..][..8];
                // SAFETY: `eight` holds eight bytes.
                let eight = unsafe { _mm_loadl_epi64(eight.as_ptr().cast()) };
                let points = _mm256_sub_epi32(_mm256_cvtepu8_epi32(eight), _mm256_set1_epi32(beyond));
                _mm256_mullo_epi32(points, minus_sum)
            }
            None if BITS == 4 => _mm256_set1_epi32(centre),
            None => _mm256_setzero_si256(),
        }
    }

    /// The packed bytes of a step.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn bytes(&self, packed: &[u8], step: usize) -> __m256i {
        debug_assert!((step + 1) * 64 <= packed.len());
        // SAFETY: a group has 64 bytes for every step.
        unsafe { _mm256_loadu_si256(packed.as_ptr().add(step * 64 + self.half * 32).cast()) }
    }

    /// Four values of a row, in every lane.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn quad(&self, row: usize, at: usize) -> __m256i {
        let acts = self.acts;
        debug_assert!(at + 4 <= acts.blocks * acts.block);
        // SAFETY: a row has `blocks · block` values, and `at` is a quad of them.
        let four = unsafe {
            let start = acts.values.as_ptr().add(row * acts.blocks * acts.block + at);
            start.cast::<i32>().read_unaligned()
        };
        _mm256_set1_epi32(four)
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn add_nibbles<const ROWS: usize>(
        &self,
        dots: &mut [__m256i; ROWS],
        packed: &[u8],
        row: usize,
        b: usize,
        steps: Range<usize>,
    ) {
        let nibble = _mm256_set1_epi8(15);
        let mut narrow = [_mm256_setzero_si256(); ROWS];
        for s in steps {
            let bytes = self.bytes(packed, s);
            let low = _mm256_and_si256(bytes, nibble);
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble);
            for (r, sum) in narrow.iter_mut().enumerate() {
                let at = b * self.weight.block + s * 8;
                let low = _mm256_maddubs_epi16(low, self.quad(row + r, at));
                let high = _mm256_maddubs_epi16(high, self.quad(row + r, at + 4));
                *sum = _mm256_add_epi16(*sum, _mm256_add_epi16(low, high));
            }
        }
        for (dot, sum) in dots.iter_mut().zip(narrow) {
            *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
        }
    }

    /// Sizes of bytes less 128 go with values that have their signs: 2 · 128 · 127 fits 16 bits.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn add_bytes<const ROWS: usize>(
        &self,
        dots: &mut [__m256i; ROWS],
        packed: &[u8],
        row: usize,
        b: usize,
        steps: Range<usize>,
    ) {
        for s in steps {
            let bytes = self.bytes(packed, s);
            let signed = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
            let sizes = _mm256_abs_epi8(signed);
            for (r, dot) in dots.iter_mut().enumerate() {
                let four = self.quad(row + r, b * self.weight.block + s * 4);
                let pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(four, signed));
                *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
        }
    }
}
