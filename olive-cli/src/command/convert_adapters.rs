//! `olive convert-adapters`.

use olive_core::{Error, Result};

use crate::args::ConvertAdaptersArgs;

/// Runs the command.
///
/// # Errors
/// [`Error::Unsupported`].
pub fn run(_args: &ConvertAdaptersArgs) -> Result<()> {
    Err(Error::unsupported(
        "`olive convert-adapters`",
        "it is not part of this build",
    ))
}
