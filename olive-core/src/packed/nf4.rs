//! NF4, the 4-bit normal float of QLoRA (<https://arxiv.org/abs/2305.14314>), and FP4, as bitsandbytes stores them.
//!
//! ```text
//! w = CODE[q] * absmax[i / 64]                                  i: index in the row-major matrix
//! <module>.weight                                     uint8    [n / 2, 1]  the first value in the high nibble
//! <module>.weight.absmax                              float32  [n / 64], or uint8 with double quantization
//! <module>.weight.quant_map                           float32  [16]
//! <module>.weight.nested_absmax                       float32  [n / 64 / 256]
//! <module>.weight.nested_quant_map                    float32  [256]
//! <module>.weight.quant_state.bitsandbytes__nf4       uint8    JSON: shape, blocksize, dtype, nested_offset, …
//!                                     (or …__fp4)
//! absmax = nested_quant_map[q] * nested_absmax[i / 256] + nested_offset
//! ```

mod quantize;

use serde::{Deserialize, Serialize};

use super::olive::StoredPart;
use super::parts;
use crate::checkpoint::{TensorInfo, TensorSource};
use crate::dtype::DType;
use crate::error::{Error, Result};

pub use quantize::{Nf4Options, dynamic_map, quantize};

/// The sixteen values of NF4, ascending.
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

/// The sixteen values of FP4: sign, two bits of exponent, one of mantissa.
pub const FP4_CODE: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

/// Which sixteen values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantType {
    /// Quantiles of the normal distribution.
    Nf4,
    /// 4-bit floats.
    Fp4,
}

impl QuantType {
    /// Its name in a config: `nf4` or `fp4`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// Its values, by code.
    pub fn code(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &CODE,
            Self::Fp4 => &FP4_CODE,
        }
    }

    fn state_name(self, module: &str) -> String {
        format!("{module}.weight.quant_state.bitsandbytes__{}", self.name())
    }

    /// How `module` is stored, if it is.
    fn stored(source: &dyn TensorSource, module: &str) -> Option<Self> {
        let is_there = |kind: &Self| source.info(&kind.state_name(module)).is_some();
        [Self::Nf4, Self::Fp4].into_iter().find(is_there)
    }
}

/// Values that share an absolute maximum.
pub const BLOCK: usize = 64;
/// Absolute maxima that share theirs.
pub const NESTED_BLOCK: usize = 256;
/// Bytes of a state as olive writes it.
pub const STATE_BYTES: usize = 256;

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

    /// Which sixteen values: NF4's are ascending.
    pub fn quant_type(&self) -> QuantType {
        match self.code[0] < 0.0 {
            true => QuantType::Nf4,
            false => QuantType::Fp4,
        }
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
    nested_offset: Option<f64>,
}

/// The parts of a module: those that must exist and those that double quantization adds.
pub fn part_names(module: &str, quant_type: QuantType) -> ([String; 4], [String; 2]) {
    let name = |part: &str| format!("{module}.weight{part}");
    let [weight, absmax, quant_map] = ["", ".absmax", ".quant_map"].map(name);
    (
        [weight, absmax, quant_map, quant_type.state_name(module)],
        [".nested_absmax", ".nested_quant_map"].map(name),
    )
}

/// The parts of `module` as it is stored; `None` if it is dense.
pub fn stored_parts(source: &dyn TensorSource, module: &str) -> Option<([String; 4], [String; 2])> {
    QuantType::stored(source, module).map(|quant_type| part_names(module, quant_type))
}

