//! Causal attention on the rows that the q, k and v projections give, in place: no head is copied out or transposed.
//!
//! A row is `[q heads, k heads, v heads]`; the sequences of a batch are consecutive rows. Scores exist for a block of
//! queries of one head at a time, and are computed again in the backward:
//! `dV = Pᵀ dO`, `dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O))`, `dQ = s · dS K`, `dK = s · dSᵀ Q`.

use std::cell::RefCell;

use rayon::prelude::*;

use super::exp::{dot, exp, largest, sum};
use super::{View, product, wide};

/// Queries that attend together.
const QUERIES: usize = 128;

thread_local! {
    /// Probabilities and their gradient.
    static SCORES: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// Heads of a layer, and which keys they see.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowAttention {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; each is read by `n_heads / n_kv_heads` consecutive query heads.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Keys that a query sees, itself included.
    pub window: usize,
    /// Multiplies the scores.
    pub scale: f32,
}

/// A block of queries and the keys that any of them sees.
#[derive(Clone, Copy)]
struct Block {
    first: usize,
    queries: usize,
    first_key: usize,
    keys: usize,
}

impl RowAttention {
    /// Elements of a row of queries, keys and values.
    pub fn width(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Elements of a row of attended values.
    pub fn out_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Attended values `[seq, n_heads · head_dim]` of one sequence `qkv [seq, width]`, on this thread.
    pub fn forward(&self, qkv: &[f32], out: &mut [f32]) {
        for head in 0..self.n_heads {
            self.forward_head(qkv, head, &mut out[head * self.head_dim..], self.out_width());
        }
    }

    /// Attended values of sequences of `lengths` rows, shared by the threads of the pool.
    pub fn forward_parallel(&self, qkv: &[f32], lengths: &[usize]) -> Vec<f32> {
        let rows: usize = lengths.iter().sum();
        let mut out = vec![0.0; rows * self.out_width()];
        if rayon::current_num_threads() == 1 {
            for (own, out) in
                parts(qkv, lengths, self.width()).zip(parts_mut(&mut out, lengths, self.out_width()))
            {
                self.forward(own, out);
            }
            return out;
        }
        let d = self.head_dim;
        let heads = self.tasks(qkv, lengths, self.n_heads, |qkv, head| {
            let mut own = vec![0.0; qkv.len() / self.width() * d];
            self.forward_head(qkv, head, &mut own, d);
            own
        });
        let sequences = parts_mut(&mut out, lengths, self.out_width()).collect::<Vec<_>>();
        let pairs = sequences.into_par_iter().zip(heads.par_chunks(self.n_heads));
        pairs.for_each(|(out, heads)| {
            for (head, values) in heads.iter().enumerate() {
                place(values, (0, d), d, out, (head * d, self.out_width()));
            }
        });
        out
    }

    /// The gradient of `qkv` from that of the attended values; `out` are the attended values. Rows as in
    /// [`RowAttention::forward_parallel`].
    pub fn backward_parallel(&self, qkv: &[f32], out: &[f32], d_out: &[f32], lengths: &[usize]) -> Vec<f32> {
        let (d, groups, width) = (self.head_dim, self.groups(), self.width());
        let mut d_qkv = vec![0.0; qkv.len()];
        let starts = starts(lengths);
        let stacks = self.tasks_at(lengths, self.n_kv_heads, |sequence, head| {
            let range =
                |width: usize| starts[sequence] * width..(starts[sequence] + lengths[sequence]) * width;
            let outer = range(self.out_width());
            self.backward_stack(&qkv[range(width)], &out[outer.clone()], &d_out[outer], head)
        });
        let sequences = parts_mut(&mut d_qkv, lengths, width).collect::<Vec<_>>();
        let pairs = sequences.into_par_iter().zip(stacks.par_chunks(self.n_kv_heads));
        pairs.for_each(|(rows, stacks)| {
            let own = (groups + 2) * d;
            for (head, values) in stacks.iter().enumerate() {
                place(values, (0, own), groups * d, rows, (head * groups * d, width));
                place(
                    values,
                    (groups * d, own),
                    d,
                    rows,
                    ((self.n_heads + head) * d, width),
                );
                let value_column = (self.n_heads + self.n_kv_heads + head) * d;
                place(values, ((groups + 1) * d, own), d, rows, (value_column, width));
            }
        });
        d_qkv
    }

    fn groups(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    fn tasks<T: Send>(
        &self,
        rows: &[f32],
        lengths: &[usize],
        heads: usize,
        run: impl Fn(&[f32], usize) -> T + Sync,
    ) -> Vec<T> {
        let sequences: Vec<&[f32]> = parts(rows, lengths, self.width()).collect();
        self.tasks_at(lengths, heads, |sequence, head| run(sequences[sequence], head))
    }

    /// `run(sequence, head)` for all of them.
    fn tasks_at<T: Send>(
        &self,
        lengths: &[usize],
        heads: usize,
        run: impl Fn(usize, usize) -> T + Sync,
    ) -> Vec<T> {
        let all = 0..lengths.len() * heads;
        all.into_par_iter()
            .map(|index| run(index / heads, index % heads))
            .collect()
    }

    fn blocks(&self, seq: usize) -> impl Iterator<Item = Block> + use<> {
        let window = self.window;
        (0..seq).step_by(QUERIES).map(move |first| {
            let queries = QUERIES.min(seq - first);
            let first_key = (first + 1).saturating_sub(window);
            Block {
                first,
                queries,
                first_key,
                keys: first + queries - first_key,
            }
        })
    }

    /// Rows `first..first + count` of the head at column `head * head_dim`.
    fn head<'a>(&self, rows: &'a [f32], width: usize, head: usize, [first, count]: [usize; 2]) -> View<'a> {
        let start = first * width + head * self.head_dim;
        View::new(&rows[start..], [count, self.head_dim], width)
    }

