//! Running calibration tokens through a model a half layer at a time, in Burn, generic over the backend.
//!
//! Every half sees the activations of the unquantized model. Of the tokens, the hidden states are kept, and for the
//! half that is being worked on its normalised input and its output; of the model, one layer.

mod on_host;

use std::sync::OnceLock;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use olive_core::decoder::{DecoderLayer, Embedding, SequenceTables};
use olive_core::{CancelToken, Error, LinearRole, ModelHandle, Result};
use rayon::prelude::*;

use crate::calibration::CalibrationSet;
use crate::layer::replace_weight;
use crate::quantizer::awq::mapping::LinearInput;
use crate::quantizer::awq::search::BlockProbe;
use crate::quantizer::awq::statistics::InputStatistics;

/// Sequences that are run side by side.
const SIDE_BY_SIDE: usize = 4;

/// A half of a decoder layer: norm, then attention or MLP, then the residual.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// The first.
    Attention,
    /// The second.
    Mlp,
}

impl Half {
    /// The inputs of its linears, first and last.
    pub fn inputs(self) -> [LinearInput; 2] {
        match self {
            Self::Attention => [LinearInput::Attention, LinearInput::Output],
            Self::Mlp => [LinearInput::Mlp, LinearInput::Down],
        }
    }
}

/// The residual stream of all calibration tokens.
pub struct HiddenStates<B: Backend> {
    states: Vec<Tensor<B, 3>>,
    tables: Vec<SequenceTables<B>>,
    cancel: CancelToken,
}

/// A half layer with its input and output on all tokens.
pub struct HalfRun<'a, B: Backend> {
    half: Half,
    layer: &'a DecoderLayer<B>,
    tables: &'a [SequenceTables<B>],
    normed: Vec<Tensor<B, 3>>,
    outputs: Vec<Tensor<B, 3>>,
    /// What is computed first, once the first candidate has told.
    tasks: OnceLock<Vec<on_host::Task>>,
    cancel: &'a CancelToken,
}

fn table<B: Backend>(tables: &[SequenceTables<B>], length: usize) -> &SequenceTables<B> {
    let found = tables.iter().find(|tables| tables.length == length);
    found.expect("invariant: tables were made for the length of every sequence")
}

/// `[batch, seq, features]` as rows on the host.
fn to_host<B: Backend>(x: Tensor<B, 3>) -> Vec<f32> {
    let values = x.into_data().convert::<f32>().into_vec();
    values.expect("invariant: converted to f32")
}

impl<B: Backend> HiddenStates<B> {
    /// The embeddings of the calibration tokens.
    ///
    /// # Errors
    /// Those of reading the embedding; [`Error::Tensor`] for ids outside the vocabulary.
    pub fn embed(
        model: &dyn ModelHandle,
        calibration: &CalibrationSet,
        device: &B::Device,
        cancel: &CancelToken,
    ) -> Result<Self> {
        let embedding = Embedding::<B>::load(model.tensors(), model.spec(), device)?;
        let states = calibration
            .sequences
            .iter()
            .map(|sequence| embedding.forward(std::slice::from_ref(sequence)))
            .collect::<Result<_>>()?;
        let mut lengths: Vec<usize> = calibration.sequences.iter().map(Vec::len).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let tables = lengths
            .into_iter()
            .map(|length| SequenceTables::new(model.spec(), length, device));
        Ok(Self {
            states,
            tables: tables.collect(),
            cancel: cancel.clone(),
        })
    }

    /// Rotary tables and masks of every length.
    pub fn tables(&self) -> &[SequenceTables<B>] {
        &self.tables
    }

    /// The states before the layer, one tensor `[1, seq, hidden]` a sequence.
    pub fn states(&self) -> &[Tensor<B, 3>] {
        &self.states
    }

