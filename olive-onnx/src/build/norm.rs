//! RMS norms: `x / sqrt(mean(x²) + ε) · w`, with the residual addition that precedes every one but the first.

use olive_core::Result;

use super::graph::{Builder, dotted};
use crate::ir::{MICROSOFT, Node};

/// The output that holds what the head reads.
pub const HIDDEN_STATES: &str = "hidden_states";

impl Builder<'_> {
    /// A norm over the residual stream `root`, to which `delta` is added first. Gives the normed value and the new
    /// residual.
    pub fn norm(
        &mut self,
        path: &str,
        stored: &str,
        root: &str,
        delta: Option<&str>,
    ) -> Result<(String, String)> {
        let hidden = self.spec.hidden_size;
        let weight = format!("{}.weight", dotted(path));
        let output = format!("{path}/output_0");
        self.initializer(self.weights.vector(&weight, stored, hidden)?);
        let Some(delta) = delta else {
            let name = format!("{path}/LayerNorm");
            let node = simplified_norm(&name, [root, &weight], &output, self.epsilon());
            return Ok((self.hidden(node, hidden), root.to_owned()));
        };
        let sum = format!("{path}/output_3");
        let node = self.skip_norm(path, [root, delta, &weight], &[&output, "", "", &sum]);
        self.hidden(node, hidden);
        self.declare(&sum, self.io, super::graph::io_shape(hidden));
        Ok((output, sum))
    }

    /// The norm before the head.
    pub fn final_norm(&mut self, root: &str, delta: &str) -> Result<String> {
        let path = format!("/model/layers.{}/final_norm_layernorm", self.spec.n_layers);
        let weight = format!("{}.weight", dotted(&path));
        let stored = self.spec.final_norm_name();
        self.initializer(self.weights.vector(&weight, stored, self.spec.hidden_size)?);
        let own = format!("{path}/output_0");
        if self.options.include_hidden_states || self.options.exclude_lm_head {
            // An output of the graph, declared as such.
            let node = self.skip_norm(&path, [root, delta, &weight], &[HIDDEN_STATES]);
            self.push(node);
            return Ok(HIDDEN_STATES.to_owned());
        }
        let node = self.skip_norm(&path, [root, delta, &weight], &[&own]);
        Ok(self.hidden(node, self.spec.hidden_size))
    }

    fn skip_norm(&self, path: &str, inputs: [&str; 3], outputs: &[&str]) -> Node {
        let name = format!("{path}/SkipLayerNorm");
        Node::new(name, "SkipSimplifiedLayerNormalization", &inputs, outputs)
            .in_domain(MICROSOFT)
            .with("epsilon", self.epsilon())
    }

    /// ε of every norm, as operators take it.
    pub fn epsilon(&self) -> f32 {
        self.spec.rms_norm_eps as f32
    }
}

/// A norm without an addition, over the last axis.
pub fn simplified_norm(name: &str, inputs: [&str; 2], output: &str, epsilon: f32) -> Node {
    Node::new(name, "SimplifiedLayerNormalization", &inputs, &[output])
        .with("epsilon", epsilon)
        .with("axis", -1)
        .with("stash_type", 1)
}
