//! Weights on their way from the checkpoint to the graph. Nothing is read before a tensor is written, apart from
//! biases, which have to be known to be zero or not.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use olive_core::{Error, HfModel, LinearSpec, LinearWeight, ModelHandle, QuantMatrix, Result, WeightKind};
use rayon::prelude::*;

use super::options::BuilderOptions;
use super::quantize::{BlockQuantized, quantize_blocks};
use crate::ir::{OnnxType, Tensor};

/// Rows of stored linears, one below the other: what the graph takes as one linear. Fused projections are cut and
/// split ones are joined this way.
#[derive(Debug, Clone, Default)]
pub struct Stored {
    parts: Vec<(LinearSpec, Range<usize>)>,
}

impl Stored {
    /// All rows of these linears.
    pub fn whole(linears: &[LinearSpec]) -> Self {
        let parts = linears
            .iter()
            .map(|linear| (linear.clone(), 0..linear.out_features));
        Self {
            parts: parts.collect(),
        }
    }

    /// Some rows of one linear.
    pub fn rows(linear: &LinearSpec, rows: Range<usize>) -> Self {
        Self {
            parts: vec![(linear.clone(), rows)],
        }
    }

    /// These rows, then those.
    pub fn join(all: &[Self]) -> Self {
        Self {
            parts: all.iter().flat_map(|one| one.parts.iter().cloned()).collect(),
        }
    }

    pub fn in_features(&self) -> usize {
        self.parts.first().map_or(0, |(linear, _)| linear.in_features)
    }

    pub fn out_features(&self) -> usize {
        self.parts.iter().map(|(_, rows)| rows.len()).sum()
    }
}

/// Whether a linear's weight is packed in the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Floats.
    Dense,
    /// Integers, in groups of the checkpoint's size.
    Packed,
    /// Parts of both kinds, which no operator takes as one.
    Mixed,
}

/// The checkpoint.
#[derive(Clone)]
pub struct Weights {
    source: Arc<HfModel>,
}

impl Weights {
    pub fn new(source: Arc<HfModel>) -> Self {
        Self { source }
    }

    /// A stored vector of floats.
    pub fn vector(&self, name: &str, stored: &str, length: usize) -> Result<Tensor> {
        self.floats(name, stored, vec![length])
    }

    /// A stored matrix of floats, as it is stored.
    pub fn table(&self, name: &str, stored: &str, shape: [usize; 2]) -> Result<Tensor> {
        self.floats(name, stored, shape.to_vec())
    }

    fn floats(&self, name: &str, stored: &str, shape: Vec<usize>) -> Result<Tensor> {
        let (weights, stored, wanted) = (self.clone(), stored.to_owned(), shape.clone());
        let produce = move || {
            let values = weights.source.tensors().read_f32_checked(&stored, &wanted)?;
            Ok(float_bytes(&values))
        };
        Tensor::produced(name, OnnxType::Float, shape, Arc::new(produce))
    }

    /// Whether the parts are stored dense or packed.
    pub fn kind(&self, stored: &Stored) -> Kind {
        let tensors = self.source.tensors();
        let dense = |linear: &LinearSpec| tensors.info(&format!("{}.weight", linear.name)).is_some();
        let count = stored.parts.iter().filter(|(linear, _)| dense(linear)).count();
        match count {
            0 => Kind::Packed,
            _ if count == stored.parts.len() => Kind::Dense,
            _ => Kind::Mixed,
        }
    }

    /// The bias of a linear; `None` where there is none or all of it is zero.
    pub fn bias(&self, stored: &Stored) -> Result<Option<Vec<f32>>> {
        let mut values = Vec::new();
        for (linear, rows) in &stored.parts {
            if !linear.bias {
                values.resize(values.len() + rows.len(), 0.0);
                continue;
            }
            let name = format!("{}.bias", linear.name);
            let bias = self
                .source
                .tensors()
                .read_f32_checked(&name, &[linear.out_features])?;
            values.extend_from_slice(&bias[rows.clone()]);
        }
        Ok(Some(values).filter(|values| values.iter().any(|value| *value != 0.0)))
    }

