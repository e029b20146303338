//! `olive finetune`.

use olive_core::data::DataConfig;
use olive_core::decoder::Cpu;
use olive_core::packed::nf4::Nf4Options;
use olive_core::text::TextTokenizer;
use olive_core::{DType, Error, ModelHandle, PassContext, Result};
use olive_lora::{LoraOptions, QloraOptions, Targets, TrainingArguments, TrainingData};
use serde_json::{Value, json};

use super::quantize::{data_config, data_workflow};
use super::{Context, device, notes, open_model};
use crate::args::{FinetuneArgs, Method, TorchDtype};
use crate::output;
use crate::workflow::Workflow;

/// Runs the command.
///
/// # Errors
/// Those of [`olive_lora::finetune`] and of reading model and data.
pub fn run(args: &FinetuneArgs, context: &Context<'_>) -> Result<()> {
    let (training, warnings) = TrainingArguments::from_pairs(args.training.clone())?;
    check_flags(args)?;
    let on_gpu = device::on_gpu(args.device)?;
    if on_gpu && args.method != Method::Lora {
        let expected = "lora with --device gpu; a base that is packed already stays packed while training";
        let found = format!("`{}`", format!("{:?}", args.method).to_lowercase());
        return Err(Error::config("command line", "--method", expected, found));
    }
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let train = data_config(&args.data_name, Some(args.train_split.clone()), &args.data)?;
    if args.method == Method::Dora {
        let (output, config) = (&args.output_path, &args.config);
        return Workflow::of_command(&workflow(args), output, config, None, context);
    }
    if notes::save_config(&args.config, &args.output_path, &workflow(args))? {
        return Ok(());
    }
    let model = open_model(&args.model, context)?;
    let tokenizer = TextTokenizer::open(model.path())?;
    let samples = train.samples(&tokenizer)?;
    let eval_samples = match args.eval_split.as_str() {
        "" => None,
        split => {
            let mut source = train.source.clone();
            source.split = Some(split.to_owned());
            let text = train.text.clone();
            Some(DataConfig { source, text }.samples(&tokenizer)?)
        }
    };
    let lora = LoraOptions {
        r: args.lora_r,
        alpha: args.lora_alpha as f64,
        target_modules: match args.target_modules.as_slice() {
            [] => None,
            names => Some(Targets::from_text(&names.join(","))),
        },
        ..LoraOptions::default()
    };
    let data = TrainingData {
        train: &samples,
        eval: eval_samples.as_deref(),
    };
    let pass = PassContext {
        output: &args.output_path,
        progress: context.progress,
        cancel: context.cancel,
    };
    let report = if args.method == Method::Qlora {
        let qlora = QloraOptions {
            rounding: Nf4Options::default(),
            compute_dtype: match args.torch_dtype {
                Some(TorchDtype::Float16) => DType::F16,
                Some(TorchDtype::Float32) => DType::F32,
                _ => DType::BF16,
            },
            keep_rounded: true,
        };
        olive_lora::finetune_qlora::<Cpu>(&model, data, &lora, qlora, &training, &pass)?
    } else {
        let finetune = match on_gpu {
            false => olive_lora::finetune::<Cpu>,
            #[cfg(feature = "cuda")]
            true => olive_lora::finetune_on_gpu,
            #[cfg(not(feature = "cuda"))]
            true => unreachable!("invariant: `on_gpu` refuses a device that this build does not have"),
        };
        finetune(&model, data, &lora, &training, &pass)?
    };
    tracing::info!(
        "{} steps over {} samples in {:.1} s, {:.0} tokens/s, loss {:.4}",
        report.steps,
        samples.len(),
        report.seconds,
        report.tokens_per_s,
        report.final_loss.unwrap_or(f64::NAN),
    );
    output::saved(&args.output_path)
}

fn check_flags(args: &FinetuneArgs) -> Result<()> {
    let half = matches!(args.torch_dtype, Some(TorchDtype::Bfloat16 | TorchDtype::Float16));
    notes::warn_no_effect(&[
        ("--torch_dtype", half, "the CPU computes in float32"),
        (
            "--train_subset",
            args.train_subset.is_some(),
            "data files have no subsets",
        ),
        (
            "--eval_subset",
            args.eval_subset.is_some(),
            "data files have no subsets",
        ),
    ]);
    notes::warn_old(&args.no_effect);
    Ok(())
}

/// The run as a workflow file of Olive.
fn workflow(args: &FinetuneArgs) -> Value {
    let mut pass = json!({
        "type": match args.method {
            Method::Lora => "LoRA",
            Method::Qlora => "QLoRA",
            Method::Dora => "DoRA",
        },
        "r": args.lora_r,
        "alpha": args.lora_alpha,
        "train_data_config": "train_data",
        "training_args": args.training,
    });
    if !args.target_modules.is_empty() {
        pass["target_modules"] = json!(args.target_modules);
    }
    let mut data = vec![data_workflow(
        "train_data",
        &args.data_name,
        Some(&args.train_split),
        &args.data,
    )];
    if !args.eval_split.is_empty() {
        data.push(data_workflow(
            "eval_data",
            &args.data_name,
            Some(&args.eval_split),
            &args.data,
        ));
        pass["eval_data_config"] = json!("eval_data");
    }
    json!({
        "input_model": {"type": "HfModel", "model_path": args.model.model_name_or_path},
        "data_configs": data,
        "passes": {"finetune": pass},
        "no_artifacts": true,
        "output_dir": args.output_path,
        "log_severity_level": args.common.log_level,
    })
}
