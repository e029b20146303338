//! Everything that can be refused before work begins, and what the work will take.

use std::path::Path;

use olive_core::{Error, HfModel, ModelHandle, ModelKind, ModelSpec, Result, TensorSource};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::calibration::CalibrationSet;
use crate::encode;
use crate::options::{Algorithm, QuantizeOptions};
use crate::quantizer::awq::statistics::InputStatistics;

/// What a run will take and give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preflight {
    /// Linears that will be quantized.
    pub quantized_linears: usize,
    /// Weights in them.
    pub quantized_weights: u64,
    /// Peak of memory, in bytes; file pages that the system may drop are not counted.
    pub peak_memory_bytes: u64,
    /// Bytes of the checkpoint.
    pub output_bytes: u64,
    /// Bytes that the unfinished work takes on disk besides.
    pub work_bytes: u64,
}

impl std::fmt::Display for Preflight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
        write!(
            f,
            "{} linears with {:.1} million weights; about {:.0} MiB of memory; {:.1} MiB of output",
            self.quantized_linears,
            self.quantized_weights as f64 / 1e6,
            mib(self.peak_memory_bytes),
            mib(self.output_bytes),
        )
    }
}

/// Checks model, options and calibration: names and shapes of all tensors, group sizes, finite weights, token ids.
/// Writes nothing.
///
/// # Errors
/// [`Error::Config`] for an option; [`Error::Unsupported`] for a model that is quantized already, has an adapter or
/// is no Hugging Face model; [`Error::MissingTensors`], [`Error::UnknownTensors`], [`Error::Tensor`] or
/// [`Error::NotFinite`] naming the tensor.
pub fn preflight(
    model: &dyn ModelHandle,
    calibration: &CalibrationSet,
    options: &QuantizeOptions,
) -> Result<Preflight> {
    check_model(model, options)?;
    let spec = model.spec();
    if options.algorithm == Algorithm::Awq {
        calibration.check(spec)?;
    }
    let names: Vec<String> = spec.dense_tensors().into_iter().map(|(name, _)| name).collect();
    check_finite(model.tensors(), names.iter().map(String::as_str))?;
    let converted: Vec<_> = (0..spec.n_layers)
        .flat_map(|layer| spec.linears(layer))
        .filter(|linear| options.converts(linear))
        .collect();
    let plan = encode::plan(spec, options);
    let in_layers = |name: &str| name.contains(".layers.");
    let work: usize = plan
        .tensors
        .iter()
        .filter(|(n, _)| in_layers(n))
        .map(|(_, info)| info.byte_len())
        .sum();
    Ok(Preflight {
        quantized_linears: converted.len(),
        quantized_weights: converted
            .iter()
            .map(|l| (l.in_features * l.out_features) as u64)
            .sum(),
        peak_memory_bytes: peak_memory(spec, calibration, options),
        output_bytes: plan.byte_len(),
        work_bytes: work as u64,
    })
}

/// The part of [`preflight`] that reads no weights.
///
/// # Errors
/// As [`preflight`], but for weights and calibration.
pub fn check_model(model: &dyn ModelHandle, options: &QuantizeOptions) -> Result<()> {
    options.check()?;
    let spec = model.spec();
    let what = || format!("model `{}`", model.path().display());
    if model.kind() != ModelKind::HuggingFace {
        return Err(Error::unsupported(
            what(),
            "quantization starts from a Hugging Face checkpoint",
        ));
    }
    if let Some(quantization) = &spec.quantization {
        let reason = format!("it is quantized already (`{}`)", quantization.quant_method);
        return Err(Error::unsupported(what(), reason));
    }
    if model.adapter().is_some() {
        return Err(Error::unsupported(
            what(),
            "it has an adapter; quantize the base, or merge the adapter first",
        ));
    }
    HfModel::open(model.path())?.check_tensors()?;
    for linear in spec
        .linears(0)
        .into_iter()
        .filter(|linear| options.converts(linear))
    {
        let group_size = options.group_for(linear.in_features);
        if !linear.in_features.is_multiple_of(group_size) {
            let expected = format!("input features that are a multiple of the group size {group_size}");
            return Err(Error::tensor(
                linear.name,
                expected,
                linear.in_features.to_string(),
            ));
        }
        if !linear.out_features.is_multiple_of(8) {
            let expected = "output features that are a multiple of 8";
            return Err(Error::tensor(
                linear.name,
                expected,
                linear.out_features.to_string(),
            ));
        }
    }
    Ok(())
}

/// Refuses tensors that are not finite, naming the first such one.
pub(crate) fn check_finite<'a>(
    source: &dyn TensorSource,
    names: impl Iterator<Item = &'a str>,
) -> Result<()> {
    /// Bytes that one task looks at.
    const TASK: usize = 1 << 20;
    for name in names {
        let info = source.require(name)?;
        let bytes = source.bytes(name)?;
        let bad = bytes
            .par_chunks(TASK)
            .map(|own| info.dtype.count_not_finite(own))
            .sum();
        if !info.dtype.is_float() {
            return Err(Error::tensor(
                name,
                "floating-point elements",
                info.dtype.to_string(),
            ));
        }
        if bad > 0 {
            return Err(Error::NotFinite {
                what: format!("tensor `{name}`"),
                found: bad,
            });
        }
    }
    Ok(())
}

/// Refuses an output folder that would replace the model it is made from.
///
/// # Errors
/// [`Error::Config`].
pub fn check_output(model: &Path, output: &Path) -> Result<()> {
    let resolve = |path: &Path| std::fs::canonicalize(path).ok();
    let source = resolve(model);
    for target in [output.to_path_buf(), output.join("model")] {
        if source.is_some() && resolve(&target) == source {
            let expected = "a folder that does not hold the model itself";
            return Err(Error::config(
                "quantize",
                "output_path",
                expected,
                output.display().to_string(),
            ));
        }
    }
    Ok(())
}

/// Copies of a layer's weights in `f32` that exist at a time: as read, on the device, scaled, and a candidate.
const LAYER_COPIES: u64 = 4;
/// Tensors of hidden width that are kept for all tokens: states, normalised input and output of a half layer.
const TOKEN_TENSORS: u64 = 3;

fn peak_memory(spec: &ModelSpec, calibration: &CalibrationSet, options: &QuantizeOptions) -> u64 {
    const F32: u64 = size_of::<f32>() as u64;
    let linears = spec.linears(0);
    let layer: u64 = linears
        .iter()
        .map(|l| (l.in_features * l.out_features) as u64 * F32)
        .sum();
    let table = (spec.vocab_size * spec.hidden_size) as u64 * F32;
    // The table as floats and as half precision bytes.
    let ends = table + table / 2;
    if options.algorithm == Algorithm::Rtn {
        return ends.max(2 * layer);
    }
    let halves = [spec.q_size(), spec.intermediate_size];
    let statistics =
        halves.map(|width| InputStatistics::byte_len(width) + InputStatistics::byte_len(spec.hidden_size));
    let states = calibration.tokens() as u64 * spec.hidden_size as u64 * F32;
    let longest = calibration.sequences.iter().map(Vec::len).max().unwrap_or(0) as u64;
    let threads = rayon::current_num_threads() as u64;
    let widest = (spec.q_size() + 2 * spec.kv_size()).max(2 * spec.intermediate_size) as u64;
    let scores = spec.n_heads as u64 * longest.min(256) * longest;
    let activations = threads * F32 * (2 * longest * widest + 3 * scores);
    let layers =
        LAYER_COPIES * layer + statistics[0].max(statistics[1]) + TOKEN_TENSORS * states + activations;
    layers.max(ends + states)
}
