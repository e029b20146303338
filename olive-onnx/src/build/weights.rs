//! Weights on their way from the checkpoint to the graph. Nothing is read before a tensor is written, apart from
//! biases, which have to be known to be zero or not; and nothing is held but the piece that is being made.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use olive_core::packed::nf4;
use olive_core::{Error, HfModel, LinearSpec, ModelHandle, QuantMatrix, Result, WeightKind};
use rayon::prelude::*;

use super::blocks::Blocks;
use super::floats;
use super::quantize::{BlockQuantized, Method, quantize_rows};
use super::rows::RowReader;
use crate::ir::{OnnxType, Pieces, Tensor};

/// Bytes of a piece of a float tensor.
const PIECE: usize = 16 << 20;

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

    /// The linears, and which of their rows.
    pub fn parts(&self) -> &[(LinearSpec, Range<usize>)] {
        &self.parts
    }

    pub fn in_features(&self) -> usize {
        self.parts.first().map_or(0, |(linear, _)| linear.in_features)
    }

    pub fn out_features(&self) -> usize {
        self.parts.iter().map(|(_, rows)| rows.len()).sum()
    }
}

/// How a linear's weight is stored in the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Floats, or the 4-bit floats of bitsandbytes, which no operator takes and which are read as what they stand for.
    Dense,
    /// Integers.
    Packed(PackedKind),
    /// Parts that no operator takes as one.
    Mixed,
}

/// How integers are stored, as MatMulNBits takes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedKind {
    /// 4 or 8.
    pub bits: usize,
    /// Inputs that share a scale in the checkpoint.
    pub group_size: usize,
    /// Inputs that share a scale in the graph: the largest power of two that divides the group, at most
    /// [`MAX_BLOCK`]. The blocks of a group have the same scale and zero point.
    pub block_size: usize,
    /// Whether zero points are stored.
    pub has_zeros: bool,
}

/// Blocks that the kernels take.
const MIN_BLOCK: usize = 16;
const MAX_BLOCK: usize = 256;

/// The checkpoint, and the type of floats in the graph.
#[derive(Clone)]
pub struct Weights {
    source: Arc<HfModel>,
    io: OnnxType,
}

impl Weights {
    pub fn new(source: Arc<HfModel>, io: OnnxType) -> Self {
        Self { source, io }
    }

    /// A stored vector of floats.
    pub fn vector(&self, name: &str, stored: &str, length: usize) -> Result<Tensor> {
        let (weights, stored) = (self.clone(), stored.to_owned());
        let produce = move || {
            let values = weights.source.tensors().read_f32_checked(&stored, &[length])?;
            Ok(floats::encode(&values, weights.io))
        };
        Tensor::produced(name, self.io, [length], Arc::new(produce))
    }

    /// A constant vector of floats in the graph's type.
    pub fn constant(&self, name: &str, values: &[f32]) -> Result<Tensor> {
        let bytes = floats::encode(values, self.io);
        Tensor::inline(name, self.io, [values.len()], bytes)
    }

    /// A matrix `[out, in]` of floats, as it is stored.
    pub fn table(&self, name: &str, stored: &Stored) -> Result<Tensor> {
        let [rows, cols] = [stored.out_features(), stored.in_features()];
        let (weights, stored) = (self.clone(), stored.clone());
        let in_piece = (PIECE / (cols * 4)).clamp(1, rows.max(1));
        let piece = move |index: usize| {
            let reader = weights.reader(&stored)?;
            let first = index * in_piece;
            let count = in_piece.min(rows - first);
            let mut values = vec![0f32; count * cols];
            values
                .par_chunks_exact_mut(cols)
                .enumerate()
                .for_each(|(row, out)| reader.read(first + row, out));
            reader.check()?;
            reader.release(first..first + count);
            Ok(floats::encode(&values, weights.io))
        };
        let pieces = Pieces {
            count: rows.div_ceil(in_piece),
            piece,
        };
        Tensor::produced(name, self.io, [rows, cols], Arc::new(pieces))
    }

    /// How the parts are stored.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for groups that no operator takes; errors of the quantization config.
    pub fn kind(&self, stored: &Stored) -> Result<Kind> {
        let mut kinds = stored.parts.iter().map(|(linear, _)| self.part_kind(linear));
        let Some(first) = kinds.next().transpose()? else {
            return Ok(Kind::Dense);
        };
        for kind in kinds {
            if kind? != first {
                return Ok(Kind::Mixed);
            }
        }
        Ok(first)
    }

