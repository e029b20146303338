//! The layout of Olive checkpoints (`quant_method: olive`): the canonical order of [`QuantMatrix`] as it is.
//!
//! ```text
//! <module>.weight_qweight  uint8    [out, ceil(in * bits / 8)]      low bits first along the inputs
//! <module>.weight_scales   weight's [out, in / g]
//! <module>.weight_qzeros   uint8    [out, ceil(in / g * bits / 8)]  asymmetric only; symmetric: 2^(bits-1)
//! ```
//!
//! Olive up to 0.13 names the same parts `<module>.qweight`, `.scales` and `.qzeros`; both are read.

use super::{QuantMatrix, parts};
use crate::arch::ModuleQuantization;
use crate::checkpoint::TensorSource;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Names of the parts after the module's: values, scales, zero points.
pub const PARTS: [&str; 3] = ["weight_qweight", "weight_scales", "weight_qzeros"];

/// What Olive up to 0.13 calls [`PARTS`].
pub const OLD_PARTS: [&str; 3] = ["qweight", "scales", "qzeros"];

/// The names under which `module` is stored.
pub fn stored_parts(source: &dyn TensorSource, module: &str) -> [&'static str; 3] {
    let [values, ..] = OLD_PARTS;
    match source.info(&format!("{module}.{values}")) {
        Some(_) => OLD_PARTS,
        None => PARTS,
    }
}

/// The tensors of a packed linear, little-endian: name, type, shape and bytes.
pub type StoredPart = (String, DType, Vec<usize>, Vec<u8>);

/// Types and shapes of the parts of a module `[out, in]`, in the order of [`PARTS`].
pub fn plan(
    module: &str,
    shape: [usize; 2],
    settings: ModuleQuantization,
    scale_dtype: DType,
) -> Vec<(String, DType, Vec<usize>)> {
    let [rows, cols] = shape;
    let groups = cols / settings.group_for(cols).max(1);
    let bytes = |n: usize| (n * settings.bits).div_ceil(8);
    let [values, scales, zeros] = PARTS.map(|part| format!("{module}.{part}"));
    let mut parts = vec![
        (values, DType::U8, vec![rows, bytes(cols)]),
        (scales, scale_dtype, vec![rows, groups]),
    ];
    if !settings.symmetric {
        parts.push((zeros, DType::U8, vec![rows, bytes(groups)]));
    }
    parts
}

/// The parts of `matrix` under the name of `module`.
///
/// # Errors
/// [`Error::Tensor`] if the scales are of no floating-point type.
pub fn store(module: &str, matrix: &QuantMatrix) -> Result<Vec<StoredPart>> {
    let settings = ModuleQuantization {
        bits: matrix.bits,
        group_size: matrix.group_size as i64,
        symmetric: matrix.zeros.is_none(),
    };
    let scales = matrix.scale_dtype.from_f32(&matrix.scales).ok_or_else(|| {
        Error::tensor(
            module,
            "scales of a floating-point type",
            matrix.scale_dtype.to_string(),
        )
    })?;
    let bytes = [Some(matrix.values.clone()), Some(scales), matrix.zeros.clone()];
    let parts = plan(module, [matrix.rows, matrix.cols], settings, matrix.scale_dtype);
    Ok(parts
        .into_iter()
        .zip(bytes.into_iter().flatten())
        .map(|((name, dtype, shape), bytes)| (name, dtype, shape, bytes))
        .collect())
}

/// Reads `module [out, in]`.
///
/// # Errors
/// [`Error::MissingTensors`] or [`Error::Tensor`] naming the part.
pub fn read(
    source: &dyn TensorSource,
    module: &str,
    shape: [usize; 2],
    settings: ModuleQuantization,
) -> Result<QuantMatrix> {
    let group_size = settings.checked_group(module, shape)?;
    let [rows, cols] = shape;
    let [values, scales, zeros] = stored_parts(source, module).map(|part| format!("{module}.{part}"));
    let scale_dtype = source.require(&scales)?.dtype;
    let bytes = |n: usize| (n * settings.bits).div_ceil(8);
    let groups = cols / group_size;
    if settings.symmetric && source.info(&zeros).is_some() {
        return Err(Error::tensor(
            zeros,
            "no zero points: the config says symmetric",
            "some",
        ));
    }
    Ok(QuantMatrix {
        rows,
        cols,
        bits: settings.bits,
        group_size,
        values: parts::bytes(source, &values, DType::U8, &[rows, bytes(cols)])?,
        scales: source.read_f32_checked(&scales, &[rows, groups])?,
        scale_dtype,
        zeros: match settings.symmetric {
            true => None,
            false => Some(parts::bytes(source, &zeros, DType::U8, &[rows, bytes(groups)])?),
        },
    })
}
