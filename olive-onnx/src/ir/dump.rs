//! A readable text of a model, a line a node; equal texts mean equal graphs up to the constants' bytes.

use std::fmt::{self, Write};

use super::attribute::Attribute;
use super::graph::{Graph, Model, Node};
use super::tensor::Tensor;

/// Values of small constants that are shown.
const SHOWN: usize = 8;

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "ir {} by {} {}",
            self.ir_version, self.producer_name, self.producer_version
        )?;
        for set in &self.opsets {
            let domain = if set.domain.is_empty() {
                "ai.onnx"
            } else {
                &set.domain
            };
            write!(f, ", {domain} {}", set.version)?;
        }
        writeln!(f)?;
        write!(f, "{}", self.graph)
    }
}

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        write_graph(&mut text, self, "")?;
        f.write_str(&text)
    }
}

fn write_graph(out: &mut String, graph: &Graph, indent: &str) -> fmt::Result {
    writeln!(out, "{indent}graph {}", graph.name)?;
    for input in &graph.inputs {
        writeln!(out, "{indent}  input {input}")?;
    }
    for tensor in &graph.initializers {
        writeln!(out, "{indent}  const {} = {}", tensor.name, constant(tensor))?;
    }
    for node in &graph.nodes {
        write_node(out, node, indent)?;
    }
    for output in &graph.outputs {
        writeln!(out, "{indent}  output {output}")?;
    }
    Ok(())
}

fn write_node(out: &mut String, node: &Node, indent: &str) -> fmt::Result {
    let list = |names: &[String]| {
        let names: Vec<&str> = names.iter().map(|n| if n.is_empty() { "_" } else { n }).collect();
        names.join(", ")
    };
    let domain = if node.domain.is_empty() {
        String::new()
    } else {
        format!("{}::", node.domain)
    };
    write!(
        out,
        "{indent}  {} = {domain}{}({})",
        list(&node.outputs),
        node.op_type,
        list(&node.inputs)
    )?;
    let plain: Vec<String> = node
        .attributes
        .iter()
        .filter_map(|(name, value)| text(value).map(|value| format!("{name}={value}")))
        .collect();
    if !plain.is_empty() {
        write!(out, " {{{}}}", plain.join(", "))?;
    }
    writeln!(out, " # {}", node.name)?;
    for (name, value) in &node.attributes {
        if let Attribute::Graph(branch) = value {
            writeln!(out, "{indent}    {name}:")?;
            write_graph(out, branch, &format!("{indent}    "))?;
        }
    }
    Ok(())
}

fn text(value: &Attribute) -> Option<String> {
    Some(match value {
        Attribute::Float(number) => format!("{number:?}"),
        Attribute::Int(number) => number.to_string(),
        Attribute::Text(text) => format!("{text:?}"),
        Attribute::Tensor(tensor) => constant(tensor),
        Attribute::Floats(numbers) => format!("{numbers:?}"),
        Attribute::Ints(numbers) => format!("{numbers:?}"),
        Attribute::Texts(texts) => format!("{texts:?}"),
        Attribute::Graph(_) => return None,
    })
}

fn constant(tensor: &Tensor) -> String {
    let mut text = format!("{}{:?}", tensor.dtype(), tensor.shape());
    if tensor.len() <= SHOWN
        && tensor.borrowed().is_some()
        && let Ok(values) = tensor.to_i64()
    {
        let _ = write!(text, " {values:?}");
    }
    text
}
