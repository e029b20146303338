//! Scoring samples with checkpoints: the decoder of `olive-core`, with the model's adapter if it has one.

use olive_core::data::{Sample, SampleScore};
use olive_core::decoder::{Cpu, DecoderLayer, score_samples};
use olive_core::{CancelToken, ModelHandle, Progress, Result};
use olive_genai::evaluators::Scorer;
use olive_lora::Adapter;

/// Scores with Hugging Face folders, a layer at a time.
#[derive(Debug, Clone, Copy, Default)]
pub struct CheckpointScorer;

impl Scorer for CheckpointScorer {
    fn score(
        &self,
        model: &dyn ModelHandle,
        samples: &[Sample],
        progress: &dyn Progress,
        cancel: &CancelToken,
    ) -> Result<Vec<SampleScore>> {
        let adapter = model
            .adapter()
            .map(|folder| Adapter::open(folder, model.spec()))
            .transpose()?;
        let attach = |layer: &mut DecoderLayer<Cpu>| match &adapter {
            Some(adapter) => adapter.attach(layer),
            None => Ok(()),
        };
        score_samples::<Cpu>(model, samples, Some(&attach), progress, cancel)
    }
}