    /// `softmax(s Q Kᵀ)` of a block of queries of a head.
    fn probabilities(&self, qkv: &[f32], head: usize, block: Block, scores: &mut Vec<f32>) {
        let width = self.width();
        let key_head = self.n_heads + head / self.groups();
        let q = self.head(qkv, width, head, [block.first, block.queries]);
        let k = self.head(qkv, width, key_head, [block.first_key, block.keys]);
        scores.resize(block.queries * block.keys, 0.0);
        product(scores, block.keys, false, self.scale, q, k.transposed());
        wide(softmax_rows, (scores.as_mut_slice(), block, self.window));
    }

    fn forward_head(&self, qkv: &[f32], head: usize, out: &mut [f32], stride: usize) {
        let width = self.width();
        let value_head = self.n_heads + self.n_kv_heads + head / self.groups();
        SCORES.with_borrow_mut(|[scores, _]| {
            for block in self.blocks(qkv.len() / width) {
                self.probabilities(qkv, head, block, scores);
                let p = View::new(scores, [block.queries, block.keys], block.keys);
                let v = self.head(qkv, width, value_head, [block.first_key, block.keys]);
                product(&mut out[block.first * stride..], stride, false, 1.0, p, v);
            }
        });
    }

    /// The gradients of the query heads of a key head, of its keys and of its values, as rows
    /// `[(groups + 2) · head_dim]` of one sequence.
    fn backward_stack(&self, qkv: &[f32], out: &[f32], d_out: &[f32], kv_head: usize) -> Vec<f32> {
        let (d, groups, width) = (self.head_dim, self.groups(), self.width());
        let (seq, stride) = (qkv.len() / width, (groups + 2) * d);
        let mut rows = vec![0.0; seq * stride];
        let (key_column, value_column) = (groups * d, (groups + 1) * d);
        SCORES.with_borrow_mut(|[scores, slopes]| {
            for group in 0..groups {
                let head = kv_head * groups + group;
                for block in self.blocks(seq) {
                    let queries = [block.first, block.queries];
                    let keys = [block.first_key, block.keys];
                    self.probabilities(qkv, head, block, scores);
                    let d_o = self.head(d_out, self.out_width(), head, queries);
                    let v = self.head(qkv, width, self.n_heads + self.n_kv_heads + kv_head, keys);
                    slopes.resize(block.queries * block.keys, 0.0);
                    product(slopes, block.keys, false, 1.0, d_o, v.transposed());
                    let p = View::new(scores, [block.queries, block.keys], block.keys);
                    let d_v = &mut rows[block.first_key * stride + value_column..];
                    product(d_v, stride, true, 1.0, p.transposed(), d_o);
                    let first = block.first * self.out_width() + head * d;
                    let outer = (&out[first..], &d_out[first..], d, self.out_width());
                    wide(
                        softmax_slopes,
                        (scores.as_slice(), slopes.as_mut_slice(), block.keys, outer),
                    );
                    let ds = View::new(slopes, [block.queries, block.keys], block.keys);
                    let q = self.head(qkv, width, head, queries);
                    let k = self.head(qkv, width, self.n_heads + kv_head, keys);
                    let d_k = &mut rows[block.first_key * stride + key_column..];
                    product(d_k, stride, true, self.scale, ds.transposed(), q);
                    let d_q = &mut rows[block.first * stride + group * d..];
                    product(d_q, stride, false, self.scale, ds, k);
                }
            }
        });
        rows
    }
}

