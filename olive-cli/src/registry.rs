//! Everything that a workflow can call: the passes and evaluators of all crates, and what opens models.

mod graph_folder;
mod scorer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use olive_core::data::DataConfig;
use olive_core::text::TextTokenizer;
use olive_core::workflow::data::TextData;
use olive_core::workflow::registry::{EvaluatorRegistry, HfOpener, ModelOpener, PassRegistry};
use olive_core::{ModelHandle, Result, Sample};
use olive_genai::OrtSessionParamsTuning;
use olive_onnx::OnnxModel;
use olive_onnx::model::find_graph;
use olive_onnx::passes::CaptureSplitInfo;
use olive_quant::{CalibrationProvider, CalibrationSet};
use serde_json::Value;

use self::graph_folder::GraphFolder;
use self::scorer::CheckpointScorer;

/// Sequences of the built-in text, where the user gives no data.
pub const DEFAULT_SEQUENCES: usize = 32;
/// Tokens of each of them.
pub const DEFAULT_SEQUENCE_LENGTH: usize = 512;

/// All passes. `memory` is that of the device which models are split for, in bytes.
pub fn passes(memory: Option<u64>) -> PassRegistry {
    let mut registry = PassRegistry::new();
    let calibrate: CalibrationProvider = Arc::new(calibration);
    olive_quant::register_passes(&mut registry, &calibrate);
    olive_lora::register_passes(&mut registry, Arc::new(samples));
    olive_onnx::passes::register_passes(&mut registry);
    registry.register(Box::new(CaptureSplitInfo { memory }));
    registry.register(Box::new(OrtSessionParamsTuning));
    registry
}

/// All evaluators.
pub fn evaluators() -> EvaluatorRegistry {
    let mut registry = EvaluatorRegistry::new();
    olive_genai::evaluators::register_evaluators(&mut registry, Arc::new(CheckpointScorer));
    registry
}

/// The samples of a data config, tokenised for a model.
fn samples(data: &Value, model: &dyn ModelHandle) -> Result<Vec<Sample>> {
    TextData::read(data)?.samples(&TextTokenizer::open(model.path())?)
}

/// The calibration of a data config; without one, of the built-in text.
fn calibration(model: &dyn ModelHandle, data: Option<&Value>) -> Result<CalibrationSet> {
    let tokenizer = TextTokenizer::open(model.path())?;
    let sequences = match data {
        Some(data) => TextData::read(data)?.calibration(&tokenizer)?,
        None => {
            let length = DEFAULT_SEQUENCE_LENGTH.min(model.spec().max_position);
            DataConfig::default_calibration(&tokenizer, length, DEFAULT_SEQUENCES)?
        }
    };
    Ok(CalibrationSet::new(sequences))
}

/// Opens Hugging Face folders and ONNX folders, told apart by what they hold.
#[derive(Debug, Default, Clone, Copy)]
pub struct Opener;

impl ModelOpener for Opener {
    fn open(&self, path: &Path, adapter: Option<&Path>) -> Result<Arc<dyn ModelHandle>> {
        match is_onnx(path) {
            true => match path.join("config.json").is_file() || path.join("model/config.json").is_file() {
                true if find_graph(path).is_ok() => Ok(Arc::new(OnnxModel::open(path)?)),
                _ => Ok(Arc::new(GraphFolder::open(&graph_path(path))?)),
            },
            false => HfOpener.open(path, adapter),
        }
    }
}

/// The graph that a path means; the path itself where the model is in several graphs.
fn graph_path(path: &Path) -> PathBuf {
    find_graph(path).unwrap_or_else(|_| path.to_path_buf())
}

/// Whether a path is an ONNX file, a folder with some, or an output folder whose `model/` has some.
pub fn is_onnx(path: &Path) -> bool {
    let is_graph = |path: &Path| path.is_file() && path.extension().is_some_and(|e| e == "onnx");
    if !path.is_dir() {
        return is_graph(path);
    }
    let holds = |folder: &Path| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| is_graph(&entry.path()))
    };
    find_graph(path).is_ok() || holds(path) || holds(&path.join("model"))
}
