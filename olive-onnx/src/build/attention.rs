//! Grouped-query attention with rotary embedding and key/value cache, one GroupQueryAttention node a layer.
//!
//! q, k and v are one product where nothing keeps them apart: an adapter on any of them, or weights of different kinds.
//! Norms on the heads of q and k (Qwen 3) stand before the node, as the CPU's and DirectML's kernels ask, or are part of it.
//! DirectML's rotates nothing: q and k are rotated before it.

use olive_core::arch::AttentionLayout;
use olive_core::{LinearRole, LinearSpec, Result};

use super::graph::Builder;
use super::linear::Linear;
use super::norm::simplified_norm;
use super::options::Provider;
use super::rope::TABLES;
use super::weights::{Kind, Stored};
use crate::ir::{Dim, MICROSOFT, Node};

/// What goes into the attention node as query, key and value; the latter two are empty where the first holds all.
type Projected = [String; 3];

/// The name of the norm of q's or k's heads.
fn norm_weight(path: &str, part: &str) -> String {
    format!("{}.{part}_norm.layernorm.weight", super::graph::dotted(path))
}

impl Builder<'_> {
    /// The attention of a layer over its norm's output `[batch, sequence, hidden]`.
    pub fn attention(&mut self, layer: usize, input: &str) -> Result<String> {
        let path = format!("/model/layers.{layer}/attn");
        let linears = self.spec.linears(layer);
        let mut projected = self.project(layer, &path, &linears, input)?;
        let names = self.spec.layer_names(layer);
        if let (Some(q_norm), Some(k_norm)) = (&names.q_norm, &names.k_norm) {
            projected = self.split(&path, projected)?;
            if self.norms_in_attention() {
                for (part, stored) in [("q", q_norm), ("k", k_norm)] {
                    let weight = norm_weight(&path, part);
                    self.initializer(self.weights.vector(&weight, stored, self.spec.head_dim)?);
                }
            } else {
                projected[0] = self.head_norm(&path, "q", q_norm, &projected[0], self.spec.n_heads)?;
                projected[1] = self.head_norm(&path, "k", k_norm, &projected[1], self.spec.n_kv_heads)?;
            }
        }
        if layer == 0 {
            self.rope_initializers()?;
        }
        if !self.rotates_in_attention() {
            projected[0] = self.rotated(&path, "q", &projected[0], self.spec.n_heads);
            projected[1] = self.rotated(&path, "k", &projected[1], self.spec.n_kv_heads);
        }
        let attended = self.group_query_attention(layer, &path, &projected);
        let output = linears.iter().find(|linear| linear.role == LinearRole::O);
        let output = Linear {
            path: format!("{path}/o_proj"),
            stored: Stored::whole(output.map(std::slice::from_ref).unwrap_or_default()),
            adapter: self.lora.get(&format!("model.layers.{layer}.attn.o_proj")),
        };
        self.linear(&output, &attended, None)
    }

    fn project(
        &mut self,
        layer: usize,
        path: &str,
        linears: &[LinearSpec],
        input: &str,
    ) -> Result<Projected> {
        let (q, kv) = (self.spec.q_size(), self.spec.kv_size());
        let find = |role| linears.iter().find(|linear| linear.role == role);
        let cut = |role, rows: std::ops::Range<usize>| match self.spec.attention_layout {
            AttentionLayout::Split => find(role).map(|linear| Stored::whole(std::slice::from_ref(linear))),
            AttentionLayout::Fused => find(LinearRole::Qkv).map(|linear| Stored::rows(linear, rows)),
        };
        let parts = [
            cut(LinearRole::Q, 0..q),
            cut(LinearRole::K, q..q + kv),
            cut(LinearRole::V, q + kv..q + 2 * kv),
        ];
        let parts = parts.map(Option::unwrap_or_default);
        let joined = match self.spec.attention_layout {
            AttentionLayout::Split => Stored::join(&parts),
            AttentionLayout::Fused => find(LinearRole::Qkv)
                .map(|linear| Stored::whole(std::slice::from_ref(linear)))
                .unwrap_or_default(),
        };
        if self.fuses_qkv(path) && self.weights.kind(&joined)? != Kind::Mixed {
            let all = Linear {
                path: format!("{path}/qkv_proj"),
                stored: joined,
                adapter: None,
            };
            return Ok([self.linear(&all, input, None)?, String::new(), String::new()]);
        }
        let mut projected = Projected::default();
        for ((stored, name), slot) in parts
            .into_iter()
            .zip(["q_proj", "k_proj", "v_proj"])
            .zip(&mut projected)
        {
            let linear = Linear {
                path: format!("{path}/{name}"),
                stored,
                adapter: self.lora.get(&format!("model.layers.{layer}.attn.{name}")),
            };
            *slot = self.linear(&linear, input, None)?;
        }
        Ok(projected)
    }

    /// Whether q, k and v may be one product.
    fn fuses_qkv(&self, path: &str) -> bool {
        let excluded = |part: &str| {
            let node = format!("{path}/{part}/MatMul");
            self.options.nodes_to_exclude.contains(&node)
        };
        let together = ["q_proj", "k_proj", "v_proj"]
            .into_iter()
            .all(|part| !excluded(part));
        self.options.fuse_qkv && self.rotates_in_attention() && self.lora.is_empty() && together
    }

    /// Whether attention rotates q and k itself; DirectML's does not, and takes them apart.
    pub fn rotates_in_attention(&self) -> bool {
        self.options.provider != Provider::Dml
    }

    /// Whether attention norms the heads of q and k itself.
    fn norms_in_attention(&self) -> bool {
        let provider = matches!(self.options.provider, Provider::Cuda | Provider::WebGpu);
        provider && self.options.fuse_qk_norm
    }

    /// q, k and v on their own.
    fn split(&mut self, path: &str, projected: Projected) -> Result<Projected> {
        if !projected[1].is_empty() {
            return Ok(projected);
        }
        let (q, kv) = (self.spec.q_size(), self.spec.kv_size());
        let sizes = self.list(&[q as i64, kv as i64, kv as i64])?;
        let name = format!("{path}/qkv_proj/Split");
        let outputs = [0, 1, 2].map(|i| format!("{name}/output_{i}"));
        let node = Node::new(
            &name,
            "Split",
            &[&projected[0], &sizes],
            &outputs.each_ref().map(String::as_str),
        );
        for (output, width) in outputs.iter().zip([q, kv, kv]) {
            self.declare(output, self.io, super::graph::io_shape(width));
        }
        self.push(node.with("axis", -1));
        Ok(outputs)
    }

    /// A norm over each head of q or k.
    fn head_norm(
        &mut self,
        path: &str,
        part: &str,
        stored: &str,
        input: &str,
        heads: usize,
    ) -> Result<String> {
        let head_dim = self.spec.head_dim;
        let weight = norm_weight(path, part);
        let path = format!("{path}/{part}_norm");
        self.initializer(self.weights.vector(&weight, stored, head_dim)?);
        let flat = ["batch_size".into(), Dim::Unknown, Dim::Known(head_dim)];
        let shape = self.list(&[0, -1, head_dim as i64])?;
        let name = format!("{path}/Reshape_1");
        let node = Node::new(&name, "Reshape", &[input, &shape], &[&format!("{name}/output_0")]);
        let heads_apart = self.node(node, self.io, flat.clone());
        let name = format!("{path}/SimplifiedLayerNormalization");
        let output = format!("{name}/output_0");
        let node = simplified_norm(&name, [&heads_apart, &weight], &output, self.epsilon());
        let normed = self.node(node, self.io, flat);
        let shape = self.list(&[0, -1, (heads * head_dim) as i64])?;
        let name = format!("{path}/Reshape_2");
        let node = Node::new(
            &name,
            "Reshape",
            &[&normed, &shape],
            &[&format!("{name}/output_0")],
        );
        Ok(self.hidden(node, heads * head_dim))
    }

    fn group_query_attention(&mut self, layer: usize, path: &str, projected: &Projected) -> String {
        let past = ["key", "value"].map(|part| format!("past_key_values.{layer}.{part}"));
        let present = ["key", "value"].map(|part| format!("present.{layer}.{part}"));
        let [q, k, v] = projected.each_ref().map(String::as_str);
        let rotates = self.rotates_in_attention();
        let [cos, sin] = if rotates { TABLES } else { ["", ""] };
        let [last, total] = self.mask_values();
        let norms = ["q", "k"].map(|part| norm_weight(path, part));
        let normed = self.spec.qk_norm && self.norms_in_attention();
        let mut inputs = vec![q, k, v, &past[0], &past[1], last, total, cos, sin, "", "", ""];
        if normed {
            inputs.extend(["", "", &norms[0], &norms[1]]);
        }
        let name = format!("{path}/GroupQueryAttention");
        let output = format!("{name}/output_0");
        let mut node = Node::new(
            &name,
            "GroupQueryAttention",
            &inputs,
            &[&output, &present[0], &present[1]],
        )
        .in_domain(MICROSOFT)
        .with("num_heads", self.spec.n_heads as i64)
        .with("kv_num_heads", self.spec.n_kv_heads as i64)
        .with("scale", self.spec.attention_scale() as f32)
        .with("local_window_size", self.window())
        .with("softcap", 0.0)
        .with("do_rotary", i64::from(rotates))
        .with("rotary_interleaved", 0);
        if normed {
            node = node.with("qk_norm_epsilon", self.epsilon());
        }
        self.hidden(node, self.spec.q_size())
    }

    /// The attention window as the operator takes it: -1 where no sequence is longer.
    fn window(&self) -> i64 {
        match self.spec.sliding_window {
            Some(window) if window < self.spec.max_position => window as i64,
            _ => -1,
        }
    }
}
