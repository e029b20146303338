//! NF4, the 4-bit normal float of QLoRA (<https://arxiv.org/abs/2305.14314>), as bitsandbytes stores it.
//!
//! ```text
//! w = CODE[q] * absmax[i / 64]                                  i: index in the row-major matrix
//! <module>.weight                                     uint8    [n / 2, 1]  the first value in the high nibble
//! <module>.weight.absmax                              float32  [n / 64], or uint8 with double quantization
//! <module>.weight.quant_map                           float32  [16]
//! <module>.weight.nested_absmax                       float32  [n / 64 / 256]
//! <module>.weight.nested_quant_map                    float32  [256]
//! <module>.weight.quant_state.bitsandbytes__nf4       uint8    JSON: shape, blocksize, dtype, nested_offset, …
//! absmax = nested_quant_map[q] * nested_absmax[i / 256] + nested_offset
//! ```

use serde::{Deserialize, Serialize};

use super::olive::StoredPart;
use super::parts;
use crate::checkpoint::TensorSource;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// The sixteen values, ascending.
pub const CODE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Values that share an absolute maximum.
pub const BLOCK: usize = 64;
/// Absolute maxima that share theirs.
pub const NESTED_BLOCK: usize = 256;

const STATE: &str = "weight.quant_state.bitsandbytes__nf4";

/// A matrix `[rows, cols]` of normal floats.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4Matrix {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Values that share an absolute maximum, in row-major order across rows.
    pub block_size: usize,
    /// Two values a byte, the first in the high nibble.
    pub values: Vec<u8>,
    /// Absolute maximum of each block.
    pub absmax: Absmax,
    /// The sixteen values.
    pub code: [f32; 16],
    /// The type the weight had, in which bitsandbytes gives it back.
    pub dtype: DType,
}

/// Absolute maxima of blocks.
#[derive(Debug, Clone, PartialEq)]
pub enum Absmax {
    /// As they are.
    Plain(Vec<f32>),
    /// Quantized again, less their mean.
    Nested(NestedAbsmax),
}

/// Absolute maxima in 8 bits.
#[derive(Debug, Clone, PartialEq)]
pub struct NestedAbsmax {
    /// Index into `map` of each.
    pub codes: Vec<u8>,
    /// Absolute maximum of each block of them.
    pub absmax: Vec<f32>,
    /// What an index stands for.
    pub map: Vec<f32>,
    /// Their mean.
    pub offset: f32,
    /// Indices that share an absolute maximum.
    pub block_size: usize,
}

impl Absmax {
    /// The absolute maximum of block `index`.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn get(&self, index: usize) -> f32 {
        match self {
            Self::Plain(values) => values[index],
            Self::Nested(nested) => {
                let value = nested.map[usize::from(nested.codes[index])];
                value * nested.absmax[index / nested.block_size] + nested.offset
            }
        }
    }
}

impl Nf4Matrix {
    /// Dequantizes rows `first..first + out.len() / cols`, row-major.
    ///
    /// # Panics
    /// If `out` is not a whole number of rows inside the matrix.
    pub fn dequantize_rows(&self, first: usize, out: &mut [f32]) {
        assert!(out.len().is_multiple_of(self.cols), "invariant: whole rows");
        let start = first * self.cols;
        let mut done = 0;
        while done < out.len() {
            let index = start + done;
            let block = index / self.block_size;
            let absmax = self.absmax.get(block);
            let end = ((block + 1) * self.block_size - start).min(out.len());
            for (i, w) in (index..).zip(&mut out[done..end]) {
                let nibble = (self.values[i / 2] >> (4 * (1 - i % 2))) & 0xf;
                *w = self.code[usize::from(nibble)] * absmax;
            }
            done = end;
        }
    }

    /// Dequantizes the whole matrix, `[rows, cols]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        self.dequantize_rows(0, &mut out);
        out
    }

    /// Bytes that it takes in memory and, but for names, on disk.
    pub fn byte_len(&self) -> usize {
        self.values.len()
            + match &self.absmax {
                Absmax::Plain(values) => values.len() * size_of::<f32>(),
                Absmax::Nested(nested) => nested.codes.len() + nested.absmax.len() * size_of::<f32>(),
            }
    }
}

/// What bitsandbytes keeps beside the tensors.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nested_blocksize: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nested_dtype: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nested_offset: Option<f32>,
}

/// The parts of a module: those that must exist and those that double quantization adds.
pub fn part_names(module: &str) -> ([String; 4], [String; 2]) {
    let name = |part: &str| format!("{module}.{part}");
    (
        ["weight", "weight.absmax", "weight.quant_map", STATE].map(name),
        ["weight.nested_absmax", "weight.nested_quant_map"].map(name),
    )
}

