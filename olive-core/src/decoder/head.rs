//! Token embedding, final norm and language-model head, and the cross entropy that never holds all logits.

use burn::tensor::backend::Backend;
use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};

use super::norm::RmsNorm;
use crate::arch::ModelSpec;
use crate::checkpoint::TensorSource;
use crate::data::IGNORED_LABEL;
use crate::error::{Error, Result};
use crate::weight::WeightKind;

/// Elements of the logits that exist at a time.
const CHUNK_ELEMENTS: usize = 1 << 20;

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
    /// Sum of the losses, in nats.
    pub sum: f64,
    /// Positions that were counted.
    pub tokens: usize,
    /// The gradient of `sum · scale` in the hidden states `[batch, seq, hidden]`, where it was asked for.
    pub d_hidden: Option<Tensor<B, 3>>,
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

    /// Cross entropy of the last layer's output `[batch, seq, hidden]` against `labels`, `seq` a sequence: position
    /// `t` predicts label `t + 1`, [`IGNORED_LABEL`] is not counted. With `scale`, also the gradient of
    /// `sum · scale`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a label is no token, or there are not `seq` of them a sequence.
    pub fn cross_entropy<S: AsRef<[i64]>>(
        &self,
        hidden: Tensor<B, 3>,
        labels: &[S],
        scale: Option<f64>,
    ) -> Result<CrossEntropy<B>> {
        let [batch, seq, width] = hidden.dims();
        let [vocab, _] = self.weight.dims();
        let (places, targets) = trained_positions(labels, [batch, seq, vocab])?;
        let device = hidden.device();
        let hidden = hidden.reshape([batch * seq, width]);
        let mut result = CrossEntropy {
            sum: 0.0,
            tokens: places.len(),
            d_hidden: None,
        };
        let mut d_rows = Vec::new();
        let step = (CHUNK_ELEMENTS / vocab).max(1);
        for (places, targets) in places.chunks(step).zip(targets.chunks(step)) {
            let index = int_tensor::<B>(places.to_vec(), &device);
            let x = hidden.clone().select(0, index);
            let targets = int_tensor::<B>(targets.to_vec(), &device).unsqueeze_dim::<2>(1);
            let (losses, d_x) = self.chunk(x, targets, scale);
            result.sum += losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
            d_rows.extend(d_x);
        }
        if scale.is_some() {
            let zeros = Tensor::zeros([batch * seq, width], &device);
            let d_hidden = match d_rows.is_empty() {
                true => zeros,
                false => {
                    let index = int_tensor::<B>(places, &device);
                    zeros.select_assign(0, index, Tensor::cat(d_rows, 0), IndexingUpdateOp::Add)
                }
            };
            result.d_hidden = Some(d_hidden.reshape([batch, seq, width]));
        }
        Ok(result)
    }

    /// Losses of the rows `x [n, hidden]` and, with a scale, the gradient of their sum times it.
    fn chunk(
        &self,
        x: Tensor<B, 2>,
        targets: Tensor<B, 2, Int>,
        scale: Option<f64>,
    ) -> (Vec<f32>, Option<Tensor<B, 2>>) {
        let logits = self
            .norm
            .forward(x.clone())
            .matmul(self.weight.clone().transpose());
        let largest = logits.clone().max_dim(1);
        let target_logits = logits.clone().gather(1, targets.clone()) - largest.clone();
        let exponentials = (logits - largest).exp();
        let sums = exponentials.clone().sum_dim(1);
        let losses = sums.clone().log() - target_logits;
        let d_x = scale.map(|scale| {
            let [n, _] = x.dims();
            let ones = Tensor::full([n, 1], -scale, &x.device());
            let d_logits = exponentials * sums.recip().mul_scalar(scale);
            let d_logits = d_logits.scatter(1, targets, ones, IndexingUpdateOp::Add);
            self.norm.backward(&x, d_logits.matmul(self.weight.clone()))
        });
        let losses = losses.into_data().convert::<f32>().into_vec();
        (losses.expect("invariant: converted to f32"), d_x)
    }
}

/// Rows of `[batch * seq]` that have a next label, and that label.
fn trained_positions<S: AsRef<[i64]>>(
    labels: &[S],
    [batch, seq, vocab]: [usize; 3],
) -> Result<(Vec<i32>, Vec<i32>)> {
    let lengths_fit = labels.len() == batch && labels.iter().all(|own| own.as_ref().len() == seq);
    if !lengths_fit {
        let found = format!("{} sequences, or another length", labels.len());
        return Err(Error::tensor(
            "labels",
            format!("{batch} sequences of {seq}"),
            found,
        ));
    }
    let (mut places, mut targets) = (Vec::new(), Vec::new());
    for (sequence, own) in labels.iter().map(AsRef::as_ref).enumerate() {
        for (position, label) in own.iter().skip(1).enumerate() {
            if *label == IGNORED_LABEL {
                continue;
            }
            if !(0..vocab as i64).contains(label) {
                let expected = format!("{IGNORED_LABEL} or an id below {vocab}");
                return Err(Error::tensor("labels", expected, label.to_string()));
            }
            places.push((sequence * seq + position) as i32);
            targets.push(*label as i32);
        }
    }
    Ok((places, targets))
}
