//! What a workflow will do: every reference resolved, every parameter filled in, every reason why it cannot run
//! known before anything runs.

mod blockers;
mod display;
mod resolve;

use serde_json::{Map, Value};

use super::schema::{DataConfig, EvaluatorConfig, ModelSource, Packaging, RunConfig, SearchConfig, System};
use crate::error::{Error, Result};

/// A workflow, resolved.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What was read.
    pub config: RunConfig,
    /// What runs: one pipeline, or one per build.
    pub pipelines: Vec<Pipeline>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Why it cannot run here, one line each; empty if it can.
    pub blockers: Vec<String>,
}

/// Passes in order, from one model to another.
#[derive(Debug, Clone)]
pub struct Pipeline {
    /// The build's name; `None` where the file has no builds.
    pub name: Option<String>,
    /// The model that it starts from.
    pub model: ModelSource,
    /// The passes.
    pub steps: Vec<Step>,
    /// Where passes run.
    pub host: Named<System>,
    /// What the model is meant to run on.
    pub target: Named<System>,
    /// What models are measured by.
    pub evaluator: Option<Named<EvaluatorConfig>>,
    /// How points are searched.
    pub search: Option<SearchConfig>,
    /// Where the result goes.
    pub output_dir: Option<std::path::PathBuf>,
    /// What the result is packed into.
    pub packaging: Vec<Packaging>,
}

/// Something and the name by which the file calls it.
#[derive(Debug, Clone)]
pub struct Named<T> {
    /// The name; empty where it stood inline or was not given.
    pub name: String,
    /// What it names.
    pub value: T,
}

/// A place in a pipeline.
#[derive(Debug, Clone)]
pub struct Step {
    /// The key under `passes`.
    pub name: String,
    /// The pass; several are alternatives that a search chooses from.
    pub choices: Vec<PlannedPass>,
}

/// A pass with its parameters.
#[derive(Debug, Clone)]
pub struct PlannedPass {
    /// Its name.
    pub kind: String,
    /// Every parameter that has one value, defaults included. Data configs stand here as objects.
    pub params: Map<String, Value>,
    /// The parameters that were given, or are searched; the rest are defaults.
    pub given: Vec<String>,
    /// Parameters that are searched, with the values that are tried.
    pub search: Vec<(String, Vec<Value>)>,
    /// The data configs among the parameters.
    pub data: Vec<(String, DataConfig)>,
    /// Where it runs.
    pub host: Named<System>,
    /// What its result is measured by, if not by what the others are.
    pub evaluator: Option<Named<EvaluatorConfig>>,
    /// Whether it is registered, so that it can run.
    pub runs: bool,
}

impl Plan {
    /// Resolves a workflow against the passes that can run. Touches neither network nor disk.
    ///
    /// # Errors
    /// [`Error::Config`] for a reference to something that does not exist, a parameter that must be given and is
    /// not, or a search without objectives.
    pub fn new(config: &RunConfig, registry: &super::registry::PassRegistry) -> Result<Self> {
        resolve::Resolver::new(config, registry).plan()
    }

    /// Refuses a plan that cannot run here.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with every reason.
    pub fn check_runnable(&self) -> Result<()> {
        if self.blockers.is_empty() {
            return Ok(());
        }
        Err(Error::unsupported(
            format!("running `{}` here", self.config.origin),
            self.blockers.join("; "),
        ))
    }
}

impl Pipeline {
    /// How many points its search space has: 1 without a search. Saturates.
    pub fn points(&self) -> u64 {
        self.steps.iter().fold(1, |points, step| {
            let here = step
                .choices
                .iter()
                .map(PlannedPass::points)
                .fold(0, u64::saturating_add);
            points.saturating_mul(here)
        })
    }
}

impl PlannedPass {
    /// How many combinations of searched values it has. Saturates.
    pub fn points(&self) -> u64 {
        let sizes = self.search.iter().map(|(_, values)| values.len() as u64);
        sizes.fold(1, u64::saturating_mul)
    }
}
