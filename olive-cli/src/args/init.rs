//! `olive init`.

use std::path::PathBuf;

use clap::Args;

use super::CommonArgs;

/// Flags of `olive init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// The output folder that is proposed; the workflow file is written into it
    #[arg(short = 'o', long = "output_path", default_value = "./olive-output")]
    pub output_path: PathBuf,
    #[command(flatten)]
    pub common: CommonArgs,
}
