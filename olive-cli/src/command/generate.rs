//! `olive generate`.

use olive_core::{Error, Result};

use super::Context;
use crate::args::GenerateArgs;

/// Runs the command.
///
/// # Errors
/// [`Error::Unsupported`].
pub fn run(_args: &GenerateArgs, _context: &Context<'_>) -> Result<()> {
    Err(Error::unsupported(
        "`olive generate`",
        "it is not part of this build",
    ))
}
