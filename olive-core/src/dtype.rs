//! Element types, and their conversion to and from `f32`.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::kernels::wide;

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary64.
    F64,
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of an `F32`.
    BF16,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Signed 16-bit integer.
    I16,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 8-bit integer.
    U8,
    /// One byte, 0 or 1.
    Bool,
}

impl DType {
    /// Bytes an element takes.
    pub const fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// Whether it is a floating-point type.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::BF16)
    }

    /// The name that safetensors files use.
    pub const fn safetensors_name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::I16 => "I16",
            Self::I8 => "I8",
            Self::U8 => "U8",
            Self::Bool => "BOOL",
        }
    }

    /// The type with this safetensors name; `None` for those olive does not read (8-bit floats, …).
    pub fn from_safetensors_name(name: &str) -> Option<Self> {
        [
            Self::F64,
            Self::F32,
            Self::F16,
            Self::BF16,
            Self::I64,
            Self::I32,
            Self::I16,
            Self::I8,
            Self::U8,
            Self::Bool,
        ]
        .into_iter()
        .find(|dtype| dtype.safetensors_name() == name)
    }

    /// Decodes little-endian `bytes` of this type to `f32`; `None` if it is not a float or the length is ragged.
    /// `F64` is rounded, the narrower types are exact.
    pub fn to_f32(self, bytes: &[u8]) -> Option<Vec<f32>> {
        /// Elements that one task converts.
        const TASK: usize = 1 << 16;
        let size = self.size();
        if !bytes.len().is_multiple_of(size) || !self.converts_to_f32() {
            return None;
        }
        let mut values = vec![0.0; bytes.len() / size];
        let pieces = values.par_chunks_mut(TASK).zip(bytes.par_chunks(TASK * size));
        pieces.for_each(|(values, bytes)| self.fill_f32(bytes, values));
        Some(values)
    }

    fn converts_to_f32(self) -> bool {
        matches!(self, Self::F16 | Self::BF16 | Self::F32 | Self::F64)
    }

    /// The elements of `bytes` as `values`; nothing of a type that holds no floats.
    pub fn fill_f32(self, bytes: &[u8], values: &mut [f32]) {
        fn each<const N: usize>(bytes: &[u8], values: &mut [f32], convert: impl Fn([u8; N]) -> f32) {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<N>().0) {
                *value = convert(*bytes);
            }
        }
        match self {
            Self::F32 => each(bytes, values, f32::from_le_bytes),
            Self::F16 => each(bytes, values, |b| f16::from_le_bytes(b).to_f32()),
            // The upper half of a single: without a branch for what is not a number, the loop is vector code.
            Self::BF16 => each(bytes, values, |b| {
                f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)
            }),
            Self::F64 => each(bytes, values, |b| f64::from_le_bytes(b) as f32),
            _ => (),
        }
    }

    /// How many elements of little-endian `bytes` of this type are infinite or not numbers.
    pub fn count_not_finite(self, bytes: &[u8]) -> usize {
        /// Elements of `N` bytes whose exponent, which is `mask`, is all ones.
        #[inline(always)]
        fn halves(bytes: &[u8], mask: u16) -> usize {
            let elements = bytes.as_chunks::<2>().0;
            // Sums of a few bits at a time, so that the loop is vector code.
            let bad = |own: &[[u8; 2]]| -> u16 {
                own.iter()
                    .map(|b| u16::from(u16::from_le_bytes(*b) & mask == mask))
                    .sum()
            };
            elements.chunks(1 << 12).map(|own| usize::from(bad(own))).sum()
        }
        match self {
            Self::F16 => wide(halves, (bytes, 0x7c00)),
            Self::BF16 => wide(halves, (bytes, 0x7f80)),
            Self::F32 => {
                let elements = bytes.as_chunks::<4>().0.iter();
                elements.filter(|b| !f32::from_le_bytes(**b).is_finite()).count()
            }
            Self::F64 => {
                let elements = bytes.as_chunks::<8>().0.iter();
                elements.filter(|b| !f64::from_le_bytes(**b).is_finite()).count()
            }
            _ => 0,
        }
    }

    /// Encodes `values` as little-endian bytes of this type, rounding half to even; `None` if it is not a float.
    pub fn from_f32(self, values: &[f32]) -> Option<Vec<u8>> {
        Some(match self {
            Self::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::F16 => values
                .iter()
                .flat_map(|v| f16::from_f32(*v).to_le_bytes())
                .collect(),
            Self::BF16 => values
                .iter()
                .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
                .collect(),
            Self::F64 => values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect(),
            _ => return None,
        })
    }

    /// `value` after a trip through this type: what will be read back if it is stored so.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::BF16 => bf16::from_f32(value).to_f32(),
            _ => value,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F64 => "float64",
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::I64 => "int64",
            Self::I32 => "int32",
            Self::I16 => "int16",
            Self::I8 => "int8",
            Self::U8 => "uint8",
            Self::Bool => "bool",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_survive_a_round_trip_through_their_own_type() {
        let values = [0.0, -0.0, 1.0, -2.5, 65504.0, 1e-5];
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let bytes = dtype.from_f32(&values).unwrap();
            assert_eq!(bytes.len(), values.len() * dtype.size());
            let back = dtype.to_f32(&bytes).unwrap();
            for (value, back) in values.iter().zip(&back) {
                assert_eq!(dtype.round(*value).to_bits(), back.to_bits(), "{dtype} {value}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_counted() {
        let values = [0.0, f32::NAN, 1.0, f32::INFINITY, -f32::INFINITY, -65504.0, 1e-7].repeat(1500);
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            assert_eq!(
                dtype.count_not_finite(&dtype.from_f32(&values).unwrap()),
                4500,
                "{dtype}"
            );
        }
        assert_eq!(DType::I16.count_not_finite(&[0xff; 8]), 0);
    }

    #[test]
    fn ragged_bytes_and_integers_are_refused() {
        assert!(DType::F32.to_f32(&[0; 5]).is_none());
        assert!(DType::I32.to_f32(&[0; 4]).is_none());
    }
}
