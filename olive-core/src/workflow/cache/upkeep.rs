//! Looking into a cache folder and clearing it.

use std::collections::HashSet;
use std::fs::{File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::RunRecord;
use super::files_below;
use crate::error::{Error, Result};
use crate::fsio;

/// One cached run of a pass.
#[derive(Debug, Clone, PartialEq)]
pub struct CachedRun {
    /// The workflow.
    pub workflow: String,
    /// The run's id, which is the id of the model that it left.
    pub id: String,
    /// The pass; `None` for a run that was begun and not finished.
    pub pass: Option<String>,
    /// Seconds since 1970 when it was finished.
    pub finished: Option<f64>,
    /// Bytes on disk. A file that several runs share by hard links counts where it is met first.
    pub bytes: u64,
    folder: PathBuf,
}

/// The runs in a cache folder, by workflow and id. A folder that does not exist holds none.
///
/// # Errors
/// [`Error::Io`].
pub fn cached_runs(cache: &Path) -> Result<Vec<CachedRun>> {
    let mut runs = Vec::new();
    let mut seen = HashSet::new();
    for workflow in folders(cache)? {
        for folder in folders(&workflow.join("runs"))? {
            let record: Option<RunRecord> = fsio::read_json(folder.join("run.json")).ok();
            let mut bytes = 0;
            for file in files_below(&folder)? {
                let data = std::fs::metadata(&file).map_err(Error::io("look at", &file))?;
                if seen.insert((data.dev(), data.ino())) {
                    bytes += data.len();
                }
            }
            runs.push(CachedRun {
                workflow: name(&workflow),
                id: name(&folder),
                finished: record.as_ref().map(|record| record.end_time),
                pass: record.map(|record| record.pass_name),
                bytes,
                folder,
            });
        }
    }
    Ok(runs)
}

/// Removes runs from a cache folder; evaluations of models that are gone cost next to nothing and stay. A run that
/// another process is computing is left alone, and its id given back.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_runs(runs: &[CachedRun]) -> Result<Vec<String>> {
    let mut busy = Vec::new();
    for run in runs {
        let path = run.folder.with_extension("lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(Error::io("open", &path))?;
        match lock.try_lock() {
            Ok(()) => {
                // Without `run.json` the run counts as unfinished, should the removal be cut short.
                let record = run.folder.join("run.json");
                if record.exists() {
                    std::fs::remove_file(&record).map_err(Error::io("remove", &record))?;
                }
                std::fs::remove_dir_all(&run.folder).map_err(Error::io("remove", &run.folder))?;
            }
            Err(TryLockError::WouldBlock) => busy.push(run.id.clone()),
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
        }
    }
    Ok(busy)
}

/// The folders in a folder, sorted; none if it does not exist.
fn folders(parent: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    if !parent.is_dir() {
        return Ok(found);
    }
    for entry in std::fs::read_dir(parent).map_err(Error::io("list", parent))? {
        let path = entry.map_err(Error::io("list", parent))?.path();
        if path.is_dir() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workflow::cache::{Cache, ModelRecord};

    fn run(cache: &Path, key: &str) -> PathBuf {
        let record = RunRecord {
            input_model_id: "in".into(),
            output_model_id: key.into(),
            pass_name: "Rtn".into(),
            pass_version: 1,
            pass_config: serde_json::json!({}),
            accelerator_spec: "cpu-cpu".into(),
            key: key.into(),
            start_time: 1.0,
            end_time: 2.0,
        };
        let store = Cache::new(cache, "flow");
        let models = store.run_folder(key).join("models");
        fsio::create_dir(&models).unwrap();
        std::fs::write(models.join("w"), [0; 100]).unwrap();
        let model = ModelRecord {
            kind: "HfModel".into(),
            model_path: "x".into(),
            adapter_path: None,
            files: super::super::snapshot(&models).unwrap(),
        };
        store.finish(&record, &model).unwrap();
        store.run_folder(key)
    }

    #[test]
    fn runs_are_listed_and_removed_unless_they_are_being_computed() {
        let folder = tempfile::tempdir().unwrap();
        assert!(cached_runs(&folder.path().join("absent")).unwrap().is_empty());
        let first = run(folder.path(), "aaaaaaaaaaaaaaaa");
        let second = run(folder.path(), "bbbbbbbbbbbbbbbb");
        std::fs::remove_file(second.join("models/w")).unwrap();
        std::fs::hard_link(first.join("models/w"), second.join("models/w")).unwrap();
        let runs = cached_runs(folder.path()).unwrap();
        assert_eq!(runs.len(), 2);
        assert_eq!(
            (runs[0].workflow.as_str(), runs[0].pass.as_deref()),
            ("flow", Some("Rtn"))
        );
        assert!(runs[0].bytes >= runs[1].bytes + 100, "a shared file counts once");

        let held = Cache::new(folder.path(), "flow")
            .lock("bbbbbbbbbbbbbbbb")
            .unwrap();
        assert_eq!(remove_runs(&runs).unwrap(), [name(&second)]);
        assert!(!first.exists() && second.exists());
        drop(held);
        assert!(
            remove_runs(&cached_runs(folder.path()).unwrap())
                .unwrap()
                .is_empty()
        );
        assert!(!second.exists());
    }
}
