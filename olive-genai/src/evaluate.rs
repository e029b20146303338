//! Perplexity and speed of a model folder.

use std::time::Instant;

use olive_core::{CancelToken, Error, Result};
use serde::Serialize;

use crate::exec::{KvCache, LogitRows, RunInput, Value, Workspace};
use crate::generator::Generator;
use crate::model::Model;
use crate::params::GeneratorParams;

/// Bytes of logits that are held at a time.
const LOGITS_BYTES: usize = 32 << 20;
/// Positions that are computed at a time, at most.
const LARGEST_CHUNK: usize = 256;

/// How well a model predicts a text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Perplexity {
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Mean negative log-probability of the predicted tokens, in nats.
    pub loss: f64,
    /// Tokens that were predicted: all but the first of each block.
    pub tokens: usize,
    /// Blocks.
    pub blocks: usize,
}

/// The perplexity over blocks of tokens, each on its own: in a block of `n` tokens, `n − 1` are predicted. Logits are
/// held for a bounded number of positions. `report` is called with the number of finished blocks.
///
/// # Errors
/// [`Error::Cancelled`]; [`Error::Config`] for blocks with fewer than two tokens or without blocks; errors of the
/// graph.
pub fn perplexity<'b>(
    model: &Model,
    blocks: impl IntoIterator<Item = &'b [u32]>,
    cancel: &CancelToken,
    mut report: impl FnMut(usize),
) -> Result<Perplexity> {
    let mut evaluation = Evaluation::new(model);
    let (mut sum, mut tokens, mut count) = (0.0, 0, 0);
    for block in blocks {
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        if block.len() < 2 {
            return Err(Error::config(
                "evaluate",
                "block",
                "at least 2 tokens",
                block.len().to_string(),
            ));
        }
        sum += evaluation.block(block)?;
        tokens += block.len() - 1;
        count += 1;
        report(count);
    }
    if count == 0 {
        return Err(Error::config(
            "evaluate",
            "data",
            "at least one block of tokens",
            "none",
        ));
    }
    let loss = sum / tokens as f64;
    if !loss.is_finite() {
        return Err(Error::NotFinite {
            what: "the loss".into(),
            found: 1,
        });
    }
    Ok(Perplexity {
        perplexity: loss.exp(),
        loss,
        tokens,
        blocks: count,
    })
}

struct Evaluation {
    model: Model,
    workspace: Workspace,
    overrides: Vec<Option<Value>>,
    chunk: usize,
}

impl Evaluation {
    fn new(model: &Model) -> Self {
        let row = model.config().model.vocab_size.max(1) * size_of::<f32>();
        Self {
            model: model.clone(),
            workspace: Workspace::default(),
            overrides: model.inner.plan.no_overrides(),
            chunk: (LOGITS_BYTES / row).clamp(1, LARGEST_CHUNK),
        }
    }

    /// The sum of negative log-probabilities of a block's tokens.
    fn block(&mut self, block: &[u32]) -> Result<f64> {
        let ids: Vec<i64> = block.iter().map(|id| i64::from(*id)).collect();
        let mut cache = KvCache::new(self.model.info().layers, 1, ids.len());
        let mut sum = 0.0;
        let mut done = 0;
        // The last token predicts nothing.
        while done + 1 < ids.len() {
            let end = (done + self.chunk).min(ids.len() - 1);
            let tokens = &ids[done..end];
            let input = RunInput {
                tokens,
                steps: tokens.len(),
                totals: &[end],
                planned: ids.len(),
            };
            let (workspace, overrides) = (&mut self.workspace, &self.overrides);
            let plan = &self.model.inner.plan;
            let run = self
                .model
                .install(|| plan.run(workspace, &mut cache, overrides, input, LogitRows::All));
            let (logits, vocabulary) = run?;
            if logits.len() != tokens.len() * vocabulary {
                let what = "a graph that computes only the last token's logits";
                return Err(Error::unsupported(what, "perplexity needs those of every token"));
            }
            for (scores, next) in logits.chunks_exact(vocabulary).zip(&block[done + 1..=end]) {
                sum += negative_log_probability(scores, *next as usize).ok_or_else(|| {
                    Error::config(
                        "evaluate",
                        "tokens",
                        format!("ids below {vocabulary}"),
                        next.to_string(),
                    )
                })?;
            }
            crate::exec::Plan::recycle(&mut self.workspace, logits);
            done = end;
        }
        Ok(sum)
    }
}

fn negative_log_probability(scores: &[f32], token: usize) -> Option<f64> {
    let chosen = f64::from(*scores.get(token)?);
    let top = f64::from(scores.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s)));
    let sum: f64 = scores.iter().map(|s| (f64::from(*s) - top).exp()).sum();
    Some(top + sum.ln() - chosen)
}

/// How fast a model answers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Latency {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens that were generated.
    pub new_tokens: usize,
    /// From the prompt to the first token.
    pub first_token_s: f64,
    /// Tokens of the prompt a second.
    pub prefill_tokens_per_s: f64,
    /// Tokens after the first a second.
    pub decode_tokens_per_s: f64,
    /// Seconds for each token after the first, on average.
    pub token_s: f64,
}

/// Measures an answer of `new_tokens` to a prompt of token ids, greedily and past any end token, once to warm up and
/// then `runs` times; gives the fastest.
///
/// # Errors
/// [`Error::Config`] if prompt and answer do not fit the context; errors of the graph.
pub fn latency(model: &Model, prompt: &[u32], new_tokens: usize, runs: usize) -> Result<Latency> {
    let mut params = GeneratorParams::new(model);
    let options = params.options_mut();
    options.do_sample = false;
    options.batch_size = 1;
    options.num_beams = 1;
    options.num_return_sequences = 1;
    options.max_length = prompt.len() + new_tokens;
    options.min_length = options.max_length;
    let mut best: Option<Latency> = None;
    for run in 0..=runs.max(1) {
        let mut generator = Generator::new(model, &params)?;
        let start = Instant::now();
        generator.append_tokens(prompt)?;
        let prefill = start.elapsed().as_secs_f64();
        generator.generate_next_token()?;
        let first = start.elapsed().as_secs_f64();
        while !generator.is_done() {
            generator.generate_next_token()?;
        }
        let decode = start.elapsed().as_secs_f64() - first;
        let rest = new_tokens.saturating_sub(1).max(1) as f64;
        let measured = Latency {
            prompt_tokens: prompt.len(),
            new_tokens,
            first_token_s: first,
            prefill_tokens_per_s: prompt.len() as f64 / prefill,
            decode_tokens_per_s: rest / decode,
            token_s: decode / rest,
        };
        if run > 0 && best.is_none_or(|best| measured.token_s < best.token_s) {
            best = Some(measured);
        }
    }
    best.ok_or_else(|| Error::config("evaluate", "runs", "at least one", "none"))
}
