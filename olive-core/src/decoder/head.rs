//! Token embedding, final norm and language-model head, and the cross entropy that never holds all logits.

use burn::tensor::backend::Backend;
use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};
use rayon::prelude::*;

use super::host::{self, HostTensor};
use super::norm::RmsNorm;
use crate::arch::ModelSpec;
use crate::checkpoint::TensorSource;
use crate::data::IGNORED_LABEL;
use crate::error::{Error, Result};
use crate::kernels::{View, exp, largest, product_parallel, sum, wide};
use crate::weight::WeightKind;

/// Elements of the logits that exist at a time.
const CHUNK_ELEMENTS: usize = 1 << 22;
/// Rows of a chunk at least: below, reading the weight costs more than multiplying with it.
const CHUNK_ROWS: usize = 64;

/// The token embedding `[vocab, hidden]`.
#[derive(Debug, Clone)]
pub struct Embedding<B: Backend> {
    /// `[vocab, hidden]`.
    pub weight: Tensor<B, 2>,
}

/// A table `[vocab, hidden]`, dequantized if it is packed.
fn read_table(
    source: &dyn TensorSource,
    spec: &ModelSpec,
    name: &str,
    shape: [usize; 2],
) -> Result<Vec<f32>> {
    let module = name.trim_end_matches(".weight");
    Ok(WeightKind::read(source, spec.quantization.as_ref(), module, shape)?.into_dense())
}

impl<B: Backend> Embedding<B> {
    /// Reads the embedding.
    ///
    /// # Errors
    /// Those of reading a tensor that must exist with that shape and be finite.
    pub fn load(source: &dyn TensorSource, spec: &ModelSpec, device: &B::Device) -> Result<Self> {
        let shape = [spec.vocab_size, spec.hidden_size];
        let values = read_table(source, spec, spec.embedding_name(), shape)?;
        let weight = Tensor::from_data(TensorData::new(values, shape), device);
        Ok(Self { weight })
    }

    /// `[batch, seq, hidden]` of sequences that are equally long.
    ///
    /// # Errors
    /// [`Error::Tensor`] if an id is not below the vocabulary's size or the lengths differ.
    pub fn forward<S: AsRef<[u32]>>(&self, sequences: &[S]) -> Result<Tensor<B, 3>> {
        let [vocab, hidden] = self.weight.dims();
        let seq = sequences.first().map_or(0, |s| s.as_ref().len());
        let mut ids = Vec::with_capacity(sequences.len() * seq);
        for sequence in sequences.iter().map(AsRef::as_ref) {
            if sequence.len() != seq {
                let found = sequence.len().to_string();
                return Err(Error::tensor(
                    "input_ids",
                    format!("{seq} tokens a sequence"),
                    found,
                ));
            }
            if let Some(bad) = sequence.iter().find(|id| **id as usize >= vocab) {
                return Err(Error::tensor(
                    "input_ids",
                    format!("ids below {vocab}"),
                    bad.to_string(),
                ));
            }
            ids.extend(sequence.iter().map(|id| *id as i32));
        }
        let ids = int_tensor(ids, &self.weight.device());
        let rows = self.weight.clone().select(0, ids);
        Ok(rows.reshape([sequences.len(), seq, hidden]))
    }
}

fn int_tensor<B: Backend>(values: Vec<i32>, device: &B::Device) -> Tensor<B, 1, Int> {
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), device)
}

/// Final norm and language-model head.
#[derive(Debug, Clone)]
pub struct Head<B: Backend> {
    /// Before the head.
    pub norm: RmsNorm<B>,
    /// `[vocab, hidden]`; the embedding's own where they are tied.
    pub weight: Tensor<B, 2>,
}

/// Cross entropy over the trained positions of some sequences.
#[derive(Debug, Clone)]
pub struct CrossEntropy<B: Backend> {
    /// Sum of the losses of each sequence, in nats.
    pub sums: Vec<f64>,
    /// Positions that were counted.
    pub tokens: usize,
    /// The gradient of `Σ sum · scale` in the hidden states `[n, hidden]`, where it was asked for.
    pub d_hidden: Option<Tensor<B, 2>>,
}

/// A position that predicts a label.
#[derive(Debug, Clone, Copy)]
struct Position {
    row: usize,
    target: usize,
    sequence: usize,
}

