//! `olive generate-adapter`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{AdapterFormat, CommonArgs, ConfigArgs, NoEffectArgs};

/// Kinds of adapters inside a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum AdapterType {
    Lora,
    Dora,
    Loha,
}

impl AdapterType {
    /// Olive's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::Dora => "dora",
            Self::Loha => "loha",
        }
    }
}

/// Flags of `olive generate-adapter`.
#[derive(Debug, Args)]
pub struct GenerateAdapterArgs {
    /// An ONNX model whose adapter weights are constants
    #[arg(short = 'm', long = "model_name_or_path", alias = "model")]
    pub model_name_or_path: PathBuf,
    /// The output folder; the model and the adapter file are in `model/` inside of it
    #[arg(short = 'o', long = "output_path", default_value = "optimized-model")]
    pub output_path: PathBuf,
    /// The kind of adapter
    #[arg(long = "adapter_type", default_value = "lora")]
    pub adapter_type: AdapterType,
    /// The format of the adapter file
    #[arg(long = "adapter_format", default_value = "onnx_adapter")]
    pub adapter_format: AdapterFormat,
    #[command(flatten)]
    pub config: ConfigArgs,
    #[command(flatten)]
    pub no_effect: NoEffectArgs,
    #[command(flatten)]
    pub common: CommonArgs,
}
