//! From the rows of the q, k and v projections to the attended rows: head norms, rotation, attention, with the
//! backward. A batch is consecutive rows, sequence after sequence; they may differ in length.
//!
//! Where tensors are in host memory, all of it happens in place on the rows; other backends see heads as
//! `[batch, heads, seq, head_dim]`, sequences of one length together.

use std::ops::Range;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use super::attention::{self, Heads};
use super::host::{self, HostTensor, Rotation};
use super::norm::RmsNorm;
use super::sequence::SequenceTables;
use crate::kernels::attention::RowAttention;

/// The heads of a layer.
pub(super) struct Attend<'a, B: Backend> {
    pub q_norm: Option<&'a RmsNorm<B>>,
    pub k_norm: Option<&'a RmsNorm<B>>,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub scale: f64,
}

/// What the backward of attention needs besides the attended rows.
pub(super) enum AttendTape<B: Backend> {
    /// Rows after norm and rotation, and before the norm of heads where there is one.
    Rows(Tensor<B, 2>, Option<Tensor<B, 2>>),
    /// Heads of sequences of one length.
    Heads(Vec<HeadsTape<B>>),
}

/// What the backward of some sequences of one length needs.
pub(super) struct HeadsTape<B: Backend> {
    /// Queries and keys before their norms, where there are any.
    unnormed: Option<[Tensor<B, 4>; 2]>,
    heads: Heads<B>,
    attended: Tensor<B, 4>,
}

/// Sequences of one length: their rows, how many they are, and their tables.
type Alike<'a, B> = (Range<usize>, usize, &'a SequenceTables<B>);

fn alike<'a, B: Backend>(sequences: &[&'a SequenceTables<B>]) -> Vec<Alike<'a, B>> {
    let mut groups: Vec<Alike<'a, B>> = Vec::new();
    for tables in sequences.iter().copied() {
        match groups.last_mut() {
            Some((rows, count, own)) if std::ptr::eq(*own, tables) => {
                rows.end += tables.length;
                *count += 1;
            }
            last => {
                let start = last.map_or(0, |(rows, _, _)| rows.end);
                groups.push((start..start + tables.length, 1, tables));
            }
        }
    }
    groups
}

