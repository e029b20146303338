//! The run: checks, then part by part, then the output folder.

use std::path::Path;

use burn::tensor::backend::Backend;
use olive_core::decoder::Cpu;
use olive_core::packed::olive;
use olive_core::{CancelToken, Error, ModelHandle, Progress, Result, fsio, model};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::calibrated::{Calibrated, Calibration};
use super::draft::Draft;
use super::layout::{Entry, Layout, Part, Target};
use super::options::{Rounding, UniformOptions};
use crate::calibration::CalibrationSet;
use crate::encode::Encoded;
use crate::output::{check_replaceable, place};
use crate::preflight::{check_finite, check_output};
use crate::quantizer::gptq::GptqWeight;
use crate::run::relative_error;
use crate::work::Manifest;

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

impl UniformLinear {
    pub(super) fn new(target: &Target, group_size: usize) -> Self {
        Self {
            name: target.module.clone(),
            bits: target.settings.bits,
            group_size,
            symmetric: target.settings.symmetric,
            weight_error: 0.0,
            loss: None,
            loss_rtn: None,
            damp_percent: None,
        }
    }
}

/// Quantizes `model` on the CPU and writes `output`: `model/` in Olive's layout with configs and tokenizer,
/// `model_config.json`, `quantization_report.json`. Only GPTQ looks at `calibration`.
///
/// An interrupted run leaves what is finished in `output/.olive-quantize`; the same call goes on from there and gives
/// the same bytes. An earlier result in `output` stays until the new one is complete.
///
/// # Errors
/// Those of [`Layout::new`]; [`Error::Config`] for the output folder; [`Error::Tensor`] or [`Error::NotFinite`] naming
/// a tensor; [`Error::Cancelled`]; [`Error::Io`].
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
    quantize_uniform_with(model, calibration, options, output, progress, cancel, |run| {
        Ok(Box::new(Calibrated::<B>::new(run, calibration)?))
    })
}

/// The run around a calibration, which `start` puts before the first layer.
pub(crate) fn quantize_uniform_with(
    model: &dyn ModelHandle,
    calibration: &CalibrationSet,
    options: &UniformOptions,
    output: &Path,
    progress: &dyn Progress,
    cancel: &CancelToken,
    start: impl for<'r> Fn(&'r Run<'r>) -> Result<Box<dyn Calibration + 'r>>,
) -> Result<UniformReport> {
    check_output(model.path(), output)?;
    check_replaceable(output)?;
    let layout = Layout::new(model, options)?;
    let calibrates = options.rounding.calibrates();
    if calibrates {
        calibration.check(model.spec())?;
        // Without calibration, weights are looked at as they are rounded.
        let floats = layout.entries.iter().filter_map(|entry| match entry {
            Entry::Copied { from, info, .. } => info.dtype.is_float().then_some(from.as_str()),
            Entry::Rounded(target) => Some(target.weight.as_str()),
        });
        check_finite(model.tensors(), floats)?;
    }
    cancel.check()?;
    let request = json!({"rounding": options.rounding, "config": layout.config, "plan": names(&layout)});
    let manifest = || Manifest::of(model, &request, calibrates.then_some(calibration));
    let draft = Draft::open(output, &layout, &manifest)?;
    let run = Run {
        model,
        rounding: options.rounding,
        draft: &draft,
        progress,
        cancel,
    };
    let result = run.copy(&layout).and_then(|()| run.parts(&layout, start));
    let linears = match result {
        Ok(linears) => linears,
        Err(error) => return Err(leave(draft, error)),
    };
    let report = UniformReport {
        rounding: options.rounding,
        calibration_tokens: if calibrates { calibration.tokens() } else { 0 },
        linears,
        output_bytes: layout.plan().byte_len(),
    };
    assemble(model, &layout, draft, output, &report)?;
    Ok(report)
}

/// What becomes of the unfinished result after an error.
fn leave(draft: Draft<'_>, error: Error) -> Error {
    match error {
        // A full disk or an interruption can be mended: what is finished is kept for the next run.
        Error::Cancelled | Error::Io { .. } => {
            if let Err(other) = draft.flush() {
                tracing::warn!("finished parts could not be kept: {other}");
            }
        }
        _ => draft.abandon(),
    }
    error
}

fn names(layout: &Layout) -> Vec<String> {
    layout.plan().tensors.into_iter().map(|(name, _)| name).collect()
}

/// A module rounded by GPTQ: its tensors and what the report says of it.
pub(crate) struct Packed {
    tensors: Vec<Encoded>,
    report: UniformLinear,
}

impl Packed {
    /// The module's name.
    pub fn name(&self) -> &str {
        &self.report.name
    }

    /// `dense` is what became of `weight`.
    pub fn new(target: &Target, weight: &[f32], dense: &[f32], rounded: &GptqWeight) -> Result<Self> {
        let stored = olive::store(&target.module, &rounded.matrix)?.into_iter();
        Ok(Self {
            tensors: stored.map(|(name, _, _, bytes)| (name, bytes)).collect(),
            report: UniformLinear {
                weight_error: relative_error(dense, weight),
                loss: Some(rounded.loss),
                loss_rtn: Some(rounded.loss_rtn),
                damp_percent: Some(rounded.damp_percent),
                ..UniformLinear::new(target, rounded.matrix.group_size)
            },
        })
    }
}

