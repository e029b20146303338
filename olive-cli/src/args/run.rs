//! `olive run` and `olive run-pass`.

use std::path::PathBuf;

use clap::Args;

use super::{AcceleratorArgs, AnyModelArgs, CommonArgs, ConfigArgs};

/// Flags of `olive run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The workflow, a JSON or YAML file
    #[arg(long = "config", alias = "run-config", required = true, value_name = "FILE")]
    pub config: PathBuf,
    /// The output folder, in place of the file's
    #[arg(short = 'o', long = "output_path")]
    pub output_path: Option<PathBuf>,
    #[command(flatten)]
    pub model: AnyModelArgs,
    /// Print the plan and do nothing else
    #[arg(long = "dry_run")]
    pub dry_run: bool,
    /// Write the workflow in today's spelling, `config.json` in the output folder
    #[arg(long = "save_config_file")]
    pub save_config_file: bool,
    /// Accepted: no packages are required
    #[arg(long = "list_required_packages", visible_aliases = ["setup", "packages"], hide = true)]
    pub list_required_packages: bool,
    /// Accepted; unfinished work is kept in the cache
    #[arg(long = "tempdir", hide = true)]
    pub tempdir: Option<PathBuf>,
    /// Accepted; packages of Python are not used
    #[arg(long = "package-config", hide = true)]
    pub package_config: Option<PathBuf>,
    /// 0 debug, 1 info, 2 warning, 3 error, 4 critical [default: the file's]
    #[arg(long = "log_level")]
    pub log_level: Option<u8>,
    /// Accepted; there is no telemetry
    #[arg(long = "disable_telemetry", hide = true)]
    pub disable_telemetry: bool,
}

/// Flags of `olive run-pass`.
#[derive(Debug, Args)]
pub struct RunPassArgs {
    /// The pass
    #[arg(
        long = "pass-name",
        alias = "pass_name",
        value_name = "NAME",
        required_unless_present = "list_passes"
    )]
    pub pass_name: Option<String>,
    /// Its parameters, as a JSON object
    #[arg(long = "pass-config", alias = "pass_config", value_name = "JSON")]
    pub pass_config: Option<String>,
    /// List the passes, or with `--pass-name` the parameters of one
    #[arg(long = "list-passes", alias = "list_passes")]
    pub list_passes: bool,
    #[command(flatten)]
    pub model: AnyModelArgs,
    /// The output folder
    #[arg(short = 'o', long = "output_path", default_value = "run-pass-output")]
    pub output_path: PathBuf,
    #[command(flatten)]
    pub accelerator: AcceleratorArgs,
    #[command(flatten)]
    pub config: ConfigArgs,
    #[command(flatten)]
    pub common: CommonArgs,
}
