//! The record of a run: `train_log.jsonl`, a line an entry, and `loss.svg`.
//!
//! A line's fields: `step`, `epoch`, `loss`, `grad_norm`, `learning_rate`, `tokens` (trained so far), or `step`, `epoch`,
//! `eval_loss`; and last `tokens_per_s`, the only one that differs between two runs of the same training.

use std::path::Path;

use olive_core::{Result, fsio};
use serde::{Deserialize, Serialize};

/// The log's file name.
pub const LOG_FILE: &str = "train_log.jsonl";

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Optimizer steps done.
    pub step: usize,
    /// Epochs done, with the fraction of the present one.
    pub epoch: f64,
    /// Mean loss of the steps since the previous line.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub loss: Option<f64>,
    /// Global gradient norm of the last step, before clipping.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub grad_norm: Option<f64>,
    /// The rate that the last step used.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub learning_rate: Option<f64>,
    /// Mean loss of a token of the evaluation data.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval_loss: Option<f64>,
    /// Tokens seen so far, padding not counted.
    pub tokens: u64,
    /// Tokens a second since the previous line; not part of checkpoints.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tokens_per_s: Option<f64>,
}

/// Writes the whole log.
///
/// # Errors
/// [`olive_core::Error::Io`].
pub fn write(folder: &Path, entries: &[LogEntry]) -> Result<()> {
    let path = folder.join(LOG_FILE);
    let mut text = Vec::new();
    for entry in entries {
        serde_json::to_writer(&mut text, entry).map_err(olive_core::Error::json(&path))?;
        text.push(b'\n');
    }
    fsio::write(path, &text)
}
