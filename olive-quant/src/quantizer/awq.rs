//! Activation-aware weight quantization (<https://arxiv.org/abs/2306.00978>), as AutoAWQ 0.2.9 does it, with these
//! corrections:
//!
//! - The identity is a point of the search grid: no mapping is worse than plain rounding.
//! - Scales of the output projection go into the value rows only where they belong: one scale for each value channel,
//!   shared by the query heads that read it.
//! - The linears are rounded with the scale that is stored, in half precision.
//! - The scaled layer is compared with the original before anything is rounded.
//!
//! - Clips are searched with all tokens instead of 512, and the groups of a row are judged together after they were
//!   judged alone: the Gram matrix holds both at little further cost.
//!
//! Clipping skips separate query and key projections, whose errors meet in a product; a fused projection is clipped.

pub mod clip;
pub mod mapping;
pub mod scale;
pub mod search;
pub mod statistics;

use std::time::Instant;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use olive_core::decoder::{DecoderLayer, SequenceTables};
use olive_core::{Error, LinearRole, ModelSpec, Result};

use self::clip::ClipSearch;
use self::mapping::{LinearInput, Mapping};
use self::scale::Candidate;
use self::search::{Choice, ScaleSearch};
use self::statistics::InputStatistics;
use crate::calibrate::{Half, HiddenStates};
use crate::layer::LayerWeights;
use crate::options::QuantizeOptions;
use crate::quantizer::affine::{Affine, Arithmetic};
use crate::report::{ClipReport, MappingReport};

/// The largest relative change of a layer's halves that moving scales may cause: rounding of single precision.
pub const PRESERVATION_TOLERANCE: f64 = 1e-5;
/// Tokens on which that is verified.
const PRESERVATION_TOKENS: usize = 32;

/// A scaled and clipped layer, ready to be rounded, and how it came about.
pub struct AwqLayer {
    /// Scaled and clipped.
    pub weights: LayerWeights,
    /// Relative change of attention and MLP by the scaling, the larger of the two.
    pub preservation_error: f64,
    /// One for each mapping.
    pub mappings: Vec<MappingReport>,
    /// The clip of each linear that was clipped.
    pub clips: Vec<(LinearRole, ClipReport)>,
}

/// Calibrates AWQ layer by layer.
pub struct Awq<'a> {
    spec: &'a ModelSpec,
    options: &'a QuantizeOptions,
    mappings: Vec<Mapping>,
    affine: Affine,
}

impl<'a> Awq<'a> {
    /// AWQ for a model of this spec.
    pub fn new(spec: &'a ModelSpec, options: &'a QuantizeOptions) -> Self {
        Self {
            spec,
            options,
            mappings: mapping::mappings(spec),
            affine: Affine::new(options.bits, Arithmetic::Single),
        }
    }

    /// Searches scales and clips of a layer and applies them to its weights. `hidden` are the states before the
    /// layer and, on return, those behind the unquantized layer.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for activations or losses that are not finite; [`Error::Tensor`] if scaling changed the
    /// function of the layer; [`Error::Cancelled`].
    pub fn layer<B: Backend>(
        &self,
        layer: &DecoderLayer<B>,
        mut weights: LayerWeights,
        hidden: &mut HiddenStates<B>,
    ) -> Result<AwqLayer> {
        let sample = first_tokens(&hidden.states()[0]);
        let mut choices = Vec::new();
        let mut inputs = Vec::new();
        for half in [Half::Attention, Half::Mlp] {
            let (run, statistics) = hidden.run(half, layer)?;
            for (input, statistics) in half.inputs().into_iter().zip(statistics) {
                for mapping in self.mappings.iter().filter(|mapping| mapping.input == input) {
                    let started = Instant::now();
                    let search = ScaleSearch::new(mapping, &weights, &statistics, self.affine, self.options);
                    let choice = search.run(&run)?;
                    let report = mapping_report(mapping, &weights, &choice, self.options, started);
                    choices.push((mapping, choice, report));
                }
                inputs.push((input, statistics));
            }
            let outputs = run.into_outputs();
            hidden.add(outputs);
        }
        for (mapping, choice, _) in &choices {
            scale::apply(&mut weights, mapping, &choice.scales)?;
        }
        let preservation_error = self.verify(layer, &weights, sample)?;
        let mut clips = Vec::new();
        if self.options.clip {
            for (input, mut statistics) in inputs {
                if let Some((_, choice, _)) = choices.iter().find(|(mapping, _, _)| mapping.input == input) {
                    statistics.divide_by(&choice.scales);
                }
                self.clip(&mut weights, input, &statistics, &mut clips);
            }
        }
        Ok(AwqLayer {
            weights,
            preservation_error,
            mappings: choices.into_iter().map(|(_, _, report)| report).collect(),
            clips,
        })
    }

