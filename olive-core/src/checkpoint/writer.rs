//! Checkpoints that are written tensor by tensor, or piece by piece, and appear whole.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::{Checkpoint, INDEX_FILE, Index, SHARD_BYTES, SINGLE_FILE, TensorInfo};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fsio;

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
    /// Bytes that were written.
    written: AtomicU64,
}

impl Slot {
    fn complete(&self) -> bool {
        self.written.load(Ordering::Relaxed) >= self.info.byte_len() as u64
    }
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
    /// Whether the unfinished files stay when this is dropped.
    lasting: bool,
    flusher: Flusher,
}

impl CheckpointWriter {
    /// Creates the files of `plan` in `folder` under temporary names, headers included. Without
    /// [`CheckpointWriter::finish`] they are removed again.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Tensor`] if the plan names a tensor twice.
    pub fn create(folder: impl AsRef<Path>, plan: &CheckpointPlan) -> Result<Self> {
        let mut writer = Self::layout(folder.as_ref(), plan, fsio::temporary_name)?;
        writer.lasting = false;
        Ok(writer)
    }

    /// As [`CheckpointWriter::create`], with files that stay when the writer is dropped, for another one to go on
    /// with. The second value says whether `folder` had such files of the same plan: their bytes are there still, and
    /// [`CheckpointWriter::keep`] says which of them are good.
    ///
    /// # Errors
    /// As [`CheckpointWriter::create`].
    pub fn draft(folder: impl AsRef<Path>, plan: &CheckpointPlan) -> Result<(Self, bool)> {
        let folder = folder.as_ref();
        let part = |path: &Path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            path.with_file_name(format!(".{name}.part"))
        };
        let (names, groups) = shard_names(plan);
        let same = names.iter().zip(&groups).all(|(name, group)| {
            let header = header_bytes(group);
            let length =
                header.len() as u64 + group.iter().map(|(_, info)| info.byte_len() as u64).sum::<u64>();
            let mut found = vec![0; header.len()];
            File::open(part(&folder.join(name))).is_ok_and(|file| {
                let whole = file.metadata().is_ok_and(|data| data.len() == length);
                whole && file.read_exact_at(&mut found, 0).is_ok() && found == header
            })
        });
        if !same {
            for name in &names {
                let _ = std::fs::remove_file(part(&folder.join(name)));
            }
        }
        Ok((Self::layout(folder, plan, part)?, same))
    }

    fn layout(
        folder: &Path,
        plan: &CheckpointPlan,
        temporary_name: impl Fn(&Path) -> PathBuf,
    ) -> Result<Self> {
        fsio::create_dir(folder)?;
        let (names, groups) = shard_names(plan);
        let mut shards = Vec::new();
        let mut slots = BTreeMap::new();
        for (number, (name, group)) in names.into_iter().zip(&groups).enumerate() {
            let header = header_bytes(group);
            let temporary = temporary_name(&folder.join(&name));
            let mut options = OpenOptions::new();
            let file = options.write(true).create(true).truncate(false).open(&temporary);
            let file = file.map_err(Error::io("create", &temporary))?;
            file.write_all_at(&header, 0)
                .map_err(Error::io("write", &temporary))?;
            let mut offset = header.len() as u64;
            for (tensor, info) in group {
                let slot = Slot {
                    file: number,
                    offset,
                    info: info.clone(),
                    written: AtomicU64::new(0),
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
            lasting: true,
            flusher: Flusher::default(),
        })
    }

    fn slot(&self, name: &str) -> Result<&Slot> {
        self.slots
            .get(name)
            .ok_or_else(|| Error::tensor(name, "a tensor of the plan", "another"))
    }

    /// Writes one tensor's little-endian, row-major bytes.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the plan has no such tensor or another size; [`Error::Io`].
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let slot = self.slot(name)?;
        if bytes.len() != slot.info.byte_len() {
            let expected = format!("{} bytes for {}", slot.info.byte_len(), slot.info);
            return Err(Error::tensor(name, expected, bytes.len().to_string()));
        }
        slot.written.store(0, Ordering::Relaxed);
        self.write_at(name, 0, bytes)
    }

    /// Writes the bytes of a tensor that begin at byte `offset` of it; every byte has to be written once. Pieces may
    /// be written by several threads at a time.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the plan has no such tensor or it is smaller; [`Error::Io`].
    pub fn write_at(&self, name: &str, offset: usize, bytes: &[u8]) -> Result<()> {
        let slot = self.slot(name)?;
        if offset.saturating_add(bytes.len()) > slot.info.byte_len() {
            let expected = format!("{} bytes for {}", slot.info.byte_len(), slot.info);
            let found = format!("{} from {offset} on", bytes.len());
            return Err(Error::tensor(name, expected, found));
        }
        let shard = &self.shards[slot.file];
        shard
            .file
            .write_all_at(bytes, slot.offset + offset as u64)
            .map_err(Error::io("write", &shard.temporary))?;
        slot.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.flusher.wrote(bytes.len(), &shard.file);
        Ok(())
    }

    /// Takes the bytes of a tensor as they are in the files of a [`CheckpointWriter::draft`].
    ///
    /// # Errors
    /// [`Error::Tensor`] if the plan has no such tensor.
    pub fn keep(&self, name: &str) -> Result<()> {
        let slot = self.slot(name)?;
        slot.written.store(slot.info.byte_len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// What is written so far, to be read; tensors that were not written hold anything.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`].
    pub fn reader(&self) -> Result<Checkpoint> {
        let files = self.shards.iter().map(|shard| shard.temporary.clone());
        Checkpoint::open_files(&self.folder, files.collect())
    }

    /// Waits until what was written is on the disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&self) -> Result<()> {
        self.flusher.wait();
        for shard in &self.shards {
            shard
                .file
                .sync_all()
                .map_err(Error::io("sync", &shard.temporary))?;
        }
        Ok(())
    }

    /// Syncs the files, writes the index of a sharded checkpoint, and gives everything its final name.
    ///
    /// # Errors
    /// [`Error::MissingTensors`] if part of the plan was not written; [`Error::Io`].
    pub fn finish(mut self) -> Result<()> {
        let absent = self.slots.iter().filter(|(_, slot)| !slot.complete());
        let absent: Vec<String> = absent.map(|(name, _)| name.clone()).collect();
        if !absent.is_empty() {
            return Err(Error::MissingTensors {
                path: self.folder.clone(),
                names: absent,
            });
        }
        self.sync()?;
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
        self.flusher.wait();
        if self.lasting {
            return;
        }
        for shard in &self.shards {
            let _ = std::fs::remove_file(&shard.temporary);
        }
    }
}

