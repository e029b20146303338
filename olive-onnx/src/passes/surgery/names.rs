//! Surgeries on what the graph takes and gives: names, order, sizes.

use std::collections::HashSet;

use olive_core::{Error, Result};
use serde::Deserialize;
use serde_json::Value;

use super::super::rewrite::{defined, producers, remove_unread, rename_value};
use super::super::types::{Types, infer};
use super::{Draft, FromArguments, Names, Surgery};
use crate::ir::{Dim, ValueInfo};

fn wrong(surgeon: &str, key: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
    Error::config(format!("surgery `{surgeon}`"), key, expected, found)
}

/// `RenameInputs`: the names in the graph and in `genai_config.json`.
#[derive(Deserialize)]
pub struct RenameInputs {
    old_names: Vec<String>,
    new_names: Vec<String>,
}

/// `RenameOutputs`: the names in the graph and in `genai_config.json`.
#[derive(Deserialize)]
pub struct RenameOutputs {
    old_names: Vec<String>,
    new_names: Vec<String>,
}

impl FromArguments for RenameInputs {
    fn checked(self, origin: &str) -> Result<Self> {
        pairs(origin, &self.old_names, &self.new_names).map(|()| self)
    }
}

impl FromArguments for RenameOutputs {
    fn checked(self, origin: &str) -> Result<Self> {
        pairs(origin, &self.old_names, &self.new_names).map(|()| self)
    }
}

fn pairs(origin: &str, old: &[String], new: &[String]) -> Result<()> {
    let unique: HashSet<&String> = new.iter().collect();
    if old.len() != new.len() || unique.len() != new.len() || new.iter().any(String::is_empty) {
        let expected = format!("a name of its own for each of the {} `old_names`", old.len());
        return Err(Error::config(origin, "new_names", expected, format!("{new:?}")));
    }
    Ok(())
}

impl Surgery for RenameInputs {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let is_input = |draft: &Draft, name: &str| draft.model.graph.input(name).is_some();
        rename(
            draft,
            "RenameInputs",
            &self.old_names,
            &self.new_names,
            is_input,
            "/model/decoder/inputs",
        )
    }
}

impl Surgery for RenameOutputs {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let is_output =
            |draft: &Draft, name: &str| draft.model.graph.outputs.iter().any(|output| output.name == name);
        rename(
            draft,
            "RenameOutputs",
            &self.old_names,
            &self.new_names,
            is_output,
            "/model/decoder/outputs",
        )
    }
}

fn rename(
    draft: &mut Draft,
    surgeon: &str,
    old: &[String],
    new: &[String],
    exists: impl Fn(&Draft, &str) -> bool,
    section: &str,
) -> Result<bool> {
    let mut changed = false;
    for (old, new) in old.iter().zip(new).filter(|(old, new)| old != new) {
        if !exists(draft, old) {
            if exists(draft, new) {
                continue;
            }
            return Err(wrong(
                surgeon,
                "old_names",
                "names that the graph has",
                format!("`{old}`"),
            ));
        }
        if defined(&draft.model.graph).contains(new.as_str()) {
            return Err(wrong(
                surgeon,
                "new_names",
                "names that are free",
                format!("`{new}`"),
            ));
        }
        rename_value(&mut draft.model.graph, old, new);
        rename_in_config(draft, section, old, new);
        changed = true;
    }
    Ok(changed)
}

/// Follows a rename in the texts of a section of `genai_config.json`. A name with a number fits a text with `%d`; that
/// text is changed with the number put back, as all layers are renamed alike.
fn rename_in_config(draft: &mut Draft, section: &str, old: &str, new: &str) {
    let Some(Value::Object(names)) = draft
        .genai_config
        .as_mut()
        .and_then(|config| config.pointer_mut(section))
    else {
        return;
    };
    for value in names.values_mut() {
        let Some(text) = value.as_str() else { continue };
        if text == old {
            *value = Value::from(new);
        } else if let Some((before, after)) = text.split_once("%d")
            && let Some(number) = old.strip_prefix(before).and_then(|rest| rest.strip_suffix(after))
            && !number.is_empty()
            && number.bytes().all(|byte| byte.is_ascii_digit())
            && new.contains(number)
        {
            *value = Value::from(new.replacen(number, "%d", 1));
        }
    }
}

