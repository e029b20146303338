//! What the block-quantized kernels share: where the operands of a tile lie, what its sums start from, and where they go.
//! A vector is a quarter of a group: four features.

use std::arch::aarch64::*;
use std::arch::asm;
use std::marker::PhantomData;

use super::super::activation::QuantActivations;
use super::super::nbits::{GROUP, NBitsWeight, Scales, TILE};
use super::super::parallel::Columns;

/// Features of a vector.
const LANES: usize = 4;
/// Groups of the largest tile.
const GROUPS: usize = 2;

/// Features from quarter `quarter` of group `group` on; `first` is the group of the output's first column.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    pub weight: &'a NBitsWeight,
    pub acts: &'a QuantActivations,
    pub group: usize,
    pub quarter: usize,
    pub first: usize,
}

impl<'a> Part<'a> {
    /// The operands of a tile of `vectors` vectors and `ROWS` rows from `row` on, at the first block.
    #[inline(always)]
    pub fn operands<const ROWS: usize>(&self, bits: usize, vectors: usize, row: usize) -> Operands<'a, ROWS> {
        let (weight, acts) = (self.weight, self.acts);
        let (blocks, block, steps) = (weight.blocks, weight.block, weight.block_steps());
        let groups = (self.quarter + vectors).div_ceil(4);
        assert!(
            (groups == 1 || self.quarter == 0)
                && groups <= GROUPS
                && self.group + groups <= weight.groups()
                && row + ROWS <= acts.rows
                && (acts.blocks, acts.block) == (blocks, block)
                && steps * 32 == block * bits,
            "invariant: the tile lies in both matrices"
        );
        let layout = &weight.layout;
        let place = self.group % TILE;
        assert!(
            place + groups <= TILE && layout.steps == steps * 64,
            "invariant: the groups are of one tile"
        );
        let tile = &weight.data[self.group / TILE * blocks * layout.size..][..blocks * layout.size];
        let place = |g: usize| place + g.min(groups - 1);
        let scale = layout.scales.bytes();
        // Where the tile has no block, pointers may be to nothing: they are not read.
        let at = |offset: usize| tile.as_ptr().wrapping_add(offset);
        let lane = |g: usize| place(g) * GROUP + self.quarter * LANES;
        let values = &acts.values[..];
        Operands {
            bytes: std::array::from_fn(|g| at(place(g) * layout.steps + self.quarter * 16)),
            next: layout.size - layout.steps,
            scales: std::array::from_fn(|g| at(layout.scales_at + lane(g) * scale)),
            kind: layout.scales,
            points: std::array::from_fn(|g| at(layout.points_at + lane(g))),
            size: layout.size,
            values: std::array::from_fn(|r| values[(row + r) * blocks * block..].as_ptr()),
            factors: acts.scales[row * blocks..].as_ptr(),
            centres: acts.centres[row * blocks..].as_ptr(),
            blocks,
            of: PhantomData,
        }
    }

    /// Writes the sums of a tile as far as there are features.
    #[target_feature(enable = "neon")]
    pub fn store<const VECTORS: usize, const ROWS: usize>(
        &self,
        row: usize,
        sums: &[[float32x4_t; VECTORS]; ROWS],
        out: &mut Columns<'_>,
    ) {
        let start = (self.group - self.first) * GROUP + self.quarter * LANES;
        let width = out.width();
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let mut four = [0.0f32; LANES];
                // SAFETY: `four` holds four floats.
                unsafe { vst1q_f32(four.as_mut_ptr(), *sum) };
                let start = (start + v * LANES).min(width);
                let columns = out.row(row + r, start..(start + LANES).min(width));
                columns.copy_from_slice(&four[..columns.len()]);
            }
        }
    }
}

/// What a tile reads next, block by block.
pub struct Operands<'a, const ROWS: usize> {
    /// Packed bytes of each group.
    bytes: [*const u8; GROUPS],
    /// From the end of a block's packed bytes to those of the next block.
    next: usize,
    /// Scales of each group.
    scales: [*const u8; GROUPS],
    /// How they are stored.
    kind: Scales,
    /// Zero points of each group, if there are any.
    points: [*const u8; GROUPS],
    /// Bytes from block to block.
    size: usize,
    /// Rounded values of each row.
    values: [*const i8; ROWS],
    /// Scales of the first row; those of the next one are `blocks` further.
    factors: *const f32,
    /// Centres in the same way.
    centres: *const i32,
    blocks: usize,
    of: PhantomData<&'a (NBitsWeight, QuantActivations)>,
}

