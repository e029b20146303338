//! `olive generate-model-package`.

use std::path::PathBuf;

use clap::Args;

use super::CommonArgs;

/// Flags of `olive generate-model-package`.
#[derive(Debug, Args)]
pub struct ModelPackageArgs {
    /// A model folder with genai_config.json; once for each variant
    #[arg(short = 's', long = "source", required = true)]
    pub source: Vec<PathBuf>,
    /// The package to write; `.ortpackage` is added where it is missing
    #[arg(short = 'o', long = "output_path")]
    pub output_path: PathBuf,
    /// The model's name in the manifest; the package's if not given
    #[arg(long = "model_name")]
    pub model_name: Option<String>,
    /// The model's version in the manifest
    #[arg(long = "model_version", default_value = "1.0")]
    pub model_version: String,
    #[command(flatten)]
    pub common: CommonArgs,
}
