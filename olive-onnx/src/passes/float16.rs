//! `OnnxFloatToFloat16`: values, constants and, unless kept, inputs and outputs of type FLOAT become FLOAT16.
//!
//! Every FLOAT value gets one type: FLOAT where it is a kept input or output or comes from a blocked node, or where it
//! is made freely (a constant, a `Cast`) and only blocked nodes read it; FLOAT16 elsewhere. A reader of the other type
//! reads through a `Cast`, one a value. What the operators themselves fix (the scale of `DynamicQuantizeLinear`, the
//! mean of a layer norm) stays FLOAT.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use half::f16;
use olive_core::{Error, ParamKind, ParamSpec, PassConfig, Result};
use rayon::prelude::*;
use serde::Deserialize;

use super::params::{param, with_external_data};
use super::rewrite::{
    FreshNames, branches, branches_mut, captures, consumers, output_names, producers, redirect_branches,
    set_attribute,
};
use super::types::{Types, infer};
use super::{Draft, GraphPass, OnnxPass};
use crate::ir::{Attribute, Graph, MICROSOFT, Node, OnnxType, Tensor, ValueInfo};

const PARAMS: [ParamSpec; 13] = with_external_data([
    param(
        "min_positive_val",
        ParamKind::Float,
        "1e-7",
        "Constants nearer to zero, zero excepted, are moved out to this.",
    ),
    param(
        "max_finite_val",
        ParamKind::Float,
        "10000.0",
        "Finite constants farther from zero are moved in to this.",
    ),
    param(
        "keep_io_types",
        ParamKind::Any,
        "false",
        "Whether inputs and outputs stay FLOAT; or the names of those that do.",
    ),
    param(
        "use_symbolic_shape_infer",
        ParamKind::Bool,
        "true",
        "Without effect: types follow from the operators.",
    ),
    param(
        "op_block_list",
        ParamKind::TextList,
        "null",
        "Operators that stay FLOAT, instead of the usual ones.",
    ),
    param(
        "op_include_list",
        ParamKind::TextList,
        "null",
        "The only operators to convert; not with `op_block_list`.",
    ),
    param(
        "node_block_list",
        ParamKind::TextList,
        "null",
        "Names of nodes that stay FLOAT.",
    ),
    param(
        "node_include_list",
        ParamKind::TextList,
        "null",
        "Names of the only nodes to convert; not with `node_block_list`.",
    ),
]);

/// The pass.
pub const PASS: OnnxPass = OnnxPass::new("OnnxFloatToFloat16", &PARAMS, parse);

/// Operators that have no kernel for FLOAT16, or lose too much in it.
const USUALLY_BLOCKED: &[&str] = &[
    "NonMaxSuppression",
    "TopK",
    "RoiAlign",
    "Range",
    "CumSum",
    "Min",
    "Max",
    "Upsample",
];

#[derive(Deserialize)]
struct Parameters {
    min_positive_val: f32,
    max_finite_val: f32,
    keep_io_types: Keep,
    op_block_list: Option<Vec<String>>,
    op_include_list: Option<Vec<String>>,
    node_block_list: Option<Vec<String>>,
    node_include_list: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Keep {
    All(bool),
    Names(HashSet<String>),
}

impl Keep {
    fn keeps(&self, name: &str) -> bool {
        match self {
            Self::All(all) => *all,
            Self::Names(names) => names.contains(name),
        }
    }
}

fn parse(origin: &str, config: &PassConfig) -> Result<Box<dyn GraphPass>> {
    let keep = config.values().get("keep_io_types").cloned().unwrap_or_default();
    let given: Parameters = config.parse(origin).map_err(|_| {
        Error::config(
            origin,
            "keep_io_types",
            "true, false or a list of names",
            keep.to_string(),
        )
    })?;
    for (a, b, names) in [
        (
            &given.op_block_list,
            &given.op_include_list,
            ["op_block_list", "op_include_list"],
        ),
        (
            &given.node_block_list,
            &given.node_include_list,
            ["node_block_list", "node_include_list"],
        ),
    ] {
        if a.is_some() && b.is_some() {
            return Err(Error::config(
                origin,
                names[1],
                format!("nothing beside `{}`", names[0]),
                "a list",
            ));
        }
    }
    let most = f16::MAX.to_f32();
    let sound = given.min_positive_val > 0.0 && given.min_positive_val < given.max_finite_val;
    if !sound || given.max_finite_val > most {
        let found = format!("{} and {}", given.min_positive_val, given.max_finite_val);
        return Err(Error::config(
            origin,
            "max_finite_val",
            format!("0 < min_positive_val < max_finite_val <= {most}"),
            found,
        ));
    }
    Ok(Box::new(given))
}

impl Parameters {
    fn blocks(&self, node: &Node) -> bool {
        let has = |list: &Option<Vec<String>>, name: &str| {
            list.as_ref().map(|list| list.iter().any(|entry| entry == name))
        };
        if let Some(included) = has(&self.op_include_list, &node.op_type) {
            if !included {
                return true;
            }
        } else if has(&self.op_block_list, &node.op_type)
            .unwrap_or(USUALLY_BLOCKED.contains(&node.op_type.as_str()))
        {
            return true;
        }
        has(&self.node_block_list, &node.name).unwrap_or(false)
            || has(&self.node_include_list, &node.name).is_some_and(|included| !included)
    }

