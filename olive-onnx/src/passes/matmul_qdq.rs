//! `MatMulNBitsToQDQ`: each MatMulNBits becomes `DequantizeLinear` (blocked, opset 21) and `MatMul`.
//!
//! The weight becomes `[K, N]` with blocks along axis 0, or `[N, K]` with blocks along axis 1 and a `Transpose` behind
//! it. A node without zero points means `2^(bits-1)`; signed integers are lowered by as much, which leaves none.

use std::collections::HashMap;
use std::sync::Arc;

use olive_core::{Error, ParamKind, ParamSpec, PassConfig, Result};
use serde::Deserialize;

use super::params::{NODES_TO_EXCLUDE, param, with_external_data};
use super::rewrite::{FreshNames, constants, is_contrib, remove_dead};
use super::weight_only::{glob, pack, unpack};
use super::{Draft, GraphPass, OnnxPass};
use crate::ir::{Graph, Node, OnnxType, Tensor};

const PARAMS: [ParamSpec; 10] = with_external_data([
    param(
        "use_transpose_op",
        ParamKind::Bool,
        "false",
        "Whether the weight stays `[N, K]` and a `Transpose` follows.",
    ),
    param(
        "use_int4",
        ParamKind::Bool,
        "false",
        "The older name of `use_signed_int`.",
    ),
    param(
        "use_signed_int",
        ParamKind::Bool,
        "false",
        "Whether integers are signed.",
    ),
    param(
        "add_zero_point",
        ParamKind::Bool,
        "false",
        "Whether zero points of 0 are written too.",
    ),
    NODES_TO_EXCLUDE,
]);

/// The pass.
pub const PASS: OnnxPass = OnnxPass::new("MatMulNBitsToQDQ", &PARAMS, parse);

/// The first opset whose DequantizeLinear has blocks.
const BLOCKED_OPSET: i64 = 21;

#[derive(Deserialize)]
struct Parameters {
    use_transpose_op: bool,
    use_int4: bool,
    use_signed_int: bool,
    add_zero_point: bool,
    nodes_to_exclude: Option<Vec<String>>,
}

struct ToQdq {
    transpose: bool,
    signed: bool,
    add_zeros: bool,
    exclude: Vec<String>,
}

fn parse(origin: &str, config: &PassConfig) -> Result<Box<dyn GraphPass>> {
    let given: Parameters = config.parse(origin)?;
    Ok(Box::new(ToQdq {
        transpose: given.use_transpose_op,
        signed: given.use_signed_int || given.use_int4,
        add_zeros: given.add_zero_point,
        exclude: given.nodes_to_exclude.unwrap_or_default(),
    }))
}

impl GraphPass for ToQdq {
    fn apply(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &draft.model.graph;
        let chosen = |node: &&Node| {
            is_contrib(node, "MatMulNBits") && !self.exclude.iter().any(|p| glob(p, &node.name))
        };
        if !graph.nodes.iter().any(|node| chosen(&node)) {
            return Ok(false);
        }
        let opset = draft.model.opset("").unwrap_or_default();
        if opset < BLOCKED_OPSET {
            let what = format!("DequantizeLinear with blocks in opset {opset}");
            return Err(Error::unsupported(
                what,
                format!("it needs opset {BLOCKED_OPSET}; build the model for that"),
            ));
        }
        let mut job = Job {
            pass: self,
            names: FreshNames::new(graph),
            weights: HashMap::new(),
            tensors: Vec::new(),
        };
        let mut nodes = Vec::with_capacity(graph.nodes.len());
        for node in &graph.nodes {
            if chosen(&node) {
                job.convert(graph, node, &mut nodes)?
            } else {
                nodes.push(node.clone())
            }
        }
        let tensors = job.tensors;
        let graph = &mut draft.model.graph;
        graph.nodes = nodes;
        graph.initializers.extend(tensors);
        remove_dead(graph);
        Ok(true)
    }
}

struct Job<'a> {
    pass: &'a ToQdq,
    names: FreshNames,
    /// The dequantized value of each set of packed constants.
    weights: HashMap<Vec<String>, String>,
    tensors: Vec<Tensor>,
}

/// The constants of a node, checked.
struct Weight {
    values: Tensor,
    scales: Tensor,
    zeros: Option<Tensor>,
    n: usize,
    k: usize,
    bits: usize,
    block_size: usize,
}

