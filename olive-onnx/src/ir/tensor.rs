//! Tensors whose bytes are in memory, in a mapped file, or made when asked for.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use olive_core::{Error, Result};

use super::dtype::OnnxType;
use crate::mmap::MappedFile;

/// Takes the bytes of a tensor piece by piece, in order.
pub type Sink<'a, 'b> = &'a mut dyn FnMut(Cow<'b, [u8]>) -> Result<()>;

/// Makes a tensor's bytes when they are asked for, so that a model is written a tensor at a time.
pub trait Producer: Send + Sync {
    /// The little-endian, row-major bytes. The same bytes every time.
    ///
    /// # Errors
    /// Whatever reading or converting the source meets.
    fn produce(&self) -> Result<Vec<u8>>;

    /// Hands the same bytes to `sink` in pieces, for tensors that are better never held whole.
    ///
    /// # Errors
    /// As [`Producer::produce`], and those of `sink`.
    fn pieces(&self, sink: Sink<'_, '_>) -> Result<()> {
        sink(Cow::Owned(self.produce()?))
    }
}

impl<F: Fn() -> Result<Vec<u8>> + Send + Sync> Producer for F {
    fn produce(&self) -> Result<Vec<u8>> {
        self()
    }
}

/// A [`Producer`] of `count` pieces, of which `piece` makes any.
pub struct Pieces<F> {
    /// How many there are.
    pub count: usize,
    /// Makes the piece of this number.
    pub piece: F,
}

impl<F: Fn(usize) -> Result<Vec<u8>> + Send + Sync> Producer for Pieces<F> {
    fn produce(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for index in 0..self.count {
            bytes.append(&mut (self.piece)(index)?);
        }
        Ok(bytes)
    }

    fn pieces(&self, sink: Sink<'_, '_>) -> Result<()> {
        (0..self.count).try_for_each(|index| sink(Cow::Owned((self.piece)(index)?)))
    }
}

/// A named constant: an initializer, or the value of an attribute (whose name may be empty).
#[derive(Clone)]
pub struct Tensor {
    /// The name.
    pub name: String,
    dtype: OnnxType,
    shape: Vec<usize>,
    data: Data,
}

#[derive(Clone)]
enum Data {
    Inline(Arc<[u8]>),
    Mapped(Arc<MappedFile>, Range<usize>),
    Produced(Arc<dyn Producer>),
}

/// Number of elements of a shape; `None` if it overflows.
pub fn element_count(shape: &[usize]) -> Option<usize> {
    shape
        .iter()
        .try_fold(1usize, |product, size| product.checked_mul(*size))
}

impl Tensor {
    /// A tensor held in memory: little-endian, row-major bytes.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the number of bytes does not fit type and shape.
    pub fn inline(
        name: impl Into<String>,
        dtype: OnnxType,
        shape: impl Into<Vec<usize>>,
        bytes: impl Into<Arc<[u8]>>,
    ) -> Result<Self> {
        let bytes = bytes.into();
        let length = bytes.len();
        Self::new(
            name.into(),
            dtype,
            shape.into(),
            Data::Inline(bytes),
            Some(length),
        )
    }

    /// A tensor in a mapped file.
    ///
    /// # Errors
    /// [`Error::Tensor`] if `range` leaves the file or does not fit type and shape.
    pub fn mapped(
        name: impl Into<String>,
        dtype: OnnxType,
        shape: impl Into<Vec<usize>>,
        file: Arc<MappedFile>,
        range: Range<usize>,
    ) -> Result<Self> {
        let name = name.into();
        if range.start > range.end || range.end > file.len() {
            let expected = format!(
                "a place inside the {} bytes of `{}`",
                file.len(),
                file.path().display()
            );
            return Err(Error::tensor(
                name,
                expected,
                format!("bytes {}..{}", range.start, range.end),
            ));
        }
        let length = range.len();
        Self::new(name, dtype, shape.into(), Data::Mapped(file, range), Some(length))
    }

    /// A tensor that `producer` makes when it is asked for.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the shape overflows.
    pub fn produced(
        name: impl Into<String>,
        dtype: OnnxType,
        shape: impl Into<Vec<usize>>,
        producer: Arc<dyn Producer>,
    ) -> Result<Self> {
        Self::new(name.into(), dtype, shape.into(), Data::Produced(producer), None)
    }

