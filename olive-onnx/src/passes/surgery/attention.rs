//! Surgeries on what attention reads.

use std::collections::HashMap;

use olive_core::{Error, Result};
use serde::Deserialize;
use serde_json::Value;

use super::super::rewrite::{
    branches, consumers, is_contrib, is_op, producers, redirect, remove_dead, set_attribute,
};
use super::{Draft, FromArguments, Surgery};
use crate::ir::{Attribute, Dim, Graph, OnnxType, Tensor, ValueInfo};

/// `AttentionMaskToSequenceLengths`: the lengths that GroupQueryAttention reads become inputs, instead of being
/// computed from `attention_mask`.
#[derive(Deserialize)]
pub struct MaskToLengths {}

impl FromArguments for MaskToLengths {}

const MASK: &str = "attention_mask";
const PAST_LENGTH: &str = "past_seq_len";
const TOTAL_LENGTH: &str = "total_seq_len";

impl Surgery for MaskToLengths {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &mut draft.model.graph;
        let lengths: Vec<(String, String)> = {
            let attention = graph
                .nodes
                .iter()
                .filter(|node| is_contrib(node, "GroupQueryAttention"));
            let pairs =
                attention.flat_map(|node| [(node.input(5), PAST_LENGTH), (node.input(6), TOTAL_LENGTH)]);
            pairs
                .filter_map(|(old, new)| Some((old?.to_owned(), new.to_owned())))
                .collect()
        };
        let map: HashMap<String, String> = lengths
            .into_iter()
            .filter(|(old, _)| graph.input(old).is_none())
            .collect();
        if map.is_empty() {
            return Ok(false);
        }
        redirect(graph, &map);
        let mut batch = graph
            .input("input_ids")
            .and_then(|ids| ids.shape.as_ref()?.first().cloned());
        if !matches!(batch, Some(Dim::Known(_))) {
            batch = Some(Dim::Known(1));
        }
        let past = ValueInfo::new(
            PAST_LENGTH,
            OnnxType::Int32,
            vec![batch.unwrap_or(Dim::Known(1)), Dim::Known(1)],
        );
        graph
            .inputs
            .splice(0..0, [past, ValueInfo::new(TOTAL_LENGTH, OnnxType::Int32, [])]);
        remove_dead(graph);
        if let Some(readers) = consumers(graph).get(MASK) {
            let what = format!(
                "removing `{MASK}`, which node `{}` reads,",
                graph.nodes[readers[0]].name
            );
            return Err(Error::unsupported(
                what,
                "remove what else depends on it first (RemoveRopeMultiCache)",
            ));
        }
        graph.inputs.retain(|input| input.name != MASK);
        if let Some(Value::Object(inputs)) = draft
            .genai_config
            .as_mut()
            .and_then(|config| config.pointer_mut("/model/decoder/inputs"))
        {
            inputs.shift_remove(MASK);
            inputs.insert("past_sequence_length".to_owned(), Value::from(PAST_LENGTH));
            inputs.insert("total_sequence_length".to_owned(), Value::from(TOTAL_LENGTH));
        }
        Ok(true)
    }
}

/// `RemoveRopeMultiCache`: of two rotary caches between which an `If` chooses by length, one stays. With the smaller
/// one `genai_config.json` says that contexts end where it does.
#[derive(Deserialize)]
pub struct RemoveMultiCache {
    #[serde(default)]
    use_large_cache: bool,
}

impl FromArguments for RemoveMultiCache {}

impl Surgery for RemoveMultiCache {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &mut draft.model.graph;
        let place = |op: &str| if op == "RotaryEmbedding" { 2 } else { 7 };
        let reader = graph
            .nodes
            .iter()
            .find(|node| is_contrib(node, "GroupQueryAttention") || is_contrib(node, "RotaryEmbedding"));
        let caches = reader.and_then(|node| {
            Some((
                node.input(place(&node.op_type))?,
                node.input(place(&node.op_type) + 1)?,
            ))
        });
        let Some((cos, sin)) = caches else {
            return Ok(false);
        };
        let made = producers(graph);
        let Some(choice) = made
            .get(cos)
            .copied()
            .filter(|index| is_op(&graph.nodes[*index], "If") && made.get(sin) == Some(index))
        else {
            return Ok(false);
        };
        let node = &graph.nodes[choice];
        let mut chosen: Option<Vec<Tensor>> = None;
        for branch in branches(node) {
            let values: Option<Vec<Tensor>> = branch
                .outputs
                .iter()
                .map(|output| constant_of(branch, &output.name))
                .collect();
            let values = values.ok_or_else(|| {
                Error::unsupported(
                    format!("the branches of node `{}`", node.name),
                    "they have to hold constants",
                )
            })?;
            let rows = |tensors: &[Tensor]| {
                tensors
                    .first()
                    .and_then(|tensor| tensor.shape().first().copied())
                    .unwrap_or(0)
            };
            let better = chosen
                .as_ref()
                .is_none_or(|chosen| (rows(&values) > rows(chosen)) == self.use_large_cache);
            if better {
                chosen = Some(values);
            }
        }
        let Some(chosen) = chosen else { return Ok(false) };
        let length = chosen
            .first()
            .and_then(|tensor| tensor.shape().first().copied())
            .unwrap_or(0);
        let outputs = node.outputs.clone();
        graph.nodes.remove(choice);
        for (mut tensor, name) in chosen.into_iter().zip(outputs) {
            tensor.name = name;
            for info in graph
                .value_infos
                .iter_mut()
                .filter(|info| info.name == tensor.name)
            {
                info.shape = Some(tensor.shape().iter().map(|size| Dim::Known(*size)).collect());
            }
            graph.initializers.push(tensor);
        }
        remove_dead(graph);
        if !self.use_large_cache {
            shorten(draft, length);
        }
        Ok(true)
    }
}

