//! The run: checks, then part by part, then the output folder.

use std::path::Path;

use burn::tensor::backend::Backend;
use olive_core::decoder::Cpu;
use olive_core::packed::olive;
use olive_core::{
    CancelToken, CheckpointWriter, Error, ModelHandle, Progress, QuantMatrix, Result, fsio, model,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::calibrated::Calibrated;
use super::layout::{Entry, Layout, Part, Target};
use super::options::{Rounding, UniformOptions};
use crate::calibration::CalibrationSet;
use crate::encode::Encoded;
use crate::output::{check_replaceable, place};
use crate::preflight::{check_finite, check_output};
use crate::quantizer::gptq::GptqWeight;
use crate::quantizer::kquant;
use crate::quantizer::minmax::MinMax;
use crate::run::relative_error;
use crate::work::{Manifest, WorkFolder, remove_dir};

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
/// An interrupted run leaves its finished layers in `output/.olive-quantize`; the same call goes on from there and
/// gives the same bytes. An earlier result in `output` stays until the new one is complete.
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
    check_output(model.path(), output)?;
    check_replaceable(output)?;
    let layout = Layout::new(model, options)?;
    let calibrates = options.rounding.calibrates();
    if calibrates {
        calibration.check(model.spec())?;
    }
    let floats = layout.entries.iter().filter_map(|entry| match entry {
        Entry::Copied { from, info, .. } => info.dtype.is_float().then_some(from.as_str()),
        Entry::Rounded(target) => Some(target.weight.as_str()),
    });
    check_finite(model.tensors(), floats)?;
    cancel.check()?;
    let request = json!({"rounding": options.rounding, "config": layout.config, "plan": names(&layout)});
    let manifest = Manifest::of(model, &request, calibrates.then_some(calibration))?;
    let work = WorkFolder::open(output, &manifest)?;
    let run = Run {
        model,
        rounding: options.rounding,
        work: &work,
        progress,
        cancel,
    };
    let result = run.parts::<B>(&layout, calibration).and_then(|linears| {
        let report = UniformReport {
            rounding: options.rounding,
            calibration_tokens: if calibrates { calibration.tokens() } else { 0 },
            linears,
            output_bytes: layout.plan().byte_len(),
        };
        assemble(model, &layout, &work, output, &report)?;
        Ok(report)
    });
    match &result {
        // A full disk or an interruption can be mended: what is finished is kept for the next run.
        Ok(_) | Err(Error::Cancelled | Error::Io { .. }) => {}
        Err(_) => work.abandon(),
    }
    result
}

fn names(layout: &Layout) -> Vec<String> {
    layout.plan().tensors.into_iter().map(|(name, _)| name).collect()
}

/// A rounded weight.
pub(super) enum Rounded {
    /// Without calibration.
    Plain(QuantMatrix),
    /// With it.
    Gptq(GptqWeight),
}

/// A rounded module: its tensors and what the report says of it.
pub(super) struct Packed {
    tensors: Vec<Encoded>,
    report: UniformLinear,
}

impl Packed {
    /// The module's name.
    pub fn name(&self) -> &str {
        &self.report.name
    }

    /// `dense` is what became of `weight`.
    pub fn new(target: &Target, weight: &[f32], dense: &[f32], rounded: &Rounded) -> Result<Self> {
        let (matrix, gptq) = match rounded {
            Rounded::Plain(matrix) => (matrix, None),
            Rounded::Gptq(gptq) => (&gptq.matrix, Some(gptq)),
        };
        let stored = olive::store(&target.module, matrix)?.into_iter();
        Ok(Self {
            tensors: stored.map(|(name, _, _, bytes)| (name, bytes)).collect(),
            report: UniformLinear {
                name: target.module.clone(),
                bits: matrix.bits,
                group_size: matrix.group_size,
                symmetric: matrix.zeros.is_none(),
                weight_error: relative_error(dense, weight),
                loss: gptq.map(|gptq| gptq.loss),
                loss_rtn: gptq.map(|gptq| gptq.loss_rtn),
                damp_percent: gptq.map(|gptq| gptq.damp_percent),
            },
        })
    }
}

