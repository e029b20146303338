//! Running a workflow document: what `run`, `run-pass` and the commands that expand to passes share.

use olive_core::workflow::engine::{Engine, Outcome};
use olive_core::workflow::plan::Plan;
use olive_core::workflow::registry::PassRegistry;
use olive_core::workflow::schema::RunConfig;
use olive_core::workflow::schema::document::Document;
use olive_core::{Error, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

use crate::args::{AnyModelArgs, ConfigArgs};
use crate::command::{Context, notes};
use crate::output;
use crate::registry::{self, Opener};
use crate::report;

/// The environment variable that names the cache of workflows that name none.
const CACHE_VARIABLE: &str = "OLIVE_CACHE_DIR";

/// The cache of a command, in its output folder.
const WORK: &str = ".olive-work";

/// A workflow that can be planned and run.
pub struct Workflow {
    plan: Plan,
    passes: PassRegistry,
    /// Whether the cache stays.
    keep_runs: bool,
}

impl Workflow {
    /// Reads a document and plans it. Touches neither network nor disk.
    ///
    /// # Errors
    /// Those of [`RunConfig::from_document`] and [`Plan::new`].
    pub fn new(document: &Document) -> Result<Self> {
        Self::with_memory(document, None)
    }

    /// [`Workflow::new`] for a device with that many bytes of memory.
    ///
    /// # Errors
    /// As [`Workflow::new`].
    pub fn with_memory(document: &Document, memory: Option<u64>) -> Result<Self> {
        let mut config = RunConfig::from_document(document)?;
        if config.engine.cache_dir.is_none() {
            config.engine.cache_dir = std::env::var_os(CACHE_VARIABLE)
                .filter(|folder| !folder.is_empty())
                .map(Into::into);
        }
        let passes = registry::passes(memory);
        Ok(Self {
            plan: Plan::new(&config, &passes)?,
            passes,
            keep_runs: true,
        })
    }

    /// Runs the workflow that a command expands to: its document is relative to the working folder. Its cache is a
    /// hidden folder of the output, gone when the work is done; a run that was stopped goes on from there.
    ///
    /// # Errors
    /// As [`Workflow::new`] and [`Workflow::run`].
    pub fn of_command(
        document: &Value,
        output: &Path,
        args: &ConfigArgs,
        memory: Option<u64>,
        context: &Context<'_>,
    ) -> Result<()> {
        let mut top = document.clone();
        top["cache_dir"] = Value::from(absolute(&output.join(WORK))?);
        let planned = Document::from_value("command line", ".", top);
        let mut workflow = Self::with_memory(&planned, memory)?;
        workflow.keep_runs = false;
        workflow.warn();
        if notes::save_config(args, output, document)? {
            return Ok(());
        }
        let before = output.exists();
        let result = workflow.run(context);
        if !matches!(result, Err(Error::Cancelled)) {
            let _ = std::fs::remove_dir_all(output.join(WORK));
            if result.is_err() && !before {
                // Nothing was there and nothing came of it.
                let _ = std::fs::remove_dir(output);
            }
        }
        result.map(drop)
    }

    /// Where the result of the first pipeline goes.
    pub fn output_dir(&self) -> PathBuf {
        let folder = self
            .plan
            .pipelines
            .first()
            .and_then(|pipeline| pipeline.output_dir.clone());
        folder.unwrap_or_else(|| PathBuf::from("."))
    }

    /// The document in today's spelling.
    pub fn document(&self) -> &Value {
        &self.plan.config.document
    }

    /// Says what the user should know, once.
    pub fn warn(&self) {
        for warning in &self.plan.warnings {
            eprintln!("warning: {warning}");
        }
    }

    /// Prints what would be done.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn show(&self) -> Result<()> {
        output::text(&self.plan.to_string())
    }

    /// Runs it and says what came of it.
    ///
    /// # Errors
    /// Those of [`Engine::run`].
    pub fn run(&self, context: &Context<'_>) -> Result<Vec<Outcome>> {
        let evaluators = registry::evaluators();
        let engine = Engine {
            passes: &self.passes,
            evaluators: &evaluators,
            opener: &Opener,
            progress: context.progress,
            cancel: context.cancel,
            device: "cpu",
            keep_runs: self.keep_runs,
        };
        let outcomes = engine.run(&self.plan)?;
        for outcome in &outcomes {
            for note in &outcome.notes {
                eprintln!("note: {note}");
            }
            for (point, reason) in &outcome.failed {
                eprintln!("failed: {point}: {reason}");
            }
            report::outcome(outcome)?;
        }
        Ok(outcomes)
    }
}

/// A path of the command line as a document may hold it, whatever folder the document is relative to.
///
/// # Errors
/// [`Error::Io`] without a working folder.
pub fn absolute(path: &Path) -> Result<String> {
    let absolute = std::path::absolute(path).map_err(Error::io("resolve", path))?;
    Ok(absolute.to_string_lossy().into_owned())
}

/// The input model of a command line.
///
/// # Errors
/// [`Error::Config`] without a model.
pub fn input_model(args: &AnyModelArgs) -> Result<Value> {
    let Some(name) = &args.model_name_or_path else {
        let key = "--model_name_or_path";
        return Err(Error::config("command line", key, "a model", "none"));
    };
    let kind = if registry::is_onnx(Path::new(name)) {
        "ONNXModel"
    } else {
        "HfModel"
    };
    let mut model = json!({"type": kind, "model_path": name});
    if let Some(task) = &args.task {
        model["task"] = json!(task);
    }
    if let Some(adapter) = &args.adapter_path {
        model["adapter_path"] = json!(adapter);
    }
    Ok(model)
}
