//! The GPTQ layout, as AutoGPTQ (v1) and GPTQModel (v2) store it.
//!
//! ```text
//! qweight int32  [in * bits / 32, out]       word r of column n: q[n, r * 32 / bits ..], low bits first
//! qzeros  int32  [in / g, out * bits / 32]   low bits first along out
//! scales  float  [in / g, out]
//! g_idx   int32  [in]                        group of each input; must be in order
//! ```
//!
//! Version 1 stores each word of `qzeros` less `0x11111111` (`0x01010101` for 8 bits), borrow included; version 2
//! (`checkpoint_format: gptq_v2`) stores zero points as they are.

use super::{QuantMatrix, parts};
use crate::arch::ModuleQuantization;
use crate::checkpoint::TensorSource;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// How zero points are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Less one.
    V1,
    /// As they are.
    V2,
}

impl Version {
    fn offset(self, bits: usize) -> u32 {
        match (self, bits) {
            (Self::V2, _) => 0,
            (Self::V1, 4) => 0x1111_1111,
            (Self::V1, _) => 0x0101_0101,
        }
    }
}

/// The tensors of a packed linear: little-endian words, and scales in the matrix's scale type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GptqTensors {
    /// `int32 [in * bits / 32, out]`.
    pub qweight: Vec<u8>,
    /// `int32 [in / g, out * bits / 32]`.
    pub qzeros: Vec<u8>,
    /// `[in / g, out]`.
    pub scales: Vec<u8>,
    /// `int32 [in]`.
    pub g_idx: Vec<u8>,
}

fn to_bytes(words: impl IntoIterator<Item = u32>) -> Vec<u8> {
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

fn check_shape(name: &str, [rows, cols]: [usize; 2], bits: usize) -> Result<()> {
    let in_word = 32 / bits.max(1);
    if !rows.is_multiple_of(in_word) || !cols.is_multiple_of(in_word) {
        let expected = format!("input and output features that are multiples of {in_word}");
        return Err(Error::tensor(name, expected, format!("[{rows}, {cols}]")));
    }
    Ok(())
}

/// Stores a matrix in this layout.
///
/// # Errors
/// [`Error::Tensor`] if the sizes do not fill words or the scales are of no floating-point type.
pub fn store(matrix: &QuantMatrix, version: Version) -> Result<GptqTensors> {
    let (rows, cols, bits) = (matrix.rows, matrix.cols, matrix.bits);
    check_shape("GPTQ weight", [rows, cols], bits)?;
    let groups = matrix.groups();
    let values = parts::transpose(&matrix.unpack_values(), rows, cols);
    let zeros = parts::transpose(&matrix.unpack_zeros(), rows, groups);
    let scales = parts::transpose(&matrix.scales, rows, groups);
    let scales = matrix.scale_dtype.from_f32(&scales).ok_or_else(|| {
        Error::tensor(
            "GPTQ weight",
            "scales of a floating-point type",
            matrix.scale_dtype.to_string(),
        )
    })?;
    let offset = version.offset(bits);
    Ok(GptqTensors {
        qweight: to_bytes(parts::pack_down(&values, cols, rows, bits)),
        qzeros: to_bytes(
            parts::pack_across(&zeros, rows, bits)
                .into_iter()
                .map(|w| w.wrapping_sub(offset)),
        ),
        scales,
        g_idx: to_bytes((0..cols).map(|k| (k / matrix.group_size) as u32)),
    })
}

/// Reads `module [out, in]`.
///
/// # Errors
/// [`Error::MissingTensors`] or [`Error::Tensor`] naming the part; [`Error::Unsupported`] for inputs in the order of
/// activations.
pub fn read(
    source: &dyn TensorSource,
    module: &str,
    shape: [usize; 2],
    settings: ModuleQuantization,
    version: Version,
) -> Result<QuantMatrix> {
    let group_size = settings.checked_group(module, shape)?;
    let ([rows, cols], bits) = (shape, settings.bits);
    check_shape(module, shape, bits)?;
    let (groups, in_word) = (cols / group_size, 32 / bits);
    parts::check_identity_order(source, &format!("{module}.g_idx"), cols, group_size)?;
    let qweight = parts::words(source, &format!("{module}.qweight"), &[cols / in_word, rows])?;
    let offset = version.offset(bits);
    let qzeros = parts::words(source, &format!("{module}.qzeros"), &[groups, rows / in_word])?;
    let qzeros: Vec<u32> = qzeros.into_iter().map(|word| word.wrapping_add(offset)).collect();
    let scales = format!("{module}.scales");
    let scale_dtype = source.require(&scales)?.dtype;
    let scales = parts::transpose(&source.read_f32_checked(&scales, &[groups, rows])?, groups, rows);
    let values = parts::transpose(&parts::unpack_down(&qweight, cols, rows, bits), cols, rows);
    let zeros = parts::transpose(&parts::unpack_across(&qzeros, rows, bits), groups, rows);
    QuantMatrix::pack(
        shape,
        bits,
        group_size,
        &values,
        (scales, scale_dtype),
        Some(&zeros),
    )
}

/// The version that a config's `checkpoint_format` names.
///
/// # Errors
/// [`Error::Unsupported`] for another format, such as `marlin`.
pub fn version(checkpoint_format: Option<&str>) -> Result<Version> {
    match checkpoint_format {
        None | Some("gptq") => Ok(Version::V1),
        Some("gptq_v2") => Ok(Version::V2),
        Some(other) => Err(Error::unsupported(
            format!("a GPTQ checkpoint in the format `{other}`"),
            "olive reads `gptq` and `gptq_v2`",
        )),
    }
}

/// The types of the parts, for writers: `qweight`, `qzeros`, `scales`, `g_idx`.
pub fn plan(matrix: &QuantMatrix) -> [(&'static str, DType, Vec<usize>); 4] {
    let (rows, cols, groups, in_word) = (matrix.rows, matrix.cols, matrix.groups(), 32 / matrix.bits);
    [
        ("qweight", DType::I32, vec![cols / in_word, rows]),
        ("qzeros", DType::I32, vec![groups, rows / in_word]),
        ("scales", matrix.scale_dtype, vec![groups, rows]),
        ("g_idx", DType::I32, vec![cols]),
    ]
}
