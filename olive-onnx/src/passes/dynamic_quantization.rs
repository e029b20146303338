//! `OnnxDynamicQuantization`: 8-bit weights, activations quantized while the model runs, as ONNX Runtime's dynamic
//! quantizer lays it out.
//!
//! `MatMul(A, B)` becomes `DynamicQuantizeLinear(A)`, `MatMulInteger`, `Cast`, and a `Mul` by the product of both
//! scales; `Gather(B, i)` becomes a `Gather` from integers and `DequantizeLinear`. Weights: symmetric to ±127
//! (`scale = 2·max|w| / 254`) or from 0 to 255 around a zero point (`scale = (max - min) / 255`, zero included); with
//! `reduce_range` 7 bits. Integers are rounded half to even.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use olive_core::{Error, ParamKind, ParamSpec, PassConfig, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::params::{NODES_TO_EXCLUDE, param, searched, with_external_data};
use super::peephole::clean;
use super::rewrite::{FreshNames, constants, remove_dead};
use super::{Draft, GraphPass, OnnxPass};
use crate::ir::{Graph, Node, OnnxType, Tensor};

const FLAGS: &[&str] = &["true", "false"];

const PARAMS: [ParamSpec; 17] = with_external_data([
    param(
        "quant_mode",
        ParamKind::OneOf(&["dynamic"]),
        "\"dynamic\"",
        "Only `dynamic`.",
    ),
    searched(
        param(
            "precision",
            ParamKind::OneOf(&["int8", "uint8"]),
            "\"int8\"",
            "The type of weights.",
        ),
        &["\"int8\"", "\"uint8\""],
    ),
    param(
        "op_types_to_quantize",
        ParamKind::TextList,
        "null",
        "Operators to quantize: MatMul, Gather.",
    ),
    param(
        "op_types_to_exclude",
        ParamKind::TextList,
        "null",
        "Operators to leave; `op_types_to_quantize` goes first.",
    ),
    param(
        "nodes_to_quantize",
        ParamKind::TextList,
        "null",
        "Names of the only nodes to quantize.",
    ),
    NODES_TO_EXCLUDE,
    searched(
        param(
            "per_channel",
            ParamKind::Bool,
            "false",
            "Whether each output of a MatMul has a scale.",
        ),
        FLAGS,
    ),
    searched(
        param(
            "reduce_range",
            ParamKind::Bool,
            "false",
            "Whether weights have 7 bits.",
        ),
        FLAGS,
    ),
    searched(
        param(
            "quant_preprocess",
            ParamKind::Bool,
            "true",
            "Whether the graph is cleaned before.",
        ),
        FLAGS,
    ),
    param(
        "activation_symmetric",
        ParamKind::Bool,
        "false",
        "Not supported: DynamicQuantizeLinear has a zero point.",
    ),
    param(
        "weight_symmetric",
        ParamKind::Bool,
        "null",
        "Whether weights have no zero point; as `precision` is signed.",
    ),
    param(
        "extra_options",
        ParamKind::Object,
        "null",
        "`MatMulConstBOnly`, `WeightSymmetric`, `ActivationSymmetric`.",
    ),
]);

/// The pass.
pub const PASS: OnnxPass = OnnxPass::new("OnnxDynamicQuantization", &PARAMS, parse);

const SUPPORTED: &[&str] = &["MatMul", "Gather"];

#[derive(Deserialize)]
struct Parameters {
    precision: String,
    op_types_to_quantize: Option<Vec<String>>,
    op_types_to_exclude: Option<Vec<String>>,
    nodes_to_quantize: Option<HashSet<String>>,
    nodes_to_exclude: Option<HashSet<String>>,
    per_channel: bool,
    reduce_range: bool,
    quant_preprocess: bool,
    activation_symmetric: bool,
    weight_symmetric: Option<bool>,
    extra_options: Option<Map<String, Value>>,
}

struct Dynamic {
    given: Parameters,
    signed: bool,
    symmetric: bool,
}

