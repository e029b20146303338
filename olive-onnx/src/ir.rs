//! The graph that stages pass on: nodes, values, attributes and tensors whose bytes are read or made when asked for.
//! Follows the ONNX IR specification (<https://github.com/onnx/onnx/blob/main/docs/IR.md>) and knows nothing of its
//! serialisation.

mod attribute;
mod check;
mod dtype;
mod dump;
mod graph;
mod shape;
mod tensor;

pub use attribute::Attribute;
pub use dtype::OnnxType;
pub use graph::{Graph, Model, Node, Opset};
pub use shape::{Dim, ValueInfo};
pub use tensor::{Pieces, Producer, Sink, Tensor, element_count};

/// The domain of ONNX Runtime's contributed operators.
pub const MICROSOFT: &str = "com.microsoft";
