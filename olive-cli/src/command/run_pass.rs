//! `olive run-pass`.

use olive_core::workflow::schema::passes;
use olive_core::{Error, Result};
use serde_json::{Map, Value, json};

use super::{Context, notes};
use crate::args::RunPassArgs;
use crate::workflow::{Workflow, input_model};
use crate::{output, registry};

/// Runs the command.
///
/// # Errors
/// Those of reading, planning and running the pass.
pub fn run(args: &RunPassArgs, context: &Context<'_>) -> Result<()> {
    if args.list_passes {
        return match &args.pass_name {
            None => list(),
            Some(name) => list_parameters(name),
        };
    }
    notes::refuse_scripts(&args.model)?;
    let Some(name) = &args.pass_name else {
        return Err(Error::config("command line", "--pass-name", "a pass", "none"));
    };
    let mut pass = match &args.pass_config {
        None => Map::new(),
        Some(text) => match serde_json::from_str(text) {
            Ok(Value::Object(config)) => config,
            Ok(other) => {
                let found = other.to_string();
                return Err(Error::config(
                    "command line",
                    "--pass-config",
                    "a JSON object",
                    found,
                ));
            }
            Err(error) => {
                let found = error.to_string();
                return Err(Error::config(
                    "command line",
                    "--pass-config",
                    "a JSON object",
                    found,
                ));
            }
        },
    };
    pass.insert("type".to_owned(), Value::from(name.as_str()));
    let document = json!({
        "input_model": input_model(&args.model)?,
        "systems": {"local_system": args.accelerator.system()},
        "passes": {name.to_ascii_lowercase(): pass},
        "target": "local_system",
        "no_artifacts": true,
        "output_dir": args.output_path,
        "log_severity_level": args.common.log_level,
    });
    Workflow::of_command(
        &document,
        &args.output_path,
        &args.config,
        args.accelerator.memory,
        context,
    )
}

/// One pass a line, those first that run here.
fn list() -> Result<()> {
    let registry = registry::passes(None);
    let mut names = registry.names();
    names.sort_by_key(|(name, runs)| (!runs, name.to_ascii_lowercase()));
    let mut text = String::new();
    for (name, runs) in names {
        let note = if runs { "" } else { " (can be planned only)" };
        text.push_str(&format!("{name}{note}\n"));
    }
    output::text(&text)
}

fn list_parameters(name: &str) -> Result<()> {
    let registry = registry::passes(None);
    if let Some(pass) = registry.find(name) {
        let mut text = format!("{}\n", pass.name());
        for param in pass.params() {
            let default = param
                .default
                .map_or("required".to_owned(), |value| format!("default {value}"));
            text.push_str(&format!("  {} ({default}): {}\n", param.name, param.doc));
        }
        return output::text(&text);
    }
    let Some(pass) = passes::find(name) else {
        let names = registry.names();
        return Err(Error::unknown_key(
            "passes",
            name,
            names.into_iter().map(|(name, _)| name),
        ));
    };
    let mut text = format!("{} (can be planned only)\n", pass.name);
    for param in &pass.params {
        let default = if param.required {
            "required".to_owned()
        } else {
            format!("default {}", param.default)
        };
        text.push_str(&format!("  {} ({default})\n", param.name));
    }
    output::text(&text)
}
