//! `olive chat`.

use olive_core::{Error, Result};

use super::Context;
use crate::args::ChatArgs;

/// Runs the command.
///
/// # Errors
/// [`Error::Unsupported`].
pub fn run(_args: &ChatArgs, _context: &Context<'_>) -> Result<()> {
    Err(Error::unsupported("`olive chat`", "it is not part of this build"))
}