    fn bytes(&self, bytes: &[u8]) -> Vec<u8> {
        let convert = |chunk: &[u8; 4]| {
            let value = f32::from_le_bytes(*chunk);
            let size = value.abs();
            let clipped = match size {
                _ if size > 0.0 && size < self.min_positive_val => self.min_positive_val.copysign(value),
                _ if size.is_finite() && size > self.max_finite_val => self.max_finite_val.copysign(value),
                _ => value,
            };
            f16::from_f32(clipped).to_le_bytes()
        };
        bytes
            .as_chunks::<4>()
            .0
            .par_iter()
            .flat_map_iter(convert)
            .collect()
    }

    fn tensor(&self, tensor: &Tensor, name: &str) -> Result<Tensor> {
        let source = tensor.clone();
        let pass = Self {
            keep_io_types: Keep::All(false),
            op_block_list: None,
            op_include_list: None,
            node_block_list: None,
            node_include_list: None,
            ..*self
        };
        let producer = Arc::new(move || Ok(pass.bytes(&source.bytes()?)));
        Tensor::produced(name, OnnxType::Float16, tensor.shape().to_vec(), producer)
    }
}

impl GraphPass for Parameters {
    fn apply(&self, draft: &mut Draft) -> Result<bool> {
        let names = FreshNames::new(&draft.model.graph);
        let mut job = Job {
            pass: self,
            names,
            changed: false,
        };
        job.convert(&mut draft.model.graph, &Types::new(), &HashMap::new(), true)?;
        Ok(job.changed)
    }
}

/// What a reader or a maker of a value asks of its type.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wish {
    Float,
    Half,
    Any,
}

struct Job<'a> {
    pass: &'a Parameters,
    names: FreshNames,
    changed: bool,
}