impl<B: Backend> Head<B> {
    /// Reads norm and head; shares the embedding where the spec ties them.
    ///
    /// # Errors
    /// Those of reading tensors that must exist with their shapes and be finite.
    pub fn load(
        source: &dyn TensorSource,
        spec: &ModelSpec,
        embedding: Option<&Embedding<B>>,
        device: &B::Device,
    ) -> Result<Self> {
        let weight = match embedding.filter(|_| spec.tie_word_embeddings) {
            Some(embedding) => embedding.weight.clone(),
            None => {
                let shape = [spec.vocab_size, spec.hidden_size];
                let values = read_table(source, spec, spec.lm_head_name(), shape)?;
                Tensor::from_data(TensorData::new(values, shape), device)
            }
        };
        let norm = RmsNorm::load(
            source,
            spec.final_norm_name(),
            spec.hidden_size,
            spec.rms_norm_eps,
            device,
        )?;
        Ok(Self { norm, weight })
    }

    /// Logits `[batch, seq, vocab]` of the last layer's output `[batch, seq, hidden]`.
    pub fn logits(&self, hidden: Tensor<B, 3>) -> Tensor<B, 3> {
        let [batch, seq, width] = hidden.dims();
        let [vocab, _] = self.weight.dims();
        let rows = self.norm.forward(hidden).reshape([batch * seq, width]);
        rows.matmul(self.weight.clone().transpose())
            .reshape([batch, seq, vocab])
    }

    /// Cross entropy of the last layer's output `[n, hidden]` against the labels of sequences that follow one another:
    /// position `t` of a sequence predicts label `t + 1`, [`IGNORED_LABEL`] is not counted. With `scales`, one a
    /// sequence, also the gradient of the sum of each times its scale.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a label is no token, or there are not `n` of them.
    pub fn cross_entropy<S: AsRef<[i64]>>(
        &self,
        hidden: Tensor<B, 2>,
        labels: &[S],
        scales: Option<&[f64]>,
    ) -> Result<CrossEntropy<B>> {
        let [n, width] = hidden.dims();
        let [vocab, _] = self.weight.dims();
        let positions = trained_positions(labels, [n, vocab])?;
        let device = hidden.device();
        let mut result = CrossEntropy {
            sums: vec![0.0; labels.len()],
            tokens: positions.len(),
            d_hidden: None,
        };
        let on_host = HostTensor::of(&hidden);
        let mut d_values = vec![
            0.0f32;
            if scales.is_some() && on_host.is_some() {
                n * width
            } else {
                0
            }
        ];
        let mut d_rows = Vec::new();
        let step = (CHUNK_ELEMENTS / vocab).max(CHUNK_ROWS);
        for positions in positions.chunks(step) {
            let losses = match &on_host {
                Some(rows) => self.chunk_on_host(rows.values(), positions, scales, &mut d_values),
                None => {
                    let (losses, d_x) = self.chunk(&hidden, positions, scales);
                    d_rows.extend(d_x);
                    losses
                }
            };
            for (position, loss) in positions.iter().zip(losses) {
                result.sums[position.sequence] += f64::from(loss);
            }
        }
        if scales.is_some() {
            result.d_hidden = Some(match (on_host.is_some(), d_rows.is_empty()) {
                (true, _) => host::tensor(d_values, [n, width], &device),
                (false, true) => Tensor::zeros([n, width], &device),
                (false, false) => {
                    let rows = positions.iter().map(|position| position.row as i32).collect();
                    let zeros = Tensor::zeros([n, width], &device);
                    let index = int_tensor::<B>(rows, &device);
                    zeros.select_assign(0, index, Tensor::cat(d_rows, 0), IndexingUpdateOp::Add)
                }
            });
        }
        Ok(result)
    }

    /// Losses of some positions and, with scales, the gradient of their sum times those.
    fn chunk(
        &self,
        hidden: &Tensor<B, 2>,
        positions: &[Position],
        scales: Option<&[f64]>,
    ) -> (Vec<f32>, Option<Tensor<B, 2>>) {
        let device = hidden.device();
        let column = |values: Vec<i32>| int_tensor::<B>(values, &device);
        let rows = column(positions.iter().map(|position| position.row as i32).collect());
        let targets = column(positions.iter().map(|position| position.target as i32).collect());
        let targets = targets.unsqueeze_dim::<2>(1);
        let x = hidden.clone().select(0, rows);
        let logits = self
            .norm
            .forward(x.clone())
            .matmul(self.weight.clone().transpose());
        let largest = logits.clone().max_dim(1);
        let target_logits = logits.clone().gather(1, targets.clone()) - largest.clone();
        let exponentials = (logits - largest).exp();
        let sums = exponentials.clone().sum_dim(1);
        let losses = sums.clone().log() - target_logits;
        let d_x = scales.map(|scales| {
            let scales: Vec<f32> = positions.iter().map(|p| scales[p.sequence] as f32).collect();
            let scales = Tensor::from_data(TensorData::new(scales, [positions.len(), 1]), &device);
            let d_logits = exponentials * (sums.recip() * scales.clone());
            let d_logits = d_logits.scatter(1, targets, scales.neg(), IndexingUpdateOp::Add);
            self.norm.backward(&x, d_logits.matmul(self.weight.clone()))
        });
        (host::take(losses), d_x)
    }