fn parse(origin: &str, config: &PassConfig) -> Result<Box<dyn GraphPass>> {
    let mut given: Parameters = config.parse(origin)?;
    for name in given.op_types_to_quantize.iter().flatten() {
        if !SUPPORTED.contains(&name.as_str()) {
            return Err(Error::config(
                origin,
                "op_types_to_quantize",
                format!("some of {SUPPORTED:?}"),
                format!("`{name}`"),
            ));
        }
    }
    for (key, value) in given.extra_options.take().unwrap_or_default() {
        let flag = value.as_bool().ok_or_else(|| {
            Error::config(
                origin,
                format!("extra_options.{key}"),
                "true or false",
                value.to_string(),
            )
        })?;
        match key.as_str() {
            "MatMulConstBOnly" if flag => {}
            "MatMulConstBOnly" => {
                return Err(Error::unsupported(
                    "MatMulConstBOnly false",
                    "only constant weights are quantized",
                ));
            }
            "WeightSymmetric" => given.weight_symmetric = Some(flag),
            "ActivationSymmetric" => given.activation_symmetric = flag,
            _ => {
                let known = ["MatMulConstBOnly", "WeightSymmetric", "ActivationSymmetric"];
                return Err(Error::unknown_key(origin, format!("extra_options.{key}"), known));
            }
        }
    }
    if given.activation_symmetric {
        return Err(Error::unsupported(
            "activation_symmetric",
            "DynamicQuantizeLinear always has a zero point",
        ));
    }
    let signed = given.precision == "int8";
    let symmetric = given.weight_symmetric.unwrap_or(signed);
    Ok(Box::new(Dynamic {
        given,
        signed,
        symmetric,
    }))
}

impl GraphPass for Dynamic {
    fn apply(&self, draft: &mut Draft) -> Result<bool> {
        let mut changed = false;
        if self.given.quant_preprocess {
            changed |= clean(&mut draft.model)?;
        }
        let graph = &draft.model.graph;
        let constants = constants(graph);
        let mut job = Job {
            pass: self,
            names: FreshNames::new(graph),
            weights: HashMap::new(),
            activations: HashMap::new(),
            tensors: Vec::new(),
            nodes: Vec::new(),
        };
        let mut found = false;
        for node in &graph.nodes {
            match self.weight_of(graph, node, &constants)? {
                Some(weight) => {
                    job.quantize(node, weight)?;
                    found = true;
                }
                None => job.nodes.push(node.clone()),
            }
        }
        if !found {
            return Ok(changed);
        }
        let Job { tensors, nodes, .. } = job;
        let graph = &mut draft.model.graph;
        graph.nodes = nodes;
        graph.initializers.extend(tensors);
        remove_dead(graph);
        if self.given.quant_preprocess {
            // Zero points are often equal.
            clean(&mut draft.model)?;
        }
        Ok(true)
    }
}

impl Dynamic {
    /// The constant of a node that is to be quantized.
    fn weight_of<'a>(
        &self,
        graph: &Graph,
        node: &Node,
        constants: &HashMap<&str, &'a Tensor>,
    ) -> Result<Option<&'a Tensor>> {
        let given = &self.given;
        let listed = |list: &Option<Vec<String>>| list.as_ref().map(|list| list.contains(&node.op_type));
        let wanted = match listed(&given.op_types_to_quantize) {
            Some(wanted) => wanted,
            None => !listed(&given.op_types_to_exclude).unwrap_or(false),
        };
        let named = given
            .nodes_to_quantize
            .as_ref()
            .is_none_or(|names| names.contains(&node.name))
            && !given
                .nodes_to_exclude
                .as_ref()
                .is_some_and(|names| names.contains(&node.name));
        let place = match node.op_type.as_str() {
            "MatMul" => 1,
            "Gather" if matches!(node.int("axis")?, None | Some(0)) => 0,
            _ => return Ok(None),
        };
        if !wanted || !named || !node.domain.is_empty() {
            return Ok(None);
        }
        let weight = node.input(place).and_then(|name| constants.get(name).copied());
        let weight = weight.filter(|weight| {
            weight.shape().len() == 2 && !weight.is_empty() && graph.input(&weight.name).is_none()
        });
        match weight.map(Tensor::dtype) {
            Some(OnnxType::Float) => Ok(weight),
            Some(OnnxType::Float16 | OnnxType::Bfloat16) => {
                let what = format!(
                    "node `{}` ({}) with a {} weight",
                    node.name,
                    node.op_type,
                    weight.map_or(OnnxType::Float16, Tensor::dtype)
                );
                Err(Error::unsupported(
                    what,
                    "dynamic quantization has FLOAT activations; quantize before float16",
                ))
            }
            _ => Ok(None),
        }
    }
}

