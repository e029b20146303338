//! A compiled graph: steps over slots, built once when a model is loaded.

mod build;
mod run;

use std::collections::HashMap;

use olive_onnx::ir::{Model, ValueInfo};

use super::context::{Pool, Rounded, Source};
use super::registry::Op;
use super::value::Value;

pub use run::RunInput;

/// What the values of a graph are called. `%d` stands for a layer's number.
#[derive(Debug, Clone)]
pub struct GraphNames {
    /// Token ids, `[batch, steps]`.
    pub input_ids: String,
    /// Which tokens there are, `[batch, total]`.
    pub attention_mask: String,
    /// Places of the new tokens, `[batch, steps]`.
    pub position_ids: String,
    /// Keys of earlier tokens.
    pub past_key: String,
    /// Values of earlier tokens.
    pub past_value: String,
    /// Keys of all tokens.
    pub present_key: String,
    /// Values of all tokens.
    pub present_value: String,
    /// Scores of the next token, `[batch, steps, vocabulary]`.
    pub logits: String,
}

impl Default for GraphNames {
    fn default() -> Self {
        Self {
            input_ids: "input_ids".into(),
            attention_mask: "attention_mask".into(),
            position_ids: "position_ids".into(),
            past_key: "past_key_values.%d.key".into(),
            past_value: "past_key_values.%d.value".into(),
            present_key: "present.%d.key".into(),
            present_value: "present.%d.value".into(),
            logits: "logits".into(),
        }
    }
}

impl GraphNames {
    /// The layer in `name`, if it follows `pattern`.
    fn layer(pattern: &str, name: &str) -> Option<usize> {
        let (before, after) = pattern.split_once("%d")?;
        let number = name.strip_prefix(before)?.strip_suffix(after)?;
        let plain = number.bytes().all(|b| b.is_ascii_digit()) && (number == "0" || !number.starts_with('0'));
        if plain { number.parse().ok() } else { None }
    }
}

/// Which rows of the logits a run computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitRows {
    /// One for every token.
    All,
    /// One for the last token of each row that is not padding.
    Last,
}

/// What is known about a compiled graph.
#[derive(Debug, Clone, Default)]
pub struct PlanInfo {
    /// Layers with a cache.
    pub layers: usize,
    /// Where the graph changes its rotary tables: sequences above this length use the long ones.
    pub rope_threshold: Option<usize>,
    /// Inputs that an adapter may give.
    pub optional_inputs: Vec<ValueInfo>,
    /// Names of the two factors of each low-rank part: `[in, rank]` and `[rank, out]`.
    pub lora_pairs: Vec<(String, String)>,
    /// Steps of a run.
    pub steps: usize,
}

/// A graph, ready to run. Holds no state of a run.
pub struct Plan {
    steps: Vec<Step>,
    slots: usize,
    constants: Vec<Value>,
    optional: HashMap<String, usize>,
    inputs: Inputs,
    logits: usize,
    /// The step that multiplies with the head's weight and the slot of its rows, where rows can be left out.
    head: Option<(usize, usize)>,
    info: PlanInfo,
    /// Keeps the maps of the weights alive and their names at hand.
    _model: Model,
}

struct Inputs {
    ids: Option<(usize, bool)>,
    mask: Option<(usize, bool)>,
    positions: Option<(usize, bool)>,
}

struct Step {
    name: String,
    work: Work,
    inputs: Vec<Source>,
    dying: Vec<bool>,
    outputs: Vec<Option<usize>>,
    free: Vec<usize>,
}

enum Work {
    Op(Box<dyn Op>),
    If(Box<[Branch; 2]>),
}

#[derive(Default)]
struct Branch {
    steps: Vec<Step>,
    outputs: Vec<Source>,
}

/// Slots and buffers of runs, kept between them.
#[derive(Debug, Default)]
pub struct Workspace {
    slots: Vec<Option<Value>>,
    pool: Pool,
    rounded: Rounded,
}

impl Plan {
    /// What is known about the graph.
    pub fn info(&self) -> &PlanInfo {
        &self.info
    }

    /// Room for what adapters put in the place of constants, empty.
    pub fn no_overrides(&self) -> Vec<Option<Value>> {
        vec![None; self.constants.len()]
    }

    /// The place of an optional input in the overrides; `None` if there is no such input.
    pub fn override_index(&self, name: &str) -> Option<usize> {
        self.optional.get(name).copied()
    }
}
