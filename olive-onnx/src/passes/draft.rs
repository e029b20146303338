//! A model folder in memory: what a pass changes, and how it becomes a folder again.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use olive_core::{CancelToken, Error, ModelConfigFile, Progress, Result, fsio};
use serde_json::{Map, Value};

use crate::adapter::{ADAPTER_FILE, AdapterFile, write_adapter};
use crate::ir::{Graph, Model};
use crate::model::{GENAI_CONFIG_FILE, GRAPH_FILE, find_graph, pipeline};
use crate::serde::{WriteOptions, read_model, write_model};

/// A model folder while passes work on it.
pub struct Draft {
    /// The graph with its constants.
    pub model: Model,
    /// `genai_config.json`, if there is one.
    pub genai_config: Option<Value>,
    /// `model_attributes` of `model_config.json`: what earlier stages noted about the model.
    pub attributes: Map<String, Value>,
    /// An adapter that a pass took out of the graph.
    pub adapter: Option<AdapterFile>,
    /// Graphs that replace the one graph, with their file names, in the order in which they run; empty where it was
    /// not split.
    pub parts: Vec<(String, Model)>,
    /// The graphs as they were read, of a model that is split already; [`Draft::model`] is all of them joined.
    pub stages: Vec<(String, Model)>,
    companions: Vec<PathBuf>,
    folder: PathBuf,
}

impl Draft {
    /// Reads a model folder (or an ONNX file); constants stay in their files until they are asked for. The graph is
    /// not checked, so that a pass can repair one.
    ///
    /// # Errors
    /// As [`find_graph`] and [`read_model`].
    pub fn open(path: &Path) -> Result<Self> {
        let graph_path = find_graph(path)?;
        let folder = graph_path.parent().unwrap_or(Path::new("")).to_path_buf();
        let config_path = folder.join(GENAI_CONFIG_FILE);
        let genai_config: Option<Value> = match config_path.is_file() {
            true => Some(fsio::read_json(&config_path)?),
            false => None,
        };
        let stages = match &genai_config {
            Some(config) if !path.is_file() => pipeline::read(&folder, config)?,
            _ => Vec::new(),
        };
        let mut model = match stages.is_empty() {
            true => read_model(&graph_path)?,
            false => pipeline::join(&stages)?,
        };
        drop_repeated_inputs(&mut model.graph);
        let graph_paths: Vec<PathBuf> = match stages.is_empty() {
            true => vec![graph_path],
            false => stages.iter().map(|(name, _)| folder.join(name)).collect(),
        };
        let graphs = stages.iter().map(|(_, stage)| &stage.graph).chain([&model.graph]);
        let companions = companions(&folder, graph_paths, graphs)?;
        Ok(Self {
            attributes: attributes(&folder)?,
            model,
            genai_config,
            adapter: None,
            parts: Vec::new(),
            stages,
            companions,
            folder,
        })
    }

    /// A model without a folder.
    pub fn of(model: Model) -> Self {
        Self {
            model,
            genai_config: None,
            attributes: Map::new(),
            adapter: None,
            parts: Vec::new(),
            stages: Vec::new(),
            companions: Vec::new(),
            folder: PathBuf::new(),
        }
    }