fn constant_of(branch: &Graph, name: &str) -> Option<Tensor> {
    super::super::rewrite::constants(branch)
        .get(name)
        .map(|tensor| (*tensor).clone())
}

/// Contexts of at most `length` tokens.
fn shorten(draft: &mut Draft, length: usize) {
    let Some(config) = &mut draft.genai_config else {
        return;
    };
    for path in ["/model/context_length", "/search/max_length"] {
        if let Some(value) = config.pointer_mut(path)
            && value.as_u64().is_some_and(|old| old > length as u64)
        {
            *value = Value::from(length);
        }
    }
}

/// `ReplaceAttentionMaskValue`: constants of a mask below `threshold` become `replacement`.
#[derive(Deserialize)]
pub struct MaskValue {
    #[serde(default = "default_threshold")]
    threshold: f32,
    #[serde(default = "default_replacement")]
    replacement: f32,
}

fn default_threshold() -> f32 {
    -3e30
}

fn default_replacement() -> f32 {
    -1e4
}

impl FromArguments for MaskValue {
    fn checked(self, origin: &str) -> Result<Self> {
        match self.replacement >= self.threshold {
            true => Ok(self),
            false => Err(Error::config(
                origin,
                "replacement",
                format!("at least `threshold` ({})", self.threshold),
                self.replacement.to_string(),
            )),
        }
    }
}

/// What a constant of a mask goes into.
const MASK_READERS: &[&str] = &["Add", "Mul", "Expand", "Where", "Shape", "Cast", "CastLike"];

impl Surgery for MaskValue {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &mut draft.model.graph;
        let masks: std::collections::HashSet<String> = {
            let readers = consumers(graph);
            let fits = |name: &str| {
                let indices = readers.get(name).map(Vec::as_slice).unwrap_or_default();
                indices
                    .iter()
                    .all(|index| MASK_READERS.contains(&graph.nodes[*index].op_type.as_str()))
            };
            let nodes = graph
                .nodes
                .iter()
                .filter(|node| is_op(node, "Constant") || is_op(node, "ConstantOfShape"));
            let names = nodes
                .map(|node| node.outputs[0].as_str())
                .chain(graph.initializers.iter().map(|tensor| tensor.name.as_str()));
            names.filter(|name| fits(name)).map(str::to_owned).collect()
        };
        let mut changed = false;
        for node in graph
            .nodes
            .iter_mut()
            .filter(|node| masks.contains(&node.outputs[0]))
        {
            if let Some(Attribute::Tensor(value)) = node.attribute("value")
                && let Some(new) = self.replaced(value)?
            {
                set_attribute(node, "value", new);
                changed = true;
            }
        }
        for tensor in graph
            .initializers
            .iter_mut()
            .filter(|tensor| masks.contains(&tensor.name))
        {
            if let Some(new) = self.replaced(tensor)? {
                *tensor = new;
                changed = true;
            }
        }
        Ok(changed)
    }
}

impl MaskValue {
    fn replaced(&self, tensor: &Tensor) -> Result<Option<Tensor>> {
        if tensor.dtype() != OnnxType::Float {
            return Ok(None);
        }
        let mut values = tensor.to_f32()?;
        let mut changed = false;
        for value in values.iter_mut().filter(|value| **value < self.threshold) {
            *value = self.replacement;
            changed = true;
        }
        match changed {
            true => Tensor::floats(&tensor.name, tensor.shape().to_vec(), &values).map(Some),
            false => Ok(None),
        }
    }
}
