//! `ExtractAdapters`: LoRA weights that are constants of the graph become optional inputs, and move to an
//! `.onnx_adapter` file.
//!
//! A weight `A [in, r]` or `B [r, out]` becomes an input whose rank is the symbol `lora_r`, with a default of rank 0:
//! without an adapter the graph computes what the base model does. Each input is listed once. All adapters share one
//! symbol, so weights of lower rank are padded with zeros to the highest, which changes no result.
//!
//! A LoRA weight in MatMulNBits is dequantized: its rank would lie inside the packed integers, where it cannot vary, and
//! a MatMulNBits whose weight is an input cannot be prepared by the runtime.

use std::collections::{HashMap, HashSet};

use olive_core::{Error, ParamKind, ParamSpec, PassConfig, Result};
use serde::Deserialize;

use super::params::{param, with_external_data};
use super::rewrite::{constants, is_contrib, is_op, remove_dead};
use super::weight_only::unpack;
use super::{Draft, GraphPass, OnnxPass};
use crate::adapter::AdapterFile;
use crate::ir::{Dim, Graph, Node, OnnxType, Tensor, ValueInfo};

const PARAMS: [ParamSpec; 10] = with_external_data([
    param(
        "adapter_type",
        ParamKind::OneOf(&["lora", "dora", "loha"]),
        "\"lora\"",
        "Only `lora`.",
    ),
    param(
        "make_inputs",
        ParamKind::Bool,
        "true",
        "Whether weights become inputs; if not they stay, in the data file.",
    ),
    param(
        "dynamic_lora_r",
        ParamKind::Bool,
        "true",
        "Whether the rank is the symbol `lora_r`.",
    ),
    param(
        "optional_inputs",
        ParamKind::Bool,
        "true",
        "Whether inputs have defaults that change nothing.",
    ),
    param(
        "save_format",
        ParamKind::OneOf(&["onnx_adapter", "pt", "numpy", "safetensors"]),
        "\"onnx_adapter\"",
        "Only `onnx_adapter`.",
    ),
]);

/// The pass.
pub const PASS: OnnxPass = OnnxPass::new("ExtractAdapters", &PARAMS, parse);

/// The symbol of the rank.
const RANK: &str = "lora_r";

#[derive(Deserialize)]
struct Parameters {
    adapter_type: String,
    make_inputs: bool,
    dynamic_lora_r: bool,
    optional_inputs: bool,
    save_format: String,
}

fn parse(_origin: &str, config: &PassConfig) -> Result<Box<dyn GraphPass>> {
    let given: Parameters = config.parse("pass `ExtractAdapters`")?;
    if given.adapter_type != "lora" {
        let what = format!("adapter_type `{}`", given.adapter_type);
        return Err(Error::unsupported(
            what,
            "its weights are not low-rank products that can be left out; merge it",
        ));
    }
    if given.save_format != "onnx_adapter" {
        return Err(Error::unsupported(
            format!("save_format `{}`", given.save_format),
            "use `onnx_adapter`",
        ));
    }
    Ok(Box::new(given))
}

/// Which of the two weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    A,
    B,
}

impl Side {
    /// The axis of the rank in `[in, r]` or `[r, out]`.
    fn rank_axis(self) -> usize {
        match self {
            Self::A => 1,
            Self::B => 0,
        }
    }

    /// From the name of a node such as `/model/layers.0/attn/q_proj/lora_A/MatMul`.
    fn of(name: &str) -> Option<Self> {
        let parts: Vec<&str> = name.split(['/', '.']).collect();
        let has = |part: &str| parts.contains(&part);
        match (has("lora_A"), has("lora_B")) {
            (true, false) => Some(Self::A),
            (false, true) => Some(Self::B),
            _ => None,
        }
    }
}

/// A weight on its way out.
struct Extracted {
    name: String,
    side: Side,
    tensor: Tensor,
}

