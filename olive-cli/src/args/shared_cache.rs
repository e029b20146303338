//! `olive shared-cache`.

use std::path::PathBuf;

use clap::Args;

use super::CommonArgs;

/// Flags of `olive shared-cache`.
#[derive(Debug, Args)]
pub struct SharedCacheArgs {
    /// The cache folder; that of `olive run` if not given: OLIVE_CACHE_DIR, else `.olive-cache`
    #[arg(long = "cache_dir")]
    pub cache_dir: Option<PathBuf>,
    /// Remove what `--all` or `--model_hash` names; without it, runs are listed with their sizes
    #[arg(long = "delete")]
    pub delete: bool,
    /// Every run
    #[arg(long = "all", conflicts_with = "model_hash")]
    pub all: bool,
    /// The run whose id begins so
    #[arg(long = "model_hash")]
    pub model_hash: Option<String>,
    /// Do not ask before removing
    #[arg(short = 'y', long = "yes")]
    pub yes: bool,
    /// Print one JSON object
    #[arg(long = "json")]
    pub json: bool,
    /// Azure storage account of a remote cache
    #[arg(long = "account", requires = "container")]
    pub account: Option<String>,
    /// Azure blob container of a remote cache
    #[arg(long = "container", requires = "account")]
    pub container: Option<String>,
    #[command(flatten)]
    pub common: CommonArgs,
}
