//! Perplexity of a checkpoint on the device, a layer at a time.

use super::batch::Batch;
use super::device::Gpu;
use super::head::{DeviceEmbedding, DeviceHead, Targets};
use super::kernels::Dropout;
use super::layer::{DeviceLayer, Pass};
use super::matrix::{Element, Matrix};
use crate::decoder::{DropoutStream, Perplexity};
use crate::error::{Error, Result};
use crate::model::ModelHandle;
use crate::progress::{CancelToken, Progress};

/// Tokens that go through a layer together.
const CHUNK_TOKENS: usize = 16384;

/// Gives a layer its adapter before it runs.
pub type DeviceAttachment<'a> = dyn Fn(&Gpu, &mut DeviceLayer) -> Result<()> + 'a;

/// As [`evaluate_perplexity`](crate::decoder::evaluate_perplexity), on the GPU: bfloat16 operands, sums and residual
/// stream in single precision.
///
/// # Errors
/// As there, and those of [`Gpu::open`] and [`check_model`](super::layer::check_model).
pub fn evaluate_perplexity(
    model: &dyn ModelHandle,
    blocks: &[Vec<u32>],
    attach: Option<&DeviceAttachment<'_>>,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<Perplexity> {
    let gpu = &Gpu::open()?;
    let (spec, source) = (model.spec(), model.tensors());
    progress.start("perplexity", spec.n_layers as u64 + 1);
    // Longrope's factors are chosen by the length of a block, so blocks of one length go together.
    let mut order: Vec<&Vec<u32>> = blocks.iter().filter(|block| !block.is_empty()).collect();
    order.sort_by_key(|block| block.len());
    let embedding = DeviceEmbedding::load(gpu, source, spec)?;
    let mut chunks = Vec::new();
    for same in order.chunk_by(|a, b| a.len() == b.len()) {
        let length = same[0].len();
        for blocks in same.chunks((CHUNK_TOKENS / length).max(1)) {
            let batch = Batch::new(gpu, spec, &vec![length; blocks.len()], length);
            let hidden = embedding.forward(gpu, blocks.iter().flat_map(|block| block.iter()))?;
            chunks.push((batch, hidden, blocks));
        }
    }
    drop(embedding);
    let mut scratch: Option<Matrix> = None;
    for index in 0..spec.n_layers {
        cancel.check()?;
        let mut layer = DeviceLayer::load(gpu, source, spec, index)?;
        if let Some(attach) = attach {
            attach(gpu, &mut layer)?;
        }
        let scratch = grown(gpu, &mut scratch, layer.scratch_len());
        for (batch, hidden, _) in &mut chunks {
            let dropout = Dropout::new(&DropoutStream::new(0.0, 0, 0), &batch.places);
            let pass = Pass {
                batch,
                dropout,
                scratch,
            };
            *hidden = layer.forward(gpu, hidden, &pass);
        }
        gpu.sync()?;
        progress.update(index as u64 + 1, "");
    }
    cancel.check()?;
    let head = DeviceHead::load(gpu, source, spec, None)?;
    let (mut sum, mut tokens) = (0.0, 0);
    for (batch, hidden, blocks) in &chunks {
        let mut targets = Targets::default();
        for ((first, _), block) in batch.sequences.iter().zip(*blocks) {
            let labels: Vec<i64> = block.iter().map(|id| i64::from(*id)).collect();
            targets.add(*first, &labels, spec.vocab_size)?;
        }
        let loss = head.cross_entropy(gpu, hidden, &targets, None);
        sum += loss.sum(gpu)?;
        tokens += targets.len();
    }
    progress.update(spec.n_layers as u64 + 1, "");
    progress.finish();
    if tokens == 0 {
        return Err(Error::tensor("input_ids", "blocks of two tokens or more", "none"));
    }
    if !sum.is_finite() {
        let what = "the loss of the text's blocks".to_owned();
        return Err(Error::NotFinite { what, found: 1 });
    }
    let loss = sum / tokens as f64;
    Ok(Perplexity {
        perplexity: loss.exp(),
        loss,
        tokens,
    })
}

/// Scratch memory of at least `len` elements in bfloat16.
pub fn grown<'a>(gpu: &Gpu, scratch: &'a mut Option<Matrix>, len: usize) -> &'a Matrix {
    let large_enough = scratch.take().filter(|scratch| scratch.len() >= len.max(8));
    scratch.insert(large_enough.unwrap_or_else(|| gpu.empty(1, len.max(8), Element::Bf16)))
}
