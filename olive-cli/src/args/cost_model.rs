//! `olive generate-cost-model`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{CommonArgs, ModelArgs};

/// A number format, of which only the width counts here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum WeightPrecision {
    Fp32,
    Fp16,
    Fp8,
    Int32,
    Uint32,
    Int16,
    Uint16,
    Int8,
    Uint8,
    Int4,
    Uint4,
    Nf4,
    Fp4,
}

impl WeightPrecision {
    /// Bits of a weight.
    pub fn bits(self) -> u64 {
        match self {
            Self::Fp32 | Self::Int32 | Self::Uint32 => 32,
            Self::Fp16 | Self::Int16 | Self::Uint16 => 16,
            Self::Fp8 | Self::Int8 | Self::Uint8 => 8,
            Self::Int4 | Self::Uint4 | Self::Nf4 | Self::Fp4 => 4,
        }
    }
}

/// Flags of `olive generate-cost-model`.
#[derive(Debug, Args)]
pub struct CostModelArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The CSV file to write; `.csv` is added where it is missing
    #[arg(short = 'o', long = "output_path", default_value = "cost-model.csv")]
    pub output_path: PathBuf,
    /// What the weights will be stored as
    #[arg(short = 'p', long = "weight_precision", default_value = "fp16")]
    pub weight_precision: WeightPrecision,
    #[command(flatten)]
    pub common: CommonArgs,
}
