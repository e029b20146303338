//! GPTQ, half a layer at a time: the inputs of a half come from what is before it, quantized already.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use olive_core::decoder::{DecoderLayer, RmsNorm, SequenceTables};
use olive_core::{LinearSpec, Result};
use rayon::prelude::*;

use super::options::{Rounding, Target};
use super::run::{Rounded, Run, Sink};
use crate::calibrate::{Half, HiddenStates};
use crate::calibration::CalibrationSet;
use crate::layer::replace_weight;
use crate::quantizer::awq::mapping::LinearInput;
use crate::quantizer::awq::statistics::InputStatistics;
use crate::quantizer::gptq::{self, GptqOptions, Weight};
use crate::quantizer::minmax::MinMax;

/// Writes all tensors of the checkpoint.
///
/// # Errors
/// Those of reading, calibrating, rounding and writing.
pub(super) fn write<B: Backend>(run: &Run<'_>, calibration: &CalibrationSet, sink: &mut Sink) -> Result<()> {
    let (spec, source) = (run.model.spec(), run.model.tensors());
    let device = B::Device::default();
    let mut hidden = HiddenStates::<B>::embed(run.model, calibration, &device, run.cancel)?;
    run.progress.start("quantize", spec.n_layers as u64);
    sink.copied(run.model, spec.embedding_name())?;
    for index in 0..spec.n_layers {
        let mut layer = DecoderLayer::<B>::load(source, spec, index, &device)?;
        for half in [Half::Attention, Half::Mlp] {
            let (_, statistics) = hidden.run(half, &layer)?;
            for (input, statistics) in half.inputs().into_iter().zip(&statistics) {
                let linears = spec.linears(index).into_iter().filter(|own| LinearInput::of(own.role) == input);
                for linear in linears {
                    run.cancel.check()?;
                    write_linear(run, &linear, statistics, &mut layer, sink)?;
                }
            }
            let outputs = outputs(half, &layer, &hidden);
            hidden.add(outputs);
        }
        let prefix = format!("model.layers.{index}.");
        let rest = spec.dense_tensors().into_iter();
        for (name, shape) in rest.filter(|(name, _)| name.starts_with(&prefix)) {
            if shape.len() == 1 {
                sink.copied(run.model, &name)?;
            }
        }
        run.progress.update(index as u64 + 1, "");
    }
    write_head(run, &hidden, sink)?;
    run.progress.finish();
    Ok(())
}

/// Rounds a linear and puts the result in its place in `layer`; copies it if it stays dense.
fn write_linear<B: Backend>(
    run: &Run<'_>,
    linear: &LinearSpec,
    statistics: &InputStatistics,
    layer: &mut DecoderLayer<B>,
    sink: &mut Sink,
) -> Result<()> {
    let Some(target) = run.options.linear(linear)? else {
        return sink.copied(run.model, &format!("{}.weight", linear.name));
    };
    let dense = round(run, &target, statistics, sink)?;
    let device = layer.input_norm.weight.device();
    replace_weight(layer, linear.role, dense, &device);
    Ok(())
}

/// Rounds and writes a module; what it has become.
fn round(run: &Run<'_>, target: &Target, statistics: &InputStatistics, sink: &mut Sink) -> Result<Vec<f32>> {
    let (weight, own) = run.weight(target)?;
    let grids = MinMax::single(own.bits, own.symmetric, own.scale_dtype);
    let (damp_percent, desc_act) = match run.options.rounding {
        Rounding::Gptq { damp_percent, desc_act } => (damp_percent, desc_act),
        _ => (0.01, None),
    };
    let whole_row = target.settings.group_size == -1;
    let options = GptqOptions {
        damp_percent,
        act_order: whole_row && desc_act.unwrap_or(true),
    };
    let name = format!("{}.weight", target.module);
    let weight = Weight {
        name: &name,
        values: &weight,
        shape: target.shape,
        group_size: target.settings.checked_group(&target.module, target.shape)?,
    };
    let rounded = gptq::quantize(weight, statistics.gram(), &grids, options)?;
    let dense = rounded.matrix.dequantize();
    sink.quantized(target, weight.values, &Rounded::Gptq(rounded))?;
    Ok(dense)
}

/// What a half of `layer` adds to the states.
fn outputs<B: Backend>(half: Half, layer: &DecoderLayer<B>, hidden: &HiddenStates<B>) -> Vec<Tensor<B, 3>> {
    let tables = |length: usize| -> &SequenceTables<B> {
        let found = hidden.tables().iter().find(|tables| tables.length == length);
        found.expect("invariant: tables were made for the length of every sequence")
    };
    hidden
        .states()
        .par_iter()
        .map(|x| {
            let [_, length, _] = x.dims();
            match half {
                Half::Attention => layer.attention(layer.input_norm.forward(x.clone()), tables(length)),
                Half::Mlp => layer.mlp(layer.post_attention_norm.forward(x.clone())),
            }
        })
        .collect()
}

/// The final norm and the head, under the states after the norm.
fn write_head<B: Backend>(run: &Run<'_>, hidden: &HiddenStates<B>, sink: &mut Sink) -> Result<()> {
    let (spec, source) = (run.model.spec(), run.model.tensors());
    sink.copied(run.model, spec.final_norm_name())?;
    if spec.tie_word_embeddings {
        return Ok(());
    }
    let Some(target) = run.options.table(spec, spec.lm_head_name())? else {
        return sink.copied(run.model, spec.lm_head_name());
    };
    let device = B::Device::default();
    let norm = RmsNorm::<B>::load(source, spec.final_norm_name(), spec.hidden_size, spec.rms_norm_eps, &device)?;
    let mut statistics = InputStatistics::new(spec.hidden_size);
    for x in hidden.states() {
        let normed = norm.forward(x.clone()).into_data().convert::<f32>().into_vec();
        statistics.add(&normed.expect("invariant: converted to f32"));
    }
    statistics.finish();
    round(run, &target, &statistics, sink)?;
    Ok(())
}
