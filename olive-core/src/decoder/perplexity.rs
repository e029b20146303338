//! Perplexity of a checkpoint, a layer at a time: the hidden states of all blocks are kept, the model never is.

use burn::tensor::backend::Backend;
use rayon::prelude::*;

use super::head::Head;
use super::layer::DecoderLayer;
use super::stream::last_hidden;
use crate::error::{Error, Result};
use crate::model::ModelHandle;
use crate::progress::{CancelToken, Progress};

/// How well a model predicts a text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Perplexity {
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Mean cross entropy of a token, in nats.
    pub loss: f64,
    /// Tokens that were predicted: one less than each block has.
    pub tokens: usize,
}

/// Gives a layer its adapter before it runs.
pub type Attachment<'a, B> = dyn Fn(&mut DecoderLayer<B>) -> Result<()> + 'a;

/// Perplexity of `blocks` of token ids, each on its own: the sum of all losses over the number of predicted tokens.
/// `attach` adapts each layer after it was read.
///
/// # Errors
/// Those of reading the model; [`Error::Tensor`] for ids outside the vocabulary or no token to predict;
/// [`Error::NotFinite`]; [`Error::Cancelled`].
pub fn evaluate_perplexity<B: Backend>(
    model: &dyn ModelHandle,
    blocks: &[Vec<u32>],
    attach: Option<&Attachment<'_, B>>,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<Perplexity> {
    let spec = model.spec();
    progress.start("perplexity", spec.n_layers as u64 + 1);
    let sequences: Vec<&[u32]> = blocks.iter().map(Vec::as_slice).collect();
    let hidden = last_hidden::<B>(model, &sequences, attach, progress, cancel)?;
    let head = Head::<B>::load(model.tensors(), spec, None, &B::Device::default())?;
    let losses = hidden
        .into_par_iter()
        .zip(blocks)
        .map(|(x, block)| {
            let labels: Vec<i64> = block.iter().map(|id| i64::from(*id)).collect();
            let [_, length, width] = x.dims();
            let result = head.cross_entropy(x.reshape([length, width]), &[labels], None)?;
            Ok((result.sums.iter().sum(), result.tokens))
        })
        .collect::<Result<Vec<_>>>()?;
    progress.update(spec.n_layers as u64 + 1, "");
    progress.finish();
    summarise(&losses)
}

fn summarise(losses: &[(f64, usize)]) -> Result<Perplexity> {
    let sum: f64 = losses.iter().map(|(sum, _)| sum).sum();
    let tokens: usize = losses.iter().map(|(_, tokens)| tokens).sum();
    if tokens == 0 {
        return Err(Error::tensor("input_ids", "blocks of two tokens or more", "none"));
    }
    if !sum.is_finite() {
        let found = losses.iter().filter(|(sum, _)| !sum.is_finite()).count();
        return Err(Error::NotFinite {
            what: "the loss of the text's blocks".to_owned(),
            found,
        });
    }
    let loss = sum / tokens as f64;
    Ok(Perplexity {
        perplexity: loss.exp(),
        loss,
        tokens,
    })
}
