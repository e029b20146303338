//! `olive evaluate`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{CommonArgs, Device};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum Metric {
    /// How well the model foresees the text.
    Perplexity,
    /// Seconds to load, and tokens a second.
    Latency,
}

/// Flags of `olive evaluate`.
#[derive(Debug, Args)]
pub struct EvaluateArgs {
    /// A Hugging Face folder or an ONNX model folder
    #[arg(short = 'm', long = "model_name_or_path", alias = "model")]
    pub model: String,
    /// A PEFT folder (for a Hugging Face folder) or an adapter file (for an ONNX folder)
    #[arg(short = 'a', long = "adapter_path")]
    pub adapter_path: Option<PathBuf>,
    /// What is measured, separated by commas
    #[arg(long = "metrics", value_delimiter = ',', default_value = "perplexity")]
    pub metrics: Vec<Metric>,
    /// Text files, separated by commas
    #[arg(long = "data_files", value_delimiter = ',', required = true)]
    pub data_files: Vec<PathBuf>,
    /// Where it is computed: cpu, or gpu in a build with the feature `cuda`
    #[arg(long = "device", default_value = "cpu")]
    pub device: Device,
    /// Tokens of a block; each block is on its own
    #[arg(long = "block_size", default_value_t = 512)]
    pub block_size: usize,
    /// Blocks at most
    #[arg(long = "max_blocks")]
    pub max_blocks: Option<usize>,
    /// Print one JSON object
    #[arg(long = "json")]
    pub json: bool,
    #[command(flatten)]
    pub common: CommonArgs,
}
