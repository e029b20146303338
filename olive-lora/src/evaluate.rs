//! Perplexity of a model with an adapter.

use std::path::Path;

use burn::tensor::backend::Backend;
use olive_core::decoder::{self, DecoderLayer, Perplexity};
use olive_core::{CancelToken, ModelHandle, Progress, Result};

use crate::adapter::Adapter;

/// Perplexity of `blocks` of token ids, each on its own, a layer at a time, with the PEFT folder `adapter` on the
/// model if one is given.
///
/// # Errors
/// Those of [`Adapter::open`] and [`decoder::evaluate_perplexity`].
pub fn evaluate_perplexity<B: Backend>(
    model: &dyn ModelHandle,
    blocks: &[Vec<u32>],
    adapter: Option<&Path>,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<Perplexity> {
    let adapter = adapter
        .map(|folder| Adapter::open(folder, model.spec()))
        .transpose()?;
    let attach = |layer: &mut DecoderLayer<B>| match &adapter {
        Some(adapter) => adapter.attach(layer),
        None => Ok(()),
    };
    decoder::evaluate_perplexity(model, blocks, Some(&attach), progress, cancel)
}

/// As [`evaluate_perplexity`], on the GPU.
///
/// # Errors
/// As [`evaluate_perplexity`], and those of [`olive_core::cuda::evaluate_perplexity`].
#[cfg(feature = "cuda")]
pub fn evaluate_perplexity_on_gpu(
    model: &dyn ModelHandle,
    blocks: &[Vec<u32>],
    adapter: Option<&Path>,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<Perplexity> {
    use olive_core::cuda::{DeviceLayer, Gpu};
    let adapter = adapter
        .map(|folder| Adapter::open(folder, model.spec()))
        .transpose()?;
    let attach = |gpu: &Gpu, layer: &mut DeviceLayer| match &adapter {
        Some(adapter) => crate::cuda::attach_to_device(adapter, gpu, layer),
        None => Ok(()),
    };
    olive_core::cuda::evaluate_perplexity(model, blocks, Some(&attach), progress, cancel)
}
