//! `olive generate-model-package`.

use olive_core::Result;
use olive_onnx::package::{PackageInfo, write_ort_package};

use crate::args::ModelPackageArgs;
use crate::output;

/// Runs the command.
///
/// # Errors
/// Those of [`write_ort_package`].
pub fn run(args: &ModelPackageArgs) -> Result<()> {
    let info = PackageInfo {
        model_name: args.model_name.as_deref(),
        model_version: &args.model_version,
    };
    let package = write_ort_package(&args.source, &args.output_path, info)?;
    output::line(&format!("Model package generated at {}", package.display()))
}
