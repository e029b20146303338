//! `olive optimize`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{AnyModelArgs, CommonArgs, ConfigArgs, Device, Precision};

/// How the graph is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Exporter {
    #[value(name = "model_builder")]
    Builder,
    #[value(name = "dynamo_exporter")]
    Dynamo,
    #[value(name = "torchscript_exporter")]
    Torchscript,
    #[value(name = "optimum_exporter")]
    Optimum,
}

/// The precision of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum ActPrecision {
    Int8,
    Uint8,
    Int16,
    Uint16,
}

impl ActPrecision {
    /// Olive's name.
    pub fn name(self) -> String {
        let value = self.to_possible_value();
        value.map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

/// Providers that `optimize` makes models for.
pub const PROVIDERS: [&str; 7] = [
    "CPUExecutionProvider",
    "CUDAExecutionProvider",
    "QNNExecutionProvider",
    "VitisAIExecutionProvider",
    "OpenVINOExecutionProvider",
    "WebGpuExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
];

/// Flags of `olive optimize`.
#[derive(Debug, Args)]
pub struct OptimizeArgs {
    #[command(flatten)]
    pub model: AnyModelArgs,
    /// The output folder; the model is in `model/` inside of it
    #[arg(short = 'o', long = "output_path", default_value = "optimized-model")]
    pub output_path: PathBuf,
    /// The execution provider of ONNX Runtime that the model is made for
    #[arg(long = "provider", default_value = "CPUExecutionProvider", value_parser = PROVIDERS, hide_possible_values = true)]
    pub provider: String,
    /// The device that the model is made for [default: the provider's]
    #[arg(long = "device")]
    pub device: Option<Device>,
    /// The precision of weights
    #[arg(long = "precision", default_value = "fp32")]
    pub precision: Precision,
    /// The precision of activations
    #[arg(long = "act_precision")]
    pub act_precision: Option<ActPrecision>,
    /// Parts to split the model into
    #[arg(long = "num_split")]
    pub num_split: Option<usize>,
    /// The device's memory in MB, which the model is split by
    #[arg(long = "memory", value_name = "MB")]
    pub memory: Option<u64>,
    /// How the graph is made [default: model_builder]
    #[arg(long = "exporter")]
    pub exporter: Option<Exporter>,
    /// Symbolic dimensions to fix, separated by commas
    #[arg(long = "dim_param", value_delimiter = ',')]
    pub dim_param: Vec<String>,
    /// Their sizes, separated by commas
    #[arg(long = "dim_value", value_delimiter = ',')]
    pub dim_value: Vec<i64>,
    /// DequantizeLinear and MatMul in place of MatMulNBits
    #[arg(long = "use_qdq_format")]
    pub use_qdq_format: bool,
    /// Changes of the graph, by surgeon
    #[arg(long = "surgeries", num_args = 0.., value_delimiter = ',')]
    pub surgeries: Vec<String>,
    /// Inputs that share a scale; -1 for a whole row
    #[arg(long = "block_size", allow_negative_numbers = true)]
    pub block_size: Option<i64>,
    /// Text is the only one
    #[arg(long = "modality", default_value = "text", value_parser = ["text"])]
    pub modality: String,
    /// Compile for the device ahead of time
    #[arg(long = "enable_aot")]
    pub enable_aot: bool,
    /// Accepted: a folder of Qualcomm's tools, which are not run
    #[arg(long = "qnn_env_path", hide = true)]
    pub qnn_env_path: Option<PathBuf>,
    /// Options of the graph builder, as key=value,key=value
    #[arg(long = "extra_mb_options", value_name = "KEY=VALUE,…")]
    pub extra_mb_options: Option<String>,
    #[command(flatten)]
    pub config: ConfigArgs,
    #[command(flatten)]
    pub common: CommonArgs,
}
