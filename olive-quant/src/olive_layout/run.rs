//! The run: checks, then tensor by tensor, then the output folder.

use std::path::Path;

use burn::tensor::backend::Backend;
use olive_core::decoder::Cpu;
use olive_core::model::{self, ModelConfigFile};
use olive_core::packed::olive;
use olive_core::{
    CancelToken, CheckpointPlan, CheckpointWriter, Error, HfModel, ModelHandle, ModelKind, Progress, QuantMatrix,
    Result, WeightKind, fsio,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::calibrated;
use super::options::{Rounding, Target, UniformOptions};
use crate::calibration::CalibrationSet;
use crate::output::{MODEL_FOLDER, check_replaceable};
use crate::preflight::check_output;
use crate::quantizer::gptq::GptqWeight;
use crate::quantizer::kquant;
use crate::quantizer::minmax::MinMax;
use crate::quantizer::mixed_precision::module_name;
use crate::report::REPORT_FILE;
use crate::work::remove_dir;

/// The unfinished checkpoint, inside the output folder.
const STAGING: &str = ".olive-checkpoint";

/// A finished run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UniformReport {
    /// How weights were rounded.
    pub rounding: Rounding,
    /// Tokens of the calibration; zero without one.
    pub calibration_tokens: usize,
    /// Every module that was quantized, in order.
    pub linears: Vec<UniformLinear>,
    /// Bytes of the checkpoint.
    pub output_bytes: u64,
}

/// One quantized module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UniformLinear {
    /// Its name.
    pub name: String,
    /// Bits of a weight.
    pub bits: usize,
    /// Inputs that share a scale.
    pub group_size: usize,
    /// Whether it has no zero points.
    pub symmetric: bool,
    /// `‖Q(W) - W‖ / ‖W‖`.
    pub weight_error: f64,
    /// Square error of the outputs on the calibration; GPTQ only.
    pub loss: Option<f64>,
    /// The same for rounding to nearest.
    pub loss_rtn: Option<f64>,
    /// The damping that was needed; GPTQ only.
    pub damp_percent: Option<f64>,
}

