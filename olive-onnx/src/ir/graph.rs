//! Models, graphs and nodes.

use super::attribute::Attribute;
use super::shape::ValueInfo;
use super::tensor::Tensor;
use crate::error::GraphError;

/// A version of a set of operators that a model uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opset {
    /// `""` for ONNX's own operators.
    pub domain: String,
    /// The version.
    pub version: i64,
}

/// A graph with the versions it was made for.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Version of the IR.
    pub ir_version: i64,
    /// Sets of operators.
    pub opsets: Vec<Opset>,
    /// Who made it.
    pub producer_name: String,
    /// Which version of it.
    pub producer_version: String,
    /// Free key and value texts.
    pub metadata: Vec<(String, String)>,
    /// The graph.
    pub graph: Graph,
}

impl Model {
    /// The version of a domain's operators; `None` if the model does not use the domain. `ai.onnx` is `""`.
    pub fn opset(&self, domain: &str) -> Option<i64> {
        let found = self
            .opsets
            .iter()
            .find(|set| set.domain == domain || (domain.is_empty() && set.domain == "ai.onnx"));
        found.map(|set| set.version)
    }
}

/// A list of nodes in an order in which they can run, with what goes in and what comes out.
///
/// An initializer whose name is also among `inputs` is the default of an optional input.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Graph {
    /// The name.
    pub name: String,
    /// Inputs, in order.
    pub inputs: Vec<ValueInfo>,
    /// Outputs, in order.
    pub outputs: Vec<ValueInfo>,
    /// Nodes, in topological order.
    pub nodes: Vec<Node>,
    /// Constants.
    pub initializers: Vec<Tensor>,
    /// Declared types of values in between.
    pub value_infos: Vec<ValueInfo>,
}

impl Graph {
    /// The constant of this name.
    pub fn initializer(&self, name: &str) -> Option<&Tensor> {
        self.initializers.iter().find(|tensor| tensor.name == name)
    }

    /// The input of this name.
    pub fn input(&self, name: &str) -> Option<&ValueInfo> {
        self.inputs.iter().find(|input| input.name == name)
    }

    /// The node of this name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// Inputs that must be given: those without a default.
    pub fn required_inputs(&self) -> impl Iterator<Item = &ValueInfo> {
        let defaults = self.default_names();
        self.inputs
            .iter()
            .filter(move |input| !defaults.contains(input.name.as_str()))
    }

    /// Inputs that have a default, in their order: where an adapter's weights go.
    pub fn optional_inputs(&self) -> impl Iterator<Item = &ValueInfo> {
        let defaults = self.default_names();
        self.inputs
            .iter()
            .filter(move |input| defaults.contains(input.name.as_str()))
    }

    fn default_names(&self) -> std::collections::HashSet<&str> {
        self.initializers
            .iter()
            .map(|tensor| tensor.name.as_str())
            .collect()
    }
}

/// One operation.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Node {
    /// The name; may be empty in files of others.
    pub name: String,
    /// `""` for ONNX's own operators.
    pub domain: String,
    /// The operator.
    pub op_type: String,
    /// Values it reads; `""` where an optional one is left out.
    pub inputs: Vec<String>,
    /// Values it makes; `""` where an optional one is left out.
    pub outputs: Vec<String>,
    /// Attributes, in the order in which they were given.
    pub attributes: Vec<(String, Attribute)>,
}

impl Node {
    /// A node of ONNX's own operators.
    pub fn new(name: impl Into<String>, op_type: &str, inputs: &[&str], outputs: &[&str]) -> Self {
        Self {
            name: name.into(),
            domain: String::new(),
            op_type: op_type.to_owned(),
            inputs: inputs.iter().map(|name| (*name).to_owned()).collect(),
            outputs: outputs.iter().map(|name| (*name).to_owned()).collect(),
            attributes: Vec::new(),
        }
    }

    /// The same node in another domain.
    #[must_use]
    pub fn in_domain(mut self, domain: &str) -> Self {
        domain.clone_into(&mut self.domain);
        self
    }

    /// The same node with one more attribute.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Attribute>) -> Self {
        self.attributes.push((name.to_owned(), value.into()));
        self
    }

    /// The input at `index`; `None` where it is left out.
    pub fn input(&self, index: usize) -> Option<&str> {
        self.inputs
            .get(index)
            .map(String::as_str)
            .filter(|name| !name.is_empty())
    }

    /// The output at `index`; `None` where it is left out.
    pub fn output(&self, index: usize) -> Option<&str> {
        self.outputs
            .get(index)
            .map(String::as_str)
            .filter(|name| !name.is_empty())
    }

    /// The attribute of this name.
    pub fn attribute(&self, name: &str) -> Option<&Attribute> {
        self.attributes
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value)
    }

    /// A whole-number attribute; `None` if absent.
    ///
    /// # Errors
    /// [`GraphError::Attribute`] if it has another type.
    pub fn int(&self, name: &str) -> Result<Option<i64>, GraphError> {
        self.typed(name, "an int", |value| match value {
            Attribute::Int(number) => Some(*number),
            _ => None,
        })
    }

    /// A number attribute; `None` if absent.
    ///
    /// # Errors
    /// [`GraphError::Attribute`] if it has another type.
    pub fn float(&self, name: &str) -> Result<Option<f32>, GraphError> {
        self.typed(name, "a float", |value| match value {
            Attribute::Float(number) => Some(*number),
            _ => None,
        })
    }

    /// A text attribute; `None` if absent.
    ///
    /// # Errors
    /// [`GraphError::Attribute`] if it has another type.
    pub fn text(&self, name: &str) -> Result<Option<&str>, GraphError> {
        self.typed(name, "a string", |value| match value {
            Attribute::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A list of whole numbers; `None` if absent.
    ///
    /// # Errors
    /// [`GraphError::Attribute`] if it has another type.
    pub fn ints(&self, name: &str) -> Result<Option<&[i64]>, GraphError> {
        self.typed(name, "ints", |value| match value {
            Attribute::Ints(numbers) => Some(numbers.as_slice()),
            _ => None,
        })
    }

    /// A constant attribute; `None` if absent.
    ///
    /// # Errors
    /// [`GraphError::Attribute`] if it has another type.
    pub fn tensor(&self, name: &str) -> Result<Option<&Tensor>, GraphError> {
        self.typed(name, "a tensor", |value| match value {
            Attribute::Tensor(tensor) => Some(tensor),
            _ => None,
        })
    }

    /// A graph attribute; `None` if absent.
    ///
    /// # Errors
    /// [`GraphError::Attribute`] if it has another type.
    pub fn graph(&self, name: &str) -> Result<Option<&Graph>, GraphError> {
        self.typed(name, "a graph", |value| match value {
            Attribute::Graph(graph) => Some(graph.as_ref()),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        name: &str,
        expected: &'static str,
        read: impl Fn(&'a Attribute) -> Option<T>,
    ) -> Result<Option<T>, GraphError> {
        match self.attribute(name) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| GraphError::Attribute {
                node: self.name.clone(),
                op_type: self.op_type.clone(),
                attribute: name.to_owned(),
                expected,
                found: value.kind(),
            }),
        }
    }
}
