//! The gated MLP: `down(act(gate(x)) · up(x))`.

use olive_core::arch::{Activation, MlpLayout};
use olive_core::{Error, LinearRole, LinearSpec, Result};

use super::graph::{Builder, io_shape};
use super::linear::Linear;
use super::options::ORIGIN;
use super::weights::{Kind, Stored};
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
        let [gate, up] = match self.options.fuse_gate_up {
            true => self.gate_and_up(&path, &gate, &up, input)?,
            false => [self.linear(&gate, input, None)?, self.linear(&up, input, None)?],
        };
        let activated = self.activation(&path, &gate);
        let name = format!("{path}/Mul");
        let product = Node::new(&name, "Mul", &[&activated, &up], &[&format!("{name}/output_0")]);
        let product = self.hidden(product, width);
        self.linear(&down, &product, None)
    }

    /// Gate and up as one product, then apart.
    fn gate_and_up(&mut self, path: &str, gate: &Linear, up: &Linear, input: &str) -> Result<[String; 2]> {
        let wrong = |found: &str| {
            let expected = "gate and up without adapters, both float or both packed alike, quantized alike";
            Err(Error::config(ORIGIN, "fuse_mlp_gate_up", expected, found))
        };
        let stored = Stored::join(&[gate.stored.clone(), up.stored.clone()]);
        if gate.adapter.is_some() || up.adapter.is_some() {
            return wrong("an adapter on one of them");
        }
        if self.weights.kind(&stored)? == Kind::Mixed {
            return wrong("weights of different kinds");
        }
        if self.method(&gate.path).is_some() != self.method(&up.path).is_some() {
            return wrong("one that is excluded");
        }
        let width = self.spec.intermediate_size;
        let both = Linear {
            path: format!("{path}/gate_up_proj"),
            stored,
            adapter: None,
        };
        let product = self.linear(&both, input, None)?;
        let outputs = ["gate_proj", "up_proj"].map(|part| format!("{path}/{part}/MatMul/output_0"));
        let name = format!("{path}/gate_up_proj/Split");
        let outs = outputs.each_ref().map(String::as_str);
        let node = Node::new(name, "Split", &[&product], &outs)
            .with("axis", -1)
            .with("num_outputs", 2);
        for output in &outputs {
            self.declare(output, self.io, io_shape(width));
        }
        self.push(node);
        Ok(outputs)
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
