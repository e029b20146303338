//! What to read and how to make samples of it.

use super::source::{DataFormat, DataSource, Table};
use super::template::Template;
use super::{Sample, blocks, strategy};
use crate::error::{Error, Result};
use crate::text::TextTokenizer;

/// Where a row's text comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum TextSource {
    /// These columns, joined with one space.
    Columns(Vec<String>),
    /// A template that names columns.
    Template(Template),
    /// A column of chat messages, put through a chat template: the model's, or this one. The template writes its
    /// own special tokens, so [`TextGenConfig::add_special_tokens`] does not apply.
    Chat {
        /// The column.
        column: String,
        /// The template; `None` for the model's.
        template: Option<String>,
    },
}

impl TextSource {
    /// A template.
    ///
    /// # Errors
    /// [`Error::Config`] naming what is wrong with its braces.
    pub fn template(source: &str) -> Result<Self> {
        Template::parse(source).map(Self::Template).map_err(|reason| {
            Error::config(
                "data",
                "text_template",
                "a template with `{column}` fields",
                reason,
            )
        })
    }
}

/// How the texts of the rows become samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// A row is a sample, cut off at the length.
    LineByLine,
    /// Rows drawn at random, each a sample.
    LineByLineRandom,
    /// All rows one after another, cut into blocks that do not overlap.
    Join,
    /// Blocks that begin at rows drawn at random.
    JoinRandom,
    /// Blocks that begin every `stride` tokens; what a block shares with the one before is not trained on, and
    /// neither is the beginning of the first one.
    JoinSlidingWindow {
        /// Tokens between the beginnings of two blocks.
        stride: usize,
    },
}

/// Olive's text-generation preprocessing.
///
/// Deviations: a padded sample is filled up on the right whatever `padding_side` says, which changes no
/// loss of a causal model with rotary positions; and a random strategy that finds no sample of full length drops
/// it, where Olive keeps the last short one.
#[derive(Debug, Clone, PartialEq)]
pub struct TextGenConfig {
    /// Where the text comes from.
    pub text: TextSource,
    /// How it becomes samples.
    pub strategy: Strategy,
    /// Tokens of a sample.
    pub max_seq_len: usize,
    /// Samples at most; the random strategies need a number.
    pub max_samples: Option<usize>,
    /// Whether line-by-line samples are filled up to the length.
    pub pad_to_max_len: bool,
    /// Whether line-by-line samples below the length are dropped; not together with padding.
    pub drop_short_sequences: bool,
    /// Whether a text becomes `"{bos} {text} {eos}"`, with those spaces.
    pub add_special_tokens: bool,
    /// What follows each row of the join strategies; may be empty.
    pub joiner: String,
    /// Rows that are joined at a time. Blocks go on from one batch to the next, but a sliding window begins anew.
    pub processing_batch_size: usize,
    /// The seed of the random strategies.
    pub random_seed: i64,
    /// Draws of the random strategies before a sample is given up.
    pub random_retries: usize,
}

impl TextGenConfig {
    /// Olive's defaults, but without special tokens, as its command line passes it.
    pub fn new(text: TextSource) -> Self {
        Self {
            text,
            strategy: Strategy::Join,
            max_seq_len: 1024,
            max_samples: None,
            pad_to_max_len: true,
            drop_short_sequences: false,
            add_special_tokens: false,
            joiner: "\n\n".to_owned(),
            processing_batch_size: 1024,
            random_seed: 42,
            random_retries: 10,
        }
    }

    /// The samples of a table.
    ///
    /// # Errors
    /// [`Error::File`] with column and line for a row that lacks a column; [`Error::Config`] for options that
    /// exclude each other, or if no sample results; errors of the tokenizer.
    pub fn samples(&self, table: &Table, tokenizer: &TextTokenizer) -> Result<Vec<Sample>> {
        strategy::samples(self, table, tokenizer)
    }
}

/// A data config: a source and what is made of it.
#[derive(Debug, Clone, PartialEq)]
pub struct DataConfig {
    /// The files.
    pub source: DataSource,
    /// What is made of them.
    pub text: TextGenConfig,
}

impl DataConfig {
    /// Loads and tokenises for training.
    ///
    /// # Errors
    /// Those of [`DataSource::load`] and [`TextGenConfig::samples`].
    pub fn samples(&self, tokenizer: &TextTokenizer) -> Result<Vec<Sample>> {
        self.text.samples(&self.source.load()?, tokenizer)
    }

    /// Loads and tokenises for calibration: plain text files as consecutive blocks from the start, other files as
    /// [`DataConfig::samples`] without their padding.
    ///
    /// # Errors
    /// Those of [`DataConfig::samples`] and [`token_blocks`](super::token_blocks).
    pub fn calibration(&self, tokenizer: &TextTokenizer) -> Result<Vec<Vec<u32>>> {
        if self.source.format == DataFormat::Text {
            let texts = self.source.texts()?;
            return blocks::token_blocks(tokenizer, &texts, self.text.max_seq_len, self.text.max_samples);
        }
        let samples = self.samples(tokenizer)?.into_iter().map(|mut sample| {
            sample.input_ids.truncate(sample.length);
            sample.input_ids
        });
        Ok(samples.collect())
    }

    /// Calibration from [`DEFAULT_CALIBRATION_TEXT`](super::DEFAULT_CALIBRATION_TEXT).
    ///
    /// # Errors
    /// Those of [`token_blocks`](super::token_blocks).
    pub fn default_calibration(
        tokenizer: &TextTokenizer,
        block_len: usize,
        max_blocks: usize,
    ) -> Result<Vec<Vec<u32>>> {
        let texts = [blocks::DEFAULT_CALIBRATION_TEXT.to_owned()];
        blocks::token_blocks(tokenizer, &texts, block_len, Some(max_blocks))
    }
}
