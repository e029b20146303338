//! Options of the search.

use olive_core::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::model::Model;

/// `search` of `genai_config.json`, with its defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SearchOptions {
    /// Draw the next token; else take the likeliest.
    pub do_sample: bool,
    /// Tokens below which no end token is taken, prompt included.
    pub min_length: usize,
    /// Tokens at which generation ends, prompt included; 0 is the model's context.
    pub max_length: usize,
    /// Sequences side by side.
    pub batch_size: usize,
    /// Beams of a beam search; 1 is none.
    pub num_beams: usize,
    /// Sequences that a beam search gives for each prompt.
    pub num_return_sequences: usize,
    /// Divides positive and multiplies negative scores of tokens that occurred.
    pub repetition_penalty: f32,
    /// How many of the likeliest tokens are drawn from; below 2 all of them.
    pub top_k: usize,
    /// Share of the probability that is drawn from; 0 and 1 are all of it.
    pub top_p: f32,
    /// Divides scores before they become probabilities; 0 takes the likeliest token.
    pub temperature: f32,
    /// End a beam search once enough sequences are finished.
    pub early_stopping: bool,
    /// Length of the runs of tokens that may occur only once; 0 is none.
    pub no_repeat_ngram_size: usize,
    /// Known and unused, as in onnxruntime-genai.
    pub diversity_penalty: f32,
    /// Exponent of the length that a beam's score is divided by.
    pub length_penalty: f32,
    /// Known and without effect: the cache is always one buffer that grows.
    pub past_present_share_buffer: bool,
    /// Seed of the draws; −1 takes one from the clock.
    pub random_seed: i64,
    /// Tokens of a prompt that are computed at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunk_size: Option<usize>,
    /// Known and unused by decoders of text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blank_penalty: Option<f32>,
}

impl Default for SearchOptions {
    fn default() -> Self {
        Self {
            do_sample: false,
            min_length: 0,
            max_length: 0,
            batch_size: 1,
            num_beams: 1,
            num_return_sequences: 1,
            repetition_penalty: 1.0,
            top_k: 50,
            top_p: 0.0,
            temperature: 1.0,
            early_stopping: true,
            no_repeat_ngram_size: 0,
            diversity_penalty: 0.0,
            length_penalty: 1.0,
            past_present_share_buffer: false,
            random_seed: -1,
            chunk_size: None,
            blank_penalty: None,
        }
    }
}

impl SearchOptions {
    /// The names of all options.
    pub const NAMES: [&'static str; 18] = [
        "do_sample",
        "min_length",
        "max_length",
        "batch_size",
        "num_beams",
        "num_return_sequences",
        "repetition_penalty",
        "top_k",
        "top_p",
        "temperature",
        "early_stopping",
        "no_repeat_ngram_size",
        "diversity_penalty",
        "length_penalty",
        "past_present_share_buffer",
        "random_seed",
        "chunk_size",
        "blank_penalty",
    ];

    /// Sets an option by its name. Switches also take 0 and 1, whole numbers must be whole.
    ///
    /// # Errors
    /// [`Error::UnknownKey`] for an unknown name, [`Error::Config`] for a value of another kind.
    pub fn set(&mut self, name: &str, value: SearchValue) -> Result<()> {
        let wrong = |expected: &str| Error::config(ORIGIN, name, expected, value.to_string());
        let switch = || value.switch().ok_or_else(|| wrong("true or false"));
        let count = || value.count().ok_or_else(|| wrong("a whole number from 0 on"));
        let number = || value.number().ok_or_else(|| wrong("a number"));
        match name {
            "do_sample" => self.do_sample = switch()?,
            "early_stopping" => self.early_stopping = switch()?,
            "past_present_share_buffer" => self.past_present_share_buffer = switch()?,
            "min_length" => self.min_length = count()?,
            "max_length" => self.max_length = count()?,
            "batch_size" => self.batch_size = count()?,
            "num_beams" => self.num_beams = count()?,
            "num_return_sequences" => self.num_return_sequences = count()?,
            "top_k" => self.top_k = count()?,
            "no_repeat_ngram_size" => self.no_repeat_ngram_size = count()?,
            "chunk_size" => self.chunk_size = Some(count()?),
            "repetition_penalty" => self.repetition_penalty = number()? as f32,
            "top_p" => self.top_p = number()? as f32,
            "temperature" => self.temperature = number()? as f32,
            "diversity_penalty" => self.diversity_penalty = number()? as f32,
            "length_penalty" => self.length_penalty = number()? as f32,
            "blank_penalty" => self.blank_penalty = Some(number()? as f32),
            "random_seed" => {
                let seed = number()?;
                if seed.fract() != 0.0 || seed.abs() > 9e15 {
                    return Err(wrong("a whole number"));
                }
                self.random_seed = seed as i64;
            }
            _ => return Err(Error::unknown_key(ORIGIN, name, Self::NAMES)),
        }
        Ok(())
    }

