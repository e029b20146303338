//! Workflows: a file that says which passes turn one model into another, run with a cache, measured and searched.
//!
//! | step | module |
//! |---|---|
//! | a file becomes a typed [`RunConfig`](schema::RunConfig); earlier spellings are mapped | [`schema`], [`legacy`] |
//! | every reference is resolved, every parameter filled in | [`plan`] |
//! | passes and evaluators are found by name | [`registry`] |
//! | passes run, in order or by search; nothing runs twice | [`engine`], [`search`], [`cache`] |
//! | data configs become samples | [`data`] |
//! | what came of it is shown | [`report`] |
//!
//! ```no_run
//! use olive_core::workflow::engine::Engine;
//! use olive_core::workflow::plan::Plan;
//! use olive_core::workflow::registry::{EvaluatorRegistry, HfOpener, PassRegistry};
//! use olive_core::workflow::schema::RunConfig;
//! use olive_core::{CancelToken, NoProgress};
//!
//! let passes = PassRegistry::new(); // the passes of other crates are registered here
//! let config = RunConfig::read("workflow.json")?;
//! let plan = Plan::new(&config, &passes)?;
//! print!("{plan}");
//! let engine = Engine {
//!     passes: &passes,
//!     evaluators: &EvaluatorRegistry::new(),
//!     opener: &HfOpener,
//!     progress: &NoProgress,
//!     cancel: &CancelToken::default(),
//!     device: "cpu",
//!     keep_runs: true,
//! };
//! for outcome in engine.run(&plan)? {
//!     println!("{}", outcome.output_dir.display());
//! }
//! # Ok::<(), olive_core::Error>(())
//! ```

pub mod cache;
pub mod data;
pub mod engine;
pub mod legacy;
pub mod plan;
pub mod registry;
pub mod report;
pub mod schema;
pub mod search;
