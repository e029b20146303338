//! Block-quantized kernels for AVX-512 VNNI. A vector is a group: sixteen features.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::activation::QuantActivations;
use super::super::ahead::AHEAD;
use super::super::nbits::{GROUP, NBitsWeight, Points, Scales, TILE};
use super::super::parallel::Columns;

/// Integer products of some groups of features with all rows.
///
/// # Safety
/// The processor must have what [`Isa::Avx512Vnni`](super::super::Isa) stands for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
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

/// With many rows, the sums of two groups with six rows fill the registers; with one row, four groups keep enough sums
/// going.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn piece<const BITS: usize, const POINTS: bool>(
    weight: &NBitsWeight,
    groups: Range<usize>,
    acts: &QuantActivations,
    out: &mut Columns<'_>,
) {
    let (first, end) = (groups.start, groups.end);
    let mut group = first;
    while group < end {
        let left = end - group;
        let step = match (left, acts.rows) {
            (_, 1) => left.min(TILE),
            (2.., _) => 2,
            _ => 1,
        };
        let part = Part {
            weight,
            acts,
            group,
            first,
        };
        let mut row = 0;
        while row < acts.rows {
            let rows = acts.rows - row;
            row += match (step, rows) {
                (_, 1) => part.line::<BITS, POINTS>(row, step, out),
                (2, 6..) => part.tile::<BITS, POINTS, 2, 6>(row, out),
                (2, 4..) => part.tile::<BITS, POINTS, 2, 4>(row, out),
                (2, _) => part.tile::<BITS, POINTS, 2, 2>(row, out),
                (_, 6..) => part.tile::<BITS, POINTS, 1, 6>(row, out),
                _ => part.tile::<BITS, POINTS, 1, 2>(row, out),
            };
        }
        group += step;
    }
}

/// Groups from `group` on; `first` is the group of the output's first column.
struct Part<'a> {
    weight: &'a NBitsWeight,
    acts: &'a QuantActivations,
    group: usize,
    first: usize,
}