/// A run whose work folder is open.
pub(crate) struct Run<'a> {
    pub model: &'a dyn ModelHandle,
    pub rounding: Rounding,
    pub draft: &'a Draft<'a>,
    pub progress: &'a dyn Progress,
    pub cancel: &'a CancelToken,
}

impl Run<'_> {
    /// Finishes every part that is not finished yet.
    fn parts(
        &self,
        layout: &Layout,
        start: impl for<'r> Fn(&'r Run<'r>) -> Result<Box<dyn Calibration + 'r>>,
    ) -> Result<Vec<UniformLinear>> {
        let parts = &layout.parts;
        let found = parts.iter().map(|part| self.draft.finished(part));
        let found = found.collect::<Result<Vec<_>>>()?;
        let last_open = found.iter().rposition(Option::is_none);
        let mut calibrated = match last_open.filter(|_| self.rounding.calibrates()) {
            Some(_) => Some(start(self)?),
            None => None,
        };
        self.progress.start("quantize", parts.len() as u64);
        let mut linears = Vec::new();
        for (index, (part, found)) in parts.iter().zip(found).enumerate() {
            self.cancel.check()?;
            let wanted = Some(index) < last_open;
            let reports = match (found, &mut calibrated) {
                (Some(reports), Some(calibrated)) if wanted => {
                    calibrated.pass(part)?;
                    reports
                }
                (Some(reports), _) => reports,
                (None, Some(calibrated)) => {
                    let packed = calibrated.round(part, wanted)?;
                    self.finish(part, self.store(packed)?)?
                }
                (None, None) => {
                    let targets = part.targets.iter();
                    let reports = targets.map(|target| self.round(target)).collect::<Result<_>>()?;
                    self.finish(part, reports)?
                }
            };
            self.progress.update(index as u64 + 1, &summary(part, &reports));
            linears.extend(reports);
        }
        self.progress.finish();
        Ok(linears)
    }

    fn store(&self, packed: Vec<Packed>) -> Result<Vec<UniformLinear>> {
        let mut reports = Vec::new();
        for own in packed {
            for (name, bytes) in &own.tensors {
                self.draft.writer().write_at(name, 0, bytes)?;
            }
            reports.push(own.report);
        }
        Ok(reports)
    }

    fn finish(&self, part: &Part, reports: Vec<UniformLinear>) -> Result<Vec<UniformLinear>> {
        self.draft.finish_part(part, &reports)?;
        Ok(reports)
    }

    /// The weight of a module.
    pub fn weight(&self, target: &Target) -> Result<Vec<f32>> {
        self.model
            .tensors()
            .read_f32_checked(&target.weight, &target.shape)
    }
}

fn summary(part: &Part, reports: &[UniformLinear]) -> String {
    let loss = |value: fn(&UniformLinear) -> Option<f64>| reports.iter().filter_map(value).sum::<f64>();
    match reports.iter().any(|own| own.loss.is_some()) {
        true => format!(
            "{}: {:.3e} of {:.3e}",
            part.name,
            loss(|own| own.loss),
            loss(|own| own.loss_rtn)
        ),
        false => part.name.clone(),
    }
}

/// Completes the folder and puts it in place of an earlier one.
fn assemble(
    model: &dyn ModelHandle,
    layout: &Layout,
    draft: Draft<'_>,
    output: &Path,
    report: &UniformReport,
) -> Result<()> {
    let work = draft.finish()?;
    let staging = work.path("result");
    for file in model::companion_files(model.path())? {
        let target = staging.join(file.file_name().unwrap_or_default());
        if target.ends_with("config.json") {
            let mut config: Map<String, Value> = fsio::read_json(&file)?;
            config.insert("quantization_config".to_owned(), layout.config.clone());
            if layout.unties {
                config.insert("tie_word_embeddings".to_owned(), false.into());
            }
            fsio::write_json(&target, &config, 2)?;
        } else {
            fsio::write(&target, &fsio::read(&file)?)?;
        }
    }
    place(&work, &staging, output, report, model_attributes(model)?)
}

/// What passes before have written down about the model.
///
/// # Errors
/// [`Error::Io`] or [`Error::Json`] if its `model_config.json` cannot be read.
pub(super) fn model_attributes(model: &dyn ModelHandle) -> Result<Option<Value>> {
    let Some(folder) = model.path().parent() else {
        return Ok(None);
    };
    let Some(config) = model::ModelConfigFile::read(folder)? else {
        return Ok(None);
    };
    let own = config.path(folder, "model_path").as_deref() == Some(model.path());
    let attributes = config.config.get("model_attributes").filter(|own| !own.is_null());
    Ok(attributes.filter(|_| own).cloned())
}
