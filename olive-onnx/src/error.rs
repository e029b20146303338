//! What can be wrong with a graph, whoever made it.

/// A graph that breaks a rule of ONNX. Every variant names the node or value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GraphError {
    /// A node reads a value that nothing before it defines.
    #[error("node `{node}` ({op_type}) reads `{value}`, which no input, initializer or earlier node defines")]
    Undefined {
        /// The node.
        node: String,
        /// Its operator.
        op_type: String,
        /// The value.
        value: String,
    },
    /// A graph output that nothing defines.
    #[error("output `{value}` of graph `{graph}` is not defined")]
    UndefinedOutput {
        /// The graph.
        graph: String,
        /// The value.
        value: String,
    },
    /// A name that is given twice.
    #[error("{kind} `{name}` is defined twice in graph `{graph}`")]
    Duplicate {
        /// "input", "output", "initializer", "value" or "node".
        kind: &'static str,
        /// The graph.
        graph: String,
        /// The name.
        name: String,
    },
    /// A node without an output, or an input without a name.
    #[error("{what} in graph `{graph}`")]
    Malformed {
        /// What is wrong.
        what: String,
        /// The graph.
        graph: String,
    },
    /// A node lacks an attribute, or it has another type.
    #[error("node `{node}` ({op_type}): attribute `{attribute}`: expected {expected}, found {found}")]
    Attribute {
        /// The node.
        node: String,
        /// Its operator.
        op_type: String,
        /// The attribute.
        attribute: String,
        /// The type that was expected.
        expected: &'static str,
        /// The type that was found, or "nothing".
        found: &'static str,
    },
}

impl From<GraphError> for olive_core::Error {
    fn from(error: GraphError) -> Self {
        Self::stage("ONNX graph")(error)
    }
}
