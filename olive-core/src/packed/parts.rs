//! Reading the parts of packed linears, with their types and shapes checked.

use crate::checkpoint::TensorSource;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// The bytes of a tensor that must have this type and shape.
pub fn bytes(source: &dyn TensorSource, name: &str, dtype: DType, shape: &[usize]) -> Result<Vec<u8>> {
    let info = source.require(name)?;
    if info.dtype != dtype || info.shape != shape {
        return Err(Error::tensor(name, format!("{dtype}{shape:?}"), info.to_string()));
    }
    Ok(source.bytes(name)?.into_owned())
}

/// The little-endian 32-bit words of an `int32` tensor that must have this shape.
pub fn words(source: &dyn TensorSource, name: &str, shape: &[usize]) -> Result<Vec<u32>> {
    let bytes = bytes(source, name, DType::I32, shape)?;
    Ok(to_words(&bytes))
}

/// Whole little-endian words.
pub fn to_words(bytes: &[u8]) -> Vec<u32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|word| u32::from_le_bytes(*word))
        .collect()
}

/// Refuses an order of inputs other than the stored one: group `g` holds inputs `g * size..(g + 1) * size`.
pub fn check_identity_order(
    source: &dyn TensorSource,
    name: &str,
    cols: usize,
    group_size: usize,
) -> Result<()> {
    if source.info(name).is_none() {
        return Ok(());
    }
    let order = words(source, name, &[cols])?;
    if order
        .iter()
        .enumerate()
        .any(|(k, group)| *group as usize != k / group_size)
    {
        let what = format!("`{name}`: inputs in the order of activations (`desc_act`)");
        return Err(Error::unsupported(
            what,
            "olive reads groups of consecutive inputs",
        ));
    }
    Ok(())
}

/// `values [rows, cols]` of `bits` bits to words, packed along the rows: word `[r, c]` holds rows `r * n..(r + 1) * n`
/// of column `c`, low bits first, the last one padded with zeros.
pub fn pack_down(values: &[u8], rows: usize, cols: usize, bits: usize) -> Vec<u32> {
    let in_word = 32 / bits;
    let mut words = vec![0u32; rows.div_ceil(in_word) * cols];
    for (row, line) in values.chunks_exact(cols.max(1)).enumerate().take(rows) {
        let shift = row % in_word * bits;
        for (word, value) in words[row / in_word * cols..].iter_mut().zip(line) {
            *word |= u32::from(*value) << shift;
        }
    }
    words
}

/// The inverse of [`pack_down`].
pub fn unpack_down(words: &[u32], rows: usize, cols: usize, bits: usize) -> Vec<u8> {
    let (in_word, mask) = (32 / bits, (1u32 << bits) - 1);
    let mut values = Vec::with_capacity(rows * cols);
    for row in 0..rows {
        let line = &words[row / in_word * cols..][..cols];
        values.extend(
            line.iter()
                .map(|word| ((word >> (row % in_word * bits)) & mask) as u8),
        );
    }
    values
}

/// `values [rows, cols]` to words packed along the columns, low bits first, each row padded with zeros.
pub fn pack_across(values: &[u8], cols: usize, bits: usize) -> Vec<u32> {
    let in_word = 32 / bits;
    let word = |part: &[u8]| {
        let shifted = part.iter().enumerate().map(|(i, v)| u32::from(*v) << (i * bits));
        shifted.fold(0, |word, part| word | part)
    };
    values
        .chunks_exact(cols.max(1))
        .flat_map(|row| row.chunks(in_word).map(word))
        .collect()
}

/// The inverse of [`pack_across`].
pub fn unpack_across(words: &[u32], cols: usize, bits: usize) -> Vec<u8> {
    let (in_word, mask) = (32 / bits, (1u32 << bits) - 1);
    let row_words = cols.div_ceil(in_word).max(1);
    let value = |row: &[u32], i: usize| ((row[i / in_word] >> (i % in_word * bits)) & mask) as u8;
    words
        .chunks_exact(row_words)
        .flat_map(|row| (0..cols).map(|i| value(row, i)).collect::<Vec<_>>())
        .collect()
}

/// `[rows, cols]` to `[cols, rows]`.
pub fn transpose<T: Copy>(values: &[T], rows: usize, cols: usize) -> Vec<T> {
    (0..cols)
        .flat_map(|c| (0..rows).map(move |r| values[r * cols + c]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn unpacking_undoes_packing(rows in 1usize..20, cols in 1usize..20, seed in any::<u32>(), wide in any::<bool>()) {
            let bits = if wide { 8 } else { 4 };
            let values: Vec<u8> = (0..rows * cols)
                .map(|i| ((seed.wrapping_add(i as u32).wrapping_mul(2_654_435_761) >> 13) & ((1 << bits) - 1)) as u8)
                .collect();
            prop_assert_eq!(&unpack_down(&pack_down(&values, rows, cols, bits), rows, cols, bits), &values);
            prop_assert_eq!(&unpack_across(&pack_across(&values, cols, bits), cols, bits), &values);
            prop_assert_eq!(transpose(&transpose(&values, rows, cols), cols, rows), values);
        }
    }

    #[test]
    fn the_first_value_is_in_the_low_bits() {
        assert_eq!(pack_across(&[1, 2, 3, 4, 5, 6, 7, 8], 8, 4), [0x8765_4321]);
        assert_eq!(pack_down(&[1, 2, 3, 4, 5, 6, 7, 8], 8, 1, 4), [0x8765_4321]);
        assert_eq!(pack_across(&[1, 2, 3, 4], 4, 8), [0x0403_0201]);
    }
}
