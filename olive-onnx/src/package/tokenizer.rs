//! Tokenizer files and chat template of a model folder.

use std::path::Path;

use olive_core::model::companion_files;
use olive_core::{Result, fsio};
use serde_json::Value;

const TEMPLATE_FILE: &str = "chat_template.jinja";

/// Copies configs and tokenizer files, and writes the chat template as a file of its own where it was a field.
pub fn copy(source: &Path, target: &Path) -> Result<()> {
    for path in companion_files(source)? {
        let name = path.file_name().unwrap_or_default();
        fsio::write(target.join(name), &fsio::read(&path)?)?;
    }
    if !source.join("tokenizer.json").is_file() {
        tracing::warn!(
            "`{}` has no tokenizer.json; the model folder will take token ids only",
            source.display()
        );
    }
    if !source.join(TEMPLATE_FILE).is_file()
        && let Some(template) = chat_template(source)?
    {
        fsio::write(target.join(TEMPLATE_FILE), template.as_bytes())?;
    }
    Ok(())
}

/// The chat template of a Hugging Face folder: `chat_template.jinja`, else the field of `tokenizer_config.json` (of
/// several named ones, `default`), else `chat_template.json`.
///
/// # Errors
/// [`olive_core::Error::Io`] or [`olive_core::Error::Json`] for the files.
pub fn chat_template(folder: &Path) -> Result<Option<String>> {
    let file = folder.join(TEMPLATE_FILE);
    if file.is_file() {
        return fsio::read_to_string(file).map(Some);
    }
    for name in ["tokenizer_config.json", "chat_template.json"] {
        let path = folder.join(name);
        if !path.is_file() {
            continue;
        }
        let config: Value = fsio::read_json(&path)?;
        let found = match config.get("chat_template") {
            Some(Value::String(template)) => Some(template.clone()),
            Some(Value::Array(named)) => {
                let default = named.iter().find(|entry| entry["name"] == "default");
                default
                    .and_then(|entry| entry["template"].as_str())
                    .map(str::to_owned)
            }
            _ => None,
        };
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}
