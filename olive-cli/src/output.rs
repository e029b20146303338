//! What is asked for goes to stdout; a reader that closes it early is content, not an error.

use std::io::{ErrorKind, Write};
use std::path::Path;

use olive_core::{Error, Result};

/// Writes text to stdout and flushes it.
///
/// # Errors
/// [`Error::Io`]; never for a closed pipe.
pub fn text(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(Error::io("write", "stdout")),
    }
}

/// Writes a line to stdout.
///
/// # Errors
/// [`Error::Io`].
pub fn line(line: &str) -> Result<()> {
    text(&format!("{line}\n"))
}

/// Writes a value as one JSON document.
///
/// # Errors
/// [`Error::Io`], or [`Error::Json`] if the value cannot be one.
pub fn json(value: &impl serde::Serialize) -> Result<()> {
    line(&serde_json::to_string(value).map_err(Error::json("stdout"))?)
}

/// Says where a model is, as Olive does.
///
/// # Errors
/// [`Error::Io`].
pub fn saved(path: &Path) -> Result<()> {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    line(&format!("Model is saved at {}", absolute.display()))
}