/// Whether `module` is stored in NF4.
pub fn is_stored(source: &dyn TensorSource, module: &str) -> bool {
    source.info(&format!("{module}.{STATE}")).is_some()
}

/// Reads `module [out, in]`.
///
/// # Errors
/// [`Error::MissingTensors`], [`Error::Tensor`] or [`Error::NotFinite`] naming the part.
pub fn read(source: &dyn TensorSource, module: &str, shape: [usize; 2]) -> Result<Nf4Matrix> {
    let ([weight, absmax, quant_map, state_name], nested) = part_names(module);
    let [rows, cols] = shape;
    let state: State =
        serde_json::from_slice(&source.bytes(&state_name)?).map_err(Error::json(&state_name))?;
    if state.quant_type != "nf4"
        || state.shape != shape
        || state.blocksize == 0
        || !state.blocksize.is_multiple_of(2)
    {
        let found = format!(
            "{} of {:?} in blocks of {}",
            state.quant_type, state.shape, state.blocksize
        );
        return Err(Error::tensor(state_name, format!("nf4 of {shape:?}"), found));
    }
    let dtype = dtype_of(&state.dtype)
        .ok_or_else(|| Error::tensor(&state_name, "float32, float16 or bfloat16", &state.dtype))?;
    let blocks = (rows * cols).div_ceil(state.blocksize);
    let code = source.read_f32_checked(&quant_map, &[16])?;
    Ok(Nf4Matrix {
        rows,
        cols,
        block_size: state.blocksize,
        values: parts::bytes(source, &weight, DType::U8, &[(rows * cols).div_ceil(2), 1])?,
        absmax: match state.nested_blocksize {
            None => Absmax::Plain(source.read_f32_checked(&absmax, &[blocks])?),
            Some(size) => {
                let offset = state.nested_offset.filter(|offset| offset.is_finite());
                let offset =
                    offset.ok_or_else(|| Error::tensor(&state_name, "a finite nested_offset", "none"))?;
                Absmax::Nested(read_nested(source, (&absmax, &nested), blocks, size, offset)?)
            }
        },
        code: code.try_into().unwrap_or(CODE),
        dtype,
    })
}

fn read_nested(
    source: &dyn TensorSource,
    (codes, [absmax, map]): (&str, &[String; 2]),
    blocks: usize,
    block_size: usize,
    offset: f32,
) -> Result<NestedAbsmax> {
    if block_size == 0 {
        return Err(Error::tensor(codes, "a positive nested block size", "0"));
    }
    Ok(NestedAbsmax {
        codes: parts::bytes(source, codes, DType::U8, &[blocks])?,
        absmax: source.read_f32_checked(absmax, &[blocks.div_ceil(block_size)])?,
        map: source.read_f32_checked(map, &[256])?,
        offset,
        block_size,
    })
}

/// The tensors of `matrix` under the name of `module`.
///
/// # Errors
/// [`Error::Json`] if the state cannot be written, which is for numbers that are not finite.
pub fn store(module: &str, matrix: &Nf4Matrix) -> Result<Vec<StoredPart>> {
    let ([weight, absmax, quant_map, state_name], [nested_absmax, nested_map]) = part_names(module);
    let floats = |name: String, values: &[f32]| {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        (name, DType::F32, vec![values.len()], bytes)
    };
    let mut state = State {
        quant_type: "nf4".to_owned(),
        blocksize: matrix.block_size,
        dtype: matrix.dtype.to_string(),
        shape: vec![matrix.rows, matrix.cols],
        nested_blocksize: None,
        nested_dtype: None,
        nested_offset: None,
    };
    let mut stored = vec![(
        weight,
        DType::U8,
        vec![matrix.values.len(), 1],
        matrix.values.clone(),
    )];
    match &matrix.absmax {
        Absmax::Plain(values) => stored.push(floats(absmax, values)),
        Absmax::Nested(nested) => {
            stored.push((absmax, DType::U8, vec![nested.codes.len()], nested.codes.clone()));
            stored.push(floats(nested_absmax, &nested.absmax));
            stored.push(floats(nested_map, &nested.map));
            state.nested_blocksize = Some(nested.block_size);
            state.nested_dtype = Some("float32".to_owned());
            state.nested_offset = Some(nested.offset);
        }
    }
    stored.push(floats(quant_map, &matrix.code));
    let state = serde_json::to_vec(&state).map_err(Error::json(&state_name))?;
    stored.push((state_name, DType::U8, vec![state.len()], state));
    Ok(stored)
}

fn dtype_of(name: &str) -> Option<DType> {
    [DType::F32, DType::F16, DType::BF16]
        .into_iter()
        .find(|dtype| dtype.to_string() == name)
}