pub(super) struct Run<'a> {
    pub model: &'a dyn ModelHandle,
    pub rounding: Rounding,
    pub work: &'a WorkFolder,
    pub progress: &'a dyn Progress,
    pub cancel: &'a CancelToken,
}

impl Run<'_> {
    /// Finishes every part that is not finished yet.
    fn parts<B: Backend>(&self, layout: &Layout, calibration: &CalibrationSet) -> Result<Vec<UniformLinear>> {
        let parts = &layout.parts;
        let mut found: Vec<Option<Vec<UniformLinear>>> = Vec::with_capacity(parts.len());
        for part in parts {
            found.push(match part.targets.is_empty() {
                true => Some(Vec::new()),
                false => self.work.finished_part(&part.name, &part.plan()),
            });
        }
        let last_open = found.iter().rposition(Option::is_none);
        let mut calibrated = match last_open.filter(|_| self.rounding.calibrates()) {
            Some(_) => Some(Calibrated::<B>::new(self, calibration)?),
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
                (None, Some(calibrated)) => self.store(part, calibrated.round(part, wanted)?)?,
                (None, None) => {
                    let packed = part.targets.iter().map(|target| self.round(target));
                    self.store(part, packed.collect::<Result<_>>()?)?
                }
            };
            self.progress.update(index as u64 + 1, &summary(part, &reports));
            linears.extend(reports);
        }
        self.progress.finish();
        Ok(linears)
    }

    fn store(&self, part: &Part, packed: Vec<Packed>) -> Result<Vec<UniformLinear>> {
        let (mut tensors, mut reports) = (Vec::new(), Vec::new());
        for own in packed {
            tensors.extend(own.tensors);
            reports.push(own.report);
        }
        self.work
            .store_part(&part.name, &part.plan(), &tensors, &reports)?;
        Ok(reports)
    }

    /// Rounds a weight by itself.
    fn round(&self, target: &Target) -> Result<Packed> {
        self.cancel.check()?;
        let weight = self.weight(target)?;
        let group_size = target.settings.checked_group(&target.module, target.shape)?;
        let grids = MinMax::of_weight(target.settings.bits, target.settings.symmetric, target.dtype);
        let matrix = match self.rounding {
            Rounding::KQuant => kquant::quantize(&target.weight, &weight, target.shape, group_size, &grids),
            _ => grids.quantize(&target.weight, &weight, target.shape, group_size),
        }?;
        let dense = matrix.dequantize();
        Packed::new(target, &weight, &dense, &Rounded::Plain(matrix))
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

/// Builds the folder from finished parts and puts it in place of an earlier one.
fn assemble(
    model: &dyn ModelHandle,
    layout: &Layout,
    work: &WorkFolder,
    output: &Path,
    report: &UniformReport,
) -> Result<()> {
    let staging = work.path("result");
    remove_dir(&staging)?;
    let mut writer = CheckpointWriter::create(&staging, &layout.plan())?;
    for entry in &layout.entries {
        match entry {
            Entry::Copied { from, to, .. } => writer.write(to, &model.tensors().bytes(from)?)?,
            Entry::Rounded(target) => {
                let holds = |part: &&Part| part.targets.contains(target);
                let part = layout.parts.iter().find(holds);
                let part = part.expect("invariant: every target belongs to a part");
                let checkpoint = work.part(&part.name)?;
                for (name, _, _) in target.plan() {
                    writer.write(&name, &olive_core::TensorSource::bytes(&checkpoint, &name)?)?;
                }
            }
        }
    }
    writer.finish()?;
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
    place(work, &staging, output, report, model_attributes(model)?)
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
