//! Consecutive blocks of plain text, for calibration and perplexity.

use crate::error::{Error, Result};
use crate::text::TextTokenizer;

/// Public-domain prose that calibrates where the user gives no data.
pub const DEFAULT_CALIBRATION_TEXT: &str = include_str!("../../../fixtures/calibration-public-domain.txt");

/// Blocks of `block_len` tokens from the start of the texts, which are tokenised without special tokens and follow
/// each other directly; `max_blocks` of them at most, the short rest dropped.
///
/// # Errors
/// [`Error::Config`] for a block length of 0, or if the texts do not fill one block.
pub fn token_blocks(
    tokenizer: &TextTokenizer,
    texts: &[String],
    block_len: usize,
    max_blocks: Option<usize>,
) -> Result<Vec<Vec<u32>>> {
    if block_len == 0 {
        return Err(Error::config("data", "max_seq_len", "at least 1", "0"));
    }
    let limit = max_blocks.unwrap_or(usize::MAX);
    let mut ids: Vec<u32> = Vec::new();
    for text in texts {
        if ids.len() / block_len >= limit {
            break;
        }
        ids.extend(tokenizer.encode(text, false)?);
    }
    if ids.len() < block_len {
        let found = format!("only {} in the text", ids.len());
        return Err(Error::config(
            "data",
            "max_seq_len",
            format!("{block_len} tokens or more"),
            found,
        ));
    }
    Ok(ids
        .chunks_exact(block_len)
        .take(limit)
        .map(<[u32]>::to_vec)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_follow_each_other_and_the_rest_is_dropped() {
        let tokenizer =
            TextTokenizer::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/tiny-phi3")).unwrap();
        let text = "The quick brown fox jumps over the lazy dog. ".repeat(20);
        let ids = tokenizer.encode(&text, false).unwrap();
        let texts = [text];
        let blocks = token_blocks(&tokenizer, &texts, 16, None).unwrap();
        assert_eq!(blocks.concat(), ids[..ids.len() / 16 * 16]);
        assert_eq!(
            token_blocks(&tokenizer, &texts, 16, Some(2)).unwrap(),
            blocks[..2]
        );
        assert_eq!(
            token_blocks(&tokenizer, &texts, ids.len(), None).unwrap(),
            std::slice::from_ref(&ids)
        );
        assert!(token_blocks(&tokenizer, &texts, ids.len() + 1, None).is_err());
        assert!(token_blocks(&tokenizer, &texts, 0, None).is_err());
    }
}
