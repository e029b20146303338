//! [`Generator`]: sequences of tokens that grow.

mod compute;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use olive_core::{Error, Result};
use serde::Serialize;

use crate::adapters::{Adapter, Adapters};
use crate::exec::{KvCache, Value, Workspace};
use crate::model::Model;
use crate::params::GeneratorParams;
use crate::search::{BeamSearch, Mt19937, penalize, pick};

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// An end token.
    Stop,
    /// The greatest length.
    Length,
}

/// Generates tokens: append a prompt, then ask for one token after the other.
///
/// Tokens may be appended at any time; what was computed before is kept. An end token that ends the batch is given by
/// [`Generator::get_next_tokens`] but does not join the sequence.
pub struct Generator {
    model: Model,
    params: GeneratorParams,
    cache: KvCache,
    workspace: Workspace,
    overrides: Vec<Option<Value>>,
    active: Vec<Arc<Adapter>>,
    /// `[rows]` of tokens, padding included.
    sequences: Vec<Vec<u32>>,
    /// `[rows]` of tokens that the model sees: without padding behind the prompt.
    rows: Vec<Vec<i64>>,
    /// `[rows, vocabulary]` scores of the next token, if they are up to date.
    logits: Option<Vec<f32>>,
    vocabulary: usize,
    next: Vec<u32>,
    ended: Vec<bool>,
    finished: Option<FinishReason>,
    rng: Mt19937,
    beam: Option<BeamSearch>,
    /// Whether the cache was written with the rotary tables of long sequences.
    long_tables: bool,
}

