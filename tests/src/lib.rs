//! Shared by the integration tests: where inputs are, and how a test says aloud that it could not run.

use std::path::{Path, PathBuf};

/// The root of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or_else(|| Path::new("."))
}

/// The folder of large inputs beside the checkout (or where `OLIVE_SHARED` points), joined with `relative`.
/// `None`, after a line on stderr that names the test, where it is absent.
pub fn shared(test: &str, relative: &str) -> Option<PathBuf> {
    let root = std::env::var_os("OLIVE_SHARED").map_or_else(|| workspace().join("../shared"), PathBuf::from);
    let path = root.join(relative);
    if path.exists() {
        return Some(path);
    }
    eprintln!("SKIPPED: {test}: `{}` is absent", path.display());
    None
}

/// A path below `fixtures/`.
pub fn fixture(relative: &str) -> PathBuf {
    workspace().join("fixtures").join(relative)
}

/// Copies a folder of plain files.
///
/// # Errors
/// The first I/O error.
pub fn copy_folder(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        std::fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}
