//! Values that flow between steps.

use std::sync::Arc;

use bytemuck::Pod;
use half::{bf16, f16};
use olive_core::{Error, Result};
use olive_onnx::ir::{self, OnnxType};

use crate::kernels::panels::Panels;

/// A dense, row-major array.
#[derive(Debug, Clone)]
pub struct Tensor<T> {
    shape: Vec<usize>,
    buffer: Buffer<T>,
    /// The same matrix in the order of products, if it was asked for.
    panels: Option<Arc<Panels>>,
}

#[derive(Debug, Clone)]
enum Buffer<T> {
    Owned(Vec<T>),
    Shared(Arc<[T]>),
    /// Bytes of a file that lie as `T` needs them; checked when made.
    Mapped(ir::Tensor),
}

impl<T: Pod> Tensor<T> {
    /// An array of its own. `data` has as many values as `shape` says.
    pub fn new(shape: impl Into<Vec<usize>>, data: Vec<T>) -> Self {
        let shape = shape.into();
        debug_assert_eq!(shape.iter().product::<usize>(), data.len());
        Self {
            shape,
            buffer: Buffer::Owned(data),
            panels: None,
        }
    }

    /// An array that many may hold.
    pub fn shared(shape: impl Into<Vec<usize>>, data: Vec<T>) -> Self {
        Self {
            shape: shape.into(),
            buffer: Buffer::Shared(data.into()),
            panels: None,
        }
    }

    /// The tensor's bytes in place if they are aligned.
    fn mapped(tensor: &ir::Tensor) -> Option<Self> {
        let bytes = tensor.borrowed()?;
        bytemuck::try_cast_slice::<u8, T>(bytes).ok()?;
        Some(Self {
            shape: tensor.shape().to_vec(),
            buffer: Buffer::Mapped(tensor.clone()),
            panels: None,
        })
    }

    /// The sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The values.
    pub fn data(&self) -> &[T] {
        match &self.buffer {
            Buffer::Owned(data) => data,
            Buffer::Shared(data) => data,
            Buffer::Mapped(tensor) => bytemuck::cast_slice(tensor.borrowed().unwrap_or_default()),
        }
    }

    /// The same values under other sizes.
    pub fn reshaped(mut self, shape: Vec<usize>) -> Self {
        debug_assert_eq!(
            shape.iter().product::<usize>(),
            self.shape.iter().product::<usize>()
        );
        self.shape = shape;
        self.panels = None;
        self
    }

    /// The matrix in the order of products, if [`Value::with_panels`] made it.
    pub(crate) fn panels(&self) -> Option<&Panels> {
        self.panels.as_deref()
    }

    /// Whether the values are its own, to be changed in place.
    pub fn is_owned(&self) -> bool {
        matches!(self.buffer, Buffer::Owned(_))
    }

    /// The values, copied if they are not its own.
    pub fn into_vec(self) -> Vec<T> {
        match self.buffer {
            Buffer::Owned(data) => data,
            Buffer::Shared(data) => data.to_vec(),
            Buffer::Mapped(_) => self.data().to_vec(),
        }
    }
}

/// A tensor of one of the types that graphs of language models compute with. Half-precision floats are widened.
#[derive(Debug, Clone)]
pub enum Value {
    /// Floats.
    F32(Tensor<f32>),
    /// 64-bit integers.
    I64(Tensor<i64>),
    /// 32-bit integers.
    I32(Tensor<i32>),
    /// Bytes.
    U8(Tensor<u8>),
    /// 0 or 1.
    Bool(Tensor<u8>),
}

