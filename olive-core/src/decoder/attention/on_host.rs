//! Attention where tensors are in host memory: layout and softmax in plain passes, products by the backend.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use super::Heads;
use crate::decoder::host::{self, CausalRows, HostTensor};
use crate::decoder::sequence::{QueryBlock, SequenceTables};

/// Sizes of heads that are stacked `groups` to a key head.
#[derive(Clone, Copy)]
struct Sizes {
    /// Key heads of all sequences.
    stacks: usize,
    groups: usize,
    seq: usize,
    head_dim: usize,
}

impl Sizes {
    fn new<B: Backend>(heads: &Heads<B>) -> Self {
        let [batch, n_heads, seq, head_dim] = heads.q.dims();
        let [_, kv_heads, _, _] = heads.k.dims();
        Self {
            stacks: batch * kv_heads,
            groups: n_heads / kv_heads,
            seq,
            head_dim,
        }
    }

    /// Positions `range` of every head of `x [heads, seq, d]`, one after another, times `scale`.
    fn gather(&self, x: &[f32], range: &std::ops::Range<usize>, scale: f32) -> Vec<f32> {
        let d = self.head_dim;
        let heads = x.chunks_exact(self.seq * d);
        let mut out = Vec::with_capacity(heads.len() * range.len() * d);
        for head in heads {
            let part = &head[range.start * d..range.end * d];
            out.extend(part.iter().map(|v| v * scale));
        }
        out
    }

    /// Adds `part`, positions `range` of every head, to `sums [heads, seq, d]`.
    fn scatter(&self, sums: &mut [f32], part: &[f32], range: &std::ops::Range<usize>) {
        let d = self.head_dim;
        let parts = part.chunks_exact(range.len() * d);
        for (head, part) in sums.chunks_exact_mut(self.seq * d).zip(parts) {
            let places = &mut head[range.start * d..range.end * d];
            for (sum, value) in places.iter_mut().zip(part) {
                *sum += value;
            }
        }
    }

    fn rows(
        &self,
        block: &std::ops::Range<usize>,
        keys: &std::ops::Range<usize>,
        window: usize,
    ) -> CausalRows {
        CausalRows {
            first_query: block.start,
            queries: block.len(),
            first_key: keys.start,
            keys: keys.len(),
            window,
        }
    }
}

/// A block's queries (scaled), keys and values as stacks of matrices, and its probabilities.
struct BlockParts<B: Backend> {
    q: Tensor<B, 3>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    probabilities: Vec<f32>,
    shape: [usize; 3],
}

fn block_parts<B: Backend>(
    [q, k, v]: [&[f32]; 3],
    sizes: Sizes,
    block: &QueryBlock<B>,
    (window, scale): (usize, f64),
    device: &B::Device,
) -> Option<BlockParts<B>> {
    let (stacks, d) = (sizes.stacks, sizes.head_dim);
    let (rows, keys) = (sizes.groups * block.queries.len(), block.keys.len());
    let gather = |x, range, scale, n| host::tensor(sizes.gather(x, range, scale), [stacks, n, d], device);
    let q: Tensor<B, 3> = gather(q, &block.queries, scale as f32, rows);
    let k: Tensor<B, 3> = gather(k, &block.keys, 1.0, keys);
    let v = gather(v, &block.keys, 1.0, keys);
    let mut scores = values(q.clone().matmul(k.clone().swap_dims(1, 2)))?;
    host::causal_softmax(&mut scores, sizes.rows(&block.queries, &block.keys, window));
    Some(BlockParts {
        q,
        k,
        v,
        probabilities: scores,
        shape: [stacks, rows, keys],
    })
}

fn values<B: Backend, const D: usize>(x: Tensor<B, D>) -> Option<Vec<f32>> {
    x.into_data().into_vec().ok()
}

/// As [`super::forward`]; `None` where the tensors are not in host memory.
pub(super) fn forward<B: Backend>(
    heads: &Heads<B>,
    tables: &SequenceTables<B>,
    scale: f64,
) -> Option<Tensor<B, 4>> {
    let device = heads.q.device();
    let (q, k, v) = (
        HostTensor::of(&heads.q)?,
        HostTensor::of(&heads.k)?,
        HostTensor::of(&heads.v)?,
    );
    let sizes = Sizes::new(heads);
    let mut output = vec![0.0; q.values().len()];
    for block in &tables.blocks {
        let inputs = [q.values(), k.values(), v.values()];
        let parts = block_parts(inputs, sizes, block, (tables.window, scale), &device)?;
        let p: Tensor<B, 3> = host::tensor(parts.probabilities, parts.shape, &device);
        sizes.scatter(&mut output, &values(p.matmul(parts.v))?, &block.queries);
    }
    Some(host::tensor(output, heads.q.dims(), &device))
}

/// As [`super::backward`]; `None` where the tensors are not in host memory.
pub(super) fn backward<B: Backend>(
    heads: &Heads<B>,
    output: &Tensor<B, 4>,
    d_output: &Tensor<B, 4>,
    tables: &SequenceTables<B>,
    scale: f64,
) -> Option<Heads<B>> {
    let device = heads.q.device();
    let (q, k, v) = (
        HostTensor::of(&heads.q)?,
        HostTensor::of(&heads.k)?,
        HostTensor::of(&heads.v)?,
    );
    let (output, d_output) = (HostTensor::of(output)?, HostTensor::of(d_output)?);
    let sizes = Sizes::new(heads);
    let d = sizes.head_dim;
    let mut dq = vec![0.0; q.values().len()];
    let (mut dk, mut dv) = (vec![0.0; k.values().len()], vec![0.0; v.values().len()]);
    for block in &tables.blocks {
        let inputs = [q.values(), k.values(), v.values()];
        let parts = block_parts(inputs, sizes, block, (tables.window, scale), &device)?;
        let [stacks, rows, _] = parts.shape;
        let d_rows = sizes.gather(d_output.values(), &block.queries, 1.0);
        let o_rows = sizes.gather(output.values(), &block.queries, 1.0);
        let row_sums = host::row_dots(&d_rows, &o_rows, d);
        let d_rows: Tensor<B, 3> = host::tensor(d_rows, [stacks, rows, d], &device);
        let mut ds = values(d_rows.clone().matmul(parts.v.swap_dims(1, 2)))?;
        host::softmax_backward(&parts.probabilities, &mut ds, &row_sums);
        let p: Tensor<B, 3> = host::tensor(parts.probabilities, parts.shape, &device);
        sizes.scatter(&mut dv, &values(p.swap_dims(1, 2).matmul(d_rows))?, &block.keys);
        let ds: Tensor<B, 3> = host::tensor(ds, parts.shape, &device);
        let dk_block = ds.clone().swap_dims(1, 2).matmul(parts.q);
        sizes.scatter(&mut dk, &values(dk_block)?, &block.keys);
        let dq_block = ds.matmul(parts.k).mul_scalar(scale);
        sizes.scatter(&mut dq, &values(dq_block)?, &block.queries);
    }
    Some(Heads {
        q: host::tensor(dq, heads.q.dims(), &device),
        k: host::tensor(dk, heads.k.dims(), &device),
        v: host::tensor(dv, heads.v.dims(), &device),
    })
}
