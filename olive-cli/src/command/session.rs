//! Running an ONNX model folder.

use std::path::Path;

use olive_core::{Error, Result};
use serde_json::{Map, Value};

use super::Context;
use crate::args::EvaluateArgs;

/// Evaluates an ONNX model folder.
///
/// # Errors
/// [`Error::Unsupported`].
pub fn evaluate(
    _args: &EvaluateArgs,
    folder: &Path,
    _texts: &[String],
    _context: &Context<'_>,
) -> Result<Map<String, Value>> {
    let what = format!("evaluation of the ONNX folder `{}`", folder.display());
    Err(Error::unsupported(what, "it is not part of this build"))
}
