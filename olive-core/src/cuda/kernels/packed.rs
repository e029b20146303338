//! Packed weights in device memory, dequantized to bfloat16 where they are multiplied.

use cubecl::prelude::*;
use half::bf16;

use super::unit_per_item;
use crate::cuda::device::{Gpu, Numbers};
use crate::cuda::matrix::{Element, Matrix};
use crate::error::{Error, Result};
use crate::packed::QuantMatrix;
use crate::packed::nf4::Nf4Matrix;

/// A [`QuantMatrix`] on the device.
#[derive(Debug, Clone)]
pub struct DevicePacked {
    /// `[out, in]`.
    pub shape: [usize; 2],
    bits: usize,
    group_size: usize,
    /// As packed on the host, four bytes a word.
    words: Numbers,
    /// `[out, groups]`.
    scales: Matrix,
    /// `[out, groups]`.
    zeros: Matrix,
}

/// An [`Nf4Matrix`] on the device.
#[derive(Debug, Clone)]
pub struct NormalFloats {
    /// `[out, in]`.
    pub shape: [usize; 2],
    block_size: usize,
    words: Numbers,
    /// One a block.
    largest: Matrix,
    /// The sixteen values.
    code: Matrix,
}

/// A unit for each word of packed values.
#[cube(launch_unchecked)]
fn dequantize(
    words: &Array<u32>,
    scales: &Array<f32>,
    zeros: &Array<f32>,
    out: &mut Array<bf16>,
    items: u32,
    group_size: u32,
    #[comptime] bits: u32,
) {
    if ABSOLUTE_POS < items as usize {
        let count = comptime!(32u32 / bits);
        let mask = comptime!((1u32 << bits) - 1u32);
        let word = words[ABSOLUTE_POS];
        let first = ABSOLUTE_POS * count as usize;
        // A word never spans two groups, and rows are whole groups.
        let group = first / group_size as usize;
        let scale = scales[group];
        let zero = zeros[group];
        #[unroll]
        for i in 0..count {
            let q = f32::cast_from((word >> (i * bits)) & mask);
            out[first + i as usize] = bf16::cast_from((q - zero) * scale);
        }
    }
}

/// A unit for each word of eight normal floats; of a byte, the high half comes first.
#[cube(launch_unchecked)]
fn dequantize_nf4(
    words: &Array<u32>,
    largest: &Array<f32>,
    code: &Array<f32>,
    out: &mut Array<bf16>,
    items: u32,
    block_size: u32,
) {
    if ABSOLUTE_POS < items as usize {
        let word = words[ABSOLUTE_POS];
        let first = ABSOLUTE_POS * 8usize;
        let scale = largest[first / block_size as usize];
        #[unroll]
        for i in 0..8u32 {
            let q = (word >> ((i ^ 1u32) * 4u32)) & 15u32;
            out[first + i as usize] = bf16::cast_from(code[q as usize] * scale);
        }
    }
}

impl Gpu {
    /// Uploads a packed weight as it is.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for groups that are no multiple of eight inputs.
    pub fn upload_packed(&self, name: &str, matrix: &QuantMatrix) -> Result<DevicePacked> {
        if !matrix.group_size.is_multiple_of(8) {
            let what = format!("`{name}` with groups of {}", matrix.group_size);
            return Err(Error::unsupported(what, "the GPU reads groups of multiples of 8"));
        }
        let zeros: Vec<f32> = matrix.unpack_zeros().into_iter().map(f32::from).collect();
        Ok(DevicePacked {
            shape: [matrix.rows, matrix.cols],
            bits: matrix.bits,
            group_size: matrix.group_size,
            words: Numbers {
                handle: self.upload(matrix.values.clone()),
                len: matrix.values.len() / 4,
            },
            scales: self.upload_f32(&matrix.scales, matrix.rows, matrix.groups()),
            zeros: self.upload_f32(&zeros, matrix.rows, matrix.groups()),
        })
    }

    /// Uploads normal floats as they are.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for blocks that are no multiple of eight values.
    pub fn upload_nf4(&self, name: &str, matrix: &Nf4Matrix) -> Result<NormalFloats> {
        let count = matrix.rows * matrix.cols;
        if !matrix.block_size.is_multiple_of(8) || !count.is_multiple_of(8) {
            let what = format!("`{name}` with blocks of {}", matrix.block_size);
            return Err(Error::unsupported(what, "the GPU reads blocks of multiples of 8"));
        }
        let blocks = count.div_ceil(matrix.block_size);
        let largest: Vec<f32> = (0..blocks).map(|block| matrix.absmax.get(block)).collect();
        Ok(NormalFloats {
            shape: [matrix.rows, matrix.cols],
            block_size: matrix.block_size,
            words: Numbers {
                handle: self.upload(matrix.values.clone()),
                len: count / 8,
            },
            largest: self.upload_f32(&largest, 1, largest.len()),
            code: self.upload_f32(&matrix.code, 1, matrix.code.len()),
        })
    }

    /// Writes a packed weight to the first elements of `out` (bfloat16).
    pub fn dequantize(&self, packed: &DevicePacked, out: &Matrix) {
        let items = packed.words.len;
        let (count, dim) = unit_per_item(items);
        debug_assert!(
            out.element == Element::Bf16,
            "invariant: weights are dequantized to bfloat16"
        );
        // SAFETY: `out` has room for the weight, and every word lies in one group.
        unsafe {
            dequantize::launch_unchecked(
                &self.client,
                count,
                dim,
                packed.words.arg(),
                packed.scales.arg(),
                packed.zeros.arg(),
                out.arg(),
                items as u32,
                packed.group_size as u32,
                packed.bits as u32,
            );
        }
    }

    /// Writes normal floats to the first elements of `out` (bfloat16).
    pub fn dequantize_nf4(&self, packed: &NormalFloats, out: &Matrix) {
        let items = packed.words.len;
        let (count, dim) = unit_per_item(items);
        // SAFETY: as for `dequantize`.
        unsafe {
            dequantize_nf4::launch_unchecked(
                &self.client,
                count,
                dim,
                packed.words.arg(),
                packed.largest.arg(),
                packed.code.arg(),
                out.arg(),
                items as u32,
                packed.block_size as u32,
            );
        }
    }
}
