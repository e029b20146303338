//! The search for the scales of a mapping on the device.

use olive_core::Result;
use olive_core::cuda::{DeviceLayer, DeviceWeight, Element, Gpu, Matrix, Product, SHARES};

use super::layer::{DeviceLayerWeights, DeviceLinearWeight};
use super::statistics::{DeviceStatistics, column_sums};
use crate::options::{QuantizeOptions, Search};
use crate::quantizer::awq::mapping::Mapping;
use crate::quantizer::awq::scale::{Candidate, candidate_scales, grid};
use crate::quantizer::awq::search::{Choice, HYBRID_CANDIDATES, Measure};

/// Rows whose rounding error exists at a time.
const ROWS: usize = 8192;

/// Judges a layer with other weights by the output of the half that is searched: mean squared difference over all
/// tokens, `None` as soon as it is certain to exceed the limit.
pub(super) type Judge<'a> = dyn Fn(&DeviceLayer, f64) -> Result<Option<f64>> + 'a;

/// A mapping of a layer about to be searched.
pub(super) struct DeviceSearch<'a> {
    pub gpu: &'a Gpu,
    pub mapping: &'a Mapping,
    pub linears: Vec<&'a DeviceLinearWeight>,
    pub statistics: &'a DeviceStatistics,
    pub options: &'a QuantizeOptions,
}

impl<'a> DeviceSearch<'a> {
    pub fn new(
        gpu: &'a Gpu,
        mapping: &'a Mapping,
        weights: &'a DeviceLayerWeights,
        statistics: &'a DeviceStatistics,
        options: &'a QuantizeOptions,
    ) -> Self {
        let linears = mapping.roles.iter().filter_map(|role| weights.linear(*role));
        Self {
            gpu,
            mapping,
            linears: linears.collect(),
            statistics,
            options,
        }
    }

    /// Finds the best candidate, as [`crate::quantizer::awq::search::ScaleSearch::run`].
    ///
    /// # Errors
    /// [`Error::NotFinite`] if plain rounding has no finite loss; those of `judge` and of the device.
    pub fn run(&self, layer: &DeviceLayer, judge: &Judge<'_>) -> Result<Choice> {
        let candidates = self.candidates(layer.index)?;
        let gram_losses = self.gram_losses(&candidates)?;
        let by_output = self.mapping.is_nonlinear() && self.options.search != Search::Fast;
        let losses = match by_output {
            true => self.output_losses(layer, &candidates, &gram_losses, judge)?,
            false => gram_losses.into_iter().map(Some).collect(),
        };
        let measure = match by_output {
            true => Measure::BlockOutput,
            false => Measure::LinearOutput,
        };
        Choice::of(&candidates, losses, measure, || {
            let name = self
                .linears
                .first()
                .map_or("", |linear| linear.spec.name.as_str());
            format!("`{name}` ({})", self.mapping.name)
        })
    }

    fn levels(&self) -> f32 {
        ((1u32 << self.options.bits) - 1) as f32
    }

    fn candidates(&self, index: usize) -> Result<Vec<(Candidate, Vec<f32>)>> {
        let sharing = self.mapping.sharing;
        let what = format!("activations of layer {index} ({})", self.mapping.name);
        let x_means = sharing.reduce(&self.statistics.abs_means(self.gpu, &what)?);
        let group_size = self.options.group_for(self.statistics.gram.cols);
        let parts: Vec<_> = self
            .linears
            .iter()
            .map(|linear| {
                let sums = self.gpu.share_sums(&linear.weight, group_size);
                self.gpu.column_totals(&sums)
            })
            .collect();
        let rows: usize = self.linears.iter().map(|linear| linear.spec.out_features).sum();
        let sums = column_sums(self.gpu, &parts)?;
        let w_means: Vec<f64> = sums.iter().map(|sum| sum / rows.max(1) as f64).collect();
        let w_means = sharing.reduce(&w_means);
        let duo = self.options.duo_scaling;
        let scales = |candidate| sharing.expand(&candidate_scales(candidate, &x_means, &w_means, duo));
        Ok(grid(self.options.n_grid, duo)
            .into_iter()
            .map(|candidate| (candidate, scales(candidate)))
            .collect())
    }

