//! A folder with an ONNX model, opened: the graph, its constants by name, and `genai_config.json` beside it.

pub mod pipeline;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use olive_core::model::fingerprint_files;
use olive_core::{
    Error, Fingerprint, ModelConfigFile, ModelHandle, ModelKind, ModelSpec, Result, TensorInfo, TensorSource,
    arch, fsio,
};
use serde_json::Value;

use crate::ir::{Graph, Model, Tensor, ValueInfo};
use crate::serde::read_model;

/// The usual name of the graph file.
pub const GRAPH_FILE: &str = "model.onnx";
/// What the runtime reads about a model folder.
pub const GENAI_CONFIG_FILE: &str = "genai_config.json";

/// A model folder: the graph is read, its constants are mapped.
pub struct OnnxFolder {
    path: PathBuf,
    graph_path: PathBuf,
    model: Model,
    genai_config: Option<Value>,
}

impl OnnxFolder {
    /// Opens `model.onnx` of a folder (or the file that `genai_config.json` or `model_config.json` names), of its
    /// subfolder `model`, or an ONNX file itself. The stages of a split model are joined into one graph.
    ///
    /// # Errors
    /// [`Error::File`] if there is no ONNX model; errors of [`read_model`]; a rule of the graph that is broken.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let graph_path = find_graph(path.as_ref())?;
        let folder = graph_path.parent().unwrap_or(Path::new("")).to_path_buf();
        let config_path = folder.join(GENAI_CONFIG_FILE);
        let genai_config: Option<Value> = match config_path.is_file() {
            true => Some(fsio::read_json(&config_path)?),
            false => None,
        };
        let stages = match &genai_config {
            Some(config) if !path.as_ref().is_file() => pipeline::read(&folder, config)?,
            _ => Vec::new(),
        };
        let mut model = match stages.is_empty() {
            true => read_model(&graph_path)?,
            false => pipeline::join(&stages)?,
        };
        drop_repeated_inputs(&mut model.graph);
        model.graph.check()?;
        Ok(Self {
            path: folder,
            graph_path,
            model,
            genai_config,
        })
    }

    /// The folder that holds the graph file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The graph file; the first of several.
    pub fn graph_path(&self) -> &Path {
        &self.graph_path
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The model, to be kept or changed.
    pub fn into_model(self) -> Model {
        self.model
    }

    /// `genai_config.json`, if there is one.
    pub fn genai_config(&self) -> Option<&Value> {
        self.genai_config.as_ref()
    }
}

/// A model folder as stages take and give it. Sizes come from the `config.json` that the builder leaves beside the
/// graph; a folder without one can be run, but not handed to a stage.
pub struct OnnxModel {
    folder: OnnxFolder,
    spec: ModelSpec,
    constants: Constants,
}

impl OnnxModel {
    /// Opens a model folder as [`OnnxFolder::open`] does.
    ///
    /// # Errors
    /// As [`OnnxFolder::open`]; [`Error::Io`] or [`Error::Config`] if there is no sound `config.json`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let folder = OnnxFolder::open(path)?;
        Ok(Self {
            spec: arch::read_spec(folder.path())?,
            constants: Constants::new(&folder),
            folder,
        })
    }

    /// The opened folder.
    pub fn folder(&self) -> &OnnxFolder {
        &self.folder
    }
}

