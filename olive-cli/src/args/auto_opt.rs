//! `olive auto-opt`.

use std::path::PathBuf;

use clap::Args;

use super::{AcceleratorArgs, AnyModelArgs, CommonArgs, ConfigArgs, NoEffectArgs, Precision, parse_flag};

/// Flags of `olive auto-opt`.
#[derive(Debug, Args)]
pub struct AutoOptArgs {
    #[command(flatten)]
    pub model: AnyModelArgs,
    /// The output folder; the model is in `model/` inside of it
    #[arg(short = 'o', long = "output_path", default_value = "auto-opt-output")]
    pub output_path: PathBuf,
    #[command(flatten)]
    pub accelerator: AcceleratorArgs,
    /// The precision of weights that are not packed yet: fp32, fp16, bf16, int8, int4, … [default: fp32]
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
    /// DequantizeLinear and MatMul in place of MatMulNBits
    #[arg(long = "use_qdq_encoding", alias = "enable-qdq-encoding")]
    pub use_qdq_encoding: bool,
    /// Symbolic dimensions to fix
    #[arg(long = "dynamic-to-fixed-shape-dim-param", num_args = 0.., value_name = "NAME")]
    pub fixed_dim_param: Vec<String>,
    /// Their sizes
    #[arg(long = "dynamic-to-fixed-shape-dim-value", num_args = 0.., value_name = "SIZE")]
    pub fixed_dim_value: Vec<i64>,
    /// Parts to split the model into
    #[arg(long = "num-splits", conflicts_with = "cost_model")]
    pub num_splits: Option<usize>,
    /// A table of the sizes of modules (`olive generate-cost-model`), to split by `--memory`
    #[arg(long = "cost-model", value_name = "FILE")]
    pub cost_model: Option<PathBuf>,
    /// Overrides of precisions for QNN; can be planned only
    #[arg(long = "mixed-precision-overrides-config", num_args = 0.., hide = true)]
    pub mixed_precision_overrides: Vec<String>,
    /// Search block sizes and rounding by perplexity on `--data_name`: exhaustive, random or tpe
    #[arg(long = "enable_search", num_args = 0..=1, default_missing_value = "exhaustive", value_name = "SAMPLER")]
    pub enable_search: Option<String>,
    /// The seed of a random search
    #[arg(long = "seed")]
    pub seed: Option<u64>,
    /// A data file, for `--enable_search`
    #[arg(short = 'd', long = "data_name")]
    pub data_name: Option<String>,
    /// The part of the data, such as `train[:100]`
    #[arg(long = "split")]
    pub split: Option<String>,
    /// Accepted; no data is used
    #[arg(long = "subset", hide = true)]
    pub subset: Option<String>,
    /// The columns with the text
    #[arg(long = "input_cols", num_args = 0..)]
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
