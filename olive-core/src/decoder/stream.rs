//! The layers of a checkpoint, one at a time over many sequences: the hidden states of all are kept, the model never is.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use rayon::prelude::*;

use super::head::Embedding;
use super::layer::DecoderLayer;
use super::perplexity::Attachment;
use super::sequence::SequenceTables;
use crate::error::Result;
use crate::model::ModelHandle;
use crate::progress::{CancelToken, Progress};

/// What the last layer makes of each sequence of token ids, `[1, length, hidden]`. `attach` adapts each layer after it was
/// read; `progress` is of `spec.n_layers` steps.
///
/// # Errors
/// Those of reading the model; [`Error::Tensor`](crate::Error::Tensor) for ids outside the vocabulary;
/// [`Error::Cancelled`](crate::Error::Cancelled).
pub(super) fn last_hidden<B: Backend>(
    model: &dyn ModelHandle,
    sequences: &[&[u32]],
    attach: Option<&Attachment<'_, B>>,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<Vec<Tensor<B, 3>>> {
    let (spec, source) = (model.spec(), model.tensors());
    let device = B::Device::default();
    let mut lengths: Vec<usize> = sequences.iter().map(|own| own.len()).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let tables: Vec<SequenceTables<B>> = lengths
        .iter()
        .map(|length| SequenceTables::new(spec, *length, &device))
        .collect();
    let embedding = Embedding::<B>::load(source, spec, &device)?;
    let mut hidden = sequences
        .iter()
        .map(|own| embedding.forward(&[own]))
        .collect::<Result<Vec<Tensor<B, 3>>>>()?;
    // A tied head is read again at the end: holding the table meanwhile would cost its size.
    drop(embedding);
    for index in 0..spec.n_layers {
        cancel.check()?;
        let mut layer = DecoderLayer::load(source, spec, index, &device)?;
        if let Some(attach) = attach {
            attach(&mut layer)?;
        }
        hidden = hidden
            .into_par_iter()
            .map(|x| {
                let [_, length, _] = x.dims();
                let tables = tables.iter().find(|tables| tables.length == length);
                layer.forward(x, tables.expect("invariant: tables were made for every length"))
            })
            .collect();
        progress.update(index as u64 + 1, "");
    }
    cancel.check()?;
    Ok(hidden)
}