impl Job<'_> {
    /// Converts a graph. `outer` are the types of the values around it before, `halved` those that became FLOAT16 (true)
    /// or stay FLOAT (false).
    fn convert(
        &mut self,
        graph: &mut Graph,
        outer: &Types,
        halved: &HashMap<String, bool>,
        top: bool,
    ) -> Result<HashMap<String, bool>> {
        let types = infer(graph, outer)?;
        let mut decided = halved.clone();
        for name in own_floats(graph, &types) {
            let half = self.decide(graph, &name, top);
            decided.insert(name, half);
        }
        self.constants(graph, &decided)?;
        self.nodes(graph, &types, &decided)?;
        for info in graph
            .value_infos
            .iter_mut()
            .chain(&mut graph.inputs)
            .chain(&mut graph.outputs)
        {
            if info.dtype == Some(OnnxType::Float) && decided.get(&info.name) == Some(&true) {
                info.dtype = Some(OnnxType::Float16);
                self.changed = true;
            }
        }
        self.casts(graph, &decided, top);
        Ok(decided)
    }

    /// Whether a FLOAT value becomes FLOAT16.
    fn decide(&self, graph: &Graph, name: &str, top: bool) -> bool {
        let producers = producers(graph);
        let maker = match producers.get(name) {
            Some(index) => self.output_wish(&graph.nodes[*index], name),
            None if graph.input(name).is_some() && top && self.pass.keep_io_types.keeps(name) => Wish::Float,
            None if graph.input(name).is_some() => Wish::Half,
            None => Wish::Any,
        };
        match maker {
            Wish::Float => false,
            Wish::Half => true,
            Wish::Any => {
                let mut wishes = Vec::new();
                for node in &graph.nodes {
                    for (place, input) in node.inputs.iter().enumerate() {
                        if input == name {
                            wishes.push(self.input_wish(node, place));
                        }
                    }
                    if branches(node).any(|branch| captures(branch).contains(&name)) {
                        wishes.push(if self.pass.blocks(node) {
                            Wish::Float
                        } else {
                            Wish::Half
                        });
                    }
                }
                if output_names(graph).contains(name) {
                    wishes.push(if top && self.pass.keep_io_types.keeps(name) {
                        Wish::Float
                    } else {
                        Wish::Half
                    });
                }
                wishes.contains(&Wish::Half) || !wishes.contains(&Wish::Float)
            }
        }
    }

    fn output_wish(&self, node: &Node, name: &str) -> Wish {
        let place = node.outputs.iter().position(|output| output == name).unwrap_or(0);
        match node.op_type.as_str() {
            "Constant" | "Cast" if node.domain.is_empty() => Wish::Any,
            "DynamicQuantizeLinear" => Wish::Float,
            "SkipSimplifiedLayerNormalization" | "SkipLayerNormalization" if place == 1 || place == 2 => {
                Wish::Float
            }
            "SimplifiedLayerNormalization" | "LayerNormalization" if place > 0 => Wish::Float,
            _ if self.pass.blocks(node) => Wish::Float,
            _ => Wish::Half,
        }
    }

    fn input_wish(&self, node: &Node, place: usize) -> Wish {
        match node.op_type.as_str() {
            "Cast" | "CastLike" | "Shape" | "Size" if node.domain.is_empty() && place == 0 => Wish::Any,
            "DynamicQuantizeLinear" | "DynamicQuantizeMatMul" => Wish::Float,
            "Resize" if node.domain.is_empty() && place == 2 => Wish::Float,
            // The scales of a quantized cache.
            "GroupQueryAttention" if node.domain == MICROSOFT && (place == 12 || place == 13) => Wish::Float,
            _ if self.pass.blocks(node) => Wish::Float,
            _ => Wish::Half,
        }
    }

    /// Converts initializers.
    fn constants(&mut self, graph: &mut Graph, decided: &HashMap<String, bool>) -> Result<()> {
        for tensor in &mut graph.initializers {
            if tensor.dtype() == OnnxType::Float && decided.get(&tensor.name) == Some(&true) {
                let name = tensor.name.clone();
                *tensor = self.pass.tensor(tensor, &name)?;
                self.changed = true;
            }
        }
        Ok(())
    }

    /// Converts what nodes carry: constants, the target of casts, and branches.
    fn nodes(&mut self, graph: &mut Graph, types: &Types, decided: &HashMap<String, bool>) -> Result<()> {
        for node in &mut graph.nodes {
            let half = node
                .outputs
                .iter()
                .any(|name| decided.get(name) == Some(&true) && types.get(name) == Some(&OnnxType::Float));
            if !self.pass.blocks(node) {
                for branch in branches_mut(node) {
                    self.convert(branch, types, decided, false)?;
                }
            }
            if !half || !node.domain.is_empty() {
                continue;
            }
            match node.op_type.as_str() {
                "Cast" => set_attribute(node, "to", i64::from(OnnxType::Float16.code())),
                "Constant" => self.constant_node(node)?,
                "ConstantOfShape" => {
                    let value = match node.tensor("value")? {
                        Some(value) => self.pass.tensor(value, "")?,
                        None => Tensor::inline("", OnnxType::Float16, [1], vec![0, 0])?,
                    };
                    set_attribute(node, "value", value);
                }
                "DequantizeLinear"
                    if node.int("output_dtype")? == Some(i64::from(OnnxType::Float.code())) =>
                {
                    set_attribute(node, "output_dtype", i64::from(OnnxType::Float16.code()));
                }
                "RandomNormal" | "RandomUniform" | "RandomNormalLike" | "RandomUniformLike" | "EyeLike"
                | "Multinomial" => {
                    set_attribute(node, "dtype", i64::from(OnnxType::Float16.code()));
                }
                _ => continue,
            }
            self.changed = true;
        }
        Ok(())
    }

    fn constant_node(&self, node: &mut Node) -> Result<()> {
        let dense = match node.attributes.first() {
            Some((_, Attribute::Tensor(value))) => value.clone(),
            Some((_, Attribute::Float(value))) => Tensor::floats("", [], &[*value])?,
            Some((_, Attribute::Floats(values))) => Tensor::floats("", [values.len()], values)?,
            _ => return Ok(()),
        };
        node.attributes = vec![(
            "value".to_owned(),
            Attribute::Tensor(self.pass.tensor(&dense, &dense.name.clone())?),
        )];
        Ok(())
    }

    /// Puts a `Cast` between a value and each kind of reader that wants the other type.
    fn casts(&mut self, graph: &mut Graph, decided: &HashMap<String, bool>, top: bool) {
        // In the order of the names, so that equal models get equal names.
        let decided: BTreeMap<&String, &bool> = decided.iter().collect();
        for (name, half) in decided {
            let wanted = if *half { Wish::Float } else { Wish::Half };
            self.cast_readers(graph, name, *half, wanted);
            if defines(graph, name) && output_names(graph).contains(name.as_str()) {
                self.cast_output(graph, name, *half, top);
            }
        }
    }

    fn cast_readers(&mut self, graph: &mut Graph, name: &str, half: bool, wanted: Wish) {
        let readers: Vec<(usize, usize)> = {
            let nodes: Vec<usize> = consumers(graph).remove(name).unwrap_or_default();
            let places = |index: usize| {
                let inputs = graph.nodes[index].inputs.iter().enumerate();
                let hits = inputs.filter(|(_, input)| *input == name).map(|(place, _)| place);
                hits.map(move |place| (index, place)).collect::<Vec<_>>()
            };
            let all = nodes.into_iter().flat_map(places);
            all.filter(|(index, place)| self.input_wish(&graph.nodes[*index], *place) == wanted)
                .collect()
        };
        // The branches of a node that stays FLOAT read the cast value too.
        let inside: Vec<usize> = if wanted == Wish::Float {
            self.blocked_captures(graph, name)
        } else {
            Vec::new()
        };
        let first = readers
            .iter()
            .map(|(index, _)| *index)
            .chain(inside.iter().copied())
            .min();
        let Some(first) = first else { return };
        let to = if half { OnnxType::Float } else { OnnxType::Float16 };
        let value = self
            .names
            .make(&format!("{name}_as_{}", to.to_string().to_lowercase()));
        declare(graph, name, &value, to);
        let cast = self.names.make(&format!("{value}_cast"));
        for (index, place) in readers {
            graph.nodes[index].inputs[place].clone_from(&value);
        }
        for index in inside {
            redirect_branches(
                &mut graph.nodes[index],
                &HashMap::from([(name.to_owned(), value.clone())]),
            );
        }
        graph.nodes.insert(first, cast_node(cast, name, &value, to));
        self.changed = true;
    }

    /// Nodes that stay FLOAT and whose branches read `name` from around them.
    fn blocked_captures(&self, graph: &Graph, name: &str) -> Vec<usize> {
        let captured = |node: &Node| branches(node).any(|branch| captures(branch).contains(&name));
        let nodes = graph.nodes.iter().enumerate();
        nodes
            .filter(|(_, node)| captured(node) && self.pass.blocks(node))
            .map(|(index, _)| index)
            .collect()
    }

    /// An output keeps its name and the type it has to have.
    fn cast_output(&mut self, graph: &mut Graph, name: &str, half: bool, top: bool) {
        let keep = top && self.pass.keep_io_types.keeps(name);
        if keep != half {
            return;
        }
        let Some(index) = producers(graph).get(name).copied() else {
            return;
        };
        let to = if keep { OnnxType::Float } else { OnnxType::Float16 };
        let inner = self.names.make(&format!("{name}_before_cast"));
        for node in &mut graph.nodes {
            for value in node.inputs.iter_mut().chain(&mut node.outputs) {
                if value == name {
                    value.clone_from(&inner);
                }
            }
        }
        let cast = self.names.make(&format!("{name}_cast"));
        graph.nodes.insert(index + 1, cast_node(cast, &inner, name, to));
        declare(
            graph,
            name,
            &inner,
            if keep { OnnxType::Float16 } else { OnnxType::Float },
        );
        for info in graph.outputs.iter_mut().filter(|info| info.name == name) {
            info.dtype = Some(to);
        }
        self.changed = true;
    }
}

