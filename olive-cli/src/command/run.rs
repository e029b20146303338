//! `olive run`.

use olive_core::workflow::schema::document::Document;
use olive_core::{Error, Result, fsio};
use serde_json::{Map, Value, json};

use super::{Context, notes};
use crate::args::{AnyModelArgs, RunArgs};
use crate::output;
use crate::registry::is_onnx;
use crate::workflow::{Workflow, absolute};

/// Olive's level of logging where neither command line nor file says one.
const DEFAULT_LOG_LEVEL: u8 = 1;

/// Runs the command.
///
/// # Errors
/// Those of reading, planning and running the workflow.
pub fn run(args: &RunArgs, context: &Context<'_>) -> Result<()> {
    check_flags(args)?;
    let mut document = Document::read(&args.config)?;
    override_document(args, &mut document)?;
    let workflow = Workflow::new(&document)?;
    workflow.warn();
    if args.list_required_packages {
        return output::line("No packages are required.");
    }
    if args.save_config_file {
        let path = workflow.output_dir().join("config.json");
        fsio::write_json(&path, workflow.document(), 4)?;
        output::line(&format!("Config file saved at {}", path.display()))?;
    }
    if args.dry_run {
        return workflow.show();
    }
    workflow.run(context).map(drop)
}

fn check_flags(args: &RunArgs) -> Result<()> {
    notes::refuse_scripts(&args.model)?;
    notes::warn_no_effect(&[
        (
            "--tempdir",
            args.tempdir.is_some(),
            "unfinished work is kept in the cache",
        ),
        (
            "--package-config",
            args.package_config.is_some(),
            "no Python packages are used",
        ),
    ]);
    Ok(())
}

/// `--log_level`, else the file's `log_severity_level`, else 1.
pub fn log_level(args: &RunArgs) -> u8 {
    let written = || {
        let document = Document::read(&args.config).ok()?;
        let places = [
            "/log_severity_level",
            "/engine/log_severity_level",
            "/engine/config/log_severity_level",
        ];
        let level = places
            .iter()
            .find_map(|place| document.value.pointer(place)?.as_u64());
        level.and_then(|level| u8::try_from(level).ok())
    };
    args.log_level.or_else(written).unwrap_or(DEFAULT_LOG_LEVEL)
}

/// Puts what the command line says in place of what the file does.
fn override_document(args: &RunArgs, document: &mut Document) -> Result<()> {
    let origin = document.origin.clone();
    let Some(top) = document.value.as_object_mut() else {
        // The reader says what is wrong.
        return Ok(());
    };
    override_model(&args.model, top)?;
    if let Some(output) = &args.output_path {
        if top.get("builds").is_some_and(|builds| !builds.is_null()) {
            let expected = "no `builds` in the workflow: each has its own output folder";
            return Err(Error::config("command line", "--output_path", expected, origin));
        }
        if let Some(Value::Object(engine)) = top.get_mut("engine") {
            engine.shift_remove("output_dir");
            if let Some(Value::Object(inner)) = engine.get_mut("config") {
                inner.shift_remove("output_dir");
            }
        }
        top.insert("output_dir".to_owned(), Value::from(absolute(output)?));
    }
    Ok(())
}

fn override_model(args: &AnyModelArgs, top: &mut Map<String, Value>) -> Result<()> {
    if args.model_name_or_path.is_none() && args.adapter_path.is_none() && args.task.is_none() {
        return Ok(());
    }
    let model = top
        .entry("input_model")
        .or_insert_with(|| json!({"type": "HfModel"}));
    let Some(model) = model.as_object_mut() else {
        return Ok(());
    };
    if let Some(name) = &args.model_name_or_path {
        let path = std::path::Path::new(name);
        let is_here = path.exists();
        if is_here {
            let kind = if is_onnx(path) { "ONNXModel" } else { "HfModel" };
            let same = model
                .get("type")
                .and_then(Value::as_str)
                .is_some_and(|t| t.eq_ignore_ascii_case(kind));
            // A legacy PyTorchModel with `hf_config` is one of Hugging Face's.
            if !same && (kind == "ONNXModel" || !mentions_hugging_face(model)) {
                model.insert("type".to_owned(), Value::from(kind));
            }
        }
        let value = if is_here { absolute(path)? } else { name.clone() };
        let inner = inner(model);
        match inner.get_mut("hf_config").and_then(Value::as_object_mut) {
            Some(config) => {
                config.insert("model_name".to_owned(), Value::from(value));
                inner.shift_remove("model_path");
            }
            None => _ = inner.insert("model_path".to_owned(), Value::from(value)),
        }
    }
    if let Some(adapter) = &args.adapter_path {
        let value = if adapter.exists() {
            absolute(adapter)?
        } else {
            adapter.display().to_string()
        };
        inner(model).insert("adapter_path".to_owned(), Value::from(value));
    }
    if let Some(task) = &args.task {
        inner(model).insert("task".to_owned(), Value::from(task.as_str()));
    }
    Ok(())
}

fn mentions_hugging_face(model: &mut Map<String, Value>) -> bool {
    inner(model).contains_key("hf_config")
}

/// The object that holds the model's keys: the model itself, or its `config`.
fn inner(model: &mut Map<String, Value>) -> &mut Map<String, Value> {
    if !model.get("config").is_some_and(Value::is_object) {
        return model;
    }
    let config = model.get_mut("config").and_then(Value::as_object_mut);
    config.expect("invariant: it is an object, as was just seen")
}
