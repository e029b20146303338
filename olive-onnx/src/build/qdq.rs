//! Blocks in the order of `DequantizeLinear` before `MatMul`: integers `[in, out]`, two in a byte, scales and zero points
//! `[blocks, out]`.

use std::sync::Arc;

use olive_core::Result;

use super::blocks::Blocks;
use super::floats;
use super::quantize::BlockQuantized;
use crate::ir::{OnnxType, Tensor};

/// `<base>_Q4`, `<base>_scales` and, where zero points are stored, `<base>_zero_points`. Without them integers are
/// signed.
pub fn tensors(blocks: &Blocks, base: &str, cols: usize) -> Result<[Option<Tensor>; 3]> {
    let (rows, count) = (blocks.rows, blocks.blocks);
    let dtype = match blocks.has_zeros {
        true => OnnxType::Uint4,
        false => OnnxType::Int4,
    };
    let row_bytes = blocks.row_bytes();
    let flip = if blocks.has_zeros { 0 } else { 8 };
    let integers = move |made: BlockQuantized| turned(&made.values, [rows, row_bytes], cols, flip);
    let values = part(blocks, &format!("{base}_Q4"), dtype, [cols, rows], integers)?;
    let io = blocks.io();
    let floats = move |made: BlockQuantized| {
        let mut turned = vec![0f32; made.scales.len()];
        for (row, line) in made.scales.chunks_exact(count).enumerate() {
            for (block, scale) in line.iter().enumerate() {
                turned[block * rows + row] = *scale;
            }
        }
        floats::encode(&turned, io)
    };
    let scales = part(blocks, &format!("{base}_scales"), io, [count, rows], floats)?;
    let zero_bytes = blocks.zero_bytes();
    let zeros = match blocks.has_zeros {
        false => None,
        true => {
            let integers = move |made: BlockQuantized| turned(&made.zeros, [rows, zero_bytes], count, 0);
            let name = format!("{base}_zero_points");
            Some(part(blocks, &name, dtype, [count, rows], integers)?)
        }
    };
    Ok([Some(values), Some(scales), zeros])
}

/// Integers `[rows, cols]` of ONNX's own 4-bit types with scales and zero points `[rows, blocks]`: `<base>_Q4`,
/// `<base>_scales`, `<base>_zero_points`. `cols` is whole blocks.
pub fn rows(blocks: &Blocks, base: &str, cols: usize) -> Result<[Option<Tensor>; 3]> {
    let (rows, count) = (blocks.rows, blocks.blocks);
    let dtype = match blocks.has_zeros {
        true => OnnxType::Uint4,
        false => OnnxType::Int4,
    };
    // Adding 8 to both nibbles turns offset integers into signed ones.
    let flip = if blocks.has_zeros { 0 } else { 0x88 };
    let integers = move |mut made: BlockQuantized| {
        made.values.iter_mut().for_each(|byte| *byte ^= flip);
        made.values
    };
    let values = part(blocks, &format!("{base}_Q4"), dtype, [rows, cols], integers)?;
    let scales = blocks.scales(&format!("{base}_scales"), &[rows, count])?;
    let zero_bytes = blocks.zero_bytes();
    let zeros = match blocks.has_zeros {
        false => None,
        true => {
            let close = move |made: BlockQuantized| closed(&made.zeros, [rows, zero_bytes], count);
            let name = format!("{base}_zero_points");
            Some(part(blocks, &name, dtype, [rows, count], close)?)
        }
    };
    Ok([Some(values), Some(scales), zeros])
}

/// The first `cols` nibbles of each line, without the gap that a line of an odd number ends with.
fn closed(bytes: &[u8], [rows, row_bytes]: [usize; 2], cols: usize) -> Vec<u8> {
    let mut out = vec![0u8; (rows * cols).div_ceil(2)];
    for row in 0..rows {
        for col in 0..cols {
            let nibble = (bytes[row * row_bytes + col / 2] >> (4 * (col % 2))) & 15;
            let at = row * cols + col;
            out[at / 2] |= nibble << (4 * (at % 2));
        }
    }
    out
}

fn part(
    blocks: &Blocks,
    name: &str,
    dtype: OnnxType,
    shape: [usize; 2],
    order: impl Fn(BlockQuantized) -> Vec<u8> + Send + Sync + 'static,
) -> Result<Tensor> {
    let blocks = blocks.clone();
    let produce = move || Ok(order(blocks.made()?));
    Tensor::produced(name, dtype, shape, Arc::new(produce))
}

/// The first `cols` nibbles of each of `rows` lines, as `[cols, rows]` nibbles, each with `flip` added modulo 16.
fn turned(bytes: &[u8], [rows, row_bytes]: [usize; 2], cols: usize, flip: u8) -> Vec<u8> {
    let mut out = vec![0u8; (rows * cols).div_ceil(2)];
    for row in 0..rows {
        let line = &bytes[row * row_bytes..(row + 1) * row_bytes];
        for col in 0..cols {
            let nibble = ((line[col / 2] >> (4 * (col % 2))) + flip) & 15;
            let at = col * rows + row;
            out[at / 2] |= nibble << (4 * (at % 2));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nibbles_are_turned_and_centred() {
        // Two lines of three: 1 2 3 and 9 10 11.
        let bytes = [0x21, 0x03, 0xA9, 0x0B];
        assert_eq!(turned(&bytes, [2, 2], 3, 0), [0x91, 0xA2, 0xB3]);
        assert_eq!(turned(&bytes, [2, 2], 3, 8), [0x19, 0x2A, 0x3B]);
        assert_eq!(closed(&bytes, [2, 2], 3), [0x21, 0x93, 0xBA]);
    }

    #[test]
    fn dequantized_it_is_what_the_blocks_stand_for() {
        let (rows, cols, size) = (3, 40, 16);
        let weight: Vec<f32> = (0..rows * cols)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) / 20.0)
            .collect();
        for symmetric in [true, false] {
            let weight = weight.clone();
            let made = super::super::quantize::quantize_blocks(&weight, [rows, cols], size, symmetric);
            let copy = made.clone();
            let blocks = Blocks::new([rows, cols], 4, size, !symmetric, OnnxType::Float, move || {
                Ok(copy.clone())
            });
            let [values, scales, zeros] = tensors(&blocks, "w", cols).unwrap();
            let (values, scales) = (values.unwrap(), scales.unwrap().to_f32().unwrap());
            assert_eq!(values.shape(), [cols, rows]);
            let bytes = values.bytes().unwrap();
            let zeros = zeros.map(|zeros| zeros.bytes().unwrap().into_owned());
            let nibble = |bytes: &[u8], at: usize| (bytes[at / 2] >> (4 * (at % 2))) & 15;
            for row in 0..rows {
                for col in 0..cols {
                    let block = col / size;
                    let code = nibble(&bytes, col * rows + row);
                    let (value, zero) = match &zeros {
                        Some(zeros) => (f32::from(code), f32::from(nibble(zeros, block * rows + row))),
                        None => (f32::from((code << 4) as i8 >> 4), 0.0),
                    };
                    let original = nibble(&made.values[row * 24..], col);
                    let middle = match symmetric {
                        true => 8.0,
                        false => f32::from(nibble(&made.zeros[row * 2..], block)),
                    };
                    let scale = made.scales[row * 3 + block];
                    assert_eq!(scales[block * rows + row], scale);
                    assert_eq!((value - zero) * scale, (f32::from(original) - middle) * scale);
                }
            }
        }
    }
}
