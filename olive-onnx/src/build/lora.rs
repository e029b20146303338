//! The places of low-rank adapters: `y = base(x) + (x·A)·B`, A `[in, lora_r]` and B `[lora_r, out]` as float optional
//! inputs. Their defaults have rank 0, so the base answers while no adapter is active, and any rank fits.

use std::collections::BTreeMap;

use olive_core::{Error, ModelSpec, Result};

use super::graph::{Builder, dotted};
use crate::ir::{Dim, Node, Tensor, ValueInfo};

/// The symbol of the rank; all adapter inputs of a graph share it.
pub const LORA_RANK: &str = "lora_r";

/// The place of one adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraInput {
    /// The linear as the graph names it: `model.layers.0.attn.q_proj`.
    pub module: String,
    /// Rows of A.
    pub in_features: usize,
    /// Columns of B.
    pub out_features: usize,
}

impl LoraInput {
    /// Name of the input that takes A `[in, lora_r]`.
    pub fn a_name(&self) -> String {
        format!("{}.lora_A.MatMul.weight", self.module)
    }

    /// Name of the input that takes B `[lora_r, out]`, the scale included.
    pub fn b_name(&self) -> String {
        format!("{}.lora_B.MatMul.weight", self.module)
    }
}

/// The linears of a graph that take an adapter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoraTargets {
    places: BTreeMap<String, LoraInput>,
}

impl LoraTargets {
    /// The places for these adapters.
    pub fn new(inputs: impl IntoIterator<Item = LoraInput>) -> Self {
        let places = inputs.into_iter().map(|input| (input.module.clone(), input));
        Self {
            places: places.collect(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The places, by module name.
    pub fn places(&self) -> impl Iterator<Item = &LoraInput> {
        self.places.values()
    }

    /// The place at a linear of the graph.
    pub fn get(&self, module: &str) -> Option<LoraInput> {
        self.places.get(module).cloned()
    }

    /// Checks that every place is a linear of the model and has its sizes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the modules that the model does not have; [`Error::Tensor`] for a wrong size.
    pub fn check(&self, spec: &ModelSpec) -> Result<()> {
        let known = linear_sizes(spec);
        let unknown: Vec<&str> = self
            .places
            .keys()
            .filter(|name| !known.contains_key(*name))
            .map(String::as_str)
            .collect();
        if !unknown.is_empty() {
            let what = format!(
                "an adapter of {} module(s): {}",
                unknown.len(),
                unknown.join(", ")
            );
            return Err(Error::unsupported(
                what,
                "the model has no such linear in its layers",
            ));
        }
        for place in self.places.values() {
            let found = [place.in_features, place.out_features];
            let wanted = known[&place.module];
            if found != wanted {
                let expected = format!("an adapter from {} to {} features", wanted[0], wanted[1]);
                return Err(Error::tensor(
                    &place.module,
                    expected,
                    format!("{} to {}", found[0], found[1]),
                ));
            }
        }
        Ok(())
    }
}

/// Input and output features of every linear that a graph has in its layers when it takes adapters.
pub fn linear_sizes(spec: &ModelSpec) -> BTreeMap<String, [usize; 2]> {
    let (hidden, mlp) = (spec.hidden_size, spec.intermediate_size);
    let (q, kv) = (spec.q_size(), spec.kv_size());
    let parts = [
        ("attn.q_proj", [hidden, q]),
        ("attn.k_proj", [hidden, kv]),
        ("attn.v_proj", [hidden, kv]),
        ("attn.o_proj", [q, hidden]),
        ("mlp.gate_proj", [hidden, mlp]),
        ("mlp.up_proj", [hidden, mlp]),
        ("mlp.down_proj", [mlp, hidden]),
    ];
    let layers = 0..spec.n_layers;
    let named =
        layers.flat_map(|layer| parts.map(|(part, sizes)| (format!("model.layers.{layer}.{part}"), sizes)));
    named.collect()
}

impl Builder<'_> {
    /// Adds `(x·A)·B` and the two inputs.
    pub fn low_rank(&mut self, path: &str, input: &str, place: &LoraInput) -> Result<String> {
        debug_assert_eq!(dotted(path), place.module);
        let [a, b] = [place.a_name(), place.b_name()];
        let rank: Dim = LORA_RANK.into();
        let empty = |name: &str, shape: [usize; 2]| Tensor::inline(name, self.io, shape, Vec::new());
        let [a_default, b_default] = [
            empty(&a, [place.in_features, 0])?,
            empty(&b, [0, place.out_features])?,
        ];
        let a_info = ValueInfo::new(&a, self.io, [place.in_features.into(), rank.clone()]);
        let b_info = ValueInfo::new(&b, self.io, [rank.clone(), place.out_features.into()]);
        self.adapter_input(a_info, a_default);
        self.adapter_input(b_info, b_default);
        let name = format!("{path}/lora_A/MatMul");
        let node = Node::new(&name, "MatMul", &[input, &a], &[&format!("{name}/output_0")]);
        let shape = ["batch_size".into(), "sequence_length".into(), rank];
        let down = self.node(node, self.io, shape);
        let name = format!("{path}/lora_B/MatMul");
        let node = Node::new(&name, "MatMul", &[&down, &b], &[&format!("{name}/output_0")]);
        Ok(self.hidden(node, place.out_features))
    }
}
