//! The tensors of the checkpoint that is written: names and types, and the bytes of a layer.

use half::f16;
use half::slice::HalfFloatSliceExt;
use olive_core::packed::awq_gemm;
use olive_core::{CheckpointPlan, DType, Error, LinearSpec, ModelSpec, QuantMatrix, Result, TensorSource};
use rayon::prelude::*;

use crate::layer::LayerWeights;
use crate::options::QuantizeOptions;

/// A tensor ready to be written: name and little-endian bytes.
pub type Encoded = (String, Vec<u8>);

/// All tensors of the quantized checkpoint, in the order of the forward pass.
pub fn plan(spec: &ModelSpec, options: &QuantizeOptions) -> CheckpointPlan {
    let packed: std::collections::BTreeMap<String, LinearSpec> = (0..spec.n_layers)
        .flat_map(|layer| spec.linears(layer))
        .filter(|linear| options.converts(linear))
        .map(|linear| (format!("{}.weight", linear.name), linear))
        .collect();
    let mut plan = CheckpointPlan::default();
    for (name, shape) in spec.dense_tensors() {
        match packed.get(&name) {
            Some(linear) => push_packed(&mut plan, linear, options),
            None => plan.push(name, DType::F16, shape),
        }
    }
    plan
}

/// The tensors of layer `index` alone.
pub fn layer_plan(spec: &ModelSpec, options: &QuantizeOptions, index: usize) -> CheckpointPlan {
    let prefix = format!("model.layers.{index}.");
    let mut all = plan(spec, options);
    all.tensors.retain(|(name, _)| name.starts_with(&prefix));
    all
}

fn push_packed(plan: &mut CheckpointPlan, linear: &LinearSpec, options: &QuantizeOptions) {
    let (rows, cols) = (linear.out_features, linear.in_features);
    let groups = cols / options.group_for(cols);
    let name = |part: &str| format!("{}.{part}", linear.name);
    plan.push(name("qweight"), DType::I32, [cols, rows / 8]);
    plan.push(name("qzeros"), DType::I32, [groups, rows / 8]);
    plan.push(name("scales"), DType::F16, [groups, rows]);
}

/// A packed linear in the `gemm` layout.
///
/// # Errors
/// [`Error::Tensor`] if the layout cannot hold it.
pub fn packed(name: &str, matrix: &QuantMatrix) -> Result<[Encoded; 3]> {
    let stored = awq_gemm::store(matrix)?;
    Ok([
        (format!("{name}.qweight"), stored.qweight),
        (format!("{name}.qzeros"), stored.qzeros),
        (format!("{name}.scales"), stored.scales),
    ])
}

/// Elements that one task converts.
const TASK: usize = 1 << 16;

/// `values` in half precision.
///
/// # Errors
/// [`Error::Tensor`] if a value is beyond its range, [`Error::NotFinite`] if one is not finite.
pub fn half(name: &str, values: &[f32]) -> Result<Vec<u8>> {
    let mut bytes = vec![0; 2 * values.len()];
    let pieces = bytes.par_chunks_mut(2 * TASK).zip(values.par_chunks(TASK));
    if pieces
        .map(|(bytes, values)| fill_half(values, bytes))
        .reduce(|| true, |a, b| a && b)
    {
        return Ok(bytes);
    }
    let bad = values.iter().filter(|v| !v.is_finite()).count();
    if bad > 0 {
        return Err(Error::NotFinite {
            what: format!("tensor `{name}`"),
            found: bad,
        });
    }
    let wide = values.iter().filter(|v| f16::from_f32(**v).is_infinite()).count();
    let largest = values.iter().fold(0.0f32, |most, v| most.max(v.abs()));
    let found = format!("{wide} value(s) up to {largest:e}");
    Err(Error::tensor(name, "values that fit float16", found))
}

/// The stored tensor `name` of this shape in half precision; never all of it in single precision.
///
/// # Errors
/// Those of reading a tensor that must exist with that shape and be finite, and of [`half()`].
pub fn stored_half(source: &dyn TensorSource, name: &str, shape: &[usize]) -> Result<Vec<u8>> {
    let info = source.require(name)?;
    if info.shape == shape {
        let (stored, size) = (source.bytes(name)?, info.dtype.size());
        let mut bytes = vec![0; stored.len() / size * 2];
        let pieces = bytes.par_chunks_mut(2 * TASK).zip(stored.par_chunks(TASK * size));
        let convert = |(bytes, stored): (&mut [u8], &[u8])| {
            let values = info.dtype.to_f32(stored);
            values.is_some_and(|values| fill_half(&values, bytes))
        };
        if pieces.map(convert).reduce(|| true, |a, b| a && b) {
            return Ok(bytes);
        }
    }
    // What is wrong with it is said by those who look at all of it.
    half(name, &source.read_f32_checked(name, shape)?)
}

/// `values` as half-precision bytes; whether all of them are finite.
fn fill_half(values: &[f32], bytes: &mut [u8]) -> bool {
    const LANES: usize = 64;
    let mut finite = true;
    for (bytes, values) in bytes.chunks_mut(2 * LANES).zip(values.chunks(LANES)) {
        let mut halves = [f16::ZERO; LANES];
        let halves = &mut halves[..values.len()];
        halves.convert_from_f32_slice(values);
        for (bytes, half) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(halves) {
            *bytes = half.to_le_bytes();
            finite &= half.is_finite();
        }
    }
    finite
}

/// Norms, biases and linears that stay dense, of a layer.
///
/// # Errors
/// Those of [`half()`].
pub fn dense_parts(spec: &ModelSpec, layer: &LayerWeights) -> Result<Vec<Encoded>> {
    let names = spec.layer_names(layer.index);
    let mut parts = vec![
        (names.input_norm, &layer.input_norm),
        (names.post_attention_norm, &layer.post_attention_norm),
    ];
    for linear in &layer.linears {
        if !linear.converts {
            parts.push((format!("{}.weight", linear.spec.name), &linear.weight));
        }
        if let Some(bias) = &linear.bias {
            parts.push((format!("{}.bias", linear.spec.name), bias));
        }
    }
    parts.extend(
        layer
            .head_norms
            .iter()
            .map(|(name, values)| (name.clone(), values)),
    );
    parts
        .into_iter()
        .map(|(name, values)| half(&name, values).map(|bytes| (name, bytes)))
        .collect()
}
