//! `olive quantize`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{CommonArgs, ConfigArgs, Device, ModelArgs, NoEffectArgs, Precision, TextDataArgs};

/// How weights are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum Algorithm {
    Awq,
    Gptq,
    Hqq,
    Kquant,
    Rtn,
    Spinquant,
    Quarot,
    Lpbq,
    Seqmse,
    Adaround,
    Dynamic,
}

/// How AWQ judges a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum AwqSearch {
    /// By the output of attention or MLP.
    Exact,
    /// By the linears' outputs, then the best few by the output of attention or MLP.
    Hybrid,
    /// By the linears' outputs.
    Fast,
}

/// Flags of `olive quantize`.
#[derive(Debug, Args)]
pub struct QuantizeArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Not supported: adapters stay as they are
    #[arg(short = 'a', long = "adapter_path", hide = true)]
    pub adapter_path: Option<PathBuf>,
    /// The output folder
    #[arg(short = 'o', long = "output_path", default_value = "quantized-model")]
    pub output_path: PathBuf,
    /// How weights are rounded: awq, gptq, kquant, rtn
    #[arg(long = "algorithm", default_value = "rtn")]
    pub algorithm: Algorithm,
    /// How AWQ judges the scales before a nonlinearity
    #[arg(long = "awq_search", default_value = "exact")]
    pub awq_search: AwqSearch,
    /// The width of the weights [default: int4]
    #[arg(long = "precision")]
    pub precision: Option<Precision>,
    /// Where it is computed: cpu, or gpu in a build with the feature `cuda`
    #[arg(long = "device", default_value = "cpu")]
    pub device: Device,
    /// Accepted; weights only are quantized
    #[arg(long = "act_precision", hide = true)]
    pub act_precision: Option<Precision>,
    /// Accepted; each algorithm is implemented once
    #[arg(long = "implementation", hide = true)]
    pub implementation: Option<String>,
    /// Not supported: the output is no ONNX model
    #[arg(long = "use_qdq_encoding", alias = "enable-qdq-encoding", hide = true)]
    pub use_qdq_encoding: bool,
    /// Not supported; the old spelling of `--algorithm quarot`
    #[arg(long = "quarot_rotate", hide = true)]
    pub quarot_rotate: bool,
    /// How the calibration data is written: json, csv or text. Without it, public-domain prose calibrates
    #[arg(short = 'd', long = "data_name")]
    pub data_name: Option<String>,
    /// Accepted; files have no subsets
    #[arg(long = "subset", hide = true)]
    pub subset: Option<String>,
    /// The part of the data, such as `train[:100]`
    #[arg(long = "split")]
    pub split: Option<String>,
    #[command(flatten)]
    pub data: TextDataArgs,
    #[command(flatten)]
    pub config: ConfigArgs,
    #[command(flatten)]
    pub no_effect: NoEffectArgs,
    #[command(flatten)]
    pub common: CommonArgs,
}
