//! GPTQ, half a layer at a time: the inputs of a half come from what is before it, quantized already. Within a half the
//! last linear (o, down) sees the others as they were, as all linears of a layer do in Olive.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use olive_core::decoder::{DecoderLayer, RmsNorm, SequenceTables};
use olive_core::packed::olive;
use olive_core::{LinearSpec, Result};
use rayon::prelude::*;

use super::layout::{Part, Target};
use super::options::Rounding;
use super::run::{Packed, Run};
use crate::calibrate::{Half, HiddenStates};
use crate::calibration::CalibrationSet;
use crate::layer::replace_weight;
use crate::quantizer::awq::mapping::LinearInput;
use crate::quantizer::awq::statistics::InputStatistics;
use crate::quantizer::gptq::{self, GptqOptions, Weight};
use crate::quantizer::minmax::MinMax;

/// The calibration on its way through the model, whatever computes it.
pub(crate) trait Calibration {
    /// Goes through a part that is finished, or has nothing to round.
    fn pass(&mut self, part: &Part) -> Result<()>;

    /// Rounds a part; `wanted` says whether anything after it looks at the states.
    fn round(&mut self, part: &Part, wanted: bool) -> Result<Vec<Packed>>;
}

/// That of a Burn backend.
pub(super) struct Calibrated<'a, B: Backend> {
    run: &'a Run<'a>,
    hidden: HiddenStates<B>,
    device: B::Device,
}

impl<'a, B: Backend> Calibrated<'a, B> {
    /// Before the first layer.
    pub fn new(run: &'a Run<'a>, calibration: &CalibrationSet) -> Result<Self> {
        let device = B::Device::default();
        Ok(Self {
            run,
            hidden: HiddenStates::embed(run.model, calibration, &device, run.cancel)?,
            device,
        })
    }

    fn load(&self, index: usize) -> Result<DecoderLayer<B>> {
        let model = self.run.model;
        DecoderLayer::load(model.tensors(), model.spec(), index, &self.device)
    }

    /// Adds to the states what a half of `layer` makes of them.
    fn advance(&mut self, half: Half, layer: &DecoderLayer<B>) {
        let tables = |length: usize| -> &SequenceTables<B> {
            let found = self.hidden.tables().iter().find(|own| own.length == length);
            found.expect("invariant: tables were made for the length of every sequence")
        };
        let outputs: Vec<Tensor<B, 3>> = self
            .hidden
            .states()
            .par_iter()
            .map(|x| {
                let [_, length, _] = x.dims();
                match half {
                    Half::Attention => layer.attention(layer.input_norm.forward(x.clone()), tables(length)),
                    Half::Mlp => layer.mlp(layer.post_attention_norm.forward(x.clone())),
                }
            })
            .collect();
        self.hidden.add(outputs);
    }

    /// Rounds the head, which reads the states after the final norm.
    fn head(&self, target: &Target) -> Result<Packed> {
        let (spec, source) = (self.run.model.spec(), self.run.model.tensors());
        let name = spec.final_norm_name();
        let norm = RmsNorm::<B>::load(source, name, spec.hidden_size, spec.rms_norm_eps, &self.device)?;
        let mut statistics = InputStatistics::new(spec.hidden_size);
        for x in self.hidden.states() {
            self.run.cancel.check()?;
            let normed = norm.forward(x.clone()).into_data().convert::<f32>().into_vec();
            statistics.add(&normed.expect("invariant: converted to f32"));
        }
        statistics.finish();
        Ok(self.run.gptq(target, statistics.gram())?.0)
    }
}

impl<B: Backend> Calibration for Calibrated<'_, B> {
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
                replace_weight(&mut layer, linear.role, matrix.dequantize(), &self.device);
            }
        }
        for half in [Half::Attention, Half::Mlp] {
            self.run.cancel.check()?;
            self.advance(half, &layer);
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
                let (_, statistics) = self.hidden.run(half, &layer)?;
                for (input, statistics) in inputs.into_iter().zip(&statistics) {
                    for (linear, target) in targets(input) {
                        let (own, dense) = self.run.gptq(target, statistics.gram())?;
                        replace_weight(&mut layer, linear.role, dense, &self.device);
                        packed.push(own);
                    }
                }
            }
            if wanted || half == Half::Attention {
                self.advance(half, &layer);
            }
        }
        // In the order of the checkpoint.
        let place = |own: &Packed| part.targets.iter().position(|target| target.module == own.name());
        packed.sort_by_key(place);
        Ok(packed)
    }
}

impl Run<'_> {
    /// Rounds a module by GPTQ for an input with this Gram matrix; also what has become of its weight.
    pub fn gptq(&self, target: &Target, gram: &[f32]) -> Result<(Packed, Vec<f32>)> {
        self.cancel.check()?;
        let values = self.weight(target)?;
        let settings = target.settings;
        let grids = MinMax::single(settings.bits, settings.symmetric, target.dtype);
        let (damp_percent, desc_act) = match self.rounding {
            Rounding::Gptq {
                damp_percent,
                desc_act,
            } => (damp_percent, desc_act),
            Rounding::Nearest | Rounding::KQuant => (0.0, None),
        };
        let options = GptqOptions {
            damp_percent,
            act_order: settings.group_size == -1 && desc_act.unwrap_or(true),
        };
        let weight = Weight {
            name: &target.weight,
            values: &values,
            shape: target.shape,
            group_size: settings.checked_group(&target.module, target.shape)?,
        };
        let rounded = gptq::quantize(weight, gram, &grids, options)?;
        let dense = rounded.matrix.dequantize();
        let packed = Packed::new(target, &values, &dense, &rounded)?;
        Ok((packed, dense))
    }
}
