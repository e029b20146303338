//! What a checkpoint makes of samples, one result a sample: losses and hits of the labelled positions.

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use rayon::prelude::*;

use super::head::Head;
use super::perplexity::Attachment;
use super::stream::last_hidden;
use crate::data::{IGNORED_LABEL, Sample, SampleScore};
use crate::error::{Error, Result};
use crate::model::ModelHandle;
use crate::progress::{CancelToken, Progress};

/// Bytes of hidden states that are held at a time; beyond them the layers are read again.
const HIDDEN_BYTES: usize = 512 << 20;
/// Elements of the logits that a thread holds at a time.
const CHUNK_ELEMENTS: usize = 1 << 20;

/// Scores samples, each on its own, without their padding. `attach` adapts each layer after it was read.
///
/// # Errors
/// Those of reading the model; [`Error::Tensor`] for ids or labels outside the vocabulary; [`Error::NotFinite`];
/// [`Error::Cancelled`].
pub fn score_samples<B: Backend>(
    model: &dyn ModelHandle,
    samples: &[Sample],
    attach: Option<&Attachment<'_, B>>,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<Vec<SampleScore>> {
    let most = (HIDDEN_BYTES / (4 * model.spec().hidden_size.max(1))).max(1);
    let mut scores = Vec::with_capacity(samples.len());
    let mut rest = samples;
    while !rest.is_empty() {
        let mut tokens = 0;
        let fits = rest.iter().take_while(|sample| {
            tokens += sample.length;
            tokens <= most
        });
        let (now, later) = rest.split_at(fits.count().max(1));
        scores.extend(score_part::<B>(model, now, attach, progress, cancel)?);
        rest = later;
    }
    Ok(scores)
}

fn score_part<B: Backend>(
    model: &dyn ModelHandle,
    samples: &[Sample],
    attach: Option<&Attachment<'_, B>>,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<Vec<SampleScore>> {
    let spec = model.spec();
    progress.start("score", spec.n_layers as u64 + 1);
    let sequences: Vec<&[u32]> = samples
        .iter()
        .map(|sample| &sample.input_ids[..sample.length])
        .collect();
    let hidden = last_hidden::<B>(model, &sequences, attach, progress, cancel)?;
    let head = Head::<B>::load(model.tensors(), spec, None, &B::Device::default())?;
    let scores = hidden
        .into_par_iter()
        .zip(samples)
        .map(|(x, sample)| score_rows(&head, x, sample))
        .collect::<Result<Vec<_>>>();
    progress.update(spec.n_layers as u64 + 1, "");
    progress.finish();
    scores
}

/// The labelled positions of one sample, from the last layer's output `[1, length, hidden]`.
fn score_rows<B: Backend>(head: &Head<B>, x: Tensor<B, 3>, sample: &Sample) -> Result<SampleScore> {
    let [_, length, width] = x.dims();
    let [vocab, _] = head.weight.dims();
    let x = x.reshape([length, width]);
    let labelled = sample.labels.iter().take(length).enumerate().skip(1);
    let places: Vec<(usize, i64)> = labelled
        .filter(|(_, label)| **label != IGNORED_LABEL)
        .map(|(at, label)| (at - 1, *label))
        .collect();
    let mut score = SampleScore::default();
    for places in places.chunks((CHUNK_ELEMENTS / vocab).max(1)) {
        let index: Vec<i32> = places.iter().map(|(at, _)| *at as i32).collect();
        let n = index.len();
        let index = Tensor::<B, 1, Int>::from_data(TensorData::new(index, [n]), &x.device());
        let rows = head.norm.forward(x.clone().select(0, index));
        let logits = rows.matmul(head.weight.clone().transpose());
        let logits = logits.into_data().convert::<f32>().into_vec::<f32>();
        let logits = logits.expect("invariant: converted to f32");
        for (row, (_, label)) in logits.chunks_exact(vocab).zip(places) {
            let label = usize::try_from(*label).ok().filter(|label| *label < vocab);
            let label = label
                .ok_or_else(|| Error::tensor("labels", format!("ids below {vocab}"), "another number"))?;
            score.add(row, label)?;
        }
    }
    Ok(score)
}
