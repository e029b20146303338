//! Fine-tuning from a model and samples to Olive's output folder.
//!
//! ```text
//! <output>/model/              the base: links to its files
//! <output>/adapter/            PEFT's files
//! <output>/model_config.json   both, by relative path; written last
//! <output>/train_log.jsonl     a line a step
//! <output>/loss.svg            the loss curve
//! <output>/checkpoint-N/       where they were asked for
//! ```

use std::fs;
use std::path::Path;
use std::time::Instant;

use burn::tensor::backend::Backend;
use olive_core::{Error, ModelHandle, ModelKind, PassContext, Result, Sample, fsio};
use serde::Serialize;

use crate::adapter::{Adapter, WEIGHTS_FILE};
use crate::arguments::{Resume, TrainingArguments};
use crate::checkpoint::{self, INTERRUPTED_FOLDER, Snapshot};
use crate::options::LoraOptions;
use crate::output::{MODEL_FOLDER, write_model_config};
use crate::peft_config::CONFIG_FILE;
use crate::trainer::{RunIdentity, Start, Trainer, TrainingData};
use crate::{loss_svg, train_log};

/// What a finished run says about itself.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainReport {
    /// Optimizer steps of the whole run.
    pub steps: usize,
    /// Epochs, with the fraction of the last one.
    pub epochs: f64,
    /// Loss of the first line of the log.
    pub first_loss: Option<f64>,
    /// Loss of the last line of the log.
    pub final_loss: Option<f64>,
    /// Last evaluation loss.
    pub eval_loss: Option<f64>,
    /// Trainable numbers.
    pub parameters: usize,
    /// Tokens seen in all steps.
    pub tokens: u64,
    /// Seconds that this process took, loading and writing included.
    pub seconds: f64,
    /// Tokens a second of the steps that this process computed.
    pub tokens_per_s: f64,
    /// Largest resident memory of the process so far, in bytes, where the system tells it.
    pub peak_memory_bytes: Option<u64>,
    /// The step from which an earlier run was continued.
    pub resumed_from: Option<usize>,
}

impl TrainReport {
    /// Logs the run in a line.
    pub(crate) fn say(&self) {
        tracing::info!(
            "{} steps, loss {:?} to {:?}",
            self.steps,
            self.first_loss,
            self.final_loss
        );
    }
}

/// Trains a LoRA adapter on backend `B` and writes Olive's output folder to [`PassContext::output`].
///
/// An interrupted run leaves a checkpoint, and the same call continues from it; the files of the result are the same
/// bytes as those of an uninterrupted run, except for the `tokens_per_s` of the log.
///
/// # Errors
/// [`Error::Config`] or [`Error::Unsupported`] for options that do not fit the model; [`Error::Tensor`] for samples
/// without a trained token; [`Error::NotFinite`] naming the step whose loss is not finite; [`Error::File`] for a
/// checkpoint that is asked for and missing or of another run; [`Error::Cancelled`]; errors of reading and writing.
pub fn finetune<B: Backend>(
    model: &dyn ModelHandle,
    data: TrainingData<'_>,
    lora: &LoraOptions,
    arguments: &TrainingArguments,
    context: &PassContext<'_>,
) -> Result<TrainReport> {
    check_model(model)?;
    finetune_over::<B>(model, model.path(), data, lora, arguments, context)
}

/// As [`finetune`], on the GPU: the frozen weights in bfloat16 or packed as they are stored, the adapter and the
/// optimizer's state in single precision. Checkpoints are those of [`finetune`], and each continues the other's.
///
/// # Errors
/// As [`finetune`]; [`Error::Unsupported`] where there is no GPU, driver or CUDA toolkit, or for a model or an adapter
/// that the GPU path does not run.
#[cfg(feature = "cuda")]
pub fn finetune_on_gpu(
    model: &dyn ModelHandle,
    data: TrainingData<'_>,
    lora: &LoraOptions,
    arguments: &TrainingArguments,
    context: &PassContext<'_>,
) -> Result<TrainReport> {
    check_model(model)?;
    // Nothing is done before it is known that it can be.
    olive_core::cuda::Gpu::open()?;
    olive_core::cuda::check_model(model.spec())?;
    if lora.use_dora {
        return Err(Error::unsupported("DoRA with --device gpu", "use --device cpu"));
    }
    run::<olive_core::decoder::Cpu>(model, model.path(), data, lora, arguments, context, true)
}

