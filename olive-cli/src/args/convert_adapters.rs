//! `olive convert-adapters`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::CommonArgs;

/// The file format of converted adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum AdapterFormat {
    Pt,
    Numpy,
    Safetensors,
    OnnxAdapter,
}

impl AdapterFormat {
    /// Olive's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pt => "pt",
            Self::Numpy => "numpy",
            Self::Safetensors => "safetensors",
            Self::OnnxAdapter => "onnx_adapter",
        }
    }
}

/// The type of converted weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum AdapterDtype {
    Float32,
    Float16,
}

/// Flags of `olive convert-adapters`.
#[derive(Debug, Args)]
pub struct ConvertAdaptersArgs {
    /// The PEFT folder
    #[arg(short = 'a', long = "adapter_path")]
    pub adapter_path: PathBuf,
    /// The ONNX model folder that the adapter is for: its inputs are checked against the adapter by name
    #[arg(short = 'm', long = "model_name_or_path")]
    pub model_name_or_path: Option<PathBuf>,
    /// The file to write; its suffix is added where it is missing
    #[arg(short = 'o', long = "output_path")]
    pub output_path: PathBuf,
    /// The file's format
    #[arg(long = "adapter_format", default_value = "onnx_adapter")]
    pub adapter_format: AdapterFormat,
    /// The type of the weights
    #[arg(long = "dtype", default_value = "float32")]
    pub dtype: AdapterDtype,
    /// Not supported: adapters stay floating point
    #[arg(long = "quantize_int4", hide = true)]
    pub quantize_int4: bool,
    /// Not supported, as `--quantize_int4`
    #[arg(long = "int4_block_size", hide = true)]
    pub int4_block_size: Option<usize>,
    /// Not supported, as `--quantize_int4`
    #[arg(long = "int4_quantization_mode", hide = true)]
    pub int4_quantization_mode: Option<String>,
    #[command(flatten)]
    pub common: CommonArgs,
}
