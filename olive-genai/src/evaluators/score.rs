//! Scoring samples: what a model, of whatever kind, makes of their labelled positions.

use std::sync::Arc;

use olive_core::data::{IGNORED_LABEL, Sample, SampleScore};
use olive_core::{CancelToken, Error, ModelHandle, ModelKind, Progress, Result};

use crate::adapters::Adapters;
use crate::exec::{KvCache, LogitRows, Plan, RunInput, Workspace};
use crate::model::Model;

/// Bytes of logits that are held at a time.
const LOGITS_BYTES: usize = 32 << 20;
/// The adapter that goes with a model folder, by Olive's name.
const ADAPTER_FILE: &str = "adapter_weights.onnx_adapter";
/// Positions that are computed at a time, at most.
const LARGEST_CHUNK: usize = 256;

/// Scores samples with models of one kind.
pub trait Scorer: Send + Sync {
    /// Scores each sample on its own, without its padding.
    ///
    /// # Errors
    /// Those of opening and running the model; [`Error::Cancelled`].
    fn score(
        &self,
        model: &dyn ModelHandle,
        samples: &[Sample],
        progress: &dyn Progress,
        cancel: &CancelToken,
    ) -> Result<Vec<SampleScore>>;
}

/// The scorers of both kinds of models.
#[derive(Clone)]
pub struct Scorers {
    hugging_face: Arc<dyn Scorer>,
}

impl Scorers {
    /// ONNX folders run here, checkpoints with `hugging_face`.
    pub fn new(hugging_face: Arc<dyn Scorer>) -> Self {
        Self { hugging_face }
    }
}

impl Scorer for Scorers {
    fn score(
        &self,
        model: &dyn ModelHandle,
        samples: &[Sample],
        progress: &dyn Progress,
        cancel: &CancelToken,
    ) -> Result<Vec<SampleScore>> {
        match model.kind() {
            ModelKind::HuggingFace => self.hugging_face.score(model, samples, progress, cancel),
            ModelKind::Onnx => OnnxScorer.score(model, samples, progress, cancel),
        }
    }
}

/// Scores with ONNX folders.
#[derive(Debug, Clone, Copy, Default)]
pub struct OnnxScorer;

impl Scorer for OnnxScorer {
    fn score(
        &self,
        model: &dyn ModelHandle,
        samples: &[Sample],
        progress: &dyn Progress,
        cancel: &CancelToken,
    ) -> Result<Vec<SampleScore>> {
        let longest = samples.iter().map(|sample| sample.length).max().unwrap_or(1);
        let mut run = Run::new(Model::open(model.path())?, longest)?;
        progress.start("score", samples.len() as u64);
        let mut scores = Vec::with_capacity(samples.len());
        for (index, sample) in samples.iter().enumerate() {
            cancel.check()?;
            // Samples of one row often begin alike, and what they share has been run.
            let before = index.checked_sub(1).map(|before| &samples[before]);
            scores.push(run.score(sample, before)?);
            progress.update(index as u64 + 1, "");
        }
        progress.finish();
        Ok(scores)
    }
}

struct Run {
    model: Model,
    workspace: Workspace,
    overrides: Vec<Option<crate::exec::Value>>,
    cache: KvCache,
    longest: usize,
    chunk: usize,
}

impl Run {
    /// A model with the adapter of its folder, if it has one: the model is not what it was trained to be without.
    fn new(model: Model, longest: usize) -> Result<Self> {
        let row = model.config().model.vocab_size.max(1) * size_of::<f32>();
        let mut overrides = model.inner.plan.no_overrides();
        let file = model.folder().join(ADAPTER_FILE);
        if file.is_file() {
            let mut adapters = Adapters::new(&model);
            adapters.load(&file, ADAPTER_FILE)?;
            for (index, value) in &adapters.get(&model, ADAPTER_FILE)?.values {
                overrides[*index] = Some(value.clone());
            }
        }
        Ok(Self {
            workspace: Workspace::default(),
            overrides,
            cache: KvCache::new(model.info().layers, 1, longest),
            longest,
            chunk: (LOGITS_BYTES / row).clamp(1, LARGEST_CHUNK),
            model,
        })
    }

    /// The score of a sample; `before` is the sample whose keys and values are in the cache.
    fn score(&mut self, sample: &Sample, before: Option<&Sample>) -> Result<SampleScore> {
        let ids: Vec<i64> = sample.input_ids[..sample.length]
            .iter()
            .map(|id| i64::from(*id))
            .collect();
        let labels = &sample.labels[..sample.length];
        let mut score = SampleScore::default();
        let last = labels.iter().rposition(|label| *label != IGNORED_LABEL);
        let Some(last) = last.filter(|last| *last > 0) else {
            return Ok(score);
        };
        let first = labels
            .iter()
            .skip(1)
            .position(|label| *label != IGNORED_LABEL)
            .unwrap_or(0);
        let mut done = self.kept(sample, before, first);
        while done < last {
            // Up to the first label one run of any size will do: its logits are not looked at.
            let end = if done < first {
                first
            } else {
                (done + self.chunk).min(last)
            };
            let rows = if done < first {
                LogitRows::Last
            } else {
                LogitRows::All
            };
            let tokens = &ids[done..end];
            let totals = [end];
            let input = RunInput {
                tokens,
                steps: tokens.len(),
                totals: &totals,
                planned: ids.len(),
            };
            let (workspace, overrides, cache) = (&mut self.workspace, &self.overrides, &mut self.cache);
            let plan = &self.model.inner.plan;
            let run = self
                .model
                .install(|| plan.run(workspace, cache, overrides, input, rows));
            let (logits, vocabulary) = run?;
            if rows == LogitRows::All {
                if logits.len() != tokens.len() * vocabulary {
                    let what = "a graph that computes only the last token's logits";
                    return Err(Error::unsupported(what, "scores need those of every token"));
                }
                for (scores, label) in logits.chunks_exact(vocabulary).zip(&labels[done + 1..=end]) {
                    if *label != IGNORED_LABEL {
                        score.add(scores, usize::try_from(*label).unwrap_or(usize::MAX))?;
                    }
                }
            }
            Plan::recycle(&mut self.workspace, logits);
            done = end;
        }
        Ok(score)
    }

    /// How many tokens of `sample` stay in the cache, at most up to the position that predicts its first label.
    fn kept(&mut self, sample: &Sample, before: Option<&Sample>, first: usize) -> usize {
        let cached = self.cache.lengths().first().copied().unwrap_or(0);
        let shared = before.map_or(0, |before| {
            let pairs = before.input_ids.iter().zip(&sample.input_ids[..sample.length]);
            pairs.take_while(|(a, b)| a == b).count()
        });
        let kept = shared.min(cached).min(first);
        // Which rotary table a graph chooses may follow from the planned length, so only equally long samples
        // share keys.
        let same_tables = before.is_some_and(|before| {
            let threshold = self.model.info().rope_threshold;
            threshold.is_none_or(|limit| (before.length > limit) == (sample.length > limit))
        });
        if kept > 0 && same_tables {
            self.cache.set_lengths(&[kept]);
            return kept;
        }
        self.cache = KvCache::new(self.model.info().layers, 1, self.longest);
        0
    }
}
