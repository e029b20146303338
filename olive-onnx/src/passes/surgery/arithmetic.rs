//! Surgeries that compute the same, or nearly, with other operators.

use std::collections::HashSet;

use olive_core::{DType, Error, Result};
use serde::Deserialize;

use super::super::rewrite::{
    FreshNames, consumers, is_contrib, is_op, output_names, producers, remove_dead, rename_value,
};
use super::super::types::{Types, infer};
use super::{Draft, FromArguments, Names, Surgery};
use crate::ir::{Dim, Graph, Node, OnnxType, Tensor};

/// The constant of a float type.
fn scalar(name: &str, dtype: OnnxType, value: f32) -> Result<Option<Tensor>> {
    let bytes = dtype
        .to_core()
        .filter(|dtype: &DType| dtype.is_float())
        .and_then(|dtype| dtype.from_f32(&[value]));
    bytes
        .map(|bytes| Tensor::inline(name, dtype, [], bytes))
        .transpose()
}

/// Replaces nodes one by one with what `lower` gives; `None` leaves a node.
fn replace(
    graph: &mut Graph,
    mut lower: impl FnMut(&Node, &Types, &mut FreshNames, &mut Vec<Tensor>) -> Result<Option<Vec<Node>>>,
) -> Result<bool> {
    let types = infer(graph, &Types::new())?;
    let mut names = FreshNames::new(graph);
    let (mut nodes, mut tensors, mut changed) = (Vec::with_capacity(graph.nodes.len()), Vec::new(), false);
    for node in &graph.nodes {
        match lower(node, &types, &mut names, &mut tensors)? {
            None => nodes.push(node.clone()),
            Some(new) => {
                nodes.extend(new);
                changed = true;
            }
        }
    }
    if changed {
        graph.nodes = nodes;
        graph.initializers.extend(tensors);
        remove_dead(graph);
    }
    Ok(changed)
}

/// `ReplaceErfWithTanh`: `erf(x) ≈ tanh(605/503 · x)`.
#[derive(Deserialize)]
pub struct ErfToTanh {}

impl FromArguments for ErfToTanh {}

impl Surgery for ErfToTanh {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        replace(&mut draft.model.graph, |node, types, names, tensors| {
            let dtype = types.get(node.input(0).unwrap_or_default()).copied();
            let Some(dtype) = dtype.filter(|_| is_op(node, "Erf")) else {
                return Ok(None);
            };
            let scale = names.make("erf_tanh_scale");
            let Some(tensor) = scalar(&scale, dtype, 605.0 / 503.0)? else {
                return Ok(None);
            };
            tensors.push(tensor);
            let scaled = names.make(&format!("{}_scaled", node.inputs[0]));
            let (mul, tanh) = (
                names.make(&format!("{}_Mul", node.name)),
                names.make(&format!("{}_Tanh", node.name)),
            );
            Ok(Some(vec![
                Node::new(mul, "Mul", &[&node.inputs[0], &scale], &[&scaled]),
                Node::new(tanh, "Tanh", &[&scaled], &[&node.outputs[0]]),
            ]))
        })
    }
}

/// `DecomposeQuickGelu`: `x · sigmoid(α · x)`.
#[derive(Deserialize)]
pub struct QuickGelu {}

impl FromArguments for QuickGelu {}

impl Surgery for QuickGelu {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        replace(&mut draft.model.graph, |node, types, names, tensors| {
            let dtype = types.get(node.input(0).unwrap_or_default()).copied();
            let Some(dtype) = dtype.filter(|_| is_contrib(node, "QuickGelu")) else {
                return Ok(None);
            };
            let alpha = names.make(&format!("{}_alpha", node.name));
            let Some(tensor) = scalar(&alpha, dtype, node.float("alpha")?.unwrap_or(1.702))? else {
                return Ok(None);
            };
            tensors.push(tensor);
            let x = node.inputs[0].as_str();
            let [scaled, gate] =
                ["scaled", "gate"].map(|part| names.make(&format!("{}_{part}", node.outputs[0])));
            let [first, sigmoid, second] =
                ["Mul", "Sigmoid", "Mul"].map(|op| names.make(&format!("{}_{op}", node.name)));
            Ok(Some(vec![
                Node::new(first, "Mul", &[&alpha, x], &[&scaled]),
                Node::new(sigmoid, "Sigmoid", &[&scaled], &[&gate]),
                Node::new(second, "Mul", &[x, &gate], &[&node.outputs[0]]),
            ]))
        })
    }
}

/// `ReciprocalMulToDiv`: `a · (1 / x)` becomes `a / x`.
#[derive(Deserialize)]
pub struct ReciprocalMul {}

