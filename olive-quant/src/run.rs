//! The run: preflight, layer by layer, then the output folder.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use burn::tensor::backend::Backend;
use olive_core::decoder::{Cpu, DecoderLayer};
use olive_core::kernels::wide;
use olive_core::{CancelToken, Error, LinearRole, ModelHandle, Progress, Result};
use rayon::prelude::*;

use crate::calibrate::HiddenStates;
use crate::calibration::CalibrationSet;
use crate::encode::{self, Encoded};
use crate::layer::LayerWeights;
use crate::options::{Algorithm, QuantizeOptions};
use crate::output::{self, Assembly};
use crate::preflight::{check_output, preflight};
use crate::quantizer::affine::{Affine, Arithmetic};
use crate::quantizer::awq::{Awq, AwqLayer};
use crate::quantizer::rtn;
use crate::report::{ClipReport, LayerReport, LinearReport, QuantizeReport, Totals};
use crate::work::{Manifest, WorkFolder};

/// Quantizes `model` to 4 bits on the CPU and writes `output`: `model/` with an AutoAWQ `gemm` checkpoint and the
/// tokenizer, `model_config.json`, `quantization_report.json`. Round to nearest does not look at `calibration`.
///
/// An interrupted run leaves its finished layers in `output/.olive-quantize`; the same call goes on from there and
/// gives the same bytes. An earlier result in `output` stays until the new one is complete.
///
/// # Errors
/// Those of [`preflight`]; [`Error::Cancelled`]; [`Error::Tensor`] or [`Error::NotFinite`] for a weight that half
/// precision cannot hold, for activations that are not finite, or if scaling changed the function of a layer;
/// [`Error::Io`].
pub fn quantize(
    model: &dyn ModelHandle,
    calibration: &CalibrationSet,
    options: &QuantizeOptions,
    output: &Path,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<QuantizeReport> {
    quantize_on::<Cpu>(model, calibration, options, output, progress, cancel)
}

/// As [`quantize`], with the calibration on another Burn backend's default device.
///
/// # Errors
/// As [`quantize`].
pub fn quantize_on<B: Backend>(
    model: &dyn ModelHandle,
    calibration: &CalibrationSet,
    options: &QuantizeOptions,
    output: &Path,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<QuantizeReport> {
    quantize_with(model, calibration, options, output, progress, cancel, |run| {
        run.layers::<B>(calibration)
    })
}

/// The run around the work on the layers.
pub(crate) fn quantize_with(
    model: &dyn ModelHandle,
    calibration: &CalibrationSet,
    options: &QuantizeOptions,
    output: &Path,
    progress: &dyn Progress,
    cancel: &CancelToken,
    layers: impl FnOnce(&Run<'_>) -> Result<Vec<LayerReport>>,
) -> Result<QuantizeReport> {
    check_output(model.path(), output)?;
    output::check_replaceable(output)?;
    let expected = preflight(model, calibration, options)?;
    tracing::info!("{expected}");
    cancel.check()?;
    let started = Instant::now();
    let manifest = Manifest::new(model, calibration, options)?;
    tracing::debug!("hashing the model took {:?}", started.elapsed());
    let work = WorkFolder::open(output, &manifest)?;
    let run = Run {
        model,
        options,
        work: &work,
        assembly: Mutex::new(Assembly::new(model.spec(), options, &work)?),
        progress,
        cancel,
    };
    let result = layers(&run).and_then(|layers| {
        let awq = options.algorithm == Algorithm::Awq;
        let report = QuantizeReport {
            options: options.clone(),
            calibration_sequences: if awq { calibration.sequences.len() } else { 0 },
            calibration_tokens: if awq { calibration.tokens() } else { 0 },
            totals: Totals::new(&layers, expected.output_bytes),
            expected,
            layers,
        };
        let started = Instant::now();
        let assembly = run.assembly.into_inner();
        let assembly = assembly.unwrap_or_else(PoisonError::into_inner);
        assembly.finish(model, options, &work, output, &report)?;
        tracing::debug!("writing the checkpoint took {:?}", started.elapsed());
        Ok(report)
    });
    match &result {
        // A full disk or an interruption can be mended: what is finished is kept for the next run.
        Ok(_) | Err(Error::Cancelled | Error::Io { .. }) => {}
        Err(_) => work.abandon(),
    }
    result
}

/// A run whose work folder is open.
pub(crate) struct Run<'a> {
    pub model: &'a dyn ModelHandle,
    pub options: &'a QuantizeOptions,
    pub work: &'a WorkFolder,
    /// The checkpoint that is written, which every finished layer is added to.
    pub assembly: Mutex<Assembly>,
    pub progress: &'a dyn Progress,
    pub cancel: &'a CancelToken,
}

impl Run<'_> {
    /// Finishes every layer that is not finished yet.
    fn layers<B: Backend>(&self, calibration: &CalibrationSet) -> Result<Vec<LayerReport>> {
        let spec = self.model.spec();
        let found: Vec<Option<LayerReport>> = (0..spec.n_layers)
            .map(|index| {
                self.work
                    .finished(index, &encode::layer_plan(spec, self.options, index))
            })
            .collect();
        let device = B::Device::default();
        let calibrates = self.options.algorithm == Algorithm::Awq && found.iter().any(Option::is_none);
        let mut hidden = match calibrates {
            true => Some(HiddenStates::<B>::embed(
                self.model,
                calibration,
                &device,
                self.cancel,
            )?),
            false => None,
        };
        let last_open = found.iter().rposition(Option::is_none);
        self.progress.start("quantize", spec.n_layers as u64);
        let mut reports = Vec::with_capacity(spec.n_layers);
        for (index, found) in found.into_iter().enumerate() {
            self.cancel.check()?;
            let note = if found.is_some() {
                "finished by an earlier run"
            } else {
                ""
            };
            let report = match (found, hidden.as_mut()) {
                (Some(report), Some(hidden)) if Some(index) < last_open => {
                    hidden.pass(&DecoderLayer::load(self.model.tensors(), spec, index, &device)?)?;
                    report
                }
                (Some(report), _) => report,
                (None, hidden) => self.layer(index, hidden)?,
            };
            let note = if note.is_empty() {
                summary(&report)
            } else {
                note.to_owned()
            };
            self.progress.update(index as u64 + 1, &note);
            reports.push(report);
        }
        self.progress.finish();
        Ok(reports)
    }

    fn layer<B: Backend>(&self, index: usize, hidden: Option<&mut HiddenStates<B>>) -> Result<LayerReport> {
        let started = Instant::now();
        let (spec, source) = (self.model.spec(), self.model.tensors());
        let weights = LayerWeights::read(source, spec, index, self.options)?;
        let awq = match hidden {
            Some(hidden) => {
                let layer = DecoderLayer::load(source, spec, index, &B::Device::default())?;
                Awq::new(spec, self.options).layer(&layer, weights, hidden)?
            }
            None => AwqLayer {
                weights,
                preservation_error: 0.0,
                mappings: Vec::new(),
                clips: Vec::new(),
            },
        };
        self.finish_layer(index, awq, started)
    }

    /// Rounds, packs and stores a layer.
    pub fn finish_layer(&self, index: usize, awq: AwqLayer, started: Instant) -> Result<LayerReport> {
        let mut tensors = Vec::new();
        let linears = self.round(&awq.weights, &awq.clips, &mut tensors)?;
        self.store_layer(index, awq, (tensors, linears), started)
    }

    /// Stores a layer whose linears are rounded and packed; the other tensors are those of `awq`.
    pub fn store_layer(
        &self,
        index: usize,
        awq: AwqLayer,
        (mut tensors, linears): (Vec<Encoded>, Vec<LinearReport>),
        started: Instant,
    ) -> Result<LayerReport> {
        let spec = self.model.spec();
        tensors.extend(encode::dense_parts(spec, &awq.weights)?);
        let report = LayerReport {
            layer: index,
            seconds: started.elapsed().as_secs_f64(),
            preservation_error: (!awq.mappings.is_empty()).then_some(awq.preservation_error),
            mappings: awq.mappings,
            linears,
        };
        self.work
            .store(&encode::layer_plan(spec, self.options, index), &tensors, &report)?;
        let mut assembly = self.assembly.lock().unwrap_or_else(PoisonError::into_inner);
        assembly.add(index, &tensors)?;
        Ok(report)
    }

    /// Rounds and encodes the linears of a layer.
    fn round(
        &self,
        weights: &LayerWeights,
        clips: &[(LinearRole, ClipReport)],
        tensors: &mut Vec<Encoded>,
    ) -> Result<Vec<LinearReport>> {
        let affine = Affine::new(self.options.bits, Arithmetic::Single);
        let linears = weights.linears.iter().map(|linear| {
            let mut weight_error = 0.0;
            if linear.converts {
                let name = format!("{}.weight", linear.spec.name);
                let group_size = self.options.group_for(linear.spec.in_features);
                let matrix = rtn::quantize(&name, &linear.weight, linear.shape(), group_size, &affine)?;
                weight_error = relative_error(&matrix.dequantize(), &linear.weight);
                tensors.extend(encode::packed(&linear.spec.name, &matrix)?);
            }
            let clip = clips.iter().find(|(role, _)| *role == linear.spec.role);
            Ok(LinearReport {
                name: linear.spec.name.clone(),
                quantized: linear.converts,
                weight_error,
                clip: clip.map(|(_, clip)| *clip),
            })
        });
        linears.collect()
    }
}

/// `‖a - b‖²` and `‖b‖²`.
#[inline(always)]
fn squares(a: &[f32], b: &[f32]) -> [f64; 2] {
    let mut sums = [[0.0f64; 8]; 2];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            let (error, whole) = (f64::from(a - b), f64::from(*b));
            sums[0][i] += error * error;
            sums[1][i] += whole * whole;
        }
    }
    sums.map(|lanes| lanes.iter().sum::<f64>())
}

/// `‖a - b‖ / ‖b‖`.
pub(crate) fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    const TASK: usize = 1 << 16;
    let pairs = a.par_chunks(TASK).zip(b.par_chunks(TASK));
    let parts: Vec<[f64; 2]> = pairs.map(|(a, b)| wide(squares, (a, b))).collect();
    // Summed in order, whoever computed them.
    let [error, whole] = parts
        .iter()
        .fold([0.0; 2], |[e, w], part| [e + part[0], w + part[1]]);
    if error == 0.0 { 0.0 } else { (error / whole).sqrt() }
}

pub(crate) fn summary(report: &LayerReport) -> String {
    let losses = report.mappings.iter().map(|mapping| {
        let ratio = mapping
            .ratio
            .map_or_else(|| "identity".to_owned(), |ratio| format!("{ratio:.2}"));
        format!(
            "{}: {:.2e} of {:.2e} ({ratio})",
            mapping.name, mapping.loss, mapping.loss_rtn
        )
    });
    losses.collect::<Vec<_>>().join(", ")
}