/// Lets the system write to the disk while more is computed, so that the sync at the end has little left to do.
#[derive(Default)]
struct Flusher {
    pending: AtomicU64,
    running: Mutex<Option<JoinHandle<()>>>,
}

impl Flusher {
    /// Bytes after which a flush begins.
    const BYTES: u64 = 32 << 20;

    fn wrote(&self, bytes: usize, file: &File) {
        let pending = self.pending.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        if pending < Self::BYTES {
            return;
        }
        let Ok(mut running) = self.running.try_lock() else {
            return;
        };
        if running.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return;
        }
        let Ok(file) = file.try_clone() else { return };
        self.pending.store(0, Ordering::Relaxed);
        // An error is found again by the sync at the end.
        *running = std::thread::Builder::new()
            .name("checkpoint-flush".to_owned())
            .spawn(move || drop(file.sync_data()))
            .ok();
    }

    fn wait(&self) {
        let thread = self.running.lock().ok().and_then(|mut running| running.take());
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

/// The files of a plan, and what is in each of them.
fn shard_names(plan: &CheckpointPlan) -> (Vec<String>, Vec<Vec<(String, TensorInfo)>>) {
    let groups = split_shards(plan);
    let names = (1..=groups.len()).map(|number| match groups.len() {
        1 => SINGLE_FILE.to_owned(),
        count => format!("model-{number:05}-of-{count:05}.safetensors"),
    });
    (names.collect(), groups)
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
    use crate::checkpoint::TensorSource;

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
    fn a_draft_is_gone_on_with_if_the_plan_is_the_same() {
        for shard_bytes in [None, Some(40)] {
            let folder = tempfile::tempdir().unwrap();
            let plan = plan(shard_bytes);
            let (writer, resumed) = CheckpointWriter::draft(folder.path(), &plan).unwrap();
            assert!(!resumed);
            writer.write_at("a", 8, &[2; 16]).unwrap();
            writer.write_at("a", 0, &[1; 8]).unwrap();
            assert!(writer.write_at("a", 20, &[0; 5]).is_err());
            writer.sync().unwrap();
            drop(writer);
            let (mut writer, resumed) = CheckpointWriter::draft(folder.path(), &plan).unwrap();
            assert!(resumed);
            let reader = writer.reader().unwrap();
            assert_eq!(reader.bytes("a").unwrap()[6..10], [1, 1, 2, 2]);
            writer.keep("a").unwrap();
            for (name, info) in &plan.tensors[1..] {
                writer.write(name, &vec![7; info.byte_len()]).unwrap();
            }
            writer.finish().unwrap();
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            assert_eq!(
                checkpoint.bytes("a").unwrap()[..],
                [[1; 8], [2; 8], [2; 8]].concat()
            );

            let (_, resumed) = CheckpointWriter::draft(folder.path(), &plan).unwrap();
            assert!(!resumed, "finished files are no draft");
            let mut other = plan.clone();
            other.push("d", DType::U8, [3]);
            let (writer, resumed) = CheckpointWriter::draft(folder.path(), &other).unwrap();
            assert!(!resumed, "another plan");
            assert!(matches!(writer.finish(), Err(Error::MissingTensors { names, .. }) if names.len() == 4));
        }
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
