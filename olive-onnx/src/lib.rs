//! ONNX for olive: an IR without protobuf, its reading and writing, the graph builder, and adapter files.
//!
//! ```text
//! Hugging Face folder ─► build ─► ir::Model ─► serde ─► model.onnx + model.onnx.data
//!                                                └─► package ─► genai_config.json, tokenizer, adapter_weights.onnx_adapter
//! ```
//!
//! ```no_run
//! let folder = olive_onnx::OnnxFolder::open("models/onnx-ao/model")?;
//! for node in &folder.model().graph.nodes {
//!     println!("{} {}", node.op_type, node.name);
//! }
//! # Ok::<(), olive_core::Error>(())
//! ```

pub mod adapter;
pub mod build;
pub mod error;
pub mod ir;
pub mod mmap;
pub mod model;
pub mod package;
pub mod passes;
pub mod serde;

pub use build::{Algorithm, BuilderOptions, Precision, Provider};
pub use error::GraphError;
pub use model::{OnnxFolder, OnnxModel};
pub use package::{BuildPlan, BuildReport, build_model_folder, plan_model_folder};
pub use passes::register_passes;
