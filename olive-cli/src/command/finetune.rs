//! `olive finetune`.

use olive_core::{Error, Result};

use super::Context;
use crate::args::FinetuneArgs;

/// Runs the command.
///
/// # Errors
/// [`Error::Unsupported`].
pub fn run(_args: &FinetuneArgs, _context: &Context<'_>) -> Result<()> {
    Err(Error::unsupported(
        "`olive finetune`",
        "it is not part of this build",
    ))
}
