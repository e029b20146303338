//! `olive capture-onnx-graph`.

use std::path::PathBuf;

use clap::Args;

use super::{CommonArgs, ConfigArgs, Device, ModelArgs, NoEffectArgs, Precision, parse_flag};

/// Flags of `olive capture-onnx-graph`.
#[derive(Debug, Args)]
pub struct CaptureArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// A PEFT folder; its weights become inputs of the graph and a file beside it
    #[arg(short = 'a', long = "adapter_path")]
    pub adapter_path: Option<PathBuf>,
    /// The output folder; the model is in `model/` inside of it
    #[arg(short = 'o', long = "output_path", default_value = "onnx-model")]
    pub output_path: PathBuf,
    /// The precision of weights that are not packed yet: fp32, int4 [default: fp32]
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
    /// Not supported: graphs are built, not traced
    #[arg(long = "use_dynamo_exporter", hide = true)]
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
    /// Not supported
    #[arg(long = "fixed_param_dict", hide = true)]
    pub fixed_param_dict: Option<String>,
    /// Accepted if it is `past_key_values`
    #[arg(long = "past_key_value_name", default_value = "past_key_values", hide = true)]
    pub past_key_value_name: String,
    /// Accepted; weights keep their exact values
    #[arg(long = "torch_dtype", hide = true)]
    pub torch_dtype: Option<String>,
    /// Accepted; the opset is the one that the graph needs
    #[arg(long = "target_opset", hide = true)]
    pub target_opset: Option<u32>,
    /// Not supported
    #[arg(long = "exclude_embeds", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = parse_flag, hide = true)]
    pub exclude_embeds: bool,
    /// Not supported
    #[arg(long = "exclude_lm_head", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = parse_flag, hide = true)]
    pub exclude_lm_head: bool,
    /// Not supported
    #[arg(long = "enable_cuda_graph", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = parse_flag, hide = true)]
    pub enable_cuda_graph: bool,
    /// Not supported
    #[arg(long = "extra_mb_options", hide = true)]
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
