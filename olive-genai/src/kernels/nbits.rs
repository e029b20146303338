//! Products with block-quantized weights (`com.microsoft::MatMulNBits`). The packed bytes are put into the kernels' order
//! once; the matrix is never unpacked.
//!
//! `y[m, n] = Σ_b s[n, b] · Σ_{k in b} a[m, k] · (q[n, k] − z[n, b])`
//!
//! Sixteen output features are a *group*; a vector lane is a feature. Four bytes of a row are a *step*: eight elements
//! of 4 bits or four of 8 bits. A block of a group holds, for each step, the four bytes of its sixteen features side by
//! side, so that one load serves all of them and no sum goes across lanes.
//!
//! A product with one row reads every weight once, and a core reads one sequence of lines about twice as fast as
//! several at a time. So four groups are a *tile*, and a tile is one piece of memory: block after block, the steps of
//! its groups, their scales and their zero points. Scales take 16 bits where that loses nothing.

mod layout;

use std::ops::Range;

use bytemuck::Pod;
use half::f16;
use half::slice::HalfFloatSliceExt;
use olive_core::{Error, Result};
use olive_onnx::ir;

#[cfg(target_arch = "aarch64")]
use super::aarch64::{dotprod, neon};
use super::activation::QuantActivations;
use super::aligned::Aligned;
use super::isa::{Isa, isa};
use super::parallel::{self, Columns};
#[cfg(target_arch = "x86_64")]
use super::x86_64::{avx2, avx512};
use super::{float_blocks, scalar};

/// Output features of a group.
pub const GROUP: usize = 16;
/// Groups of a tile.
pub const TILE: usize = 4;

/// The integer that stands for zero in each block.
#[derive(Debug, Clone)]
pub enum ZeroPoints {
    /// The same everywhere: `2^(bits − 1)` where the node has no zero points.
    Constant(u8),
    /// One byte for each block: `[n, blocks]` when a weight is made.
    Bytes(Vec<u8>),
    /// `[n, blocks]` floats when a weight is made.
    Floats(Vec<f32>),
}

/// A weight of `n` output and `k` input features with 4 or 8 bits an element.
#[derive(Debug)]
pub struct NBitsWeight {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// 4 or 8.
    pub bits: usize,
    /// Elements of a block, a power of two from 16 on.
    pub block: usize,
    /// `ceil(k / block)`.
    pub blocks: usize,
    /// `[tiles, blocks]` of what `layout` says; zero behind the last feature.
    pub(super) data: Aligned<u8>,
    pub(super) layout: Layout,
}

/// How scales are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scales {
    /// As they are.
    F32,
    /// Halves, which all of them are.
    F16,
    /// Upper halves, as the lower ones are zero.
    Bf16,
}

/// How zero points are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Points {
    /// Not at all.
    Constant(u8),
    /// As bytes.
    Bytes,
    /// As floats.
    Floats,
}

/// A block of a tile: `[4, steps, 16, 4]` packed bytes, `[4, 16]` scales, `[4, 16]` zero points.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// Packed bytes of a block of a group.
    pub(super) steps: usize,
    pub(super) scales: Scales,
    pub(super) points: Points,
    /// Where the scales start.
    pub(super) scales_at: usize,
    /// Where the zero points start.
    pub(super) points_at: usize,
    /// Bytes of a block of a tile.
    pub(super) size: usize,
}

impl Layout {
    fn new(steps: usize, scales: Scales, points: Points) -> Self {
        let scales_at = TILE * steps;
        let points_at = scales_at + TILE * GROUP * scales.bytes();
        let point = match points {
            Points::Constant(_) => 0,
            Points::Bytes => 1,
            Points::Floats => 4,
        };
        Self {
            steps,
            scales,
            points,
            scales_at,
            points_at,
            size: points_at + TILE * GROUP * point,
        }
    }
}