impl FromArguments for ReciprocalMul {}

impl Surgery for ReciprocalMul {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &mut draft.model.graph;
        let mut changed = false;
        for index in 0..graph.nodes.len() {
            if !is_op(&graph.nodes[index], "Mul") {
                continue;
            }
            let found = {
                let made = producers(graph);
                let reciprocal = |place: usize| {
                    let maker = &graph.nodes[*made.get(graph.nodes[index].inputs[place].as_str())?];
                    is_op(maker, "Reciprocal").then(|| (1 - place, maker.inputs[0].clone()))
                };
                reciprocal(1).or_else(|| reciprocal(0))
            };
            if let Some((numerator, x)) = found {
                let node = &mut graph.nodes[index];
                node.inputs = vec![node.inputs[numerator].clone(), x];
                "Div".clone_into(&mut node.op_type);
                changed = true;
            }
        }
        if changed {
            remove_dead(graph);
        }
        Ok(changed)
    }
}

/// `GemmToMatMulAdd`: `MatMul` and `Add`; α and β have to be 1 and A in order.
#[derive(Deserialize)]
pub struct GemmToMatMulAdd {}

impl FromArguments for GemmToMatMulAdd {}

impl Surgery for GemmToMatMulAdd {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        replace(&mut draft.model.graph, |node, _, names, _| {
            let one = |name: &str| -> Result<bool> { Ok(node.float(name)?.unwrap_or(1.0) == 1.0) };
            if !is_op(node, "Gemm")
                || !one("alpha")?
                || !one("beta")?
                || node.int("transA")?.unwrap_or(0) != 0
            {
                return Ok(None);
            }
            let mut nodes = Vec::new();
            let mut right = node.inputs[1].clone();
            if node.int("transB")?.unwrap_or(0) != 0 {
                let turned = names.make(&format!("{right}_transposed"));
                let name = names.make(&format!("{}_Transpose", node.name));
                nodes.push(Node::new(name, "Transpose", &[&right], &[&turned]).with("perm", vec![1, 0]));
                right = turned;
            }
            let name = names.make(&format!("{}_MatMul", node.name));
            let output = node.outputs[0].as_str();
            match node.input(2) {
                None => nodes.push(Node::new(name, "MatMul", &[&node.inputs[0], &right], &[output])),
                Some(bias) => {
                    let product = names.make(&format!("{output}_product"));
                    nodes.push(Node::new(name, "MatMul", &[&node.inputs[0], &right], &[&product]));
                    let name = names.make(&format!("{}_Add", node.name));
                    nodes.push(Node::new(name, "Add", &[&product, bias], &[output]));
                }
            }
            Ok(Some(nodes))
        })
    }
}

/// `MatMulAddToGemm`: a product of matrices and a bias of one dimension become `Gemm`. Products of more dimensions
/// stay, as their sizes would have to be fixed.
#[derive(Deserialize)]
pub struct MatMulAddToGemm {}

impl FromArguments for MatMulAddToGemm {}

impl Surgery for MatMulAddToGemm {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &mut draft.model.graph;
        let found: Vec<(usize, usize, String)> = {
            let readers = consumers(graph);
            let outputs = output_names(graph);
            let rank = |name: &str| {
                let infos = graph.inputs.iter().chain(&graph.value_infos);
                let declared = infos
                    .filter(|info| info.name == name)
                    .find_map(|info| info.shape.as_ref().map(Vec::len));
                graph
                    .initializer(name)
                    .map(|tensor| tensor.shape().len())
                    .or(declared)
            };
            let pairs = graph
                .nodes
                .iter()
                .enumerate()
                .filter(|(_, node)| is_op(node, "MatMul"))
                .filter_map(|(index, node)| {
                    let product = node.outputs[0].as_str();
                    let [add] = readers.get(product)?.as_slice() else {
                        return None;
                    };
                    let adds = &graph.nodes[*add];
                    let bias = adds.inputs.iter().find(|name| *name != product)?;
                    let fits =
                        is_op(adds, "Add") && !outputs.contains(product) && rank(&node.inputs[0]) == Some(2);
                    (fits && rank(&node.inputs[1]) == Some(2) && rank(bias) == Some(1))
                        .then(|| (index, *add, bias.clone()))
                });
            pairs.collect()
        };
        for (matmul, add, bias) in &found {
            let inputs = graph.nodes[*matmul].inputs.clone();
            let name = graph.nodes[*matmul].name.replace("MatMul", "Gemm");
            let node = Node::new(
                name,
                "Gemm",
                &[&inputs[0], &inputs[1], bias],
                &[&graph.nodes[*add].outputs[0]],
            );
            graph.nodes[*add] = node;
        }
        if !found.is_empty() {
            remove_dead(graph);
        }
        Ok(!found.is_empty())
    }
}

