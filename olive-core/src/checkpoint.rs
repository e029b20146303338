//! Safetensors checkpoints: one file or shards with an index, read lazily through memory maps and written so
//! that the files appear whole.
//!
//! Format: <https://huggingface.co/docs/safetensors>; the index is `model.safetensors.index.json`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fsio;

mod writer;

pub use writer::{CheckpointPlan, CheckpointWriter, write_file};

/// The one-file name of a checkpoint's weights.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The index of a sharded checkpoint.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Bytes a shard holds at most, as `transformers` and AutoAWQ write them.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// Name, type and shape of a stored tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes on disk.
    pub fn byte_len(&self) -> usize {
        self.len() * self.dtype.size()
    }
}

impl std::fmt::Display for TensorInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}

/// Named tensors that are read when asked for.
pub trait TensorSource: Send + Sync {
    /// Where the tensors are, for messages.
    fn origin(&self) -> &Path;
    /// All names, sorted.
    fn names(&self) -> Vec<&str>;
    /// Type and shape of a tensor; `None` if there is none of that name.
    fn info(&self, name: &str) -> Option<&TensorInfo>;
    /// The little-endian, row-major bytes of a tensor.
    ///
    /// # Errors
    /// [`Error::MissingTensors`] if there is none of that name.
    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>>;
    /// Says that these bytes of a tensor are not needed again soon, so that they need not stay in memory.
    fn release(&self, _name: &str, _bytes: Range<usize>) {}
}

impl dyn TensorSource + '_ {
    /// Type and shape of a tensor that must exist.
    ///
    /// # Errors
    /// [`Error::MissingTensors`].
    pub fn require(&self, name: &str) -> Result<&TensorInfo> {
        self.info(name).ok_or_else(|| missing(self.origin(), name))
    }

    /// A float tensor as `f32`, row-major.
    ///
    /// # Errors
    /// [`Error::MissingTensors`], or [`Error::Tensor`] if it does not hold floats.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let info = self.require(name)?;
        let bytes = self.bytes(name)?;
        info.dtype
            .to_f32(&bytes)
            .ok_or_else(|| Error::tensor(name, "floating-point elements", info.dtype.to_string()))
    }

    /// A float tensor as `f32` that must have this shape and hold finite values only.
    ///
    /// # Errors
    /// As `read_f32`, and [`Error::Tensor`] or [`Error::NotFinite`].
    pub fn read_f32_checked(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let info = self.require(name)?;
        if info.shape != shape {
            return Err(Error::tensor(
                name,
                format!("shape {shape:?}"),
                format!("{:?}", info.shape),
            ));
        }
        let values = self.read_f32(name)?;
        let bad = values.iter().filter(|v| !v.is_finite()).count();
        if bad > 0 {
            return Err(Error::NotFinite {
                what: format!("tensor `{name}`"),
                found: bad,
            });
        }
        Ok(values)
    }
}

fn missing(path: &Path, name: &str) -> Error {
    Error::MissingTensors {
        path: path.to_path_buf(),
        names: vec![name.to_owned()],
    }
}

/// A read-only map of a whole file.
fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    // SAFETY: the map is read-only. Another process that truncates the file while it is mapped would fault this
    // one; checkpoints are written under a temporary name and renamed, so a file with this name does not shrink.
    unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))
}

struct Location {
    info: TensorInfo,
    shard: usize,
    begin: usize,
    end: usize,
}

/// A folder with safetensors weights, opened but not read.
pub struct Checkpoint {
    folder: PathBuf,
    shards: Vec<(PathBuf, Mmap)>,
    tensors: BTreeMap<String, Location>,
}

