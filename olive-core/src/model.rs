//! [`ModelHandle`]: what every stage takes and gives.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::arch::{self, ModelSpec};
use crate::checkpoint::{Checkpoint, INDEX_FILE, TensorSource};
use crate::error::{Error, Result};
use crate::{fsio, weight};

/// The file that describes an output folder.
pub const MODEL_CONFIG_FILE: &str = "model_config.json";

/// What a model folder holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelKind {
    /// `config.json`, safetensors and tokenizer files.
    HuggingFace,
    /// `model.onnx`, its external data and `genai_config.json`.
    Onnx,
}

/// A hash of everything that defines a model: configs, tokenizer and every weight byte.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fingerprint(pub String);

/// A model on disk that a stage can read. Cheap to open; reads no weight until asked.
pub trait ModelHandle: Send + Sync {
    /// What the folder holds.
    fn kind(&self) -> ModelKind;
    /// The folder.
    fn path(&self) -> &Path;
    /// Sizes, positions, norms and layouts.
    fn spec(&self) -> &ModelSpec;
    /// The weights, by name.
    fn tensors(&self) -> &dyn TensorSource;
    /// The PEFT folder that goes with the model.
    fn adapter(&self) -> Option<&Path>;
    /// Hashes everything that defines the model.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read.
    fn fingerprint(&self) -> Result<Fingerprint>;
}

/// `model_config.json`: how Olive describes an output folder. Paths are relative to the file's own folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfigFile {
    /// `HfModel` or `ONNXModel`, compared without case.
    #[serde(rename = "type")]
    pub kind: String,
    /// `model_path`, `adapter_path`, `onnx_file_name`, `model_attributes`, …
    pub config: Map<String, Value>,
}

impl ModelConfigFile {
    /// Reads `folder/model_config.json`; `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Json`].
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(MODEL_CONFIG_FILE);
        if path.is_file() {
            fsio::read_json(&path).map(Some)
        } else {
            Ok(None)
        }
    }

    /// Writes `folder/model_config.json`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, folder: &Path) -> Result<()> {
        fsio::write_json(folder.join(MODEL_CONFIG_FILE), self, 4)
    }

    /// The path under `key`, resolved against `folder`; `None` if absent or null.
    pub fn path(&self, folder: &Path, key: &str) -> Option<PathBuf> {
        self.config
            .get(key)
            .and_then(Value::as_str)
            .map(|relative| folder.join(relative))
    }

    /// Whether it describes a Hugging Face model.
    pub fn is_hugging_face(&self) -> bool {
        self.kind.eq_ignore_ascii_case("hfmodel")
    }
}

/// A Hugging Face folder, with an optional adapter.
pub struct HfModel {
    path: PathBuf,
    spec: ModelSpec,
    checkpoint: Checkpoint,
    adapter: Option<PathBuf>,
}