    /// Runs a whole layer without looking at it.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub fn pass(&mut self, layer: &DecoderLayer<B>) -> Result<()> {
        self.cancel.check()?;
        let tables = &self.tables;
        self.states.par_iter_mut().for_each(|x| {
            let [_, length, _] = x.dims();
            *x = layer.forward(x.clone(), table(tables, length));
        });
        Ok(())
    }

    /// Runs a half layer and gathers the statistics of the inputs of its linears, first and last. The states are
    /// left as they were.
    ///
    /// # Errors
    /// [`Error::Cancelled`]; [`Error::NotFinite`] if the output is not finite.
    pub fn run<'a>(
        &'a self,
        half: Half,
        layer: &'a DecoderLayer<B>,
    ) -> Result<(HalfRun<'a, B>, [InputStatistics; 2])> {
        let mut run = HalfRun {
            half,
            layer,
            tables: &self.tables,
            normed: Vec::with_capacity(self.states.len()),
            outputs: Vec::with_capacity(self.states.len()),
            tasks: OnceLock::new(),
            cancel: &self.cancel,
        };
        let mut statistics: Option<[InputStatistics; 2]> = None;
        for states in self.states.chunks(SIDE_BY_SIDE) {
            self.cancel.check()?;
            let observed: Vec<Observed<B>> = states
                .par_iter()
                .map(|x| observe(half, layer, x.clone(), &self.tables))
                .collect();
            for Observed {
                normed,
                last_input,
                output,
            } in observed
            {
                let width = |x: &Tensor<B, 3>| x.dims()[2];
                let [first, last] = statistics.get_or_insert_with(|| {
                    [
                        InputStatistics::new(width(&normed)),
                        InputStatistics::new(width(&last_input)),
                    ]
                });
                first.add(&to_host(normed.clone()));
                last.add(&to_host(last_input));
                run.normed.push(normed);
                run.outputs.push(output);
            }
        }
        let mut statistics = statistics
            .ok_or_else(|| Error::tensor("calibration", "at least one sequence of tokens", "none"))?;
        for own in &mut statistics {
            own.finish();
            let bad = own.abs_means().iter().filter(|mean| !mean.is_finite()).count();
            if bad > 0 {
                let what = format!("activations of layer {} ({half:?})", layer.index);
                return Err(Error::NotFinite { what, found: bad });
            }
        }
        Ok((run, statistics))
    }

    /// Adds the outputs of a half to the states.
    pub fn add(&mut self, outputs: Vec<Tensor<B, 3>>) {
        for (state, output) in self.states.iter_mut().zip(outputs) {
            *state = state.clone() + output;
        }
    }
}

struct Observed<B: Backend> {
    normed: Tensor<B, 3>,
    last_input: Tensor<B, 3>,
    output: Tensor<B, 3>,
}

fn observe<B: Backend>(
    half: Half,
    layer: &DecoderLayer<B>,
    x: Tensor<B, 3>,
    tables: &[SequenceTables<B>],
) -> Observed<B> {
    let [_, length, _] = x.dims();
    let mut last_input = None;
    let mut watch = |role: LinearRole, x: &Tensor<B, 3>| {
        if LinearInput::of(role) == half.inputs()[1] {
            last_input = Some(x.clone());
        }
    };
    let (normed, output) = match half {
        Half::Attention => {
            let normed = layer.input_norm.forward(x);
            let output = layer.attention_observed(normed.clone(), table(tables, length), &mut watch);
            (normed, output)
        }
        Half::Mlp => {
            let normed = layer.post_attention_norm.forward(x);
            let output = layer.mlp_observed(normed.clone(), &mut watch);
            (normed, output)
        }
    };
    Observed {
        normed,
        last_input: last_input.expect("invariant: a half shows the input of its last linear"),
        output,
    }
}

impl<B: Backend> HalfRun<'_, B> {
    /// What the half adds to the states.
    pub fn into_outputs(self) -> Vec<Tensor<B, 3>> {
        self.outputs
    }

    fn output(&self, layer: &DecoderLayer<B>, normed: &Tensor<B, 3>) -> Tensor<B, 3> {
        let [_, length, _] = normed.dims();
        match self.half {
            Half::Attention => layer.attention(normed.clone(), table(self.tables, length)),
            Half::Mlp => layer.mlp(normed.clone()),
        }
    }
}

impl<B: Backend> BlockProbe for HalfRun<'_, B> {
    fn loss(&self, weights: Vec<(LinearRole, Vec<f32>)>, limit: f64) -> Result<Option<f64>> {
        let mut layer = self.layer.clone();
        let device = layer.input_norm.weight.device();
        for (role, weight) in weights {
            replace_weight(&mut layer, role, weight, &device);
        }
        let elements = self.outputs.iter().map(|y| y.dims().iter().product::<usize>());
        let elements = elements.sum::<usize>() as f64;
        if let Some(sum) = self.sum_on_host(&layer, limit * elements)? {
            return Ok((sum <= limit * elements).then_some(sum / elements));
        }
        let mut sum = 0.0;
        for (normed, outputs) in self.normed.iter().zip(&self.outputs) {
            self.cancel.check()?;
            let difference = to_host(self.output(&layer, normed) - outputs.clone());
            sum += difference
                .iter()
                .map(|d| f64::from(*d) * f64::from(*d))
                .sum::<f64>();
            if sum > limit * elements {
                return Ok(None);
            }
        }
        Ok(Some(sum / elements))
    }
}