/// `ZeroOutInput`: an input of a node becomes zeros; symbolic sizes become 1.
#[derive(Deserialize)]
pub struct ZeroOut {
    node_name: String,
    input_idx: usize,
}

impl FromArguments for ZeroOut {}

impl Surgery for ZeroOut {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &mut draft.model.graph;
        let origin = "surgery `ZeroOutInput`";
        let wrong = |key: &str, expected: &str, found: String| Error::config(origin, key, expected, found);
        let index = graph.nodes.iter().position(|node| node.name == self.node_name);
        let index =
            index.ok_or_else(|| wrong("node_name", "the name of a node", format!("`{}`", self.node_name)))?;
        let old = graph.nodes[index].input(self.input_idx).map(str::to_owned);
        let old = old.ok_or_else(|| {
            wrong(
                "input_idx",
                "an input that the node has",
                self.input_idx.to_string(),
            )
        })?;
        let value = format!("{}_zero_output_0", self.node_name);
        if old == value {
            return Ok(false);
        }
        let dtype = infer(graph, &Types::new())?.get(&old).copied();
        let infos = graph
            .inputs
            .iter()
            .chain(&graph.value_infos)
            .chain(&graph.outputs);
        let declared = infos
            .filter(|info| info.name == old)
            .find_map(|info| info.shape.clone());
        let constant = graph.initializer(&old).map(|tensor| tensor.shape().to_vec());
        let sizes = |dim: &Dim| if let Dim::Known(size) = dim { *size } else { 1 };
        let shape = constant.or_else(|| declared.map(|dims| dims.iter().map(sizes).collect()));
        let (Some(dtype), Some(shape)) = (dtype, shape) else {
            return Err(Error::unsupported(
                format!("zeros for `{old}`"),
                "its type and rank are not declared",
            ));
        };
        let bytes = crate::ir::element_count(&shape)
            .and_then(|count| dtype.byte_len(count))
            .unwrap_or(0);
        let zeros = Tensor::inline("", dtype, shape, vec![0; bytes])?;
        let name = format!("{}_zero", self.node_name);
        graph.nodes[index].inputs[self.input_idx].clone_from(&value);
        graph.nodes.insert(
            index,
            Node::new(name, "Constant", &[], &[&value]).with("value", zeros),
        );
        remove_dead(graph);
        Ok(true)
    }
}

/// `CastOutputs`: outputs of the graph get another type.
#[derive(Deserialize)]
pub struct CastOutputs {
    names: Names,
    to: String,
}

impl FromArguments for CastOutputs {
    fn checked(self, origin: &str) -> Result<Self> {
        match self.target() {
            Some(_) => Ok(self),
            None => Err(Error::config(
                origin,
                "to",
                "an ONNX type such as `FLOAT`",
                format!("`{}`", self.to),
            )),
        }
    }
}

impl CastOutputs {
    fn target(&self) -> Option<OnnxType> {
        (1..=16)
            .filter_map(OnnxType::from_code)
            .find(|dtype| dtype.to_string().eq_ignore_ascii_case(&self.to))
    }
}

impl Surgery for CastOutputs {
    fn operate(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &mut draft.model.graph;
        let Some(target) = self.target() else {
            return Ok(false);
        };
        let types = infer(graph, &Types::new())?;
        let inputs: HashSet<String> = graph.inputs.iter().map(|input| input.name.clone()).collect();
        let mut names = FreshNames::new(graph);
        let mut changed = false;
        for name in self.names.list() {
            let found = graph.outputs.iter().any(|output| output.name == *name);
            if !found || inputs.contains(name) {
                let expected = "names of outputs that are no inputs";
                return Err(Error::config(
                    "surgery `CastOutputs`",
                    "names",
                    expected,
                    format!("`{name}`"),
                ));
            }
            if types.get(name) == Some(&target) {
                continue;
            }
            let inner = names.make(&format!("{name}_before_cast"));
            rename_value(graph, name, &inner);
            for output in graph.outputs.iter_mut().filter(|output| output.name == inner) {
                name.clone_into(&mut output.name);
                output.dtype = Some(target);
            }
            let node = names.make(&format!("Cast_{name}_{}", self.to));
            graph
                .nodes
                .push(Node::new(node, "Cast", &[&inner], &[name]).with("to", i64::from(target.code())));
            changed = true;
        }
        Ok(changed)
    }
}