impl Value {
    /// A constant of a graph; floats are left in the file where their alignment allows.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for types that no step computes with.
    pub fn from_ir(tensor: &ir::Tensor) -> Result<Self> {
        let shape = tensor.shape();
        let wide = |values: Vec<f32>| Ok(Self::F32(Tensor::shared(shape, values)));
        match tensor.dtype() {
            OnnxType::Float => match Tensor::mapped(tensor) {
                Some(mapped) => Ok(Self::F32(mapped)),
                None => wide(tensor.to_f32()?),
            },
            OnnxType::Float16 => wide(widen(&tensor.bytes()?, |b| f16::from_le_bytes(b).to_f32())),
            OnnxType::Bfloat16 => wide(widen(&tensor.bytes()?, |b| bf16::from_le_bytes(b).to_f32())),
            OnnxType::Double => wide(tensor.to_f32()?),
            OnnxType::Int64 => Ok(Self::I64(Tensor::shared(shape, tensor.to_i64()?))),
            OnnxType::Int32 => {
                let values = tensor.to_i64()?.into_iter().map(|v| v as i32).collect();
                Ok(Self::I32(Tensor::shared(shape, values)))
            }
            OnnxType::Uint8 => match Tensor::mapped(tensor) {
                Some(mapped) => Ok(Self::U8(mapped)),
                None => Ok(Self::U8(Tensor::shared(shape, tensor.bytes()?.into_owned()))),
            },
            OnnxType::Bool => Ok(Self::Bool(Tensor::shared(shape, tensor.bytes()?.into_owned()))),
            other => Err(Error::unsupported(
                format!("`{}`: a constant of type {other}", tensor.name),
                "the runtime computes with FLOAT, FLOAT16, BFLOAT16, DOUBLE, INT64, INT32, UINT8 and BOOL",
            )),
        }
    }

    /// A matrix of floats also in the order in which products read it; other values as they are.
    pub(crate) fn with_panels(self) -> Self {
        match self {
            Self::F32(mut tensor) => {
                if let [k, n] = *tensor.shape() {
                    tensor.panels = Panels::new(tensor.data(), k, n).map(Arc::new);
                }
                Self::F32(tensor)
            }
            other => other,
        }
    }

    /// The sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::F32(t) => t.shape(),
            Self::I64(t) => t.shape(),
            Self::I32(t) => t.shape(),
            Self::U8(t) | Self::Bool(t) => t.shape(),
        }
    }

    /// The type's name in ONNX.
    pub const fn type_name(&self) -> &'static str {
        match self {
            Self::F32(_) => "FLOAT",
            Self::I64(_) => "INT64",
            Self::I32(_) => "INT32",
            Self::U8(_) => "UINT8",
            Self::Bool(_) => "BOOL",
        }
    }

    /// The same values under other sizes.
    pub fn reshaped(self, shape: Vec<usize>) -> Self {
        match self {
            Self::F32(t) => Self::F32(t.reshaped(shape)),
            Self::I64(t) => Self::I64(t.reshaped(shape)),
            Self::I32(t) => Self::I32(t.reshaped(shape)),
            Self::U8(t) => Self::U8(t.reshaped(shape)),
            Self::Bool(t) => Self::Bool(t.reshaped(shape)),
        }
    }

    /// Integers as 64 bits; `None` for floats.
    pub fn to_i64(&self) -> Option<Vec<i64>> {
        match self {
            Self::I64(t) => Some(t.data().to_vec()),
            Self::I32(t) => Some(t.data().iter().map(|v| i64::from(*v)).collect()),
            Self::U8(t) | Self::Bool(t) => Some(t.data().iter().map(|v| i64::from(*v)).collect()),
            Self::F32(_) => None,
        }
    }

    /// The same value, cheap to clone.
    pub fn into_shared(self) -> Self {
        fn share<T: Pod>(t: Tensor<T>) -> Tensor<T> {
            if t.is_owned() {
                Tensor::shared(t.shape.clone(), t.into_vec())
            } else {
                t
            }
        }
        match self {
            Self::F32(t) => Self::F32(share(t)),
            Self::I64(t) => Self::I64(share(t)),
            Self::I32(t) => Self::I32(share(t)),
            Self::U8(t) => Self::U8(share(t)),
            Self::Bool(t) => Self::Bool(share(t)),
        }
    }
}

fn widen(bytes: &[u8], read: impl Fn([u8; 2]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<2>().0.iter().map(|b| read(*b)).collect()
}
