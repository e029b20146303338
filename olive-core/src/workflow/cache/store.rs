//! Runs and evaluations on disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{files_below, short};
use crate::error::{Error, Result};
use crate::fsio;

/// The cache of one workflow.
pub struct Cache {
    folder: PathBuf,
}

/// `run.json`: what was run on what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The id of the input.
    pub input_model_id: String,
    /// The id of the result: that of this run.
    pub output_model_id: String,
    /// The pass.
    pub pass_name: String,
    /// The version of its code.
    pub pass_version: u32,
    /// Its parameters.
    pub pass_config: Value,
    /// What the model is meant for.
    pub accelerator_spec: String,
    /// The whole hash of everything that the result depends on.
    pub key: String,
    /// Seconds since 1970.
    pub start_time: f64,
    /// Seconds since 1970.
    pub end_time: f64,
}

/// `model.json`: where the result of a run is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelRecord {
    /// `HfModel` or `ONNXModel`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Relative to the folder of runs; what begins with `input` is relative to the workflow's input model.
    pub model_path: String,
    /// The adapter, likewise.
    pub adapter_path: Option<String>,
    /// What the pass left: size in bytes and time of the last change in nanoseconds since 1970. A file that differs
    /// was changed from outside, and the run is made again.
    pub files: BTreeMap<String, (u64, u64)>,
}

impl Cache {
    /// The cache of a workflow inside a cache folder. Creates nothing.
    pub fn new(cache: &Path, workflow_id: &str) -> Self {
        Self {
            folder: cache.join(workflow_id),
        }
    }

    /// Removes everything, or the evaluations only.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn clean(&self, evaluations_only: bool) -> Result<()> {
        let folder = match evaluations_only {
            true => self.folder.join("evaluations"),
            false => self.folder.clone(),
        };
        if folder.is_dir() {
            std::fs::remove_dir_all(&folder).map_err(Error::io("remove", &folder))?;
        }
        Ok(())
    }

    /// The folder of all runs.
    pub fn runs(&self) -> PathBuf {
        self.folder.join("runs")
    }

    /// The folder of one run.
    pub fn run_folder(&self, key: &str) -> PathBuf {
        self.runs().join(short(key))
    }

    /// A run that is finished; `None` if there is none, or what it left cannot be read.
    pub fn finished(&self, key: &str) -> Option<(RunRecord, ModelRecord)> {
        let folder = self.run_folder(key);
        let run: RunRecord = fsio::read_json(folder.join("run.json")).ok()?;
        let model: ModelRecord = fsio::read_json(folder.join("model.json")).ok()?;
        let whole = snapshot(&folder.join("models")).is_ok_and(|files| files == model.files);
        (run.key == key && whole).then_some((run, model))
    }

    /// Marks a run as finished.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(&self, run: &RunRecord, model: &ModelRecord) -> Result<()> {
        let folder = self.run_folder(&run.key);
        fsio::write_json(folder.join("model.json"), model, 4)?;
        fsio::write_json(folder.join("run.json"), run, 4)
    }

    /// Waits until no other process computes this run.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn lock(&self, key: &str) -> Result<Lock> {
        Lock::take(&self.runs().join(format!("{}.lock", short(key))))
    }

    /// Where an evaluation is kept.
    pub fn evaluation(&self, model: &str, accelerator: &str, key: &str) -> PathBuf {
        let hash = key.get(..8).unwrap_or(key);
        self.folder
            .join("evaluations")
            .join(format!("{}-{accelerator}-{hash}.json", short(model)))
    }

    /// Where it is kept what was placed in an output folder.
    pub fn output(&self, folder: &Path) -> PathBuf {
        let hash = blake3::hash(folder.as_os_str().as_encoded_bytes()).to_hex();
        self.folder.join("outputs").join(format!("{}.json", short(&hash)))
    }
}

/// The files below a folder with size in bytes and time of the last change.
///
/// # Errors
/// [`Error::Io`].
pub fn snapshot(folder: &Path) -> Result<BTreeMap<String, (u64, u64)>> {
    let mut files = BTreeMap::new();
    if !folder.exists() {
        return Ok(files);
    }
    for file in files_below(folder)? {
        let data = std::fs::metadata(&file).map_err(Error::io("look at", &file))?;
        let modified = data
            .modified()
            .ok()
            .and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        let modified = modified.map_or(0, |t| u64::try_from(t.as_nanos()).unwrap_or(u64::MAX));
        let name = file.strip_prefix(folder).unwrap_or(&file);
        files.insert(name.to_string_lossy().into_owned(), (data.len(), modified));
    }
    Ok(files)
}

/// A lock between processes, and between threads of one; it ends with its holder, however that ends.
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Waits for the lock.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn take(path: &Path) -> Result<Self> {
        if let Some(parent) = path.parent() {
            fsio::create_dir(parent)?;
        }
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .map_err(Error::io("open", path))?;
        file.lock().map_err(Error::io("lock", path))?;
        Ok(Self { _file: file })
    }
}