/// Quantizes `model` on the CPU and writes `output`: `model/` in Olive's layout with configs and tokenizer,
/// `model_config.json`, `quantization_report.json`. Only GPTQ looks at `calibration`.
///
/// # Errors
/// [`Error::Config`] for an option; [`Error::Unsupported`] for a model that is quantized already, has an adapter or is
/// no Hugging Face model; [`Error::Tensor`] or [`Error::NotFinite`] naming a tensor; [`Error::Cancelled`];
/// [`Error::Io`].
pub fn quantize_uniform(
    model: &dyn ModelHandle,
    calibration: &CalibrationSet,
    options: &UniformOptions,
    output: &Path,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<UniformReport> {
    quantize_uniform_on::<Cpu>(model, calibration, options, output, progress, cancel)
}

/// As [`quantize_uniform`], with the calibration on another Burn backend's default device.
///
/// # Errors
/// As [`quantize_uniform`].
pub fn quantize_uniform_on<B: Backend>(
    model: &dyn ModelHandle,
    calibration: &CalibrationSet,
    options: &UniformOptions,
    output: &Path,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<UniformReport> {
    check_output(model.path(), output)?;
    check_replaceable(output)?;
    check_model(model, options)?;
    let calibrates = matches!(options.rounding, Rounding::Gptq { .. });
    if calibrates {
        calibration.check(model.spec())?;
    }
    let staging = output.join(STAGING);
    remove_dir(&staging)?;
    let plan = plan(model, options)?;
    let mut sink = Sink {
        writer: CheckpointWriter::create(&staging, &plan)?,
        linears: Vec::new(),
    };
    let run = Run {
        model,
        options,
        progress,
        cancel,
    };
    let written = match calibrates {
        true => calibrated::write::<B>(&run, calibration, &mut sink),
        false => run.write(&mut sink),
    };
    let Sink { writer, linears } = sink;
    let result = written.and_then(|()| writer.finish()).and_then(|()| {
        let report = UniformReport {
            rounding: options.rounding,
            calibration_tokens: if calibrates { calibration.tokens() } else { 0 },
            linears,
            output_bytes: plan.byte_len(),
        };
        assemble(model, options, &staging, output, &report)?;
        Ok(report)
    });
    if result.is_err()
        && let Err(error) = remove_dir(&staging)
    {
        tracing::warn!("{error}");
    }
    result
}

/// The checks that read no weights.
///
/// # Errors
/// As [`quantize_uniform`].
pub fn check_model(model: &dyn ModelHandle, options: &UniformOptions) -> Result<()> {
    let what = || format!("model `{}`", model.path().display());
    if model.kind() != ModelKind::HuggingFace {
        return Err(Error::unsupported(what(), "quantization starts from a Hugging Face checkpoint"));
    }
    if let Some(quantization) = &model.spec().quantization {
        let reason = format!("it is quantized already (`{}`)", quantization.quant_method);
        return Err(Error::unsupported(what(), reason));
    }
    if model.adapter().is_some() {
        return Err(Error::unsupported(what(), "it has an adapter; quantize the base, or merge the adapter first"));
    }
    HfModel::open(model.path())?.check_tensors()?;
    options.targets(model.spec())?;
    Ok(())
}

/// All tensors of the checkpoint, in the order of the forward pass.
fn plan(model: &dyn ModelHandle, options: &UniformOptions) -> Result<CheckpointPlan> {
    let targets = options.targets(model.spec())?;
    let mut plan = CheckpointPlan::default();
    for (name, shape) in model.spec().dense_tensors() {
        let dtype = model.tensors().require(&name)?.dtype;
        match targets.iter().find(|target| target.module == module_name(&name)) {
            Some(target) if shape.len() == 2 => {
                for (name, dtype, shape) in olive::plan(&target.module, target.shape, target.settings, dtype) {
                    plan.push(name, dtype, shape);
                }
            }
            _ => plan.push(name, dtype, shape),
        }
    }
    Ok(plan)
}

/// Where results go.
pub(super) struct Sink {
    writer: CheckpointWriter,
    linears: Vec<UniformLinear>,
}

impl Sink {
    /// Writes a quantized module.
    pub fn quantized(&mut self, target: &Target, weight: &[f32], rounded: &Rounded) -> Result<()> {
        let matrix = rounded.matrix();
        for (name, _, _, bytes) in olive::store(&target.module, matrix)? {
            self.writer.write(&name, &bytes)?;
        }
        let gptq = match rounded {
            Rounded::Gptq(gptq) => Some(gptq),
            Rounded::Plain(_) => None,
        };
        self.linears.push(UniformLinear {
            name: target.module.clone(),
            bits: matrix.bits,
            group_size: matrix.group_size,
            symmetric: matrix.zeros.is_none(),
            weight_error: relative_error(&matrix.dequantize(), weight),
            loss: gptq.map(|gptq| gptq.loss),
            loss_rtn: gptq.map(|gptq| gptq.loss_rtn),
            damp_percent: gptq.map(|gptq| gptq.damp_percent),
        });
        Ok(())
    }

    /// Copies a tensor as it is stored.
    pub fn copied(&mut self, model: &dyn ModelHandle, name: &str) -> Result<()> {
        self.writer.write(name, &model.tensors().bytes(name)?)
    }
}

/// A rounded weight.
pub(super) enum Rounded {
    /// Without calibration.
    Plain(QuantMatrix),
    /// With it.
    Gptq(GptqWeight),
}

impl Rounded {
    pub fn matrix(&self) -> &QuantMatrix {
        match self {
            Self::Plain(matrix) => matrix,
            Self::Gptq(gptq) => &gptq.matrix,
        }
    }
}

pub(super) struct Run<'a> {
    pub model: &'a dyn ModelHandle,
    pub options: &'a UniformOptions,
    pub progress: &'a dyn Progress,
    pub cancel: &'a CancelToken,
}

impl Run<'_> {
    /// Rounds tensor by tensor.
    fn write(&self, sink: &mut Sink) -> Result<()> {
        let targets = self.options.targets(self.model.spec())?;
        let tensors = self.model.spec().dense_tensors();
        self.progress.start("quantize", tensors.len() as u64);
        for (index, (name, shape)) in tensors.into_iter().enumerate() {
            self.cancel.check()?;
            match targets.iter().find(|target| shape.len() == 2 && target.module == module_name(&name)) {
                Some(target) => {
                    let (weight, grids) = self.weight(target)?;
                    let group_size = target.settings.checked_group(&target.module, target.shape)?;
                    let matrix = match self.options.rounding {
                        Rounding::KQuant => kquant::quantize(&name, &weight, target.shape, group_size, &grids),
                        _ => grids.quantize(&name, &weight, target.shape, group_size),
                    }?;
                    sink.quantized(target, &weight, &Rounded::Plain(matrix))?;
                }
                None => sink.copied(self.model, &name)?,
            }
            self.progress.update(index as u64 + 1, &name);
        }
        self.progress.finish();
        Ok(())
    }

    /// A weight and the grids in its type.
    pub fn weight(&self, target: &Target) -> Result<(Vec<f32>, MinMax)> {
        let kind = WeightKind::read(self.model.tensors(), None, &target.module, target.shape)?;
        let WeightKind::Dense(weight, dtype) = kind else {
            let what = format!("packed linear `{}`", target.module);
            return Err(Error::unsupported(what, "quantization starts from dense weights"));
        };
        let grids = MinMax::of_weight(target.settings.bits, target.settings.symmetric, dtype);
        Ok((weight, grids))
    }
}

/// `‖a - b‖ / ‖b‖`.
fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    let whole: f64 = b.iter().map(|b| square(*b)).sum();
    if error == 0.0 { 0.0 } else { (error / whole).sqrt() }
}

/// Adds configs and tokenizer to the checkpoint, and puts it in place of an earlier one.
fn assemble(
    model: &dyn ModelHandle,
    options: &UniformOptions,
    staging: &Path,
    output: &Path,
    report: &UniformReport,
) -> Result<()> {
    for file in model::companion_files(model.path())? {
        let target = staging.join(file.file_name().unwrap_or_default());
        if target.ends_with("config.json") {
            let mut config: Map<String, Value> = fsio::read_json(&file)?;
            config.insert("quantization_config".to_owned(), options.config(model.spec())?);
            fsio::write_json(&target, &config, 2)?;
        } else {
            fsio::write(&target, &fsio::read(&file)?)?;
        }
    }
    let target = output.join(MODEL_FOLDER);
    remove_dir(&target)?;
    fsio::rename(staging, &target)?;
    fsio::write_json(output.join(REPORT_FILE), report, 2)?;
    model_config(None).write(output)
}

/// `model_config.json` of a Hugging Face model in `model/`.
pub(super) fn model_config(attributes: Option<Value>) -> ModelConfigFile {
    let config = json!({
        "model_path": MODEL_FOLDER,
        "task": "text-generation-with-past",
        "model_attributes": attributes,
    });
    ModelConfigFile {
        kind: "HfModel".to_owned(),
        config: match config {
            Value::Object(config) => config,
            _ => Map::new(),
        },
    }
}
