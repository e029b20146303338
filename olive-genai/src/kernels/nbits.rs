//! Products with block-quantized weights (`com.microsoft::MatMulNBits`), read in the packed layout of the file: the
//! matrix is never unpacked.
//!
//! `y[m, n] = Σ_b s[n, b] · Σ_{k in b} a[m, k] · (q[n, k] − z[n, b])`

use std::ops::Range;

use olive_core::{Error, Result};
use olive_onnx::ir;

use super::activation::{FloatActivations, LANES, QuantActivations, unit_elements};
use super::isa::{Isa, isa};
use super::panel::Panel;
#[cfg(target_arch = "x86_64")]
use super::x86_64::{avx2, avx512};
use super::{dense, parallel, scalar};

/// Output features that one piece of work holds.
const PIECE: usize = 64;
/// From this many rows on, float activations are multiplied with unpacked pieces of `PIECE` features.
const FLOAT_TILE_ROWS: usize = 8;
/// From this many rows on, rounded activations are multiplied with unpacked panels.
const PANEL_ROWS: usize = 8;
/// Readable bytes that the kernels may load behind the last zero point.
pub(super) const ZERO_POINT_PADDING: usize = 8;

/// The integer that stands for zero in each block.
#[derive(Debug, Clone)]
pub enum ZeroPoints {
    /// The same everywhere: `2^(bits − 1)` where the node has no zero points.
    Constant(u8),
    /// `[n, blocks]`, one byte each, with a few readable bytes behind them.
    Bytes(Vec<u8>),
    /// `[n, blocks]` floats.
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
    /// `[n, blocks, block · bits / 8]`, low nibble first.
    packed: ir::Tensor,
    /// `[n, blocks]`.
    pub scales: Vec<f32>,
    /// Zero points.
    pub zero_points: ZeroPoints,
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
            ZeroPoints::Bytes(bytes) => bytes.len().saturating_sub(ZERO_POINT_PADDING),
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
        Ok(Self {
            n,
            k,
            bits,
            block,
            blocks,
            packed,
            scales,
            zero_points,
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
        let mut out = Vec::with_capacity(shape.n * blocks + ZERO_POINT_PADDING);
        for row in bytes.chunks_exact(row) {
            if shape.bits == 4 {
                out.extend((0..blocks).map(|b| row[b / 2] >> (b % 2 * 4) & 15));
            } else {
                out.extend_from_slice(row);
            }
        }
        out.resize(out.len() + ZERO_POINT_PADDING, 0);
        Ok(ZeroPoints::Bytes(out))
    }

    /// Bytes of a row of packed elements.
    pub fn row_bytes(&self) -> usize {
        self.blocks * self.block * self.bits / 8
    }

    /// The packed elements of output feature `n`.
    pub fn row(&self, n: usize) -> &[u8] {
        let bytes = self.packed.borrowed().unwrap_or_default();
        &bytes[n * self.row_bytes()..(n + 1) * self.row_bytes()]
    }

    /// The scales of output feature `n`.
    pub fn row_scales(&self, n: usize) -> &[f32] {
        &self.scales[n * self.blocks..(n + 1) * self.blocks]
    }

    /// The zero point of a block as a float.
    pub fn zero_point(&self, n: usize, block: usize) -> f32 {
        match &self.zero_points {
            ZeroPoints::Constant(z) => f32::from(*z),
            ZeroPoints::Bytes(bytes) => f32::from(bytes[n * self.blocks + block]),
            ZeroPoints::Floats(floats) => floats[n * self.blocks + block],
        }
    }

    /// The zero point of a block of a weight whose zero points are integers.
    pub(super) fn integer_zero_point(&self, n: usize, block: usize) -> i32 {
        match &self.zero_points {
            ZeroPoints::Constant(z) => i32::from(*z),
            ZeroPoints::Bytes(bytes) => i32::from(bytes[n * self.blocks + block]),
            ZeroPoints::Floats(_) => 0,
        }
    }

    /// Writes the values of output feature `n`.
    pub fn dequantize_row(&self, n: usize, out: &mut [f32]) {
        let packed = self.row(n);
        let scales = self.row_scales(n);
        for (b, out) in out[..self.k].chunks_mut(self.block).enumerate() {
            let (scale, zero) = (scales[b], self.zero_point(n, b));
            if self.bits == 4 {
                let bytes = &packed[b * self.block / 2..];
                for (i, v) in out.iter_mut().enumerate() {
                    let q = bytes[i / 2] >> (i % 2 * 4) & 15;
                    *v = (f32::from(q) - zero) * scale;
                }
            } else {
                let bytes = &packed[b * self.block..];
                for (v, q) in out.iter_mut().zip(bytes) {
                    *v = (f32::from(*q) - zero) * scale;
                }
            }
        }
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
        let isa = if isa.is_available() { isa } else { Isa::Scalar };
        let rows = activations.len() / self.k;
        let integers = quantize_activations && !matches!(self.zero_points, ZeroPoints::Floats(_));
        let work = rows * self.k * self.n / 4;
        if rows == 0 {
            return;
        }
        let features = |i: usize| i * PIECE..(i * PIECE + PIECE).min(self.n);
        let out = &mut out[..rows * self.n];
        if integers {
            let acts = QuantActivations::new(activations, self.k, self.bits, self.block);
            parallel::for_columns(out, self.n, PIECE, work, |i, out| {
                integer_piece(isa, self, features(i), &acts, out);
            });
        } else if rows < FLOAT_TILE_ROWS {
            let acts = FloatActivations::new(activations, self.k, self.bits);
            parallel::for_columns(out, self.n, PIECE, work, |i, out| {
                float_piece(isa, self, features(i), &acts, out);
            });
        } else {
            parallel::for_columns(out, self.n, PIECE, work, |i, out| {
                self.unpacked_piece(features(i), activations, out);
            });
        }
    }

    fn unpacked_piece(&self, features: Range<usize>, activations: &[f32], out: &mut [f32]) {
        let mut tile = vec![0.0; features.len() * self.k];
        for (n, row) in features.zip(tile.chunks_exact_mut(self.k)) {
            self.dequantize_row(n, row);
        }
        dense::matmul_transposed(&tile, activations, self.k, out);
    }

    /// First block and number of blocks of a unit of 64 packed bytes.
    pub(super) fn unit_blocks(&self, unit: usize) -> Range<usize> {
        let elements = unit_elements(self.bits);
        let first = unit * elements / self.block;
        first..((unit + 1) * elements).div_ceil(self.block).min(self.blocks)
    }

    /// For each lane of a unit, which of the unit's blocks it lies in.
    pub(super) fn lane_blocks(&self) -> [i32; LANES] {
        let lane = unit_elements(self.bits) / LANES;
        std::array::from_fn(|l| (l * lane / self.block) as i32)
    }
}

/// Integer products of some output features with all rows; `out` is `[features, rows]`. Every version gives the same
/// bits: a unit's 16 lanes are summed apart, with one rounding a unit, and then added up in halves.
fn integer_piece(
    isa: Isa,
    weight: &NBitsWeight,
    features: Range<usize>,
    acts: &QuantActivations,
    out: &mut [f32],
) {
    let few = acts.rows < PANEL_ROWS;
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `NBitsWeight::matmul_with` uses only what the processor has.
        Isa::Avx512Vnni if few => unsafe { avx512::integer_piece(weight, features, acts, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 if few => unsafe { avx2::integer_piece(weight, features, acts, out) },
        _ => panel_pieces(isa, weight, features, acts, out),
    }
}

/// [`integer_piece`] a panel at a time.
fn panel_pieces(
    isa: Isa,
    weight: &NBitsWeight,
    features: Range<usize>,
    acts: &QuantActivations,
    out: &mut [f32],
) {
    let mut panel = Panel::new(weight, features.len());
    let step = panel.features;
    for (first, out) in features
        .clone()
        .step_by(step)
        .zip(out.chunks_mut(step * acts.rows))
    {
        panel.unpack(isa, weight, first..(first + step).min(features.end));
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `NBitsWeight::matmul_with` uses only what the processor has.
            Isa::Avx512Vnni => unsafe { avx512::panel_piece(weight.bits, &panel, acts, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { avx2::panel_piece(weight.bits, &panel, acts, out) },
            _ => scalar::panel_piece(weight.bits, &panel, acts, out),
        }
    }
}

/// Float products of some output features with all rows; `out` is `[features, rows]`.
fn float_piece(
    isa: Isa,
    weight: &NBitsWeight,
    features: Range<usize>,
    acts: &FloatActivations,
    out: &mut [f32],
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `NBitsWeight::matmul_with` uses only what the processor has.
        Isa::Avx512Vnni => unsafe { avx512::float_piece(weight, features, acts, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { avx2::float_piece(weight, features, acts, out) },
        _ => scalar::float_piece(weight, features, acts, out),
    }
}

#[cfg(test)]
mod tests;