    /// A dense weight as MatMul takes it, `[in, out]`.
    pub fn transposed(&self, name: &str, stored: &Stored) -> Result<Tensor> {
        let shape = [stored.in_features(), stored.out_features()];
        let (weights, stored) = (self.clone(), stored.clone());
        let produce = move || {
            let values = weights.dense(&stored)?;
            Ok(transposed_bytes(
                &values,
                stored.out_features(),
                stored.in_features(),
            ))
        };
        Tensor::produced(name, OnnxType::Float, shape, Arc::new(produce))
    }

    /// The parts of a MatMulNBits weight made of a dense one.
    pub fn quantized(&self, stored: &Stored, options: &BuilderOptions) -> Blocks {
        let [rows, cols] = [stored.out_features(), stored.in_features()];
        let (weights, stored) = (self.clone(), stored.clone());
        let (block_size, symmetric) = (options.block_size, options.is_symmetric);
        Blocks {
            rows,
            blocks: cols.div_ceil(block_size),
            block_size,
            has_zeros: !symmetric,
            making: Arc::new(Making {
                make: Box::new(move || {
                    let values = weights.dense(&stored)?;
                    Ok(quantize_blocks(&values, [rows, cols], block_size, symmetric))
                }),
                made: Mutex::new(None),
            }),
        }
    }

    /// The parts of a MatMulNBits weight that the checkpoint holds packed: the same integers, zero points and scales.
    pub fn packed(&self, stored: &Stored) -> Result<Blocks> {
        let spec = self.source.spec();
        let cols = stored.in_features();
        let group = spec.quantization.as_ref().map_or(0, |q| q.group_size);
        let block_size = usize::try_from(group).ok().filter(|size| *size > 0);
        let block_size = block_size
            .filter(|size| cols.is_multiple_of(*size))
            .ok_or_else(|| {
                let what = format!("groups of {group} for {cols} inputs");
                Error::unsupported(what, "a packed row has to be whole groups")
            })?;
        let rows = stored.out_features();
        let (weights, stored) = (self.clone(), stored.clone());
        Ok(Blocks {
            rows,
            blocks: cols / block_size,
            block_size,
            has_zeros: true,
            making: Arc::new(Making {
                make: Box::new(move || weights.read_packed(&stored, block_size)),
                made: Mutex::new(None),
            }),
        })
    }

    /// The rows as dense `[out, in]`.
    fn dense(&self, stored: &Stored) -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(stored.out_features() * stored.in_features());
        for (linear, rows) in &stored.parts {
            let read = self.read(linear)?;
            let cols = linear.in_features;
            match read.weight {
                WeightKind::Dense(part, _) if values.is_empty() && rows.len() == linear.out_features => {
                    values = part;
                }
                other => values.extend_from_slice(&other.to_dense()[rows.start * cols..rows.end * cols]),
            }
        }
        Ok(values)
    }

    fn read_packed(&self, stored: &Stored, block_size: usize) -> Result<BlockQuantized> {
        let mut joined: Option<BlockQuantized> = None;
        for (linear, rows) in &stored.parts {
            let WeightKind::Packed(matrix) = self.read(linear)?.weight else {
                return Err(Error::tensor(&linear.name, "a packed weight", "a dense one"));
            };
            if matrix.bits != 4 || matrix.group_size != block_size {
                let found = format!("{} bits, groups of {}", matrix.bits, matrix.group_size);
                let expected = format!("4 bits, groups of {block_size} as the config says");
                return Err(Error::tensor(&linear.name, expected, found));
            }
            let part = blocks_of(matrix.slice_rows(rows.clone()));
            match &mut joined {
                None => joined = Some(part),
                Some(all) => {
                    all.values.extend_from_slice(&part.values);
                    all.scales.extend_from_slice(&part.scales);
                    all.zeros.extend_from_slice(&part.zeros);
                }
            }
        }
        joined.ok_or_else(|| Error::tensor("packed weight", "at least one part", "none"))
    }

    fn read(&self, linear: &LinearSpec) -> Result<LinearWeight> {
        // The bias goes its own way.
        let linear = LinearSpec {
            bias: false,
            ..linear.clone()
        };
        LinearWeight::read(self.source.tensors(), self.source.spec(), &linear)
    }
}