    /// Checks all values against each other and the model's limits.
    ///
    /// # Errors
    /// [`Error::Config`] that names the first option that cannot be.
    pub fn check(&self, origin: &str, context_length: usize, vocab_size: usize) -> Result<()> {
        let fail =
            |key: &str, expected: String, found: String| Err(Error::config(origin, key, expected, found));
        if self.max_length > context_length {
            let expected = format!("at most the model's context of {context_length}");
            return fail("max_length", expected, self.max_length.to_string());
        }
        if self.batch_size == 0 || self.batch_size > 32 {
            return fail("batch_size", "1 to 32".into(), self.batch_size.to_string());
        }
        if self.num_beams == 0 || self.num_beams > 32 {
            return fail("num_beams", "1 to 32".into(), self.num_beams.to_string());
        }
        if self.num_return_sequences == 0 || self.num_return_sequences > self.num_beams {
            let expected = format!("1 to `num_beams` ({})", self.num_beams);
            return fail(
                "num_return_sequences",
                expected,
                self.num_return_sequences.to_string(),
            );
        }
        if vocab_size > 0 && self.top_k > vocab_size {
            let expected = format!("at most the vocabulary's {vocab_size}");
            return fail("top_k", expected, self.top_k.to_string());
        }
        if !(0.0..=1.0).contains(&self.top_p) {
            return fail("top_p", "0 to 1".into(), self.top_p.to_string());
        }
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return fail(
                "temperature",
                "a number from 0 on".into(),
                self.temperature.to_string(),
            );
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return fail(
                "repetition_penalty",
                "a number above 0".into(),
                self.repetition_penalty.to_string(),
            );
        }
        if self.chunk_size == Some(0) {
            return fail("chunk_size", "a number above 0".into(), "0".into());
        }
        if self.do_sample && self.num_beams > 1 {
            return fail(
                "do_sample",
                "false together with `num_beams`".into(),
                "true".into(),
            );
        }
        Ok(())
    }
}

const ORIGIN: &str = "search options";

/// The value of an option that is set by name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SearchValue {
    /// A switch.
    Bool(bool),
    /// Any number.
    Number(f64),
}

impl SearchValue {
    fn switch(self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(value),
            Self::Number(0.0) => Some(false),
            Self::Number(1.0) => Some(true),
            Self::Number(_) => None,
        }
    }

    fn number(self) -> Option<f64> {
        match self {
            Self::Number(value) if value.is_finite() => Some(value),
            _ => None,
        }
    }

    fn count(self) -> Option<usize> {
        self.number()
            .filter(|v| *v >= 0.0 && v.fract() == 0.0 && *v <= 4e9)
            .map(|v| v as usize)
    }
}

impl std::fmt::Display for SearchValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::Number(value) => write!(f, "{value}"),
        }
    }
}

/// `true`, `false` or a number; `None` for other text.
impl std::str::FromStr for SearchValue {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "true" => Ok(Self::Bool(true)),
            "false" => Ok(Self::Bool(false)),
            _ => text
                .parse()
                .map(Self::Number)
                .map_err(|_| Error::config(ORIGIN, text, "true, false or a number", text)),
        }
    }
}

impl From<bool> for SearchValue {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<f64> for SearchValue {
    fn from(value: f64) -> Self {
        Self::Number(value)
    }
}

impl From<f32> for SearchValue {
    fn from(value: f32) -> Self {
        Self::Number(f64::from(value))
    }
}

impl From<usize> for SearchValue {
    fn from(value: usize) -> Self {
        Self::Number(value as f64)
    }
}

impl From<i32> for SearchValue {
    fn from(value: i32) -> Self {
        Self::Number(f64::from(value))
    }
}

/// What a [`crate::Generator`] is made with: the options of the search, from the model's defaults on.
#[derive(Debug, Clone)]
pub struct GeneratorParams {
    pub(crate) options: SearchOptions,
    pub(crate) input_ids: Vec<u32>,
    origin: String,
    context_length: usize,
    vocab_size: usize,
}

impl GeneratorParams {
    /// The defaults of a model.
    pub fn new(model: &Model) -> Self {
        let config = model.config();
        Self {
            options: config.search.clone(),
            input_ids: Vec::new(),
            origin: ORIGIN.to_owned(),
            context_length: config.model.context_length,
            vocab_size: config.model.vocab_size,
        }
    }

    /// Sets an option by its name, as `set_search_options` of onnxruntime-genai does.
    ///
    /// # Errors
    /// [`Error::UnknownKey`] or [`Error::Config`], with the option's name.
    pub fn set(&mut self, name: &str, value: impl Into<SearchValue>) -> Result<&mut Self> {
        self.options.set(name, value.into())?;
        Ok(self)
    }

    /// All options.
    pub fn options(&self) -> &SearchOptions {
        &self.options
    }

    /// All options, to be changed.
    pub fn options_mut(&mut self) -> &mut SearchOptions {
        &mut self.options
    }

    /// Sets the prompt, `[batch_size, length]`; for programs that follow the older `params.input_ids = …`. The prompt
    /// is computed by [`crate::Generator::compute_logits`] or the first token that is asked for.
    pub fn set_input_ids(&mut self, ids: &[u32]) -> &mut Self {
        self.input_ids = ids.to_vec();
        self
    }

    /// Checks all options against each other and the model.
    ///
    /// # Errors
    /// [`Error::Config`] with the option's name.
    pub fn check(&self) -> Result<()> {
        self.options
            .check(&self.origin, self.context_length, self.vocab_size)
    }

    /// The length at which generation ends.
    pub(crate) fn max_length(&self) -> usize {
        if self.options.max_length == 0 {
            self.context_length
        } else {
            self.options.max_length
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_set_by_name() {
        let mut options = SearchOptions::default();
        for name in SearchOptions::NAMES {
            options.set(name, SearchValue::Number(1.0)).unwrap();
        }
        assert!(options.do_sample && options.early_stopping && options.chunk_size == Some(1));
        let error = options
            .set("topk", SearchValue::Number(1.0))
            .unwrap_err()
            .to_string();
        assert!(error.contains("did you mean `top_k`"), "{error}");
        let error = options
            .set("top_k", SearchValue::Number(1.5))
            .unwrap_err()
            .to_string();
        assert!(error.contains("`top_k`") && error.contains("whole"), "{error}");
        assert!(options.set("temperature", SearchValue::Bool(true)).is_err());
        assert!(options.set("do_sample", "false".parse().unwrap()).is_ok());
        assert!(!options.do_sample);
        assert!("maybe".parse::<SearchValue>().is_err());
    }
}
