//! The interpreter: a graph is compiled once into a list of steps over numbered slots, then run step by step.

pub mod cache;
mod context;
mod ops;
mod plan;
mod registry;
mod rewrite;
pub mod value;

pub use cache::KvCache;
pub use plan::{GraphNames, LogitRows, Plan, PlanInfo, RunInput, Workspace};
pub use value::{Tensor, Value};
