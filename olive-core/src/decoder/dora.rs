//! DoRA: a weight is split into the direction of its rows and their magnitude (<https://arxiv.org/abs/2402.09353>).
//!
//! ```text
//! y = x Wᵀ + bias + (g - 1) · x̃ Wᵀ + g · s · x̃ Aᵀ Bᵀ      g = m / ‖W + s B A‖, one for each output
//! ```
//!
//! `x̃ = dropout(x)`. As in PEFT the norms count as constants: the backward goes through `m`, `A`, `B` and `x` only.
//! They are `‖W‖² + 2 s rowsum(B ∘ W Aᵀ) + s² rowsum(B A Aᵀ ∘ B)`, so that neither `B A` nor a dense copy of `W` exists.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use super::dropout::DropoutStream;
use super::linear::{BaseWeight, LinearTape, LowRank, LowRankGradient};

/// Keeps a row of zeros from being divided by.
const SMALLEST_SQUARE: f32 = 1e-30;

/// The magnitudes of a linear's rows.
#[derive(Debug, Clone)]
pub struct Magnitude<B: Backend> {
    /// `m [out]`.
    pub values: Tensor<B, 1>,
    /// `1 / ‖W + s B A‖`, `[out]`.
    inverse_norms: Tensor<B, 1>,
    /// `‖W‖²`, `[out]`; it never changes.
    base_squares: Tensor<B, 1>,
}

impl<B: Backend> Magnitude<B> {
    /// Magnitudes of `weight` with the low-rank part `part`; `before` are those of the same weight with another part.
    pub(super) fn new(
        weight: &BaseWeight<B>,
        part: &LowRank<B>,
        values: Tensor<B, 1>,
        before: Option<Self>,
    ) -> Self {
        let base_squares = before.map_or_else(
            || weight.row_squares(&part.a.device()),
            |before| before.base_squares,
        );
        let (s, b) = (part.scaling, part.b.clone());
        let rows = |product: Tensor<B, 2>| product.sum_dim(1).squeeze_dim::<1>(1);
        let mixed = rows(b.clone() * weight.forward(part.a.clone()).transpose());
        let gram = part.a.clone().matmul(part.a.clone().transpose());
        let low = rows(b.clone().matmul(gram) * b);
        let squares = base_squares.clone() + mixed.mul_scalar(2.0 * s) + low.mul_scalar(s * s);
        Self {
            values,
            inverse_norms: squares.clamp_min(SMALLEST_SQUARE).sqrt().recip(),
            base_squares,
        }
    }

    /// `g [1, out]`.
    fn gains(&self) -> Tensor<B, 2> {
        (self.values.clone() * self.inverse_norms.clone()).unsqueeze::<2>()
    }

    /// `x [n, in]` to `[n, out]` without bias.
    pub(super) fn forward(
        &self,
        weight: &BaseWeight<B>,
        part: &LowRank<B>,
        x: Tensor<B, 2>,
        dropout: &DropoutStream,
    ) -> (Tensor<B, 2>, LinearTape<B>) {
        let base = weight.forward(x.clone());
        let dropped = dropout.apply(x);
        let frozen = match dropout.is_none() {
            true => base.clone(),
            false => weight.forward(dropped.clone()),
        };
        let projected = dropped.matmul(part.a.clone().transpose());
        let outer = projected.clone().matmul(part.b.clone().transpose());
        let combined = frozen.clone() + outer.mul_scalar(part.scaling);
        let y = combined.clone() * self.gains();
        let y = match dropout.is_none() {
            true => y,
            false => y + base - frozen,
        };
        let tape = LinearTape {
            projected: Some(projected),
            combined: Some(combined),
        };
        (y, tape)
    }