impl Weight {
    fn of(graph: &Graph, node: &Node) -> Result<Self> {
        let constants = constants(graph);
        let refuse = |what: &str, reason: &str| {
            Error::unsupported(format!("node `{}` (MatMulNBits) with {what}", node.name), reason)
        };
        let constant = |place: usize, what: &str| match node.input(place).map(|name| constants.get(name)) {
            None => Ok(None),
            Some(Some(tensor)) => Ok(Some((*tensor).clone())),
            Some(None) => Err(refuse(what, "it has to be a constant")),
        };
        let missing = || refuse("too few inputs", "it needs integers and scales");
        let attribute = |name: &str, default: i64| -> Result<usize> {
            Ok(usize::try_from(node.int(name)?.unwrap_or(default)).unwrap_or(0))
        };
        let weight = Self {
            values: constant(1, "integers that are no constant")?.ok_or_else(missing)?,
            scales: constant(2, "scales that are no constant")?.ok_or_else(missing)?,
            zeros: constant(3, "zero points that are no constant")?,
            n: attribute("N", 0)?,
            k: attribute("K", 0)?,
            bits: attribute("bits", 4)?,
            block_size: attribute("block_size", 0)?,
        };
        if node.input(4).is_some() {
            return Err(refuse(
                "a group index",
                "DequantizeLinear has blocks in order only",
            ));
        }
        if weight
            .zeros
            .as_ref()
            .is_some_and(|zeros| zeros.dtype() != OnnxType::Uint8)
        {
            return Err(refuse(
                "float zero points",
                "DequantizeLinear has integers only; exclude the node",
            ));
        }
        if !matches!(weight.bits, 4 | 8) || weight.block_size == 0 {
            return Err(refuse(&format!("{} bits", weight.bits), "4 or 8 bits in blocks"));
        }
        let blocks = weight.k.div_ceil(weight.block_size);
        let fits = weight.values.len() == weight.n * blocks * weight.block_size * weight.bits / 8
            && weight.scales.len() == weight.n * blocks
            && weight
                .zeros
                .as_ref()
                .is_none_or(|z| z.len() == weight.n * (blocks * weight.bits).div_ceil(8));
        match fits {
            true => Ok(weight),
            false => Err(Error::tensor(
                &weight.values.name,
                "sizes that fit N, K and block_size",
                format!("{weight:?}"),
            )),
        }
    }
}

impl std::fmt::Debug for Weight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "N {} K {} bits {} block_size {}",
            self.n, self.k, self.bits, self.block_size
        )
    }
}

