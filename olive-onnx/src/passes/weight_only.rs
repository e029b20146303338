//! Weight-only quantization of a graph: `MatMul` with a constant right side becomes `MatMulNBits`, and `Gather` from a
//! constant table `GatherBlockQuantized`. The passes differ in how a block of weights becomes integers.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use olive_core::{Error, Result};

use super::rewrite::{constants, declare_opset, is_op, remove_unread};
use crate::ir::{Graph, MICROSOFT, Model, Node, OnnxType, Tensor};

mod blocks;
mod hqq;
mod kquant;
mod rtn;

pub use blocks::{BlockQuantizer, Layout, pack, unpack};
pub use hqq::PASS as HQQ;
pub use kquant::PASS as KQUANT;
pub use kquant::quantize_block as k_quant;
pub use rtn::PASS as RTN;
pub use rtn::{extremes, round_to_nearest};

use blocks::{Lazy, Zeros};

/// Which nodes are quantized, and how.
pub struct Selection {
    /// Only these, where given.
    pub include: Option<HashSet<String>>,
    /// Not these; `*` and `?` stand for any characters and for one.
    pub exclude: Vec<String>,
    /// Bits and block size.
    pub layout: Layout,
    /// Other bits and block sizes for some nodes.
    pub overrides: HashMap<String, Layout>,
    /// The attribute of MatMulNBits; 0 leaves it out.
    pub accuracy_level: i64,
    /// Whether `Gather` is quantized too.
    pub gathers: bool,
}

impl Selection {
    /// The layout for a node; `None` if it stays as it is.
    fn layout_of(&self, name: &str) -> Option<Layout> {
        let included = self.include.as_ref().is_none_or(|names| names.contains(name));
        let excluded = self.exclude.iter().any(|pattern| glob(pattern, name));
        (included && !excluded).then(|| self.overrides.get(name).copied().unwrap_or(self.layout))
    }
}