impl<B: Backend> Attend<'_, B> {
    fn q_size(&self) -> usize {
        self.n_heads * self.head_dim
    }

    fn kv_size(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// Attended rows `[n, n_heads · head_dim]` of `qkv [n, (n_heads + 2 n_kv_heads) · head_dim]`.
    pub fn forward(
        &self,
        qkv: Tensor<B, 2>,
        sequences: &[&SequenceTables<B>],
    ) -> (Tensor<B, 2>, AttendTape<B>) {
        if host::is_host::<B>() {
            return self.forward_rows(qkv, sequences);
        }
        let mut parts = Vec::new();
        let mut tapes = Vec::new();
        for (rows, batch, tables) in alike(sequences) {
            let part = |from: usize, size: usize, heads| {
                let columns = qkv.clone().slice([rows.clone(), from..from + size]);
                self.split_heads(columns, batch, heads)
            };
            let q = part(0, self.q_size(), self.n_heads);
            let k = part(self.q_size(), self.kv_size(), self.n_kv_heads);
            let v = part(self.q_size() + self.kv_size(), self.kv_size(), self.n_kv_heads);
            let normed = self.q_norm.is_some() || self.k_norm.is_some();
            let unnormed = normed.then(|| [q.clone(), k.clone()]);
            let norm = |norm: Option<&RmsNorm<B>>, x: Tensor<B, 4>| match norm {
                Some(norm) => norm.forward(x),
                None => x,
            };
            let heads = Heads {
                q: tables.rotate(norm(self.q_norm, q)),
                k: tables.rotate(norm(self.k_norm, k)),
                v,
            };
            let attended = attention::forward(&heads, tables, self.scale);
            parts.push(self.merge_heads(attended.clone()));
            tapes.push(HeadsTape {
                unnormed,
                heads,
                attended,
            });
        }
        (join(parts, 0), AttendTape::Heads(tapes))
    }

    /// The gradient of `qkv` from that of the attended rows. `attended` are those rows.
    pub fn backward(
        &self,
        tape: AttendTape<B>,
        attended: &Tensor<B, 2>,
        d_rows: Tensor<B, 2>,
        sequences: &[&SequenceTables<B>],
    ) -> Tensor<B, 2> {
        let tapes = match tape {
            AttendTape::Rows(qkv, unnormed) => {
                return self.backward_rows(qkv, unnormed, (attended, &d_rows), sequences);
            }
            AttendTape::Heads(tapes) => tapes,
        };
        let [_, width] = d_rows.dims();
        let mut parts = Vec::new();
        for ((rows, batch, tables), tape) in alike(sequences).into_iter().zip(tapes) {
            let d_attended = self.split_heads(d_rows.clone().slice([rows, 0..width]), batch, self.n_heads);
            let d_heads = attention::backward(&tape.heads, &tape.attended, d_attended, tables, self.scale);
            let mut dq = tables.rotate_back(d_heads.q);
            let mut dk = tables.rotate_back(d_heads.k);
            if let Some([q, k]) = &tape.unnormed {
                dq = backward_norm(self.q_norm, q, dq);
                dk = backward_norm(self.k_norm, k, dk);
            }
            let heads = [dq, dk, d_heads.v].map(|heads| self.merge_heads(heads));
            parts.push(Tensor::cat(heads.to_vec(), 1));
        }
        join(parts, 0)
    }

    fn rows(&self, sequences: &[&SequenceTables<B>]) -> (RowAttention, Vec<usize>) {
        let window = sequences.first().map_or(usize::MAX, |tables| tables.window);
        (
            self.heads(window),
            sequences.iter().map(|tables| tables.length).collect(),
        )
    }

    /// The same heads for rows in host memory.
    pub fn heads(&self, window: usize) -> RowAttention {
        RowAttention {
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            window,
            scale: self.scale as f32,
        }
    }

    fn forward_rows(
        &self,
        qkv: Tensor<B, 2>,
        sequences: &[&SequenceTables<B>],
    ) -> (Tensor<B, 2>, AttendTape<B>) {
        let (heads, lengths) = self.rows(sequences);
        let (shape, device) = (qkv.dims(), qkv.device());
        let normed = self.q_norm.is_some() || self.k_norm.is_some();
        let unnormed = normed.then(|| qkv.clone());
        let mut rows = host::take(qkv);
        for (norm, columns) in self.norms() {
            let weight = HostTensor::of(&norm.weight).expect("invariant: tensors are in host memory");
            host::norm_heads(&mut rows, shape[1], columns, weight.values(), norm.epsilon as f32);
        }
        self.rotate_rows(&mut rows, sequences, 1.0);
        let out = heads.forward_parallel(&rows, &lengths);
        let attended = host::tensor(out, [shape[0], heads.out_width()], &device);
        (
            attended,
            AttendTape::Rows(host::tensor(rows, shape, &device), unnormed),
        )
    }

    fn backward_rows(
        &self,
        qkv: Tensor<B, 2>,
        unnormed: Option<Tensor<B, 2>>,
        (attended, d_rows): (&Tensor<B, 2>, &Tensor<B, 2>),
        sequences: &[&SequenceTables<B>],
    ) -> Tensor<B, 2> {
        let (heads, lengths) = self.rows(sequences);
        let of = |x| HostTensor::of(x).expect("invariant: tensors are in host memory");
        let (rows, out, d_out) = (of(&qkv), of(attended), of(d_rows));
        let mut d_qkv = heads.backward_parallel(rows.values(), out.values(), d_out.values(), &lengths);
        self.rotate_rows(&mut d_qkv, sequences, -1.0);
        if let Some(unnormed) = &unnormed {
            let [_, width] = unnormed.dims();
            let x = of(unnormed);
            for (norm, columns) in self.norms() {
                let weight = HostTensor::of(&norm.weight).expect("invariant: tensors are in host memory");
                let epsilon = norm.epsilon as f32;
                host::norm_heads_backward(x.values(), &mut d_qkv, width, columns, weight.values(), epsilon);
            }
        }
        host::tensor(d_qkv, qkv.dims(), &qkv.device())
    }

    /// The norms of heads, each with its first column and its number of heads.
    pub fn norms(&self) -> impl Iterator<Item = (&RmsNorm<B>, (usize, usize))> {
        let q = self.q_norm.map(|norm| (norm, (0, self.n_heads)));
        let k = self.k_norm.map(|norm| (norm, (self.q_size(), self.n_kv_heads)));
        q.into_iter().chain(k)
    }

    fn rotate_rows(&self, rows: &mut [f32], sequences: &[&SequenceTables<B>], sign: f32) {
        let width = self.q_size() + 2 * self.kv_size();
        let mut rest = rows;
        for tables in sequences {
            let (own, after) = rest.split_at_mut(tables.length * width);
            rest = after;
            let [_, _, _, half] = tables.cos.dims();
            let of = |x| HostTensor::of(x).expect("invariant: tensors are in host memory");
            let (cos, sin) = (of(&tables.cos), of(&tables.sin));
            let rotation = Rotation {
                cos: cos.values(),
                sin: sin.values(),
                half,
                sign,
                heads: self.n_heads + self.n_kv_heads,
                head_dim: self.head_dim,
            };
            rotation.apply(own, width);
        }
    }

    /// `[batch * seq, heads * head_dim]` to `[batch, heads, seq, head_dim]`.
    fn split_heads(&self, rows: Tensor<B, 2>, batch: usize, heads: usize) -> Tensor<B, 4> {
        let [n, _] = rows.dims();
        rows.reshape([batch, n / batch, heads, self.head_dim])
            .swap_dims(1, 2)
    }

    /// The inverse of [`Attend::split_heads`].
    fn merge_heads(&self, heads: Tensor<B, 4>) -> Tensor<B, 2> {
        let [batch, n_heads, seq, head_dim] = heads.dims();
        heads.swap_dims(1, 2).reshape([batch * seq, n_heads * head_dim])
    }
}

fn backward_norm<B: Backend>(norm: Option<&RmsNorm<B>>, x: &Tensor<B, 4>, dy: Tensor<B, 4>) -> Tensor<B, 4> {
    match norm {
        Some(norm) => norm.backward(x, dy),
        None => dy,
    }
}

/// The parts side by side along `dim`.
pub(super) fn join<B: Backend>(mut parts: Vec<Tensor<B, 2>>, dim: usize) -> Tensor<B, 2> {
    match parts.len() {
        1 => parts.swap_remove(0),
        _ => Tensor::cat(parts, dim),
    }
}