impl ModelHandle for OnnxModel {
    fn kind(&self) -> ModelKind {
        ModelKind::Onnx
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn tensors(&self) -> &dyn TensorSource {
        &self.constants
    }

    fn adapter(&self) -> Option<&Path> {
        None
    }

    fn fingerprint(&self) -> Result<Fingerprint> {
        let folder = self.folder.path();
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(Error::io("list", folder))? {
            let path = entry.map_err(Error::io("list", folder))?.path();
            let hidden = path
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            if path.is_file() && !hidden {
                files.push(path);
            }
        }
        files.sort();
        fingerprint_files(&files)
    }
}

/// The initializers of a graph whose element types olive-core has.
struct Constants {
    origin: PathBuf,
    tensors: BTreeMap<String, (TensorInfo, Tensor)>,
}

impl Constants {
    fn new(folder: &OnnxFolder) -> Self {
        let entry = |tensor: &Tensor| {
            let dtype = tensor.dtype().to_core()?;
            let shape = tensor.shape().to_vec();
            Some((tensor.name.clone(), (TensorInfo { dtype, shape }, tensor.clone())))
        };
        Self {
            origin: folder.graph_path().to_path_buf(),
            tensors: folder
                .model()
                .graph
                .initializers
                .iter()
                .filter_map(entry)
                .collect(),
        }
    }
}

impl TensorSource for Constants {
    fn origin(&self) -> &Path {
        &self.origin
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info)
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        let (_, tensor) = self.tensors.get(name).ok_or_else(|| Error::MissingTensors {
            path: self.origin.clone(),
            names: vec![name.to_owned()],
        })?;
        tensor.bytes()
    }
}

/// Olive's own extraction of adapters lists each adapter input twice, which ONNX Runtime lets pass: an input that
/// repeats an earlier one exactly is dropped.
fn drop_repeated_inputs(graph: &mut Graph) {
    let mut seen: HashMap<String, ValueInfo> = HashMap::new();
    graph.inputs.retain(|input| match seen.get(&input.name) {
        Some(first) if first == input => {
            tracing::warn!("input `{}` is listed twice", input.name);
            false
        }
        Some(_) => true,
        None => {
            seen.insert(input.name.clone(), input.clone());
            true
        }
    });
}

/// The ONNX file that `path` means.
///
/// # Errors
/// [`Error::File`] if there is none, naming what was looked for.
pub fn find_graph(path: &Path) -> Result<PathBuf> {
    if path.is_file() {
        return Ok(path.to_path_buf());
    }
    if !path.is_dir() {
        return Err(Error::file(path, "a folder with an ONNX model", "no such folder"));
    }
    if let Some(found) = graph_in(path)? {
        return Ok(found);
    }
    if let Some(config) = ModelConfigFile::read(path)? {
        if config.is_hugging_face() {
            return Err(Error::file(path, "an ONNX model", "a Hugging Face model"));
        }
        let expected = "config.model_path, a path";
        let target = config.path(path, "model_path");
        let target = target.ok_or_else(|| Error::file(path.join("model_config.json"), expected, "none"))?;
        let named = config.config.get("onnx_file_name").and_then(Value::as_str);
        let found = match named.filter(|_| target.is_dir()) {
            Some(name) => Some(fsio::contained(&target, name)?).filter(|file| file.is_file()),
            None if target.is_file() => Some(target.clone()),
            None => graph_in(&target)?,
        };
        // A folder that was moved may name its old place; the graph is still beside the description then.
        let found = match found {
            Some(found) => Some(found),
            None => graph_in(&path.join("model"))?,
        };
        return found.ok_or_else(|| Error::file(&target, "an ONNX model", "none"));
    }
    graph_in(&path.join("model"))?.ok_or_else(|| {
        Error::file(
            path,
            format!("`{GRAPH_FILE}`, or a folder `model` with one"),
            "neither",
        )
    })
}

/// The graph file of a model folder: as its `genai_config.json` says, else `model.onnx`.
fn graph_in(folder: &Path) -> Result<Option<PathBuf>> {
    let config = folder.join(GENAI_CONFIG_FILE);
    let mut name = GRAPH_FILE.to_owned();
    if config.is_file() {
        let value: Value = fsio::read_json(&config)?;
        if let Some(given) = value.pointer("/model/decoder/filename").and_then(Value::as_str) {
            given.clone_into(&mut name);
        } else if let Some(first) = pipeline::stages(folder, &value)?.into_iter().next() {
            name = first;
        }
    }
    Ok(Some(fsio::contained(folder, &name)?).filter(|path| path.is_file()))
}