#[derive(Serialize, Deserialize)]
struct Index {
    #[serde(default)]
    metadata: serde_json::Map<String, serde_json::Value>,
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// [`Error::Io`] if neither is there; [`Error::File`] if a file is truncated, has an invalid header or lies
    /// outside the folder; [`Error::MissingTensors`] if a shard lacks what the index promises.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let index_path = folder.join(INDEX_FILE);
        let single = folder.join(SINGLE_FILE);
        if single.is_file() || !index_path.is_file() {
            return Self::open_files(folder, vec![single]);
        }
        let index: Index = fsio::read_json(&index_path)?;
        let mut names: Vec<&String> = index.weight_map.values().collect();
        names.sort();
        names.dedup();
        let paths = names
            .into_iter()
            .map(|name| fsio::contained(folder, name))
            .collect::<Result<Vec<_>>>()?;
        let checkpoint = Self::open_files(folder, paths)?;
        let absent: Vec<String> = index
            .weight_map
            .keys()
            .filter(|n| !checkpoint.tensors.contains_key(*n))
            .cloned()
            .collect();
        if !absent.is_empty() {
            return Err(Error::MissingTensors {
                path: index_path,
                names: absent,
            });
        }
        Ok(checkpoint)
    }

    /// Opens these safetensors files as one set of tensors; `folder` is where messages say they are.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_files(folder: &Path, paths: Vec<PathBuf>) -> Result<Self> {
        let mut shards = Vec::new();
        let mut tensors = BTreeMap::new();
        for path in paths {
            let data = map(&path)?;
            read_header(&path, &data, shards.len(), &mut tensors)?;
            shards.push((path, data));
        }
        Ok(Self {
            folder: folder.to_path_buf(),
            shards,
            tensors,
        })
    }

    /// The weight files, in order.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|(path, _)| path.as_path())
    }
}

impl TensorSource for Checkpoint {
    fn origin(&self) -> &Path {
        &self.folder
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|location| &location.info)
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        let location = self
            .tensors
            .get(name)
            .ok_or_else(|| missing(&self.folder, name))?;
        Ok(Cow::Borrowed(
            &self.shards[location.shard].1[location.begin..location.end],
        ))
    }

    /// Gives the pages of the map back to the system, which reads them again if they are asked for.
    fn release(&self, name: &str, bytes: Range<usize>) {
        let Some(location) = self.tensors.get(name) else {
            return;
        };
        let end = location.begin.saturating_add(bytes.end).min(location.end);
        let begin = location.begin.saturating_add(bytes.start);
        release(&self.shards[location.shard].1, begin..end);
    }
}

/// Gives the whole pages among `bytes` of a map back to the system.
fn release(map: &Mmap, bytes: Range<usize>) {
    /// At least as large as the pages of every system.
    const PAGE: usize = 1 << 16;
    let (begin, end) = (bytes.start.next_multiple_of(PAGE), bytes.end / PAGE * PAGE);
    if begin < end {
        // SAFETY: the map is a read-only one of a file, so a page that was given back holds the same bytes when it is
        // read again.
        let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, begin, end - begin) };
    }
}

/// Parses and validates one file's header; the safetensors crate checks that offsets tile the data exactly.
fn read_header(path: &Path, data: &[u8], shard: usize, into: &mut BTreeMap<String, Location>) -> Result<()> {
    let promise = || "a complete safetensors file";
    let (header_len, metadata) = safetensors::SafeTensors::read_metadata(data)
        .map_err(|source| Error::file(path, promise(), format!("{source} ({} bytes)", data.len())))?;
    let start = header_len + size_of::<u64>();
    if start + metadata.data_len() != data.len() {
        let found = format!(
            "{} bytes where the header promises {}",
            data.len(),
            start + metadata.data_len()
        );
        return Err(Error::file(path, promise(), found));
    }
    for (name, tensor) in metadata.tensors() {
        let stored = format!("{:?}", tensor.dtype);
        let dtype = DType::from_safetensors_name(&stored.to_uppercase())
            .ok_or_else(|| Error::tensor(&name, "a dtype that olive reads", stored))?;
        let info = TensorInfo {
            dtype,
            shape: tensor.shape.clone(),
        };
        let (begin, end) = tensor.data_offsets;
        let location = Location {
            info,
            shard,
            begin: start + begin,
            end: start + end,
        };
        if into.insert(name.clone(), location).is_some() {
            return Err(Error::file(
                path,
                "tensors that no other shard holds",
                format!("`{name}` again"),
            ));
        }
    }
    Ok(())
}
