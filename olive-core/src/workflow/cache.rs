//! What was computed before. Layout of the folder:
//!
//! ```text
//! <cache>/file_hashes.json                       path → (size, times, inode) → hash of the contents
//! <cache>/<workflow id>/runs/<id>/run.json       what was run on what: written last, its presence means done
//! <cache>/<workflow id>/runs/<id>/model.json     where the result is
//! <cache>/<workflow id>/runs/<id>/models/        what the pass left
//! <cache>/<workflow id>/runs/<id>.lock           held while the run is computed
//! <cache>/<workflow id>/evaluations/<model>-<accelerator>-<hash>.json
//! <cache>/<workflow id>/outputs/<hash>.json      what was placed in an output folder
//! ```
//!
//! The id of a run is a hash of everything that its result depends on: the input (its bytes, or the id of the run
//! that made it), the pass, its version and parameters, the bytes of all data files, the device. So two processes
//! that work on one cache never disagree about what an id means, and the lock only keeps them from doing the work
//! twice. A failed run leaves no `run.json`; the next one tries again.

mod hashes;
mod store;
mod upkeep;

use std::path::{Path, PathBuf};

use serde_json::Value;

pub use hashes::FileHashes;
pub use store::{Cache, Lock, ModelRecord, RunRecord, snapshot};
pub use upkeep::{CachedRun, cached_runs, remove_runs};

use crate::error::{Error, Result};

/// All files below `path`, or `path` itself if it is a file; sorted. Hidden ones are left out.
pub(super) fn files_below(path: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![path.to_path_buf()];
    if path.is_file() {
        return Ok(folders);
    }
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
            let entry = entry.map_err(Error::io("list", &folder))?;
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let path = entry.path();
            let kind = std::fs::metadata(&path).map_err(Error::io("look at", &path))?;
            if kind.is_dir() {
                folders.push(path);
            } else {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// The hash of a JSON value, whatever the order of keys in its objects.
pub fn hash_value(value: &Value) -> String {
    let mut hasher = blake3::Hasher::new();
    feed(&mut hasher, value);
    hasher.finalize().to_hex().to_string()
}

fn feed(hasher: &mut blake3::Hasher, value: &Value) {
    let text = |hasher: &mut blake3::Hasher, tag: u8, text: &str| {
        hasher.update(&[tag]);
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    match value {
        Value::Object(object) => {
            let mut keys: Vec<&String> = object.keys().collect();
            keys.sort();
            hasher.update(b"{");
            hasher.update(&(keys.len() as u64).to_le_bytes());
            for key in keys {
                text(hasher, b'k', key);
                feed(hasher, &object[key]);
            }
        }
        Value::Array(list) => {
            hasher.update(b"[");
            hasher.update(&(list.len() as u64).to_le_bytes());
            for entry in list {
                feed(hasher, entry);
            }
        }
        Value::String(string) => text(hasher, b's', string),
        other => text(hasher, b'v', &other.to_string()),
    }
}

/// The part of a hash that names files and folders.
pub fn short(hash: &str) -> &str {
    const DIGITS: usize = 16;
    hash.get(..DIGITS).unwrap_or(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_follows_contents_and_not_the_order_of_keys() {
        let hash = |text: &str| hash_value(&serde_json::from_str(text).unwrap());
        assert_eq!(hash(r#"{"a": 1, "b": [2]}"#), hash(r#"{"b": [2], "a": 1}"#));
        let different = [
            "{}",
            "[]",
            "[[]]",
            r#""""#,
            "0",
            "null",
            r#"["a","b"]"#,
            r#"["ab"]"#,
            r#"{"a":1}"#,
            r#"{"a":"1"}"#,
        ];
        for (i, a) in different.iter().enumerate() {
            for b in &different[i + 1..] {
                assert_ne!(hash(a), hash(b), "{a} {b}");
            }
        }
    }
}