    /// A `FLOAT` tensor held in memory.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the number of values does not fit the shape.
    pub fn floats(name: impl Into<String>, shape: impl Into<Vec<usize>>, values: &[f32]) -> Result<Self> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::inline(name, OnnxType::Float, shape, bytes)
    }

    /// An `INT64` tensor held in memory.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the number of values does not fit the shape.
    pub fn ints(name: impl Into<String>, shape: impl Into<Vec<usize>>, values: &[i64]) -> Result<Self> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::inline(name, OnnxType::Int64, shape, bytes)
    }

    fn new(
        name: String,
        dtype: OnnxType,
        shape: Vec<usize>,
        data: Data,
        length: Option<usize>,
    ) -> Result<Self> {
        let wanted = element_count(&shape).and_then(|n| dtype.byte_len(n));
        let Some(wanted) = wanted else {
            return Err(Error::tensor(
                name,
                "a size that fits in memory",
                format!("{dtype}{shape:?}"),
            ));
        };
        if let Some(found) = length.filter(|found| *found != wanted) {
            let expected = format!("{wanted} bytes for {dtype}{shape:?}");
            return Err(Error::tensor(name, expected, found.to_string()));
        }
        Ok(Self {
            name,
            dtype,
            shape,
            data,
        })
    }

    /// The element type.
    pub fn dtype(&self) -> OnnxType {
        self.dtype
    }

    /// The sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements: the place of an optional input that nothing was given for.
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Bytes that the data take.
    pub fn byte_len(&self) -> usize {
        (self.len() * self.dtype.bits()).div_ceil(8)
    }

    /// The little-endian, row-major bytes: borrowed from memory or the mapped file, or made now. They need not be
    /// aligned to the element type.
    ///
    /// # Errors
    /// Those of the producer; [`Error::Tensor`] if it makes another number of bytes.
    pub fn bytes(&self) -> Result<Cow<'_, [u8]>> {
        match &self.data {
            Data::Inline(bytes) => Ok(Cow::Borrowed(bytes)),
            Data::Mapped(file, range) => Ok(Cow::Borrowed(&file[range.clone()])),
            Data::Produced(producer) => {
                let bytes = producer.produce()?;
                if bytes.len() == self.byte_len() {
                    Ok(Cow::Owned(bytes))
                } else {
                    let expected = format!("{} bytes for {}{:?}", self.byte_len(), self.dtype, self.shape);
                    Err(Error::tensor(&self.name, expected, bytes.len().to_string()))
                }
            }
        }
    }

    /// Hands the bytes to `sink` in pieces, in order.
    ///
    /// # Errors
    /// As [`Tensor::bytes`], and those of `sink`.
    pub fn pieces<'t>(&'t self, sink: Sink<'_, 't>) -> Result<()> {
        let Data::Produced(producer) = &self.data else {
            return sink(self.bytes()?);
        };
        let mut length = 0;
        producer.pieces(&mut |bytes| {
            length += bytes.len();
            sink(Cow::Owned(bytes.into_owned()))
        })?;
        if length == self.byte_len() {
            return Ok(());
        }
        let expected = format!("{} bytes for {}{:?}", self.byte_len(), self.dtype, self.shape);
        Err(Error::tensor(&self.name, expected, length.to_string()))
    }

    /// The bytes without a copy; `None` if they have to be made first.
    pub fn borrowed(&self) -> Option<&[u8]> {
        match &self.data {
            Data::Inline(bytes) => Some(bytes),
            Data::Mapped(file, range) => Some(&file[range.clone()]),
            Data::Produced(_) => None,
        }
    }

    /// The file that the data lie in; `None` if they are in memory or made when asked for.
    pub fn mapped_file(&self) -> Option<&std::path::Path> {
        match &self.data {
            Data::Mapped(file, _) => Some(file.path()),
            _ => None,
        }
    }

    /// The values of a float tensor.
    ///
    /// # Errors
    /// As [`Tensor::bytes`], and [`Error::Tensor`] if it does not hold floats.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let bytes = self.bytes()?;
        let values = self.dtype.to_core().and_then(|dtype| dtype.to_f32(&bytes));
        values.ok_or_else(|| Error::tensor(&self.name, "floating-point elements", self.dtype.to_string()))
    }

    /// The values of an `INT64` or `INT32` tensor.
    ///
    /// # Errors
    /// As [`Tensor::bytes`], and [`Error::Tensor`] if it holds neither.
    pub fn to_i64(&self) -> Result<Vec<i64>> {
        let bytes = self.bytes()?;
        match self.dtype {
            OnnxType::Int64 => Ok(bytes
                .as_chunks::<8>()
                .0
                .iter()
                .map(|b| i64::from_le_bytes(*b))
                .collect()),
            OnnxType::Int32 => Ok(bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| i64::from(i32::from_le_bytes(*b)))
                .collect()),
            other => Err(Error::tensor(
                &self.name,
                "INT64 or INT32 elements",
                other.to_string(),
            )),
        }
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = match &self.data {
            Data::Inline(_) => "inline".to_owned(),
            Data::Mapped(file, range) => {
                format!("{}[{}..{}]", file.path().display(), range.start, range.end)
            }
            Data::Produced(_) => "produced".to_owned(),
        };
        write!(f, "Tensor({} {}{:?} {place})", self.name, self.dtype, self.shape)
    }
}

/// Tensors are equal if name, type, shape and bytes are; one whose bytes cannot be had equals nothing.
impl PartialEq for Tensor {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
            && self.dtype == other.dtype
            && self.shape == other.shape
            && matches!((self.bytes(), other.bytes()), (Ok(a), Ok(b)) if a == b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_to_fit_type_and_shape() {
        assert!(Tensor::inline("a", OnnxType::Float, [2, 3], vec![0; 24]).is_ok());
        assert!(Tensor::inline("a", OnnxType::Float, [2, 3], vec![0; 23]).is_err());
        assert!(Tensor::inline("a", OnnxType::Int4, [3], vec![0; 2]).is_ok());
        assert!(Tensor::inline("a", OnnxType::Float, [usize::MAX, 3], vec![]).is_err());
        assert!(
            Tensor::inline("a", OnnxType::Float, [8, 0], vec![])
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn a_producer_is_held_to_its_promise() {
        let good = Tensor::produced("a", OnnxType::Uint8, [3], Arc::new(|| Ok(vec![1, 2, 3]))).unwrap();
        assert_eq!(good.bytes().unwrap().as_ref(), [1, 2, 3]);
        let bad = Tensor::produced("a", OnnxType::Uint8, [4], Arc::new(|| Ok(vec![1, 2, 3]))).unwrap();
        assert!(bad.bytes().unwrap_err().to_string().contains("expected 4 bytes"));
    }

    #[test]
    fn values_are_read_by_type() {
        assert_eq!(
            Tensor::floats("f", [2], &[1.5, -2.0]).unwrap().to_f32().unwrap(),
            [1.5, -2.0]
        );
        let ints = Tensor::ints("i", [2], &[-1, 7]).unwrap();
        assert_eq!(ints.to_i64().unwrap(), [-1, 7]);
        assert!(ints.to_f32().is_err());
    }
}
