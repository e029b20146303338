//! The language-model head: hidden states to `logits`.

use olive_core::{LinearRole, LinearSpec, Result};

use super::graph::Builder;
use super::linear::Linear;
use super::weights::Stored;

impl Builder<'_> {
    /// Adds the head over the last norm's output.
    pub fn head(&mut self, input: &str) -> Result<()> {
        let stored = LinearSpec {
            // The head has no role of its own; it is read like any dense linear.
            role: LinearRole::O,
            name: self.spec.lm_head_name().trim_end_matches(".weight").to_owned(),
            in_features: self.spec.hidden_size,
            out_features: self.spec.vocab_size,
            bias: false,
        };
        let linear = Linear {
            path: "/lm_head".to_owned(),
            stored: Stored::whole(&[stored]),
            adapter: None,
        };
        self.linear(&linear, input, Some("logits"))?;
        Ok(())
    }
}
