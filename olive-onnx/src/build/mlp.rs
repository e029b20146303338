//! The gated MLP: `down(act(gate(x)) · up(x))`.

use olive_core::arch::{Activation, MlpLayout};
use olive_core::{LinearRole, LinearSpec, Result};

use super::graph::Builder;
use super::linear::Linear;
use super::weights::Stored;
use crate::ir::Node;

impl Builder<'_> {
    /// The MLP of a layer over its norm's output `[batch, sequence, hidden]`.
    pub fn mlp(&mut self, layer: usize, input: &str) -> Result<String> {
        let width = self.spec.intermediate_size;
        let path = format!("/model/layers.{layer}/mlp");
        let linears = self.spec.linears(layer);
        let find = |role| linears.iter().find(|linear: &&LinearSpec| linear.role == role);
        let cut = |role, fused: LinearRole, rows: std::ops::Range<usize>| match self.spec.mlp_layout {
            MlpLayout::Split => find(role).map(|linear| Stored::whole(std::slice::from_ref(linear))),
            MlpLayout::Fused => find(fused).map(|linear| Stored::rows(linear, rows)),
        };
        let parts = [
            ("gate_proj", cut(LinearRole::Gate, LinearRole::GateUp, 0..width)),
            (
                "up_proj",
                cut(LinearRole::Up, LinearRole::GateUp, width..2 * width),
            ),
            (
                "down_proj",
                find(LinearRole::Down).map(|linear| Stored::whole(std::slice::from_ref(linear))),
            ),
        ];
        let [gate, up, down] = parts.map(|(name, stored)| Linear {
            adapter: self.lora.get(&format!("model.layers.{layer}.mlp.{name}")),
            path: format!("{path}/{name}"),
            stored: stored.unwrap_or_default(),
        });
        let gate = self.linear(&gate, input, None)?;
        let up = self.linear(&up, input, None)?;
        let activated = self.activation(&path, &gate);
        let name = format!("{path}/Mul");
        let product = Node::new(&name, "Mul", &[&activated, &up], &[&format!("{name}/output_0")]);
        let product = self.hidden(product, width);
        self.linear(&down, &product, None)
    }

    fn activation(&mut self, path: &str, gate: &str) -> String {
        let width = self.spec.intermediate_size;
        match self.spec.activation {
            Activation::Silu => {
                let name = format!("{path}/act_fn/Sigmoid");
                let sigmoid = Node::new(&name, "Sigmoid", &[gate], &[&format!("{name}/output_0")]);
                let sigmoid = self.hidden(sigmoid, width);
                let name = format!("{path}/act_fn/Mul");
                let node = Node::new(&name, "Mul", &[gate, &sigmoid], &[&format!("{name}/output_0")]);
                self.hidden(node, width)
            }
            Activation::GeluTanh => {
                let name = format!("{path}/act_fn/FastGelu");
                let node = Node::new(&name, "Gelu", &[gate], &[&format!("{name}/output_0")]);
                self.hidden(node.with("approximate", "tanh"), width)
            }
        }
    }
}
