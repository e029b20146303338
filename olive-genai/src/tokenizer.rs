//! [`Tokenizer`] and [`TokenizerStream`].

use std::path::Path;
use std::sync::Arc;

use olive_core::Result;
use olive_core::text::{ChatInputs, TextTokenizer};
use serde_json::Value;

use crate::config::GenaiConfig;
use crate::model::Model;

/// Text to token ids and back, with the defaults of onnxruntime-genai: no special tokens are added, special tokens in
/// the text are recognised, and decoding leaves them out.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<TextTokenizer>,
    pad: u32,
    bos: u32,
    eos: Vec<u32>,
}

/// Several texts as one block of ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBatch {
    /// `[texts, width]`, shorter texts padded on the right.
    pub ids: Vec<u32>,
    /// Length of the longest text.
    pub width: usize,
}

impl Tokenizer {
    /// The tokenizer of a model's folder.
    ///
    /// # Errors
    /// Those of [`TextTokenizer::open`].
    pub fn new(model: &Model) -> Result<Self> {
        Self::of(model.folder(), model.config())
    }

    /// The tokenizer of a folder with this description.
    pub(crate) fn of(folder: &Path, config: &GenaiConfig) -> Result<Self> {
        let config = &config.model;
        let folder = match config.tokenizer_dir.as_str() {
            "" => folder.to_path_buf(),
            name => olive_core::fsio::contained(folder, name)?,
        };
        Ok(Self {
            inner: Arc::new(TextTokenizer::open(folder)?),
            pad: config.pad_token_id,
            bos: config.bos_token_id,
            eos: config.eos_token_id.clone(),
        })
    }

    /// Token ids of a text.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.inner.encode(text, false)
    }

    /// Token ids of several texts, padded on the right with the model's padding token.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn encode_batch(&self, texts: &[String]) -> Result<TokenBatch> {
        let rows = self.inner.encode_batch(texts, false)?;
        let width = rows.iter().map(Vec::len).max().unwrap_or(0);
        let pad = |row: Vec<u32>| {
            let missing = width - row.len();
            row.into_iter().chain(std::iter::repeat_n(self.pad, missing))
        };
        Ok(TokenBatch {
            ids: rows.into_iter().flat_map(pad).collect(),
            width,
        })
    }

    /// The text of token ids, without special tokens.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true)
    }

    /// The id of a token's exact text.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.id_of(token)
    }

    /// The model's padding token.
    pub fn pad_token_id(&self) -> u32 {
        self.pad
    }

    /// The model's first token of a text.
    pub fn bos_token_id(&self) -> u32 {
        self.bos
    }

    /// The model's end tokens.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos
    }

    /// A decoder that takes one token at a time.
    pub fn stream(&self) -> TokenizerStream {
        TokenizerStream {
            tokenizer: self.clone(),
            ids: Vec::new(),
            said: 0,
        }
    }

    /// A conversation, a list of `{"role", "content"}`, as the text that the model was trained on: by the folder's chat
    /// template, or by `template`. Encode it as it is.
    ///
    /// # Errors
    /// If there is no template or it refuses the messages.
    pub fn apply_chat_template(
        &self,
        messages: &Value,
        template: Option<&str>,
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        self.inner.render_chat(&ChatInputs {
            messages,
            tools,
            add_generation_prompt,
            template,
            extra: None,
        })
    }

    /// The tokenizer beneath, with special tokens under control.
    pub fn text_tokenizer(&self) -> &TextTokenizer {
        &self.inner
    }
}

/// Decodes a sequence token by token. Pieces join to the text of the whole sequence: a character that takes several
/// tokens comes out with its last one, and spaces between words are kept.
pub struct TokenizerStream {
    tokenizer: Tokenizer,
    /// Tokens whose text is not settled, after those that give them their context.
    ids: Vec<u32>,
    /// How many of `ids` are context, whose text is out.
    said: usize,
}

impl TokenizerStream {
    /// Tokens that an unfinished character may wait for; longer runs are bytes that are no text.
    const PATIENCE: usize = 8;

    /// The text that `id` completes; empty while a character is unfinished.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn decode(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let waiting = self.ids.len() - self.said;
        let (before, all) = self.texts()?;
        let unfinished = all.ends_with('\u{fffd}') && waiting < Self::PATIENCE;
        if all.len() <= before.len() || unfinished {
            // A token without text of its own still shapes the space of the next one.
            return Ok(String::new());
        }
        Ok(self.settle(&before, all))
    }

    /// What is left when the sequence has ended: the replacement of an unfinished character, or nothing.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn finish(&mut self) -> Result<String> {
        let (before, all) = self.texts()?;
        let rest = self.settle(&before, all);
        self.ids.clear();
        self.said = 0;
        Ok(rest)
    }

    fn texts(&self) -> Result<(String, String)> {
        let decode = |ids: &[u32]| self.tokenizer.decode(ids);
        Ok((decode(&self.ids[..self.said])?, decode(&self.ids)?))
    }

    fn settle(&mut self, before: &str, all: String) -> String {
        self.ids.drain(..self.said);
        self.said = self.ids.len();
        match all.strip_prefix(before) {
            Some(rest) => rest.to_owned(),
            None => {
                let same = before.chars().zip(all.chars()).take_while(|(a, b)| a == b);
                let length: usize = same.map(|(a, _)| a.len_utf8()).sum();
                all[length..].to_owned()
            }
        }
    }
}
