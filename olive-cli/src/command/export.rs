//! `olive auto-opt` and `olive capture-onnx-graph`.

use std::path::{Path, PathBuf};

use olive_core::{Error, ModelHandle, Result};
use olive_onnx::{BuilderOptions, Precision as Stored, plan_model_folder};
use serde_json::{Value, json};

use super::{Context, adapter_folder, notes, open_model};
use crate::args::{AutoOptArgs, CaptureArgs, Device, ModelArgs, Precision};
use crate::output;

/// Runs `auto-opt`.
///
/// # Errors
/// Those of [`olive_onnx::build_model_folder`] and of reading the model.
pub fn auto_opt(args: &AutoOptArgs, context: &Context<'_>) -> Result<()> {
    check_target(args.device, &args.provider)?;
    notes::refuse(&[
        (
            "--use_qdq_encoding",
            args.use_qdq_encoding,
            "packed weights are MatMulNBits nodes",
        ),
        (
            "--dynamic-to-fixed-shape-dim-param",
            !args.fixed_dim_param.is_empty(),
            "shapes stay dynamic",
        ),
        (
            "--dynamic-to-fixed-shape-dim-value",
            !args.fixed_dim_value.is_empty(),
            "shapes stay dynamic",
        ),
        (
            "--num-splits",
            args.num_splits.is_some(),
            "the model is not split",
        ),
        (
            "--cost-model",
            args.cost_model.is_some(),
            "the model is not split",
        ),
        (
            "--mixed-precision-overrides-config",
            !args.mixed_precision_overrides.is_empty(),
            "there is one precision",
        ),
        (
            "--enable_search",
            args.enable_search.is_some(),
            "there is nothing to choose between",
        ),
    ])?;
    const NO_DATA: &str = "no data is used";
    notes::warn_no_effect(&[
        (
            "--use_dynamo_exporter",
            args.use_dynamo_exporter,
            "the graph is built, not traced",
        ),
        ("--memory", args.memory.is_some(), "the model is not split"),
        ("--seed", args.seed.is_some(), "nothing is random"),
        ("--data_name", args.data_name.is_some(), NO_DATA),
        ("--split", args.split.is_some(), NO_DATA),
        ("--subset", args.subset.is_some(), NO_DATA),
        ("--input_cols", !args.input_cols.is_empty(), NO_DATA),
    ]);
    notes::warn_old(&args.no_effect);
    let options = BuilderOptions::with_precision(stored(args.precision)?);
    let job = Job {
        model: &args.model,
        adapter: args.adapter_path.as_deref(),
        options,
        output: &args.output_path,
        log_level: args.common.log_level,
    };
    if notes::save_config(&args.config, &args.output_path, &job.workflow())? {
        return Ok(());
    }
    job.run(context)
}

/// Runs `capture-onnx-graph`.
///
/// # Errors
/// Those of [`olive_onnx::build_model_folder`] and of reading the model.
pub fn capture(args: &CaptureArgs, context: &Context<'_>) -> Result<()> {
    const BUILT: &str = "graphs are built, not traced; `--use_model_builder` says so";
    notes::refuse(&[
        ("--use_dynamo_exporter", args.use_dynamo_exporter, BUILT),
        ("--use_mobius_builder", args.use_mobius_builder, BUILT),
        (
            "--fixed_param_dict",
            args.fixed_param_dict.is_some(),
            "shapes stay dynamic",
        ),
        (
            "--exclude_embeds",
            args.exclude_embeds,
            "the graph has its embedding",
        ),
        (
            "--exclude_lm_head",
            args.exclude_lm_head,
            "the graph has its head",
        ),
        (
            "--enable_cuda_graph",
            args.enable_cuda_graph,
            "the graph is for the CPU",
        ),
        (
            "--extra_mb_options",
            args.extra_mb_options.is_some(),
            "the builder has the options of this command",
        ),
        (
            "--past_key_value_name",
            args.past_key_value_name != "past_key_values",
            "the runtime expects that name",
        ),
        (
            "--model_variant",
            args.model_variant != "auto",
            "language models only",
        ),
    ])?;
    notes::warn_no_effect(&[
        (
            "--conversion_device",
            args.conversion_device != Device::Cpu,
            "conversion runs on the CPU",
        ),
        (
            "--torch_dtype",
            args.torch_dtype.is_some(),
            "weights keep their values",
        ),
        (
            "--target_opset",
            args.target_opset.is_some(),
            "the opset is the one that the graph needs",
        ),
    ]);
    notes::warn_old(&args.no_effect);
    let mut options = BuilderOptions::with_precision(stored(args.precision)?);
    options.block_size = args.int4_block_size.unwrap_or(options.block_size);
    options.accuracy_level = args.int4_accuracy_level.or(options.accuracy_level);
    options.check()?;
    let job = Job {
        model: &args.model,
        adapter: args.adapter_path.as_deref(),
        options,
        output: &args.output_path,
        log_level: args.common.log_level,
    };
    if notes::save_config(&args.config, &args.output_path, &job.workflow())? {
        return Ok(());
    }
    job.run(context)
}

fn check_target(device: Device, provider: &str) -> Result<()> {
    if device != Device::Cpu {
        let found = format!("`{}`", format!("{device:?}").to_lowercase());
        return Err(Error::config("command line", "--device", "cpu", found));
    }
    if provider != "CPUExecutionProvider" {
        let found = format!("`{provider}`");
        return Err(Error::config(
            "command line",
            "--provider",
            "CPUExecutionProvider",
            found,
        ));
    }
    Ok(())
}

fn stored(precision: Option<Precision>) -> Result<Stored> {
    match precision {
        None | Some(Precision::Fp32) => Ok(Stored::Fp32),
        Some(Precision::Int4) => Ok(Stored::Int4),
        Some(other) => {
            let found = format!("`{}`", other.name());
            Err(Error::config(
                "command line",
                "--precision",
                "fp32 or int4",
                found,
            ))
        }
    }
}

/// A model folder to build.
struct Job<'a> {
    model: &'a ModelArgs,
    adapter: Option<&'a Path>,
    options: BuilderOptions,
    output: &'a Path,
    log_level: u8,
}

impl Job<'_> {
    fn run(&self, context: &Context<'_>) -> Result<()> {
        let model = open_model(self.model, context)?;
        let adapter: Option<PathBuf> = match self.adapter {
            Some(path) => Some(adapter_folder(path)?.to_path_buf()),
            None => model.adapter().map(Path::to_path_buf),
        };
        let plan = plan_model_folder(&model, adapter.as_deref(), &self.options)?;
        tracing::info!(
            "{} nodes, {:.1} MiB of weights",
            plan.model().graph.nodes.len(),
            plan.weight_bytes() as f64 / (1 << 20) as f64,
        );
        let report = plan.write(&self.output.join("model"), context.progress, context.cancel)?;
        if let Some((path, bytes, tensors)) = &report.adapter {
            tracing::info!("{tensors} adapter tensors, {bytes} bytes, in {}", path.display());
        }
        output::saved(self.output)
    }

    /// The run as a workflow file of Olive.
    fn workflow(&self) -> Value {
        let precision = self.options.precision.name();
        let mut input = json!({"type": "HfModel", "model_path": self.model.model_name_or_path});
        let mut passes = json!({"builder": {"type": "ModelBuilder", "precision": precision}});
        if let Some(adapter) = self.adapter {
            input["adapter_path"] = json!(adapter);
            passes["adapters"] = json!({"type": "ExtractAdapters"});
        }
        json!({
            "input_model": input,
            "passes": passes,
            "output_dir": self.output,
            "log_severity_level": self.log_level,
        })
    }
}
