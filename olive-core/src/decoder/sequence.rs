//! What depends on the length of a sequence only: rotary tables and attention masks, made once and shared.

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};

use super::host;
use crate::arch::ModelSpec;

/// Queries that attend together; the scores of a block are the largest tensor of attention.
const QUERY_BLOCK: usize = 256;

/// Consecutive queries and the keys that any of them sees.
#[derive(Debug, Clone)]
pub struct QueryBlock<B: Backend> {
    /// The queries.
    pub queries: std::ops::Range<usize>,
    /// The keys.
    pub keys: std::ops::Range<usize>,
    /// `[groups * queries, keys]`: 0 where a query sees a key, minus infinity elsewhere; the rows are repeated for
    /// the query heads that share a key head.
    pub mask: Tensor<B, 2>,
}

/// Rotary tables and causal masks for sequences of one length.
#[derive(Debug, Clone)]
pub struct SequenceTables<B: Backend> {
    /// Tokens of a sequence.
    pub length: usize,
    /// `[1, 1, length, rotary_dim / 2]`.
    pub cos: Tensor<B, 4>,
    /// `[1, 1, length, rotary_dim / 2]`.
    pub sin: Tensor<B, 4>,
    /// Keys that a query sees, itself included.
    pub window: usize,
    /// Blocks of queries, in order; none where tensors are in host memory.
    pub blocks: Vec<QueryBlock<B>>,
}

impl<B: Backend> SequenceTables<B> {
    /// Tables for sequences of `length` tokens from position 0. Longrope's factors are chosen by that length.
    pub fn new(spec: &ModelSpec, length: usize, device: &B::Device) -> Self {
        Self::for_part(spec, length, length, device)
    }

    /// Tables for the first `length` tokens of sequences that have `total` of them, padding included.
    pub fn for_part(spec: &ModelSpec, length: usize, total: usize, device: &B::Device) -> Self {
        let half = spec.rope.rotary_dim / 2;
        let (cos, sin) = rotary_tables(spec, length, total);
        let table = |values| Tensor::from_data(TensorData::new(values, [1, 1, length, half]), device);
        Self {
            length,
            cos: table(cos),
            sin: table(sin),
            window: spec.sliding_window.unwrap_or(usize::MAX),
            blocks: match host::is_host::<B>() {
                // Attention in host memory needs no masks.
                true => Vec::new(),
                false => query_blocks(spec, length, device),
            },
        }
    }

    /// Rotates `x [batch, heads, length, head_dim]`: the first `rotary_dim` elements as two halves, the rest kept.
    pub fn rotate(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        self.rotate_by(x, self.sin.clone())
    }

    /// The gradient of the input of [`SequenceTables::rotate`]: the opposite rotation.
    pub fn rotate_back(&self, dy: Tensor<B, 4>) -> Tensor<B, 4> {
        self.rotate_by(dy, self.sin.clone().neg())
    }

    fn rotate_by(&self, x: Tensor<B, 4>, sin: Tensor<B, 4>) -> Tensor<B, 4> {
        let [batch, heads, length, head_dim] = x.dims();
        let [_, _, _, half] = sin.dims();
        let part = |from: usize, to: usize| x.clone().slice([0..batch, 0..heads, 0..length, from..to]);
        let (first, second) = (part(0, half), part(half, 2 * half));
        let cos = self.cos.clone();
        let mut parts = vec![
            first.clone() * cos.clone() - second.clone() * sin.clone(),
            second * cos + first * sin,
        ];
        if 2 * half < head_dim {
            parts.push(part(2 * half, head_dim));
        }
        Tensor::cat(parts, 3)
    }
}

/// Cosines and sines `[length, rotary_dim / 2]` of the first `length` positions of sequences of `total` tokens.
pub(crate) fn rotary_tables(spec: &ModelSpec, length: usize, total: usize) -> (Vec<f32>, Vec<f32>) {
    let half = spec.rope.rotary_dim / 2;
    let factor = spec.rope.attention_factor() as f32;
    // Angles are products of single-precision numbers, as in the reference implementation: with exact angles
    // the logits of late positions would differ in the fifth digit.
    let frequencies: Vec<f32> = spec
        .rope
        .inverse_frequencies(total)
        .into_iter()
        .map(|f| f as f32)
        .collect();
    let angles =
        (0..length).flat_map(|position| frequencies.iter().map(move |f| f64::from(position as f32 * f)));
    let (mut cos, mut sin) = (
        Vec::with_capacity(length * half),
        Vec::with_capacity(length * half),
    );
    for angle in angles {
        cos.push(angle.cos() as f32 * factor);
        sin.push(angle.sin() as f32 * factor);
    }
    (cos, sin)
}

fn query_blocks<B: Backend>(spec: &ModelSpec, length: usize, device: &B::Device) -> Vec<QueryBlock<B>> {
    let groups = spec.n_heads / spec.n_kv_heads;
    let window = spec.sliding_window.unwrap_or(usize::MAX);
    (0..length)
        .step_by(QUERY_BLOCK)
        .map(|first| {
            let queries = first..(first + QUERY_BLOCK).min(length);
            let keys = (first + 1).saturating_sub(window)..queries.end;
            let mut mask = Vec::with_capacity(groups * queries.len() * keys.len());
            for _ in 0..groups {
                for query in queries.clone() {
                    mask.extend(keys.clone().map(|key| {
                        let seen = key <= query && query - key < window;
                        if seen { 0.0 } else { f32::NEG_INFINITY }
                    }));
                }
            }
            let shape = [groups * queries.len(), keys.len()];
            let mask = Tensor::from_data(TensorData::new(mask, shape), device);
            QueryBlock { queries, keys, mask }
        })
        .collect()
}