/// Softmax of the scores of a block's queries.
#[inline(always)]
fn softmax_rows(scores: &mut [f32], block: Block, window: usize) {
    for (index, row) in scores.chunks_exact_mut(block.keys).enumerate() {
        let query = block.first + index;
        let oldest = (query + 1).saturating_sub(window).max(block.first_key);
        softmax(row, oldest - block.first_key, query + 1 - block.first_key);
    }
}

/// `dS = P ∘ (dP - rowsum(dO ∘ O))`, into `dp`; a row of `out` and `d_out` has `d` elements every `stride`.
#[inline(always)]
fn softmax_slopes(
    p: &[f32],
    dp: &mut [f32],
    keys: usize,
    (out, d_out, d, stride): (&[f32], &[f32], usize, usize),
) {
    for (index, (p, dp)) in p.chunks_exact(keys).zip(dp.chunks_exact_mut(keys)).enumerate() {
        let row = index * stride..index * stride + d;
        let row_sum = dot(&out[row.clone()], &d_out[row]);
        for (dp, p) in dp.iter_mut().zip(p) {
            *dp = p * (*dp - row_sum);
        }
    }
}

/// Softmax of the elements `from..to`, in place; 0 elsewhere.
#[inline(always)]
fn softmax(row: &mut [f32], from: usize, to: usize) {
    row[..from].fill(0.0);
    row[to..].fill(0.0);
    let row = &mut row[from..to];
    let largest = largest(row);
    for x in row.iter_mut() {
        *x = exp(*x - largest);
    }
    let inverse = 1.0 / sum(row);
    for x in row.iter_mut() {
        *x *= inverse;
    }
}

/// Copies `count` columns from column `from.0` of rows of `from.1` to column `to.0` of rows of `to.1`.
fn place(values: &[f32], from: (usize, usize), count: usize, rows: &mut [f32], to: (usize, usize)) {
    for (row, own) in rows.chunks_exact_mut(to.1).zip(values.chunks_exact(from.1)) {
        row[to.0..to.0 + count].copy_from_slice(&own[from.0..from.0 + count]);
    }
}

fn starts(lengths: &[usize]) -> Vec<usize> {
    let sums = lengths.iter().scan(0, |sum, length| {
        let start = *sum;
        *sum += length;
        Some(start)
    });
    sums.collect()
}

/// The rows of each sequence.
fn parts<'a>(rows: &'a [f32], lengths: &'a [usize], width: usize) -> impl Iterator<Item = &'a [f32]> {
    lengths.iter().scan(rows, move |rest, length| {
        let (own, after) = rest.split_at(length * width);
        *rest = after;
        Some(own)
    })
}

