//! The output folder: `model/` with the checkpoint, `model_config.json`, the report.

use std::path::{Path, PathBuf};

use olive_core::model::ModelConfigFile;
use olive_core::{CheckpointWriter, Error, ModelHandle, ModelSpec, Result, TensorSource, fsio, model};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::encode::{self, Encoded};
use crate::options::QuantizeOptions;
use crate::report::{QuantizeReport, REPORT_FILE};
use crate::work::{WORK_FOLDER, WorkFolder, remove_dir};

/// The model's folder inside the output folder.
pub const MODEL_FOLDER: &str = "model";

/// Refuses to replace a `model` folder that no run of olive left there.
///
/// # Errors
/// [`Error::File`].
pub fn check_replaceable(output: &Path) -> Result<()> {
    let target = output.join(MODEL_FOLDER);
    let ours = output.join(model::MODEL_CONFIG_FILE).is_file() || WorkFolder::exists(output);
    if target.exists() && !ours {
        let found = "a folder that no earlier run has described in `model_config.json`";
        return Err(Error::file(target, "nothing, or an earlier result", found));
    }
    if output.exists() && !output.is_dir() {
        return Err(Error::file(output, "a folder", "a file"));
    }
    Ok(())
}

/// The checkpoint of a run as it grows inside the work folder: layers are added as they are finished.
pub struct Assembly {
    writer: CheckpointWriter,
    staging: PathBuf,
    /// Which layers were added.
    added: Vec<bool>,
    /// Whether what is outside the layers was.
    has_ends: bool,
}

impl Assembly {
    /// Without a layer; what an earlier run has begun is removed.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new(spec: &ModelSpec, options: &QuantizeOptions, work: &WorkFolder) -> Result<Self> {
        let staging = work.path("result");
        remove_dir(&staging)?;
        Ok(Self {
            writer: CheckpointWriter::create(&staging, &encode::plan(spec, options))?,
            staging,
            added: vec![false; spec.n_layers],
            has_ends: false,
        })
    }

    /// Adds what is outside the layers, once.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Tensor`] if a tensor does not fit half precision.
    pub fn add_ends(&mut self, handle: &dyn ModelHandle, options: &QuantizeOptions) -> Result<()> {
        if std::mem::replace(&mut self.has_ends, true) {
            return Ok(());
        }
        let (spec, source) = (handle.spec(), handle.tensors());
        let plan = encode::plan(spec, options);
        for (name, info) in plan.tensors.iter().filter(|(name, _)| !name.contains(".layers.")) {
            self.writer
                .write(name, &encode::stored_half(source, name, &info.shape)?)?;
        }
        Ok(())
    }

    /// Adds the tensors of a finished layer.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Tensor`] if the plan has no such tensor.
    pub fn add(&mut self, layer: usize, tensors: &[Encoded]) -> Result<()> {
        for (name, bytes) in tensors {
            self.writer.write(name, bytes)?;
        }
        if let Some(added) = self.added.get_mut(layer) {
            *added = true;
        }
        Ok(())
    }

    /// Adds what is missing, and puts the folder in place of an earlier one; the work folder is gone then.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Tensor`] if a tensor outside the layers does not fit half precision.
    pub fn finish(
        mut self,
        handle: &dyn ModelHandle,
        options: &QuantizeOptions,
        work: &WorkFolder,
        output: &Path,
        report: &QuantizeReport,
    ) -> Result<()> {
        self.add_ends(handle, options)?;
        let spec = handle.spec();
        // Layers of an earlier run.
        for index in (0..spec.n_layers).filter(|index| !self.added[*index]) {
            let layer = work.layer(index)?;
            for (name, _) in encode::layer_plan(spec, options, index).tensors {
                self.writer.write(&name, &layer.bytes(&name)?)?;
            }
        }
        self.writer.finish()?;
        for file in model::companion_files(handle.path())? {
            let target = self.staging.join(file.file_name().unwrap_or_default());
            if target.ends_with("config.json") {
                fsio::write_json(&target, &quantized_config(&fsio::read_json(&file)?, options), 2)?;
            } else {
                fsio::write(&target, &fsio::read(&file)?)?;
            }
        }
        place(work, &self.staging, output, report, None)
    }
}

/// Puts the finished folder `staging` of `work` in place of an earlier one, with the report and what passes have
/// written down about the model; the work folder is gone then.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn place(
    work: &WorkFolder,
    staging: &Path,
    output: &Path,
    report: &impl Serialize,
    attributes: Option<Value>,
) -> Result<()> {
    swap(&work.path("replaced"), staging, output)?;
    fsio::write_json(output.join(REPORT_FILE), report, 2)?;
    model_config(attributes).write(output)?;
    work.clear()
}

/// As [`place`], for a folder that `fill` makes in one go, without a report.
///
/// # Errors
/// [`Error::Io`]; those of `fill`.
pub(crate) fn place_folder(
    output: &Path,
    attributes: Option<Value>,
    fill: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let root = output.join(WORK_FOLDER);
    remove_dir(&root)?;
    let staging = root.join("result");
    fsio::create_dir(&staging)?;
    let placed = fill(&staging).and_then(|()| {
        swap(&root.join("replaced"), &staging, output)?;
        model_config(attributes).write(output)
    });
    let cleared = remove_dir(&root);
    placed.and(cleared)
}

fn swap(replaced: &Path, staging: &Path, output: &Path) -> Result<()> {
    let target = output.join(MODEL_FOLDER);
    remove_dir(replaced)?;
    if target.exists() {
        fsio::rename(&target, replaced)?;
    }
    fsio::rename(staging, &target)
}

/// The model's own `config.json` with half precision and the quantization that AutoAWQ 0.2.9 writes.
fn quantized_config(config: &Map<String, Value>, options: &QuantizeOptions) -> Map<String, Value> {
    let mut config = config.clone();
    let excluded = &options.modules_to_not_convert;
    let quantization = json!({
        "bits": options.bits,
        "group_size": options.group_size,
        "modules_to_not_convert": if excluded.is_empty() { Value::Null } else { json!(excluded) },
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": options.zero_point,
    });
    config.insert("quantization_config".to_owned(), quantization);
    config.insert("torch_dtype".to_owned(), "float16".into());
    if let Some(dtype) = config.get_mut("dtype") {
        *dtype = "float16".into();
    }
    config
}

/// `model_config.json` of a Hugging Face model in `model/`.
pub(crate) fn model_config(attributes: Option<Value>) -> ModelConfigFile {
    let config = json!({
        "model_path": MODEL_FOLDER,
        "task": "text-generation-with-past",
        "load_kwargs": {
            "torch_dtype": null,
            "device_map": null,
            "max_memory": null,
            "quantization_method": null,
            "quantization_config": null,
            "trust_remote_code": false,
            "extra_args": {},
        },
        "generative": true,
        "model_attributes": attributes,
        "io_config": null,
    });
    ModelConfigFile {
        kind: "HfModel".to_owned(),
        config: match config {
            Value::Object(config) => config,
            _ => Map::new(),
        },
    }
}
