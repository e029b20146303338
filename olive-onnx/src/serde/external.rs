//! Tensors in files beside the graph: where they are, checked before anything is read.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use olive_core::{Error, Result, fsio};

use super::proto::StringEntry;
use crate::mmap::MappedFile;

/// The external-data files of a model, each mapped once.
pub struct ExternalFiles {
    folder: Option<PathBuf>,
    open: HashMap<String, Arc<MappedFile>>,
}

impl ExternalFiles {
    /// The files in `folder`; with `None`, external data are refused.
    pub fn new(folder: Option<&Path>) -> Self {
        Self {
            folder: folder.map(Path::to_path_buf),
            open: HashMap::new(),
        }
    }

    /// The file and the place in it that `entries` of tensor `name` promise, which has to hold `wanted` bytes.
    pub fn locate(
        &mut self,
        name: &str,
        entries: &[StringEntry],
        wanted: usize,
    ) -> Result<(Arc<MappedFile>, Range<usize>)> {
        let get = |key: &str| {
            let entry = entries.iter().find(|entry| entry.key.as_deref() == Some(key));
            entry.and_then(|entry| entry.value.as_deref())
        };
        let location = get("location")
            .ok_or_else(|| Error::tensor(name, "a `location` of its external data", "none"))?;
        let number = |key: &str| -> Result<Option<usize>> {
            let parse = |text: &str| {
                text.parse::<usize>().map_err(|_| {
                    Error::tensor(name, format!("a number of bytes as `{key}`"), format!("`{text}`"))
                })
            };
            get(key).map(parse).transpose()
        };
        let offset = number("offset")?.unwrap_or(0);
        let file = self.open(name, location)?;
        let length = match number("length")? {
            Some(length) => length,
            None => file.len().saturating_sub(offset),
        };
        if length != wanted {
            let expected = format!("{wanted} bytes of external data for its type and shape");
            return Err(Error::tensor(name, expected, length.to_string()));
        }
        match offset.checked_add(length).filter(|end| *end <= file.len()) {
            Some(end) => Ok((file, offset..end)),
            None => {
                let found = format!(
                    "{length} bytes at {offset} where `{}` has {}",
                    file.path().display(),
                    file.len()
                );
                Err(Error::tensor(name, "external data inside its file", found))
            }
        }
    }

    fn open(&mut self, name: &str, location: &str) -> Result<Arc<MappedFile>> {
        if let Some(file) = self.open.get(location) {
            return Ok(file.clone());
        }
        let Some(folder) = &self.folder else {
            let found = format!("external data in `{location}`");
            return Err(Error::tensor(name, "data inside the model", found));
        };
        let file = Arc::new(MappedFile::open(&fsio::contained(folder, location)?)?);
        self.open.insert(location.to_owned(), file.clone());
        Ok(file)
    }
}
