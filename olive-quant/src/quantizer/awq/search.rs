//! The search for the scales of a mapping: the candidate whose rounded weights change the output least.
//!
//! A mapping with one linear and nothing behind it is judged by the linear's output, exactly, through the Gram matrix
//! of its input. Where a nonlinearity follows, the Gram loss of the linears ranks the candidates, and the output of
//! the block decides: in [`Search::Exact`] for every candidate, best-ranked first, each given up as soon as its sum
//! exceeds the best so far (which changes no decision); in [`Search::Hybrid`] for the best-ranked few; in
//! [`Search::Fast`] not at all.
//!
//! The identity is a candidate, so that the loss is never above that of plain rounding.

use olive_core::kernels::{Packed, View, product_packed, row_dots, wide};
use olive_core::{Error, LinearRole, Result};
use rayon::prelude::*;

use super::mapping::Mapping;
use super::scale::{Candidate, candidate_scales, grid, weight_means};
use super::statistics::InputStatistics;
use crate::layer::{LayerLinear, LayerWeights};
use crate::options::{QuantizeOptions, Search};
use crate::quantizer::affine::Affine;

/// Rows of a weight that one task rounds and multiplies.
const ROWS: usize = 64;
/// Columns of the Gram matrix that are multiplied together.
const COLUMNS: usize = 128;
/// Candidates besides the identity that [`Search::Hybrid`] judges by the block's output.
pub(crate) const HYBRID_CANDIDATES: usize = 4;

/// Judges weights by the output of the block that their linears belong to. The seam for other devices: what is behind
/// it is free to keep tokens and weights where it likes.
pub trait BlockProbe: Sync {
    /// Mean squared difference of the block's output over all tokens when these linears have these weights
    /// `[out, in]`; `None` as soon as it is certain to exceed `limit`.
    ///
    /// # Errors
    /// Whatever stops the evaluation.
    fn loss(&self, weights: Vec<(LinearRole, Vec<f32>)>, limit: f64) -> Result<Option<f64>>;
}

/// How a loss was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// Mean squared difference of the output of attention or MLP.
    BlockOutput,
    /// Mean squared difference of the linears' own outputs.
    LinearOutput,
}

/// The outcome of a search.
#[derive(Debug, Clone)]
pub struct Choice {
    /// One scale for each channel of the input.
    pub scales: Vec<f32>,
    /// What won.
    pub candidate: Candidate,
    /// Loss of plain rounding.
    pub loss_identity: f64,
    /// Loss of the winner.
    pub loss: f64,
    /// How both were measured.
    pub measure: Measure,
    /// Every candidate in grid order with its loss by that measure, where it was evaluated to the end.
    pub tried: Vec<(Candidate, Option<f64>)>,
}

impl Choice {
    /// The first of least loss among `candidates`, the first of which is plain rounding. `what` says for messages what
    /// is rounded.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if plain rounding has no finite loss.
    pub(crate) fn of(
        candidates: &[(Candidate, Vec<f32>)],
        losses: Vec<Option<f64>>,
        measure: Measure,
        what: impl Fn() -> String,
    ) -> Result<Self> {
        let finite = |loss: &Option<f64>| loss.filter(|loss| loss.is_finite());
        let Some(loss_identity) = losses.first().and_then(finite) else {
            return Err(Error::NotFinite {
                what: format!("the loss of rounding {}", what()),
                found: 1,
            });
        };
        let mut best = (0, loss_identity);
        for (index, loss) in losses.iter().enumerate() {
            if let Some(loss) = finite(loss)
                && loss < best.1
            {
                best = (index, loss);
            }
        }
        let (candidate, scales) = &candidates[best.0];
        let tried = candidates.iter().map(|(candidate, _)| *candidate).zip(losses);
        Ok(Self {
            scales: scales.clone(),
            candidate: *candidate,
            loss_identity,
            loss: best.1,
            measure,
            tried: tried.collect(),
        })
    }
}

