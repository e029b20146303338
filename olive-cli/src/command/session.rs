//! Running an ONNX model folder: what `generate`, `chat` and `evaluate` share.

use std::path::{Path, PathBuf};

use olive_core::data::token_blocks;
use olive_core::{Error, Result};
use olive_genai::{Adapters, GeneratorParams, Model, SearchValue, Tokenizer, latency, perplexity};
use serde_json::{Map, Value, json};

use super::{Context, notes};
use crate::args::{EvaluateArgs, Metric, SearchArgs};

/// Tokens of the prompt and of the answer that latency is measured with.
const LATENCY_TOKENS: (usize, usize) = (128, 64);
/// Answers of which the fastest counts.
const LATENCY_RUNS: usize = 3;

/// An opened model with its tokenizer, adapters and search options.
pub struct Session {
    /// The model.
    pub model: Model,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// The search options.
    pub params: GeneratorParams,
    /// The adapters that were loaded.
    pub adapters: Adapters,
    /// The adapter that answers.
    pub active: Option<String>,
}

impl Session {
    /// Opens a model folder and loads adapters; the last one answers.
    ///
    /// # Errors
    /// Those of [`Model::open`], [`Tokenizer::new`], [`Adapters::load`] and of a search option.
    pub fn open(folder: &Path, search: &SearchArgs, adapters: &[(String, PathBuf)]) -> Result<Self> {
        let (model, tokenizer) = Model::open_with_tokenizer(folder, None)?;
        let mut session = Self {
            tokenizer,
            params: GeneratorParams::new(&model),
            adapters: Adapters::new(&model),
            active: None,
            model,
        };
        for (name, file) in adapters {
            session.adapters.load(file, name)?;
            session.active = Some(name.clone());
        }
        for (name, value) in given(search) {
            if let Some(value) = value {
                session.params.set(name, value)?;
            }
        }
        Ok(session)
    }

    /// The context of the model, in tokens.
    pub fn context_length(&self) -> usize {
        self.model.config().model.context_length
    }

    /// The active adapter, as the library takes it.
    pub fn adapter(&self) -> Option<(&Adapters, &str)> {
        self.active.as_deref().map(|name| (&self.adapters, name))
    }
}

/// Search options by their names in `genai_config.json`.
fn given(search: &SearchArgs) -> [(&'static str, Option<SearchValue>); 16] {
    let count = |value: Option<usize>| value.map(SearchValue::from);
    let number = |value: Option<f32>| value.map(SearchValue::from);
    let switch = |value: Option<bool>| value.map(SearchValue::from);
    [
        ("max_length", count(search.max_length)),
        ("min_length", count(search.min_length)),
        ("do_sample", switch(search.do_sample)),
        ("top_k", count(search.top_k)),
        ("top_p", number(search.top_p)),
        ("temperature", number(search.temperature)),
        ("repetition_penalty", number(search.repetition_penalty)),
        ("no_repeat_ngram_size", count(search.no_repeat_ngram_size)),
        (
            "random_seed",
            search.random_seed.map(|seed| SearchValue::Number(seed as f64)),
        ),
        ("num_beams", count(search.num_beams)),
        ("num_return_sequences", count(search.num_return_sequences)),
        ("length_penalty", number(search.length_penalty)),
        ("early_stopping", switch(search.early_stopping)),
        ("diversity_penalty", number(search.diversity_penalty)),
        ("chunk_size", count(search.chunk_size)),
        (
            "past_present_share_buffer",
            switch(search.past_present_share_buffer),
        ),
    ]
}

/// Evaluates an ONNX model folder.
///
/// # Errors
/// Those of opening and running the model.
pub fn evaluate(
    args: &EvaluateArgs,
    folder: &Path,
    texts: &[String],
    context: &Context<'_>,
) -> Result<Map<String, Value>> {
    let reason = "the graph of an ONNX folder is evaluated without adapter";
    notes::refuse(&[("--adapter_path", args.adapter_path.is_some(), reason)])?;
    let (model, tokenizer) = Model::open_with_tokenizer(folder, None)?;
    let blocks = token_blocks(
        tokenizer.text_tokenizer(),
        texts,
        args.block_size,
        args.max_blocks,
    )?;
    let mut report = Map::new();
    for metric in &args.metrics {
        match metric {
            Metric::Perplexity => {
                context.progress.start("perplexity", blocks.len() as u64);
                let slices = blocks.iter().map(Vec::as_slice);
                let done = |count: usize| context.progress.update(count as u64, "");
                let result = perplexity(&model, slices, context.cancel, done)?;
                context.progress.finish();
                report.insert("perplexity".to_owned(), json!(result.perplexity));
                report.insert("loss".to_owned(), json!(result.loss));
                report.insert("tokens".to_owned(), json!(result.tokens));
                report.insert("blocks".to_owned(), json!(result.blocks));
            }
            Metric::Latency => {
                let (prompt, answer) = LATENCY_TOKENS;
                let ids: Vec<u32> = blocks.concat().into_iter().take(prompt).collect();
                let result = latency(&model, &ids, answer, LATENCY_RUNS)?;
                report.insert("load_s".to_owned(), json!(model.load_seconds()));
                let measured = serde_json::to_value(result).map_err(Error::json("latency"))?;
                report.extend(measured.as_object().cloned().unwrap_or_default());
            }
        }
    }
    Ok(report)
}
