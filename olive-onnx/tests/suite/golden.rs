//! Where the files of real packages are.

use std::path::{Path, PathBuf};

/// The folder of shared data; `None`, with a word on stderr, where it is absent.
pub fn shared() -> Option<PathBuf> {
    let root = match std::env::var_os("OLIVE_SHARED") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared"),
    };
    if root.is_dir() {
        Some(root)
    } else {
        eprintln!("SKIPPED: {} is absent", root.display());
        None
    }
}

/// Folders of onnxruntime-genai's builder.
pub fn genai() -> Option<PathBuf> {
    shared().map(|root| root.join("golden/genai"))
}
