//! Placing a result in its output folder: `model_config.json`, `model/`, `adapter/`, with relative paths.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::session::{Node, Session};
use crate::error::{Error, Result};
use crate::fsio;
use crate::model::ModelConfigFile;
use crate::workflow::cache::{Lock, files_below, snapshot};

/// What was placed in an output folder.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Placed {
    key: String,
    /// Relative paths with size and time of the last change.
    files: BTreeMap<String, (u64, u64)>,
}

impl Session<'_> {
    /// Places a model. What an earlier run placed there and this one does not is removed; if the same model is there
    /// untouched, nothing is done.
    pub(super) fn place(&self, node: &Node, folder: &Path) -> Result<()> {
        fsio::create_dir(folder)?;
        let folder = std::fs::canonicalize(folder).map_err(Error::io("resolve", folder))?;
        let record = self.cache.output(&folder);
        let _lock = Lock::take(&record.with_extension("lock"))?;
        let before: Placed = fsio::read_json(&record).unwrap_or_default();
        if before.key == node.key && before.files == present(&folder, &before)? {
            return Ok(());
        }
        let (config, files) = self.layout(node)?;
        if before.key.is_empty() && ModelConfigFile::read(&folder)?.is_some() {
            remove_leftovers(&folder, &files)?;
        }
        for old in before.files.keys() {
            if !files.iter().any(|(_, name)| name == old) {
                let _ = std::fs::remove_file(fsio::contained(&folder, old)?);
            }
        }
        let mut placed = Placed {
            key: node.key.clone(),
            files: BTreeMap::new(),
        };
        for (source, name) in &files {
            let target = fsio::contained(&folder, name)?;
            if !self.engine.keep_runs && source.starts_with(self.cache.runs()) {
                move_file(source, &target)?;
            } else if node.onnx || !is_weight(source) {
                copy(source, &target)?;
            } else {
                fsio::link_or_copy(source, &target)?;
            }
            placed.files.insert(name.clone(), (0, 0));
        }
        config.write(&folder)?;
        placed
            .files
            .insert(crate::model::MODEL_CONFIG_FILE.to_owned(), (0, 0));
        placed.files = present(&folder, &placed)?;
        fsio::write_json(&record, &placed, 0)
    }

    /// What goes where, and the description of it.
    fn layout(&self, node: &Node) -> Result<(ModelConfigFile, Vec<(PathBuf, String)>)> {
        let (folder, file) = match node.path.is_file() {
            true => (
                node.path.parent().unwrap_or(Path::new(".")).to_path_buf(),
                node.path
                    .file_name()
                    .map(|name| name.to_string_lossy().into_owned()),
            ),
            false => (node.path.clone(), None),
        };
        let mut files = Vec::new();
        let mut add = |folder: &Path, below: &str| -> Result<()> {
            for source in files_below(folder)? {
                let name = source
                    .strip_prefix(folder)
                    .unwrap_or(&source)
                    .to_string_lossy()
                    .into_owned();
                if name != crate::model::MODEL_CONFIG_FILE {
                    files.push((source, format!("{below}/{name}")));
                }
            }
            Ok(())
        };
        add(&folder, "model")?;
        if let Some(adapter) = &node.adapter {
            add(adapter, "adapter")?;
        }
        let mut config = self.described(&folder)?;
        config.insert("model_path".to_owned(), json!("model"));
        match &node.adapter {
            Some(_) => _ = config.insert("adapter_path".to_owned(), json!("adapter")),
            None => _ = config.shift_remove("adapter_path"),
        }
        if node.onnx && !config.contains_key("onnx_file_name") {
            config.insert(
                "onnx_file_name".to_owned(),
                json!(file.unwrap_or_else(|| "model.onnx".to_owned())),
            );
        }
        if !node.onnx {
            config
                .entry("task")
                .or_insert_with(|| json!(self.pipeline.model.task));
            config
                .entry("load_kwargs")
                .or_insert_with(|| Value::Object(self.pipeline.model.load_kwargs.clone()));
        }
        let kind = if node.onnx { "ONNXModel" } else { "HfModel" };
        let kind = kind.to_owned();
        Ok((ModelConfigFile { kind, config }, files))
    }

    /// What the pass said about its result, in the folder or above it.
    fn described(&self, folder: &Path) -> Result<Map<String, Value>> {
        for place in [Some(folder), folder.parent()].into_iter().flatten() {
            if place.starts_with(self.cache.runs())
                && let Some(config) = ModelConfigFile::read(place)?
            {
                return Ok(config.config);
            }
        }
        Ok(Map::new())
    }
}

/// Removes weights and graphs that an earlier model left and this one does not have: nothing is known about the run
/// that placed them.
fn remove_leftovers(folder: &Path, files: &[(PathBuf, String)]) -> Result<()> {
    let ours = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        [
            ".onnx",
            ".onnx.data",
            ".onnx_adapter",
            ".safetensors",
            ".safetensors.index.json",
        ]
        .iter()
        .any(|end| name.ends_with(end))
    };
    for part in ["model", "adapter"] {
        let below = folder.join(part);
        if !below.is_dir() {
            continue;
        }
        for old in files_below(&below)? {
            let kept = files.iter().any(|(_, name)| folder.join(name) == old);
            if !kept && ours(&old) {
                std::fs::remove_file(&old).map_err(Error::io("remove", &old))?;
            }
        }
    }
    Ok(())
}

/// Weights are shared with the cache; anything that people edit is a copy of its own.
fn is_weight(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "safetensors")
}

/// The files of a record as they are now.
fn present(folder: &Path, placed: &Placed) -> Result<BTreeMap<String, (u64, u64)>> {
    let now = snapshot(folder)?;
    let mine = now
        .into_iter()
        .filter(|(name, _)| placed.files.contains_key(name));
    Ok(mine.collect())
}

/// Moves a file, or copies it where it cannot be moved.
fn move_file(source: &Path, target: &Path) -> Result<()> {
    if let Some(parent) = target.parent() {
        fsio::create_dir(parent)?;
    }
    match fsio::rename(source, target) {
        Ok(()) => Ok(()),
        Err(_) => copy(source, target),
    }
}

/// Copies a file so that it appears whole. Readers of ONNX refuse external data with a second name, so these are not
/// linked; file systems that can share blocks still do.
fn copy(source: &Path, target: &Path) -> Result<()> {
    if let Some(parent) = target.parent() {
        fsio::create_dir(parent)?;
    }
    let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if same(source, target) {
        return Ok(());
    }
    let temporary = fsio::temporary_name(target);
    let _ = std::fs::remove_file(&temporary);
    std::fs::copy(source, &temporary).map_err(Error::io("copy", source))?;
    fsio::rename(&temporary, target)
}
