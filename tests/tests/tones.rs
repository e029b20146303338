//! The second tutorial's workflow on a small model: LoRA, merge, int4 graph; the graph names the tone of phrases that it
//! was not trained on.

use std::path::Path;
use std::sync::Arc;

use olive_core::data::{Sample, SampleScore};
use olive_core::decoder::{Cpu, score_samples};
use olive_core::text::TextTokenizer;
use olive_core::workflow::data::TextData;
use olive_core::workflow::engine::Engine;
use olive_core::workflow::plan::Plan;
use olive_core::workflow::registry::{EvaluatorRegistry, HfOpener, ModelOpener, PassRegistry};
use olive_core::workflow::schema::RunConfig;
use olive_core::workflow::schema::document::Document;
use olive_core::{CancelToken, ModelHandle, NoProgress, Progress, Result, fsio};
use olive_genai::evaluators::Scorer;
use olive_onnx::OnnxModel;
use olive_onnx::model::find_graph;
use olive_tests::{fixture, shared};
use serde_json::{Value, json};

/// What PEFT reaches in as many steps.
const AT_LEAST: f64 = 0.64;

struct Checkpoints;

impl Scorer for Checkpoints {
    fn score(
        &self,
        model: &dyn ModelHandle,
        samples: &[Sample],
        progress: &dyn Progress,
        cancel: &CancelToken,
    ) -> Result<Vec<SampleScore>> {
        score_samples::<Cpu>(model, samples, None, progress, cancel)
    }
}

struct Opener;

impl ModelOpener for Opener {
    fn open(&self, path: &Path, adapter: Option<&Path>) -> Result<Arc<dyn ModelHandle>> {
        match find_graph(path).is_ok() {
            true => Ok(Arc::new(OnnxModel::open(path)?)),
            false => HfOpener.open(path, adapter),
        }
    }
}

fn samples(data: &Value, model: &dyn ModelHandle) -> Result<Vec<Sample>> {
    TextData::read(data)?.samples(&TextTokenizer::open(model.path())?)
}

#[test]
fn the_second_tutorials_workflow_learns_to_tell_tones() {
    const NAME: &str = "tones of phrases";
    let (Some(model), Some(data)) = (
        shared(NAME, "models/small-phi3"),
        shared(NAME, "data/dataset-classification.json"),
    ) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let file = fixture("workflows/phrase-tones.json");
    let mut workflow: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    workflow["input_model"]["config"]["hf_config"]["model_name"] = json!(model);
    for config in workflow["data_configs"].as_array_mut().unwrap() {
        config["load_dataset_config"]["params"]["data_files"] = json!(data);
    }
    for key in ["cache_dir", "output_dir"] {
        workflow["engine"][key] = json!(folder.path().join(key));
    }
    let document = Document::from_value("phrase-tones.json", folder.path(), workflow);
    let mut passes = PassRegistry::new();
    olive_lora::register_passes(&mut passes, Arc::new(samples));
    olive_onnx::passes::register_passes(&mut passes);
    let mut evaluators = EvaluatorRegistry::new();
    olive_genai::evaluators::register_evaluators(&mut evaluators, Arc::new(Checkpoints));
    let plan = Plan::new(&RunConfig::from_document(&document).unwrap(), &passes).unwrap();
    let engine = Engine {
        passes: &passes,
        evaluators: &evaluators,
        opener: &Opener,
        progress: &NoProgress,
        cancel: &CancelToken::default(),
        device: "cpu",
        keep_runs: true,
    };
    let outcomes = engine.run(&plan).unwrap();
    assert_eq!(outcomes.len(), 1);
    let accuracy = |file: &str| {
        let metrics: Value = fsio::read_json(folder.path().join("output_dir").join(file)).unwrap();
        metrics["tone-accuracy_score"]["value"].as_f64().unwrap()
    };
    let (before, after) = (accuracy("input_model_metrics.json"), accuracy("metrics.json"));
    eprintln!("accuracy on held-out phrases: {before:.3} before, {after:.3} after");
    assert!(before < 0.5, "the model knew before: {before}");
    assert!(after >= AT_LEAST, "{after}");
}
