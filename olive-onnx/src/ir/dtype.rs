//! Element types with the numbers that ONNX gives them.

use olive_core::DType;

/// The type of a tensor's elements (`TensorProto.DataType`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OnnxType {
    /// IEEE 754 binary32.
    Float = 1,
    /// Unsigned 8-bit integer.
    Uint8 = 2,
    /// Signed 8-bit integer.
    Int8 = 3,
    /// Unsigned 16-bit integer.
    Uint16 = 4,
    /// Signed 16-bit integer.
    Int16 = 5,
    /// Signed 32-bit integer.
    Int32 = 6,
    /// Signed 64-bit integer.
    Int64 = 7,
    /// One byte, 0 or 1.
    Bool = 9,
    /// IEEE 754 binary16.
    Float16 = 10,
    /// IEEE 754 binary64.
    Double = 11,
    /// Unsigned 32-bit integer.
    Uint32 = 12,
    /// Unsigned 64-bit integer.
    Uint64 = 13,
    /// The upper half of a `Float`.
    Bfloat16 = 16,
    /// Unsigned 4-bit integer, two in a byte, the first in the low bits.
    Uint4 = 21,
    /// Signed 4-bit integer, two in a byte, the first in the low bits.
    Int4 = 22,
}

impl OnnxType {
    const ALL: [Self; 15] = [
        Self::Float,
        Self::Uint8,
        Self::Int8,
        Self::Uint16,
        Self::Int16,
        Self::Int32,
        Self::Int64,
        Self::Bool,
        Self::Float16,
        Self::Double,
        Self::Uint32,
        Self::Uint64,
        Self::Bfloat16,
        Self::Uint4,
        Self::Int4,
    ];

    /// The number in an ONNX file.
    pub const fn code(self) -> i32 {
        self as i32
    }

    /// The type with this number; `None` for those olive does not read (strings, complex numbers, 8-bit floats).
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.code() == code)
    }

    /// Bits that an element takes.
    pub const fn bits(self) -> usize {
        match self {
            Self::Double | Self::Int64 | Self::Uint64 => 64,
            Self::Float | Self::Int32 | Self::Uint32 => 32,
            Self::Float16 | Self::Bfloat16 | Self::Int16 | Self::Uint16 => 16,
            Self::Int8 | Self::Uint8 | Self::Bool => 8,
            Self::Uint4 | Self::Int4 => 4,
        }
    }

    /// Bytes that `elements` take; `None` if that overflows.
    pub fn byte_len(self, elements: usize) -> Option<usize> {
        elements.checked_mul(self.bits()).map(|bits| bits.div_ceil(8))
    }

    /// The type of olive-core; `None` for 4-bit and unsigned 16-, 32- and 64-bit integers.
    pub const fn to_core(self) -> Option<DType> {
        Some(match self {
            Self::Double => DType::F64,
            Self::Float => DType::F32,
            Self::Float16 => DType::F16,
            Self::Bfloat16 => DType::BF16,
            Self::Int64 => DType::I64,
            Self::Int32 => DType::I32,
            Self::Int16 => DType::I16,
            Self::Int8 => DType::I8,
            Self::Uint8 => DType::U8,
            Self::Bool => DType::Bool,
            Self::Uint16 | Self::Uint32 | Self::Uint64 | Self::Uint4 | Self::Int4 => return None,
        })
    }

    /// The ONNX type of a type of olive-core; `None` for a type that ONNX lacks.
    pub const fn from_core(dtype: DType) -> Option<Self> {
        Some(match dtype {
            DType::F64 => Self::Double,
            DType::F32 => Self::Float,
            DType::F16 => Self::Float16,
            DType::BF16 => Self::Bfloat16,
            DType::I64 => Self::Int64,
            DType::I32 => Self::Int32,
            DType::I16 => Self::Int16,
            DType::I8 => Self::Int8,
            DType::U8 => Self::Uint8,
            DType::Bool => Self::Bool,
            _ => return None,
        })
    }
}

impl std::fmt::Display for OnnxType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Float => "FLOAT",
            Self::Uint8 => "UINT8",
            Self::Int8 => "INT8",
            Self::Uint16 => "UINT16",
            Self::Int16 => "INT16",
            Self::Int32 => "INT32",
            Self::Int64 => "INT64",
            Self::Bool => "BOOL",
            Self::Float16 => "FLOAT16",
            Self::Double => "DOUBLE",
            Self::Uint32 => "UINT32",
            Self::Uint64 => "UINT64",
            Self::Bfloat16 => "BFLOAT16",
            Self::Uint4 => "UINT4",
            Self::Int4 => "INT4",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_sizes_agree_both_ways() {
        for dtype in OnnxType::ALL {
            assert_eq!(OnnxType::from_code(dtype.code()), Some(dtype));
            if let Some(core) = dtype.to_core() {
                assert_eq!(core.size() * 8, dtype.bits());
                assert_eq!(OnnxType::from_core(core), Some(dtype));
            }
        }
        assert_eq!(OnnxType::from_code(8), None);
        assert_eq!(OnnxType::Int4.byte_len(3), Some(2));
        assert_eq!(OnnxType::Double.byte_len(usize::MAX), None);
    }
}
