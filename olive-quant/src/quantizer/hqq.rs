//! Half-quadratic quantization (<https://mobiusml.github.io/hqq_blog/>): round to nearest with zero points, not
//! integers, that minimise the 0.7-norm of the error by half-quadratic splitting, as Olive's `OnnxHqqQuantization`
//! computes it.
//!
//! ```text
//! s = min(n / (max - min), 20000), z = round(-min s)
//! repeat: q = clamp(round(w s + z), 0, n);  r = (q - z) / s
//!         e = sign(w - r) relu(|w - r| - (|w - r| + 1e-8)^(p-1) / beta);  z = mean(q - (w - e) s);  beta *= 1.01
//! until the mean of |w - r| over the matrix no longer falls, 20 times at most
//! ```

use olive_core::{Error, Result};
use rayon::prelude::*;

use super::minmax::check_weight;

const NORM: f32 = 0.7;
const BETA: f32 = 10.0;
const BETA_GROWTH: f32 = 1.01;
const ITERATIONS: usize = 20;
const MAX_INVERSE_SCALE: f32 = 2e4;

/// A weight whose zero points are not integers: `w = (q - zero) * scale`.
#[derive(Debug, Clone, PartialEq)]
pub struct FloatZeroMatrix {
    /// Outputs and inputs.
    pub shape: [usize; 2],
    /// Inputs that share a scale and a zero point.
    pub group_size: usize,
    /// Bits of a value.
    pub bits: usize,
    /// `[out, in]`, not packed.
    pub values: Vec<u8>,
    /// `[out, in / g]`.
    pub scales: Vec<f32>,
    /// `[out, in / g]`.
    pub zeros: Vec<f32>,
}

impl FloatZeroMatrix {
    /// `[out, in]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let groups = self.values.chunks_exact(self.group_size).zip(self.scales.iter().zip(&self.zeros));
        groups
            .flat_map(|(values, (scale, zero))| values.iter().map(move |q| (f32::from(*q) - zero) * scale))
            .collect()
    }
}

/// Scale (inverted) and zero point of a group.
#[derive(Clone, Copy)]
struct Line {
    inverse: f32,
    zero: f32,
}

/// Quantizes `weight [rows, cols]` to `bits` bits. `name` is for messages.
///
/// # Errors
/// [`Error::NotFinite`] or [`Error::Tensor`] if weight or sizes are not usable.
pub fn quantize(
    name: &str,
    weight: &[f32],
    shape: [usize; 2],
    group_size: usize,
    bits: usize,
) -> Result<FloatZeroMatrix> {
    check_weight(name, weight, shape, group_size)?;
    if !(2..=8).contains(&bits) {
        return Err(Error::tensor(name, "2 to 8 bits", bits.to_string()));
    }
    let top = ((1u32 << bits) - 1) as f32;
    let mut lines: Vec<Line> = weight.par_chunks(group_size).map(|group| start(group, top)).collect();
    let mut least = 1e4;
    let mut beta = BETA;
    for _ in 0..ITERATIONS {
        let errors: Vec<f64> = lines
            .par_iter_mut()
            .zip(weight.par_chunks(group_size))
            .with_min_len(64)
            .map(|(line, group)| improve(line, group, top, beta))
            .collect();
        beta *= BETA_GROWTH;
        let error = errors.iter().sum::<f64>() / weight.len().max(1) as f64;
        if error >= least {
            break;
        }
        least = error;
    }
    let mut values = vec![0u8; weight.len()];
    let groups = values.par_chunks_mut(group_size).zip(weight.par_chunks(group_size)).zip(&lines);
    groups.for_each(|((values, group), line)| {
        for (value, w) in values.iter_mut().zip(group) {
            *value = level(*line, *w, top) as u8;
        }
    });
    Ok(FloatZeroMatrix {
        shape,
        group_size,
        bits,
        values,
        scales: lines.iter().map(|line| 1.0 / line.inverse).collect(),
        zeros: lines.iter().map(|line| line.zero).collect(),
    })
}

fn start(group: &[f32], top: f32) -> Line {
    let (low, high) =
        group.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), w| (l.min(*w), h.max(*w)));
    let range = if high > low { high - low } else { top };
    let inverse = (top / range).min(MAX_INVERSE_SCALE);
    Line {
        inverse,
        zero: (-low * inverse).round_ties_even(),
    }
}

fn level(line: Line, w: f32, top: f32) -> f32 {
    (w * line.inverse + line.zero).round_ties_even().clamp(0.0, top)
}

/// Moves the zero point once; the sum of `|w - r|` before.
fn improve(line: &mut Line, group: &[f32], top: f32, beta: f32) -> f64 {
    let (mut zeros, mut errors) = (0.0f64, 0.0f64);
    for w in group {
        let q = level(*line, *w, top);
        let error = w - (q - line.zero) / line.inverse;
        let magnitude = error.abs();
        let shrunk = (magnitude - (magnitude + 1e-8).powf(NORM - 1.0) / beta).max(0.0);
        let kept = if error == 0.0 { 0.0 } else { shrunk * error.signum() };
        zeros += f64::from(q - (w - kept) * line.inverse);
        errors += f64::from(magnitude);
    }
    line.zero = (zeros / group.len() as f64) as f32;
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(n: u32) -> Vec<f32> {
        let uniform = |i: u32| (i.wrapping_mul(2_654_435_761).rotate_left(9) >> 8) as f32 / 8_388_608.0 - 1.0;
        (0..n).map(|i| (0..6).map(|k| uniform(i * 7 + k)).sum::<f32>() * 0.02).collect()
    }

    #[test]
    fn zero_points_lower_the_mean_error_of_rounding() {
        let (w, shape) = (weights(64 * 256), [64, 256]);
        let matrix = quantize("w", &w, shape, 64, 4).unwrap();
        let mean = |values: &[f32]| {
            values.iter().zip(&w).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>() / w.len() as f64
        };
        let rounded: Vec<f32> = w
            .chunks_exact(64)
            .flat_map(|group| {
                let line = start(group, 15.0);
                group.iter().map(move |x| (level(line, *x, 15.0) - line.zero) / line.inverse)
            })
            .collect();
        assert!(mean(&matrix.dequantize()) < mean(&rounded));
    }

    #[test]
    fn constant_groups_keep_their_value() {
        let matrix = quantize("w", &[0.0; 32], [1, 32], 32, 4).unwrap();
        assert!(matrix.dequantize().iter().all(|w| *w == 0.0));
        assert!(quantize("layer.w", &[f32::NAN; 32], [1, 32], 32, 4).unwrap_err().to_string().contains("`layer.w`"));
    }
}
