//! GPTQ with its calibration on the device: forward in bfloat16, Gram matrices in single precision. The sweep over a
//! weight's columns is the CPU's, so that of equal Gram matrices the results are equal.

use std::path::Path;

use olive_core::cuda::{DeviceLayer, DeviceWeight, Element, Gpu, Matrix, check_model};
use olive_core::packed::olive;
use olive_core::{CancelToken, LinearSpec, ModelHandle, Progress, Result};

use super::run::{Chunk, embed, half_output, norm, plain};
use super::statistics::DeviceStatistics;
use crate::calibrate::Half;
use crate::calibration::CalibrationSet;
use crate::olive_layout::UniformOptions;
use crate::olive_layout::calibrated::Calibration;
use crate::olive_layout::layout::{Part, Target};
use crate::olive_layout::run::{Packed, Run, UniformReport, quantize_uniform, quantize_uniform_with};
use crate::quantizer::awq::mapping::LinearInput;

/// As [`quantize_uniform()`], with GPTQ's calibration on the GPU; weights are read as bfloat16. What does not calibrate is
/// done on the CPU.
///
/// # Errors
/// As [`quantize_uniform()`]; [`Error::Unsupported`](olive_core::Error::Unsupported) where there is no GPU, driver or CUDA
/// toolkit, or for a model that the GPU path does not run.
pub fn quantize_uniform_on_gpu(
    model: &dyn ModelHandle,
    calibration: &CalibrationSet,
    options: &UniformOptions,
    output: &Path,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<UniformReport> {
    if !options.rounding.calibrates() {
        return quantize_uniform(model, calibration, options, output, progress, cancel);
    }
    let gpu = &Gpu::open()?;
    check_model(model.spec())?;
    quantize_uniform_with(model, calibration, options, output, progress, cancel, |run| {
        Ok(Box::new(DeviceCalibrated {
            gpu: gpu.clone(),
            chunks: embed(gpu, model, calibration)?,
            scratch: gpu.empty(1, 8, Element::Bf16),
            run,
        }))
    })
}

/// The calibration on its way through the model, on the device.
struct DeviceCalibrated<'a> {
    run: &'a Run<'a>,
    gpu: Gpu,
    chunks: Vec<Chunk>,
    scratch: Matrix,
}

impl DeviceCalibrated<'_> {
    fn load(&self, index: usize) -> Result<DeviceLayer> {
        let model = self.run.model;
        let mut layer = DeviceLayer::load(&self.gpu, model.tensors(), model.spec(), index)?;
        // What is packed already is multiplied as it is.
        for linear in &mut layer.linears {
            if linear.scratch_len() > 0 {
                let [rows, cols] = linear.shape;
                let room = self.gpu.empty(rows, cols, Element::Bf16);
                linear.weight = DeviceWeight::Dense(linear.weight.dense(&self.gpu, &room));
            }
        }
        Ok(layer)
    }

    /// Puts what became of a weight into the layer.
    fn replace(&self, layer: &mut DeviceLayer, linear: &LinearSpec, values: &[f32]) {
        if let Some(own) = layer.linear_mut(linear.role) {
            let [rows, cols] = own.shape;
            own.weight = DeviceWeight::Dense(self.gpu.upload_bf16(values, rows, cols));
        }
    }

    /// Runs a half on all tokens: the statistics of its linears' inputs, or the next states.
    fn half(
        &mut self,
        half: Half,
        layer: &DeviceLayer,
        advances: bool,
    ) -> Result<Option<[DeviceStatistics; 2]>> {
        let gpu = &self.gpu;
        let mut statistics: Option<[DeviceStatistics; 2]> = None;
        for chunk in &mut self.chunks {
            self.run.cancel.check()?;
            let normed = norm(gpu, half, layer, &chunk.hidden);
            let (last_input, output) =
                half_output(gpu, half, layer, &normed, &plain(&chunk.batch, &self.scratch));
            if advances {
                gpu.add(&chunk.hidden, &output);
                continue;
            }
            let [first, last] = statistics.get_or_insert_with(|| {
                [normed.cols, last_input.cols].map(|channels| DeviceStatistics::new(gpu, channels))
            });
            first.add(gpu, &normed);
            last.add(gpu, &last_input);
        }
        Ok(statistics)
    }

    /// Rounds the head, which reads the states after the final norm.
    fn head(&self, target: &Target) -> Result<Packed> {
        let (spec, source) = (self.run.model.spec(), self.run.model.tensors());
        let weight = source.read_f32_checked(spec.final_norm_name(), &[spec.hidden_size])?;
        let weight = self.gpu.upload_f32(&weight, 1, weight.len());
        let mut statistics = DeviceStatistics::new(&self.gpu, spec.hidden_size);
        for chunk in &self.chunks {
            self.run.cancel.check()?;
            let normed = self.gpu.rms_norm(&chunk.hidden, &weight, spec.rms_norm_eps);
            statistics.add(&self.gpu, &normed);
        }
        let gram = statistics.finite_gram(&self.gpu, &target.module)?;
        Ok(self.run.gptq(target, &gram)?.0)
    }
}

impl Calibration for DeviceCalibrated<'_> {
    fn pass(&mut self, part: &Part) -> Result<()> {
        let Some(index) = part.layer else {
            return Ok(());
        };
        let mut layer = self.load(index)?;
        let finished = match part.targets.is_empty() {
            true => None,
            false => Some(self.run.draft.reader()?),
        };
        for linear in self.run.model.spec().linears(index) {
            let target = part.targets.iter().find(|target| target.module == linear.name);
            if let (Some(target), Some(finished)) = (target, &finished) {
                let matrix = olive::read(finished, &target.module, target.shape, target.settings)?;
                self.replace(&mut layer, &linear, &matrix.dequantize());
            }
        }
        for half in [Half::Attention, Half::Mlp] {
            self.half(half, &layer, true)?;
        }
        Ok(())
    }

    fn round(&mut self, part: &Part, wanted: bool) -> Result<Vec<Packed>> {
        let Some(index) = part.layer else {
            return part.targets.iter().map(|target| self.head(target)).collect();
        };
        let mut layer = self.load(index)?;
        let linears = self.run.model.spec().linears(index);
        let mut packed = Vec::new();
        for half in [Half::Attention, Half::Mlp] {
            let targets = |input: LinearInput| -> Vec<(&LinearSpec, &Target)> {
                let own = linears.iter().filter(|own| LinearInput::of(own.role) == input);
                own.filter_map(|linear| {
                    let target = part.targets.iter().find(|target| target.module == linear.name);
                    target.map(|target| (linear, target))
                })
                .collect()
            };
            let inputs = half.inputs();
            if inputs.iter().any(|input| !targets(*input).is_empty()) {
                let statistics = self.half(half, &layer, false)?;
                for (input, statistics) in inputs.into_iter().zip(statistics.into_iter().flatten()) {
                    let targets = targets(input);
                    let Some((_, first)) = targets.first() else {
                        continue;
                    };
                    let gram = statistics.finite_gram(&self.gpu, &first.module)?;
                    for (linear, target) in targets {
                        let (own, dense) = self.run.gptq(target, &gram)?;
                        self.replace(&mut layer, linear, &dense);
                        packed.push(own);
                    }
                }
            }
            if wanted || half == Half::Attention {
                self.half(half, &layer, true)?;
            }
        }
        // In the order of the checkpoint.
        let place = |own: &Packed| part.targets.iter().position(|target| target.module == own.name());
        packed.sort_by_key(place);
        Ok(packed)
    }
}
