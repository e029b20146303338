//! `olive extract-adapters`: LoRA weights that a checkpoint holds beside its own, one file an adapter.
//!
//! Such checkpoints (Phi-4-multimodal) name them `<module>.lora_A.<adapter>.weight`, and tell rank and alpha in
//! `config.json` under `<adapter>_lora`. Each is put down as PEFT would store it, and converted like any other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use olive_core::checkpoint::write_file;
use olive_core::{Checkpoint, DType, Error, Result, TensorInfo, TensorSource, fsio, hub};
use olive_onnx::adapter::{ConvertOptions, convert_adapter};
use serde_json::{Map, Value, json};

use super::{Context, notes};
use crate::adapter_files;
use crate::args::{AdapterDtype, AdapterFormat, ExtractAdaptersArgs};
use crate::output;

/// The architecture whose fused projections such checkpoints have, for those that are not known themselves.
const LAYOUT: &str = "Phi3ForCausalLM";
/// The folder, inside of the output, where adapters are put down before they are converted.
const WORK: &str = ".olive-work";

/// Runs the command.
///
/// # Errors
/// [`Error::Unsupported`] for a checkpoint without such weights; those of [`convert_adapter`].
pub fn run(args: &ExtractAdaptersArgs, context: &Context<'_>) -> Result<()> {
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
    ])?;
    notes::warn_no_effect(&[(
        "--cache_dir",
        args.cache_dir.is_some(),
        "the hub client's own folder is used",
    )]);
    let folder = hub::resolve(&args.model_name_or_path, context.progress)?;
    let config: Map<String, Value> = fsio::read_json(folder.join("config.json"))?;
    let checkpoint = Checkpoint::open(&folder)?;
    let adapters = baked(&checkpoint);
    if adapters.is_empty() {
        return Err(Error::unsupported(
            format!("extracting adapters of `{}`", folder.display()),
            "it has no weights `….lora_A.<adapter>.weight`",
        ));
    }
    let work = args.output_path.join(WORK);
    let result = adapters.iter().try_for_each(|(name, modules)| {
        context.cancel.check()?;
        let peft = work.join(name);
        put_down(&checkpoint, &config, (name, modules), &peft)?;
        convert(args, name, &peft)
    });
    let _ = std::fs::remove_dir_all(&work);
    result
}

/// The modules of each adapter.
fn baked(checkpoint: &Checkpoint) -> BTreeMap<String, BTreeSet<String>> {
    let mut adapters: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for name in checkpoint.names() {
        if let Some((module, rest)) = name.split_once(".lora_A.")
            && let Some(adapter) = rest.strip_suffix(".weight")
        {
            adapters
                .entry(adapter.to_owned())
                .or_default()
                .insert(module.to_owned());
        }
    }
    adapters
}

/// Writes one adapter as a PEFT folder, with a base that tells how fused projections are cut.
fn put_down(
    checkpoint: &Checkpoint,
    config: &Map<String, Value>,
    (adapter, modules): (&str, &BTreeSet<String>),
    folder: &Path,
) -> Result<()> {
    let source: &dyn TensorSource = checkpoint;
    let mut tensors = Vec::new();
    let mut rank = 0;
    for module in modules {
        for part in ["lora_A", "lora_B"] {
            let name = format!("{module}.{part}.{adapter}.weight");
            let info = source.require(&name)?;
            if part == "lora_A" {
                rank = rank.max(info.shape.first().copied().unwrap_or(0));
            }
            let values = source.read_f32(&name)?;
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let info = TensorInfo {
                dtype: DType::F32,
                shape: info.shape.clone(),
            };
            tensors.push((format!("base_model.model.{module}.{part}.weight"), info, bytes));
        }
    }
    write_file(folder.join("adapter_model.safetensors"), &tensors)?;
    let about = config.get(&format!("{adapter}_lora"));
    let number = |key: &str| about.and_then(|about| about.get(key)).and_then(Value::as_f64);
    let r = number("r").unwrap_or(rank as f64);
    let alpha = number("lora_alpha").unwrap_or(r);
    let last = |module: &String| module.rsplit('.').next().unwrap_or(module).to_owned();
    let targets: BTreeSet<String> = modules.iter().map(last).collect();
    let base = folder.join("base");
    let mut like = config.clone();
    like.insert("architectures".to_owned(), json!([LAYOUT]));
    fsio::write_json(base.join("config.json"), &like, 2)?;
    let about = json!({
        "peft_type": "LORA", "r": r as u64, "lora_alpha": alpha, "target_modules": targets, "bias": "none",
        "task_type": "CAUSAL_LM", "base_model_name_or_path": std::path::absolute(&base).unwrap_or(base),
    });
    fsio::write_json(folder.join("adapter_config.json"), &about, 2)
}

fn convert(args: &ExtractAdaptersArgs, name: &str, peft: &Path) -> Result<()> {
    let options = ConvertOptions {
        model: None,
        dtype: match args.dtype {
            AdapterDtype::Float32 => DType::F32,
            AdapterDtype::Float16 => DType::F16,
        },
    };
    let path = adapter_files::with_suffix(&args.output_path.join(name), args.format);
    if args.format == AdapterFormat::OnnxAdapter {
        convert_adapter(peft, &options, &path)?;
    } else {
        let adapter = convert_adapter(peft, &options, &peft.join("converted.onnx_adapter"))?;
        adapter_files::write(&path, &adapter, args.format)?;
    }
    output::line(&format!("Exported adapter weights to {}", path.display()))
}