impl GraphPass for Parameters {
    fn apply(&self, draft: &mut Draft) -> Result<bool> {
        let (found, nodes) = find(&draft.model.graph)?;
        if found.is_empty() {
            tracing::warn!("the graph has no constant LoRA weights");
            return Ok(false);
        }
        if !self.make_inputs {
            return Ok(false);
        }
        let rank = found
            .iter()
            .map(|weight| weight.tensor.shape()[weight.side.rank_axis()])
            .max()
            .unwrap_or(0);
        let graph = &mut draft.model.graph;
        for (index, node) in nodes {
            graph.nodes[index] = node;
        }
        let names: HashSet<&str> = found.iter().map(|weight| weight.name.as_str()).collect();
        graph
            .initializers
            .retain(|tensor| !names.contains(tensor.name.as_str()));
        graph
            .value_infos
            .retain(|info| !names.contains(info.name.as_str()));
        let mut parameters = Vec::with_capacity(found.len());
        for weight in &found {
            self.add_input(graph, weight)?;
            parameters.push(if self.dynamic_lora_r {
                padded(weight, rank)?
            } else {
                weight.tensor.clone()
            });
        }
        remove_dead(graph);
        draft.adapter = Some(AdapterFile {
            adapter_version: 1,
            model_version: 1,
            parameters,
        });
        Ok(true)
    }
}

impl Parameters {
    fn add_input(&self, graph: &mut Graph, weight: &Extracted) -> Result<()> {
        let mut shape = weight.tensor.shape().to_vec();
        let mut dims: Vec<Dim> = shape.iter().map(|size| Dim::Known(*size)).collect();
        if self.dynamic_lora_r {
            dims[weight.side.rank_axis()] = Dim::Symbol(RANK.to_owned());
            shape[weight.side.rank_axis()] = 0;
        }
        let dtype = weight.tensor.dtype();
        graph.inputs.push(ValueInfo::new(&weight.name, dtype, dims));
        if self.optional_inputs {
            let bytes = vec![0; shape.iter().product::<usize>() * dtype.bits() / 8];
            graph
                .initializers
                .push(Tensor::inline(&weight.name, dtype, shape, bytes)?);
        }
        Ok(())
    }
}

/// The LoRA weights of a graph, in the order of its nodes, and the nodes that read them by new names.
fn find(graph: &Graph) -> Result<(Vec<Extracted>, HashMap<usize, Node>)> {
    let constants = constants(graph);
    let inputs: HashSet<&str> = graph.inputs.iter().map(|input| input.name.as_str()).collect();
    let mut found: Vec<Extracted> = Vec::new();
    let mut known: HashMap<String, usize> = HashMap::new();
    let mut nodes = HashMap::new();
    for (index, node) in graph.nodes.iter().enumerate() {
        let packed = is_contrib(node, "MatMulNBits");
        if !packed && !is_op(node, "MatMul") {
            continue;
        }
        let Some(weight) = node.input(1).filter(|name| !inputs.contains(name)) else {
            continue;
        };
        let Some(side) = Side::of(&node.name).or_else(|| Side::of(weight)) else {
            continue;
        };
        let Some(tensor) = constants.get(weight) else {
            let what = format!("the LoRA weight of node `{}`, which nodes compute,", node.name);
            return Err(Error::unsupported(what, "only constants can be extracted"));
        };
        let dense = if packed {
            dequantized(node, &constants)?
        } else {
            (*tensor).clone()
        };
        if dense.shape().len() != 2 || dense.dtype().to_core().is_none_or(|dtype| !dtype.is_float()) {
            return Err(Error::tensor(
                weight,
                "a float matrix as LoRA weight",
                format!("{dense:?}"),
            ));
        }
        let name = input_name(node, weight);
        let mut new = if packed {
            Node::new(
                node.name.trim_end_matches("_Q4").trim_end_matches("_Q8"),
                "MatMul",
                &[&node.inputs[0]],
                &[&node.outputs[0]],
            )
        } else {
            node.clone()
        };
        new.inputs.truncate(1);
        new.inputs.push(name.clone());
        nodes.insert(index, new);
        match known.get(&name) {
            Some(other) if found[*other].tensor.shape() == dense.shape() && found[*other].side == side => {}
            Some(_) => return Err(Error::tensor(name, "one LoRA weight of that name", "two")),
            None => {
                known.insert(name.clone(), found.len());
                let tensor = Tensor::inline(
                    &name,
                    dense.dtype(),
                    dense.shape().to_vec(),
                    dense.bytes()?.into_owned(),
                )?;
                found.push(Extracted { name, side, tensor });
            }
        }
    }
    Ok((found, nodes))
}

