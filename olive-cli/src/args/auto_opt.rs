//! `olive auto-opt`.

use std::path::PathBuf;

use clap::Args;

use super::{CommonArgs, ConfigArgs, Device, ModelArgs, NoEffectArgs, Precision, parse_flag};

/// Flags of `olive auto-opt`.
#[derive(Debug, Args)]
pub struct AutoOptArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// A PEFT folder; its weights become inputs of the graph and a file beside it
    #[arg(short = 'a', long = "adapter_path")]
    pub adapter_path: Option<PathBuf>,
    /// The output folder; the model is in `model/` inside of it
    #[arg(short = 'o', long = "output_path", default_value = "auto-opt-output")]
    pub output_path: PathBuf,
    /// The device that the model is made for
    #[arg(long = "device", default_value = "cpu")]
    pub device: Device,
    /// The execution provider of ONNX Runtime that the model is made for
    #[arg(long = "provider", default_value = "CPUExecutionProvider")]
    pub provider: String,
    /// Accepted; the model is not split
    #[arg(long = "memory", hide = true)]
    pub memory: Option<String>,
    /// The precision of weights that are not packed yet: fp32, int4 [default: fp32]
    #[arg(long = "precision")]
    pub precision: Option<Precision>,
    /// Accepted: the folder is always made for generation
    #[arg(long = "use_ort_genai", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = parse_flag, hide_default_value = true)]
    pub use_ort_genai: bool,
    /// Accepted: the graph is always built, never traced
    #[arg(long = "use_model_builder", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = parse_flag, hide = true)]
    pub use_model_builder: bool,
    /// Accepted, as `--use_model_builder`
    #[arg(long = "use_dynamo_exporter", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = parse_flag, hide = true)]
    pub use_dynamo_exporter: bool,
    /// Not supported
    #[arg(long = "use_qdq_encoding", alias = "enable-qdq-encoding", hide = true)]
    pub use_qdq_encoding: bool,
    /// Not supported
    #[arg(long = "dynamic-to-fixed-shape-dim-param", num_args = 0.., hide = true)]
    pub fixed_dim_param: Vec<String>,
    /// Not supported
    #[arg(long = "dynamic-to-fixed-shape-dim-value", num_args = 0.., hide = true)]
    pub fixed_dim_value: Vec<i64>,
    /// Not supported
    #[arg(long = "num-splits", hide = true, conflicts_with = "cost_model")]
    pub num_splits: Option<usize>,
    /// Not supported
    #[arg(long = "cost-model", hide = true)]
    pub cost_model: Option<PathBuf>,
    /// Not supported
    #[arg(long = "mixed-precision-overrides-config", num_args = 0.., hide = true)]
    pub mixed_precision_overrides: Vec<String>,
    /// Not supported: `auto-opt` has nothing to choose between
    #[arg(long = "enable_search", num_args = 0..=1, default_missing_value = "exhaustive", hide = true)]
    pub enable_search: Option<String>,
    /// Accepted; nothing is random
    #[arg(long = "seed", hide = true)]
    pub seed: Option<u64>,
    /// Accepted; no data is used
    #[arg(short = 'd', long = "data_name", hide = true)]
    pub data_name: Option<String>,
    /// Accepted; no data is used
    #[arg(long = "split", hide = true)]
    pub split: Option<String>,
    /// Accepted; no data is used
    #[arg(long = "subset", hide = true)]
    pub subset: Option<String>,
    /// Accepted; no data is used
    #[arg(long = "input_cols", num_args = 0.., hide = true)]
    pub input_cols: Vec<String>,
    /// Accepted; no data is used
    #[arg(long = "batch_size", default_value_t = 1, hide = true)]
    pub batch_size: usize,
    #[command(flatten)]
    pub config: ConfigArgs,
    #[command(flatten)]
    pub no_effect: NoEffectArgs,
    #[command(flatten)]
    pub common: CommonArgs,
}
