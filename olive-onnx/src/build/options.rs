//! What a graph is built with.

use olive_core::{Error, Result};

/// How the linears of a dense checkpoint are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Float. The linears of a packed checkpoint stay packed as they are.
    Fp32,
    /// 4-bit blocks, for whatever the checkpoint does not hold packed already.
    Int4,
}

/// Options of the builder; the defaults are those of onnxruntime-genai's builder on the CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuilderOptions {
    /// How dense linears are stored.
    pub precision: Precision,
    /// Inputs that share a scale: 16, 32, 64, 128 or 256.
    pub block_size: usize,
    /// Whether every zero point is 8.
    pub is_symmetric: bool,
    /// What MatMulNBits may compute in: 0 as it likes, 1 float32, 2 float16, 3 bfloat16, 4 int8 activations.
    pub accuracy_level: i64,
}

impl Default for BuilderOptions {
    fn default() -> Self {
        Self {
            precision: Precision::Fp32,
            block_size: 32,
            is_symmetric: true,
            accuracy_level: 4,
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
        if !(0..=4).contains(&self.accuracy_level) {
            return Err(wrong("accuracy_level", "0 to 4", self.accuracy_level.to_string()));
        }
        Ok(())
    }
}
