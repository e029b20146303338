//! The `pack-quantized` layout of compressed-tensors.
//!
//! ```text
//! weight_packed      int32  [out, ceil(in * bits / 32)]     q + 2^(bits-1), low bits first along the inputs
//! weight_scale       float  [out, in / g]
//! weight_zero_point  int32  [ceil(out * bits / 32), in / g] z + 2^(bits-1), packed along out; or int8 [out, in / g];
//!                                                           asymmetric only
//! weight_shape       int64  [2]                             out, in
//! weight_g_idx       int32  [in]                            must be in order
//! ```
//!
//! Values and zero points are stored with the same offset, so that `w = (q - z) * scale` holds for what is stored.

use super::{QuantMatrix, parts};
use crate::arch::ModuleQuantization;
use crate::checkpoint::TensorSource;
use crate::dtype::DType;
use crate::error::{Error, Result};

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
) -> Result<QuantMatrix> {
    let group_size = settings.checked_group(module, shape)?;
    let ([rows, cols], bits) = (shape, settings.bits);
    let name = |part: &str| format!("{module}.{part}");
    check_shape(source, &name("weight_shape"), shape)?;
    parts::check_identity_order(source, &name("weight_g_idx"), cols, group_size)?;
    let groups = cols / group_size;
    let words = parts::words(
        source,
        &name("weight_packed"),
        &[rows, (cols * bits).div_ceil(32)],
    )?;
    let scale_dtype = source.require(&name("weight_scale"))?.dtype;
    let scales = source.read_f32_checked(&name("weight_scale"), &[rows, groups])?;
    let zeros = match settings.symmetric {
        true => None,
        false => Some(read_zeros(
            source,
            &name("weight_zero_point"),
            [rows, groups],
            bits,
        )?),
    };
    let values = parts::unpack_across(&words, cols, bits);
    QuantMatrix::pack(
        shape,
        bits,
        group_size,
        &values,
        (scales, scale_dtype),
        zeros.as_deref(),
    )
}

fn read_zeros(
    source: &dyn TensorSource,
    name: &str,
    [rows, groups]: [usize; 2],
    bits: usize,
) -> Result<Vec<u8>> {
    if source.require(name)?.dtype == DType::I8 {
        let (offset, most) = (1i16 << (bits - 1), 1i16 << bits);
        let stored = parts::bytes(source, name, DType::I8, &[rows, groups])?;
        let shifted = stored.iter().map(|z| i16::from(*z as i8) + offset);
        let zeros = shifted
            .map(|z| (0..most).contains(&z).then_some(z as u8))
            .collect::<Option<Vec<_>>>();
        return zeros.ok_or_else(|| Error::tensor(name, format!("zero points of {bits} bits"), "wider ones"));
    }
    let words = parts::words(source, name, &[(rows * bits).div_ceil(32), groups])?;
    Ok(parts::unpack_down(&words, rows, groups, bits))
}

fn check_shape(source: &dyn TensorSource, name: &str, shape: [usize; 2]) -> Result<()> {
    let stored = parts::bytes(source, name, DType::I64, &[2])?;
    let stored: Vec<i64> = stored
        .as_chunks::<8>()
        .0
        .iter()
        .map(|v| i64::from_le_bytes(*v))
        .collect();
    match stored == shape.map(|n| n as i64) {
        true => Ok(()),
        false => Err(Error::tensor(name, format!("{shape:?}"), format!("{stored:?}"))),
    }
}

/// The tensors of `matrix` under the name of `module`: name, type, shape and bytes.
///
/// # Errors
/// [`Error::Tensor`] if the scales are of no floating-point type.
pub fn store(module: &str, matrix: &QuantMatrix) -> Result<Vec<super::olive::StoredPart>> {
    let (rows, cols, groups, bits) = (matrix.rows, matrix.cols, matrix.groups(), matrix.bits);
    let name = |part: &str| format!("{module}.{part}");
    let scales = matrix.scale_dtype.from_f32(&matrix.scales).ok_or_else(|| {
        Error::tensor(
            module,
            "scales of a floating-point type",
            matrix.scale_dtype.to_string(),
        )
    })?;
    let bytes = |words: Vec<u32>| words.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<u8>>();
    let packed = bytes(parts::pack_across(&matrix.unpack_values(), cols, bits));
    let shape = [rows as i64, cols as i64]
        .into_iter()
        .flat_map(i64::to_le_bytes)
        .collect();
    let mut stored = vec![
        (
            name("weight_packed"),
            DType::I32,
            vec![rows, (cols * bits).div_ceil(32)],
            packed,
        ),
        (
            name("weight_scale"),
            matrix.scale_dtype,
            vec![rows, groups],
            scales,
        ),
        (name("weight_shape"), DType::I64, vec![2], shape),
    ];
    if matrix.zeros.is_some() {
        let zeros = bytes(parts::pack_down(&matrix.unpack_zeros(), rows, groups, bits));
        let shape = vec![(rows * bits).div_ceil(32), groups];
        stored.push((name("weight_zero_point"), DType::I32, shape, zeros));
    }
    Ok(stored)
}
