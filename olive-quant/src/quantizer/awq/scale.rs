//! Candidate scales, and moving the chosen ones into the weights.
//!
//! ```text
//! w_mean[k] = mean over rows of |W[n, k]| / (max |W[n, group of k]| + 1e-6)
//! duo:  s = max(x_mean^r / (w_mean^(1 - r) + 1e-4), 1e-4)
//! else: s = max(x_mean^r, 1e-4)
//! s = s / sqrt(max(s) * min(s)); what is not finite becomes 1
//! ```

use olive_core::{Error, Result};

use super::mapping::{Mapping, Producer};
use crate::layer::{LayerLinear, LayerWeights};

/// A point of the search grid.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Candidate {
    /// No scaling: plain rounding.
    Identity,
    /// The ratio between activations and weights.
    Ratio(f64),
}

/// The grid: the identity, then `n_grid` ratios from 0 in steps of `1 / n_grid`. Without duo scaling ratio 0 is the
/// identity and is not repeated.
pub fn grid(n_grid: usize, duo: bool) -> Vec<Candidate> {
    let first = usize::from(!duo);
    let ratios = (first..n_grid).map(|i| Candidate::Ratio(i as f64 / n_grid as f64));
    std::iter::once(Candidate::Identity).chain(ratios).collect()
}

/// Mean over all rows of all linears of each weight's share of its group's largest.
pub fn weight_means(linears: &[&LayerLinear], group_size: usize) -> Vec<f64> {
    let cols = linears.first().map_or(0, |linear| linear.spec.in_features);
    let rows: usize = linears.iter().map(|linear| linear.spec.out_features).sum();
    let mut sums = vec![0.0f64; cols];
    for row in linears.iter().flat_map(|linear| linear.weight.chunks_exact(cols)) {
        for (sums, group) in sums.chunks_mut(group_size).zip(row.chunks(group_size)) {
            let largest = group.iter().fold(0.0f32, |largest, w| largest.max(w.abs()));
            let inverse = 1.0 / (f64::from(largest) + 1e-6);
            for (sum, w) in sums.iter_mut().zip(group) {
                *sum += f64::from(w.abs()) * inverse;
            }
        }
    }
    sums.iter().map(|sum| sum / rows.max(1) as f64).collect()
}

/// The scales of a candidate, one for each mean.
pub fn candidate_scales(candidate: Candidate, x_means: &[f64], w_means: &[f64], duo: bool) -> Vec<f32> {
    let Candidate::Ratio(ratio) = candidate else {
        return vec![1.0; x_means.len()];
    };
    let raw: Vec<f64> = x_means
        .iter()
        .zip(w_means)
        .map(|(x, w)| {
            let scale = if duo {
                x.powf(ratio) / (w.powf(1.0 - ratio) + 1e-4)
            } else {
                x.powf(ratio)
            };
            scale.max(1e-4)
        })
        .collect();
    let (low, high) = raw
        .iter()
        .filter(|s| s.is_finite())
        .fold((f64::INFINITY, 0.0f64), |(low, high), s| {
            (low.min(*s), high.max(*s))
        });
    let middle = (low * high).sqrt();
    raw.iter()
        .map(|s| (s / middle) as f32)
        .map(|s| if s.is_finite() && s > 0.0 { s } else { 1.0 })
        .collect()
}

/// Multiplies the columns of the mapping's linears by `scales` (one a channel) and divides their producer: the
/// function of the layer stays the same.
///
/// # Errors
/// [`Error::Tensor`] if the producer does not have a row for each scale.
pub fn apply(layer: &mut LayerWeights, mapping: &Mapping, scales: &[f32]) -> Result<()> {
    for role in &mapping.roles {
        if let Some(linear) = layer.linear_mut(*role) {
            for row in linear.weight.chunks_exact_mut(scales.len()) {
                for (w, s) in row.iter_mut().zip(scales) {
                    *w *= s;
                }
            }
        }
    }
    match mapping.producer {
        Producer::InputNorm => divide(&mut layer.input_norm, scales),
        Producer::PostAttentionNorm => divide(&mut layer.post_attention_norm, scales),
        Producer::LastRows(role) => {
            let own = mapping.sharing.own(scales);
            let linear = layer.linear_mut(role);
            let linear = linear.expect("invariant: mappings name linears that the layer stores");
            divide_last_rows(linear, &own)?;
        }
    }
    Ok(())
}

fn divide(values: &mut [f32], scales: &[f32]) {
    for (value, scale) in values.iter_mut().zip(scales) {
        *value /= scale;
    }
}

fn divide_last_rows(linear: &mut LayerLinear, scales: &[f32]) -> Result<()> {
    let [rows, cols] = linear.shape();
    let Some(first) = rows.checked_sub(scales.len()) else {
        let expected = format!("at least {} output features", scales.len());
        return Err(Error::tensor(&linear.spec.name, expected, rows.to_string()));
    };
    for (row, scale) in linear.weight[first * cols..].chunks_exact_mut(cols).zip(scales) {
        for w in row {
            *w /= scale;
        }
    }
    if let Some(bias) = &mut linear.bias {
        divide(&mut bias[first..], scales);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_has_the_identity_once() {
        assert_eq!(grid(20, true).len(), 21);
        let plain = grid(20, false);
        assert_eq!(plain.len(), 20);
        assert_eq!(plain[1], Candidate::Ratio(0.05));
    }

    #[test]
    fn scales_are_centred_and_silent_channels_are_harmless() {
        for duo in [true, false] {
            for candidate in grid(20, duo) {
                let scales =
                    candidate_scales(candidate, &[0.0, 0.5, 8.0, f64::NAN], &[0.0, 0.3, 0.2, 0.1], duo);
                assert!(
                    scales.iter().all(|s| s.is_finite() && *s > 0.0),
                    "{candidate:?} {scales:?}"
                );
            }
        }
        let scales = candidate_scales(Candidate::Ratio(0.5), &[1.0, 4.0, 16.0], &[0.25; 3], true);
        assert!((scales[0] * scales[2] - 1.0).abs() < 1e-6);
    }

    #[test]
    fn without_weights_a_common_factor_of_the_activations_cancels() {
        let means = [0.1, 0.7, 3.0];
        let doubled: Vec<f64> = means.iter().map(|m| m * 8.0).collect();
        let scales = |x: &[f64]| candidate_scales(Candidate::Ratio(0.55), x, &[1.0; 3], false);
        for (a, b) in scales(&means).iter().zip(scales(&doubled)) {
            assert!((a - b).abs() < 1e-6);
        }
    }
}
