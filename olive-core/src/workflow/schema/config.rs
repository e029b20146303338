//! The typed form of a workflow file.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::location::Location;

/// Another part of the document by name, or the part itself.
#[derive(Debug, Clone, PartialEq)]
pub enum Reference<T> {
    /// Its name.
    Name(String),
    /// It stands here.
    Inline(Box<T>),
}

/// A workflow.
#[derive(Debug, Clone)]
pub struct RunConfig {
    /// The file, as errors name it.
    pub origin: String,
    /// What relative paths are relative to.
    pub folder: PathBuf,
    /// Names the folder of this workflow inside the cache.
    pub workflow_id: String,
    /// The model that the first pass takes.
    pub input_model: ModelSource,
    /// Systems by name.
    pub systems: Vec<(String, System)>,
    /// Data configs; their names are unique.
    pub data_configs: Vec<DataConfig>,
    /// Evaluators by name.
    pub evaluators: Vec<(String, EvaluatorConfig)>,
    /// How it is run.
    pub engine: EngineConfig,
    /// Passes by name, in order; more than one entry are alternatives.
    pub passes: Vec<(String, Vec<PassEntry>)>,
    /// Several pipelines out of the passes of one file, by name.
    pub builds: Vec<(String, Build)>,
    /// A system that the whole workflow is sent to.
    pub workflow_host: Option<Reference<System>>,
    /// What the user should know, one line each: legacy keys, keys without effect.
    pub warnings: Vec<String>,
    /// The document in today's spelling.
    pub document: Value,
}

/// What kind of model a model config describes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelType {
    /// A Hugging Face folder or repository.
    Hf,
    /// A PyTorch module.
    PyTorch,
    /// An ONNX file or folder.
    Onnx,
    /// Several models that belong together.
    Composite,
    /// Another of Olive's types; it can be planned with.
    Other(String),
}

impl ModelType {
    /// Olive's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Hf => "HfModel",
            Self::PyTorch => "PyTorchModel",
            Self::Onnx => "ONNXModel",
            Self::Composite => "CompositeModel",
            Self::Other(name) => name,
        }
    }
}

/// A model that a workflow starts from.
#[derive(Debug, Clone)]
pub struct ModelSource {
    /// Its kind.
    pub kind: ModelType,
    /// Where it is.
    pub path: Option<Location>,
    /// Where its adapter is.
    pub adapter: Option<Location>,
    /// The task, `text-generation-with-past` where none is given.
    pub task: String,
    /// How it is loaded: `torch_dtype`, `revision`, …
    pub load_kwargs: Map<String, Value>,
    /// What is known about it.
    pub attributes: Map<String, Value>,
    /// The file of an ONNX folder.
    pub onnx_file_name: Option<String>,
    /// The parts of a composite model.
    pub components: Vec<ModelSource>,
}

/// Where passes run or models are meant to run.
#[derive(Debug, Clone, PartialEq)]
pub struct System {
    /// Its kind.
    pub kind: SystemKind,
    /// Its accelerator.
    pub accelerator: Accelerator,
    /// Its other keys.
    pub settings: Map<String, Value>,
}

impl Default for System {
    fn default() -> Self {
        Self {
            kind: SystemKind::Local,
            accelerator: Accelerator::default(),
            settings: Map::new(),
        }
    }
}

/// Kinds of systems.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SystemKind {
    /// This machine.
    Local,
    /// Another Python environment of this machine.
    PythonEnvironment,
    /// A container.
    Docker,
    /// A compute of Azure Machine Learning.
    AzureMl,
}

impl SystemKind {
    /// Olive's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "LocalSystem",
            Self::PythonEnvironment => "PythonEnvironment",
            Self::Docker => "Docker",
            Self::AzureMl => "AzureML",
        }
    }
}

/// A device and the execution provider that drives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accelerator {
    /// `cpu`, `gpu` or `npu`.
    pub device: String,
    /// `CPUExecutionProvider`, `CUDAExecutionProvider`, …
    pub provider: String,
}

impl Default for Accelerator {
    fn default() -> Self {
        Self {
            device: "cpu".to_owned(),
            provider: "CPUExecutionProvider".to_owned(),
        }
    }
}