impl Part<'_> {
    /// `groups` groups, up to four, with row `row`, in the order in which they lie in memory; gives 1.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    fn line<const BITS: usize, const POINTS: bool>(
        &self,
        row: usize,
        groups: usize,
        out: &mut Columns<'_>,
    ) -> usize {
        let (weight, acts, layout) = (self.weight, self.acts, &self.weight.layout);
        let (blocks, block, steps) = (weight.blocks, weight.block, weight.block_steps());
        let nibble = _mm512_set1_epi8(15);
        let place = self.group % TILE;
        let tile = (self.group / TILE) * blocks * layout.size;
        assert!(
            place + groups <= TILE && row < acts.rows,
            "invariant: the tile lies in both matrices"
        );
        assert!(
            tile + blocks * layout.size <= weight.data.len()
                && layout.steps == steps * 64
                && steps * 32 == block * BITS,
            "invariant: the tile is in memory"
        );
        let (all_values, centres, all_scales) = (acts.values.as_ptr(), &acts.centres[..], &acts.scales[..]);
        let data = weight.data.as_ptr();
        let mut sums = [_mm512_setzero_ps(); TILE];
        for b in 0..blocks {
            // SAFETY: the tile has a unit for every block; in it are steps, scales and points of four groups. Reading
            // ahead of what there is does nothing. There are values, a scale and a centre for every row and block.
            unsafe {
                let unit = data.add(tile + b * layout.size);
                for line in (0..layout.size).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T0>(unit.wrapping_add(AHEAD + line).cast());
                }
                let at = row * blocks + b;
                let values = all_values.add(at * block);
                let centre = *centres.get_unchecked(at);
                let scale = _mm512_set1_ps(*all_scales.get_unchecked(at));
                let scales = unit.add(layout.scales_at + place * GROUP * layout.scales.bytes());
                let points = unit.add(layout.points_at + place * GROUP);
                for (g, sum) in sums.iter_mut().enumerate().take(groups) {
                    let mut dot = if POINTS {
                        let points = _mm_loadu_si128(points.add(g * GROUP).cast());
                        _mm512_mullo_epi32(
                            _mm512_cvtepu8_epi32(points),
                            _mm512_set1_epi32(centre >> (BITS - 1)),
                        )
                    } else {
                        _mm512_set1_epi32(centre)
                    };
                    let mut other = _mm512_setzero_si512();
                    let packed = unit.add((place + g) * layout.steps);
                    for s in 0..steps {
                        let bytes = _mm512_loadu_si512(packed.add(s * 64).cast());
                        let quad =
                            |at: usize| _mm512_set1_epi32(values.add(at).cast::<i32>().read_unaligned());
                        if BITS == 4 {
                            let low = _mm512_and_si512(bytes, nibble);
                            dot = _mm512_dpbusd_epi32(dot, low, quad(s * 8));
                            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), nibble);
                            other = _mm512_dpbusd_epi32(other, high, quad(s * 8 + 4));
                        } else {
                            dot = _mm512_dpbusd_epi32(dot, bytes, quad(s * 4));
                        }
                    }
                    let dot = _mm512_cvtepi32_ps(_mm512_add_epi32(dot, other));
                    let factor = _mm512_mul_ps(load_scales(layout.scales, scales, g), scale);
                    *sum = _mm512_fmadd_ps(dot, factor, *sum);
                }
            }
        }
        for (g, sum) in sums.iter().enumerate().take(groups) {
            self.put(row, g, *sum, out);
        }
        1
    }

    /// Writes the results of the `g`-th group.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    fn put(&self, row: usize, g: usize, sum: __m512, out: &mut Columns<'_>) {
        let start = (self.group + g - self.first) * GROUP;
        let columns = out.row(row, start..(start + GROUP).min(out.width()));
        let mask = ((1u32 << columns.len()) - 1) as u16;
        // SAFETY: `mask` selects as many floats as the slice has.
        unsafe { _mm512_mask_storeu_ps(columns.as_mut_ptr(), mask, sum) };
    }

    /// `GROUPS` groups with `ROWS` rows from `row` on; gives `ROWS`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    fn tile<const BITS: usize, const POINTS: bool, const GROUPS: usize, const ROWS: usize>(
        &self,
        row: usize,
        out: &mut Columns<'_>,
    ) -> usize {
        let (weight, acts) = (self.weight, self.acts);
        let (blocks, block, steps) = (weight.blocks, weight.block, weight.block_steps());
        let nibble = _mm512_set1_epi8(15);
        let (layout, place) = (&weight.layout, self.group % TILE);
        assert!(
            place + GROUPS <= TILE
                && self.group + GROUPS <= weight.groups()
                && row + ROWS <= acts.rows
                && steps * 32 == block * BITS,
            "invariant: the tile lies in both matrices"
        );
        let tile = (self.group / TILE) * blocks * layout.size;
        assert!(
            tile + blocks * layout.size <= weight.data.len() && layout.steps == steps * 64,
            "invariant: the tile is in memory"
        );
        // SAFETY: as asserted.
        let tile = unsafe { weight.data.as_ptr().add(tile) };
        let (values, centres, act_scales) = (acts.values.as_ptr(), &acts.centres[..], &acts.scales[..]);
        let mut sums = [[_mm512_setzero_ps(); GROUPS]; ROWS];
        for b in 0..blocks {
            // SAFETY: the tile has a unit for every block; in it are steps, scales and points of four groups.
            let (packed, scales, points) = unsafe {
                let unit = tile.add(b * layout.size);
                (
                    unit.add(place * layout.steps),
                    unit.add(layout.scales_at + place * GROUP * layout.scales.bytes()),
                    unit.add(layout.points_at + place * GROUP),
                )
            };
            let mut dots = [[_mm512_setzero_si512(); GROUPS]; ROWS];
            for (r, dots) in dots.iter_mut().enumerate() {
                // SAFETY: `centres` holds a value for every row and block.
                let centre = unsafe { *centres.get_unchecked((row + r) * blocks + b) };
                for (g, dot) in dots.iter_mut().enumerate() {
                    *dot = if POINTS {
                        // SAFETY: there are sixteen points for every block of a group.
                        let points = unsafe { _mm_loadu_si128(points.add(g * GROUP).cast()) };
                        _mm512_mullo_epi32(
                            _mm512_cvtepu8_epi32(points),
                            _mm512_set1_epi32(centre >> (BITS - 1)),
                        )
                    } else {
                        _mm512_set1_epi32(centre)
                    };
                }
            }
            for s in 0..steps {
                // SAFETY: a group has 64 bytes for every step of every block.
                let bytes: [__m512i; GROUPS] = std::array::from_fn(|g| unsafe {
                    _mm512_loadu_si512(packed.add((g * steps + s) * 64).cast())
                });
                let quad = |r: usize, half: usize| {
                    let at = ((row + r) * blocks + b) * block + s * (32 / BITS) + half * 4;
                    // SAFETY: `values` holds `blocks · block` values for every row; a step of 4-bit weights goes with
                    // eight of them, one of 8-bit weights with four.
                    let four = unsafe { values.add(at).cast::<i32>().read_unaligned() };
                    _mm512_set1_epi32(four)
                };
                if BITS == 4 {
                    let low = bytes.map(|bytes| _mm512_and_si512(bytes, nibble));
                    for (r, dots) in dots.iter_mut().enumerate() {
                        let four = quad(r, 0);
                        for (dot, low) in dots.iter_mut().zip(low) {
                            *dot = _mm512_dpbusd_epi32(*dot, low, four);
                        }
                    }
                    let high = bytes.map(|bytes| _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), nibble));
                    for (r, dots) in dots.iter_mut().enumerate() {
                        let four = quad(r, 1);
                        for (dot, high) in dots.iter_mut().zip(high) {
                            *dot = _mm512_dpbusd_epi32(*dot, high, four);
                        }
                    }
                } else {
                    for (r, dots) in dots.iter_mut().enumerate() {
                        let four = quad(r, 0);
                        for (dot, bytes) in dots.iter_mut().zip(bytes) {
                            *dot = _mm512_dpbusd_epi32(*dot, bytes, four);
                        }
                    }
                }
            }
            // SAFETY: there are sixteen scales for every block of a group.
            let scales: [__m512; GROUPS] =
                std::array::from_fn(|g| unsafe { load_scales(layout.scales, scales, g) });
            for (r, (sums, dots)) in sums.iter_mut().zip(dots).enumerate() {
                // SAFETY: `scales` holds a value for every row and block.
                let scale = _mm512_set1_ps(unsafe { *act_scales.get_unchecked((row + r) * blocks + b) });
                for g in 0..GROUPS {
                    let factor = _mm512_mul_ps(scales[g], scale);
                    sums[g] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[g]), factor, sums[g]);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (g, sum) in sums.iter().enumerate() {
                self.put(row + r, g, *sum, out);
            }
        }
        ROWS
    }
}

/// The scales of the `g`-th group from `start` on.
///
/// # Safety
/// They are in memory.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
unsafe fn load_scales(kind: Scales, start: *const u8, g: usize) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        match kind {
            Scales::F32 => _mm512_loadu_ps(start.cast::<f32>().add(g * GROUP)),
            Scales::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(start.add(g * GROUP * 2).cast())),
            Scales::Bf16 => {
                let halves = _mm256_loadu_si256(start.add(g * GROUP * 2).cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
            }
        }
    }
}
