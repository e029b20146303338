//! Safetensors checkpoints: one file or shards with an index, read lazily through memory maps and written so
//! that the files appear whole.
//!
//! Format: <https://huggingface.co/docs/safetensors>; the index is `model.safetensors.index.json`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fsio;

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

/// The tensors a new checkpoint will hold, in the order in which they are stored.
#[derive(Debug, Clone, Default)]
pub struct CheckpointPlan {
    /// Name, type and shape of each.
    pub tensors: Vec<(String, TensorInfo)>,
    /// Bytes a shard holds at most; `None` for [`SHARD_BYTES`].
    pub shard_bytes: Option<u64>,
}

impl CheckpointPlan {
    /// Appends a tensor.
    pub fn push(&mut self, name: impl Into<String>, dtype: DType, shape: impl Into<Vec<usize>>) {
        self.tensors.push((
            name.into(),
            TensorInfo {
                dtype,
                shape: shape.into(),
            },
        ));
    }

    /// Bytes of all tensors.
    pub fn byte_len(&self) -> u64 {
        self.tensors.iter().map(|(_, info)| info.byte_len() as u64).sum()
    }
}

struct Slot {
    file: usize,
    offset: u64,
    info: TensorInfo,
    written: bool,
}

struct ShardFile {
    name: String,
    temporary: PathBuf,
    file: File,
}

/// Writes a checkpoint tensor by tensor, in any order. Nothing carries its final name before
/// [`CheckpointWriter::finish`].
pub struct CheckpointWriter {
    folder: PathBuf,
    shards: Vec<ShardFile>,
    slots: BTreeMap<String, Slot>,
    total_bytes: u64,
}

impl CheckpointWriter {
    /// Creates the files of `plan` in `folder` under temporary names, headers included.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Tensor`] if the plan names a tensor twice.
    pub fn create(folder: impl AsRef<Path>, plan: &CheckpointPlan) -> Result<Self> {
        let folder = folder.as_ref();
        fsio::create_dir(folder)?;
        let groups = split_shards(plan);
        let mut shards = Vec::new();
        let mut slots = BTreeMap::new();
        for (number, group) in groups.iter().enumerate() {
            let name = match groups.len() {
                1 => SINGLE_FILE.to_owned(),
                count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            let header = header_bytes(group);
            let temporary = fsio::temporary_name(&folder.join(&name));
            let file = File::create(&temporary).map_err(Error::io("create", &temporary))?;
            file.write_all_at(&header, 0)
                .map_err(Error::io("write", &temporary))?;
            let mut offset = header.len() as u64;
            for (tensor, info) in group {
                let slot = Slot {
                    file: number,
                    offset,
                    info: info.clone(),
                    written: false,
                };
                offset += info.byte_len() as u64;
                if slots.insert(tensor.clone(), slot).is_some() {
                    return Err(Error::tensor(tensor, "one entry in the plan", "two"));
                }
            }
            file.set_len(offset).map_err(Error::io("reserve", &temporary))?;
            shards.push(ShardFile {
                name,
                temporary,
                file,
            });
        }
        Ok(Self {
            folder: folder.to_path_buf(),
            shards,
            slots,
            total_bytes: plan.byte_len(),
        })
    }

    /// Writes one tensor's little-endian, row-major bytes.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the plan has no such tensor or another size; [`Error::Io`].
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let slot = self
            .slots
            .get_mut(name)
            .ok_or_else(|| Error::tensor(name, "a tensor of the plan", "another"))?;
        if bytes.len() != slot.info.byte_len() {
            let expected = format!("{} bytes for {}", slot.info.byte_len(), slot.info);
            return Err(Error::tensor(name, expected, bytes.len().to_string()));
        }
        let shard = &self.shards[slot.file];
        shard
            .file
            .write_all_at(bytes, slot.offset)
            .map_err(Error::io("write", &shard.temporary))?;
        slot.written = true;
        Ok(())
    }

    /// Syncs the files, writes the index of a sharded checkpoint, and gives everything its final name.
    ///
    /// # Errors
    /// [`Error::MissingTensors`] if part of the plan was not written; [`Error::Io`].
    pub fn finish(mut self) -> Result<()> {
        let absent: Vec<String> = self
            .slots
            .iter()
            .filter(|(_, slot)| !slot.written)
            .map(|(name, _)| name.clone())
            .collect();
        if !absent.is_empty() {
            return Err(Error::MissingTensors {
                path: self.folder.clone(),
                names: absent,
            });
        }
        for shard in &self.shards {
            shard
                .file
                .sync_all()
                .map_err(Error::io("sync", &shard.temporary))?;
        }
        let shards = std::mem::take(&mut self.shards);
        for shard in &shards {
            fsio::rename(&shard.temporary, &self.folder.join(&shard.name))?;
        }
        if shards.len() > 1 {
            let weight_map = self
                .slots
                .iter()
                .map(|(name, slot)| (name.clone(), shards[slot.file].name.clone()));
            let mut metadata = serde_json::Map::new();
            metadata.insert("total_size".to_owned(), self.total_bytes.into());
            let index = Index {
                metadata,
                weight_map: weight_map.collect(),
            };
            fsio::write_json(self.folder.join(INDEX_FILE), &index, 2)?;
        }
        Ok(())
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        for shard in &self.shards {
            let _ = std::fs::remove_file(&shard.temporary);
        }
    }
}

