//! `olive capture-onnx-graph`.

use std::path::PathBuf;

use clap::Args;

use super::{AnyModelArgs, CommonArgs, ConfigArgs, Device, NoEffectArgs, Precision, parse_flag};

/// Flags of `olive capture-onnx-graph`.
#[derive(Debug, Args)]
pub struct CaptureArgs {
    #[command(flatten)]
    pub model: AnyModelArgs,
    /// The output folder; the model is in `model/` inside of it
    #[arg(short = 'o', long = "output_path", default_value = "onnx-model")]
    pub output_path: PathBuf,
    /// The precision of weights that are not packed yet: fp32, fp16, bf16, int8, int4 [default: fp32]
    #[arg(long = "precision")]
    pub precision: Option<Precision>,
    /// Inputs that share a scale: 16, 32, 64, 128 or 256 [default: 32]
    #[arg(long = "int4_block_size")]
    pub int4_block_size: Option<usize>,
    /// What the runtime may round activations to: 0 to 4
    #[arg(long = "int4_accuracy_level")]
    pub int4_accuracy_level: Option<i64>,
    /// Accepted: the graph is always built, never traced
    #[arg(long = "use_model_builder", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = parse_flag, hide_default_value = true)]
    pub use_model_builder: bool,
    /// Make the graph as `OnnxConversion` does
    #[arg(long = "use_dynamo_exporter", conflicts_with_all = ["use_model_builder", "use_mobius_builder"])]
    pub use_dynamo_exporter: bool,
    /// Not supported: graphs are built, not traced
    #[arg(long = "use_mobius_builder", hide = true)]
    pub use_mobius_builder: bool,
    /// Accepted: the folder is always made for generation
    #[arg(long = "use_ort_genai", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = parse_flag, hide_default_value = true)]
    pub use_ort_genai: bool,
    /// Accepted; conversion runs on the CPU
    #[arg(long = "conversion_device", default_value = "cpu", hide = true)]
    pub conversion_device: Device,
    /// Sizes of symbolic dimensions, as name=size,name=size
    #[arg(long = "fixed_param_dict", value_name = "NAME=SIZE,…")]
    pub fixed_param_dict: Option<String>,
    /// Prefix of the cache's inputs
    #[arg(long = "past_key_value_name", default_value = "past_key_values", hide = true)]
    pub past_key_value_name: String,
    /// The type of the graph's floats, for `OnnxConversion`
    #[arg(long = "torch_dtype")]
    pub torch_dtype: Option<String>,
    /// The opset to target, for `OnnxConversion`
    #[arg(long = "target_opset")]
    pub target_opset: Option<u32>,
    /// A graph without embedding, which takes inputs_embeds
    #[arg(long = "exclude_embeds", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = parse_flag, hide_default_value = true)]
    pub exclude_embeds: bool,
    /// A graph without head, which gives hidden_states
    #[arg(long = "exclude_lm_head", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = parse_flag, hide_default_value = true)]
    pub exclude_lm_head: bool,
    /// Let the runtime capture CUDA graphs
    #[arg(long = "enable_cuda_graph", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = parse_flag, hide_default_value = true)]
    pub enable_cuda_graph: bool,
    /// Options of the graph builder, as key=value,key=value
    #[arg(long = "extra_mb_options", value_name = "KEY=VALUE,…")]
    pub extra_mb_options: Option<String>,
    /// Accepted if it is `auto`
    #[arg(long = "model_variant", default_value = "auto", hide = true)]
    pub model_variant: String,
    #[command(flatten)]
    pub config: ConfigArgs,
    #[command(flatten)]
    pub no_effect: NoEffectArgs,
    #[command(flatten)]
    pub common: CommonArgs,
}