    fn part_kind(&self, linear: &LinearSpec) -> Result<Kind> {
        let tensors = self.source.tensors();
        let Some(quantization) = &self.source.spec().quantization else {
            return Ok(Kind::Dense);
        };
        let dense = tensors.info(&format!("{}.weight", linear.name)).is_some();
        if dense || nf4::stored_parts(tensors, &linear.name).is_some() {
            return Ok(Kind::Dense);
        }
        let settings = quantization.module(&linear.name)?;
        let group_size = settings.checked_group(&linear.name, [linear.out_features, linear.in_features])?;
        let block_size = (1 << group_size.trailing_zeros()).min(MAX_BLOCK);
        if block_size < MIN_BLOCK {
            let what = format!("`{}`, packed in groups of {group_size}", linear.name);
            let reason = "groups have to be multiples of 16";
            return Err(Error::unsupported(what, reason));
        }
        let always = matches!(quantization.quant_method.as_str(), "awq" | "gptq");
        Ok(Kind::Packed(PackedKind {
            bits: settings.bits,
            group_size,
            block_size,
            has_zeros: always || !settings.symmetric,
        }))
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
        let [rows, cols] = [stored.out_features(), stored.in_features()];
        let (weights, stored) = (self.clone(), stored.clone());
        let in_piece = (PIECE / (rows.max(1) * 4)).clamp(1, cols.max(1));
        let piece = move |index: usize| {
            let reader = weights.reader(&stored)?;
            let first = index * in_piece;
            let columns = first..(first + in_piece).min(cols);
            let last = columns.end == cols;
            let values = transposed(&reader, [rows, cols], columns);
            reader.check()?;
            if last {
                reader.release(0..rows);
            }
            Ok(floats::encode(&values, weights.io))
        };
        let pieces = Pieces {
            count: cols.div_ceil(in_piece),
            piece,
        };
        Tensor::produced(name, self.io, [cols, rows], Arc::new(pieces))
    }

    /// The parts of a MatMulNBits weight made of a dense one, whose values are rounded to the graph's type first.
    pub fn quantized(&self, stored: &Stored, method: Method) -> Blocks {
        let shape = [stored.out_features(), stored.in_features()];
        let (weights, stored) = (self.clone(), stored.clone());
        let make = move || {
            let reader = weights.reader(&stored)?;
            let [rows, cols] = shape;
            let in_band = (PIECE / (cols.max(1) * 2)).max(1);
            let mut joined = BlockQuantized {
                values: Vec::new(),
                scales: Vec::new(),
                zeros: Vec::new(),
            };
            for first in (0..rows).step_by(in_band) {
                let count = in_band.min(rows - first);
                let read = |row: usize, out: &mut [f32]| {
                    reader.read(first + row, out);
                    floats::round(out, weights.io);
                };
                let mut band = quantize_rows([count, cols], method, &read);
                reader.check()?;
                reader.release(first..first + count);
                if count == rows {
                    return Ok(band);
                }
                joined
                    .values
                    .reserve_exact((rows - first) * band.values.len() / count);
                joined.values.append(&mut band.values);
                joined.scales.append(&mut band.scales);
                joined.zeros.append(&mut band.zeros);
            }
            Ok(joined)
        };
        Blocks::new(
            shape,
            method.bits,
            method.block_size,
            method.has_zeros(),
            self.io,
            make,
        )
    }

    /// The parts of a MatMulNBits weight that the checkpoint holds packed: the same integers, zero points and scales.
    pub fn packed(&self, stored: &Stored, kind: PackedKind) -> Blocks {
        let shape = [stored.out_features(), stored.in_features()];
        let (weights, stored) = (self.clone(), stored.clone());
        let make = move || weights.read_packed(&stored, kind);
        Blocks::new(shape, kind.bits, kind.block_size, kind.has_zeros, self.io, make)
    }

    fn reader<'a>(&'a self, stored: &Stored) -> Result<RowReader<'a>> {
        RowReader::open(self.source.tensors(), self.source.spec(), stored.parts())
    }

    fn read_packed(&self, stored: &Stored, kind: PackedKind) -> Result<BlockQuantized> {
        let mut joined = BlockQuantized {
            values: Vec::new(),
            scales: Vec::new(),
            zeros: Vec::new(),
        };
        for (linear, rows) in &stored.parts {
            let shape = [linear.out_features, linear.in_features];
            let quantization = self.source.spec().quantization.as_ref();
            let read = WeightKind::read(self.source.tensors(), quantization, &linear.name, shape)?;
            let WeightKind::Packed(matrix) = read else {
                return Err(Error::tensor(
                    &linear.name,
                    "packed integers",
                    "another kind of weight",
                ));
            };
            if [matrix.bits, matrix.group_size] != [kind.bits, kind.group_size] {
                let found = format!("{} bits, groups of {}", matrix.bits, matrix.group_size);
                let expected = format!(
                    "{} bits, groups of {} as the config says",
                    kind.bits, kind.group_size
                );
                return Err(Error::tensor(&linear.name, expected, found));
            }
            let part = match rows.len() == matrix.rows {
                true => matrix,
                false => matrix.slice_rows(rows.clone()),
            };
            append(&mut joined, part, kind);
        }
        Ok(joined)
    }
}