impl std::fmt::Display for Accelerator {
    /// `cpu-cpu`, `gpu-cuda`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let provider = self
            .provider
            .trim_end_matches("ExecutionProvider")
            .to_ascii_lowercase();
        write!(f, "{}-{provider}", self.device)
    }
}

/// Where samples come from.
#[derive(Debug, Clone, PartialEq)]
pub struct DataConfig {
    /// What other parts call it.
    pub name: String,
    /// `HuggingfaceContainer`, `DummyDataContainer`, …
    pub kind: Option<String>,
    /// `data_name`, `data_files`, `split`, … with absolute paths.
    pub load_dataset: Map<String, Value>,
    /// `strategy`, `max_seq_len`, `text_template`, …
    pub pre_process: Map<String, Value>,
    /// Rarely anything.
    pub post_process: Map<String, Value>,
    /// `batch_size`, …
    pub dataloader: Map<String, Value>,
    /// Files and folders here that the rows come from.
    pub files: Vec<PathBuf>,
    /// Files that are kept in Azure.
    pub remote: Vec<Location>,
}

impl DataConfig {
    /// The config as a pass is given it: an object in today's spelling.
    pub fn to_value(&self) -> Value {
        let mut object = Map::new();
        object.insert("name".to_owned(), json!(self.name));
        if let Some(kind) = &self.kind {
            object.insert("type".to_owned(), json!(kind));
        }
        for (key, part) in [
            ("load_dataset_config", &self.load_dataset),
            ("pre_process_data_config", &self.pre_process),
            ("post_process_data_config", &self.post_process),
            ("dataloader_config", &self.dataloader),
        ] {
            if !part.is_empty() {
                object.insert(key.to_owned(), Value::Object(part.clone()));
            }
        }
        Value::Object(object)
    }
}

/// What a model is measured by.
#[derive(Debug, Clone)]
pub struct EvaluatorConfig {
    /// `LMEvaluator`, `OnnxEvaluator`, …; `None` for metrics on any model.
    pub kind: Option<String>,
    /// What is measured.
    pub metrics: Vec<MetricSpec>,
}

/// One metric.
#[derive(Debug, Clone)]
pub struct MetricSpec {
    /// Its name in reports.
    pub name: String,
    /// `accuracy`, `latency`, `throughput`, `size_on_disk`, `custom`, or `tasks` for an evaluator on tasks.
    pub kind: String,
    /// The values that it gives.
    pub sub_types: Vec<SubType>,
    /// What it is measured on.
    pub data: Option<Reference<DataConfig>>,
    /// Its other keys: `user_config`, or what an evaluator on tasks was given.
    pub settings: Map<String, Value>,
}

/// A value that a metric gives.
#[derive(Debug, Clone)]
pub struct SubType {
    /// `perplexity`, `accuracy_score`, `avg`, `bytes`, …
    pub name: String,
    /// Its rank as an objective, 1 first; none is not an objective.
    pub priority: Option<u32>,
    /// Whether more is better.
    pub higher_is_better: bool,
    /// What must be reached.
    pub goal: Option<Goal>,
    /// `warmup_num`, `repeat_test_num`, …
    pub config: Map<String, Value>,
}

/// What an objective must reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Goal {
    /// How the value is meant.
    pub kind: GoalKind,
    /// The value.
    pub value: f64,
}

/// How the value of a goal is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GoalKind {
    /// At least (at most, where less is better) the value.
    Threshold,
    /// Better than the input model by the value.
    MinImprovement,
    /// Better than the input model by the value in percent.
    PercentMinImprovement,
    /// Worse than the input model by no more than the value.
    MaxDegradation,
    /// Worse than the input model by no more than the value in percent.
    PercentMaxDegradation,
}

