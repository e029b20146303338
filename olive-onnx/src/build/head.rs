//! The language-model head: hidden states to `logits`, those of every position or of the last.

use olive_core::{LinearRole, LinearSpec, Result};

use super::graph::{Builder, io_shape};
use super::linear::Linear;
use super::weights::Stored;
use crate::ir::{Dim, Node, OnnxType};

/// The output's name.
const LOGITS: &str = "logits";

impl Builder<'_> {
    /// Adds the head over the last norm's output.
    pub fn head(&mut self, input: &str) -> Result<()> {
        let linear = Linear {
            path: "/lm_head".to_owned(),
            stored: self.head_rows(),
            adapter: None,
        };
        let mut input = input.to_owned();
        if self.options.prune_lm_head {
            input = self.last_position(&input)?;
        }
        if self.io != OnnxType::Bfloat16 {
            self.linear(&linear, &input, Some(LOGITS))?;
            return Ok(());
        }
        // Logits of 8 significant bits are too coarse to sample from.
        let logits = self.linear(&linear, &input, None)?;
        let cast = Node::new("/lm_head/Cast", "Cast", &[&logits], &[LOGITS])
            .with("to", i64::from(OnnxType::Float.code()));
        self.node(cast, OnnxType::Float, io_shape(self.spec.vocab_size));
        Ok(())
    }

    /// Where the head's rows are: those of the embedding, if they are tied.
    pub fn head_rows(&self) -> Stored {
        self.vocabulary_rows(self.spec.lm_head_name())
    }

    /// Where the rows `[vocab, hidden]` of a stored table are.
    pub fn vocabulary_rows(&self, stored: &str) -> Stored {
        Stored::whole(&[LinearSpec {
            // Head and embedding have no role of their own; they are read like any linear.
            role: LinearRole::O,
            name: stored.trim_end_matches(".weight").to_owned(),
            in_features: self.spec.hidden_size,
            out_features: self.spec.vocab_size,
            bias: false,
        }])
    }

    fn last_position(&mut self, input: &str) -> Result<String> {
        let hidden = self.spec.hidden_size;
        let last = self.scalar(-1)?;
        let name = "/lm_head/prune/Gather";
        let gather = Node::new(name, "Gather", &[input, &last], &[&format!("{name}/output_0")]);
        let flat = self.node(
            gather.with("axis", 1),
            self.io,
            [Dim::from("batch_size"), hidden.into()],
        );
        let axis = self.list(&[1])?;
        let name = "/lm_head/prune/Unsqueeze";
        let node = Node::new(name, "Unsqueeze", &[&flat, &axis], &[&format!("{name}/output_0")]);
        let shape = [Dim::from("batch_size"), 1.into(), hidden.into()];
        Ok(self.node(node, self.io, shape))
    }
}
