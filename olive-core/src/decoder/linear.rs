//! Linears as a kind of weight: dense or packed, frozen, each with an optional bias and an optional low-rank part.
//!
//! `y = x Wᵀ + bias + s · dropout(x) Aᵀ Bᵀ`. The backward is written by hand: it gives the gradient of `x`, of `A`
//! and of `B`, and never one of `W`. A packed `W` stays packed; a block of its rows is dequantized when it is
//! multiplied, in the backward again, and dropped. With magnitudes it is DoRA's form instead (`dora.rs`).

use std::sync::Arc;

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;

use super::dora::Magnitude;
use super::dropout::DropoutStream;
use super::host::{self, HostTensor};
use super::matmul::{self, add_times, add_times_transposed, times, times_transposed, transposed_times};
use crate::kernels::{View, product_parallel};
use crate::packed::QuantMatrix;
use crate::packed::nf4::Nf4Matrix;
use crate::weight::{LinearWeight, WeightKind};

/// Elements of a packed weight that are dequantized at a time.
const BLOCK_ELEMENTS: usize = 1 << 20;

/// A frozen weight `[out, in]`.
#[derive(Debug, Clone)]
pub enum BaseWeight<B: Backend> {
    /// `[out, in]`.
    Dense(Tensor<B, 2>),
    /// Packed integers in host memory.
    Packed(Arc<QuantMatrix>),
    /// Packed normal floats in host memory.
    Nf4(Arc<Nf4Matrix>),
}

impl<B: Backend> BaseWeight<B> {
    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => weight.dims(),
            Self::Packed(matrix) => [matrix.rows, matrix.cols],
            Self::Nf4(matrix) => [matrix.rows, matrix.cols],
        }
    }

    /// `x Wᵀ`: `[n, in]` to `[n, out]`.
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let packed = match self {
            Self::Dense(weight) => return times_transposed(&x, weight, 1.0),
            packed => packed,
        };
        let ([n, inputs], [outputs, _]) = (x.dims(), self.shape());
        let Some(rows) = HostTensor::of(&x) else {
            let blocks = row_blocks(packed.shape())
                .map(|rows| x.clone().matmul(packed.dequantize(rows, &x.device()).transpose()))
                .collect();
            return Tensor::cat(blocks, 1);
        };
        let x_view = View::new(rows.values(), [n, inputs], inputs);
        let mut y = vec![0.0; n * outputs];
        for block in row_blocks(packed.shape()) {
            let weight = packed.dequantize_rows(block.clone());
            let weight = View::new(&weight, [block.len(), inputs], inputs).transposed();
            product_parallel(&mut y[block.start..], outputs, false, 1.0, x_view, weight);
        }
        host::tensor(y, [n, outputs], &x.device())
    }

    /// `dy W`: `[n, out]` to `[n, in]`.
    pub fn backward(&self, dy: Tensor<B, 2>) -> Tensor<B, 2> {
        let packed = match self {
            Self::Dense(weight) => return times(&dy, weight, 1.0),
            packed => packed,
        };
        let ([n, outputs], [_, inputs]) = (dy.dims(), self.shape());
        let Some(rows) = HostTensor::of(&dy) else {
            let blocks = row_blocks(packed.shape()).map(|rows| {
                let part = dy.clone().slice([0..n, rows.clone()]);
                part.matmul(packed.dequantize(rows, &dy.device()))
            });
            return blocks
                .reduce(|sum, block| sum + block)
                .unwrap_or_else(|| Tensor::zeros([n, inputs], &dy.device()));
        };
        let mut dx = vec![0.0; n * inputs];
        for block in row_blocks(packed.shape()) {
            let weight = packed.dequantize_rows(block.clone());
            let weight = View::new(&weight, [block.len(), inputs], inputs);
            let dy_view = View::new(&rows.values()[block.start..], [n, block.len()], outputs);
            product_parallel(&mut dx, inputs, true, 1.0, dy_view, weight);
        }
        host::tensor(dx, [n, inputs], &dy.device())
    }

    /// `‖W‖²` of each row, `[out]`.
    pub(super) fn row_squares(&self, device: &B::Device) -> Tensor<B, 1> {
        let of = |rows: Tensor<B, 2>| (rows.clone() * rows).sum_dim(1).squeeze_dim::<1>(1);
        match self {
            Self::Dense(weight) => of(weight.clone()),
            packed => {
                let blocks = row_blocks(packed.shape()).map(|rows| of(packed.dequantize(rows, device)));
                Tensor::cat(blocks.collect(), 0)
            }
        }
    }

    /// Rows of the weight, dense.
    fn dequantize(&self, rows: std::ops::Range<usize>, device: &B::Device) -> Tensor<B, 2> {
        let [_, cols] = self.shape();
        if let Self::Dense(weight) = self {
            return weight.clone().slice([rows, 0..cols]);
        }
        let shape = [rows.len(), cols];
        Tensor::from_data(TensorData::new(self.dequantize_rows(rows), shape), device)
    }

    /// Rows of a packed weight, dense; nothing of a dense one.
    fn dequantize_rows(&self, rows: std::ops::Range<usize>) -> Vec<f32> {
        const ROWS: usize = 32;
        let [_, cols] = self.shape();
        let mut values = vec![0.0f32; rows.len() * cols];
        let pieces = values.par_chunks_mut((ROWS * cols).max(1)).enumerate();
        pieces.for_each(|(index, values)| match self {
            Self::Dense(_) => (),
            Self::Packed(matrix) => matrix.dequantize_rows(rows.start + index * ROWS, values),
            Self::Nf4(matrix) => matrix.dequantize_rows(rows.start + index * ROWS, values),
        });
        values
    }
}

