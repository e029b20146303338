//! Floats on their way from a checkpoint to a graph: decoded, checked, rounded to the graph's type, encoded.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use olive_core::DType;

use crate::ir::OnnxType;

/// Decodes little-endian `bytes` of a float type into `out`, of as many elements; returns how many are not finite.
/// `None` if the type is not a float or the lengths do not fit.
pub fn decode(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Option<usize> {
    if bytes.len() != out.len() * dtype.size() {
        return None;
    }
    match dtype {
        DType::F32 => {
            for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*raw);
            }
        }
        DType::BF16 => {
            for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(*raw)) << 16);
            }
        }
        DType::F16 => match bytemuck::try_cast_slice::<u8, f16>(bytes) {
            Ok(halves) => halves.convert_to_f32_slice(out),
            Err(_) => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = f16::from_le_bytes(*raw).to_f32();
                }
            }
        },
        DType::F64 => {
            for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *value = f64::from_le_bytes(*raw) as f32;
            }
        }
        _ => return None,
    }
    Some(not_finite(out))
}

/// How many values are infinite or not a number.
pub fn not_finite(values: &[f32]) -> usize {
    const EXPONENT: u32 = 0x7F80_0000;
    let bad = |value: &f32| u32::from(value.to_bits() & EXPONENT == EXPONENT);
    values.iter().map(bad).sum::<u32>() as usize
}

/// Replaces values by what is read back if they are stored as `dtype`.
pub fn round(values: &mut [f32], dtype: OnnxType) {
    match dtype {
        OnnxType::Float16 => {
            for value in values {
                *value = f16::from_f32(*value).to_f32();
            }
        }
        OnnxType::Bfloat16 => {
            for value in values {
                *value = bf16::from_f32(*value).to_f32();
            }
        }
        _ => {}
    }
}

/// The little-endian bytes of `values` as `FLOAT`, `FLOAT16` or `BFLOAT16`, halves rounded to even.
pub fn encode(values: &[f32], dtype: OnnxType) -> Vec<u8> {
    match dtype {
        OnnxType::Float16 => {
            let mut out = vec![f16::ZERO; values.len()];
            out.convert_from_f32_slice(values);
            bytemuck::cast_slice::<f16, u8>(&out).to_vec()
        }
        OnnxType::Bfloat16 => {
            let mut out = vec![bf16::ZERO; values.len()];
            out.convert_from_f32_slice(values);
            bytemuck::cast_slice::<bf16, u8>(&out).to_vec()
        }
        _ => bytemuck::cast_slice::<f32, u8>(values).to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        let values: Vec<f32> = (-40..40).map(|i| i as f32 * 0.375).collect();
        for (dtype, onnx) in [
            (DType::F32, OnnxType::Float),
            (DType::F16, OnnxType::Float16),
            (DType::BF16, OnnxType::Bfloat16),
        ] {
            let mut rounded = values.clone();
            round(&mut rounded, onnx);
            let bytes = encode(&values, onnx);
            assert_eq!(bytes, dtype.from_f32(&values).unwrap());
            let mut out = vec![0.0; values.len()];
            assert_eq!(decode(dtype, &bytes, &mut out), Some(0));
            assert_eq!(out, rounded);
            // An odd address.
            let mut shifted = vec![0u8];
            shifted.extend_from_slice(&bytes);
            assert_eq!(decode(dtype, &shifted[1..], &mut out), Some(0));
            assert_eq!(out, rounded);
        }
        assert_eq!(decode(DType::F32, &[0; 6], &mut [0.0; 2]), None);
        assert_eq!(decode(DType::I32, &[0; 8], &mut [0.0; 2]), None);
        assert_eq!(not_finite(&[1.0, f32::NAN, f32::INFINITY, -0.0, f32::MAX]), 2);
    }
}
