//! The special tokens that a folder's tokenizer files name.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::fsio;

/// Special tokens as text; `None` where the files name none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins a sequence.
    pub bos: Option<String>,
    /// Ends a sequence.
    pub eos: Option<String>,
    /// Fills a sequence up.
    pub pad: Option<String>,
    /// Stands for what the vocabulary does not have.
    pub unk: Option<String>,
}

impl SpecialTokens {
    /// Reads `tokenizer_config.json`, then `special_tokens_map.json` for what the former leaves out. Both may be
    /// absent.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Json`]; [`Error::File`] for a token that is neither text nor an object with
    /// `content`.
    pub fn read(folder: &Path) -> Result<Self> {
        let mut tokens = Self::default();
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            let path = folder.join(name);
            if !path.is_file() {
                continue;
            }
            let file: Map<String, Value> = fsio::read_json(&path)?;
            for (slot, key) in [
                (&mut tokens.bos, "bos_token"),
                (&mut tokens.eos, "eos_token"),
                (&mut tokens.pad, "pad_token"),
                (&mut tokens.unk, "unk_token"),
            ] {
                if slot.is_none() {
                    *slot = token_text(&path, key, file.get(key))?;
                }
            }
        }
        Ok(tokens)
    }

    /// Names and texts of those that are there, as chat templates see them.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &str)> {
        [
            ("bos_token", &self.bos),
            ("eos_token", &self.eos),
            ("pad_token", &self.pad),
            ("unk_token", &self.unk),
        ]
        .into_iter()
        .filter_map(|(name, token)| token.as_deref().map(|token| (name, token)))
    }
}

/// A token is written as text or as `{"content": text, …}`.
fn token_text(path: &Path, key: &str, value: Option<&Value>) -> Result<Option<String>> {
    let wrong = |found: &Value| Error::file(path, format!("`{key}` to be a token"), found.to_string());
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => match other.get("content").and_then(Value::as_str) {
            Some(text) => Ok(Some(text.to_owned())),
            None => Err(wrong(other)),
        },
    }
}
