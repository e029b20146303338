//! Workflow files: what they may say, and what they say.
//!
//! [`RunConfig::read`] goes through four steps: the file is parsed ([`document`]), its wrappers are dissolved
//! (`canonical`), earlier spellings are mapped ([`super::legacy`]), every key and value is checked against the
//! [`shapes`], and the typed [`RunConfig`] is built. Errors name file and dotted key as they stand in the file.

mod canonical;
mod config;
mod data_shapes;
pub mod document;
mod evaluator_shapes;
mod location;
mod pass_shapes;
pub mod passes;
pub(in crate::workflow) mod read;
pub mod shape;
pub mod shapes;
mod surgeons;

pub use config::{
    Accelerator, Build, DataConfig, EngineConfig, EvaluatorConfig, Goal, GoalKind, MetricSpec, ModelSource,
    ModelType, Packaging, PassEntry, Reference, RunConfig, SamplerKind, SearchConfig, SubType, System,
    SystemKind,
};
pub use data_shapes::STRATEGIES;
pub use location::{AzureResource, Location};
pub use surgeons::NAMES as SURGEONS;