impl HfModel {
    /// Opens a Hugging Face folder, or an output folder whose `model_config.json` names one (its adapter
    /// included).
    ///
    /// # Errors
    /// [`Error::File`] if it is neither; errors of [`arch::read_spec`] and [`Checkpoint::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !path.is_dir() {
            return Err(Error::file(path, "a model folder", "no such folder"));
        }
        if let Some(config) = ModelConfigFile::read(path)? {
            if !config.is_hugging_face() {
                return Err(Error::file(
                    path.join(MODEL_CONFIG_FILE),
                    "type HfModel",
                    config.kind,
                ));
            }
            let expected = "config.model_path, a path";
            let model = config
                .path(path, "model_path")
                .ok_or_else(|| Error::file(path.join(MODEL_CONFIG_FILE), expected, "none"))?;
            return Self::open_folder(&model, config.path(path, "adapter_path"));
        }
        Self::open_folder(path, None)
    }

    fn open_folder(path: &Path, adapter: Option<PathBuf>) -> Result<Self> {
        let spec = arch::read_spec(path)?;
        let checkpoint = Checkpoint::open(path)?;
        Ok(Self {
            path: path.to_path_buf(),
            spec,
            checkpoint,
            adapter,
        })
    }

    /// The same model with another adapter.
    pub fn with_adapter(mut self, adapter: impl Into<PathBuf>) -> Self {
        self.adapter = Some(adapter.into());
        self
    }

    /// Checks that a checkpoint has what its config promises and nothing that no part of the model reads: every
    /// dense tensor by name and shape, every packed linear by its parts.
    ///
    /// # Errors
    /// [`Error::MissingTensors`], [`Error::UnknownTensors`] or [`Error::Tensor`], naming all that are wrong.
    pub fn check_tensors(&self) -> Result<()> {
        let mut known = std::collections::BTreeSet::new();
        let mut absent = Vec::new();
        for (name, shape) in self.spec.dense_tensors() {
            let module = name.trim_end_matches(".weight");
            let quantization = self.spec.quantization.as_ref().filter(|_| shape.len() == 2);
            let dense = self.checkpoint.info(&name);
            if let Some(quantization) = quantization
                && let Some(parts) = weight::packed_parts(&self.checkpoint, quantization, module)?
            {
                let missing = |part: &&String| self.checkpoint.info(part).is_none();
                absent.extend(parts.required.iter().filter(missing).cloned());
                known.extend(parts.required);
                known.extend(parts.optional);
                continue;
            }
            match dense {
                Some(info) if info.shape != shape => {
                    return Err(Error::tensor(
                        name,
                        format!("shape {shape:?}"),
                        format!("{:?}", info.shape),
                    ));
                }
                Some(_) => _ = known.insert(name),
                None => absent.push(name),
            }
        }
        if !absent.is_empty() {
            return Err(Error::MissingTensors {
                path: self.path.clone(),
                names: absent,
            });
        }
        // Old Llama checkpoints store the inverse frequencies; tied ones may store the head again.
        let ignored = |name: &str| name.ends_with("rotary_emb.inv_freq") || name == "lm_head.weight";
        let unknown: Vec<String> = self
            .checkpoint
            .names()
            .into_iter()
            .filter(|name| !known.contains(*name) && !ignored(name))
            .map(str::to_owned)
            .collect();
        if !unknown.is_empty() {
            return Err(Error::UnknownTensors {
                path: self.path.clone(),
                names: unknown,
            });
        }
        Ok(())
    }

    /// The safetensors files, and the index of a sharded checkpoint.
    pub fn weight_files(&self) -> Vec<PathBuf> {
        let index = self.path.join(INDEX_FILE);
        let shards = self.checkpoint.files().map(Path::to_path_buf);
        shards.chain(index.is_file().then_some(index)).collect()
    }

    /// The files of a Hugging Face folder that go along with the weights: configs, tokenizer, chat template.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn companion_files(&self) -> Result<Vec<PathBuf>> {
        companion_files(&self.path)
    }
}

/// Files of a Hugging Face folder besides weights that an output folder carries on, sorted by name.
///
/// # Errors
/// [`Error::Io`].
pub fn companion_files(folder: &Path) -> Result<Vec<PathBuf>> {
    const NAMES: &[&str] = &[
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ];
    let present = NAMES
        .iter()
        .map(|name| folder.join(name))
        .filter(|path| path.is_file());
    Ok(present.collect())
}

impl ModelHandle for HfModel {
    fn kind(&self) -> ModelKind {
        ModelKind::HuggingFace
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn tensors(&self) -> &dyn TensorSource {
        &self.checkpoint
    }

    fn adapter(&self) -> Option<&Path> {
        self.adapter.as_deref()
    }

    fn fingerprint(&self) -> Result<Fingerprint> {
        let mut files = self.companion_files()?;
        files.extend(self.checkpoint.files().map(Path::to_path_buf));
        if let Some(adapter) = &self.adapter {
            files.push(adapter.join("adapter_config.json"));
            files.push(adapter.join("adapter_model.safetensors"));
        }
        fingerprint_files(&files)
    }
}

/// Hashes the names and bytes of `files`, in order.
///
/// # Errors
/// [`Error::Io`].
pub fn fingerprint_files(files: &[PathBuf]) -> Result<Fingerprint> {
    let mut hasher = blake3::Hasher::new();
    for path in files {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name);
        let mut file = blake3::Hasher::new();
        // Mapped and hashed by all threads: gigabytes of weights take a second.
        file.update_mmap_rayon(path).map_err(Error::io("read", path))?;
        hasher.update(file.finalize().as_bytes());
    }
    Ok(Fingerprint(hasher.finalize().to_hex().to_string()))
}
