//! The model folder: graph, weights, adapter, `genai_config.json` and tokenizer, staged beside its name and then given
//! it whole; and Olive's `model_config.json` in the folder around it.

mod genai_config;
mod ort_package;
mod staging;
mod tokenizer;

pub use genai_config::genai_config;
pub use ort_package::{PACKAGE_SUFFIX, PackageInfo, write_ort_package};
pub use tokenizer::chat_template;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use olive_core::{
    CancelToken, DType, Error, HfModel, ModelConfigFile, ModelHandle, ModelKind, Progress, Result, fsio,
};
use serde_json::{Map, Value, json};

use crate::adapter::{
    ADAPTER_FILE, AdapterFile, PeftAdapter, adapter_parameters, lora_targets, write_adapter,
};
use crate::build::{BuilderOptions, LoraTargets, build_graph};
use crate::ir::Model;
use crate::model::GENAI_CONFIG_FILE;
use crate::serde::{WriteOptions, write_model};
use staging::Staging;

/// What a build will write, known before any weight is read.
pub struct BuildPlan {
    source: Arc<HfModel>,
    model: Model,
    adapter: Option<AdapterFile>,
    genai_config: Value,
    filename: String,
    config_only: bool,
}

/// What a build wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildReport {
    /// The folder with `model.onnx`.
    pub folder: PathBuf,
    /// Nodes of the graph.
    pub nodes: usize,
    /// Bytes of `model.onnx` and its data.
    pub model_bytes: u64,
    /// Adapter file with its bytes and the number of its tensors.
    pub adapter: Option<(PathBuf, u64, usize)>,
}

/// Checks a checkpoint, an adapter and options, and lays out the folder that they make. Reads no weight.
///
/// # Errors
/// Whatever is wrong with the model, the adapter or the options, naming the tensor, module or key.
pub fn plan_model_folder(
    model: &dyn ModelHandle,
    adapter: Option<&Path>,
    options: &BuilderOptions,
) -> Result<BuildPlan> {
    if model.kind() != ModelKind::HuggingFace {
        let found = "an ONNX model, which is built already";
        return Err(Error::file(model.path(), "a Hugging Face model", found));
    }
    let source = Arc::new(HfModel::open(model.path())?);
    let peft = adapter.map(PeftAdapter::open).transpose()?.map(Arc::new);
    let spec = source.spec();
    let targets = match &peft {
        Some(peft) => lora_targets(peft, spec)?,
        None => LoraTargets::default(),
    };
    // The runtime hands an adapter's weights to the graph as they are.
    let dtype = options.io_type().to_core().unwrap_or(DType::F32);
    let parameters = peft
        .map(|peft| adapter_parameters(&peft, spec, dtype))
        .transpose()?;
    Ok(BuildPlan {
        model: build_graph(&source, options, &targets)?,
        adapter: parameters.map(|parameters| AdapterFile {
            parameters,
            ..AdapterFile::default()
        }),
        genai_config: genai_config(source.path(), spec, options)?,
        source,
        filename: options.filename.clone(),
        config_only: options.config_only,
    })
}

impl BuildPlan {
    /// The graph that will be written.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Bytes of the weights that will be written, the adapter's included; the graph itself adds little.
    pub fn weight_bytes(&self) -> u64 {
        let adapter = self.adapter.iter().flat_map(|adapter| &adapter.parameters);
        let tensors = self.model.graph.initializers.iter().chain(adapter);
        tensors.map(|tensor| tensor.byte_len() as u64).sum()
    }

    /// An upper bound of the memory that writing takes: the largest linear as `f32`, once as it is stored and once as
    /// it is written.
    pub fn memory_bytes(&self) -> u64 {
        let spec = self.source.spec();
        let linears = spec
            .linears(0)
            .into_iter()
            .map(|linear| linear.in_features * linear.out_features);
        let largest = linears
            .chain([spec.vocab_size * spec.hidden_size])
            .max()
            .unwrap_or(0);
        2 * 4 * largest as u64
    }

    /// Writes the folder. `output` is the folder that will hold `model.onnx`; one that exists is replaced as a whole.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Cancelled`] or an error of a weight; `output` is what it was then.
    pub fn write(&self, output: &Path, progress: &dyn Progress, cancel: &CancelToken) -> Result<BuildReport> {
        let staging = Staging::begin(output)?;
        let folder = staging.path();
        tokenizer::copy(self.source.path(), folder)?;
        fsio::write_json(folder.join(GENAI_CONFIG_FILE), &self.genai_config, 4)?;
        let mut adapter = None;
        if let Some(file) = &self.adapter {
            let bytes = write_adapter(&folder.join(ADAPTER_FILE), file)?;
            adapter = Some((output.join(ADAPTER_FILE), bytes, file.parameters.len()));
        }
        let options = WriteOptions {
            graph_file: &self.filename,
            progress,
            cancel,
        };
        let model_bytes = match self.config_only {
            true => 0,
            false => write_model(&self.model, folder, &options)?,
        };
        cancel.check()?;
        staging.finish()?;
        self.write_model_config(output)?;
        Ok(BuildReport {
            folder: output.to_path_buf(),
            nodes: self.model.graph.nodes.len(),
            model_bytes,
            adapter,
        })
    }

    /// Olive's description, in the folder around `output`.
    fn write_model_config(&self, output: &Path) -> Result<()> {
        let (Some(parent), Some(name)) = (output.parent(), output.file_name().and_then(|name| name.to_str()))
        else {
            return Ok(());
        };
        let mut attributes: Map<String, Value> = fsio::read_json(self.source.path().join("config.json"))?;
        // What earlier stages noted about the model, such as its splits.
        let noted = ModelConfigFile::read(self.source.path())?
            .and_then(|mut file| file.config.shift_remove("model_attributes"));
        if let Some(Value::Object(noted)) = noted {
            attributes.extend(noted);
        }
        let mut config = Map::new();
        let constants = self.adapter.as_ref().map(|_| ADAPTER_FILE);
        for (key, value) in [
            ("model_path", json!(name)),
            ("onnx_file_name", json!(self.filename)),
            ("inference_settings", Value::Null),
            ("use_ort_extensions", json!(false)),
            ("external_initializers_file_name", Value::Null),
            ("constant_inputs_file_name", json!(constants)),
            ("generative", json!(false)),
            ("model_attributes", Value::Object(attributes)),
        ] {
            config.insert(key.to_owned(), value);
        }
        let file = ModelConfigFile {
            kind: "ONNXModel".to_owned(),
            config,
        };
        let parent = if parent.as_os_str().is_empty() {
            Path::new(".")
        } else {
            parent
        };
        file.write(parent)
    }
}

/// Builds the model folder `output` from a checkpoint, with the places and the file of an adapter if one is given.
///
/// # Errors
/// As [`plan_model_folder`] and [`BuildPlan::write`].
pub fn build_model_folder(
    model: &dyn ModelHandle,
    adapter: Option<&Path>,
    options: &BuilderOptions,
    output: &Path,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<BuildReport> {
    plan_model_folder(model, adapter, options)?.write(output, progress, cancel)
}