/// As [`finetune`], with `shown` as the folder of the model that the result names.
pub(crate) fn finetune_over<B: Backend>(
    model: &dyn ModelHandle,
    shown: &Path,
    data: TrainingData<'_>,
    lora: &LoraOptions,
    arguments: &TrainingArguments,
    context: &PassContext<'_>,
) -> Result<TrainReport> {
    run::<B>(model, shown, data, lora, arguments, context, false)
}

fn run<B: Backend>(
    model: &dyn ModelHandle,
    shown: &Path,
    data: TrainingData<'_>,
    lora: &LoraOptions,
    arguments: &TrainingArguments,
    context: &PassContext<'_>,
    gpu: bool,
) -> Result<TrainReport> {
    let started = Instant::now();
    let adapter = match &lora.initial_adapter {
        Some(folder) => initial(folder, model, lora)?,
        None => Adapter::new(model, lora, arguments.seed)?,
    };
    fsio::create_dir(context.output)?;
    let folder_name = model.path().file_name().unwrap_or_default().to_string_lossy();
    let base_model = lora.base_model_name.clone().unwrap_or(folder_name.into_owned());
    let identity = RunIdentity {
        digest: digest(model, &data, &adapter, arguments)?,
        base_model: base_model.clone(),
    };
    let start = start(model, adapter, arguments, &identity, context)?;
    let (resumed_from, seen) = match &start {
        Start::Fresh(_) => (None, 0),
        Start::From(snapshot) => (
            Some(snapshot.state.global_step),
            snapshot.state.num_input_tokens_seen,
        ),
    };
    if let Some(step) = resumed_from {
        tracing::info!("continuing from optimizer step {step}");
    }
    let trainer = Trainer::<B>::new(model, data, arguments, start, identity, context, gpu)?;
    let training = Instant::now();
    let snapshot = trainer.run()?;
    let training_seconds = training.elapsed().as_secs_f64();
    write_output(shown, &snapshot, &base_model, context.output)?;
    let state = &snapshot.state;
    let last = |pick: fn(&train_log::LogEntry) -> Option<f64>| state.log_history.iter().rev().find_map(pick);
    Ok(TrainReport {
        steps: state.global_step,
        epochs: state.epoch,
        first_loss: state.log_history.iter().find_map(|entry| entry.loss),
        final_loss: last(|entry| entry.loss),
        eval_loss: last(|entry| entry.eval_loss),
        parameters: snapshot.adapter.parameters(),
        tokens: state.num_input_tokens_seen,
        seconds: started.elapsed().as_secs_f64(),
        tokens_per_s: (state.num_input_tokens_seen - seen) as f64 / training_seconds.max(1e-9),
        peak_memory_bytes: peak_memory_bytes(),
        resumed_from,
    })
}

pub(crate) fn check_model(model: &dyn ModelHandle) -> Result<()> {
    if model.kind() != ModelKind::HuggingFace {
        let what = format!("fine-tuning `{}`", model.path().display());
        return Err(Error::unsupported(what, "it is an ONNX model"));
    }
    if let Some(adapter) = model.adapter() {
        let what = format!("fine-tuning a model with the adapter `{}`", adapter.display());
        return Err(Error::unsupported(
            what,
            "give the base, or start from the adapter through the options",
        ));
    }
    Ok(())
}

/// The adapter of a folder as the start of a run, with the run's own dropout.
fn initial(folder: &Path, model: &dyn ModelHandle, lora: &LoraOptions) -> Result<Adapter> {
    let mut adapter = Adapter::open(folder, model.spec())?;
    let places = lora.adapted_linears(model.spec())?;
    let other_kind = adapter.options.use_dora != lora.use_dora;
    if other_kind || adapter.modules.iter().map(|m| &m.place).ne(&places) {
        let expected = "an adapter with the ranks, scales and modules of the options";
        return Err(Error::file(folder, expected, "others"));
    }
    adapter.options = LoraOptions {
        target_modules: Some(lora.targets(model.spec())),
        ..lora.clone()
    };
    Ok(adapter)
}

