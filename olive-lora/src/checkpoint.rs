//! Checkpoints of a run: `checkpoint-N/` with the adapter, the optimizer's moments and the state of the run.
//!
//! A checkpoint is written under a hidden name and renamed, so that one with its final name is whole. It belongs to
//! one run: the digest of everything that decides the run's result is stored in it and must match to continue.

use std::fs;
use std::path::{Path, PathBuf};

use olive_core::checkpoint::{Checkpoint, TensorSource, write_file};
use olive_core::{Error, ModelSpec, Result, fsio};
use serde::{Deserialize, Serialize};

use crate::adamw::Moments;
use crate::adapter::{Adapter, AdapterModule, f32_tensor};
use crate::train_log::LogEntry;

const STATE_FILE: &str = "trainer_state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// Where the checkpoint of an interrupted run is; removed when the run is over.
pub(crate) const INTERRUPTED_FOLDER: &str = ".interrupted";

/// What a checkpoint says about the run, besides tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct TrainerState {
    pub global_step: usize,
    pub max_steps: usize,
    pub epoch: f64,
    /// Tokens seen so far.
    pub num_input_tokens_seen: u64,
    /// Sum and number of the losses that the next log line will average.
    pub pending_loss: (f64, usize),
    /// Whether what follows the step (evaluation, checkpoint) is still to be done.
    pub step_is_open: bool,
    pub log_history: Vec<LogEntry>,
    /// Digest of model, data, options and arguments.
    pub run_digest: String,
}

/// A place in a run from which it can go on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Snapshot {
    pub adapter: Adapter,
    /// Of each part of each module, in the adapter's order.
    pub moments: Vec<Moments>,
    pub state: TrainerState,
}

/// The folder of step `step`.
pub(crate) fn folder_of(output: &Path, step: usize) -> PathBuf {
    output.join(format!("checkpoint-{step}"))
}

/// Finished checkpoints in a folder, by step.
pub(crate) fn list(output: &Path) -> Vec<(usize, PathBuf)> {
    let Ok(entries) = fs::read_dir(output) else {
        return Vec::new();
    };
    let mut found: Vec<(usize, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let step = name.to_str()?.strip_prefix("checkpoint-")?.parse().ok()?;
            Some((step, entry.path()))
        })
        .filter(|(_, path)| path.join(STATE_FILE).is_file())
        .collect();
    found.sort();
    found
}

impl Snapshot {
    /// Writes `folder` whole; one of that name is replaced.
    pub fn write(&self, folder: &Path, base_model: &str) -> Result<()> {
        let temporary = fsio::temporary_name(folder);
        remove(&temporary)?;
        self.adapter.write(&temporary, base_model)?;
        let mut tensors = Vec::with_capacity(2 * self.moments.len());
        for (part, moments) in self.adapter.part_names().iter().zip(&self.moments) {
            let name = |moment: &str| format!("{part}.{moment}");
            let shape = [moments.first.len()];
            tensors.push(f32_tensor(name("exp_avg"), &shape, &moments.first));
            tensors.push(f32_tensor(name("exp_avg_sq"), &shape, &moments.second));
        }
        write_file(temporary.join(OPTIMIZER_FILE), &tensors)?;
        fsio::write_json(temporary.join(STATE_FILE), &self.state, 2)?;
        remove(folder)?;
        fsio::rename(&temporary, folder)
    }

    /// Reads a checkpoint of the run whose digest is `digest`.
    ///
    /// # Errors
    /// [`Error::File`] if it belongs to another run; else what is wrong with its files.
    pub fn read(folder: &Path, spec: &ModelSpec, digest: &str) -> Result<Self> {
        let state = read_state(folder)?;
        if state.run_digest != digest {
            let expected = "a checkpoint of the same model, data, options and arguments";
            return Err(Error::file(folder, expected, "one of another run"));
        }
        let adapter = Adapter::open(folder, spec)?;
        let optimizer = Checkpoint::open_files(folder, vec![folder.join(OPTIMIZER_FILE)])?;
        let source: &dyn TensorSource = &optimizer;
        let mut moments = Vec::new();
        let parts = adapter.modules.iter().flat_map(AdapterModule::parts);
        for (part, values) in adapter.part_names().iter().zip(parts) {
            let read = |moment: &str| source.read_f32_checked(&format!("{part}.{moment}"), &[values.len()]);
            moments.push(Moments {
                first: read("exp_avg")?,
                second: read("exp_avg_sq")?,
            });
        }
        Ok(Self {
            adapter,
            moments,
            state,
        })
    }
}

pub(crate) fn read_state(folder: &Path) -> Result<TrainerState> {
    fsio::read_json(folder.join(STATE_FILE))
}

/// Removes a folder if it is there.
pub(crate) fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", folder)(error)),
        _ => Ok(()),
    }
}

/// Keeps the newest `limit` checkpoints of an output folder.
pub(crate) fn rotate(output: &Path, limit: Option<usize>) -> Result<()> {
    let Some(limit) = limit else { return Ok(()) };
    let all = list(output);
    for (_, folder) in &all[..all.len().saturating_sub(limit)] {
        remove(folder)?;
    }
    Ok(())
}

/// The newest checkpoint of this very run, in the output folder or left by an interruption.
pub(crate) fn newest(output: &Path, digest: &str) -> Option<PathBuf> {
    let mut all = list(output);
    all.extend(list(&output.join(INTERRUPTED_FOLDER)));
    all.sort();
    let own = |folder: &PathBuf| read_state(folder).is_ok_and(|state| state.run_digest == digest);
    all.into_iter()
        .map(|(_, folder)| folder)
        .rfind(|folder| own(folder))
}