    /// The gradients of `x [n, in]` and of the low-rank part; see [`super::Linear::backward_rows`].
    pub(super) fn backward(
        &self,
        weight: &BaseWeight<B>,
        part: &LowRank<B>,
        (x, dy): (&Tensor<B, 2>, Tensor<B, 2>),
        (projected, combined): (Tensor<B, 2>, Tensor<B, 2>),
        dropout: &DropoutStream,
    ) -> (Tensor<B, 2>, LowRankGradient<B>) {
        let sums = (dy.clone() * combined).sum_dim(0).squeeze_dim::<1>(0);
        let d_magnitude = sums * self.inverse_norms.clone();
        let d_combined = dy.clone() * self.gains();
        let scaled = d_combined.clone().mul_scalar(part.scaling);
        let db = scaled.clone().transpose().matmul(projected);
        let inner = scaled.matmul(part.b.clone());
        let da = inner.clone().transpose().matmul(dropout.apply(x.clone()));
        let low = inner.matmul(part.a.clone());
        let dx = match dropout.is_none() {
            true => weight.backward(d_combined) + low,
            false => {
                let through_mask = weight.backward(d_combined - dy.clone()) + low;
                weight.backward(dy) + dropout.apply(through_mask)
            }
        };
        let gradient = LowRankGradient {
            a: da,
            b: db,
            magnitude: Some(d_magnitude),
        };
        (dx, gradient)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use burn::tensor::TensorData;

    use super::super::{BaseWeight, Cpu, DropoutStream, Linear, LowRank};
    use super::*;
    use crate::dtype::DType;
    use crate::packed::QuantMatrix;

    const ROWS: usize = 6;
    const INPUTS: usize = 32;
    const OUTPUTS: usize = 24;
    const RANK: usize = 3;
    const SCALING: f64 = 0.75;

    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        (0..n)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
            })
            .collect()
    }

    fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Tensor<Cpu, D> {
        Tensor::from_data(TensorData::new(values, shape), &Default::default())
    }

    fn wide(values: &[f32]) -> Vec<f64> {
        values.iter().map(|v| f64::from(*v)).collect()
    }

    /// `W + s B A` in double precision.
    fn whole(weight: &[f64], a: &[f64], b: &[f64]) -> Vec<f64> {
        let low = |i: usize| {
            (0..RANK)
                .map(|r| b[i / INPUTS * RANK + r] * a[r * INPUTS + i % INPUTS])
                .sum::<f64>()
        };
        (0..weight.len()).map(|i| weight[i] + SCALING * low(i)).collect()
    }

    fn norms(weight: &[f64]) -> Vec<f64> {
        let square = |row: &[f64]| row.iter().map(|w| w * w).sum::<f64>();
        weight.chunks(INPUTS).map(|row| square(row).sqrt()).collect()
    }

    /// `Σ w ∘ linear(x)` straight from the formula, the norms held.
    fn reference(points: &[Vec<f64>; 4], weight: &[f64], held: &[f64], mask: &[f32], w: &[f32]) -> f64 {
        let [x, a, b, m] = points;
        let whole = whole(weight, a, b);
        let mut total = 0.0;
        for row in 0..ROWS {
            for out in 0..OUTPUTS {
                let dot = |weight: &[f64], dropped: bool| {
                    let term = |i: usize| {
                        let kept = if dropped {
                            f64::from(mask[row * INPUTS + i])
                        } else {
                            1.0
                        };
                        x[row * INPUTS + i] * kept * weight[out * INPUTS + i]
                    };
                    (0..INPUTS).map(term).sum::<f64>()
                };
                let gain = m[out] / held[out];
                let y = dot(weight, false) - dot(weight, true) + gain * dot(&whole, true);
                total += f64::from(w[row * OUTPUTS + out]) * y;
            }
        }
        total
    }

    #[test]
    fn value_and_gradients_agree_with_the_formula_in_double_precision() {
        let values: Vec<u8> = (0..OUTPUTS * INPUTS).map(|i| (i * 7 % 16) as u8).collect();
        let scales = (0..OUTPUTS).map(|i| 0.02 + i as f32 * 0.001).collect();
        let matrix =
            QuantMatrix::pack([OUTPUTS, INPUTS], 4, INPUTS, &values, (scales, DType::F32), None).unwrap();
        let dense = matrix.dequantize();
        let weight = wide(&dense);
        let bases = [
            BaseWeight::Packed(Arc::new(matrix)),
            BaseWeight::Dense(tensor(dense, [OUTPUTS, INPUTS])),
        ];
        let [a, b, x, w] = [RANK * INPUTS, OUTPUTS * RANK, ROWS * INPUTS, ROWS * OUTPUTS]
            .iter()
            .zip(1..)
            .map(|(n, seed)| noise(*n, seed))
            .collect::<Vec<_>>()
            .try_into()
            .unwrap();
        let m: Vec<f32> = noise(OUTPUTS, 9).iter().map(|v| v + 1.0).collect();
        let held = norms(&whole(&weight, &wide(&a), &wide(&b)));
        for base in bases {
            for probability in [0.0, 0.4] {
                let mut linear = Linear {
                    weight: base.clone(),
                    bias: None,
                    low_rank: None,
                };
                let part = LowRank {
                    a: tensor(a.clone(), [RANK, INPUTS]),
                    b: tensor(b.clone(), [OUTPUTS, RANK]),
                    scaling: SCALING,
                    magnitude: None,
                };
                // The second call takes the cached squares.
                linear.adapt(part.clone(), Some(tensor(vec![1.0; OUTPUTS], [OUTPUTS])));
                linear.adapt(part, Some(tensor(m.clone(), [OUTPUTS])));
                let dropout = DropoutStream::new(probability, 4, 0);
                let mask = dropout.mask(ROWS, INPUTS);
                let input = tensor(x.clone(), [ROWS, INPUTS]);
                let (y, tape) = linear.forward_rows(input.clone(), &dropout);
                let points = [&x, &a, &b, &m].map(|v| wide(v));
                let expected = reference(&points, &weight, &held, &mask, &w);
                let y: Vec<f32> = y.into_data().into_vec().unwrap();
                let found: f64 = y.iter().zip(&w).map(|(y, w)| f64::from(*y) * f64::from(*w)).sum();
                assert!(
                    (found - expected).abs() < 1e-4 * expected.abs().max(1.0),
                    "{found} {expected}"
                );

                let dy = tensor(w.clone(), [ROWS, OUTPUTS]);
                let (dx, gradient) = linear.backward_rows(&input, tape, dy, &dropout);
                let gradient = gradient.unwrap();
                let found = [
                    dx.into_data(),
                    gradient.a.into_data(),
                    gradient.b.into_data(),
                    gradient.magnitude.unwrap().into_data(),
                ];
                for (which, found) in found.into_iter().enumerate() {
                    let found: Vec<f32> = found.into_vec().unwrap();
                    let size = found.iter().fold(1e-6f32, |most, v| most.max(v.abs()));
                    for (i, found) in found.iter().enumerate() {
                        let at = |step: f64| {
                            let mut moved = points.clone();
                            moved[which][i] += step;
                            reference(&moved, &weight, &held, &mask, &w)
                        };
                        let expected = (at(1e-4) - at(-1e-4)) / 2e-4;
                        let off = (f64::from(*found) - expected).abs();
                        assert!(
                            off < 2e-5 * f64::from(size),
                            "argument {which}, {i}, p {probability}: {found} {expected}"
                        );
                    }
                }
            }
        }
    }
}
