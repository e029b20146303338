//! Causal attention as batched products with a fused softmax, on rows `[q, k, v]` where they lie.
//!
//! Scores exist for some heads of one sequence at a time. The probabilities are computed again in the backward.

use super::batch::Batch;
use super::device::Gpu;
use super::gemm::Product;
use super::matrix::{Element, Matrix};
use crate::arch::ModelSpec;

/// Bytes of the scores that exist at a time: few enough to be cheap in memory, so many that the products of a sequence of
/// some thousand tokens are few calls.
const SCORE_BYTES: usize = 128 << 20;

/// Sizes of heads and where they are in a row.
#[derive(Debug, Clone, Copy)]
pub struct HeadLayout {
    /// Query heads.
    pub heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f64,
    /// Keys that a query sees, itself included.
    pub window: usize,
}

impl HeadLayout {
    /// Those of a model.
    pub fn new(spec: &ModelSpec) -> Self {
        Self {
            heads: spec.n_heads,
            kv_heads: spec.n_kv_heads,
            head_dim: spec.head_dim,
            scale: spec.attention_scale(),
            window: spec.sliding_window.unwrap_or(usize::MAX),
        }
    }

    /// Elements of a row of queries.
    pub fn q_size(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Elements of a row of queries, keys and values.
    pub fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Heads that are worked on together in a sequence of `length` tokens: some heads with keys of their own, or
    /// those that share one key head. First query head, first key head, how many, and how far apart their keys are.
    fn groups(&self, length: usize) -> Vec<Heads> {
        let shared = self.heads / self.kv_heads;
        let fit = (SCORE_BYTES / (length * length.next_multiple_of(8) * 4).max(1)).max(1);
        let step = if shared > 1 { shared } else { fit };
        (0..self.heads)
            .step_by(step)
            .map(|first| Heads {
                q: first * self.head_dim,
                k: (self.heads + first / shared) * self.head_dim,
                v: (self.heads + self.kv_heads + first / shared) * self.head_dim,
                count: step.min(self.heads - first),
                key_stride: if shared > 1 { 0 } else { self.head_dim },
            })
            .collect()
    }
}

/// Some heads of a row: first elements, how many, elements between their keys.
#[derive(Clone, Copy)]
struct Heads {
    q: usize,
    k: usize,
    v: usize,
    count: usize,
    key_stride: usize,
}

/// The probabilities of some heads of one sequence, `[heads * length, stride]`.
fn probabilities(
    gpu: &Gpu,
    qkv: &Matrix,
    layout: &HeadLayout,
    place: (usize, usize),
    heads: Heads,
) -> Matrix {
    let (first, length) = place;
    let d = layout.head_dim;
    let stride = length.next_multiple_of(8);
    let scores = gpu.empty(heads.count * length, stride, Element::F32);
    let q = qkv.from(first, heads.q).every(d);
    let k = qkv.from(first, heads.k).every(heads.key_stride);
    let out = scores.view().every(length * stride);
    gpu.product(Product::new([length, length, d], q, k.t(), out).batch(heads.count));
    let probabilities = gpu.empty(scores.rows, stride, Element::Bf16);
    gpu.causal_softmax(&scores, length, layout.scale, layout.window, &probabilities);
    probabilities
}

/// Attended values `[rows, heads * head_dim]` of rotated `qkv [rows, q + k + v]`, bfloat16.
pub fn forward(gpu: &Gpu, qkv: &Matrix, layout: &HeadLayout, batch: &Batch) -> Matrix {
    let attended = gpu.empty(qkv.rows, layout.q_size(), Element::Bf16);
    for place in &batch.sequences {
        let (first, length) = *place;
        for heads in layout.groups(length) {
            let p = probabilities(gpu, qkv, layout, *place, heads);
            let v = qkv.from(first, heads.v).every(heads.key_stride);
            let out = attended.from(first, heads.q).every(layout.head_dim);
            let p = p.view().every(length * p.cols);
            gpu.product(Product::new([length, layout.head_dim, length], p, v, out).batch(heads.count));
        }
    }
    attended
}

/// The gradient of `qkv` from that of the attended values.
pub fn backward(gpu: &Gpu, qkv: &Matrix, d_attended: &Matrix, layout: &HeadLayout, batch: &Batch) -> Matrix {
    let d_qkv = gpu.empty(qkv.rows, layout.width(), Element::Bf16);
    let d = layout.head_dim;
    for place in &batch.sequences {
        let (first, length) = *place;
        for heads in layout.groups(length) {
            let p = probabilities(gpu, qkv, layout, *place, heads);
            let apart = length * p.cols;
            let d_out = d_attended.from(first, heads.q).every(d);
            let v = qkv.from(first, heads.v).every(heads.key_stride);
            let slopes = gpu.empty(p.rows, p.cols, Element::F32);
            let out = slopes.view().every(apart);
            gpu.product(Product::new([length, length, d], d_out, v.t(), out).batch(heads.count));
            let sum_over_queries = |left: &Matrix, right: &Matrix, right_first: usize, out_first: usize| {
                let out = d_qkv.from(first, out_first).every(heads.key_stride);
                let left = left.t().every(apart);
                let right = right.from(first, right_first).every(d);
                let size = [length, d, length];
                if heads.key_stride > 0 {
                    gpu.product(Product::new(size, left, right, out).batch(heads.count));
                    return;
                }
                // Heads that share a key add up.
                for head in 0..heads.count {
                    let (left, right) = (left.shifted(head * apart), right.shifted(head * d));
                    let product = Product::new(size, left, right, out);
                    gpu.product(if head == 0 { product } else { product.accumulate() });
                }
            };
            sum_over_queries(&p, d_attended, heads.q, heads.v);
            gpu.softmax_backward(&p, &slopes, length, layout.scale);
            sum_over_queries(&p, qkv, heads.q, heads.k);
            let k = qkv.from(first, heads.k).every(heads.key_stride);
            let dq = d_qkv.from(first, heads.q).every(d);
            gpu.product(Product::new([length, d, length], p.view().every(apart), k, dq).batch(heads.count));
        }
    }
    d_qkv
}