    /// Mean squared differences of the linears' outputs: `tr(D H Dᵀ) / (tokens · outputs)`. All of it is queued before
    /// anything is asked for.
    fn gram_losses(&self, candidates: &[(Candidate, Vec<f32>)]) -> Result<Vec<f64>> {
        let outputs: usize = self.linears.iter().map(|linear| linear.spec.out_features).sum();
        let gram = self.gpu.round(&self.statistics.gram);
        let pieces: Vec<Matrix> = self
            .linears
            .iter()
            .filter(|linear| linear.converts)
            .flat_map(|linear| {
                let starts = (0..linear.weight.rows).step_by(ROWS);
                starts.map(|first| linear.weight.rows(first, ROWS.min(linear.weight.rows - first)))
            })
            .collect();
        if pieces.is_empty() {
            return Ok(vec![0.0; candidates.len()]);
        }
        let all: Vec<f32> = candidates
            .iter()
            .flat_map(|(_, scales)| scales)
            .copied()
            .collect();
        let all = self.gpu.upload_f32(&all, candidates.len(), gram.cols);
        let shares = self
            .gpu
            .empty(candidates.len() * pieces.len(), SHARES, Element::F32);
        for index in 0..candidates.len() {
            for (place, rows) in pieces.iter().enumerate() {
                let out = shares.rows(index * pieces.len() + place, 1);
                self.error_shares(rows, &all.rows(index, 1), &gram, &out);
            }
        }
        let scale = 1.0 / (self.statistics.tokens() * outputs) as f64;
        let shares = self.gpu.download_f32(&shares)?;
        let sums = shares
            .chunks_exact(pieces.len() * SHARES)
            .map(|own| own.iter().map(|v| f64::from(*v)).sum::<f64>() * scale);
        Ok(sums.collect())
    }

    /// Shares of `tr(D H Dᵀ)` for some rows. Operands are bfloat16: of errors that differ by many roundings each, the
    /// sum moves by less than a thousandth, and alike for every candidate.
    fn error_shares(&self, rows: &Matrix, scales: &Matrix, gram: &Matrix, shares: &Matrix) {
        let group_size = self.options.group_for(gram.cols);
        let delta = self
            .gpu
            .rounding_error_half(rows, scales, group_size, self.levels());
        let product = self.gpu.empty(delta.rows, delta.cols, Element::F32);
        let size = [delta.rows, delta.cols, delta.cols];
        self.gpu
            .product(Product::new(size, delta.view(), gram.view(), product.view()));
        self.gpu.dot_half_shares(&delta, &product, shares);
    }

    /// `layer` as it would act if the mapping's linears were rounded with these scales.
    fn rounded(&self, layer: &DeviceLayer, scales: &[f32]) -> DeviceLayer {
        let mut placed = layer.clone();
        let group_size = self.options.group_for(scales.len());
        let scales = self.gpu.upload_f32(scales, 1, scales.len());
        for linear in self.linears.iter().filter(|linear| linear.converts) {
            if let Some(target) = placed.linear_mut(linear.spec.role) {
                let weight = self
                    .gpu
                    .round_scaled(&linear.weight, &scales, group_size, self.levels());
                target.weight = DeviceWeight::Dense(weight);
            }
        }
        placed
    }

    fn output_losses(
        &self,
        layer: &DeviceLayer,
        candidates: &[(Candidate, Vec<f32>)],
        gram_losses: &[f64],
        judge: &Judge<'_>,
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
            losses[index] = judge(&self.rounded(layer, scales), limit)?;
            if let Some(loss) = losses[index].filter(|loss| *loss < limit) {
                limit = loss;
            }
        }
        Ok(losses)
    }
}
