//! Passes that give an ONNX model, one file each.

mod model_builder;

pub use model_builder::ModelBuilder;
