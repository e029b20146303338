//! Flags that are known but change nothing, and flags that are known but refused.

use std::path::Path;

use olive_core::{Error, Result, fsio};
use serde_json::Value;

use crate::args::{AnyModelArgs, ConfigArgs, NoEffectArgs};
use crate::output;

/// Refuses the first flag that was given.
///
/// # Errors
/// [`Error::Config`] naming the flag and the reason.
pub fn refuse(flags: &[(&str, bool, &str)]) -> Result<()> {
    match flags.iter().find(|(_, given, _)| *given) {
        None => Ok(()),
        Some((flag, _, reason)) => {
            let expected = format!("the flag to be left out: {reason}");
            Err(Error::config("command line", *flag, expected, "it"))
        }
    }
}

/// Refuses models that are built by Python code, and random test models.
///
/// # Errors
/// As [`refuse`].
pub fn refuse_scripts(args: &AnyModelArgs) -> Result<()> {
    const SCRIPT: &str = "models are read from their files; no code is run";
    const TEST: &str = "there are no random test models";
    if args.trust_remote_code {
        tracing::debug!("--trust_remote_code has no effect: no code of a model is ever run");
    }
    refuse(&[
        ("--model_script", args.model_script.is_some(), SCRIPT),
        ("--script_dir", args.script_dir.is_some(), SCRIPT),
        ("--test", args.test, TEST),
        ("--test_metrics", !args.test_metrics.is_empty(), TEST),
        ("--test_llama_path", args.test_llama_path.is_some(), TEST),
    ])
}

/// Warns about flags that were given and change nothing.
pub fn warn_no_effect(flags: &[(&str, bool, &str)]) {
    for (flag, _, reason) in flags.iter().filter(|(_, given, _)| *given) {
        tracing::warn!("{flag} has no effect: {reason}");
    }
}

/// Warns about the flags of Azure and of old releases.
pub fn warn_old(args: &NoEffectArgs) {
    const CACHE: &str = "there is no shared cache";
    const LOCAL: &str = "everything runs on this machine";
    warn_no_effect(&[
        ("--account_name", args.account_name.is_some(), CACHE),
        ("--container_name", args.container_name.is_some(), CACHE),
        ("--resource_group", args.resource_group.is_some(), LOCAL),
        ("--workspace_name", args.workspace_name.is_some(), LOCAL),
        ("--keyvault_name", args.keyvault_name.is_some(), LOCAL),
        ("--aml_compute", args.aml_compute.is_some(), LOCAL),
        (
            "--is_generative_model",
            args.is_generative_model.is_some(),
            "every model generates text",
        ),
        (
            "--tempdir",
            args.tempdir.is_some(),
            "unfinished work is kept in the output folder",
        ),
    ]);
}

/// Writes the workflow of a run where that is asked for; `true` if nothing else is to be done.
///
/// # Errors
/// [`Error::Io`].
pub fn save_config(args: &ConfigArgs, output_path: &Path, config: &Value) -> Result<bool> {
    if args.save_config_file || args.dry_run {
        let path = output_path.join("config.json");
        fsio::write_json(&path, &with_absolute_paths(config), 4)?;
        output::line(&format!("Config file saved at {}", path.display()))?;
    }
    Ok(args.dry_run)
}

/// A workflow whose paths mean the same from whatever folder it is read.
fn with_absolute_paths(config: &Value) -> Value {
    let mut config = config.clone();
    let here = |value: &mut Value| {
        let Some(text) = value.as_str() else { return };
        let path = Path::new(text);
        if path.exists()
            && let Ok(absolute) = std::path::absolute(path)
        {
            *value = Value::from(absolute.to_string_lossy());
        }
    };
    for place in ["/input_model/model_path", "/input_model/adapter_path"] {
        config.pointer_mut(place).into_iter().for_each(here);
    }
    let output = config.pointer_mut("/output_dir");
    if let Some(value) = output
        && let Some(Ok(absolute)) = value.as_str().map(std::path::absolute)
    {
        *value = Value::from(absolute.to_string_lossy());
    }
    let data = config.pointer_mut("/data_configs").and_then(Value::as_array_mut);
    for load in data
        .into_iter()
        .flatten()
        .filter_map(|data| data.get_mut("load_dataset_config"))
    {
        load.get_mut("data_name").into_iter().for_each(here);
        match load.get_mut("data_files") {
            Some(Value::Array(files)) => files.iter_mut().for_each(here),
            files => files.into_iter().for_each(here),
        }
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_that_are_here_become_absolute() {
        let config = json!({
            "input_model": {"model_path": "Cargo.toml", "adapter_path": "none"},
            "data_configs": [{"load_dataset_config": {"data_name": "json", "data_files": ["Cargo.toml"]}}],
            "output_dir": "out",
        });
        let written = with_absolute_paths(&config);
        let text = |place: &str| {
            written
                .pointer(place)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        assert!(Path::new(&text("/input_model/model_path")).is_absolute());
        assert_eq!(text("/input_model/adapter_path"), "none");
        assert!(Path::new(&text("/data_configs/0/load_dataset_config/data_files/0")).is_absolute());
        assert!(Path::new(&text("/output_dir")).is_absolute());
    }
}