/// Reads `module [out, in]`.
///
/// # Errors
/// [`Error::MissingTensors`], [`Error::Tensor`] or [`Error::NotFinite`] naming the part.
pub fn read(source: &dyn TensorSource, module: &str, shape: [usize; 2]) -> Result<Nf4Matrix> {
    let quant_type = QuantType::stored(source, module).unwrap_or(QuantType::Nf4);
    let ([weight, absmax, quant_map, state_name], nested) = part_names(module, quant_type);
    let [rows, cols] = shape;
    let state: State =
        serde_json::from_slice(&source.bytes(&state_name)?).map_err(Error::json(&state_name))?;
    if state.quant_type != quant_type.name()
        || state.shape != shape
        || state.blocksize == 0
        || !state.blocksize.is_multiple_of(2)
    {
        let found = format!(
            "{} of {:?} in blocks of {}",
            state.quant_type, state.shape, state.blocksize
        );
        let expected = format!("{} of {shape:?}", quant_type.name());
        return Err(Error::tensor(state_name, expected, found));
    }
    let dtype = dtype_of(&state.dtype)
        .ok_or_else(|| Error::tensor(&state_name, "float32, float16 or bfloat16", &state.dtype))?;
    let blocks = (rows * cols).div_ceil(state.blocksize);
    let code = source.read_f32_checked(&quant_map, &[16])?;
    let code = code.try_into().unwrap_or(*quant_type.code());
    Ok(Nf4Matrix {
        rows,
        cols,
        block_size: state.blocksize,
        values: parts::bytes(source, &weight, DType::U8, &[(rows * cols).div_ceil(2), 1])?,
        absmax: match state.nested_blocksize {
            None => Absmax::Plain(source.read_f32_checked(&absmax, &[blocks])?),
            Some(size) => {
                let offset = state.nested_offset.map(|offset| offset as f32);
                let offset = offset.filter(|offset| offset.is_finite());
                let offset =
                    offset.ok_or_else(|| Error::tensor(&state_name, "a finite nested_offset", "none"))?;
                Absmax::Nested(read_nested(source, (&absmax, &nested), blocks, size, offset)?)
            }
        },
        code,
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

/// Names, types and shapes of the parts of a module `[rows, cols]`, in the order of [`store`].
pub fn plan(module: &str, [rows, cols]: [usize; 2], options: Nf4Options) -> Vec<(String, TensorInfo)> {
    let ([weight, absmax, quant_map, state], [nested_absmax, nested_map]) =
        part_names(module, options.quant_type);
    let blocks = (rows * cols).div_ceil(options.block_size.max(1));
    let info = |name, dtype, shape| (name, TensorInfo { dtype, shape });
    let mut parts = vec![info(weight, DType::U8, vec![(rows * cols).div_ceil(2), 1])];
    if options.double_quant {
        parts.push(info(absmax, DType::U8, vec![blocks]));
        let nested = blocks.div_ceil(NESTED_BLOCK);
        parts.push(info(nested_absmax, DType::F32, vec![nested]));
        parts.push(info(nested_map, DType::F32, vec![256]));
    } else {
        parts.push(info(absmax, DType::F32, vec![blocks]));
    }
    parts.push(info(quant_map, DType::F32, vec![16]));
    parts.push(info(state, DType::U8, vec![STATE_BYTES]));
    parts
}

/// The tensors of `matrix` under the name of `module`; the state ends in spaces, so that its length is known before.
///
/// # Errors
/// [`Error::Json`] if the state cannot be written, which is for numbers that are not finite.
pub fn store(module: &str, matrix: &Nf4Matrix) -> Result<Vec<StoredPart>> {
    let quant_type = matrix.quant_type();
    let ([weight, absmax, quant_map, state_name], [nested_absmax, nested_map]) =
        part_names(module, quant_type);
    let floats = |name: String, values: &[f32]| {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        (name, DType::F32, vec![values.len()], bytes)
    };
    let mut state = State {
        quant_type: quant_type.name().to_owned(),
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
            state.nested_offset = Some(f64::from(nested.offset));
        }
    }
    stored.push(floats(quant_map, &matrix.code));
    let mut state = serde_json::to_vec(&state).map_err(Error::json(&state_name))?;
    state.resize(state.len().max(STATE_BYTES), b' ');
    stored.push((state_name, DType::U8, vec![state.len()], state));
    Ok(stored)
}

fn dtype_of(name: &str) -> Option<DType> {
    [DType::F32, DType::F16, DType::BF16]
        .into_iter()
        .find(|dtype| dtype.to_string() == name)
}