/// Appends a matrix in canonical order, its groups split into blocks that share their scale and zero point.
fn append(joined: &mut BlockQuantized, matrix: QuantMatrix, kind: PackedKind) {
    let repeat = kind.group_size / kind.block_size;
    let (rows, groups) = (matrix.rows, matrix.groups());
    if kind.has_zeros {
        let spread: Vec<u8> = matrix
            .unpack_zeros()
            .into_iter()
            .flat_map(|zero| std::iter::repeat_n(zero, repeat))
            .collect();
        let packed = olive_core::packed::pack_rows(&spread, groups * repeat, kind.bits);
        debug_assert_eq!(packed.len(), rows * (groups * repeat * kind.bits).div_ceil(8));
        joined.zeros.extend(packed);
    }
    let scales = matrix.scales.into_iter();
    joined
        .scales
        .extend(scales.flat_map(|scale| std::iter::repeat_n(scale, repeat)));
    // Groups are whole bytes, so rows are too.
    joined.values.extend(matrix.values);
}

/// Columns of a matrix as rows: `[columns, rows]`.
fn transposed(reader: &RowReader<'_>, [rows, cols]: [usize; 2], columns: Range<usize>) -> Vec<f32> {
    /// Rows that are turned at once: a cache line of each column that is written.
    const STRIP: usize = 16;
    /// Columns of a tile.
    const WIDTH: usize = 256;
    let mut out = vec![0f32; columns.len() * rows];
    // A task writes whole columns; it reads a part of each row.
    let tile = WIDTH.min(columns.len().max(1));
    let done = AtomicUsize::new(0);
    out.par_chunks_mut(tile * rows.max(1))
        .enumerate()
        .for_each(|(index, out)| {
            let first = columns.start + index * tile;
            let width = out.len() / rows;
            let mut strip = vec![0f32; STRIP * width];
            for start in (0..rows).step_by(STRIP) {
                let count = STRIP.min(rows - start);
                for (offset, line) in strip.chunks_exact_mut(width).take(count).enumerate() {
                    reader.read_part(start + offset, first..first + width, line);
                }
                for column in 0..width {
                    let target = &mut out[column * rows + start..column * rows + start + count];
                    for (offset, value) in target.iter_mut().enumerate() {
                        *value = strip[offset * width + column];
                    }
                }
            }
            done.fetch_add(width, Ordering::Relaxed);
        });
    debug_assert!(columns.end <= cols && done.into_inner() == columns.len());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn transposing_places_every_element() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tiny-phi3");
        let source = Arc::new(HfModel::open(fixture).unwrap());
        let linear = source.spec().linears(0).remove(0);
        let [rows, cols] = [linear.out_features, linear.in_features];
        let dense = source
            .tensors()
            .read_f32(&format!("{}.weight", linear.name))
            .unwrap();
        let weights = Weights::new(source, OnnxType::Float);
        let whole = Stored::whole(std::slice::from_ref(&linear));
        let cut = Stored::rows(&linear, 5..rows - 3);
        for (stored, first) in [(&whole, 0), (&cut, 5)] {
            let tensor = weights.transposed("w", stored).unwrap();
            let count = stored.out_features();
            let got = tensor.to_f32().unwrap();
            assert_eq!(tensor.shape(), [cols, count]);
            for row in 0..count {
                for col in 0..cols {
                    assert_eq!(got[col * count + row], dense[(first + row) * cols + col]);
                }
            }
            let reader = weights.reader(stored).unwrap();
            let part = transposed(&reader, [count, cols], 7..18);
            assert_eq!(part, got[7 * count..18 * count]);
            assert_eq!(
                weights.table("w", stored).unwrap().to_f32().unwrap(),
                dense[first * cols..(first + count) * cols]
            );
        }
    }

    #[test]
    fn groups_are_split_into_blocks_that_share_their_scale() {
        let values: Vec<u8> = (0..2 * 96).map(|i| (i * 7 % 16) as u8).collect();
        let matrix = QuantMatrix::pack(
            [2, 96],
            4,
            96,
            &values,
            (vec![0.5, 0.25], olive_core::DType::F32),
            Some(&[3, 9]),
        )
        .unwrap();
        let kind = PackedKind {
            bits: 4,
            group_size: 96,
            block_size: 32,
            has_zeros: true,
        };
        let mut joined = BlockQuantized {
            values: Vec::new(),
            scales: Vec::new(),
            zeros: Vec::new(),
        };
        append(&mut joined, matrix.clone(), kind);
        assert_eq!(joined.values, matrix.values);
        assert_eq!(joined.scales, [0.5, 0.5, 0.5, 0.25, 0.25, 0.25]);
        assert_eq!(joined.zeros, [0x33, 0x03, 0x99, 0x09]);
    }
}