/// Declares `new` with the shape of `name`: where shapes are left to ONNX Runtime, it takes a cache before and after
/// attention to be of one size, and gives them one buffer.
fn declare(graph: &mut Graph, name: &str, new: &str, dtype: OnnxType) {
    let infos = graph
        .outputs
        .iter()
        .chain(&graph.inputs)
        .chain(&graph.value_infos);
    let shape = infos
        .filter(|info| info.name == name)
        .find_map(|info| info.shape.clone());
    if shape.is_some() {
        graph.value_infos.push(ValueInfo {
            name: new.to_owned(),
            dtype: Some(dtype),
            shape,
        });
    }
}

fn cast_node(node: String, from: &str, value: &str, to: OnnxType) -> Node {
    Node::new(node, "Cast", &[from], &[value]).with("to", i64::from(to.code()))
}

fn defines(graph: &Graph, name: &str) -> bool {
    graph
        .nodes
        .iter()
        .any(|node| node.outputs.iter().any(|output| output == name))
}

/// FLOAT values that the graph itself defines, in order.
fn own_floats(graph: &Graph, types: &Types) -> Vec<String> {
    let inputs = graph.inputs.iter().map(|info| info.name.as_str());
    let constants = graph.initializers.iter().map(|tensor| tensor.name.as_str());
    let outputs = graph
        .nodes
        .iter()
        .flat_map(|node| node.outputs.iter().map(String::as_str));
    let mut seen = HashSet::new();
    let all = inputs
        .chain(constants)
        .chain(outputs)
        .filter(|name| !name.is_empty());
    let floats = all.filter(|name| types.get(*name) == Some(&OnnxType::Float) && seen.insert(*name));
    floats.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests;
