//! Linears as a kind of weight: dense or packed, frozen, each with an optional bias and an optional low-rank part.
//!
//! `y = x Wᵀ + bias + s · dropout(x) Aᵀ Bᵀ`. The backward is written by hand: it gives the gradient of `x`, of `A`
//! and of `B`, and never one of `W`. A packed `W` stays packed; a block of its rows is dequantized when it is
//! multiplied, in the backward again, and dropped.

use std::sync::Arc;

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};

use super::dropout::DropoutStream;
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
        match self {
            Self::Dense(weight) => x.matmul(weight.clone().transpose()),
            packed => {
                let blocks = row_blocks(packed.shape())
                    .map(|rows| x.clone().matmul(packed.dequantize(rows, &x.device()).transpose()))
                    .collect();
                Tensor::cat(blocks, 1)
            }
        }
    }

    /// `dy W`: `[n, out]` to `[n, in]`.
    pub fn backward(&self, dy: Tensor<B, 2>) -> Tensor<B, 2> {
        match self {
            Self::Dense(weight) => dy.matmul(weight.clone()),
            packed => {
                let [n, _] = dy.dims();
                let [_, cols] = packed.shape();
                let blocks = row_blocks(packed.shape()).map(|rows| {
                    let part = dy.clone().slice([0..n, rows.clone()]);
                    part.matmul(packed.dequantize(rows, &dy.device()))
                });
                blocks
                    .reduce(|sum, block| sum + block)
                    .unwrap_or_else(|| Tensor::zeros([n, cols], &dy.device()))
            }
        }
    }

    /// Rows of the weight, dense.
    fn dequantize(&self, rows: std::ops::Range<usize>, device: &B::Device) -> Tensor<B, 2> {
        let [_, cols] = self.shape();
        let mut values = vec![0.0f32; rows.len() * cols];
        match self {
            Self::Dense(weight) => return weight.clone().slice([rows, 0..cols]),
            Self::Packed(matrix) => matrix.dequantize_rows(rows.start, &mut values),
            Self::Nf4(matrix) => matrix.dequantize_rows(rows.start, &mut values),
        }
        Tensor::from_data(TensorData::new(values, [rows.len(), cols]), device)
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
}

/// Gradients of a low-rank part.
#[derive(Debug, Clone)]
pub struct LowRankGradient<B: Backend> {
    /// As `A [rank, in]`.
    pub a: Tensor<B, 2>,
    /// As `B [out, rank]`.
    pub b: Tensor<B, 2>,
}

/// What the backward of a linear needs from its forward besides the input.
#[derive(Debug, Clone)]
pub struct LinearTape<B: Backend> {
    /// `dropout(x) Aᵀ [n, rank]`.
    projected: Option<Tensor<B, 2>>,
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
        let mut y = self.weight.forward(x.clone());
        let mut projected = None;
        if let Some(low_rank) = &self.low_rank {
            let dropped = dropout.apply(x);
            let inner = dropped.matmul(low_rank.a.clone().transpose());
            let outer = inner.clone().matmul(low_rank.b.clone().transpose());
            y = y + outer.mul_scalar(low_rank.scaling);
            projected = Some(inner);
        }
        if let Some(bias) = &self.bias {
            y = y + bias.clone().unsqueeze::<2>();
        }
        (y, LinearTape { projected })
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
        let dx = self.weight.backward(dy.clone());
        let (Some(low_rank), Some(projected)) = (&self.low_rank, tape.projected) else {
            return (dx, None);
        };
        let db = dy
            .clone()
            .transpose()
            .matmul(projected)
            .mul_scalar(low_rank.scaling);
        let inner = dy.matmul(low_rank.b.clone()).mul_scalar(low_rank.scaling);
        let da = inner.clone().transpose().matmul(dropout.apply(x.clone()));
        let dx = dx + dropout.apply(inner.matmul(low_rank.a.clone()));
        (dx, Some(LowRankGradient { a: da, b: db }))
    }
}
