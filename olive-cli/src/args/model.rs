//! Flags that many commands share.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::parse_flag;

/// Which model.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A model folder, an output folder of olive, or `org/name` of the hub
    // `--model` alone would also be a prefix of `--model_script`.
    #[arg(short = 'm', long = "model_name_or_path", alias = "model")]
    pub model_name_or_path: String,
    /// The model's task; text generation is the only one
    #[arg(short = 't', long = "task")]
    pub task: Option<String>,
    /// Accepted; no code of a model is ever run
    #[arg(long = "trust_remote_code", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = parse_flag, hide_default_value = true)]
    pub trust_remote_code: bool,
    /// Not supported: models are read from their files
    #[arg(long = "model_script", hide = true)]
    pub model_script: Option<String>,
    /// Not supported, as `--model_script`
    #[arg(long = "script_dir", hide = true)]
    pub script_dir: Option<String>,
    /// Not supported: there are no random test models
    #[arg(long = "test", hide = true)]
    pub test: bool,
    /// Not supported, as `--test`
    #[arg(long = "test_metrics", hide = true, num_args = 1..)]
    pub test_metrics: Vec<String>,
    /// Not supported, as `--test`
    #[arg(long = "test_llama_path", hide = true)]
    pub test_llama_path: Option<String>,
}

/// Which model, for commands that take any kind, or that know one already.
#[derive(Debug, Args)]
pub struct AnyModelArgs {
    /// A model folder, an ONNX file, an output folder of olive, or `org/name` of the hub
    #[arg(short = 'm', long = "model_name_or_path", alias = "model")]
    pub model_name_or_path: Option<String>,
    /// The model's task
    #[arg(short = 't', long = "task")]
    pub task: Option<String>,
    /// A PEFT folder that goes with the model
    #[arg(short = 'a', long = "adapter_path")]
    pub adapter_path: Option<PathBuf>,
    /// Accepted; no code of a model is ever run
    #[arg(long = "trust_remote_code", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = parse_flag, hide_default_value = true)]
    pub trust_remote_code: bool,
    /// Not supported: models are read from their files
    #[arg(long = "model_script", hide = true)]
    pub model_script: Option<String>,
    /// Not supported, as `--model_script`
    #[arg(long = "script_dir", hide = true)]
    pub script_dir: Option<String>,
    /// Not supported: there are no random test models
    #[arg(long = "test", hide = true)]
    pub test: bool,
    /// Not supported, as `--test`
    #[arg(long = "test_metrics", hide = true, num_args = 1..)]
    pub test_metrics: Vec<String>,
    /// Not supported, as `--test`
    #[arg(long = "test_llama_path", hide = true)]
    pub test_llama_path: Option<String>,
}

/// Kinds of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum Device {
    Cpu,
    Gpu,
    Npu,
}

impl Device {
    /// Olive's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Gpu => "gpu",
            Self::Npu => "npu",
        }
    }
}

/// The execution providers of ONNX Runtime, by Olive's names.
pub const PROVIDERS: [&str; 12] = [
    "CPUExecutionProvider",
    "CUDAExecutionProvider",
    "DmlExecutionProvider",
    "JsExecutionProvider",
    "MIGraphXExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
    "OpenVINOExecutionProvider",
    "QNNExecutionProvider",
    "ROCMExecutionProvider",
    "TensorrtExecutionProvider",
    "VitisAIExecutionProvider",
    "WebGpuExecutionProvider",
];

/// What a model is made for.
#[derive(Debug, Args)]
pub struct AcceleratorArgs {
    /// The device that the model is made for
    #[arg(long = "device", default_value = "cpu")]
    pub device: Device,
    /// The execution provider of ONNX Runtime that the model is made for
    #[arg(long = "provider", default_value = "CPUExecutionProvider", value_parser = PROVIDERS, hide_possible_values = true)]
    pub provider: String,
    /// The device's memory, which models are split by: bytes, or `4GB`
    #[arg(long = "memory", value_name = "BYTES", value_parser = parse_memory)]
    pub memory: Option<u64>,
}

impl AcceleratorArgs {
    /// The system of a workflow that has this accelerator.
    pub fn system(&self) -> Value {
        json!({
            "type": "LocalSystem",
            "accelerators": [{"device": self.device.name(), "execution_providers": [self.provider]}],
        })
    }
}

/// Bytes as Olive reads them: a number, or one with `B`, `KB`, `MB`, `GB` or `TB`.
pub fn parse_memory(text: &str) -> Result<u64, String> {
    let upper = text.trim().to_ascii_uppercase();
    let units = [("KB", 10), ("MB", 20), ("GB", 30), ("TB", 40), ("B", 0)];
    let (number, power) = units
        .iter()
        .find_map(|(unit, power)| upper.strip_suffix(unit).map(|number| (number, *power)))
        .unwrap_or((&upper, 0));
    let wrong = || "expected bytes, such as 4294967296 or 4GB".to_owned();
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    let bytes = number * f64::from(2).powi(power);
    if bytes.is_finite() && bytes >= 0.0 && bytes < u64::MAX as f64 {
        Ok(bytes as u64)
    } else {
        Err(wrong())
    }
}

/// What every command has.
#[derive(Debug, Args)]
pub struct CommonArgs {
    /// 0 debug, 1 info, 2 warning, 3 error, 4 critical
    #[arg(long = "log_level", default_value_t = 3)]
    pub log_level: u8,
    /// Accepted; there is no telemetry
    #[arg(long = "disable_telemetry", hide = true)]
    pub disable_telemetry: bool,
}

/// Writing the run down.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// Write the run as a workflow file, `config.json` in the output folder
    #[arg(long = "save_config_file")]
    pub save_config_file: bool,
    /// Write the workflow file and do nothing else
    #[arg(long = "dry_run")]
    pub dry_run: bool,
}

/// Flags of Olive, or of older releases of it, that change nothing here.
#[derive(Debug, Args)]
pub struct NoEffectArgs {
    /// Azure blob cache
    #[arg(long = "account_name", hide = true)]
    pub account_name: Option<String>,
    /// Azure blob cache
    #[arg(long = "container_name", hide = true)]
    pub container_name: Option<String>,
    /// Azure ML
    #[arg(long = "resource_group", hide = true)]
    pub resource_group: Option<String>,
    /// Azure ML
    #[arg(long = "workspace_name", hide = true)]
    pub workspace_name: Option<String>,
    /// Azure ML
    #[arg(long = "keyvault_name", hide = true)]
    pub keyvault_name: Option<String>,
    /// Azure ML
    #[arg(long = "aml_compute", hide = true)]
    pub aml_compute: Option<String>,
    /// Olive before 0.9
    #[arg(long = "is_generative_model", hide = true)]
    pub is_generative_model: Option<String>,
    /// Olive before 0.7
    #[arg(long = "tempdir", hide = true)]
    pub tempdir: Option<PathBuf>,
}

/// A number format by Olive's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum Precision {
    Int4,
    Int8,
    Int16,
    Int32,
    Uint4,
    Uint8,
    Uint16,
    Uint32,
    Fp4,
    Fp8,
    Fp16,
    Fp32,
    Nf4,
    Bf16,
}

impl Precision {
    /// Olive's name.
    pub fn name(self) -> String {
        self.to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default()
    }
}