impl Scales {
    /// Bytes of one.
    pub(super) const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// How the sizes of a packed weight are given.
#[derive(Debug, Clone, Copy)]
pub struct NBitsShape {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Bits of an element.
    pub bits: usize,
    /// Elements of a block.
    pub block: usize,
}

impl NBitsWeight {
    /// Takes over a packed tensor with its scales (`n · blocks` values) and zero points.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other bits than 4 and 8, [`Error::Tensor`] for sizes that do not fit.
    pub fn new(
        shape: NBitsShape,
        packed: ir::Tensor,
        scales: &[f32],
        zero_points: ZeroPoints,
    ) -> Result<Self> {
        let NBitsShape { n, k, bits, block } = shape;
        if bits != 4 && bits != 8 {
            let what = format!("`{}`: a {bits}-bit weight", packed.name);
            return Err(Error::unsupported(what, "packed weights have 4 or 8 bits"));
        }
        if !block.is_power_of_two() || block < 16 || k == 0 || n == 0 {
            let found = format!("n {n}, k {k}, block size {block}");
            return Err(Error::tensor(
                &packed.name,
                "sizes above zero and a block size that is a power of two from 16 on",
                found,
            ));
        }
        let blocks = k.div_ceil(block);
        let wanted = n.checked_mul(blocks * (block * bits / 8));
        let found = packed.borrowed().map(<[u8]>::len);
        if found.is_none() || found != wanted {
            let expected = format!(
                "{wanted:?} bytes in memory for [{n}, {blocks}, {}]",
                block * bits / 8
            );
            return Err(Error::tensor(&packed.name, expected, format!("{found:?}")));
        }
        let points = match &zero_points {
            ZeroPoints::Constant(_) => n * blocks,
            ZeroPoints::Bytes(bytes) => bytes.len(),
            ZeroPoints::Floats(floats) => floats.len(),
        };
        if scales.len() != n * blocks || points != n * blocks {
            let found = format!("{} scales and {points} zero points", scales.len());
            return Err(Error::tensor(
                &packed.name,
                format!("{} of each", n * blocks),
                found,
            ));
        }
        let bytes = packed.borrowed().unwrap_or_default();
        let kind = match &zero_points {
            ZeroPoints::Constant(z) => Points::Constant(*z),
            ZeroPoints::Bytes(_) => Points::Bytes,
            ZeroPoints::Floats(_) => Points::Floats,
        };
        let layout = Layout::new(block * bits / 8 * GROUP, layout::narrowest(scales), kind);
        Ok(Self {
            n,
            k,
            bits,
            block,
            blocks,
            data: layout::fill(&layout, n, blocks, bytes, scales, &zero_points),
            layout,
        })
    }

    /// Unpacks zero points that are packed like the weight: each row of `blocks` starts on a new byte.
    ///
    /// # Errors
    /// [`Error::Tensor`] if `bytes` does not fit.
    pub fn unpack_zero_points(name: &str, bytes: &[u8], shape: NBitsShape) -> Result<ZeroPoints> {
        let blocks = shape.k.div_ceil(shape.block.max(1));
        let row = (blocks * shape.bits).div_ceil(8);
        if bytes.len() != shape.n * row {
            let expected = format!("{} bytes of packed zero points", shape.n * row);
            return Err(Error::tensor(name, expected, bytes.len().to_string()));
        }
        let mut out = Vec::with_capacity(shape.n * blocks);
        for row in bytes.chunks_exact(row) {
            if shape.bits == 4 {
                out.extend((0..blocks).map(|b| row[b / 2] >> (b % 2 * 4) & 15));
            } else {
                out.extend_from_slice(row);
            }
        }
        Ok(ZeroPoints::Bytes(out))
    }

    /// Groups of output features.
    pub(super) fn groups(&self) -> usize {
        self.n.div_ceil(GROUP)
    }

    /// Steps of a block.
    pub(super) fn block_steps(&self) -> usize {
        self.block * self.bits / 32
    }

    /// Where a block of a group starts: that of its tile, and the group's place in the tile.
    fn place(&self, group: usize, block: usize) -> (usize, usize) {
        (
            (group / TILE * self.blocks + block) * self.layout.size,
            group % TILE,
        )
    }

    /// `count` values for a group, of those that lie at `start` for the groups of a tile.
    fn values<T: Pod>(&self, group: usize, block: usize, start: usize, count: usize) -> &[T] {
        let (unit, place) = self.place(group, block);
        let bytes = count * size_of::<T>();
        let first = unit + start + place * bytes;
        bytemuck::cast_slice(&self.data[first..first + bytes])
    }

    /// The packed bytes of a block of a group: `[steps, 16, 4]`.
    #[inline]
    pub(super) fn steps(&self, group: usize, block: usize) -> &[u8] {
        self.values(group, block, 0, self.layout.steps)
    }

    /// The scales of a block of a group.
    #[inline]
    pub(super) fn scales(&self, group: usize, block: usize) -> [f32; GROUP] {
        let at = self.layout.scales_at;
        let mut out = [0.0; GROUP];
        match self.layout.scales {
            Scales::F32 => out.copy_from_slice(self.values(group, block, at, GROUP)),
            Scales::F16 => self
                .values::<f16>(group, block, at, GROUP)
                .convert_to_f32_slice(&mut out),
            Scales::Bf16 => {
                let halves = self.values::<u16>(group, block, at, GROUP);
                for (out, half) in out.iter_mut().zip(halves) {
                    *out = f32::from_bits(u32::from(*half) << 16);
                }
            }
        }
        out
    }