    fn clip(
        &self,
        weights: &mut LayerWeights,
        input: LinearInput,
        statistics: &InputStatistics,
        clips: &mut Vec<(LinearRole, ClipReport)>,
    ) {
        for linear in &mut weights.linears {
            let role = linear.spec.role;
            let skipped = matches!(role, LinearRole::Q | LinearRole::K) || !linear.converts;
            if skipped || LinearInput::of(role) != input {
                continue;
            }
            let cols = linear.spec.in_features;
            let search = ClipSearch {
                cols,
                group_size: self.options.group_for(cols),
                gram: statistics.gram(),
                affine: self.affine,
                jointly: true,
            };
            let found = search.run(&linear.weight);
            clip::apply(&mut linear.weight, cols, &found.limits);
            clips.push((role, ClipReport::new(&found)));
        }
    }

    /// Relative change of the layer's two halves on some tokens.
    fn verify<B: Backend>(
        &self,
        layer: &DecoderLayer<B>,
        weights: &LayerWeights,
        x: Tensor<B, 3>,
    ) -> Result<f64> {
        let device = x.device();
        let [_, length, _] = x.dims();
        let tables = SequenceTables::new(self.spec, length, &device);
        let scaled = weights.placed_in(layer, &device);
        let attention =
            |layer: &DecoderLayer<B>| layer.attention(layer.input_norm.forward(x.clone()), &tables);
        let attended = attention(layer);
        let first = relative_error(attention(&scaled), attended.clone());
        let middle = x.clone() + attended;
        let mlp = |layer: &DecoderLayer<B>| layer.mlp(layer.post_attention_norm.forward(middle.clone()));
        let second = relative_error(mlp(&scaled), mlp(layer));
        for (error, half) in [(first, "attention"), (second, "MLP")] {
            if error.is_nan() || error > PRESERVATION_TOLERANCE {
                return Err(Error::tensor(
                    format!("{half} of layer {}", weights.index),
                    format!("the same output after scaling, within {PRESERVATION_TOLERANCE:e}"),
                    format!("a relative change of {error:e}"),
                ));
            }
        }
        Ok(first.max(second))
    }
}

fn first_tokens<B: Backend>(x: &Tensor<B, 3>) -> Tensor<B, 3> {
    let [_, length, hidden] = x.dims();
    x.clone()
        .slice([0..1, 0..length.min(PRESERVATION_TOKENS), 0..hidden])
}

/// `‖a - b‖ / ‖b‖`.
fn relative_error<B: Backend>(a: Tensor<B, 3>, b: Tensor<B, 3>) -> f64 {
    let norm = |x: Tensor<B, 3>| {
        let values = x.into_data().convert::<f32>().into_vec::<f32>();
        let values = values.expect("invariant: converted to f32");
        values
            .iter()
            .map(|v| f64::from(*v) * f64::from(*v))
            .sum::<f64>()
            .sqrt()
    };
    let difference = norm(a - b.clone());
    if difference == 0.0 {
        0.0
    } else {
        difference / norm(b)
    }
}

fn mapping_report(
    mapping: &Mapping,
    weights: &LayerWeights,
    choice: &Choice,
    options: &QuantizeOptions,
    started: Instant,
) -> MappingReport {
    let names = mapping.roles.iter().filter_map(|role| weights.linear(*role));
    let names = names.map(|linear| linear.spec.name.clone()).collect();
    mapping_report_of(mapping, names, choice, options, started)
}

/// The report of a search over the linears of these names.
pub(crate) fn mapping_report_of(
    mapping: &Mapping,
    linears: Vec<String>,
    choice: &Choice,
    options: &QuantizeOptions,
    started: Instant,
) -> MappingReport {
    MappingReport {
        name: mapping.name.to_owned(),
        linears,
        measure: choice.measure,
        loss_rtn: choice.loss_identity,
        loss: choice.loss,
        ratio: match choice.candidate {
            Candidate::Identity => None,
            Candidate::Ratio(ratio) => Some(ratio),
        },
        duo_scaling: options.duo_scaling,
        seconds: started.elapsed().as_secs_f64(),
    }
}
