//! Token embedding, final norm, language-model head and its cross entropy on the device.

use super::device::{Gpu, Numbers};
use super::gemm::Product;
use super::linear::load_table;
use super::matrix::{Element, Matrix};
use crate::arch::ModelSpec;
use crate::checkpoint::TensorSource;
use crate::data::IGNORED_LABEL;
use crate::error::{Error, Result};

/// Elements of the logits that exist at a time.
const CHUNK_ELEMENTS: usize = 1 << 25;

/// The token embedding `[vocab, hidden]` in bfloat16.
#[derive(Debug, Clone)]
pub struct DeviceEmbedding {
    table: Matrix,
}

impl DeviceEmbedding {
    /// Reads the embedding.
    ///
    /// # Errors
    /// Those of reading a tensor that must exist with that shape and be finite.
    pub fn load(gpu: &Gpu, source: &dyn TensorSource, spec: &ModelSpec) -> Result<Self> {
        let shape = [spec.vocab_size, spec.hidden_size];
        let table = load_table(gpu, source, spec, spec.embedding_name(), shape)?;
        Ok(Self { table })
    }

    /// The rows of tokens, `[tokens, hidden]` in single precision.
    ///
    /// # Errors
    /// [`Error::Tensor`] if an id is not below the vocabulary's size.
    pub fn forward<'a>(&self, gpu: &Gpu, tokens: impl Iterator<Item = &'a u32>) -> Result<Matrix> {
        let vocab = self.table.rows;
        let ids: Vec<u32> = tokens.copied().collect();
        if let Some(bad) = ids.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::tensor(
                "input_ids",
                format!("ids below {vocab}"),
                bad.to_string(),
            ));
        }
        Ok(gpu.embed(&self.table, &gpu.upload_u32(&ids)))
    }
}

/// Final norm and language-model head.
#[derive(Debug, Clone)]
pub struct DeviceHead {
    norm: Matrix,
    /// `[vocab, hidden]`, bfloat16.
    weight: Matrix,
    epsilon: f64,
}

/// Cross entropy over the trained positions of a batch.
pub struct DeviceLoss {
    /// Loss of each trained position, in the order of the rows, still on the device.
    losses: Vec<Matrix>,
    /// The gradient of `sum · scale` in the hidden states, in single precision and in bfloat16.
    pub d_hidden: Option<(Matrix, Matrix)>,
}

impl DeviceLoss {
    /// The sum of the losses, once they are computed.
    ///
    /// # Errors
    /// As [`Gpu::download`].
    pub fn sum(&self, gpu: &Gpu) -> Result<f64> {
        let sums = self.losses.iter().map(|losses| gpu.total(losses));
        sums.sum::<Result<f64>>()
    }
}

/// Rows of a batch that have a next label, and that label.
#[derive(Debug, Clone, Default)]
pub struct Targets {
    places: Vec<u32>,
    labels: Vec<u32>,
}

impl Targets {
    /// Adds a sequence whose first token is row `first`: position `t` predicts label `t + 1`; labels that are
    /// [`IGNORED_LABEL`] are not counted.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a label is no token.
    pub fn add(&mut self, first: usize, labels: &[i64], vocab: usize) -> Result<()> {
        for (position, label) in labels.iter().skip(1).enumerate() {
            if *label == IGNORED_LABEL {
                continue;
            }
            match u32::try_from(*label) {
                Ok(id) if (id as usize) < vocab => {
                    self.places.push((first + position) as u32);
                    self.labels.push(id);
                }
                _ => {
                    let expected = format!("{IGNORED_LABEL} or an id below {vocab}");
                    return Err(Error::tensor("labels", expected, label.to_string()));
                }
            }
        }
        Ok(())
    }

    /// Positions that are counted.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }
}

impl DeviceHead {
    /// Reads norm and head; shares the embedding where the spec ties them.
    ///
    /// # Errors
    /// Those of reading tensors that must exist with their shapes and be finite.
    pub fn load(
        gpu: &Gpu,
        source: &dyn TensorSource,
        spec: &ModelSpec,
        embedding: Option<&DeviceEmbedding>,
    ) -> Result<Self> {
        let weight = match embedding.filter(|_| spec.tie_word_embeddings) {
            Some(embedding) => embedding.table.clone(),
            None => {
                let shape = [spec.vocab_size, spec.hidden_size];
                load_table(gpu, source, spec, spec.lm_head_name(), shape)?
            }
        };
        let norm = source.read_f32_checked(spec.final_norm_name(), &[spec.hidden_size])?;
        Ok(Self {
            norm: gpu.upload_f32(&norm, 1, norm.len()),
            weight,
            epsilon: spec.rms_norm_eps,
        })
    }

    /// Cross entropy of the last layer's output `[rows, hidden]` (single precision) at the trained positions. With
    /// `scale`, also the gradient of the sum times it.
    pub fn cross_entropy(
        &self,
        gpu: &Gpu,
        hidden: &Matrix,
        targets: &Targets,
        scale: Option<f64>,
    ) -> DeviceLoss {
        let vocab = self.weight.rows;
        // Rows of logits begin at aligned addresses.
        let stride = vocab.next_multiple_of(8);
        let d_hidden = scale.map(|_| gpu.zeros(hidden.rows, hidden.cols, Element::F32));
        let step = (CHUNK_ELEMENTS / stride).max(1);
        let mut losses = Vec::new();
        for (places, labels) in targets.places.chunks(step).zip(targets.labels.chunks(step)) {
            let places = gpu.upload_u32(places);
            let labels = gpu.upload_u32(labels);
            losses.push(self.chunk(gpu, hidden, (&places, &labels, stride), scale, d_hidden.as_ref()));
        }
        DeviceLoss {
            losses,
            d_hidden: d_hidden.map(|d| {
                let rounded = gpu.round(&d);
                (d, rounded)
            }),
        }
    }

    /// Losses of some rows; the gradient is written to its places in `d_hidden`.
    fn chunk(
        &self,
        gpu: &Gpu,
        hidden: &Matrix,
        (places, labels, stride): (&Numbers, &Numbers, usize),
        scale: Option<f64>,
        d_hidden: Option<&Matrix>,
    ) -> Matrix {
        let [vocab, width] = [self.weight.rows, self.weight.cols];
        let x = gpu.gather(hidden, places);
        let normed = gpu.rms_norm(&x, &self.norm, self.epsilon);
        let logits = gpu.empty(x.rows, stride, Element::F32);
        let size = [x.rows, vocab, width];
        gpu.product(Product::new(size, normed.view(), self.weight.t(), logits.view()));
        let (losses, slopes) = gpu.cross_entropy(&logits, vocab, labels, scale);
        if let (Some(slopes), Some(d_hidden)) = (slopes, d_hidden) {
            drop(logits);
            let d_normed = gpu.empty(x.rows, width, Element::Bf16);
            let size = [x.rows, width, vocab];
            gpu.product(Product::new(
                size,
                slopes.view(),
                self.weight.view(),
                d_normed.view(),
            ));
            let d_x = gpu.zeros(x.rows, width, Element::F32);
            gpu.rms_norm_backward(&x, &self.norm, self.epsilon, &d_normed, &d_x);
            gpu.scatter(&d_x, places, d_hidden);
        }
        losses
    }
}