/// The canonical order of packed weights is that of MatMulNBits.
fn blocks_of(matrix: QuantMatrix) -> BlockQuantized {
    let zero_bytes = matrix.groups().div_ceil(2);
    BlockQuantized {
        zeros: matrix
            .zeros
            .unwrap_or_else(|| vec![0x88; matrix.rows * zero_bytes]),
        values: matrix.values,
        scales: matrix.scales,
    }
}

/// A MatMulNBits weight `[rows, blocks, block_size / 2]` that is made once for all its tensors.
pub struct Blocks {
    pub rows: usize,
    pub blocks: usize,
    pub block_size: usize,
    pub has_zeros: bool,
    making: Arc<Making>,
}

struct Making {
    make: Box<dyn Fn() -> Result<BlockQuantized> + Send + Sync>,
    made: Mutex<Option<BlockQuantized>>,
}

impl Making {
    /// Hands out one part; what was made is dropped after the `last`.
    fn part(&self, last: bool, take: impl Fn(&mut BlockQuantized) -> Vec<u8>) -> Result<Vec<u8>> {
        let mut made = match self.made.lock() {
            Ok(made) => made,
            Err(poisoned) => poisoned.into_inner(),
        };
        let mut blocks = match made.take() {
            Some(blocks) => blocks,
            None => (self.make)()?,
        };
        let bytes = take(&mut blocks);
        if !last {
            *made = Some(blocks);
        }
        Ok(bytes)
    }
}

impl Blocks {
    /// The integers, `[rows, blocks, block_size / 2]`.
    pub fn values(&self, name: &str) -> Result<Tensor> {
        let making = self.making.clone();
        let produce = move || making.part(false, |blocks| blocks.values.clone());
        let shape = [self.rows, self.blocks, self.block_size / 2];
        Tensor::produced(name, OnnxType::Uint8, shape, Arc::new(produce))
    }

    /// The scales, of a shape with `rows · blocks` elements.
    pub fn scales(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let (making, last) = (self.making.clone(), !self.has_zeros);
        let produce = move || making.part(last, |blocks| float_bytes(&blocks.scales));
        Tensor::produced(name, OnnxType::Float, shape, Arc::new(produce))
    }

    /// The zero points, two in a byte, of a shape with `rows · ceil(blocks / 2)` elements.
    pub fn zeros(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let making = self.making.clone();
        let produce = move || making.part(true, |blocks| std::mem::take(&mut blocks.zeros));
        Tensor::produced(name, OnnxType::Uint8, shape, Arc::new(produce))
    }
}

fn float_bytes(values: &[f32]) -> Vec<u8> {
    bytemuck::cast_slice::<f32, u8>(values).to_vec()
}

/// `values [rows, cols]` → bytes of `[cols, rows]`.
fn transposed_bytes(values: &[f32], rows: usize, cols: usize) -> Vec<u8> {
    /// Columns that one task writes: a cache line of each row that it reads.
    const STRIP: usize = 16;
    let mut out = vec![0f32; values.len()];
    out.par_chunks_mut((STRIP * rows).max(1))
        .enumerate()
        .for_each(|(strip, out)| {
            let first = strip * STRIP;
            for (row, line) in values.chunks_exact(cols).enumerate() {
                for (offset, value) in line[first..(first + STRIP).min(cols)].iter().enumerate() {
                    out[offset * rows + row] = *value;
                }
            }
        });
    float_bytes(&out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_places_every_element() {
        for (rows, cols) in [(1, 1), (3, 16), (5, 17), (16, 33), (40, 15)] {
            let values: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
            let bytes = transposed_bytes(&values, rows, cols);
            let out: Vec<f32> = olive_core::DType::F32.to_f32(&bytes).unwrap();
            for row in 0..rows {
                for col in 0..cols {
                    assert_eq!(out[col * rows + row], values[row * cols + col]);
                }
            }
        }
    }
}