/// A mapping of a layer about to be searched.
pub struct ScaleSearch<'a> {
    /// What is scaled.
    pub mapping: &'a Mapping,
    /// Statistics of its input.
    pub input: &'a InputStatistics,
    /// What rounds.
    pub affine: Affine,
    /// Grid and mode.
    pub options: &'a QuantizeOptions,
    /// The mapping's linears.
    pub linears: Vec<&'a LayerLinear>,
}

impl<'a> ScaleSearch<'a> {
    /// A search of `mapping` in `layer`.
    pub fn new(
        mapping: &'a Mapping,
        layer: &'a LayerWeights,
        input: &'a InputStatistics,
        affine: Affine,
        options: &'a QuantizeOptions,
    ) -> Self {
        Self {
            mapping,
            input,
            affine,
            options,
            linears: mapping
                .roles
                .iter()
                .filter_map(|role| layer.linear(*role))
                .collect(),
        }
    }

    /// Finds the best candidate.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if plain rounding has no finite loss; those of `probe`.
    pub fn run(&self, probe: &dyn BlockProbe) -> Result<Choice> {
        let candidates = self.candidates();
        let gram_losses = self.gram_losses(candidates.iter().map(|(_, scales)| scales.as_slice()));
        let by_output = self.mapping.is_nonlinear() && self.options.search != Search::Fast;
        let losses = if by_output {
            self.output_losses(&candidates, &gram_losses, probe)?
        } else {
            gram_losses.into_iter().map(Some).collect()
        };
        let measure = if by_output {
            Measure::BlockOutput
        } else {
            Measure::LinearOutput
        };
        Choice::of(&candidates, losses, measure, || {
            format!("`{}` ({})", self.linears[0].spec.name, self.mapping.name)
        })
    }

    /// Every point of the grid with its scales, one for each channel.
    pub fn candidates(&self) -> Vec<(Candidate, Vec<f32>)> {
        let sharing = self.mapping.sharing;
        let x_means = sharing.reduce(&self.input.abs_means());
        let group_size = self.options.group_for(self.input.channels());
        let w_means = sharing.reduce(&weight_means(&self.linears, group_size));
        let duo = self.options.duo_scaling;
        grid(self.options.n_grid, duo)
            .into_iter()
            .map(|candidate| {
                let scales = candidate_scales(candidate, &x_means, &w_means, duo);
                (candidate, sharing.expand(&scales))
            })
            .collect()
    }

