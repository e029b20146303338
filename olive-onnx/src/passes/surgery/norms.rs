//! Surgeries on root-mean-square norms.

use std::collections::HashMap;

use olive_core::{DType, Error, Result};
use serde::Deserialize;

use super::super::rewrite::{
    FreshNames, constants, consumers, is_contrib, is_op, output_names, producers, reads, remove_dead,
};
use super::super::types::{Types, infer};
use super::{Draft, FromArguments, Surgery};
use crate::ir::{Graph, Node, OnnxType, Tensor};

const SKIP: &str = "SkipSimplifiedLayerNormalization";
const PLAIN: &str = "SimplifiedLayerNormalization";
const STANDARD: &str = "RMSNormalization";

/// `SimplifiedLayerNormToRMSNorm`: `x / sqrt(mean(x²) + ε) · weight` out of plain operators.
#[derive(Deserialize)]
pub struct ToRms {
    op_types: Option<Vec<String>>,
}

/// `SimplifiedLayerNormToL2Norm`: `LpNormalization` and the weight times the square root of the width. ε is lost.
#[derive(Deserialize)]
pub struct ToL2 {
    op_types: Option<Vec<String>>,
}

impl FromArguments for ToRms {
    fn checked(self, origin: &str) -> Result<Self> {
        known(origin, self.op_types.as_deref(), &[PLAIN, SKIP]).map(|()| self)
    }
}

impl FromArguments for ToL2 {
    fn checked(self, origin: &str) -> Result<Self> {
        known(origin, self.op_types.as_deref(), &[PLAIN, SKIP, STANDARD]).map(|()| self)
    }
}

fn known(origin: &str, given: Option<&[String]>, supported: &[&str]) -> Result<()> {
    match given
        .unwrap_or_default()
        .iter()
        .find(|name| !supported.contains(&name.as_str()))
    {
        Some(other) => Err(Error::config(
            origin,
            "op_types",
            format!("some of {supported:?}"),
            format!("`{other}`"),
        )),
        None => Ok(()),
    }
}

impl Surgery for ToRms {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let axes_are_input = draft.model.opset("").unwrap_or_default() >= 18;
        Lowering::run(
            &mut draft.model.graph,
            self.op_types.as_deref(),
            &[PLAIN, SKIP],
            |job, norm| job.rms(norm, axes_are_input),
        )
    }
}

impl Surgery for ToL2 {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        Lowering::run(
            &mut draft.model.graph,
            self.op_types.as_deref(),
            &[PLAIN, SKIP, STANDARD],
            |job, norm| job.l2(norm),
        )
    }
}

/// A norm that is taken apart.
struct Norm {
    name: String,
    input: String,
    weight: String,
    output: String,
    epsilon: f32,
    dtype: OnnxType,
}

struct Lowering {
    names: FreshNames,
    nodes: Vec<Node>,
    tensors: Vec<Tensor>,
    weights: HashMap<String, Tensor>,
    scaled: HashMap<String, String>,
}

impl Lowering {
    fn run(
        graph: &mut Graph,
        chosen: Option<&[String]>,
        supported: &[&str],
        lower: impl Fn(&mut Self, Norm) -> Result<()>,
    ) -> Result<bool> {
        let types = infer(graph, &Types::new())?;
        let weights = constants(graph)
            .into_iter()
            .map(|(name, tensor)| (name.to_owned(), tensor.clone()))
            .collect();
        let mut job = Self {
            names: FreshNames::new(graph),
            nodes: Vec::new(),
            tensors: Vec::new(),
            weights,
            scaled: HashMap::new(),
        };
        let read: std::collections::HashSet<String> = {
            let mut read = output_names(graph);
            read.extend(graph.nodes.iter().flat_map(reads));
            read.into_iter().map(str::to_owned).collect()
        };
        let mut changed = false;
        for node in &graph.nodes {
            let op = node.op_type.as_str();
            let right_domain = if op == SKIP {
                is_contrib(node, SKIP)
            } else {
                node.domain.is_empty()
            };
            let wanted = chosen
                .filter(|list| !list.is_empty())
                .is_none_or(|list| list.iter().any(|name| name == op));
            let (rest, weight) = if op == SKIP { (1..3, 2) } else { (1..2, 1) };
            let statistics_read = rest
                .into_iter()
                .any(|place| node.output(place).is_some_and(|name| read.contains(name)));
            let last_axis = matches!(node.int("axis")?, None | Some(-1));
            let constant = node
                .input(weight)
                .is_some_and(|name| job.weights.contains_key(name));
            if !(right_domain && supported.contains(&op) && wanted && last_axis && constant)
                || statistics_read
            {
                job.nodes.push(node.clone());
                continue;
            }
            let norm = job.norm(node, weight, &types)?;
            lower(&mut job, norm)?;
            changed = true;
        }
        if changed {
            graph.nodes = job.nodes;
            graph.initializers.extend(job.tensors);
            remove_dead(graph);
        }
        Ok(changed)
    }

