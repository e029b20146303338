//! `olive auto-opt` and `olive capture-onnx-graph`.

use olive_core::{Error, Result};

use super::Context;
use crate::args::{AutoOptArgs, CaptureArgs};

/// Runs `auto-opt`.
///
/// # Errors
/// [`Error::Unsupported`].
pub fn auto_opt(_args: &AutoOptArgs, _context: &Context<'_>) -> Result<()> {
    Err(Error::unsupported(
        "`olive auto-opt`",
        "it is not part of this build",
    ))
}

/// Runs `capture-onnx-graph`.
///
/// # Errors
/// [`Error::Unsupported`].
pub fn capture(_args: &CaptureArgs, _context: &Context<'_>) -> Result<()> {
    Err(Error::unsupported(
        "`olive capture-onnx-graph`",
        "it is not part of this build",
    ))
}