/// The weight's own name where it says what it is; else one from the node's, as adapters of exported graphs have them.
fn input_name(node: &Node, weight: &str) -> String {
    if Side::of(weight).is_some() {
        let base = weight
            .trim_end_matches(".qweight")
            .trim_end_matches("_Q4")
            .trim_end_matches("_Q8");
        return base.to_owned();
    }
    let dotted = node.name.replace('/', ".");
    let dotted = dotted
        .trim_start_matches('.')
        .trim_end_matches("_Q4")
        .trim_end_matches("_Q8")
        .trim_end_matches("NBits");
    let stem = dotted.trim_end_matches(".MatMul").trim_end_matches(".default");
    format!("{stem}.weight")
}

/// The `[K, N]` weight of a MatMulNBits.
fn dequantized(node: &Node, constants: &HashMap<&str, &Tensor>) -> Result<Tensor> {
    let refuse = |what: &str| {
        Error::unsupported(
            format!("the LoRA weight of node `{}` with {what}", node.name),
            "build the adapter in float",
        )
    };
    let constant = |place: usize| {
        node.input(place)
            .map(|name| {
                constants
                    .get(name)
                    .copied()
                    .ok_or_else(|| refuse("parts that are no constants"))
            })
            .transpose()
    };
    let size = |name: &str| -> Result<usize> {
        Ok(node.int(name)?.and_then(|n| usize::try_from(n).ok()).unwrap_or(0))
    };
    let (n, k, block_size) = (size("N")?, size("K")?, size("block_size")?);
    let bits = if node.attribute("bits").is_some() {
        size("bits")?
    } else {
        4
    };
    let (values, scales, zeros) = (constant(1)?, constant(2)?, constant(3)?);
    let (Some(values), Some(scales)) = (values, scales) else {
        return Err(refuse("parts that are missing"));
    };
    if node.input(4).is_some() || node.input(5).is_some() || !matches!(bits, 4 | 8) || block_size == 0 {
        return Err(refuse("a group index, a bias, or other than 4 or 8 bits"));
    }
    let blocks = k.div_ceil(block_size);
    let scale = scales.to_f32()?;
    let in_row = (blocks * bits).div_ceil(8);
    if values.len() != n * blocks * block_size * bits / 8 || scale.len() != n * blocks {
        return Err(Error::tensor(
            &values.name,
            format!("sizes that fit N {n} and K {k}"),
            format!("{values:?}"),
        ));
    }
    let zero: Vec<f32> = match zeros {
        None => vec![(1u32 << (bits - 1)) as f32; n * blocks],
        Some(zeros) if zeros.dtype() == OnnxType::Uint8 && zeros.len() == n * in_row => zeros
            .bytes()?
            .chunks_exact(in_row)
            .flat_map(|row| unpack(row, bits, blocks))
            .map(f32::from)
            .collect(),
        Some(zeros) if zeros.len() == n * blocks => zeros.to_f32()?,
        Some(_) => return Err(refuse("zero points of another size")),
    };
    let codes = unpack(&values.bytes()?, bits, n * blocks * block_size);
    let mut dense = Vec::with_capacity(k * n);
    for row in 0..k {
        for col in 0..n {
            let block = col * blocks + row / block_size;
            dense.push((f32::from(codes[col * blocks * block_size + row]) - zero[block]) * scale[block]);
        }
    }
    let dtype = scales.dtype().to_core().and_then(|dtype| dtype.from_f32(&dense));
    let bytes = dtype.ok_or_else(|| refuse("scales that are no floats"))?;
    Tensor::inline(&values.name, scales.dtype(), [k, n], bytes)
}

/// The weight with zeros up to `rank`.
fn padded(weight: &Extracted, rank: usize) -> Result<Tensor> {
    let shape = weight.tensor.shape();
    let [rows, cols] = [shape[0], shape[1]];
    if shape[weight.side.rank_axis()] == rank {
        return Ok(weight.tensor.clone());
    }
    let size = weight.tensor.dtype().bits() / 8;
    let bytes = weight.tensor.bytes()?;
    let (shape, bytes) = match weight.side {
        Side::A => {
            let line = |row: usize| {
                let mut line = bytes[row * cols * size..(row + 1) * cols * size].to_vec();
                line.resize(rank * size, 0);
                line
            };
            ([rows, rank], (0..rows).flat_map(line).collect())
        }
        Side::B => {
            let mut all = bytes.to_vec();
            all.resize(rank * cols * size, 0);
            ([rank, cols], all)
        }
    };
    Tensor::inline(&weight.name, weight.tensor.dtype(), shape, bytes)
}

#[cfg(test)]
mod tests;
