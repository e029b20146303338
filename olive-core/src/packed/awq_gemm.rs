//! The AutoAWQ "gemm" layout, as AutoAWQ 0.2 stores it.
//!
//! ```text
//! qweight int32   [in, out / 8]      word c of row k, bits 4i..4i+4: q[8c + ORDER[i], k]
//! qzeros  int32   [in / g, out / 8]  the same interleave along out; the true zero point
//! scales  float16 [in / g, out]
//! ```

use half::f16;
use rayon::prelude::*;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::packed::QuantMatrix;

/// Out-channel offset that nibble `i` of a word holds.
pub const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// The three tensors of a packed linear, little-endian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwqTensors {
    /// `int32 [in, out / 8]`.
    pub qweight: Vec<u8>,
    /// `int32 [in / g, out / 8]`.
    pub qzeros: Vec<u8>,
    /// `float16 [in / g, out]`.
    pub scales: Vec<u8>,
}

/// Stores a 4-bit matrix in this layout. Scales are rounded to `float16`.
///
/// # Errors
/// [`Error::Tensor`] if the matrix is not 4-bit or its rows are not a multiple of 8.
pub fn store(matrix: &QuantMatrix) -> Result<AwqTensors> {
    if matrix.bits != 4 || !matrix.rows.is_multiple_of(8) {
        let found = format!("{} bits, {} rows", matrix.bits, matrix.rows);
        return Err(Error::tensor(
            "AWQ weight",
            "4 bits and a multiple of 8 output features",
            found,
        ));
    }
    let (rows, groups) = (matrix.rows, matrix.groups());
    let scales = (0..groups)
        .flat_map(|g| (0..rows).map(move |r| (g, r)))
        .flat_map(|(g, r)| f16::from_f32(matrix.scales[r * groups + g]).to_le_bytes())
        .collect();
    Ok(AwqTensors {
        qweight: store_words(&matrix.unpack_values(), rows, matrix.cols),
        qzeros: store_words(&matrix.unpack_zeros(), rows, groups),
        scales,
    })
}

/// Reads a linear `[out, in]` stored in this layout.
///
/// # Errors
/// [`Error::Tensor`] named `name` if a length does not fit the shape or `out` is not a multiple of 8.
pub fn load(name: &str, shape: [usize; 2], group_size: usize, tensors: &AwqTensors) -> Result<QuantMatrix> {
    let [rows, cols] = shape;
    if group_size == 0 || !cols.is_multiple_of(group_size) || !rows.is_multiple_of(8) {
        let expected =
            format!("groups of {group_size} that divide {cols} inputs, and a multiple of 8 outputs");
        return Err(Error::tensor(name, expected, format!("{shape:?}")));
    }
    let groups = cols / group_size;
    let lengths = [tensors.qweight.len(), tensors.qzeros.len(), tensors.scales.len()];
    let wanted = [cols * rows / 2, groups * rows / 2, groups * rows * 2];
    if lengths != wanted {
        return Err(Error::tensor(
            name,
            format!("{wanted:?} bytes"),
            format!("{lengths:?}"),
        ));
    }
    let stored = DType::F16.to_f32(&tensors.scales).unwrap_or_default();
    let mut scales = vec![0.0; rows * groups];
    for (i, scale) in stored.into_iter().enumerate() {
        scales[(i % rows) * groups + i / rows] = scale;
    }
    let values = load_words(&tensors.qweight, rows, cols);
    let zeros = load_words(&tensors.qzeros, rows, groups);
    QuantMatrix::pack(shape, 4, group_size, &values, (scales, DType::F16), Some(&zeros))
}

/// Columns that are turned together: the bytes of eight rows stay in the nearest cache.
const COLUMNS: usize = 64;

/// `values [rows, cols]` → words `[cols, rows / 8]`.
fn store_words(values: &[u8], rows: usize, cols: usize) -> Vec<u8> {
    let mut bytes = vec![0; rows * cols / 2];
    let pieces = bytes.par_chunks_mut((COLUMNS * rows / 2).max(1)).enumerate();
    pieces.for_each(|(piece, bytes)| {
        let first_col = piece * COLUMNS;
        let count = COLUMNS.min(cols - first_col);
        for (eight, values) in values.chunks_exact(8 * cols).enumerate() {
            let mut words = [0u32; COLUMNS];
            for (nibble, offset) in ORDER.iter().enumerate() {
                let row = &values[offset * cols + first_col..][..count];
                for (word, value) in words.iter_mut().zip(row) {
                    *word |= u32::from(*value) << (4 * nibble);
                }
            }
            for (word, column) in words.iter().zip(bytes.chunks_exact_mut(rows / 2)) {
                column[4 * eight..][..4].copy_from_slice(&word.to_le_bytes());
            }
        }
    });
    bytes
}

/// Words `[cols, rows / 8]` → `values [rows, cols]`.
fn load_words(bytes: &[u8], rows: usize, cols: usize) -> Vec<u8> {
    let mut values = vec![0; rows * cols];
    let pieces = values.par_chunks_mut((8 * cols).max(1)).enumerate();
    pieces.for_each(|(eight, values)| {
        for (col, words) in bytes.chunks_exact(rows / 2).enumerate() {
            let word = &words[4 * eight..][..4];
            let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            for (nibble, offset) in ORDER.iter().enumerate() {
                values[offset * cols + col] = ((word >> (4 * nibble)) & 0xf) as u8;
            }
        }
    });
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nibbles_of_a_word_hold_the_interleaved_channels() {
        // One input column, eight outputs whose value is their own number.
        let values: Vec<u8> = (0..8).collect();
        let bytes = store_words(&values, 8, 1);
        assert_eq!(
            u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            0x7531_6420
        );
    }

    #[test]
    fn loading_undoes_storing() {
        let values: Vec<u8> = (0..16 * 64).map(|i| (i * 11 % 16) as u8).collect();
        let zeros: Vec<u8> = (0..16 * 2).map(|i| (i * 5 % 16) as u8).collect();
        let scales: Vec<f32> = (0..32).map(|i| 0.25 * (i + 1) as f32).collect();
        let matrix = QuantMatrix::pack([16, 64], 4, 32, &values, (scales, DType::F16), Some(&zeros)).unwrap();
        let stored = store(&matrix).unwrap();
        assert_eq!(load("w", [16, 64], 32, &stored).unwrap(), matrix);
        assert!(load("w", [16, 32], 32, &stored).is_err());
    }
}
