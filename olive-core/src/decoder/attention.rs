//! Causal scaled-dot-product attention over heads, a block of queries at a time, with its backward, in the backend's
//! own operations; in host memory [`crate::kernels::attention`] does the same.
//!
//! `P = softmax(s · Q Kᵀ + mask)`, `O = P V`. Query heads that share a key head are stacked as rows, so that no key or
//! value is repeated. The probabilities are computed again in the backward:
//! `dV = Pᵀ dO`, `dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O))`, `dQ = s · dS K`, `dK = s · dSᵀ Q`.

use burn::tensor::Tensor;
use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;

use super::sequence::{QueryBlock, SequenceTables};

/// Queries, keys and values after rotation: `q [batch, heads, seq, head_dim]`, `k` and `v`
/// `[batch, kv_heads, seq, head_dim]`.
#[derive(Debug, Clone)]
pub struct Heads<B: Backend> {
    /// Queries.
    pub q: Tensor<B, 4>,
    /// Keys.
    pub k: Tensor<B, 4>,
    /// Values.
    pub v: Tensor<B, 4>,
}

/// The rows of one block: `[batch, heads, seq, d]` to `[batch, kv_heads, groups * queries, d]`.
fn stack<B: Backend>(x: &Tensor<B, 4>, block: &QueryBlock<B>, kv_heads: usize) -> Tensor<B, 4> {
    let [batch, heads, _, d] = x.dims();
    let rows = x.clone().slice([0..batch, 0..heads, block.queries.clone(), 0..d]);
    rows.reshape([batch, kv_heads, heads / kv_heads * block.queries.len(), d])
}

/// The inverse of [`stack`] for the rows of one block.
fn unstack<B: Backend>(x: Tensor<B, 4>, block: &QueryBlock<B>, heads: usize) -> Tensor<B, 4> {
    let [batch, _, _, d] = x.dims();
    x.reshape([batch, heads, block.queries.len(), d])
}

fn keys_of<B: Backend>(x: &Tensor<B, 4>, block: &QueryBlock<B>) -> Tensor<B, 4> {
    let [batch, heads, _, d] = x.dims();
    x.clone().slice([0..batch, 0..heads, block.keys.clone(), 0..d])
}

fn probabilities<B: Backend>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    block: &QueryBlock<B>,
    scale: f64,
) -> Tensor<B, 4> {
    let scores = q.mul_scalar(scale).matmul(k.swap_dims(2, 3));
    softmax(scores + block.mask.clone().unsqueeze::<4>(), 3)
}

/// Attention output `[batch, heads, seq, head_dim]`; `scale` multiplies the scores.
pub fn forward<B: Backend>(heads: &Heads<B>, tables: &SequenceTables<B>, scale: f64) -> Tensor<B, 4> {
    let [_, n_heads, _, _] = heads.q.dims();
    let [_, kv_heads, _, _] = heads.k.dims();
    let blocks = tables.blocks.iter().map(|block| {
        let q = stack(&heads.q, block, kv_heads);
        let p = probabilities(q, keys_of(&heads.k, block), block, scale);
        unstack(p.matmul(keys_of(&heads.v, block)), block, n_heads)
    });
    Tensor::cat(blocks.collect(), 2)
}

/// Gradients of queries, keys and values from that of the output.
pub fn backward<B: Backend>(
    heads: &Heads<B>,
    output: &Tensor<B, 4>,
    d_output: Tensor<B, 4>,
    tables: &SequenceTables<B>,
    scale: f64,
) -> Heads<B> {
    let [batch, n_heads, seq, d] = heads.q.dims();
    let [_, kv_heads, _, _] = heads.k.dims();
    let row_sums = (d_output.clone() * output.clone()).sum_dim(3);
    let mut dq = Vec::with_capacity(tables.blocks.len());
    let mut dk: Tensor<B, 4> = Tensor::zeros([batch, kv_heads, seq, d], &d_output.device());
    let mut dv = dk.clone();
    for block in &tables.blocks {
        let (q, k, v) = (
            stack(&heads.q, block, kv_heads),
            keys_of(&heads.k, block),
            keys_of(&heads.v, block),
        );
        let p = probabilities(q.clone(), k.clone(), block, scale);
        let dout = stack(&d_output, block, kv_heads);
        let range = [0..batch, 0..kv_heads, block.keys.clone(), 0..d];
        let dv_block = p.clone().swap_dims(2, 3).matmul(dout.clone());
        let dp = dout.matmul(v.swap_dims(2, 3));
        let ds = p * (dp - stack(&row_sums, block, kv_heads));
        let dk_block = ds.clone().swap_dims(2, 3).matmul(q.mul_scalar(scale));
        dq.push(unstack(ds.matmul(k).mul_scalar(scale), block, n_heads));
        let (dk_sum, dv_sum) = (keys_of(&dk, block) + dk_block, keys_of(&dv, block) + dv_block);
        dk = dk.slice_assign(range.clone(), dk_sum);
        dv = dv.slice_assign(range, dv_sum);
    }
    Heads {
        q: Tensor::cat(dq, 2),
        k: dk,
        v: dv,
    }
}