/// Whether `name` fits `pattern`, in which `*` stands for any characters and `?` for one.
pub fn glob(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                retry = Some((p, n));
                p += 1;
            }
            Some(c) if *c == '?' || *c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match retry {
                Some((star, at)) => {
                    (p, n) = (star + 1, at + 1);
                    retry = Some((star, at + 1));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// The names of what a weight became.
#[derive(Clone)]
struct Quantized {
    values: String,
    scales: String,
    zeros: Option<String>,
    /// `[rows, columns]` of the weight as it is quantized: `[N, K]`, or `[entries, width]`.
    shape: [usize; 2],
}

/// Quantizes every selected node of the main graph. Whether there was one.
pub fn quantize_model(
    model: &mut Model,
    quantizer: &Arc<dyn BlockQuantizer>,
    selection: &Selection,
) -> Result<bool> {
    let mut job = Job {
        quantizer,
        selection,
        done: HashMap::new(),
        tensors: Vec::new(),
        nodes: HashMap::new(),
    };
    job.plan(&model.graph)?;
    if job.nodes.is_empty() {
        return Ok(false);
    }
    let Job { tensors, nodes, .. } = job;
    for (index, node) in nodes {
        model.graph.nodes[index] = node;
    }
    for tensor in tensors {
        if model.graph.initializer(&tensor.name).is_some() {
            return Err(Error::tensor(
                tensor.name,
                "a name that is free",
                "an initializer of that name",
            ));
        }
        model.graph.initializers.push(tensor);
    }
    remove_unread(&mut model.graph);
    super::rewrite::remove_dead(&mut model.graph);
    declare_opset(model, MICROSOFT, 1);
    Ok(true)
}

struct Job<'a> {
    quantizer: &'a Arc<dyn BlockQuantizer>,
    selection: &'a Selection,
    done: HashMap<(String, bool, Layout), Quantized>,
    tensors: Vec<Tensor>,
    nodes: HashMap<usize, Node>,
}

impl Job<'_> {
    fn plan(&mut self, graph: &Graph) -> Result<()> {
        let constants = constants(graph);
        for (index, node) in graph.nodes.iter().enumerate() {
            let Some(layout) = self.selection.layout_of(&node.name) else {
                continue;
            };
            let weight = |place: usize| {
                let tensor = node.input(place).and_then(|name| constants.get(name).copied());
                let float = |tensor: &&Tensor| matches!(tensor.dtype(), OnnxType::Float | OnnxType::Float16);
                tensor
                    .filter(|tensor| tensor.shape().len() == 2 && !tensor.is_empty())
                    .filter(float)
            };
            let new = if is_op(node, "MatMul") {
                weight(1)
                    .map(|tensor| self.matmul(node, tensor, layout))
                    .transpose()?
            } else if self.selection.gathers
                && is_op(node, "Gather")
                && matches!(node.int("axis")?, None | Some(0))
            {
                match weight(0) {
                    Some(tensor) => self.gather(node, tensor, layout)?,
                    None => None,
                }
            } else {
                None
            };
            if let Some(new) = new {
                self.nodes.insert(index, new);
            }
        }
        Ok(())
    }

    fn matmul(&mut self, node: &Node, weight: &Tensor, layout: Layout) -> Result<Node> {
        let name = node.input(1).unwrap_or_default();
        let parts = self.quantized(name, weight, layout, true)?;
        let [n, k] = parts.shape;
        let mut inputs = vec![node.inputs[0].as_str(), &parts.values, &parts.scales];
        inputs.extend(parts.zeros.as_deref());
        let mut new = Node::new(
            renamed(&node.name, layout.bits),
            "MatMulNBits",
            &inputs,
            &[&node.outputs[0]],
        )
        .in_domain(MICROSOFT)
        .with("K", k as i64)
        .with("N", n as i64);
        if self.selection.accuracy_level > 0 {
            new = new.with("accuracy_level", self.selection.accuracy_level);
        }
        Ok(new
            .with("bits", layout.bits as i64)
            .with("block_size", layout.block_size as i64))
    }

    fn gather(&mut self, node: &Node, weight: &Tensor, layout: Layout) -> Result<Option<Node>> {
        if !weight.shape()[1].is_multiple_of(layout.block_size) || !self.quantizer.packs_zeros() {
            tracing::warn!(
                "node `{}` (Gather) stays: its rows are not whole blocks of {}",
                node.name,
                layout.block_size
            );
            return Ok(None);
        }
        let name = node.input(0).unwrap_or_default();
        let parts = self.quantized(name, weight, layout, false)?;
        let mut inputs = vec![&parts.values, &node.inputs[1], &parts.scales];
        inputs.extend(&parts.zeros);
        let inputs: Vec<&str> = inputs.into_iter().map(String::as_str).collect();
        let new = Node::new(
            renamed(&node.name, layout.bits),
            "GatherBlockQuantized",
            &inputs,
            &[&node.outputs[0]],
        );
        Ok(Some(
            new.in_domain(MICROSOFT)
                .with("bits", layout.bits as i64)
                .with("block_size", layout.block_size as i64)
                .with("gather_axis", 0)
                .with("quantize_axis", 1),
        ))
    }

    /// The parts of a weight, made once however many nodes read it.
    fn quantized(
        &mut self,
        name: &str,
        weight: &Tensor,
        layout: Layout,
        transpose: bool,
    ) -> Result<Quantized> {
        let key = (name.to_owned(), transpose, layout);
        if let Some(parts) = self.done.get(&key) {
            return Ok(parts.clone());
        }
        let [first, second] = [weight.shape()[0], weight.shape()[1]];
        let shape @ [rows, cols] = if transpose {
            [second, first]
        } else {
            [first, second]
        };
        let blocks = cols.div_ceil(layout.block_size);
        // A weight that is multiplied and looked up, or in two layouts, has two sets of names.
        let again = self.done.keys().filter(|(other, ..)| other == name).count();
        let base = if again == 0 {
            name.to_owned()
        } else {
            format!("{name}_{again}")
        };
        let lazy = Arc::new(Lazy::new(
            weight.clone(),
            transpose,
            layout,
            self.quantizer.clone(),
        ));
        let blob = layout.block_size * layout.bits / 8;
        let values_shape = if transpose {
            vec![rows, blocks, blob]
        } else {
            vec![rows, blocks * blob]
        };
        let mut tensor = |name: String, dtype, shape: Vec<usize>, part: usize| -> Result<String> {
            let source = lazy.clone();
            let producer = Arc::new(move || source.part(part));
            self.tensors
                .push(Tensor::produced(&name, dtype, shape, producer)?);
            Ok(name)
        };
        let values = tensor(
            format!("{base}_Q{}", layout.bits),
            OnnxType::Uint8,
            values_shape,
            0,
        )?;
        let scales = tensor(format!("{base}_scales"), weight.dtype(), vec![rows, blocks], 1)?;
        let zeros = match self.quantizer.zeros() {
            Zeros::Middle => None,
            Zeros::Packed => {
                let width = (blocks * layout.bits).div_ceil(8);
                Some(tensor(
                    format!("{base}_zero_points"),
                    OnnxType::Uint8,
                    vec![rows, width],
                    2,
                )?)
            }
            Zeros::Float => Some(tensor(
                format!("{base}_zero_points"),
                weight.dtype(),
                vec![rows, blocks],
                2,
            )?),
        };
        let parts = Quantized {
            values,
            scales,
            zeros,
            shape,
        };
        self.done.insert(key, parts.clone());
        Ok(parts)
    }
}

fn renamed(name: &str, bits: usize) -> String {
    if name.is_empty() {
        String::new()
    } else {
        format!("{name}_Q{bits}")
    }
}

#[cfg(test)]
mod tests;