    /// What the norm reads; the sum of a skip is added first.
    fn norm(&mut self, node: &Node, weight: usize, types: &Types) -> Result<Norm> {
        let name = if node.name.is_empty() {
            node.outputs[0].clone()
        } else {
            node.name.clone()
        };
        let mut input = node.inputs[0].clone();
        if node.op_type == SKIP {
            let named = node.output(3).map(str::to_owned);
            let sum = named.unwrap_or_else(|| self.names.make(&format!("{name}/Add_output")));
            match node.input(4).map(str::to_owned) {
                None => self.push(&name, "Add", &[&input, &node.inputs[1]], &sum),
                Some(bias) => {
                    let inner = self.names.make(&format!("{name}/Add_bias_output"));
                    self.push(&name, "Add", &[&input, &node.inputs[1]], &inner);
                    self.push(&name, "Add", &[&inner, &bias], &sum);
                }
            }
            input = sum;
        }
        let dtype = types.get(&node.inputs[0]).copied().unwrap_or(OnnxType::Float);
        let epsilon = node
            .float("epsilon")?
            .unwrap_or(if node.op_type == SKIP { 1e-12 } else { 1e-5 });
        Ok(Norm {
            name,
            input,
            weight: node.inputs[weight].clone(),
            output: node.outputs[0].clone(),
            epsilon,
            dtype,
        })
    }

    fn push(&mut self, base: &str, op: &str, inputs: &[&str], output: &str) {
        let name = self.names.make(&format!("{base}/{op}"));
        self.nodes.push(Node::new(name, op, inputs, &[output]));
    }

    fn scalar(&mut self, base: &str, dtype: OnnxType, value: f32) -> Result<String> {
        let name = self.names.make(base);
        let bytes = dtype
            .to_core()
            .unwrap_or(DType::F32)
            .from_f32(&[value])
            .unwrap_or_default();
        self.tensors.push(Tensor::inline(&name, dtype, [1], bytes)?);
        Ok(name)
    }

    fn rms(&mut self, norm: Norm, axes_are_input: bool) -> Result<()> {
        let base = norm.name.as_str();
        let two = self.scalar(&format!("{base}/two"), norm.dtype, 2.0)?;
        let epsilon = self.scalar(&format!("{base}/epsilon"), norm.dtype, norm.epsilon)?;
        let [square, mean, safe, root, unit] = ["Pow", "ReduceMean", "AddEps", "Sqrt", "Div"]
            .map(|step| self.names.make(&format!("{base}/{step}_output")));
        self.push(base, "Pow", &[&norm.input, &two], &square);
        let name = self.names.make(&format!("{base}/ReduceMean"));
        let reduce = if axes_are_input {
            let axes = self.names.make(&format!("{base}/axes"));
            self.tensors.push(Tensor::ints(&axes, [1], &[-1])?);
            Node::new(name, "ReduceMean", &[&square, &axes], &[&mean])
        } else {
            Node::new(name, "ReduceMean", &[&square], &[&mean]).with("axes", vec![-1])
        };
        self.nodes.push(reduce.with("keepdims", 1));
        self.push(base, "Add", &[&mean, &epsilon], &safe);
        self.push(base, "Sqrt", &[&safe], &root);
        self.push(base, "Div", &[&norm.input, &root], &unit);
        self.push(base, "Mul", &[&unit, &norm.weight], &norm.output);
        Ok(())
    }

    fn l2(&mut self, norm: Norm) -> Result<()> {
        let base = norm.name.as_str();
        let weight = self.scaled_weight(&norm.weight)?;
        let unit = self.names.make(&format!("{base}/L2Norm_output"));
        let name = self.names.make(&format!("{base}/L2Norm"));
        self.nodes.push(
            Node::new(name, "LpNormalization", &[&norm.input], &[&unit])
                .with("axis", -1)
                .with("p", 2),
        );
        self.push(base, "Mul", &[&unit, &weight], &norm.output);
        Ok(())
    }

    /// The weight times the square root of its length; one number where all are 1.
    fn scaled_weight(&mut self, name: &str) -> Result<String> {
        if let Some(scaled) = self.scaled.get(name) {
            return Ok(scaled.clone());
        }
        let scaled = self.names.make(&format!("{name}_l2norm_scaled"));
        let tensor = scaled_tensor(&self.weights[name], &scaled)?;
        self.tensors.push(tensor);
        self.scaled.insert(name.to_owned(), scaled.clone());
        Ok(scaled)
    }
}

