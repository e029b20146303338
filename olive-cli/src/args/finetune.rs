//! `olive finetune`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::{Map, Value};

use super::{CommonArgs, ConfigArgs, Device, ModelArgs, NoEffectArgs, TextDataArgs};

/// How the base is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum Method {
    Lora,
    Qlora,
    Dora,
}

/// The type that training is asked to compute in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum TorchDtype {
    Bfloat16,
    Float16,
    Float32,
}

/// Flags of `olive finetune`.
#[derive(Debug, Args)]
pub struct FinetuneArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The output folder
    #[arg(short = 'o', long = "output_path", default_value = "finetuned-adapter")]
    pub output_path: PathBuf,
    /// lora: the base as it is, dense or packed; qlora: the base rounded to NF4 first; dora: directions and magnitudes
    #[arg(long = "method", default_value = "lora")]
    pub method: Method,
    /// The rank of the adapter
    #[arg(long = "lora_r", default_value_t = 64)]
    pub lora_r: usize,
    /// The adapter's strength is alpha / r
    #[arg(long = "lora_alpha", default_value_t = 16)]
    pub lora_alpha: usize,
    /// The linears that are adapted, separated by commas
    #[arg(long = "target_modules", value_delimiter = ',')]
    pub target_modules: Vec<String>,
    /// Where it is computed: cpu, or gpu in a build with the feature `cuda`
    #[arg(long = "device", default_value = "cpu")]
    pub device: Device,
    /// Accepted; the CPU computes in float32
    #[arg(long = "torch_dtype")]
    pub torch_dtype: Option<TorchDtype>,
    /// How the data is written: json, csv or text
    #[arg(short = 'd', long = "data_name")]
    pub data_name: String,
    /// Accepted; files have no subsets
    #[arg(long = "train_subset", hide = true)]
    pub train_subset: Option<String>,
    /// The part of the data to train on, such as `train[:80%]`
    #[arg(long = "train_split", default_value = "train")]
    pub train_split: String,
    /// Accepted; files have no subsets
    #[arg(long = "eval_subset", hide = true)]
    pub eval_subset: Option<String>,
    /// The part of the data to evaluate on, such as `train[80%:]`
    #[arg(long = "eval_split", default_value = "", hide_default_value = true)]
    pub eval_split: String,
    #[command(flatten)]
    pub data: TextDataArgs,
    #[command(flatten)]
    pub config: ConfigArgs,
    #[command(flatten)]
    pub no_effect: NoEffectArgs,
    #[command(flatten)]
    pub common: CommonArgs,
    /// Fields of TrainingArguments: every flag that is none of the above.
    #[arg(skip)]
    pub training: Map<String, Value>,
}
