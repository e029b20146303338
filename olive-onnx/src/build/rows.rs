//! Rows of stored weights as `f32`, decoded from the mapped checkpoint as they are asked for.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use olive_core::{DType, Error, LinearSpec, ModelSpec, Result, TensorSource, WeightKind};

use super::floats;

/// Where the rows of one part are.
enum Source<'a> {
    /// Little-endian floats, row-major.
    Bytes(Cow<'a, [u8]>, DType),
    /// Values that were packed.
    Values(Vec<f32>),
}

struct Part<'a> {
    name: String,
    source: Source<'a>,
    rows: Range<usize>,
    cols: usize,
}

/// Reads the rows of several linears, one below the other.
pub struct RowReader<'a> {
    tensors: &'a dyn TensorSource,
    parts: Vec<Part<'a>>,
    not_finite: AtomicUsize,
}

impl<'a> RowReader<'a> {
    /// Opens these rows of these linears.
    ///
    /// # Errors
    /// [`Error::MissingTensors`] or [`Error::Tensor`] naming the tensor; those of a packed layout.
    pub fn open(
        tensors: &'a dyn TensorSource,
        spec: &ModelSpec,
        parts: &[(LinearSpec, Range<usize>)],
    ) -> Result<Self> {
        let open = |(linear, rows): &(LinearSpec, Range<usize>)| {
            Ok(Part {
                name: format!("{}.weight", linear.name),
                source: open(tensors, spec, linear)?,
                rows: rows.clone(),
                cols: linear.in_features,
            })
        };
        Ok(Self {
            tensors,
            parts: parts.iter().map(open).collect::<Result<_>>()?,
            not_finite: AtomicUsize::new(0),
        })
    }

    /// Decodes row `row` into `out`.
    pub fn read(&self, row: usize, out: &mut [f32]) {
        let cols = out.len();
        self.read_part(row, 0..cols, out);
    }

    /// Decodes some columns of row `row` into `out`.
    pub fn read_part(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let mut first = 0;
        for part in &self.parts {
            let count = part.rows.len();
            if row >= first + count {
                first += count;
                continue;
            }
            let start = (part.rows.start + row - first) * part.cols;
            let range = start + columns.start..start + columns.end;
            let bad = match &part.source {
                Source::Bytes(bytes, dtype) => {
                    let size = dtype.size();
                    let bytes = &bytes[range.start * size..range.end * size];
                    floats::decode(*dtype, bytes, out).unwrap_or(1)
                }
                Source::Values(values) => {
                    out.copy_from_slice(&values[range]);
                    floats::not_finite(out)
                }
            };
            if bad > 0 {
                self.not_finite.fetch_add(bad, Ordering::Relaxed);
            }
            return;
        }
    }

    /// Whether everything that was read is finite.
    ///
    /// # Errors
    /// [`Error::NotFinite`].
    pub fn check(&self) -> Result<()> {
        match self.not_finite.load(Ordering::Relaxed) {
            0 => Ok(()),
            found => {
                let names: Vec<&str> = self.parts.iter().map(|part| part.name.as_str()).collect();
                let what = format!("tensor `{}`", names.join("`, `"));
                Err(Error::NotFinite { what, found })
            }
        }
    }

    /// Says that these rows are not needed again soon.
    pub fn release(&self, rows: Range<usize>) {
        let mut first = 0;
        for part in &self.parts {
            let count = part.rows.len();
            let begin = rows.start.clamp(first, first + count) - first + part.rows.start;
            let end = rows.end.clamp(first, first + count) - first + part.rows.start;
            if let Source::Bytes(Cow::Borrowed(_), dtype) = &part.source
                && begin < end
            {
                let width = part.cols * dtype.size();
                self.tensors.release(&part.name, begin * width..end * width);
            }
            first += count;
        }
    }
}

fn open<'a>(tensors: &'a dyn TensorSource, spec: &ModelSpec, linear: &LinearSpec) -> Result<Source<'a>> {
    let name = format!("{}.weight", linear.name);
    let shape = [linear.out_features, linear.in_features];
    let kind = match tensors.info(&name).filter(|info| info.shape == shape) {
        Some(info) if matches!(info.dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16) => {
            return Ok(Source::Bytes(tensors.bytes(&name)?, info.dtype));
        }
        // Whatever it is, its own reader says what is wrong with it.
        _ => WeightKind::read(tensors, spec.quantization.as_ref(), &linear.name, shape)?,
    };
    Ok(Source::Values(kind.into_dense()))
}
