//! Running plans: passes in order or by search, every run and every evaluation cached.

mod footprint;
mod hunt;
mod output;
mod packaging;
mod session;

use std::path::PathBuf;
use std::time::Instant;

use serde_json::Value;

pub use footprint::{Footprint, FootprintNode, MetricValue, Metrics};

use self::session::{Node, Session};
use super::plan::{Pipeline, Plan};
use super::registry::{EvaluatorRegistry, ModelOpener, PassRegistry};
use super::schema::Reference;
use super::search::Objective;
use crate::error::{Error, Result};
use crate::progress::{CancelToken, Progress};

/// What plans are run with.
pub struct Engine<'a> {
    /// The passes that can run.
    pub passes: &'a PassRegistry,
    /// The evaluators that can.
    pub evaluators: &'a EvaluatorRegistry,
    /// Opens the models that passes leave.
    pub opener: &'a dyn ModelOpener,
    /// Where it is said how far the work is.
    pub progress: &'a dyn Progress,
    /// Whether it should stop.
    pub cancel: &'a CancelToken,
    /// What passes compute on (`cpu`, `cuda`): results of another device are not reused.
    pub device: &'a str,
    /// Whether runs stay in the cache. Where they need not, models are told apart by names, sizes and times of their
    /// files in place of every byte, and results are moved out of the cache.
    pub keep_runs: bool,
}

/// What a pipeline came to.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The build; `None` where the workflow has none.
    pub build: Option<String>,
    /// Where the best model is.
    pub output_dir: PathBuf,
    /// Its id.
    pub model_id: String,
    /// What it measures.
    pub metrics: Metrics,
    /// Everything that was run and measured.
    pub footprint: Footprint,
    /// What was made better, by priority.
    pub objectives: Vec<Objective>,
    /// How many runs of passes were computed.
    pub ran: usize,
    /// How many runs were found in the cache.
    pub cached: usize,
    /// Points that failed, with the reason; they are tried again next time.
    pub failed: Vec<(String, String)>,
    /// The ids of the models that no other beats; without a search only the result.
    pub front: Vec<String>,
    /// Files that were packed.
    pub packages: Vec<PathBuf>,
    /// What the user should know.
    pub notes: Vec<String>,
}

impl Engine<'_> {
    /// Runs every pipeline of a plan.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the plan cannot run here, before anything is done; [`Error::Cancelled`]; else what
    /// the failing pass says. A search goes on past failing points and fails only if all of them do.
    pub fn run(&self, plan: &Plan) -> Result<Vec<Outcome>> {
        plan.check_runnable()?;
        for pipeline in &plan.pipelines {
            self.check_evaluators(pipeline)?;
        }
        let mut outcomes = Vec::new();
        for (index, pipeline) in plan.pipelines.iter().enumerate() {
            let mut session = Session::open(self, plan, pipeline, index == 0)?;
            let outcome = match (&pipeline.search, pipeline.points()) {
                (Some(search), points) if points > 1 => session.search(search),
                _ => session.straight(),
            };
            session.save()?;
            outcomes.push(outcome?);
        }
        Ok(outcomes)
    }

    /// Refuses metrics that nothing here measures.
    fn check_evaluators(&self, pipeline: &Pipeline) -> Result<()> {
        let own = pipeline
            .steps
            .iter()
            .flat_map(|s| &s.choices)
            .filter_map(|p| p.evaluator.as_ref());
        for evaluator in own.chain(&pipeline.evaluator) {
            for metric in &evaluator.value.metrics {
                let Some(measurer) = self.evaluators.find(&metric.kind) else {
                    return Err(Error::unsupported(
                        format!("the metric `{}` of type `{}`", metric.name, metric.kind),
                        "no evaluator for it is built into this program",
                    ));
                };
                if let Some(Reference::Inline(data)) = &metric.data
                    && !data.remote.is_empty()
                {
                    return Err(Error::unsupported(
                        format!("the data config `{}`", data.name),
                        "its files are elsewhere; copy them here and name them",
                    ));
                }
                let data = match &metric.data {
                    Some(Reference::Inline(data)) => Some(data.as_ref()),
                    _ => None,
                };
                measurer.check(metric, data)?;
            }
        }
        Ok(())
    }
}

impl Session<'_> {
    /// Runs the passes once, in order.
    fn straight(&mut self) -> Result<Outcome> {
        let mut node = self.input.clone();
        let evaluator = self.pipeline.evaluator.as_ref();
        if let Some(evaluator) = evaluator.filter(|_| self.plan.config.engine.evaluate_input_model) {
            self.measure_input(evaluator)?;
        }
        for step in &self.pipeline.steps {
            let Some(pass) = step.choices.first() else {
                continue;
            };
            let values = vec![0; pass.search.len()];
            node = self.run_pass(&node, pass, &values)?;
            if let Some(evaluator) = &pass.evaluator {
                self.measure(&node, evaluator)?;
            }
        }
        if let Some(evaluator) = evaluator {
            self.measure(&node, evaluator)?;
        }
        self.footprint.mark_front(std::slice::from_ref(&node.id));
        self.conclude(vec![node], false)
    }

    /// Places the best of `nodes` (the first) and writes what goes with it.
    fn conclude(&mut self, nodes: Vec<Node>, searched: bool) -> Result<Outcome> {
        let Some(best) = nodes.first() else {
            return Err(Error::unsupported(
                "an empty result",
                "no point of the search was run",
            ));
        };
        let folder = self.output_dir();
        crate::fsio::create_dir(&folder)?;
        // Runs that share an output folder take turns there.
        let _turn = super::cache::Lock::take(&self.cache.output(&folder).with_extension("turn"))?;
        self.place(best, &folder)?;
        let more = self
            .pipeline
            .search
            .as_ref()
            .and_then(|s| s.output_model_num)
            .unwrap_or(1);
        for (rank, node) in nodes.iter().enumerate().take(more).skip(1) {
            self.place(node, &folder.join("candidates").join(format!("{}", rank + 1)))?;
        }
        let artifacts = !self.plan.config.engine.no_artifacts;
        if artifacts {
            self.footprint.write(&folder, &self.input.id, best, searched)?;
        }
        if artifacts && (searched || self.plan.config.engine.plot_pareto_frontier) {
            let objectives = self.objectives.clone();
            let page = super::report::page(
                &self.plan.config.workflow_id,
                &objectives,
                &self.footprint,
                &self.failed,
            );
            crate::fsio::write(folder.join(super::report::FILE), page.as_bytes())?;
        }
        let mut packages = Vec::new();
        for packaging in &self.pipeline.packaging {
            packages.push(packaging::pack(self, packaging, &nodes, &folder)?);
        }
        let front: Vec<String> = self.footprint.front().map(|node| node.model_id.clone()).collect();
        Ok(Outcome {
            build: self.pipeline.name.clone(),
            output_dir: folder,
            model_id: best.id.clone(),
            metrics: self.footprint.metrics(&best.id).cloned().unwrap_or_default(),
            footprint: self.footprint.clone(),
            objectives: self.objectives.clone(),
            ran: self.ran,
            cached: self.cached,
            failed: self.failed.clone(),
            front,
            packages,
            notes: self.notes.clone(),
        })
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0.0, |t| t.as_secs_f64())
}

/// Whether `seconds` have gone by since `start`.
fn expired(start: Instant, seconds: Option<f64>) -> bool {
    seconds.is_some_and(|limit| start.elapsed().as_secs_f64() >= limit)
}

/// A value of a config as text for reports.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
