//! Files that appear whole: written beside their final name, synced, then renamed.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};

/// Reads a whole file.
///
/// # Errors
/// [`Error::Io`] with the path.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<u8>> {
    fs::read(&path).map_err(Error::io("read", &path))
}

/// Reads a whole UTF-8 file.
///
/// # Errors
/// [`Error::Io`] with the path.
pub fn read_to_string(path: impl AsRef<Path>) -> Result<String> {
    fs::read_to_string(&path).map_err(Error::io("read", &path))
}

/// Reads and parses a JSON file.
///
/// # Errors
/// [`Error::Io`] or [`Error::Json`], both with the path.
pub fn read_json<T: serde::de::DeserializeOwned>(path: impl AsRef<Path>) -> Result<T> {
    let bytes = read(&path)?;
    serde_json::from_slice(&bytes).map_err(Error::json(&path))
}

/// Creates a folder and its parents.
///
/// # Errors
/// [`Error::Io`] with the path.
pub fn create_dir(path: impl AsRef<Path>) -> Result<()> {
    fs::create_dir_all(&path).map_err(Error::io("create folder", &path))
}

/// The name under which `path` is written before it is renamed: in the same folder, hidden, of this process. What a
/// killed process left under such a name for the same file is removed.
pub fn temporary_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    remove_orphans(path, &name);
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

/// Removes temporary files and folders for `name` of processes that are no more. Where processes cannot be looked up, they count
/// as alive.
fn remove_orphans(path: &Path, name: &str) {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let Ok(entries) = fs::read_dir(parent.unwrap_or(Path::new("."))) else {
        return;
    };
    for entry in entries.flatten() {
        let found = entry.file_name();
        let rest = found
            .to_str()
            .and_then(|found| found.strip_prefix('.')?.strip_prefix(name)?.strip_prefix('.'));
        let Some(process) = rest.and_then(|rest| rest.strip_suffix(".tmp")?.parse::<u32>().ok()) else {
            continue;
        };
        let gone = Path::new("/proc/self").exists() && !Path::new("/proc").join(process.to_string()).exists();
        if gone {
            let path = entry.path();
            let _ = if path.is_dir() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
        }
    }
}

/// Writes `bytes` to `path` so that readers see the old file or the new one, never a part.
///
/// # Errors
/// [`Error::Io`] with the path; the old file is untouched then.
pub fn write(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        create_dir(parent)?;
    }
    let temporary = temporary_name(path);
    let result = (|| {
        let mut file = File::create(&temporary).map_err(Error::io("create", &temporary))?;
        file.write_all(bytes).map_err(Error::io("write", &temporary))?;
        file.sync_all().map_err(Error::io("sync", &temporary))?;
        rename(&temporary, path)
    })();
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// Writes a value as JSON, indented by `indent` spaces, as [`write()`] does.
///
/// # Errors
/// [`Error::Io`] with the path, or [`Error::Json`] if the value cannot be a JSON document.
pub fn write_json<T: serde::Serialize>(path: impl AsRef<Path>, value: &T, indent: usize) -> Result<()> {
    let spaces = " ".repeat(indent);
    let mut bytes = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    value.serialize(&mut serializer).map_err(Error::json(&path))?;
    write(path, &bytes)
}

/// Renames a file or folder and syncs the folder that holds it.
///
/// # Errors
/// [`Error::Io`] with the destination.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(Error::io("rename to", to))?;
    if let Some(parent) = to.parent()
        && let Ok(folder) = File::open(parent)
    {
        // Not every file system can sync a folder; the rename itself has happened.
        let _ = folder.sync_all();
    }
    Ok(())
}

/// Places `source` at `target` without a second copy of its bytes where the file system allows it: a hard link,
/// else a copy under a temporary name. An existing `target` is replaced.
///
/// # Errors
/// [`Error::Io`] with the path.
pub fn link_or_copy(source: &Path, target: &Path) -> Result<()> {
    if let Some(parent) = target.parent() {
        create_dir(parent)?;
    }
    let source = fs::canonicalize(source).map_err(Error::io("resolve", source))?;
    let temporary = temporary_name(target);
    // Renaming one name of a file to another name of it does nothing, and would leave the temporary one behind.
    if same_file(&source, target) {
        return Ok(());
    }
    let _ = fs::remove_file(&temporary);
    if fs::hard_link(&source, &temporary).is_err() {
        fs::copy(&source, &temporary).map_err(Error::io("copy", &source))?;
    }
    rename(&temporary, target)
}

fn same_file(a: &Path, b: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino()));
    matches!((identity(a), identity(b)), (Ok(a), Ok(b)) if a == b)
}

/// Joins `relative` to `folder`, refusing anything that would leave it.
///
/// # Errors
/// [`Error::File`] for an absolute path or one with `..`.
pub fn contained(folder: &Path, relative: &str) -> Result<PathBuf> {
    let path = Path::new(relative);
    let inside = path
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if relative.is_empty() || !inside {
        return Err(Error::file(
            folder,
            "a path relative to this folder and inside it",
            format!("`{relative}`"),
        ));
    }
    Ok(folder.join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_replaces_the_file_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/file.json");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn leavings_of_dead_processes_go_and_links_are_made_twice_without_trace() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        let target = folder.path().join("model/file");
        write(&source, b"x").unwrap();
        create_dir(target.parent().unwrap()).unwrap();
        // No process has this number: Linux stops at 2^22.
        fs::write(target.with_file_name(".file.4294967295.tmp"), b"half").unwrap();
        fs::write(target.with_file_name(".file.1.tmp"), b"of a process that runs").unwrap();
        for _ in 0..2 {
            link_or_copy(&source, &target).unwrap();
        }
        let mut names: Vec<_> = fs::read_dir(target.parent().unwrap())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, [".file.1.tmp", "file"]);
    }

    #[test]
    fn paths_out_of_the_folder_are_refused() {
        let folder = Path::new("/models/x");
        assert!(contained(folder, "model.onnx.data").is_ok());
        for bad in ["", "/etc/passwd", "../x", "a/../../x"] {
            assert!(contained(folder, bad).is_err(), "{bad}");
        }
    }
}