/// `ReorderInputs`.
#[derive(Deserialize)]
pub struct ReorderInputs {
    permutation: Vec<usize>,
}

impl FromArguments for ReorderInputs {}

impl Surgery for ReorderInputs {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let inputs = &mut draft.model.graph.inputs;
        let mut sorted = self.permutation.clone();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..inputs.len()) {
            let expected = format!("each of 0 to {} once", inputs.len().saturating_sub(1));
            return Err(wrong(
                "ReorderInputs",
                "permutation",
                expected,
                format!("{:?}", self.permutation),
            ));
        }
        let reordered: Vec<ValueInfo> = self
            .permutation
            .iter()
            .map(|index| inputs[*index].clone())
            .collect();
        let changed = reordered != *inputs;
        *inputs = reordered;
        Ok(changed)
    }
}

/// `RemoveInputs`: also where nodes read them; what a node read behind them moves up, as in Olive.
#[derive(Deserialize)]
pub struct RemoveInputs {
    names: Names,
}

impl FromArguments for RemoveInputs {}

impl Surgery for RemoveInputs {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let names: HashSet<&str> = self.names.list().iter().map(String::as_str).collect();
        let graph = &mut draft.model.graph;
        if !graph
            .inputs
            .iter()
            .any(|input| names.contains(input.name.as_str()))
        {
            return Ok(false);
        }
        graph.inputs.retain(|input| !names.contains(input.name.as_str()));
        graph
            .initializers
            .retain(|tensor| !names.contains(tensor.name.as_str()));
        graph
            .value_infos
            .retain(|info| !names.contains(info.name.as_str()));
        for node in &mut graph.nodes {
            if !node.inputs.iter().any(|input| names.contains(input.as_str())) {
                continue;
            }
            node.inputs.retain(|input| !names.contains(input.as_str()));
            if node.inputs.is_empty() {
                let what = format!("removing every input of node `{}` ({})", node.name, node.op_type);
                return Err(Error::unsupported(what, "nothing would be left to compute from"));
            }
        }
        Ok(true)
    }
}

/// `RemoveInitializerFromInputs`: constants are no longer defaults that a caller may replace.
#[derive(Deserialize)]
pub struct RemoveDefaults {}

impl FromArguments for RemoveDefaults {}

impl Surgery for RemoveDefaults {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &mut draft.model.graph;
        let constants: HashSet<&str> = graph
            .initializers
            .iter()
            .map(|tensor| tensor.name.as_str())
            .collect();
        let before = graph.inputs.len();
        graph
            .inputs
            .retain(|input| !constants.contains(input.name.as_str()));
        Ok(graph.inputs.len() != before)
    }
}

/// `ExposeOutputs`: the first outputs of nodes become outputs of the graph.
#[derive(Deserialize)]
pub struct ExposeOutputs {
    names: Names,
}

impl FromArguments for ExposeOutputs {}

impl Surgery for ExposeOutputs {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let mut values = Vec::new();
        for name in self.names.list() {
            let node = draft
                .model
                .graph
                .node(name)
                .filter(|node| !name.is_empty() && node.output(0).is_some());
            let node =
                node.ok_or_else(|| wrong("ExposeOutputs", "names", "names of nodes", format!("`{name}`")))?;
            values.push(node.outputs[0].clone());
        }
        expose(draft, "ExposeOutputs", &values)
    }
}

/// `AddIntermediateTensorsToOutputs`: values become outputs; every value of a node where none is named.
#[derive(Deserialize)]
pub struct ExposeValues {
    intermediate_tensor_to_add: Option<Vec<String>>,
}

