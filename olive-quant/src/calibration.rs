//! The text that shows which activations matter, as token ids.

use olive_core::{Error, ModelSpec, Result};

/// Token sequences on which activations are measured. Each is run on its own, from position 0.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CalibrationSet {
    /// Token ids of each sequence; lengths may differ.
    pub sequences: Vec<Vec<u32>>,
}

impl CalibrationSet {
    /// A set of these sequences; empty ones are left out.
    pub fn new(sequences: Vec<Vec<u32>>) -> Self {
        let sequences = sequences
            .into_iter()
            .filter(|sequence| !sequence.is_empty())
            .collect();
        Self { sequences }
    }

    /// Consecutive blocks of `block` tokens from the start of `ids`, at most `max_blocks`; a ragged rest is left
    /// out.
    pub fn from_blocks(ids: &[u32], block: usize, max_blocks: usize) -> Self {
        let blocks = ids.chunks_exact(block.max(1)).take(max_blocks);
        Self {
            sequences: blocks.map(<[u32]>::to_vec).collect(),
        }
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(Vec::len).sum()
    }

    /// Checks that `spec` can run the sequences.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is none, an id is outside the vocabulary, or a sequence is empty or longer than
    /// the model's positions.
    pub fn check(&self, spec: &ModelSpec) -> Result<()> {
        if self.sequences.is_empty() {
            return Err(Error::tensor(
                "calibration",
                "at least one sequence of tokens",
                "none",
            ));
        }
        for (index, sequence) in self.sequences.iter().enumerate() {
            let name = format!("calibration sequence {index}");
            if sequence.is_empty() || sequence.len() > spec.max_position {
                let expected = format!("1 to {} tokens", spec.max_position);
                return Err(Error::tensor(name, expected, sequence.len().to_string()));
            }
            if let Some(id) = sequence.iter().find(|id| **id as usize >= spec.vocab_size) {
                let expected = format!("ids below {}", spec.vocab_size);
                return Err(Error::tensor(name, expected, id.to_string()));
            }
        }
        Ok(())
    }
}
