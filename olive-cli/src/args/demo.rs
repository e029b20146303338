//! `olive demo`.

use std::path::PathBuf;

use clap::Args;

use super::CommonArgs;

/// Flags of `olive demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// The folder for everything that the demo makes
    #[arg(short = 'o', long = "output_path", default_value = "olive-demo")]
    pub output_path: PathBuf,
    /// Training steps
    #[arg(long = "max_steps", default_value_t = 60)]
    pub max_steps: usize,
    /// The learning rate; small models want a higher one than Olive's default of 2e-4
    #[arg(long = "learning_rate", default_value = "3e-3")]
    pub learning_rate: String,
    /// The question that is asked before and after
    #[arg(long = "question", default_value = "What is the best time to visit Paris?")]
    pub question: String,
    #[command(flatten)]
    pub common: CommonArgs,
}
