//! `olive convert-adapters`.

use olive_core::{DType, Result, fsio};
use olive_onnx::adapter::{ConvertOptions, convert_adapter};

use super::{adapter_folder, notes};
use crate::adapter_files;
use crate::args::{AdapterDtype, AdapterFormat, ConvertAdaptersArgs};
use crate::output;

/// Runs the command.
///
/// # Errors
/// Those of [`convert_adapter`].
pub fn run(args: &ConvertAdaptersArgs) -> Result<()> {
    const FLOAT: &str = "adapters stay floating point";
    notes::refuse(&[
        ("--quantize_int4", args.quantize_int4, FLOAT),
        ("--int4_block_size", args.int4_block_size.is_some(), FLOAT),
        (
            "--int4_quantization_mode",
            args.int4_quantization_mode.is_some(),
            FLOAT,
        ),
    ])?;
    let options = ConvertOptions {
        model: args.model_name_or_path.as_deref(),
        dtype: match args.dtype {
            AdapterDtype::Float32 => DType::F32,
            AdapterDtype::Float16 => DType::F16,
        },
    };
    let path = adapter_files::with_suffix(&args.output_path, args.adapter_format);
    let folder = adapter_folder(&args.adapter_path)?;
    let written = match args.adapter_format {
        AdapterFormat::OnnxAdapter => convert_adapter(folder, &options, &path)?,
        format => {
            let beside = fsio::temporary_name(&path);
            let written = convert_adapter(folder, &options, &beside)
                .and_then(|adapter| adapter_files::write(&path, &adapter, format).map(|()| adapter));
            let _ = std::fs::remove_file(&beside);
            written?
        }
    };
    tracing::info!("{} tensors", written.parameters.len());
    output::line(&format!("Exported adapter weights to {}", path.display()))
}