    /// As [`Head::chunk`] of `hidden` in host memory, with the gradient put into its rows of `d_hidden`.
    fn chunk_on_host(
        &self,
        hidden: &[f32],
        positions: &[Position],
        scales: Option<&[f64]>,
        d_hidden: &mut [f32],
    ) -> Vec<f32> {
        let [vocab, width] = self.weight.dims();
        let of = |x: Option<HostTensor>| x.expect("invariant: tensors are in host memory");
        let (weight, norm) = (
            of(HostTensor::of(&self.weight)),
            of(HostTensor::of(&self.norm.weight)),
        );
        let epsilon = self.norm.epsilon as f32;
        let (n, scale) = (positions.len(), |p: &Position| {
            scales.map(|s| s[p.sequence] as f32)
        });
        let mut x = Vec::with_capacity(n * width);
        for position in positions {
            x.extend_from_slice(&hidden[position.row * width..][..width]);
        }
        let normed = host::rms_norm(&x, norm.values(), epsilon);
        let weight = View::new(weight.values(), [vocab, width], width);
        let mut logits = vec![0.0f32; n * vocab];
        let normed = View::new(&normed, [n, width], width);
        product_parallel(&mut logits, vocab, false, 1.0, normed, weight.transposed());
        let mut losses = vec![0.0f32; n];
        let rows = logits.par_chunks_exact_mut(vocab).zip(&mut losses).zip(positions);
        rows.for_each(|((logits, loss), position)| {
            *loss = wide(softmax_slope, (logits, position.target, scale(position)));
        });
        if scales.is_some() {
            let mut d_normed = vec![0.0f32; n * width];
            let d_logits = View::new(&logits, [n, vocab], vocab);
            product_parallel(&mut d_normed, width, false, 1.0, d_logits, weight);
            let d_x = host::rms_norm_backward(&x, &d_normed, norm.values(), epsilon);
            for (position, d_x) in positions.iter().zip(d_x.chunks_exact(width)) {
                d_hidden[position.row * width..][..width].copy_from_slice(d_x);
            }
        }
        losses
    }
}

/// The loss of a row of logits and, with a scale, in place of the logits the gradient of the loss times it.
#[inline(always)]
fn softmax_slope(logits: &mut [f32], target: usize, scale: Option<f32>) -> f32 {
    let largest = largest(logits);
    let target_logit = logits[target] - largest;
    for x in logits.iter_mut() {
        *x = exp(*x - largest);
    }
    let total = sum(logits);
    if let Some(scale) = scale {
        let factor = scale / total;
        for x in logits.iter_mut() {
            *x *= factor;
        }
        logits[target] -= scale;
    }
    total.ln() - target_logit
}

/// The rows that have a next label, and that label.
fn trained_positions<S: AsRef<[i64]>>(labels: &[S], [n, vocab]: [usize; 2]) -> Result<Vec<Position>> {
    let found: usize = labels.iter().map(|own| own.as_ref().len()).sum();
    if found != n {
        return Err(Error::tensor("labels", format!("{n} labels"), found.to_string()));
    }
    let mut positions = Vec::new();
    let mut first = 0;
    for (sequence, own) in labels.iter().map(AsRef::as_ref).enumerate() {
        for (place, label) in own.iter().skip(1).enumerate() {
            if *label == IGNORED_LABEL {
                continue;
            }
            if !(0..vocab as i64).contains(label) {
                let expected = format!("{IGNORED_LABEL} or an id below {vocab}");
                return Err(Error::tensor("labels", expected, label.to_string()));
            }
            positions.push(Position {
                row: first + place,
                target: *label as usize,
                sequence,
            });
        }
        first += own.len();
    }
    Ok(positions)
}
