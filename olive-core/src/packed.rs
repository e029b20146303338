//! Block-quantized matrices in one canonical order, and the orders that other tools store.

pub mod awq_gemm;
pub mod compressed_tensors;
pub mod gptq;
pub mod nf4;
pub mod olive;
pub(crate) mod parts;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernels::wide;

/// A block-quantized weight `[rows, cols]` = `[out_features, in_features]`: `w = (q - zero) * scale`, one scale and
/// zero point for every `group_size` consecutive inputs of a row.
///
/// The order is that of ONNX Runtime's `MatMulNBits` and of Olive checkpoints:
///
/// ```text
/// values  [rows, ceil(cols * bits / 8)]    q[r, 0] in the low bits of the first byte of row r
/// scales  [rows, groups]
/// zeros   [rows, ceil(groups * bits / 8)]  packed as the values; absent: every zero point is 2^(bits-1)
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct QuantMatrix {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Bits of a value: 4 or 8.
    pub bits: usize,
    /// Inputs that share a scale; divides `cols`.
    pub group_size: usize,
    /// Packed values.
    pub values: Vec<u8>,
    /// Scales, exact in `scale_dtype`.
    pub scales: Vec<f32>,
    /// The type in which the scales are stored.
    pub scale_dtype: DType,
    /// Packed zero points.
    pub zeros: Option<Vec<u8>>,
}

impl QuantMatrix {
    /// Packs unpacked integers: `values [rows, cols]`, `scales [rows, groups]`, `zeros [rows, groups]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a length does not fit or `group_size` does not divide `cols`.
    pub fn pack(
        shape: [usize; 2],
        bits: usize,
        group_size: usize,
        values: &[u8],
        scales: (Vec<f32>, DType),
        zeros: Option<&[u8]>,
    ) -> Result<Self> {
        let [rows, cols] = shape;
        let (scales, scale_dtype) = scales;
        if !matches!(bits, 4 | 8) {
            return Err(Error::tensor("packed weight", "4 or 8 bits", bits.to_string()));
        }
        if group_size == 0 || !cols.is_multiple_of(group_size) {
            let expected = format!("a group size that divides {cols}");
            return Err(Error::tensor("packed weight", expected, group_size.to_string()));
        }
        let groups = cols / group_size;
        let lengths = [
            values.len(),
            scales.len(),
            zeros.map_or(rows * groups, <[u8]>::len),
        ];
        let wanted = [rows * cols, rows * groups, rows * groups];
        if lengths != wanted {
            return Err(Error::tensor(
                "packed weight",
                format!("{wanted:?} elements"),
                format!("{lengths:?}"),
            ));
        }
        Ok(Self {
            rows,
            cols,
            bits,
            group_size,
            values: pack_rows(values, cols, bits),
            scales,
            scale_dtype,
            zeros: zeros.map(|zeros| pack_rows(zeros, groups, bits)),
        })
    }

    /// Groups in a row.
    pub fn groups(&self) -> usize {
        self.cols / self.group_size
    }

    /// Bytes of a row of packed values.
    pub fn row_bytes(&self) -> usize {
        (self.cols * self.bits).div_ceil(8)
    }

    /// The unpacked values, `[rows, cols]`.
    pub fn unpack_values(&self) -> Vec<u8> {
        unpack_rows(&self.values, self.rows, self.cols, self.bits)
    }

    /// The unpacked zero points, `[rows, groups]`.
    pub fn unpack_zeros(&self) -> Vec<u8> {
        match &self.zeros {
            Some(zeros) => unpack_rows(zeros, self.rows, self.groups(), self.bits),
            None => vec![1 << (self.bits - 1); self.rows * self.groups()],
        }
    }

    /// Dequantizes rows `first..first + out.len() / cols` to `f32`, row-major.
    ///
    /// # Panics
    /// If `out` is not a whole number of rows inside the matrix.
    pub fn dequantize_rows(&self, first: usize, out: &mut [f32]) {
        assert!(out.len().is_multiple_of(self.cols), "invariant: whole rows");
        let groups = self.groups();
        let row_bytes = self.row_bytes();
        let zero_bytes = (groups * self.bits).div_ceil(8);
        for (offset, row_out) in out.chunks_exact_mut(self.cols).enumerate() {
            let row = first + offset;
            let values = &self.values[row * row_bytes..(row + 1) * row_bytes];
            for (group, block) in row_out.chunks_exact_mut(self.group_size).enumerate() {
                let scale = self.scales[row * groups + group];
                let zero = match &self.zeros {
                    Some(zeros) => {
                        get(&zeros[row * zero_bytes..(row + 1) * zero_bytes], group, self.bits) as f32
                    }
                    None => (1u32 << (self.bits - 1)) as f32,
                };
                let start = group * self.group_size;
                if self.bits == 4 && start.is_multiple_of(2) {
                    let bytes = &values[start / 2..(start + self.group_size).div_ceil(2)];
                    for (pair, byte) in block.chunks_mut(2).zip(bytes) {
                        for (w, value) in pair.iter_mut().zip([byte & 0xf, byte >> 4]) {
                            *w = (f32::from(value) - zero) * scale;
                        }
                    }
                    continue;
                }
                for (i, w) in block.iter_mut().enumerate() {
                    *w = (get(values, start + i, self.bits) as f32 - zero) * scale;
                }
            }
        }
    }