    /// The zero points of a block of a group where they are stored as bytes.
    #[inline]
    pub(super) fn point_bytes(&self, group: usize, block: usize) -> Option<&[u8]> {
        let stored = self.layout.points == Points::Bytes;
        stored.then(|| self.values(group, block, self.layout.points_at, GROUP))
    }

    /// The zero points of a block of a group as floats.
    #[inline]
    pub(super) fn points(&self, group: usize, block: usize) -> [f32; GROUP] {
        let at = self.layout.points_at;
        match self.layout.points {
            Points::Constant(z) => [f32::from(z); GROUP],
            Points::Bytes => {
                let bytes = self.values::<u8>(group, block, at, GROUP);
                std::array::from_fn(|l| f32::from(bytes[l]))
            }
            Points::Floats => {
                let floats = self.values(group, block, at, GROUP);
                std::array::from_fn(|l| floats[l])
            }
        }
    }

    /// Writes the values of output feature `n`.
    pub fn dequantize_row(&self, n: usize, out: &mut [f32]) {
        let (group, lane) = (n / GROUP, n % GROUP);
        for (block, out) in out[..self.k].chunks_mut(self.block).enumerate() {
            let steps = self.steps(group, block);
            let (point, scale) = (self.points(group, block)[lane], self.scales(group, block)[lane]);
            for (i, v) in out.iter_mut().enumerate() {
                let q = if self.bits == 4 {
                    steps[i / 8 * 64 + lane * 4 + i % 8 / 2] >> (i % 2 * 4) & 15
                } else {
                    steps[i / 4 * 64 + lane * 4 + i % 4]
                };
                *v = (f32::from(q) - point) * scale;
            }
        }
    }

    /// Whether [`NBitsWeight::matmul`] can round activations: not with float zero points.
    pub fn takes_integers(&self) -> bool {
        self.layout.points != Points::Floats
    }

    /// `out[m, n] = activations[m, k] · selfᵀ`.
    ///
    /// `quantize_activations` is `accuracy_level` 4: activations are rounded to 8 bits, a scale for each block, and
    /// multiplied as integers. Weights with float zero points take the float path.
    pub fn matmul(&self, activations: &[f32], quantize_activations: bool, out: &mut [f32]) {
        self.matmul_with(isa(), activations, quantize_activations, out);
    }

    /// [`NBitsWeight::matmul`] with the given instructions, which the processor must have; others are replaced by the
    /// plain ones.
    pub fn matmul_with(&self, isa: Isa, activations: &[f32], quantize_activations: bool, out: &mut [f32]) {
        if quantize_activations && self.takes_integers() {
            let acts = QuantActivations::new(activations, self.k, self.bits, self.block);
            return self.matmul_quantized(isa, &acts, out);
        }
        let isa = if isa.is_available() { isa } else { Isa::Scalar };
        let rows = activations.len() / self.k;
        self.pieces(rows, out, |groups, mut columns| {
            float_blocks::piece(isa, self, groups, activations, &mut columns);
        });
    }

    /// [`NBitsWeight::matmul`] with activations that are rounded already, for the bits and the block size of this
    /// weight. Every instruction set gives the same bits: a block's products are summed as integers, and blocks are
    /// added one after the other with one rounding each.
    pub fn matmul_quantized(&self, isa: Isa, acts: &QuantActivations, out: &mut [f32]) {
        assert!(
            (acts.bits, acts.block, acts.blocks) == (self.bits, self.block, self.blocks),
            "invariant: the activations are rounded for this weight"
        );
        let isa = if isa.is_available() { isa } else { Isa::Scalar };
        self.pieces(acts.rows, out, |groups, mut columns| match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `isa` is available.
            Isa::Avx512Vnni => unsafe { avx512::integer_piece(self, groups, acts, &mut columns) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { avx2::integer_piece(self, groups, acts, &mut columns) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Isa::NeonDot => unsafe { dotprod::integer_piece(self, groups, acts, &mut columns) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Isa::Neon => unsafe { neon::integer_piece(self, groups, acts, &mut columns) },
            _ => scalar::integer_piece(self, groups, acts, &mut columns),
        });
    }

    fn pieces(&self, rows: usize, out: &mut [f32], f: impl Fn(Range<usize>, Columns<'_>) + Sync) {
        if rows == 0 {
            return;
        }
        let work = rows * self.k * self.n / 4;
        parallel::for_columns(
            &mut out[..rows * self.n],
            self.n,
            TILE * GROUP,
            work,
            |i, columns| {
                f(i * TILE..((i + 1) * TILE).min(self.groups()), columns);
            },
        );
    }
}

#[cfg(test)]
mod tests;
