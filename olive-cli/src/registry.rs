//! Everything that a workflow can call: the passes and evaluators of all crates, and what opens models.

mod scorer;

use std::path::Path;
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
use olive_quant::{AutoAwqQuantizer, CalibrationSet, Rtn};
use serde_json::Value;

pub use scorer::CheckpointScorer;

/// Sequences of the built-in text, where the user gives no data.
pub const DEFAULT_SEQUENCES: usize = 32;
/// Tokens of each of them.
pub const DEFAULT_SEQUENCE_LENGTH: usize = 512;

/// All passes. `memory` is that of the device which models are split for, in bytes.
pub fn passes(memory: Option<u64>) -> PassRegistry {
    let mut registry = PassRegistry::new();
    registry.register(Box::new(AutoAwqQuantizer::new(Arc::new(calibration))));
    registry.register(Box::new(Rtn));
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
            true => Ok(Arc::new(OnnxModel::open(path)?)),
            false => HfOpener.open(path, adapter),
        }
    }
}

/// Whether a path is an ONNX file, a folder with one, or an output folder whose `model/` has one.
pub fn is_onnx(path: &Path) -> bool {
    let file = path.is_file() && path.extension().is_some_and(|e| e == "onnx");
    file || (path.is_dir() && find_graph(path).is_ok())
}
