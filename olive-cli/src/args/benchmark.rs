//! `olive benchmark`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{AnyModelArgs, CommonArgs, ConfigArgs, Device};

/// What runs an ONNX model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum Backend {
    Auto,
    Ort,
    Ortgenai,
}

/// Flags of `olive benchmark`.
#[derive(Debug, Args)]
pub struct BenchmarkArgs {
    #[command(flatten)]
    pub model: AnyModelArgs,
    /// Files of multiple-choice questions (.jsonl, .json, .csv) or of plain text (.txt), whose perplexity is measured
    #[arg(long = "tasks", num_args = 1.., required = true)]
    pub tasks: Vec<String>,
    /// Where the values are written, as `metrics.json`
    #[arg(short = 'o', long = "output_path", default_value = "onnx-model")]
    pub output_path: PathBuf,
    /// Questions, or blocks of text, of each task: a number from 1 on, or a share below 1
    #[arg(long = "limit", default_value_t = 1.0)]
    pub limit: f64,
    /// Tokens of a sample at most
    #[arg(long = "max_length", default_value_t = 1024)]
    pub max_length: usize,
    /// No effect: samples are scored one by one
    #[arg(long = "batch_size", default_value_t = 1)]
    pub batch_size: usize,
    /// What the model runs on
    #[arg(long = "device", default_value = "cpu")]
    pub device: Device,
    /// No effect: olive's own loop runs every ONNX model
    #[arg(long = "backend", default_value = "auto")]
    pub backend: Backend,
    /// Accepted; no code of a model is ever run
    #[arg(long = "confirm_run_unsafe_code", hide = true)]
    pub confirm_run_unsafe_code: bool,
    /// No effect: Azure blob cache
    #[arg(long = "account_name", hide = true)]
    pub account_name: Option<String>,
    /// No effect: Azure blob cache
    #[arg(long = "container_name", hide = true)]
    pub container_name: Option<String>,
    #[command(flatten)]
    pub config: ConfigArgs,
    #[command(flatten)]
    pub common: CommonArgs,
}
