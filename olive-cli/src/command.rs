//! One module a command: typed config, one library call, report.

mod benchmark;
mod chat;
mod convert_adapters;
mod cost_model;
mod device;
mod evaluate;
mod export;
mod extract_adapters;
mod finetune;
mod generate;
mod generate_adapter;
mod init;
mod model_package;
pub mod notes;
mod optimize;
mod quantize;
mod run;
mod run_pass;
mod session;
mod shared_cache;
mod tune_session;

use std::path::{Path, PathBuf};

use olive_core::{CancelToken, Error, HfModel, Progress, Result, hub};

use crate::args::{Command, ModelArgs};
use crate::{demo, registry};

pub use run::log_level as run_log_level;

/// Where a command says how far it is, and whether it should stop.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// Progress on stderr.
    pub progress: &'a dyn Progress,
    /// Cancelled by Ctrl-C.
    pub cancel: &'a CancelToken,
}

/// Runs a command.
///
/// # Errors
/// Those of the library that does the work.
pub fn run(command: &Command, context: &Context<'_>) -> Result<()> {
    match command {
        Command::Init(args) => init::run(args, &registry::passes(None)),
        Command::TuneSessionParams(args) => tune_session::run(args, context),
        Command::GenerateCostModel(args) => cost_model::run(args, context),
        Command::GenerateModelPackage(args) => model_package::run(args),
        Command::Benchmark(args) => benchmark::run(args, context),
        Command::SharedCache(args) => shared_cache::run(args),
        Command::Run(args) => run::run(args, context),
        Command::RunPass(args) => run_pass::run(args, context),
        Command::Quantize(args) => quantize::run(args, context),
        Command::Finetune(args) => finetune::run(args, context),
        Command::AutoOpt(args) => export::auto_opt(args, context),
        Command::Optimize(args) => optimize::run(args, context),
        Command::ExtractAdapters(args) => extract_adapters::run(args, context),
        Command::GenerateAdapter(args) => generate_adapter::run(args, context),
        Command::CaptureOnnxGraph(args) => export::capture(args, context),
        Command::ConvertAdapters(args) => convert_adapters::run(args),
        Command::Generate(args) => generate::run(args, context),
        Command::Chat(args) => chat::run(args, context),
        Command::Evaluate(args) => evaluate::run(args, context),
        Command::Demo(args) => demo::run(args, context),
    }
}

/// The folder of `--model_name_or_path`, downloaded if it names a model of the hub.
fn model_folder(args: &ModelArgs, context: &Context<'_>) -> Result<PathBuf> {
    notes::refuse(&[
        (
            "--model_script",
            args.model_script.is_some(),
            "models are read from their files; no code is run",
        ),
        (
            "--script_dir",
            args.script_dir.is_some(),
            "models are read from their files; no code is run",
        ),
        ("--test", args.test, "there are no random test models"),
        (
            "--test_metrics",
            !args.test_metrics.is_empty(),
            "there are no random test models",
        ),
        (
            "--test_llama_path",
            args.test_llama_path.is_some(),
            "there are no random test models",
        ),
    ])?;
    if let Some(task) = args
        .task
        .as_deref()
        .filter(|task| !task.starts_with("text-generation"))
    {
        return Err(Error::config(
            "command line",
            "--task",
            "text-generation",
            format!("`{task}`"),
        ));
    }
    if args.trust_remote_code {
        tracing::debug!("--trust_remote_code has no effect: no code of a model is ever run");
    }
    hub::resolve(&args.model_name_or_path, context.progress)
}

/// Opens `--model_name_or_path` as a Hugging Face folder.
fn open_model(args: &ModelArgs, context: &Context<'_>) -> Result<HfModel> {
    HfModel::open(model_folder(args, context)?)
}

/// The adapter of a command line, which must be a folder.
fn adapter_folder(path: &Path) -> Result<&Path> {
    if path.is_dir() {
        Ok(path)
    } else {
        Err(Error::file(path, "a PEFT folder", "no such folder"))
    }
}