impl Job<'_> {
    fn convert(&mut self, graph: &Graph, node: &Node, nodes: &mut Vec<Node>) -> Result<()> {
        let weight = Weight::of(graph, node)?;
        let key: Vec<String> = node.inputs[1..].iter().take(3).cloned().collect();
        let dense = match self.weights.get(&key) {
            Some(name) => name.clone(),
            None => {
                let name = self.dequantize(node, weight, nodes)?;
                self.weights.insert(key, name.clone());
                name
            }
        };
        let base = node.name.trim_end_matches("_Q4").trim_end_matches("_Q8");
        let output = node.outputs[0].as_str();
        let name = self.names.make(&format!("{base}_matmul"));
        match node.input(5) {
            None => nodes.push(Node::new(name, "MatMul", &[&node.inputs[0], &dense], &[output])),
            Some(bias) => {
                let product = self.names.make(&format!("{output}_without_bias"));
                nodes.push(Node::new(name, "MatMul", &[&node.inputs[0], &dense], &[&product]));
                let add = self.names.make(&format!("{base}_add_bias"));
                nodes.push(Node::new(add, "Add", &[&product, bias], &[output]));
            }
        }
        Ok(())
    }

    /// Adds the constants and the nodes that make the dense `[K, N]`; its name.
    fn dequantize(&mut self, node: &Node, weight: Weight, nodes: &mut Vec<Node>) -> Result<String> {
        let base = weight
            .values
            .name
            .trim_end_matches("_Q4")
            .trim_end_matches("_Q8")
            .to_owned();
        let blocks = weight.k.div_ceil(weight.block_size);
        let (bits, n, k, transpose, signed) = (
            weight.bits,
            weight.n,
            weight.k,
            self.pass.transpose,
            self.pass.signed,
        );
        let dtype = match (bits, signed) {
            (4, false) => OnnxType::Uint4,
            (4, true) => OnnxType::Int4,
            (_, false) => OnnxType::Uint8,
            (_, true) => OnnxType::Int8,
        };
        let oriented = |rows: usize, cols: usize| {
            if transpose {
                vec![rows, cols]
            } else {
                vec![cols, rows]
            }
        };
        let values_name = self.names.make(&format!("{base}_DQ_Q{bits}"));
        let (source, width) = (weight.values.clone(), blocks * weight.block_size);
        let values = move || {
            let codes = unpack(&source.bytes()?, bits, n * width);
            Ok(arranged(&codes, [n, width], k, transpose, Code { bits, signed }))
        };
        self.tensors.push(Tensor::produced(
            &values_name,
            dtype,
            oriented(n, k),
            Arc::new(values),
        )?);
        let scales_name = self.names.make(&format!("{base}_DQ_scales"));
        let (source, size) = (weight.scales.clone(), weight.scales.dtype().bits() / 8);
        let scales = move || {
            let bytes = source.bytes()?;
            let place = |row: usize, col: usize| &bytes[(row * blocks + col) * size..][..size];
            Ok(match transpose {
                true => bytes.to_vec(),
                false => (0..blocks)
                    .flat_map(|col| (0..n).flat_map(move |row| place(row, col).to_vec()))
                    .collect(),
            })
        };
        self.tensors.push(Tensor::produced(
            &scales_name,
            weight.scales.dtype(),
            oriented(n, blocks),
            Arc::new(scales),
        )?);
        let mut inputs = vec![values_name, scales_name];
        if weight.zeros.is_some() || !signed || self.pass.add_zeros {
            let name = self.names.make(&format!("{base}_DQ_zero_points"));
            let codes = match &weight.zeros {
                None => vec![1 << (bits - 1); n * blocks],
                Some(zeros) => {
                    let in_row = (blocks * bits).div_ceil(8);
                    zeros
                        .bytes()?
                        .chunks_exact(in_row)
                        .flat_map(|row| unpack(row, bits, blocks))
                        .collect()
                }
            };
            let bytes = arranged(&codes, [n, blocks], blocks, transpose, Code { bits, signed });
            self.tensors
                .push(Tensor::inline(&name, dtype, oriented(n, blocks), bytes)?);
            inputs.push(name);
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let stem = node.name.trim_end_matches("_Q4").trim_end_matches("_Q8");
        let output = self.names.make(&format!("{base}_DQ_output"));
        let name = self.names.make(&format!("{stem}_DQ_Q{bits}"));
        let axis = i64::from(transpose);
        nodes.push(
            Node::new(name, "DequantizeLinear", &inputs, &[&output])
                .with("axis", axis)
                .with("block_size", weight.block_size as i64),
        );
        if !transpose {
            return Ok(output);
        }
        let turned = self.names.make(&format!("{base}_DQ_transposed"));
        let name = self.names.make(&format!("{stem}_DQ_Transpose"));
        nodes.push(Node::new(name, "Transpose", &[&output], &[&turned]).with("perm", vec![1, 0]));
        Ok(turned)
    }
}

#[derive(Clone, Copy)]
struct Code {
    bits: usize,
    signed: bool,
}