/// Cuts the plan into shards, in order; a tensor larger than a shard gets one of its own.
fn split_shards(plan: &CheckpointPlan) -> Vec<Vec<(String, TensorInfo)>> {
    let limit = plan.shard_bytes.unwrap_or(SHARD_BYTES);
    let mut groups = vec![Vec::new()];
    let mut used = 0;
    for (name, info) in &plan.tensors {
        let bytes = info.byte_len() as u64;
        if used + bytes > limit && used > 0 {
            groups.push(Vec::new());
            used = 0;
        }
        used += bytes;
        if let Some(group) = groups.last_mut() {
            group.push((name.clone(), info.clone()));
        }
    }
    groups
}

/// Length prefix and JSON header, padded with spaces so that the data begins at a multiple of 8.
fn header_bytes(tensors: &[(String, TensorInfo)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".to_owned(), serde_json::json!({ "format": "pt" }));
    let mut begin = 0;
    for (name, info) in tensors {
        let end = begin + info.byte_len();
        let entry = serde_json::json!({
            "dtype": info.dtype.safetensors_name(), "shape": info.shape, "data_offsets": [begin, end],
        });
        header.insert(name.clone(), entry);
        begin = end;
    }
    let mut json = serde_json::Value::Object(header).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(&json);
    bytes
}

/// Writes a small set of tensors as one safetensors file, whole.
///
/// # Errors
/// [`Error::Io`].
pub fn write_file(path: impl AsRef<Path>, tensors: &[(String, TensorInfo, Vec<u8>)]) -> Result<()> {
    let header: Vec<_> = tensors
        .iter()
        .map(|(name, info, _)| (name.clone(), info.clone()))
        .collect();
    let mut bytes = header_bytes(&header);
    for (_, _, data) in tensors {
        bytes.extend_from_slice(data);
    }
    fsio::write(path, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(shard_bytes: Option<u64>) -> CheckpointPlan {
        let mut plan = CheckpointPlan {
            shard_bytes,
            ..Default::default()
        };
        plan.push("a", DType::F32, [2, 3]);
        plan.push("b", DType::I32, [4]);
        plan.push("c", DType::F16, [5]);
        plan
    }

    fn write_all(folder: &Path, plan: &CheckpointPlan) {
        let mut writer = CheckpointWriter::create(folder, plan).unwrap();
        for (name, info) in plan.tensors.iter().rev() {
            writer
                .write(name, &vec![name.as_bytes()[0]; info.byte_len()])
                .unwrap();
        }
        writer.finish().unwrap();
    }

    #[test]
    fn what_is_written_is_read_in_one_file_and_in_shards() {
        for shard_bytes in [None, Some(1), Some(40)] {
            let folder = tempfile::tempdir().unwrap();
            let plan = plan(shard_bytes);
            write_all(folder.path(), &plan);
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            assert_eq!(checkpoint.names(), ["a", "b", "c"]);
            for (name, info) in &plan.tensors {
                assert_eq!(checkpoint.info(name), Some(info));
                assert!(
                    checkpoint
                        .bytes(name)
                        .unwrap()
                        .iter()
                        .all(|b| *b == name.as_bytes()[0])
                );
            }
        }
    }

    #[test]
    fn an_unfinished_writer_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = CheckpointWriter::create(folder.path(), &plan(None)).unwrap();
        writer.write("b", &[0; 16]).unwrap();
        assert!(writer.write("b", &[0; 15]).is_err());
        assert!(matches!(writer.finish(), Err(Error::MissingTensors { names, .. }) if names == ["a", "c"]));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_truncated_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        write_all(folder.path(), &plan(None));
        let path = folder.path().join(SINGLE_FILE);
        let bytes = std::fs::read(&path).unwrap();
        for keep in [0, 4, 8, 60, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..keep]).unwrap();
            let error = Checkpoint::open(folder.path())
                .err()
                .map(|e| e.to_string())
                .unwrap_or_default();
            assert!(error.contains("model.safetensors"), "{keep}: {error}");
        }
    }
}
