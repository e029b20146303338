//! The graph while it is built.

use std::collections::HashSet;

use olive_core::{ModelSpec, Result};

use super::lora::LoraTargets;
use super::options::BuilderOptions;
use super::weights::Weights;
use crate::ir::{Dim, Graph, Node, OnnxType, Tensor, ValueInfo};

/// A graph that grows, with what it is built from.
pub struct Builder<'a> {
    pub spec: &'a ModelSpec,
    pub options: &'a BuilderOptions,
    pub weights: Weights,
    pub lora: &'a LoraTargets,
    /// The type of inputs, outputs and the values between.
    pub io: OnnxType,
    pub graph: Graph,
    /// Constants that were made already, by name.
    constants: HashSet<String>,
    /// Quantized tensors, stored after all others.
    quantized: Vec<Tensor>,
    /// Inputs of adapters and their empty defaults, declared after all others.
    adapter_inputs: Vec<ValueInfo>,
    adapter_defaults: Vec<Tensor>,
}

/// `[batch_size, sequence_length, width]`.
pub fn io_shape(width: usize) -> [Dim; 3] {
    ["batch_size".into(), "sequence_length".into(), width.into()]
}

/// A path of nodes (`/model/layers.0/attn`) as initializers are named (`model.layers.0.attn`).
pub fn dotted(path: &str) -> String {
    path.trim_start_matches('/').replace('/', ".")
}

impl<'a> Builder<'a> {
    pub fn new(
        spec: &'a ModelSpec,
        options: &'a BuilderOptions,
        weights: Weights,
        lora: &'a LoraTargets,
    ) -> Self {
        Self {
            spec,
            options,
            weights,
            lora,
            io: options.io_type(),
            graph: Graph {
                name: "main_graph".to_owned(),
                ..Graph::default()
            },
            constants: HashSet::new(),
            quantized: Vec::new(),
            adapter_inputs: Vec::new(),
            adapter_defaults: Vec::new(),
        }
    }

    /// The finished graph: float constants in the order of their use, then quantized ones, then adapters' defaults.
    pub fn finish(mut self) -> Graph {
        self.graph.initializers.append(&mut self.quantized);
        self.graph.initializers.append(&mut self.adapter_defaults);
        self.graph.inputs.append(&mut self.adapter_inputs);
        self.graph
    }

    /// Appends a node.
    pub fn push(&mut self, node: Node) {
        self.graph.nodes.push(node);
    }

    /// Appends a node with one output, `<name>/output_0`, and declares it. Gives the output's name.
    pub fn node(&mut self, node: Node, dtype: OnnxType, shape: impl Into<Vec<Dim>>) -> String {
        let output = node.outputs[0].clone();
        self.graph.value_infos.push(ValueInfo::new(&output, dtype, shape));
        self.graph.nodes.push(node);
        output
    }

    /// As [`Builder::node`], for a value `[batch_size, sequence_length, width]` in the graph's float type.
    pub fn hidden(&mut self, node: Node, width: usize) -> String {
        self.node(node, self.io, io_shape(width))
    }

    /// Declares a value that a node pushed by hand makes.
    pub fn declare(&mut self, name: &str, dtype: OnnxType, shape: impl Into<Vec<Dim>>) {
        self.graph.value_infos.push(ValueInfo::new(name, dtype, shape));
    }

    /// Adds a constant.
    pub fn initializer(&mut self, tensor: Tensor) {
        self.graph.initializers.push(tensor);
    }

    /// Adds a constant that is stored after all floats.
    pub fn quantized_initializer(&mut self, tensor: Tensor) {
        self.quantized.push(tensor);
    }

    /// Adds an optional input with its empty default.
    pub fn adapter_input(&mut self, input: ValueInfo, default: Tensor) {
        self.adapter_inputs.push(input);
        self.adapter_defaults.push(default);
    }

    /// A whole number as a constant node; gives its output.
    pub fn scalar(&mut self, value: i64) -> Result<String> {
        self.int_constant(&value.to_string(), &[], &[value])
    }

    /// A list of whole numbers as a constant node; gives its output.
    pub fn list(&mut self, values: &[i64]) -> Result<String> {
        self.int_constant(&format!("{values:?}"), &[values.len()], values)
    }

    /// A list of one 32-bit number as a constant node; gives its output.
    pub fn narrow_list(&mut self, value: i32) -> Result<String> {
        let output = format!("/model/constants/INT32/[{value}]");
        if self.constants.insert(output.clone()) {
            let tensor = Tensor::inline(&output, OnnxType::Int32, [1], value.to_le_bytes().as_slice())?;
            let name = format!("/model/constant_nodes/INT32/[{value}]");
            let node = Node::new(name, "Constant", &[], &[&output]).with("value", tensor);
            self.node(node, OnnxType::Int32, [Dim::Known(1)]);
        }
        Ok(output)
    }

    fn int_constant(&mut self, label: &str, shape: &[usize], values: &[i64]) -> Result<String> {
        let output = format!("/model/constants/INT64/{label}");
        if self.constants.insert(output.clone()) {
            let tensor = Tensor::ints(&output, shape, values)?;
            let name = format!("/model/constant_nodes/INT64/{label}");
            let node = Node::new(name, "Constant", &[], &[&output]).with("value", tensor);
            let dims: Vec<Dim> = shape.iter().map(|size| Dim::Known(*size)).collect();
            self.node(node, OnnxType::Int64, dims);
        }
        Ok(output)
    }
}