fn parts_mut<'a>(
    rows: &'a mut [f32],
    lengths: &'a [usize],
    width: usize,
) -> impl Iterator<Item = &'a mut [f32]> {
    lengths.iter().scan(rows, move |rest, length| {
        let (own, after) = std::mem::take(rest).split_at_mut(length * width);
        *rest = after;
        Some(own)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32)
            .map(|i| ((i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 8_388_608.0) - 1.0)
            .collect()
    }

    /// Attention of one sequence by its definition, in double precision.
    fn plain(own: &RowAttention, qkv: &[f64]) -> Vec<f64> {
        let (d, width) = (own.head_dim, own.width());
        let seq = qkv.len() / width;
        let at = |row: usize, head: usize, i: usize| qkv[row * width + head * d + i];
        let mut out = vec![0.0; seq * own.out_width()];
        for head in 0..own.n_heads {
            let kv = own.n_heads + head / (own.n_heads / own.n_kv_heads);
            for query in 0..seq {
                let keys = (query + 1).saturating_sub(own.window)..query + 1;
                let score = |key: usize| {
                    let dot: f64 = (0..d).map(|i| at(query, head, i) * at(key, kv, i)).sum();
                    (dot * f64::from(own.scale)).exp()
                };
                let total: f64 = keys.clone().map(score).sum();
                for key in keys {
                    let p = score(key) / total;
                    for i in 0..d {
                        out[query * own.out_width() + head * d + i] += p * at(key, kv + own.n_kv_heads, i);
                    }
                }
            }
        }
        out
    }

    const SHAPES: [RowAttention; 2] = [
        RowAttention {
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 8,
            window: usize::MAX,
            scale: 0.6,
        },
        RowAttention {
            n_heads: 2,
            n_kv_heads: 2,
            head_dim: 20,
            window: 37,
            scale: 0.3,
        },
    ];

    #[test]
    fn values_and_gradients_follow_the_definition() {
        let lengths = [5, 140, 1];
        for own in SHAPES {
            let rows: usize = lengths.iter().sum();
            let qkv = values(rows * own.width(), 3);
            let out = own.forward_parallel(&qkv, &lengths);
            let d_out = values(out.len(), 4);
            let d_qkv = own.backward_parallel(&qkv, &out, &d_out, &lengths);
            let mut first = 0;
            for length in lengths {
                let part = |x: &[f32], width: usize| -> Vec<f64> {
                    let part = &x[first * width..(first + length) * width];
                    part.iter().map(|v| f64::from(*v)).collect()
                };
                let own_qkv = part(&qkv, own.width());
                let expected = plain(&own, &own_qkv);
                for (a, b) in part(&out, own.out_width()).iter().zip(&expected) {
                    assert!((a - b).abs() < 1e-5, "{a} {b}");
                }
                let d_out = part(&d_out, own.out_width());
                let loss = |qkv: &[f64]| -> f64 {
                    let out = plain(&own, qkv);
                    out.iter().zip(&d_out).map(|(a, b)| a * b).sum()
                };
                let d_qkv = part(&d_qkv, own.width());
                for index in (0..own_qkv.len()).step_by(own_qkv.len() / 23 + 1) {
                    let moved = |by: f64| {
                        let mut moved = own_qkv.clone();
                        moved[index] += by;
                        loss(&moved)
                    };
                    let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    assert!(
                        (slope - d_qkv[index]).abs() < 2e-4,
                        "{index}: {slope} {}",
                        d_qkv[index]
                    );
                }
                first += length;
            }
        }
    }

    #[test]
    fn sequences_and_threads_do_not_change_the_bits() {
        let own = SHAPES[0];
        let lengths = [130, 20];
        let qkv = values(150 * own.width(), 7);
        let d_out = values(150 * own.out_width(), 8);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                let out = own.forward_parallel(&qkv, &lengths);
                let d_qkv = own.backward_parallel(&qkv, &out, &d_out, &lengths);
                (out, d_qkv)
            })
        };
        let one = run(1);
        assert_eq!(one, run(3));
        let mut alone = vec![0.0; 20 * own.out_width()];
        own.forward(&qkv[130 * own.width()..], &mut alone);
        assert_eq!(one.0[130 * own.out_width()..], alone);
    }
}