struct Job<'a> {
    pass: &'a Dynamic,
    names: FreshNames,
    weights: HashMap<(String, bool), [String; 3]>,
    activations: HashMap<String, [String; 3]>,
    tensors: Vec<Tensor>,
    nodes: Vec<Node>,
}

impl Job<'_> {
    fn quantize(&mut self, node: &Node, weight: &Tensor) -> Result<()> {
        let output = node.outputs[0].as_str();
        if node.op_type == "Gather" {
            let [values, scale, zero] = self.weight(&node.inputs[0], weight, false)?;
            let gathered = self.names.make(&format!("{output}_quantized"));
            let name = self.names.make(&format!("{}_quant", node.name));
            let mut gather = node.clone();
            (gather.name, gather.outputs) = (name.clone(), vec![gathered.clone()]);
            gather.inputs[0] = values;
            self.nodes.push(gather);
            let name = self.names.make(&format!("{}_DequantizeLinear", node.name));
            self.nodes.push(Node::new(
                name,
                "DequantizeLinear",
                &[&gathered, &scale, &zero],
                &[output],
            ));
            return Ok(());
        }
        let [a, a_scale, a_zero] = self.activation(&node.inputs[0]);
        let [b, b_scale, b_zero] = self.weight(&node.inputs[1], weight, self.pass.given.per_channel)?;
        let mut name = |suffix: &str| self.names.make(&format!("{}_{suffix}", node.name));
        let [product, cast, scales, scaled] =
            ["quant", "output_cast", "scales_mul", "output_scale_mul"].map(&mut name);
        let mut value = |suffix: &str| self.names.make(&format!("{output}_{suffix}"));
        let [integers, floats, factor] = ["quantized", "cast", "scale"].map(&mut value);
        self.nodes.push(Node::new(
            product,
            "MatMulInteger",
            &[&a, &b, &a_zero, &b_zero],
            &[&integers],
        ));
        let float = i64::from(OnnxType::Float.code());
        self.nodes
            .push(Node::new(cast, "Cast", &[&integers], &[&floats]).with("to", float));
        self.nodes
            .push(Node::new(scales, "Mul", &[&a_scale, &b_scale], &[&factor]));
        self.nodes
            .push(Node::new(scaled, "Mul", &[&floats, &factor], &[output]));
        Ok(())
    }

    /// Integers, scale and zero point of an activation, made once.
    fn activation(&mut self, name: &str) -> [String; 3] {
        if let Some(parts) = self.activations.get(name) {
            return parts.clone();
        }
        let parts =
            ["quantized", "scale", "zero_point"].map(|suffix| self.names.make(&format!("{name}_{suffix}")));
        let node = self.names.make(&format!("{name}_QuantizeLinear"));
        let outputs: Vec<&str> = parts.iter().map(String::as_str).collect();
        self.nodes
            .push(Node::new(node, "DynamicQuantizeLinear", &[name], &outputs));
        self.activations.insert(name.to_owned(), parts.clone());
        parts
    }

    /// Names of a weight's integers, scales and zero points.
    fn weight(&mut self, name: &str, weight: &Tensor, per_column: bool) -> Result<[String; 3]> {
        let key = (name.to_owned(), per_column);
        if let Some(parts) = self.weights.get(&key) {
            return Ok(parts.clone());
        }
        let parts =
            ["quantized", "scale", "zero_point"].map(|suffix| self.names.make(&format!("{name}_{suffix}")));
        let values = weight.to_f32()?;
        let wrong = values.iter().filter(|value| !value.is_finite()).count();
        if wrong > 0 {
            return Err(Error::NotFinite {
                what: format!("tensor `{name}`"),
                found: wrong,
            });
        }
        let [rows, cols] = [weight.shape()[0], weight.shape()[1]];
        let range = self.range();
        let groups = if per_column { cols } else { 1 };
        let grids: Vec<(f32, f32)> = (0..groups)
            .map(|group| match per_column {
                true => range.grid((0..rows).map(|row| values[row * cols + group])),
                false => range.grid(values.iter().copied()),
            })
            .collect();
        let dtype = if self.pass.signed {
            OnnxType::Int8
        } else {
            OnnxType::Uint8
        };
        let shape = if per_column { vec![cols] } else { vec![] };
        let (scales, zeros): (Vec<f32>, Vec<f32>) = grids.iter().copied().unzip();
        let (source, row_grids) = (weight.clone(), grids);
        let integers = move || {
            let values = source.to_f32()?;
            let code = |(i, value): (usize, &f32)| {
                let (scale, zero) = row_grids[if row_grids.len() == 1 { 0 } else { i % cols }];
                range.byte(value / scale + zero)
            };
            Ok(values.iter().enumerate().map(code).collect())
        };
        self.tensors.push(Tensor::produced(
            &parts[0],
            dtype,
            vec![rows, cols],
            Arc::new(integers),
        )?);
        self.tensors
            .push(Tensor::floats(&parts[1], shape.clone(), &scales)?);
        let zeros: Vec<u8> = zeros.iter().map(|zero| range.byte(*zero)).collect();
        self.tensors.push(Tensor::inline(&parts[2], dtype, shape, zeros)?);
        self.weights.insert(key, parts.clone());
        Ok(parts)
    }

    fn range(&self) -> Range {
        let (min, max) = match (
            self.pass.signed,
            self.pass.given.reduce_range,
            self.pass.symmetric,
        ) {
            (true, false, true) => (-127.0, 127.0),
            (true, false, false) => (-128.0, 127.0),
            (true, true, _) => (-64.0, 64.0),
            (false, false, _) => (0.0, 255.0),
            (false, true, _) => (0.0, 127.0),
        };
        Range {
            min,
            max,
            symmetric: self.pass.symmetric,
            signed: self.pass.signed,
        }
    }
}

