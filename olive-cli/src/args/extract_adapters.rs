//! `olive extract-adapters`.

use std::path::PathBuf;

use clap::Args;

use super::{AdapterDtype, AdapterFormat, CommonArgs, parse_flag};

/// Flags of `olive extract-adapters`.
#[derive(Debug, Args)]
pub struct ExtractAdaptersArgs {
    /// A checkpoint that holds LoRA weights beside its own
    #[arg(short = 'm', long = "model_name_or_path", alias = "model")]
    pub model_name_or_path: String,
    /// Accepted; text generation is the only task
    #[arg(short = 't', long = "task", hide = true)]
    pub task: Option<String>,
    /// Accepted; no code of a model is ever run
    #[arg(long = "trust_remote_code", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = parse_flag, hide = true)]
    pub trust_remote_code: bool,
    /// Not supported: models are read from their files
    #[arg(long = "model_script", hide = true)]
    pub model_script: Option<String>,
    /// Not supported, as `--model_script`
    #[arg(long = "script_dir", hide = true)]
    pub script_dir: Option<String>,
    /// The output folder: one file an adapter
    #[arg(short = 'o', long = "output_path", default_value = "adapters")]
    pub output_path: PathBuf,
    /// The format of the files
    #[arg(short = 'f', long = "format")]
    pub format: AdapterFormat,
    /// The type of the weights
    #[arg(long = "dtype", default_value = "float32")]
    pub dtype: AdapterDtype,
    /// Accepted: the hub client's own folder is used
    #[arg(long = "cache_dir", hide = true)]
    pub cache_dir: Option<PathBuf>,
    #[command(flatten)]
    pub common: CommonArgs,
}