    /// Mean squared difference of the linears' outputs for each set of scales: `tr(D H Dᵀ) / (tokens · outputs)`.
    pub fn gram_losses<'s>(&self, scales: impl Iterator<Item = &'s [f32]>) -> Vec<f64> {
        let outputs: usize = self.linears.iter().map(|linear| linear.spec.out_features).sum();
        let elements = (self.input.tokens() * outputs) as f64;
        let gram = HalfGram::new(self.input.gram(), self.input.channels());
        let loss = |scales: &[f32]| -> f64 {
            let errors = self
                .linears
                .iter()
                .map(|linear| self.gram_error(linear, &gram, scales));
            errors.sum::<f64>() / elements
        };
        scales.map(loss).collect()
    }

    /// `tr(D H Dᵀ)` of one linear.
    fn gram_error(&self, linear: &LayerLinear, gram: &HalfGram, scales: &[f32]) -> f64 {
        if !linear.converts {
            return 0.0;
        }
        let cols = scales.len();
        let parts: Vec<f64> = linear
            .weight
            .par_chunks(ROWS * cols)
            .map(|weight| {
                let mut delta = weight.to_vec();
                self.round_scaled(&mut delta, scales);
                wide(subtract, (delta.as_mut_slice(), weight));
                gram.error(&delta)
            })
            .collect();
        // Summed in the order of the rows, whoever computed them.
        parts.iter().sum()
    }

    /// `Q(W · s) / s` in place.
    fn round_scaled(&self, weight: &mut [f32], scales: &[f32]) {
        let group_size = self.options.group_for(scales.len());
        wide(round_scaled, (weight, scales, self.affine, group_size));
    }

    /// The weights of every linear as they would act if rounded with these scales.
    pub fn rounded(&self, scales: &[f32]) -> Vec<(LinearRole, Vec<f32>)> {
        let rounded = self.linears.iter().map(|linear| {
            let mut weight = linear.weight.clone();
            if linear.converts {
                weight
                    .par_chunks_mut(ROWS * scales.len())
                    .for_each(|rows| self.round_scaled(rows, scales));
            }
            (linear.spec.role, weight)
        });
        rounded.collect()
    }

    fn output_losses(
        &self,
        candidates: &[(Candidate, Vec<f32>)],
        gram_losses: &[f64],
        probe: &dyn BlockProbe,
    ) -> Result<Vec<Option<f64>>> {
        let mut order: Vec<usize> = (1..candidates.len()).collect();
        order.sort_by(|a, b| gram_losses[*a].total_cmp(&gram_losses[*b]).then(a.cmp(b)));
        if self.options.search == Search::Hybrid {
            order.truncate(HYBRID_CANDIDATES);
        }
        let mut losses = vec![None; candidates.len()];
        let mut limit = f64::INFINITY;
        for index in std::iter::once(0).chain(order) {
            let (_, scales) = &candidates[index];
            losses[index] = probe.loss(self.rounded(scales), limit)?;
            if let Some(loss) = losses[index].filter(|loss| *loss < limit) {
                limit = loss;
            }
        }
        Ok(losses)
    }
}

/// `Q(W · s) / s` in place.
#[inline(always)]
fn round_scaled(weight: &mut [f32], scales: &[f32], affine: Affine, group_size: usize) {
    for row in weight.chunks_exact_mut(scales.len()) {
        for (w, s) in row.iter_mut().zip(scales) {
            *w *= s;
        }
        affine.fake_quantize(row, group_size);
        for (w, s) in row.iter_mut().zip(scales) {
            *w /= s;
        }
    }
}

/// `a - b` into `a`.
#[inline(always)]
pub(crate) fn subtract(a: &mut [f32], b: &[f32]) {
    for (a, b) in a.iter_mut().zip(b) {
        *a -= b;
    }
}

/// `U` with `H = U + Uᵀ`, packed by blocks of columns: `dᵀ H d = 2 dᵀ U d`, and `U` is zero below its diagonal blocks,
/// which halves the work.
struct HalfGram {
    cols: usize,
    blocks: Vec<Packed>,
}

impl HalfGram {
    fn new(gram: &[f32], cols: usize) -> Self {
        let firsts: Vec<usize> = (0..cols).step_by(COLUMNS).collect();
        let block = |first: usize| {
            let (rows, width) = ((first + COLUMNS).min(cols), COLUMNS.min(cols - first));
            let mut part = Vec::with_capacity(rows * width);
            for (index, row) in gram.chunks_exact(cols).enumerate().take(rows) {
                let factor = if index < first { 1.0 } else { 0.5 };
                part.extend(row[first..first + width].iter().map(|value| value * factor));
            }
            Packed::new(View::new(&part, [rows, width], width))
        };
        Self {
            cols,
            blocks: firsts.into_par_iter().map(block).collect(),
        }
    }

    /// `tr(D H Dᵀ)` of `delta [rows, cols]`.
    fn error(&self, delta: &[f32]) -> f64 {
        let rows = delta.len() / self.cols;
        let mut products = vec![0.0; delta.len()];
        for (index, block) in self.blocks.iter().enumerate() {
            let [above, _] = block.shape();
            let lhs = View::new(delta, [rows, above], self.cols);
            product_packed(
                &mut products[index * COLUMNS..],
                self.cols,
                false,
                1.0,
                lhs,
                block,
            );
        }
        2.0 * row_dots(&products, delta, self.cols).sum::<f64>()
    }
}