    /// Writes the folder: companion files first, then the graph with its data, `genai_config.json` last.
    ///
    /// # Errors
    /// [`Error::File`] if `output` is the folder it was read from; errors of the tensors' producers; [`Error::Io`];
    /// [`Error::Cancelled`].
    pub fn write(&self, output: &Path, progress: &dyn Progress, cancel: &CancelToken) -> Result<()> {
        fsio::create_dir(output)?;
        let same = |path: &Path| std::fs::canonicalize(path).ok();
        if same(output).is_some_and(|output| same(&self.folder) == Some(output)) {
            return Err(Error::file(
                output,
                "an output folder of its own",
                "the model's own folder",
            ));
        }
        for file in &self.companions {
            let name = file.file_name().unwrap_or_default();
            if self.adapter.is_some() && name == ADAPTER_FILE {
                continue;
            }
            fsio::link_or_copy(file, &output.join(name))?;
        }
        if let Some(adapter) = &self.adapter {
            write_adapter(&output.join(ADAPTER_FILE), adapter)?;
        }
        let write = |model: &Model, graph_file: &str| {
            write_model(
                model,
                output,
                &WriteOptions {
                    graph_file,
                    progress,
                    cancel,
                },
            )
            .map(|_| ())
        };
        match self.parts.is_empty() {
            true => write(&self.model, GRAPH_FILE)?,
            false => self
                .parts
                .iter()
                .try_for_each(|(file, model)| write(model, file))?,
        }
        if !self.attributes.is_empty() {
            let config = [
                ("model_path".to_owned(), Value::from(".")),
                (
                    "model_attributes".to_owned(),
                    Value::Object(self.attributes.clone()),
                ),
            ];
            let file = ModelConfigFile {
                kind: "ONNXModel".to_owned(),
                config: config.into_iter().collect(),
            };
            file.write(output)?;
        }
        if let Some(config) = &self.genai_config {
            let mut config = config.clone();
            if self.parts.is_empty() {
                name_one_graph(&mut config);
            }
            fsio::write_json(output.join(GENAI_CONFIG_FILE), &config, 4)?;
        }
        Ok(())
    }
}

/// Lets the runtime's config name the one graph that is written, in place of a pipeline if there was one.
fn name_one_graph(config: &mut Value) {
    let Some(Value::Object(decoder)) = config.pointer_mut("/model/decoder") else {
        return;
    };
    let split = decoder.shift_remove("pipeline").is_some();
    if split || decoder.contains_key("filename") {
        decoder.insert("filename".to_owned(), Value::from(GRAPH_FILE));
    }
    if let Some(kind) = config.pointer_mut("/model/type")
        && split
    {
        // What the model was called before it was split is not noted; this is any decoder.
        *kind = Value::from("decoder");
    }
}

/// Files of the folder that go along as they are: everything but the graph, its data, and what is written anew.
fn companions<'a>(
    folder: &Path,
    graph_paths: Vec<PathBuf>,
    graphs: impl Iterator<Item = &'a Graph>,
) -> Result<Vec<PathBuf>> {
    let mut own: BTreeSet<PathBuf> = graphs
        .flat_map(|graph| &graph.initializers)
        .filter_map(|tensor| tensor.mapped_file().map(Path::to_path_buf))
        .collect();
    own.extend(graph_paths);
    for name in [GENAI_CONFIG_FILE, "model_config.json"] {
        own.insert(folder.join(name));
    }
    let listing = if folder.as_os_str().is_empty() {
        Path::new(".")
    } else {
        folder
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(listing).map_err(Error::io("read folder", listing))? {
        let path = folder.join(entry.map_err(Error::io("read folder", listing))?.file_name());
        let hidden = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if path.is_file() && !hidden && !own.contains(&path) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// `model_attributes` of the `model_config.json` in the folder, or beside it where the folder is Olive's `model`.
fn attributes(folder: &Path) -> Result<Map<String, Value>> {
    let mut config = ModelConfigFile::read(folder)?;
    if config.is_none()
        && folder.file_name().is_some_and(|name| name == "model")
        && let Some(parent) = folder.parent()
    {
        config = ModelConfigFile::read(parent)?;
    }
    let found = config.and_then(|config| config.config.get("model_attributes").cloned());
    Ok(match found {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    })
}

/// Olive's own extraction of adapters lists each adapter input twice: the second is dropped.
fn drop_repeated_inputs(graph: &mut Graph) {
    let mut seen = std::collections::HashSet::new();
    graph.inputs.retain(|input| seen.insert(input.name.clone()));
}
