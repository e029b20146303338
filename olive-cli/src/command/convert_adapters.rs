//! `olive convert-adapters`.

use olive_core::{DType, Error, Result};
use olive_onnx::adapter::{ConvertOptions, convert_adapter};

use super::{adapter_folder, notes};
use crate::args::{AdapterDtype, AdapterFormat, ConvertAdaptersArgs};
use crate::output;

const SUFFIX: &str = "onnx_adapter";

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
    if args.adapter_format != AdapterFormat::OnnxAdapter {
        let found = format!("`{}`", format!("{:?}", args.adapter_format).to_lowercase());
        return Err(Error::config("command line", "--adapter_format", SUFFIX, found));
    }
    let options = ConvertOptions {
        model: args.model_name_or_path.as_deref(),
        dtype: match args.dtype {
            AdapterDtype::Float32 => DType::F32,
            AdapterDtype::Float16 => DType::F16,
        },
    };
    let mut path = args.output_path.clone();
    if path.extension().is_none_or(|suffix| suffix != SUFFIX) {
        path.as_mut_os_string().push(format!(".{SUFFIX}"));
    }
    let written = convert_adapter(adapter_folder(&args.adapter_path)?, &options, &path)?;
    tracing::info!("{} tensors", written.parameters.len());
    output::line(&format!("Exported adapter weights to {}", path.display()))
}