impl FromArguments for ExposeValues {}

impl Surgery for ExposeValues {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let nodes = draft.model.graph.nodes.iter();
        let all = nodes.flat_map(|node| node.outputs.iter().filter(|name| !name.is_empty()).cloned());
        let values = self
            .intermediate_tensor_to_add
            .clone()
            .unwrap_or_else(|| all.collect());
        expose(draft, "AddIntermediateTensorsToOutputs", &values)
    }
}

fn expose(draft: &mut Draft, surgeon: &str, values: &[String]) -> Result<bool> {
    let graph = &mut draft.model.graph;
    let types = infer(graph, &Types::new())?;
    let mut changed = false;
    for name in values {
        if !producers(graph).contains_key(name.as_str()) {
            return Err(wrong(
                surgeon,
                "names",
                "values that nodes make",
                format!("`{name}`"),
            ));
        }
        if graph.outputs.iter().any(|output| output.name == *name) {
            continue;
        }
        let declared = graph.value_infos.iter().find(|info| info.name == *name);
        let shape = declared.and_then(|info| info.shape.clone());
        graph.value_infos.retain(|info| info.name != *name);
        graph.outputs.push(ValueInfo {
            name: name.clone(),
            dtype: types.get(name).copied(),
            shape,
        });
        changed = true;
    }
    remove_unread(graph);
    Ok(changed)
}

/// `RenameInputDims`: gives a size of an input a symbol. The same size of the same old symbol elsewhere keeps it.
#[derive(Deserialize)]
pub struct InputDims {
    input_idx: Option<usize>,
    input_name: Option<String>,
    dim_idx: usize,
    dim_name: String,
}

/// `RenameOutputDims`.
#[derive(Deserialize)]
pub struct OutputDims {
    output_idx: usize,
    dim_idx: usize,
    dim_name: String,
}

impl FromArguments for InputDims {
    fn checked(self, origin: &str) -> Result<Self> {
        match (&self.input_idx, &self.input_name) {
            (Some(_), None) | (None, Some(_)) => Ok(self),
            _ => Err(Error::config(
                origin,
                "input_idx",
                "either it or `input_name`",
                "both or neither",
            )),
        }
    }
}

impl FromArguments for OutputDims {}

impl Surgery for InputDims {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let inputs = &mut draft.model.graph.inputs;
        let count = inputs.len();
        let found = match (&self.input_name, self.input_idx) {
            (Some(name), _) => inputs.iter_mut().find(|input| input.name == *name),
            (None, index) => inputs.get_mut(index.unwrap_or(usize::MAX)),
        };
        let input = found.ok_or_else(|| {
            wrong(
                "RenameInputDims",
                "input_idx",
                format!("one of {count} inputs"),
                "another",
            )
        })?;
        set_dim("RenameInputDims", input, self.dim_idx, &self.dim_name)
    }
}

impl Surgery for OutputDims {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let outputs = &mut draft.model.graph.outputs;
        let count = outputs.len();
        let output = outputs.get_mut(self.output_idx);
        let output = output.ok_or_else(|| {
            wrong(
                "RenameOutputDims",
                "output_idx",
                format!("below {count}"),
                self.output_idx.to_string(),
            )
        })?;
        set_dim("RenameOutputDims", output, self.dim_idx, &self.dim_name)
    }
}

fn set_dim(surgeon: &str, info: &mut ValueInfo, index: usize, name: &str) -> Result<bool> {
    let display = info.to_string();
    let dim = info.shape.as_mut().and_then(|shape| shape.get_mut(index));
    let dim = dim.ok_or_else(|| {
        wrong(
            surgeon,
            "dim_idx",
            format!("a size of `{display}`"),
            index.to_string(),
        )
    })?;
    let new = Dim::from(name);
    let changed = *dim != new;
    *dim = new;
    Ok(changed)
}