    /// Dequantizes the whole matrix, `[rows, cols]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        self.dequantize_rows(0, &mut out);
        out
    }

    /// The rows `range` as a matrix of their own; how a fused `qkv_proj` is cut into q, k and v.
    pub fn slice_rows(&self, range: std::ops::Range<usize>) -> Self {
        let bytes = self.row_bytes();
        let groups = self.groups();
        let zero_bytes = (groups * self.bits).div_ceil(8);
        Self {
            rows: range.len(),
            values: self.values[range.start * bytes..range.end * bytes].to_vec(),
            scales: self.scales[range.start * groups..range.end * groups].to_vec(),
            zeros: self
                .zeros
                .as_ref()
                .map(|z| z[range.start * zero_bytes..range.end * zero_bytes].to_vec()),
            ..*self
        }
    }
}

#[inline]
fn get(row: &[u8], index: usize, bits: usize) -> u8 {
    match bits {
        4 => (row[index / 2] >> ((index % 2) * 4)) & 0xf,
        _ => row[index],
    }
}

/// Packs each row of `cols` values to whole bytes, low bits first; a half-filled last byte ends in zero bits.
pub fn pack_rows(values: &[u8], cols: usize, bits: usize) -> Vec<u8> {
    if bits == 8 || cols == 0 {
        return values.to_vec();
    }
    let mut packed = vec![0; values.len() / cols * cols.div_ceil(2)];
    wide(pack_nibbles, (values, cols, packed.as_mut_slice()));
    packed
}

#[inline(always)]
fn pack_nibbles(values: &[u8], cols: usize, packed: &mut [u8]) {
    let rows = packed
        .chunks_exact_mut(cols.div_ceil(2))
        .zip(values.chunks_exact(cols));
    for (packed, row) in rows {
        let (pairs, last) = row.as_chunks::<2>();
        for (byte, [low, high]) in packed.iter_mut().zip(pairs) {
            *byte = low | high << 4;
        }
        if let (Some(byte), [low]) = (packed.last_mut(), last) {
            *byte = *low;
        }
    }
}

/// The inverse of [`pack_rows`].
pub fn unpack_rows(packed: &[u8], rows: usize, cols: usize, bits: usize) -> Vec<u8> {
    let row_bytes = (cols * bits).div_ceil(8);
    let mut values = Vec::with_capacity(rows * cols);
    for row in packed.chunks_exact(row_bytes.max(1)).take(rows) {
        values.extend((0..cols).map(|i| get(row, i, bits)));
    }
    values
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod matrix_tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn unpacking_undoes_packing(rows in 1usize..5, cols in 1usize..40, seed in any::<u64>(), wide in any::<bool>()) {
            let bits = if wide { 8 } else { 4 };
            let mask = ((1u16 << bits) - 1) as u8;
            let values: Vec<u8> = (0..rows * cols)
                .map(|i| (seed.wrapping_mul(i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 33) as u8 & mask)
                .collect();
            let packed = pack_rows(&values, cols, bits);
            prop_assert_eq!(unpack_rows(&packed, rows, cols, bits), values);
        }
    }

    #[test]
    fn dequantized_values_follow_the_formula_and_slices_agree() {
        let values: Vec<u8> = (0..4 * 64).map(|i| (i * 7 % 16) as u8).collect();
        let zeros: Vec<u8> = (0..4 * 2).map(|i| (i * 3 % 16) as u8).collect();
        let scales: Vec<f32> = (0..8).map(|i| 0.5 + i as f32).collect();
        let matrix = QuantMatrix::pack(
            [4, 64],
            4,
            32,
            &values,
            (scales.clone(), DType::F32),
            Some(&zeros),
        )
        .unwrap();
        let dense = matrix.dequantize();
        for (i, w) in dense.iter().enumerate() {
            let group = i / 64 * 2 + i % 64 / 32;
            assert_eq!(
                *w,
                (f32::from(values[i]) - f32::from(zeros[group])) * scales[group]
            );
        }
        assert_eq!(matrix.slice_rows(1..3).dequantize(), dense[64..192]);
    }

    #[test]
    fn a_group_that_does_not_divide_is_refused() {
        let error = QuantMatrix::pack([1, 48], 4, 32, &[0; 48], (vec![1.0; 2], DType::F32), None);
        assert!(error.is_err());
    }
}