/// Ranges of rows that are dequantized together.
fn row_blocks([rows, cols]: [usize; 2]) -> impl Iterator<Item = std::ops::Range<usize>> {
    let step = (BLOCK_ELEMENTS / cols.max(1)).max(1);
    (0..rows)
        .step_by(step)
        .map(move |first| first..(first + step).min(rows))
}

/// The low-rank part `s · B A` of a linear.
#[derive(Debug, Clone)]
pub struct LowRank<B: Backend> {
    /// `A [rank, in]`.
    pub a: Tensor<B, 2>,
    /// `B [out, rank]`.
    pub b: Tensor<B, 2>,
    /// `s`: alpha / rank, or alpha / √rank.
    pub scaling: f64,
    /// DoRA's magnitudes of the rows; see [`Linear::adapt`].
    pub magnitude: Option<Magnitude<B>>,
}

/// Gradients of a low-rank part.
#[derive(Debug, Clone)]
pub struct LowRankGradient<B: Backend> {
    /// As `A [rank, in]`.
    pub a: Tensor<B, 2>,
    /// As `B [out, rank]`.
    pub b: Tensor<B, 2>,
    /// As the magnitudes `[out]`, where there are any.
    pub magnitude: Option<Tensor<B, 1>>,
}

/// What the backward of a linear needs from its forward besides the input.
#[derive(Debug, Clone)]
pub struct LinearTape<B: Backend> {
    /// `dropout(x) Aᵀ [n, rank]`.
    pub(super) projected: Option<Tensor<B, 2>>,
    /// `dropout(x) (W + s B A)ᵀ [n, out]`, of a linear with magnitudes.
    pub(super) combined: Option<Tensor<B, 2>>,
}

/// `y = x Wᵀ + bias + s · dropout(x) Aᵀ Bᵀ`.
#[derive(Debug, Clone)]
pub struct Linear<B: Backend> {
    /// The frozen weight `[out, in]`.
    pub weight: BaseWeight<B>,
    /// `[out]`.
    pub bias: Option<Tensor<B, 1>>,
    /// The trainable part.
    pub low_rank: Option<LowRank<B>>,
}

impl<B: Backend> Linear<B> {
    /// A linear on `device`; a packed weight stays packed in host memory.
    pub fn new(stored: LinearWeight, [rows, cols]: [usize; 2], device: &B::Device) -> Self {
        let weight = match stored.weight {
            WeightKind::Dense(values, _) => {
                BaseWeight::Dense(Tensor::from_data(TensorData::new(values, [rows, cols]), device))
            }
            WeightKind::Packed(matrix) => BaseWeight::Packed(Arc::new(matrix)),
            WeightKind::Nf4(matrix) => BaseWeight::Nf4(Arc::new(matrix)),
        };
        let bias = stored
            .bias
            .map(|values| Tensor::from_data(TensorData::new(values, [rows]), device));
        Self {
            weight,
            bias,
            low_rank: None,
        }
    }

