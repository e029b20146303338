//! What a graph is built with.

use olive_core::{Error, Result};
use serde_json::{Map, Value};

/// How the linears of a dense checkpoint are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Float. The linears of a packed checkpoint stay packed as they are.
    Fp32,
    /// 4-bit blocks, for whatever the checkpoint does not hold packed already.
    Int4,
}

/// Options of the builder; the defaults are those of onnxruntime-genai's builder on the CPU.
#[derive(Debug, Clone, PartialEq)]
pub struct BuilderOptions {
    /// How dense linears are stored.
    pub precision: Precision,
    /// Inputs that share a scale: 16, 32, 64, 128 or 256.
    pub block_size: usize,
    /// Whether every zero point is 8.
    pub is_symmetric: bool,
    /// What MatMulNBits may compute in: 0 as it likes, 1 float32, 2 float16, 3 bfloat16, 4 int8 activations. `None`
    /// is 4 for a graph in int4, as onnxruntime-genai's builder has it, and 0 for one in fp32, whose packed linears
    /// then see the activations that they were calibrated and trained with.
    pub accuracy_level: Option<i64>,
    /// Values for the `search` part of the runtime's config, over those that come from the checkpoint.
    pub search: Map<String, Value>,
}

impl Default for BuilderOptions {
    fn default() -> Self {
        Self {
            precision: Precision::Fp32,
            block_size: 32,
            is_symmetric: true,
            accuracy_level: None,
            search: Map::new(),
        }
    }
}

impl BuilderOptions {
    /// The defaults with another precision.
    pub fn with_precision(precision: Precision) -> Self {
        Self {
            precision,
            ..Self::default()
        }
    }

    /// The level that is put on the nodes; 0 is left out.
    pub fn effective_accuracy_level(&self) -> i64 {
        self.accuracy_level.unwrap_or(match self.precision {
            Precision::Int4 => 4,
            Precision::Fp32 => 0,
        })
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Config`] naming the option.
    pub fn check(&self) -> Result<()> {
        let wrong =
            |key: &str, expected: &str, found: String| Error::config("model builder", key, expected, found);
        if ![16, 32, 64, 128, 256].contains(&self.block_size) {
            return Err(wrong(
                "block_size",
                "16, 32, 64, 128 or 256",
                self.block_size.to_string(),
            ));
        }
        if let Some(level) = self.accuracy_level.filter(|level| !(0..=4).contains(level)) {
            return Err(wrong("accuracy_level", "0 to 4", level.to_string()));
        }
        Ok(())
    }
}