impl Generator {
    /// A generator without tokens, or with those of [`GeneratorParams::set_input_ids`].
    ///
    /// # Errors
    /// [`Error::Config`] for options that cannot be.
    pub fn new(model: &Model, params: &GeneratorParams) -> Result<Self> {
        params.check()?;
        let options = &params.options;
        let rows = options.batch_size * options.num_beams;
        let seed = match u32::try_from(options.random_seed) {
            Ok(seed) => seed,
            Err(_) if options.random_seed == -1 => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                now.subsec_nanos() ^ (now.as_secs() as u32)
            }
            Err(_) => {
                let found = options.random_seed.to_string();
                return Err(Error::config(
                    "search options",
                    "random_seed",
                    "-1 or 0 to 4294967295",
                    found,
                ));
            }
        };
        let mut generator = Self {
            cache: KvCache::new(model.info().layers, rows, params.max_length()),
            workspace: Workspace::default(),
            overrides: model.inner.plan.no_overrides(),
            active: Vec::new(),
            sequences: vec![Vec::new(); rows],
            rows: vec![Vec::new(); rows],
            logits: None,
            vocabulary: 0,
            next: Vec::new(),
            ended: vec![false; rows],
            finished: None,
            rng: Mt19937::new(seed),
            beam: (options.num_beams > 1).then(|| BeamSearch::new(options.batch_size, options)),
            long_tables: false,
            model: model.clone(),
            params: params.clone(),
        };
        if !params.input_ids.is_empty() {
            generator.push_tokens(&params.input_ids)?;
        }
        Ok(generator)
    }

    /// Appends tokens, `[batch_size, length]` with padding on the right, and computes the scores of the next one.
    ///
    /// # Errors
    /// [`Error::Config`] if they do not fill the batch, are not of the vocabulary, or go beyond `max_length`; errors
    /// of the graph.
    pub fn append_tokens(&mut self, ids: &[u32]) -> Result<()> {
        self.push_tokens(ids)?;
        self.compute_logits()
    }

    fn push_tokens(&mut self, ids: &[u32]) -> Result<()> {
        let options = &self.params.options;
        let (batch, beams) = (options.batch_size, options.num_beams);
        let fail =
            |expected: String, found: String| Err(Error::config("generator", "tokens", expected, found));
        if ids.is_empty() || !ids.len().is_multiple_of(batch) {
            return fail(
                format!("a number of tokens that fills {batch} row(s)"),
                ids.len().to_string(),
            );
        }
        let width = ids.len() / batch;
        let length = self.token_count();
        if length > 0 && (batch > 1 || beams > 1) {
            return fail(
                "one prompt for a batch or for beams".into(),
                "a second one".into(),
            );
        }
        if length + width > self.params.max_length() {
            let found = format!("{length} and {width} more");
            return fail(
                format!("at most `max_length` ({}) tokens", self.params.max_length()),
                found,
            );
        }
        let vocabulary = self.model.config().model.vocab_size;
        if let Some(id) = ids
            .iter()
            .find(|id| vocabulary > 0 && **id as usize >= vocabulary)
        {
            return fail(format!("ids below {vocabulary}"), id.to_string());
        }
        let pad = self.model.config().model.pad_token_id;
        for row in 0..batch * beams {
            let tokens = &ids[row / beams * width..(row / beams + 1) * width];
            let padding = tokens
                .iter()
                .rev()
                .take_while(|id| batch > 1 && **id == pad)
                .count();
            let kept = (width - padding).max(1);
            self.sequences[row].extend_from_slice(tokens);
            self.rows[row].extend(tokens[..kept].iter().map(|id| i64::from(*id)));
        }
        self.logits = None;
        self.ended.fill(false);
        self.finished = None;
        if self.token_count() >= self.params.max_length() {
            self.finished = Some(FinishReason::Length);
        }
        Ok(())
    }

    /// Chooses the next token of every row and appends it.
    ///
    /// # Errors
    /// [`Error::Config`] without a prompt or after the end; errors of the graph.
    pub fn generate_next_token(&mut self) -> Result<()> {
        if self.is_done() {
            return Err(Error::config(
                "generator",
                "generate_next_token",
                "a sequence that goes on",
                "one that is done",
            ));
        }
        self.compute_logits()?;
        let logits = self.logits.take().unwrap_or_default();
        if self.beam.is_some() {
            self.beam_step(&logits);
        } else {
            self.choose_tokens(&logits);
        }
        crate::exec::Plan::recycle(&mut self.workspace, logits);
        Ok(())
    }

    fn choose_tokens(&mut self, logits: &[f32]) {
        let config = &self.model.config().model;
        let options = &self.params.options;
        self.next.clear();
        for (row, scores) in logits.chunks_exact(self.vocabulary).enumerate() {
            if self.ended[row] {
                self.next.push(config.pad_token_id);
                continue;
            }
            let mut scores = scores.to_vec();
            penalize(&mut scores, &self.sequences[row], options, &config.eos_token_id);
            let token = pick(&scores, options, &mut self.rng) as u32;
            self.ended[row] = config.eos_token_id.contains(&token);
            self.next.push(token);
        }
        if self.ended.iter().all(|ended| *ended) {
            self.finished = Some(FinishReason::Stop);
            return;
        }
        for (row, token) in self.next.iter().enumerate() {
            self.sequences[row].push(*token);
            self.rows[row].push(i64::from(*token));
        }
        if self.token_count() >= self.params.max_length() {
            self.finished = Some(FinishReason::Length);
        }
    }

    fn beam_step(&mut self, logits: &[f32]) {
        let Some(mut beam) = self.beam.take() else { return };
        let config = &self.model.config().model;
        let (sequences, options) = (&self.sequences, &self.params.options);
        let (ends, pad) = (&config.eos_token_id, config.pad_token_id);
        let next = beam.step(logits, sequences, ends, pad, |row, scores| {
            penalize(scores, &sequences[row], options, ends);
        });
        let sources: Vec<usize> = next.iter().map(|c| c.row).collect();
        self.cache.reorder(&sources);
        self.sequences = sources.iter().map(|row| self.sequences[*row].clone()).collect();
        self.rows = sources.iter().map(|row| self.rows[*row].clone()).collect();
        self.next = next.iter().map(|c| c.token).collect();
        for (row, token) in self.next.iter().enumerate() {
            self.sequences[row].push(*token);
            self.rows[row].push(i64::from(*token));
        }
        if beam.is_done() {
            self.finished = Some(FinishReason::Stop);
        } else if self.token_count() >= self.params.max_length() {
            self.finished = Some(FinishReason::Length);
        }
        self.beam = Some(beam);
    }

    /// Whether all rows have ended or reached `max_length`.
    pub fn is_done(&self) -> bool {
        self.finished.is_some()
    }

    /// Why it ended; `None` while it goes on.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finished
    }

    /// The tokens that the last call of [`Generator::generate_next_token`] chose, one for every row.
    pub fn get_next_tokens(&self) -> &[u32] {
        &self.next
    }

    /// The tokens of a row, prompt and padding included; after a beam search, of the row's best sequences.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no such row.
    pub fn get_sequence(&self, index: usize) -> Result<Vec<u32>> {
        let options = &self.params.options;
        let count = options.batch_size * options.num_return_sequences;
        if index >= count {
            return Err(Error::config(
                "generator",
                "sequence",
                format!("an index below {count}"),
                index.to_string(),
            ));
        }
        let Some(beam) = &self.beam else {
            return Ok(self.sequences[index].clone());
        };
        let each = options.num_return_sequences;
        let best = beam.best(index / each, &self.sequences, each);
        Ok(best
            .get(index % each)
            .map(|finished| finished.tokens.clone())
            .unwrap_or_default())
    }

    /// Tokens of a row, prompt and padding included.
    pub fn token_count(&self) -> usize {
        self.sequences.first().map_or(0, Vec::len)
    }

    /// The scores of the next token, `[rows, vocabulary]`, computed if need be.
    ///
    /// # Errors
    /// [`Error::Config`] without a prompt; errors of the graph.
    pub fn get_logits(&mut self) -> Result<&[f32]> {
        self.compute_logits()?;
        Ok(self.logits.as_deref().unwrap_or_default())
    }

    /// Puts other scores in the place of the computed ones.
    ///
    /// # Errors
    /// [`Error::Config`] if their number is another; errors of [`Generator::get_logits`].
    pub fn set_logits(&mut self, logits: &[f32]) -> Result<()> {
        let wanted = self.get_logits()?.len();
        if logits.len() != wanted {
            return Err(Error::config(
                "generator",
                "logits",
                format!("{wanted} values"),
                logits.len().to_string(),
            ));
        }
        self.logits = Some(logits.to_vec());
        Ok(())
    }

    /// Takes tokens back until `length` are left. What was computed for those that stay is kept.
    ///
    /// # Errors
    /// [`Error::Config`] if there are fewer tokens, or for a batch or beams with `length` other than 0.
    pub fn rewind_to(&mut self, length: usize) -> Result<()> {
        let fail = |expected: String| {
            Err(Error::config(
                "generator",
                "rewind_to",
                expected,
                length.to_string(),
            ))
        };
        if length > self.token_count() {
            return fail(format!(
                "at most the {} tokens that there are",
                self.token_count()
            ));
        }
        if length > 0 && self.sequences.len() > 1 {
            return fail("0 for a batch or beams".into());
        }
        for (sequence, row) in self.sequences.iter_mut().zip(&mut self.rows) {
            sequence.truncate(length);
            row.truncate(length);
        }
        let lengths: Vec<usize> = self
            .cache
            .lengths()
            .iter()
            .map(|l| (*l).min(length.saturating_sub(1)))
            .collect();
        self.cache.set_lengths(&lengths);
        if let Some(beam) = &mut self.beam {
            *beam = BeamSearch::new(self.params.options.batch_size, &self.params.options);
        }
        self.logits = None;
        self.ended.fill(false);
        self.finished = None;
        Ok(())
    }

    /// Lets an adapter's weights take the place of the graph's defaults from the next token on. Adapters that were set
    /// before stay; where two give the same tensor, the later one counts.
    ///
    /// # Errors
    /// [`Error::UnknownKey`] if there is no adapter of this name, [`Error::Config`] if it is of another model.
    pub fn set_active_adapter(&mut self, adapters: &Adapters, name: &str) -> Result<()> {
        let adapter = adapters.get(&self.model, name)?;
        for (index, value) in &adapter.values {
            self.overrides[*index] = Some(value.clone());
        }
        self.active.push(adapter);
        Ok(())
    }

    /// Goes back to the graph's defaults.
    pub fn clear_adapters(&mut self) {
        self.overrides.fill(None);
        self.active.clear();
    }

    /// Bytes that keys and values take.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// New tokens of the first row, one at a time, until it is done; the end token is left out.
    pub fn tokens(&mut self) -> Tokens<'_> {
        Tokens { generator: self }
    }
}

/// New tokens; see [`Generator::tokens`].
pub struct Tokens<'g> {
    generator: &'g mut Generator,
}

impl Iterator for Tokens<'_> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Result<u32>> {
        if self.generator.is_done() {
            return None;
        }
        if let Err(error) = self.generator.generate_next_token() {
            self.generator.finished = Some(FinishReason::Stop);
            return Some(Err(error));
        }
        match self.generator.finished {
            Some(FinishReason::Stop) => None,
            _ => self.generator.get_next_tokens().first().map(|token| Ok(*token)),
        }
    }
}