    /// A dense linear from a tensor `[out, in]`.
    pub fn dense(weight: Tensor<B, 2>, bias: Option<Tensor<B, 1>>) -> Self {
        Self {
            weight: BaseWeight::Dense(weight),
            bias,
            low_rank: None,
        }
    }

    /// Gives the linear a low-rank part, replacing any that it has; with `magnitudes [out]` it is DoRA's. The norms of
    /// the rows are computed here, and count as constants until the next call.
    pub fn adapt(&mut self, part: LowRank<B>, magnitudes: Option<Tensor<B, 1>>) {
        let before = self.low_rank.take().and_then(|part| part.magnitude);
        let magnitude = magnitudes.map(|values| Magnitude::new(&self.weight, &part, values, before));
        self.low_rank = Some(LowRank { magnitude, ..part });
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        self.weight.shape()
    }

    /// `[batch, seq, in]` to `[batch, seq, out]`, without dropout.
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let [batch, seq, inputs] = x.dims();
        let [outputs, _] = self.shape();
        let (y, _) = self.forward_rows(x.reshape([batch * seq, inputs]), &DropoutStream::none());
        y.reshape([batch, seq, outputs])
    }

    /// `[n, in]` to `[n, out]`, with what [`Linear::backward_rows`] needs.
    pub fn forward_rows(&self, x: Tensor<B, 2>, dropout: &DropoutStream) -> (Tensor<B, 2>, LinearTape<B>) {
        let (mut y, tape) = match &self.low_rank {
            Some(part) => match &part.magnitude {
                Some(magnitude) => magnitude.forward(&self.weight, part, x, dropout),
                None => {
                    let y = self.weight.forward(x.clone());
                    let inner = times_transposed(&dropout.apply(x), &part.a, 1.0);
                    let y = add_times_transposed(y, &inner, &part.b, part.scaling);
                    let tape = LinearTape {
                        projected: Some(inner),
                        combined: None,
                    };
                    (y, tape)
                }
            },
            None => {
                let tape = LinearTape {
                    projected: None,
                    combined: None,
                };
                (self.weight.forward(x), tape)
            }
        };
        if let Some(bias) = &self.bias {
            y = add_bias(y, bias);
        }
        (y, tape)
    }

    /// From `dy [n, out]` the gradient of `x [n, in]`, and those of the low-rank part. `x` and `dropout` are what
    /// the forward was given.
    pub fn backward_rows(
        &self,
        x: &Tensor<B, 2>,
        tape: LinearTape<B>,
        dy: Tensor<B, 2>,
        dropout: &DropoutStream,
    ) -> (Tensor<B, 2>, Option<LowRankGradient<B>>) {
        let (Some(low_rank), Some(projected)) = (&self.low_rank, tape.projected) else {
            return (self.weight.backward(dy), None);
        };
        if let (Some(magnitude), Some(combined)) = (&low_rank.magnitude, tape.combined) {
            let tape = (projected, combined);
            let (dx, gradient) = magnitude.backward(&self.weight, low_rank, (x, dy), tape, dropout);
            return (dx, Some(gradient));
        }
        let dx = self.weight.backward(dy.clone());
        let db = transposed_times(&dy, &projected, low_rank.scaling);
        let inner = times(&dy, &low_rank.b, low_rank.scaling);
        let da = transposed_times(&inner, &dropout.apply(x.clone()), 1.0);
        let dx = match dropout.is_none() {
            true => add_times(dx, &inner, &low_rank.a, 1.0),
            false => matmul::add(dx, dropout.apply(times(&inner, &low_rank.a, 1.0))),
        };
        let gradient = LowRankGradient {
            a: da,
            b: db,
            magnitude: None,
        };
        (dx, Some(gradient))
    }
}

/// `y [n, out]` with the bias on every row.
fn add_bias<B: Backend>(y: Tensor<B, 2>, bias: &Tensor<B, 1>) -> Tensor<B, 2> {
    let (shape, device) = (y.dims(), y.device());
    match HostTensor::of(bias) {
        Some(bias) => {
            let mut values = host::take(y);
            host::add_to_rows(&mut values, bias.values());
            host::tensor(values, shape, &device)
        }
        None => y + bias.clone().unsqueeze::<2>(),
    }
}