impl<const ROWS: usize> Operands<'_, ROWS> {
    /// The packed bytes of the next step.
    ///
    /// # Safety
    /// There is another step, and the tile has `VECTORS` vectors.
    #[target_feature(enable = "neon")]
    #[inline]
    pub unsafe fn bytes<const VECTORS: usize>(&mut self) -> [uint8x16_t; VECTORS] {
        let mut out = [vdupq_n_u8(0); VECTORS];
        for (v, out) in out.iter_mut().enumerate() {
            // SAFETY: a group has 64 bytes for every step, sixteen for each vector.
            *out = unsafe { vld1q_u8(self.bytes[v / 4].add(v % 4 * 16)) };
        }
        self.bytes = self.bytes.map(|bytes| bytes.wrapping_add(64));
        out
    }

    /// The next sixteen values of each row, four quads.
    ///
    /// # Safety
    /// There are so many.
    #[target_feature(enable = "neon")]
    #[inline]
    pub unsafe fn quads(&mut self) -> [int8x16_t; ROWS] {
        let mut out = [vdupq_n_s8(0); ROWS];
        for (values, out) in self.values.iter_mut().zip(&mut out) {
            // SAFETY: as promised by the caller.
            *out = unsafe { vld1q_s8(*values) };
            *values = values.wrapping_add(16);
        }
        out
    }

    /// What the zero points take off the block's sums. Bytes are multiplied as what they are above 128.
    ///
    /// # Safety
    /// There is another block, the tile has `VECTORS` vectors, and `POINTS` says whether the weight has zero points.
    #[target_feature(enable = "neon")]
    #[inline]
    pub unsafe fn starts<const BITS: usize, const POINTS: bool, const VECTORS: usize>(
        &self,
    ) -> [[int32x4_t; VECTORS]; ROWS] {
        let mut points = [vdupq_n_s32(0); VECTORS];
        if POINTS {
            for (v, points) in points.iter_mut().enumerate() {
                // SAFETY: there are sixteen points for every block of a group, four for each vector.
                let four = unsafe {
                    let at = self.points[v / 4].add(v % 4 * LANES);
                    at.cast::<u32>().read_unaligned()
                };
                let four = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(u64::from(four)))));
                let beyond = if BITS == 4 { 0 } else { 128 };
                *points = vsubq_s32(vreinterpretq_s32_u32(four), vdupq_n_s32(beyond));
            }
        }
        let mut out = [[vdupq_n_s32(0); VECTORS]; ROWS];
        for (r, out) in out.iter_mut().enumerate() {
            // SAFETY: there is a value for every row and block.
            let centre = unsafe { *self.centres.add(r * self.blocks) };
            for (out, points) in out.iter_mut().zip(points) {
                *out = match (POINTS, BITS) {
                    (true, _) => vmulq_n_s32(points, centre >> (BITS - 1)),
                    (false, 4) => vdupq_n_s32(centre),
                    _ => vdupq_n_s32(0),
                };
            }
        }
        out
    }

    /// Adds the products of the block, with their scales, to the sums, and goes on to the next block.
    ///
    /// # Safety
    /// There is a block, and the tile has `VECTORS` vectors.
    #[target_feature(enable = "neon")]
    #[inline]
    pub unsafe fn add_block<const VECTORS: usize>(
        &mut self,
        dots: &[[int32x4_t; VECTORS]; ROWS],
        sums: &mut [[float32x4_t; VECTORS]; ROWS],
    ) {
        for v in 0..VECTORS {
            // SAFETY: there are sixteen scales for every block of a group, four for each vector.
            let scales = unsafe {
                let start = self.scales[v / 4];
                load_scales(self.kind, start.add(v % 4 * LANES * self.kind.bytes()))
            };
            for r in 0..ROWS {
                // SAFETY: there is a value for every row and block.
                let factor = unsafe { *self.factors.add(r * self.blocks) };
                let factors = vmulq_n_f32(scales, factor);
                sums[r][v] = vfmaq_f32(sums[r][v], vcvtq_f32_s32(dots[r][v]), factors);
            }
        }
        self.bytes = self.bytes.map(|bytes| bytes.wrapping_add(self.next));
        self.scales = self.scales.map(|scales| scales.wrapping_add(self.size));
        self.points = self.points.map(|points| points.wrapping_add(self.size));
        self.factors = self.factors.wrapping_add(1);
        self.centres = self.centres.wrapping_add(1);
    }
}

/// Four scales.
///
/// # Safety
/// They are in memory.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn load_scales(kind: Scales, start: *const u8) -> float32x4_t {
    match kind {
        // SAFETY: the caller's promise.
        Scales::F32 => unsafe { vld1q_f32(start.cast()) },
        Scales::Bf16 => {
            // SAFETY: as above.
            let halves = unsafe { vld1_u16(start.cast()) };
            vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(halves)))
        }
        Scales::F16 => {
            // SAFETY: as above.
            let halves = unsafe { vld1_u16(start.cast()) };
            let out: float32x4_t;
            // SAFETY: the instruction only reads and writes these registers, and every processor with NEON has it. It
            // stands for `vcvt_f32_f16`, which is not stable.
            unsafe {
                asm!(
                    "fcvtl {out:v}.4s, {halves:v}.4h",
                    out = out(vreg) out,
                    halves = in(vreg) halves,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            out
        }
    }
}