/// The integers that there are.
#[derive(Clone, Copy)]
struct Range {
    min: f32,
    max: f32,
    symmetric: bool,
    signed: bool,
}

impl Range {
    /// Scale and zero point for these values.
    fn grid(self, values: impl Iterator<Item = f32>) -> (f32, f32) {
        let (mut low, mut high) = values.fold((0f32, 0f32), |(low, high), v| (low.min(v), high.max(v)));
        if self.symmetric {
            high = high.max(-low);
            low = -high;
        }
        let scale = (high - low) / (self.max - self.min);
        if scale < f32::MIN_POSITIVE {
            return (1.0, ((self.min + self.max) / 2.0).trunc().max(self.min));
        }
        let zero = if self.symmetric {
            (self.min + self.max) / 2.0
        } else {
            self.min - low / scale
        };
        (scale, zero.round_ties_even())
    }

    fn byte(self, value: f32) -> u8 {
        let code = value.round_ties_even().clamp(self.min, self.max);
        if self.signed { code as i8 as u8 } else { code as u8 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{Model, Opset, ValueInfo};
    use crate::passes::find;

    fn model() -> Model {
        let weights: Vec<f32> = (0..12).map(|i| (i as f32 - 4.0) / 3.0).collect();
        let graph = Graph {
            name: "g".into(),
            inputs: vec![ValueInfo::new("i", OnnxType::Int64, [])],
            outputs: vec![
                ValueInfo::new("y", OnnxType::Float, []),
                ValueInfo::new("z", OnnxType::Float, []),
            ],
            nodes: vec![
                Node::new("e", "Gather", &["t", "i"], &["x"]),
                Node::new("a", "MatMul", &["x", "w"], &["y"]),
                Node::new("b", "MatMul", &["x", "w"], &["z"]),
            ],
            initializers: vec![
                Tensor::floats("w", [3, 4], &weights).unwrap(),
                Tensor::floats("t", [4, 3], &weights).unwrap(),
            ],
            value_infos: vec![],
        };
        let opsets = vec![Opset {
            domain: String::new(),
            version: 21,
        }];
        Model {
            ir_version: 10,
            opsets,
            producer_name: String::new(),
            producer_version: String::new(),
            metadata: vec![],
            graph,
        }
    }

    fn run(given: Value) -> Draft {
        let pass = find("OnnxDynamicQuantization").unwrap();
        let configured = pass.configure(given.as_object().unwrap()).unwrap();
        let mut draft = Draft::of(model());
        assert!(pass.apply(configured.as_ref(), &mut draft).unwrap().changed);
        let before = draft.model.clone();
        assert!(!pass.apply(configured.as_ref(), &mut draft).unwrap().changed);
        assert_eq!(before, draft.model);
        draft
    }

    #[test]
    fn activations_and_weights_that_are_shared_are_quantized_once() {
        let graph = run(serde_json::json!({"quant_preprocess": false})).model.graph;
        let count = |op: &str| graph.nodes.iter().filter(|node| node.op_type == op).count();
        assert_eq!(
            (
                count("DynamicQuantizeLinear"),
                count("MatMulInteger"),
                count("DequantizeLinear")
            ),
            (1, 2, 1)
        );
        assert!(graph.initializer("w").is_none());
        assert_eq!(
            graph
                .initializers
                .iter()
                .filter(|t| t.name.ends_with("_quantized"))
                .count(),
            2
        );
    }

    #[test]
    fn weights_come_back_within_half_a_step() {
        for (precision, per_channel, reduce_range, symmetric) in [
            ("int8", false, false, true),
            ("int8", true, true, true),
            ("uint8", true, false, false),
            ("int8", false, false, false),
        ] {
            let given = serde_json::json!({"precision": precision, "per_channel": per_channel, "reduce_range": reduce_range,
                "weight_symmetric": symmetric, "quant_preprocess": false});
            let graph = run(given).model.graph;
            let original = model().graph.initializer("w").unwrap().to_f32().unwrap();
            let get = |name: &str| graph.initializer(name).unwrap();
            let scales = get("w_scale").to_f32().unwrap();
            let (values, zeros) = (
                get("w_quantized").bytes().unwrap(),
                get("w_zero_point").bytes().unwrap(),
            );
            let number = |byte: u8| {
                if precision == "int8" {
                    f32::from(byte as i8)
                } else {
                    f32::from(byte)
                }
            };
            for (i, value) in original.iter().enumerate() {
                let group = if per_channel { i % 4 } else { 0 };
                let back = (number(values[i]) - number(zeros[group])) * scales[group];
                assert!(
                    (back - value).abs() <= scales[group] * 0.51,
                    "{precision} {value} {back}"
                );
            }
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        let pass = find("OnnxDynamicQuantization").unwrap();
        for wrong in [
            serde_json::json!({"activation_symmetric": true}),
            serde_json::json!({"op_types_to_quantize": ["Conv"]}),
            serde_json::json!({"extra_options": {"WeightSymetric": true}}),
        ] {
            assert!(pass.configure(wrong.as_object().unwrap()).is_err());
        }
    }
}