/// The first `cols` of each row of `codes [rows, width]`, transposed unless `keep`, as an ONNX tensor's bytes.
fn arranged(codes: &[u8], shape: [usize; 2], cols: usize, keep: bool, code: Code) -> Vec<u8> {
    let [rows, width] = shape;
    let middle = 1u8 << (code.bits - 1);
    let mask = ((1u16 << code.bits) - 1) as u8;
    let value = |row: usize, col: usize| {
        let value = codes[row * width + col];
        if code.signed {
            value.wrapping_sub(middle) & mask
        } else {
            value
        }
    };
    let ordered: Vec<u8> = match keep {
        true => (0..rows)
            .flat_map(|row| (0..cols).map(move |col| value(row, col)))
            .collect(),
        false => (0..cols)
            .flat_map(|col| (0..rows).map(move |row| value(row, col)))
            .collect(),
    };
    pack(&ordered, code.bits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{MICROSOFT, Model, Opset, ValueInfo};
    use crate::passes::find;

    fn model(opset: i64) -> Model {
        let bytes: Vec<u8> = (0..3 * 2 * 8).map(|i| (i * 37 % 256) as u8).collect();
        let node = |name: &str, output: &str| {
            Node::new(name, "MatMulNBits", &["x", "w_Q4", "w_scales", "w_zp"], &[output])
                .in_domain(MICROSOFT)
                .with("K", 20)
                .with("N", 3)
                .with("bits", 4)
                .with("block_size", 16)
        };
        let graph = Graph {
            name: "g".into(),
            inputs: vec![ValueInfo::new("x", OnnxType::Float, [])],
            outputs: vec![
                ValueInfo::new("y", OnnxType::Float, []),
                ValueInfo::new("z", OnnxType::Float, []),
            ],
            nodes: vec![node("a_Q4", "y"), node("b_Q4", "z")],
            initializers: vec![
                Tensor::inline("w_Q4", OnnxType::Uint8, [3, 2, 8], bytes).unwrap(),
                Tensor::floats("w_scales", [3, 2], &[1., 2., 3., 4., 5., 6.]).unwrap(),
                Tensor::inline("w_zp", OnnxType::Uint8, [3, 1], vec![0x21, 0x43, 0x65]).unwrap(),
            ],
            value_infos: vec![],
        };
        let opsets = vec![
            Opset {
                domain: String::new(),
                version: opset,
            },
            Opset {
                domain: MICROSOFT.into(),
                version: 1,
            },
        ];
        Model {
            ir_version: 10,
            opsets,
            producer_name: String::new(),
            producer_version: String::new(),
            metadata: vec![],
            graph,
        }
    }

    fn run(given: serde_json::Value, opset: i64) -> Result<Draft> {
        let pass = find("MatMulNBitsToQDQ").unwrap();
        let configured = pass.configure(given.as_object().unwrap())?;
        let mut draft = Draft::of(model(opset));
        assert!(pass.apply(configured.as_ref(), &mut draft)?.changed);
        let before = draft.model.clone();
        assert!(!pass.apply(configured.as_ref(), &mut draft)?.changed);
        assert_eq!(before, draft.model);
        Ok(draft)
    }

    #[test]
    fn every_form_holds_the_same_weights() {
        let packed: Vec<u8> = (0..3 * 2 * 8).map(|i| (i * 37 % 256) as u8).collect();
        let codes = unpack(&packed, 4, 3 * 32);
        for (signed, transpose) in [(false, false), (true, false), (false, true), (true, true)] {
            let draft = run(
                serde_json::json!({"use_signed_int": signed, "use_transpose_op": transpose}),
                21,
            )
            .unwrap();
            let graph = &draft.model.graph;
            assert_eq!(
                graph.nodes.len(),
                if transpose { 4 } else { 3 },
                "the shared weight is dequantized once"
            );
            let values = graph.initializer("w_DQ_Q4").unwrap();
            let (zeros, scales) = (
                graph.initializer("w_DQ_zero_points").unwrap(),
                graph.initializer("w_DQ_scales").unwrap(),
            );
            let (v, z) = (
                unpack(&values.bytes().unwrap(), 4, 60),
                unpack(&zeros.bytes().unwrap(), 4, 6),
            );
            let s = scales.to_f32().unwrap();
            for row in 0..3 {
                for col in 0..20 {
                    let block = col / 16;
                    let (at, group) = if transpose {
                        (row * 20 + col, row * 2 + block)
                    } else {
                        (col * 3 + row, block * 3 + row)
                    };
                    let sign = |code: u8| {
                        if signed {
                            i32::from(((code << 4) as i8) >> 4)
                        } else {
                            i32::from(code)
                        }
                    };
                    let expected = i32::from(codes[row * 32 + col]) - (2 * row + block + 1) as i32;
                    assert_eq!(sign(v[at]) - sign(z[group]), expected);
                    assert_eq!(s[group], (row * 2 + block + 1) as f32);
                }
            }
        }
    }

    #[test]
    fn what_has_no_such_form_is_refused() {
        assert!(
            run(serde_json::json!({}), 20)
                .map(|_| ())
                .unwrap_err()
                .to_string()
                .contains("MatMulNBitsToQDQ")
        );
    }
}