fn scaled_tensor(weight: &Tensor, name: &str) -> Result<Tensor> {
    let values = weight.to_f32()?;
    let root = (weight.shape().last().copied().unwrap_or(1) as f32).sqrt();
    let values: Vec<f32> = match values.iter().all(|value| *value == 1.0) {
        true => vec![root],
        false => values.iter().map(|value| value * root).collect(),
    };
    let bytes = weight
        .dtype()
        .to_core()
        .and_then(|dtype| dtype.from_f32(&values))
        .unwrap_or_default();
    Tensor::inline(name, weight.dtype(), [values.len()], bytes)
}

/// `RMSNormToL2Norm`: `Pow`, `ReduceMean`, `Add`, `Sqrt`, `Div` and a weight become `LpNormalization` and the weight
/// times the square root of the width. ε is lost.
#[derive(Deserialize)]
pub struct DecomposedToL2 {
    op_types: Option<Vec<String>>,
}

impl FromArguments for DecomposedToL2 {
    fn checked(self, origin: &str) -> Result<Self> {
        match self.op_types {
            None => Ok(self),
            Some(_) => Err(Error::config(
                origin,
                "op_types",
                "nothing: the pattern is fixed",
                "a list",
            )),
        }
    }
}

impl Surgery for DecomposedToL2 {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &mut draft.model.graph;
        let mut names = FreshNames::new(graph);
        let mut changed = false;
        let mut index = 0;
        while index < graph.nodes.len() {
            if let Some(found) = decomposed(graph, index)? {
                let weight =
                    constants(graph)[graph.nodes[found.multiply].inputs[found.weight_place].as_str()].clone();
                let scaled = names.make(&format!("{}_l2norm_scaled", weight.name));
                graph.initializers.push(scaled_tensor(&weight, &scaled)?);
                let input = graph.nodes[index].inputs[0].clone();
                let unit = graph.nodes[found.divide].outputs[0].clone();
                graph.nodes[found.multiply].inputs[found.weight_place] = scaled;
                let name = names.make(&format!("{}_L2Norm", graph.nodes[index].name));
                graph.nodes[found.divide] = Node::new(name, "LpNormalization", &[&input], &[&unit])
                    .with("axis", -1)
                    .with("p", 2);
                remove_dead(graph);
                changed = true;
                index = 0;
                continue;
            }
            index += 1;
        }
        Ok(changed)
    }
}

struct Decomposed {
    /// The node that gives the normalised value.
    divide: usize,
    multiply: usize,
    weight_place: usize,
}

/// The norm whose square is node `index`.
fn decomposed(graph: &Graph, index: usize) -> Result<Option<Decomposed>> {
    let readers = consumers(graph);
    let outputs = output_names(graph);
    let only = |at: usize| {
        let name = graph.nodes[at].outputs[0].as_str();
        match readers.get(name).map(Vec::as_slice) {
            Some([one]) if !outputs.contains(name) => Some(*one),
            _ => None,
        }
    };
    let root = graph.nodes[index].inputs.first().cloned().unwrap_or_default();
    let constants = constants(graph);
    let squares = graph.nodes[index]
        .input(1)
        .and_then(|name| constants.get(name))
        .and_then(|tensor| tensor.to_f32().ok());
    if !is_op(&graph.nodes[index], "Pow") || squares.as_deref() != Some(&[2.0]) {
        return Ok(None);
    }
    let mut at = index;
    for op in ["ReduceMean", "Add", "Sqrt"] {
        match only(at) {
            Some(next) if is_op(&graph.nodes[next], op) => at = next,
            _ => return Ok(None),
        }
    }
    let Some(mut divide) = only(at).filter(|next| is_op(&graph.nodes[*next], "Div")) else {
        return Ok(None);
    };
    if graph.nodes[divide].inputs[0] != root {
        let one = constants
            .get(graph.nodes[divide].inputs[0].as_str())
            .and_then(|tensor| tensor.to_f32().ok());
        let product = only(divide)
            .filter(|next| is_op(&graph.nodes[*next], "Mul") && graph.nodes[*next].inputs.contains(&root));
        match product {
            Some(product) if one.as_deref() == Some(&[1.0]) => divide = product,
            _ => return Ok(None),
        }
    }
    let mut next = only(divide);
    if let Some(cast) = next.filter(|next| is_op(&graph.nodes[*next], "Cast")) {
        next = only(cast);
    }
    let Some(multiply) = next.filter(|next| is_op(&graph.nodes[*next], "Mul")) else {
        return Ok(None);
    };
    let made = producers(graph);
    let weight_place = graph.nodes[multiply]
        .inputs
        .iter()
        .position(|name| constants.contains_key(name.as_str()) && !made.contains_key(name.as_str()));
    Ok(weight_place.map(|weight_place| Decomposed {
        divide,
        multiply,
        weight_place,
    }))
}