/// How a workflow is run.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// How points are searched; `None` runs the passes once, in order.
    pub search: Option<SearchConfig>,
    /// Where passes run.
    pub host: Option<Reference<System>>,
    /// Where the model is meant to run.
    pub target: Option<Reference<System>>,
    /// What models are measured by.
    pub evaluator: Option<Reference<EvaluatorConfig>>,
    /// Whether the input model is measured, too.
    pub evaluate_input_model: bool,
    /// Where the result goes.
    pub output_dir: Option<PathBuf>,
    /// Whether only the model goes there.
    pub no_artifacts: bool,
    /// Whether the report of a run without search is written, too.
    pub plot_pareto_frontier: bool,
    /// What the result is packed into.
    pub packaging: Vec<Packaging>,
    /// Where intermediate results are kept.
    pub cache_dir: Option<PathBuf>,
    /// Whether the cache of this workflow is emptied first.
    pub clean_cache: bool,
    /// Whether its evaluations are.
    pub clean_evaluation_cache: bool,
    /// 0 debug … 4 critical; `None` where the file does not say.
    pub log_severity_level: Option<u8>,
}

/// How points of a search space are tried.
#[derive(Debug, Clone, PartialEq)]
pub struct SearchConfig {
    /// All passes at once, or one after another.
    pub joint: bool,
    /// Which point comes next.
    pub sampler: SamplerKind,
    /// How many points at most; `None` for all.
    pub max_samples: Option<u64>,
    /// What random choices start from.
    pub seed: u64,
    /// Whether the parameters of a point are looked at together (TPE).
    pub multivariate: bool,
    /// How many models are kept; `None` for the whole front.
    pub output_model_num: Option<usize>,
    /// Whether the first point that meets all goals ends the search.
    pub stop_when_goals_met: bool,
    /// How many points are run at most.
    pub max_iter: Option<u64>,
    /// How many seconds it lasts at most.
    pub max_time: Option<f64>,
    /// Whether parameters that are not given are searched, too.
    pub include_pass_params: bool,
}

/// Which point comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SamplerKind {
    /// Every point, in order.
    Sequential,
    /// Points by chance, none twice.
    Random,
    /// Points that look like the better half of what was tried.
    Tpe,
}

/// What a result is packed into.
#[derive(Debug, Clone, PartialEq)]
pub struct Packaging {
    /// `Zipfile`, `Dockerfile`, or one of Azure's.
    pub kind: String,
    /// The name of the file.
    pub name: String,
    /// Its other keys.
    pub settings: Map<String, Value>,
}

/// One way to run a pass.
#[derive(Debug, Clone)]
pub struct PassEntry {
    /// Its type, in Olive's spelling where Olive knows it.
    pub kind: String,
    /// The parameters that were given.
    pub given: Map<String, Value>,
    /// Where it runs, if not where the others do.
    pub host: Option<Reference<System>>,
    /// What its result is measured by, if not by what the others are.
    pub evaluator: Option<Reference<EvaluatorConfig>>,
    /// Whether a search leaves alone what was not given.
    pub disable_search: bool,
}

/// One pipeline out of the passes of a file.
#[derive(Debug, Clone)]
pub struct Build {
    /// Names of passes, in order; empty for all.
    pub pipeline: Vec<String>,
    /// Names of components of the input model; empty for the model itself.
    pub components: Vec<String>,
    /// Where its result goes.
    pub output_dir: Option<PathBuf>,
    /// As the engine's.
    pub host: Option<Reference<System>>,
    /// As the engine's.
    pub target: Option<Reference<System>>,
    /// As the engine's.
    pub evaluator: Option<Reference<EvaluatorConfig>>,
    /// As the engine's; the outer `None` where it says nothing.
    pub search: Option<Option<SearchConfig>>,
}

impl RunConfig {
    /// The data config of that name.
    pub fn data_config(&self, name: &str) -> Option<&DataConfig> {
        self.data_configs.iter().find(|data| data.name == name)
    }

    /// The system of that name.
    pub fn system(&self, name: &str) -> Option<&System> {
        self.systems
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, system)| system)
    }

    /// The evaluator of that name.
    pub fn evaluator(&self, name: &str) -> Option<&EvaluatorConfig> {
        let found = self.evaluators.iter().find(|(key, _)| key == name);
        found.map(|(_, evaluator)| evaluator)
    }

    /// Where intermediate results are kept: the file's choice, else `.olive-cache` in the working folder.
    pub fn cache_dir(&self) -> &Path {
        self.engine
            .cache_dir
            .as_deref()
            .unwrap_or(Path::new(".olive-cache"))
    }
}
