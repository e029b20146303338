//! `olive extract-adapters`: LoRA weights that a checkpoint holds beside its own, one file an adapter.
//!
//! Each is put down as a PEFT folder ([`olive_lora::extract_baked`]) and converted like any other. How fused
//! projections are cut follows from the sizes in the checkpoint's `config.json`.

use std::path::Path;

use olive_core::{DType, Result, fsio, hub};
use olive_onnx::adapter::{ConvertOptions, convert_adapter};
use serde_json::{Map, Value, json};

use super::{Context, notes};
use crate::adapter_files;
use crate::args::{AdapterDtype, AdapterFormat, ExtractAdaptersArgs};
use crate::output;

/// The architecture with the projections that such checkpoints have: those of Phi-4-multimodal are Phi-3's.
const LAYOUT: &str = "Phi3ForCausalLM";
/// The folder, inside of the output, where adapters are put down before they are converted.
const WORK: &str = ".olive-work";

/// Runs the command.
///
/// # Errors
/// Those of [`olive_lora::extract_baked`] and [`convert_adapter`].
pub fn run(args: &ExtractAdaptersArgs, context: &Context<'_>) -> Result<()> {
    const SCRIPT: &str = "models are read from their files; no code is run";
    notes::refuse(&[
        ("--model_script", args.model_script.is_some(), SCRIPT),
        ("--script_dir", args.script_dir.is_some(), SCRIPT),
    ])?;
    let reason = "the hub client's own folder is used";
    notes::warn_no_effect(&[("--cache_dir", args.cache_dir.is_some(), reason)]);
    let folder = hub::resolve(&args.model_name_or_path, context.progress)?;
    let work = args.output_path.join(WORK);
    let result = extract(args, &folder, &work, context);
    let _ = std::fs::remove_dir_all(&work);
    result
}

fn extract(args: &ExtractAdaptersArgs, folder: &Path, work: &Path, context: &Context<'_>) -> Result<()> {
    let adapters = olive_lora::extract_baked(folder, work)?;
    let base = work.join("base");
    let mut config: Map<String, Value> = fsio::read_json(folder.join("config.json"))?;
    config.insert("architectures".to_owned(), json!([LAYOUT]));
    fsio::write_json(base.join("config.json"), &config, 2)?;
    let base = std::path::absolute(&base).unwrap_or(base);
    for adapter in &adapters {
        context.cancel.check()?;
        let about = adapter.folder.join("adapter_config.json");
        let mut keys: Map<String, Value> = fsio::read_json(&about)?;
        keys.insert("base_model_name_or_path".to_owned(), json!(base));
        fsio::write_json(&about, &keys, 2)?;
        convert(args, &adapter.name, &adapter.folder)?;
    }
    Ok(())
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
