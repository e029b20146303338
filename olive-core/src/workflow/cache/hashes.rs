//! Hashes of files, remembered as long as a file was not touched.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Lock, files_below};
use crate::error::{Error, Result};
use crate::fsio;

/// What a file looked like when it was hashed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Entry {
    size: u64,
    /// Nanoseconds since 1970 of the last change of contents and of anything.
    modified: u128,
    changed: u128,
    inode: u64,
    /// How many names the file has.
    links: u64,
    hash: String,
}

impl Entry {
    /// Whether nothing but another name for the file has come up since: that touches the time of the last change of
    /// anything, but no byte.
    fn same_bytes(&self, now: &Self) -> bool {
        let still = self.size == now.size && self.modified == now.modified && self.inode == now.inode;
        still && (self.changed == now.changed || self.links != now.links)
    }
}

/// A table of hashes that is kept on disk.
pub struct FileHashes {
    path: PathBuf,
    entries: Mutex<BTreeMap<String, Entry>>,
    added: Mutex<BTreeMap<String, Entry>>,
    /// Whether size and times stand for the bytes.
    stamps: bool,
}

impl FileHashes {
    /// A table that reads no file: size, inode and time of the last change stand for the bytes. For caches that live
    /// no longer than one command.
    pub fn of_stamps(cache: &Path) -> Self {
        Self {
            stamps: true,
            ..Self::open(cache)
        }
    }

    /// Reads the table of a cache; a table that cannot be read counts as empty.
    pub fn open(cache: &Path) -> Self {
        let path = cache.join("file_hashes.json");
        let entries = fsio::read_json(&path).unwrap_or_default();
        Self {
            path,
            entries: Mutex::new(entries),
            added: Mutex::new(BTreeMap::new()),
            stamps: false,
        }
    }

    /// The hash of a file's bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn file(&self, path: &Path) -> Result<String> {
        let path = std::fs::canonicalize(path).map_err(Error::io("resolve", path))?;
        let key = path.to_string_lossy().into_owned();
        let before = look(&path)?;
        if self.stamps {
            let stamp = format!("{key} {} {} {}", before.size, before.modified, before.inode);
            return Ok(blake3::hash(stamp.as_bytes()).to_hex().to_string());
        }
        let known = self
            .entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
            .cloned();
        if let Some(known) = known
            && known.same_bytes(&before)
        {
            if known.changed != before.changed {
                self.keep(
                    key,
                    Entry {
                        hash: known.hash.clone(),
                        ..before
                    },
                );
            }
            return Ok(known.hash);
        }
        let mut hasher = blake3::Hasher::new();
        let file = std::fs::File::open(&path).map_err(Error::io("open", &path))?;
        hasher.update_reader(file).map_err(Error::io("read", &path))?;
        let hash = hasher.finalize().to_hex().to_string();
        let entry = Entry {
            hash: hash.clone(),
            ..before.clone()
        };
        if settled(&before) && look(&path)? == before {
            self.keep(key, entry);
        }
        Ok(hash)
    }

    fn keep(&self, key: String, entry: Entry) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.insert(key.clone(), entry.clone());
        let mut added = self.added.lock().unwrap_or_else(PoisonError::into_inner);
        added.insert(key, entry);
    }

    /// The hash of a file, or of the names and bytes of all files below a folder.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] if there is nothing.
    pub fn tree(&self, path: &Path) -> Result<String> {
        if !path.exists() {
            return Err(Error::file(path, "a file or folder", "nothing"));
        }
        let files = files_below(path)?;
        let hashes: Result<Vec<String>> = files.par_iter().map(|file| self.file(file)).collect();
        let mut hasher = blake3::Hasher::new();
        for (file, hash) in files.iter().zip(hashes?) {
            let name = file.strip_prefix(path).unwrap_or(Path::new(""));
            let name = name.as_os_str().as_encoded_bytes();
            hasher.update(&(name.len() as u64).to_le_bytes());
            hasher.update(name);
            hasher.update(hash.as_bytes());
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Writes what was added since the table was read, beside what others have added.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self) -> Result<()> {
        let mut added = self.added.lock().unwrap_or_else(PoisonError::into_inner);
        if added.is_empty() {
            return Ok(());
        }
        let _lock = Lock::take(&self.path.with_extension("lock"))?;
        let mut table: BTreeMap<String, Entry> = fsio::read_json(&self.path).unwrap_or_default();
        table.append(&mut added);
        fsio::write_json(&self.path, &table, 0)
    }
}

/// Whether a later write would surely show in the times of the file: those of some file systems count in seconds.
fn settled(entry: &Entry) -> bool {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    let newest = entry.modified.max(entry.changed);
    newest + Duration::from_secs(2).as_nanos() < now.as_nanos()
}

fn look(path: &Path) -> Result<Entry> {
    let data = std::fs::metadata(path).map_err(Error::io("look at", path))?;
    let modified = data
        .modified()
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    #[cfg(unix)]
    let (changed, inode, links) = {
        use std::os::unix::fs::MetadataExt;
        let nanos = i128::from(data.ctime()) * 1_000_000_000 + i128::from(data.ctime_nsec());
        (u128::try_from(nanos).unwrap_or(0), data.ino(), data.nlink())
    };
    #[cfg(not(unix))]
    let (changed, inode, links) = (0, 0, 1);
    Ok(Entry {
        size: data.len(),
        modified: modified.map_or(0, |time| time.as_nanos()),
        changed,
        inode,
        links,
        hash: String::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_byte_changes_the_hash_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("data.json");
        let hashes = FileHashes::open(folder.path());
        let mut seen = std::collections::BTreeSet::new();
        for byte in 0..50_u8 {
            std::fs::write(&file, [byte; 3]).unwrap();
            assert!(seen.insert(hashes.file(&file).unwrap()), "{byte}");
        }
    }
}
