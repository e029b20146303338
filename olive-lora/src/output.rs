//! Model folders that differ from another one in some modules: written tensor by tensor, put in place whole.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use olive_core::model::companion_files;
use olive_core::packed::olive::StoredPart;
use olive_core::{
    CheckpointPlan, CheckpointWriter, Error, ModelConfigFile, ModelHandle, PassContext, Result, TensorInfo,
    fsio,
};
use serde_json::{Map, Value, json};

use crate::checkpoint::remove;

/// The model's folder inside an output folder.
pub(crate) const MODEL_FOLDER: &str = "model";

/// One module that is stored anew.
pub(crate) struct Replacement {
    /// The tensors that it was stored in.
    pub old: Vec<String>,
    /// Names, types and shapes of those that take their place.
    pub new: Vec<(String, TensorInfo)>,
}

/// Writes a copy of `model` to `folder` in which `replacements` are stored anew: `produce` gives the tensors of the
/// replacement of an index, one at a time and in order. `edit` changes `config.json`.
///
/// # Errors
/// Those of `produce`, of reading and of writing; [`Error::Cancelled`].
pub(crate) fn write_model(
    model: &dyn ModelHandle,
    replacements: &[Replacement],
    folder: &Path,
    (stage, context): (&str, &PassContext<'_>),
    mut produce: impl FnMut(usize) -> Result<Vec<StoredPart>>,
    edit: impl FnOnce(&mut Map<String, Value>),
) -> Result<()> {
    let staging = fsio::temporary_name(folder);
    remove(&staging)?;
    let written = write_into(
        model,
        replacements,
        &staging,
        (stage, context),
        &mut produce,
        edit,
    );
    if let Err(error) = written {
        remove(&staging)?;
        return Err(error);
    }
    remove(folder)?;
    fsio::rename(&staging, folder)
}

fn write_into(
    model: &dyn ModelHandle,
    replacements: &[Replacement],
    folder: &Path,
    (stage, context): (&str, &PassContext<'_>),
    produce: &mut dyn FnMut(usize) -> Result<Vec<StoredPart>>,
    edit: impl FnOnce(&mut Map<String, Value>),
) -> Result<()> {
    let source = model.tensors();
    let mut replaced = BTreeMap::new();
    for (index, replacement) in replacements.iter().enumerate() {
        replaced.extend(replacement.old.iter().map(|name| (name.as_str(), index)));
    }
    let mut plan = CheckpointPlan::default();
    let mut kept = Vec::new();
    let mut planned = BTreeSet::new();
    for name in source.names() {
        match replaced.get(name) {
            Some(index) if planned.insert(*index) => plan.tensors.extend(replacements[*index].new.clone()),
            Some(_) => (),
            None => {
                plan.tensors
                    .push((name.to_owned(), source.require(name)?.clone()));
                kept.push(name);
            }
        }
    }
    let mut writer = CheckpointWriter::create(folder, &plan)?;
    context.progress.start(stage, replacements.len() as u64);
    for index in 0..replacements.len() {
        context.cancel.check()?;
        for (name, _, _, bytes) in produce(index)? {
            writer.write(&name, &bytes)?;
        }
        context.progress.update(index as u64 + 1, "");
    }
    for name in kept {
        context.cancel.check()?;
        writer.write(name, &source.bytes(name)?)?;
    }
    writer.finish()?;
    context.progress.finish();
    for file in companion_files(model.path())? {
        let target = folder.join(file.file_name().unwrap_or_default());
        if !target.ends_with("config.json") {
            fsio::write(&target, &fsio::read(&file)?)?;
        }
    }
    let mut config: Map<String, Value> = fsio::read_json(model.path().join("config.json"))?;
    edit(&mut config);
    fsio::write_json(folder.join("config.json"), &config, 2)
}

/// Refuses an output folder whose `model` folder no run of olive left there, or is the input itself.
///
/// # Errors
/// [`Error::File`].
pub(crate) fn check_replaceable(model: &dyn ModelHandle, output: &Path) -> Result<()> {
    let target = output.join(MODEL_FOLDER);
    if !target.exists() {
        return Ok(());
    }
    let same = |a: &Path, b: &Path| match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    };
    if same(&target, model.path()) {
        return Err(Error::file(
            target,
            "another folder than the input's",
            "the input",
        ));
    }
    if ModelConfigFile::read(output)?.is_none() {
        let found = "a folder that no earlier run has described in `model_config.json`";
        return Err(Error::file(target, "nothing, or an earlier result", found));
    }
    Ok(())
}

/// Writes `model_config.json`, with the adapter's folder if there is one.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn write_model_config(output: &Path, adapter: Option<&str>) -> Result<()> {
    let mut config = json!({ "model_path": MODEL_FOLDER, "task": "text-generation-with-past" });
    if let Some(adapter) = adapter {
        config["adapter_path"] = json!(adapter);
    }
    let config = match config {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    let file = ModelConfigFile {
        kind: "HfModel".to_owned(),
        config,
    };
    file.write(output)
}
