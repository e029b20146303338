//! [`TextTokenizer`]: `tokenizer.json` and the files beside it.

use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

use super::chat::{ChatInputs, ChatTemplates};
use super::special::SpecialTokens;
use crate::error::{Error, Result};

/// The tokenizer of a model folder. Text goes in whole: nothing is truncated or padded, whatever
/// `tokenizer.json` says about it.
pub struct TextTokenizer {
    folder: PathBuf,
    inner: Tokenizer,
    special: SpecialTokens,
    chat: ChatTemplates,
}

impl TextTokenizer {
    /// Opens `tokenizer.json` of a folder, with `tokenizer_config.json`, `special_tokens_map.json` and
    /// `chat_template.jinja` where they are there.
    ///
    /// # Errors
    /// [`Error::File`] if there is no `tokenizer.json` or it cannot be read as one; [`Error::Io`] and
    /// [`Error::Json`] for the other files.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            let found = if folder.join("tokenizer.model").is_file() {
                "only `tokenizer.model`, which must be converted to `tokenizer.json` first"
            } else {
                "no such file"
            };
            return Err(Error::file(path, "a tokenizer", found));
        }
        let bytes = crate::fsio::read(&path)?;
        let mut inner = Tokenizer::from_bytes(&bytes)
            .map_err(|source| Error::file(&path, "a tokenizer", source.to_string()))?;
        inner
            .with_truncation(None)
            .map_err(|source| Error::file(&path, "a tokenizer", source.to_string()))?;
        inner.with_padding(None);
        Ok(Self {
            folder: folder.to_path_buf(),
            inner,
            special: SpecialTokens::read(folder)?,
            chat: ChatTemplates::read(folder)?,
        })
    }

    /// The folder it was opened from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Token ids of `text`. Special tokens written in the text become their ids; `add_special` adds those that the
    /// tokenizer puts around every text.
    ///
    /// # Errors
    /// [`Error::File`] naming `tokenizer.json` if the tokenizer fails.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special);
        Ok(encoding.map_err(|e| self.failed(&e))?.get_ids().to_vec())
    }

    /// [`TextTokenizer::encode`] of many texts, in order, on all cores.
    ///
    /// # Errors
    /// [`Error::File`] naming `tokenizer.json` if the tokenizer fails on one of them.
    pub fn encode_batch(&self, texts: &[String], add_special: bool) -> Result<Vec<Vec<u32>>> {
        use rayon::prelude::*;
        texts
            .par_iter()
            .map(|text| self.encode(text, add_special))
            .collect()
    }

    /// The text of token ids, without special tokens if `skip_special`.
    ///
    /// # Errors
    /// [`Error::File`] naming `tokenizer.json` if the tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|e| self.failed(&e))
    }

    /// Special tokens as text.
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }

    /// The id of a token's exact text.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The id that begins a sequence.
    pub fn bos_id(&self) -> Option<u32> {
        self.special.bos.as_deref().and_then(|token| self.id_of(token))
    }

    /// The id that ends a sequence.
    pub fn eos_id(&self) -> Option<u32> {
        self.special.eos.as_deref().and_then(|token| self.id_of(token))
    }

    /// The id that fills a sequence up: the padding token, else the one that ends a sequence.
    pub fn pad_id(&self) -> Option<u32> {
        let pad = self.special.pad.as_deref().and_then(|token| self.id_of(token));
        pad.or_else(|| self.eos_id())
    }

    /// Entries of the vocabulary, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The chat templates of the folder.
    pub fn chat_templates(&self) -> &ChatTemplates {
        &self.chat
    }

    /// A conversation as the text that the model was trained on, by the folder's chat template or the one in
    /// `inputs`. The text has its special tokens already: encode it with `add_special: false`.
    ///
    /// # Errors
    /// [`Error::File`] if there is no template, or if it refuses the messages.
    pub fn render_chat(&self, inputs: &ChatInputs<'_>) -> Result<String> {
        self.chat.render(&self.special, inputs)
    }

    /// The `tokenizers` crate's own type.
    pub fn inner(&self) -> &Tokenizer {
        &self.inner
    }

    fn failed(&self, source: &tokenizers::Error) -> Error {
        Error::file(
            self.folder.join("tokenizer.json"),
            "a tokenizer that accepts the text",
            source.to_string(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_tokenizer_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = TextTokenizer::open(folder.path()).err().unwrap().to_string();
        assert!(
            error.contains("tokenizer.json") && error.contains("no such file"),
            "{error}"
        );
        std::fs::write(folder.path().join("tokenizer.json"), "{\"version\": 1").unwrap();
        let error = TextTokenizer::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }

    #[test]
    fn special_text_becomes_ids_and_decodes_back() {
        let tokenizer =
            TextTokenizer::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/tiny-phi3")).unwrap();
        let text = "<|user|>\nhello world<|end|>\n";
        let ids = tokenizer.encode(text, false).unwrap();
        assert!(ids.contains(&tokenizer.id_of("<|user|>").unwrap()));
        assert!(tokenizer.decode(&ids, false).unwrap().contains("hello world"));
        assert!(!tokenizer.decode(&ids, true).unwrap().contains("<|user|>"));
        assert_eq!(tokenizer.eos_id(), tokenizer.id_of("<|endoftext|>"));
        assert_eq!(tokenizer.pad_id(), tokenizer.eos_id());
        assert_eq!(tokenizer.bos_id(), Some(1));
        let batch = tokenizer
            .encode_batch(&[text.to_owned(), String::new()], false)
            .unwrap();
        assert_eq!(batch, vec![ids, vec![]]);
    }
}
