//! Products with block-quantized weights (`com.microsoft::MatMulNBits`). The packed bytes are put into the kernels' order
//! once; the matrix is never unpacked.
//!
//! `y[m, n] = Σ_b s[n, b] · Σ_{k in b} a[m, k] · (q[n, k] − z[n, b])`
//!
//! Sixteen output features are a *group*; a vector lane is a feature. Four bytes of a row are a *step*: eight elements
//! of 4 bits or four of 8 bits. A group holds, for each step, the four bytes of its sixteen features side by side, so
//! that one load serves all of them and no sum goes across lanes.

mod layout;

use std::ops::Range;

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
/// Groups that one piece of work holds.
const PIECE_GROUPS: usize = 4;

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
    /// `[groups, steps, 16, 4]`.
    pub(super) packed: Aligned<u8>,
    /// `[groups, blocks, 16]`, zero behind the last feature.
    pub(super) scales: Aligned<f32>,
    /// `[groups, blocks, 16]` where they are not constant.
    pub(super) zero_points: ZeroPoints,
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
        scales: Vec<f32>,
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
        Ok(Self {
            n,
            k,
            bits,
            block,
            blocks,
            packed: layout::interleave_steps(bytes, n),
            scales: layout::interleave(&scales, n, blocks),
            zero_points: match zero_points {
                ZeroPoints::Constant(z) => ZeroPoints::Constant(z),
                ZeroPoints::Bytes(points) => {
                    ZeroPoints::Bytes(layout::interleave(&points, n, blocks).to_vec())
                }
                ZeroPoints::Floats(points) => {
                    ZeroPoints::Floats(layout::interleave(&points, n, blocks).to_vec())
                }
            },
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

    /// The packed steps of a group.
    pub(super) fn group_steps(&self, group: usize) -> &[u8] {
        let bytes = self.blocks * self.block_steps() * 64;
        &self.packed[group * bytes..(group + 1) * bytes]
    }

    /// The blocks of a group in `[groups, blocks, 16]`.
    pub(super) fn group_blocks(&self, group: usize) -> Range<usize> {
        group * self.blocks * GROUP..(group + 1) * self.blocks * GROUP
    }

    /// Where the block of a feature is in `[groups, blocks, 16]`.
    fn place(&self, n: usize, block: usize) -> usize {
        (n / GROUP * self.blocks + block) * GROUP + n % GROUP
    }

    /// The zero point of a block as a float.
    pub fn zero_point(&self, n: usize, block: usize) -> f32 {
        match &self.zero_points {
            ZeroPoints::Constant(z) => f32::from(*z),
            ZeroPoints::Bytes(bytes) => f32::from(bytes[self.place(n, block)]),
            ZeroPoints::Floats(floats) => floats[self.place(n, block)],
        }
    }

    /// Writes the values of output feature `n`.
    pub fn dequantize_row(&self, n: usize, out: &mut [f32]) {
        let steps = self.group_steps(n / GROUP);
        for (k, v) in out[..self.k].iter_mut().enumerate() {
            let at = n % GROUP * 4;
            let q = if self.bits == 4 {
                steps[k / 8 * 64 + at + k % 8 / 2] >> (k % 2 * 4) & 15
            } else {
                steps[k / 4 * 64 + at + k % 4]
            };
            let block = k / self.block;
            *v = (f32::from(q) - self.zero_point(n, block)) * self.scales[self.place(n, block)];
        }
    }

    /// Whether [`NBitsWeight::matmul`] can round activations: not with float zero points.
    pub fn takes_integers(&self) -> bool {
        !matches!(self.zero_points, ZeroPoints::Floats(_))
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
            PIECE_GROUPS * GROUP,
            work,
            |i, columns| {
                f(
                    i * PIECE_GROUPS..((i + 1) * PIECE_GROUPS).min(self.groups()),
                    columns,
                );
            },
        );
    }
}

#[cfg(test)]
mod tests;
