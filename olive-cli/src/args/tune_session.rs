//! `olive tune-session-params`.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Map, Value};

use super::{CommonArgs, ConfigArgs, Device};

/// Flags of `olive tune-session-params`.
#[derive(Debug, Args)]
pub struct TuneSessionArgs {
    /// An ONNX model folder
    #[arg(short = 'm', long = "model_name_or_path", alias = "model")]
    pub model_name_or_path: PathBuf,
    /// Folder of the settings file, `<device>-<provider>.json`
    #[arg(short = 'o', long = "output_path", default_value = "tuned-inference-settings")]
    pub output_path: PathBuf,
    /// Threads that are tried at most; those of the machine if not given
    #[arg(long = "cpu_cores")]
    pub cpu_cores: Option<usize>,
    /// Threads to try; powers of two up to the number of cores if not given
    #[arg(long = "intra_thread_num_list", num_args = 0..)]
    pub intra_thread_num_list: Vec<usize>,
    /// Session options to write as they are, a JSON object
    #[arg(long = "extra_session_config", value_parser = json_object)]
    pub extra_session_config: Option<Map<String, Value>>,
    /// What the model runs on
    #[arg(long = "device", default_value = "cpu")]
    pub device: Device,
    /// Execution providers
    #[arg(long = "providers_list", num_args = 0..)]
    pub providers_list: Vec<String>,
    /// No effect: the loop has no such option
    #[arg(long = "io_bind", hide = true)]
    pub io_bind: bool,
    /// Not supported: CUDA only
    #[arg(long = "enable_cuda_graph", hide = true)]
    pub enable_cuda_graph: bool,
    /// No effect, as `--io_bind`
    #[arg(long = "execution_mode_list", num_args = 0.., hide = true)]
    pub execution_mode_list: Vec<i64>,
    /// No effect, as `--io_bind`
    #[arg(long = "opt_level_list", num_args = 0.., hide = true)]
    pub opt_level_list: Vec<i64>,
    /// Not supported: TensorRT only
    #[arg(long = "trt_fp16_enable", hide = true)]
    pub trt_fp16_enable: bool,
    /// No effect, as `--io_bind`
    #[arg(long = "inter_thread_num_list", num_args = 0.., hide = true)]
    pub inter_thread_num_list: Vec<i64>,
    /// No effect: there is one provider
    #[arg(long = "disable_force_evaluate_other_eps", hide = true)]
    pub disable_force_evaluate_other_eps: bool,
    /// No effect, as `--io_bind`
    #[arg(long = "enable_profiling", hide = true)]
    pub enable_profiling: bool,
    /// No effect: the loop always has a cache
    #[arg(long = "predict_with_kv_cache", hide = true)]
    pub predict_with_kv_cache: bool,
    /// No effect
    #[arg(long = "memory", hide = true)]
    pub memory: Option<String>,
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

fn json_object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("expected a JSON object: {error}"))
}