/// Hashes what decides the result: model, data, the adapter's start and the arguments.
fn digest(
    model: &dyn ModelHandle,
    data: &TrainingData<'_>,
    adapter: &Adapter,
    arguments: &TrainingArguments,
) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(model.fingerprint()?.0.as_bytes());
    let mut samples = |samples: &[Sample]| {
        hasher.update(&(samples.len() as u64).to_le_bytes());
        for sample in samples {
            hasher.update(&(sample.input_ids.len() as u64).to_le_bytes());
            sample
                .input_ids
                .iter()
                .for_each(|id| _ = hasher.update(&id.to_le_bytes()));
            sample
                .labels
                .iter()
                .for_each(|label| _ = hasher.update(&label.to_le_bytes()));
        }
    };
    samples(data.train);
    samples(data.eval.unwrap_or_default());
    for (name, _, bytes) in adapter.tensors() {
        hasher.update(name.as_bytes());
        hasher.update(&bytes);
    }
    // Neither how a run is resumed nor which checkpoints it keeps changes what it computes.
    let arguments = TrainingArguments {
        resume: Resume::Automatic,
        save: crate::arguments::Interval::Never,
        save_at_end: false,
        save_total_limit: None,
        ..arguments.clone()
    };
    hasher.update(format!("{:?} {arguments:?}", adapter.options).as_bytes());
    Ok(hasher.finalize().to_hex().to_string())
}

/// Where the run begins, as the arguments ask.
fn start(
    model: &dyn ModelHandle,
    adapter: Adapter,
    arguments: &TrainingArguments,
    identity: &RunIdentity,
    context: &PassContext<'_>,
) -> Result<Start> {
    let output = context.output;
    let asked = match &arguments.resume {
        Resume::Never => None,
        Resume::Automatic => checkpoint::newest(output, &identity.digest),
        Resume::From(folder) => Some(folder.clone()),
        Resume::Last => {
            let newest = checkpoint::newest(output, &identity.digest);
            let any = checkpoint::list(output).pop().map(|(_, folder)| folder);
            Some(
                newest
                    .or(any)
                    .ok_or_else(|| Error::file(output, "a checkpoint to resume from", "none"))?,
            )
        }
    };
    match asked {
        Some(folder) => {
            let snapshot = Snapshot::read(&folder, model.spec(), &identity.digest)?;
            Ok(Start::From(Box::new(snapshot)))
        }
        None => Ok(Start::Fresh(Box::new(adapter))),
    }
}

/// Writes the result; what describes the folder comes last.
fn write_output(model: &Path, snapshot: &Snapshot, base_model: &str, output: &Path) -> Result<()> {
    link_model(model, &output.join(MODEL_FOLDER))?;
    let history = &snapshot.state.log_history;
    train_log::write(output, history)?;
    fsio::write(
        output.join(loss_svg::SVG_FILE),
        loss_svg::draw(history).as_bytes(),
    )?;
    snapshot.adapter.write(&output.join("adapter"), base_model)?;
    write_model_config(output, Some("adapter"))?;
    checkpoint::remove(&output.join(INTERRUPTED_FOLDER))
}

/// Places every file of the base in `target`, without a second copy of its bytes where the file system allows it.
fn link_model(source: &Path, target: &Path) -> Result<()> {
    fsio::create_dir(target)?;
    let mut names: Vec<_> = fs::read_dir(source)
        .map_err(Error::io("list", source))?
        .flatten()
        .filter(|entry| entry.path().is_file())
        .map(|entry| entry.file_name())
        .filter(|name| !name.to_string_lossy().starts_with('.'))
        .collect();
    names.sort();
    for name in names {
        fsio::link_or_copy(&source.join(&name), &target.join(&name))?;
    }
    Ok(())
}

/// Whether a folder holds an adapter in PEFT's files.
pub fn is_adapter(folder: &Path) -> bool {
    folder.join(CONFIG_FILE).is_file() && folder.join(WEIGHTS_FILE).is_file()
}

/// The largest resident memory of this process, from `/proc`.
fn peak_memory_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}
