//! `olive generate-adapter`: adapter weights of a graph become inputs and a file of their own.

use olive_core::{Error, Result};
use serde_json::json;

use super::{Context, notes};
use crate::args::GenerateAdapterArgs;
use crate::pipeline::Pipeline;
use crate::registry::is_onnx;

/// Runs the command.
///
/// # Errors
/// Those of the pass `ExtractAdapters`.
pub fn run(args: &GenerateAdapterArgs, context: &Context<'_>) -> Result<()> {
    notes::warn_old(&args.no_effect);
    if !args.config.dry_run && !is_onnx(&args.model_name_or_path) {
        let found = if args.model_name_or_path.exists() {
            "none in it"
        } else {
            "nothing"
        };
        return Err(Error::file(&args.model_name_or_path, "an ONNX model", found));
    }
    let model = json!({"type": "ONNXModel", "model_path": args.model_name_or_path});
    let mut pipeline = Pipeline::new(model);
    let parameters = json!({
        "adapter_type": args.adapter_type.name(),
        "save_format": args.adapter_format.name(),
    });
    pipeline.pass("extract_adapters", "ExtractAdapters", parameters);
    pipeline.run(&args.output_path, None, (&args.config, &args.common), context)
}
