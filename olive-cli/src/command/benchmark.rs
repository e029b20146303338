//! `olive benchmark`: scores a model on tasks in local files.

use std::path::Path;

use olive_core::workflow::registry::{EvalContext, ModelOpener};
use olive_core::workflow::schema::document::Document;
use olive_core::workflow::schema::{Accelerator, RunConfig};
use olive_core::{Error, Result, fsio, hub};
use serde_json::{Map, Value, json};

use super::{Context, notes};
use crate::args::{Backend, BenchmarkArgs, Device};
use crate::output;
use crate::registry::{self, Opener};
use crate::workflow::input_model;

/// Runs the command.
///
/// # Errors
/// [`Error::Config`] for a task that is no file; those of opening and running the model.
pub fn run(args: &BenchmarkArgs, context: &Context<'_>) -> Result<()> {
    notes::refuse_scripts(&args.model)?;
    notes::refuse(&[(
        "--device",
        args.device != Device::Cpu,
        "models are scored on the CPU",
    )])?;
    notes::warn_no_effect(&[
        (
            "--batch_size",
            args.batch_size != 1,
            "samples are scored one by one",
        ),
        (
            "--backend",
            args.backend != Backend::Auto,
            "olive's own loop runs every ONNX model",
        ),
        (
            "--account_name",
            args.account_name.is_some(),
            "there is no shared cache",
        ),
        (
            "--container_name",
            args.container_name.is_some(),
            "there is no shared cache",
        ),
    ]);
    let document = json!({
        "input_model": input_model(&args.model)?,
        "evaluators": {"evaluator": {
            "type": "LMEvaluator",
            "tasks": args.tasks,
            "batch_size": args.batch_size,
            "max_length": args.max_length,
            "limit": args.limit,
            "device": args.device.name(),
        }},
        "evaluator": "evaluator",
        "no_artifacts": true,
        "output_dir": args.output_path,
        "log_severity_level": args.common.log_level,
    });
    let config = RunConfig::from_document(&Document::from_value("command line", ".", document.clone()))?;
    if notes::save_config(&args.config, &args.output_path, &document)? {
        return Ok(());
    }
    let name = args.model.model_name_or_path.as_deref().unwrap_or_default();
    let folder = match Path::new(name).exists() {
        true => name.into(),
        false => hub::resolve(name, context.progress)?,
    };
    let model = Opener.open(&folder, args.model.adapter_path.as_deref())?;
    let evaluators = registry::evaluators();
    let mut values = Map::new();
    for metric in config
        .evaluators
        .iter()
        .flat_map(|(_, evaluator)| &evaluator.metrics)
    {
        let evaluator = evaluators.find(&metric.kind).ok_or_else(|| {
            let what = format!("the metric `{}`", metric.kind);
            Error::unsupported(what, "no evaluator for it is built into this program")
        })?;
        let surroundings = EvalContext {
            data: None,
            accelerator: &Accelerator::default(),
            progress: context.progress,
            cancel: context.cancel,
        };
        for measured in evaluator.evaluate(&*model, metric, &surroundings)? {
            values.insert(measured.name, Value::from(measured.value));
        }
    }
    fsio::create_dir(&args.output_path)?;
    fsio::write_json(args.output_path.join("metrics.json"), &values, 4)?;
    for (name, value) in &values {
        output::line(&format!("{name}: {value}"))?;
    }
    Ok(())
}
