//! What a workflow can call: passes and evaluators, of this workspace or any other crate.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::schema::passes::{self, KnownPass};
use super::schema::{Accelerator, DataConfig, MetricSpec};
use crate::error::{Error, Result};
use crate::model::{HfModel, MODEL_CONFIG_FILE, ModelConfigFile, ModelHandle};
use crate::pass::Pass;
use crate::progress::{CancelToken, Progress};

/// The passes that can run, by name.
#[derive(Default)]
pub struct PassRegistry {
    passes: Vec<Box<dyn Pass>>,
}

impl PassRegistry {
    /// A registry without passes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a pass; one of the same name is replaced.
    pub fn register(&mut self, pass: Box<dyn Pass>) {
        self.passes
            .retain(|other| !other.name().eq_ignore_ascii_case(pass.name()));
        self.passes.push(pass);
    }

    /// The pass of that name, compared without case.
    pub fn find(&self, name: &str) -> Option<&dyn Pass> {
        let found = self
            .passes
            .iter()
            .find(|pass| pass.name().eq_ignore_ascii_case(name));
        found.map(Box::as_ref)
    }

    /// All passes, in the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = &dyn Pass> {
        self.passes.iter().map(Box::as_ref)
    }

    /// The names of all passes that a file may name: those that run, then those that can only be planned.
    pub fn names(&self) -> Vec<(&str, bool)> {
        let mut names: Vec<(&str, bool)> = self.iter().map(|pass| (pass.name(), true)).collect();
        for known in passes::all() {
            if self.find(known.name).is_none() {
                names.push((known.name, false));
            }
        }
        names
    }
}

/// What an evaluator is given besides model and metric.
pub struct EvalContext<'a> {
    /// What the metric is measured on.
    pub data: Option<&'a DataConfig>,
    /// What the model is meant to run on.
    pub accelerator: &'a Accelerator,
    /// Where it says how far it is.
    pub progress: &'a dyn Progress,
    /// Whether it should stop.
    pub cancel: &'a CancelToken,
}

/// One measured value.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// The sub type: `perplexity`, `avg`, `bytes`, …
    pub name: String,
    /// The value.
    pub value: f64,
    /// Whether more is better; the spec's word counts where it has one.
    pub higher_is_better: bool,
}

/// Measures models.
pub trait Evaluator: Send + Sync {
    /// The type of metric that it measures: `accuracy`, `latency`, `throughput`, `size_on_disk`, `tasks`, …
    fn metric(&self) -> &'static str;
    /// Counts the changes of its code that change what it measures.
    fn version(&self) -> u32 {
        1
    }
    /// Files besides the model and the data config that it reads: a change in one of them makes it measure again.
    fn input_files(&self, _metric: &MetricSpec) -> Vec<PathBuf> {
        Vec::new()
    }
    /// Checks a metric before any work is done.
    ///
    /// # Errors
    /// Whatever would make [`Evaluator::evaluate`] fail and can be known now.
    fn check(&self, _metric: &MetricSpec, _data: Option<&DataConfig>) -> Result<()> {
        Ok(())
    }
    /// Measures every sub type of `metric`, in the order in which they are given; an evaluator of `tasks` names its
    /// values itself.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a sub type that it does not know; else what went wrong.
    fn evaluate(
        &self,
        model: &dyn ModelHandle,
        metric: &MetricSpec,
        context: &EvalContext<'_>,
    ) -> Result<Vec<Measured>>;
}

/// The evaluators that can run, by type of metric. Size on disk is always there.
pub struct EvaluatorRegistry {
    evaluators: Vec<Box<dyn Evaluator>>,
}

impl Default for EvaluatorRegistry {
    fn default() -> Self {
        Self {
            evaluators: vec![Box::new(SizeOnDisk)],
        }
    }
}

impl EvaluatorRegistry {
    /// A registry that measures size on disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an evaluator; one of the same type is replaced.
    pub fn register(&mut self, evaluator: Box<dyn Evaluator>) {
        self.evaluators
            .retain(|other| other.metric() != evaluator.metric());
        self.evaluators.push(evaluator);
    }

    /// The evaluator of that type of metric.
    pub fn find(&self, metric: &str) -> Option<&dyn Evaluator> {
        let found = self.evaluators.iter().find(|e| e.metric() == metric);
        found.map(Box::as_ref)
    }
}

/// The bytes of a model's folder, and of its adapter's.
struct SizeOnDisk;

impl Evaluator for SizeOnDisk {
    fn metric(&self) -> &'static str {
        "size_on_disk"
    }

    fn evaluate(
        &self,
        model: &dyn ModelHandle,
        metric: &MetricSpec,
        _context: &EvalContext<'_>,
    ) -> Result<Vec<Measured>> {
        let mut bytes = folder_size(model.path())?;
        if let Some(adapter) = model.adapter() {
            bytes += folder_size(adapter)?;
        }
        let measured = metric.sub_types.iter().map(|sub| Measured {
            name: sub.name.clone(),
            value: bytes as f64,
            higher_is_better: sub.higher_is_better,
        });
        Ok(measured.collect())
    }
}

fn folder_size(path: &Path) -> Result<u64> {
    let files = super::cache::files_below(path)?;
    let sizes = files.iter().map(|file| std::fs::metadata(file).map(|m| m.len()));
    sizes
        .collect::<std::io::Result<Vec<u64>>>()
        .map(|sizes| sizes.iter().sum())
        .map_err(Error::io("measure", path))
}

/// Opens models by what their folders hold. The engine needs one, since it continues from folders of earlier runs.
pub trait ModelOpener: Send + Sync {
    /// Opens a model folder, a model file, or an output folder with a `model_config.json`.
    ///
    /// # Errors
    /// [`Error::File`] if it is none.
    fn open(&self, path: &Path, adapter: Option<&Path>) -> Result<Arc<dyn ModelHandle>>;
}

/// Opens Hugging Face folders.
#[derive(Debug, Default, Clone, Copy)]
pub struct HfOpener;

impl ModelOpener for HfOpener {
    fn open(&self, path: &Path, adapter: Option<&Path>) -> Result<Arc<dyn ModelHandle>> {
        let is_onnx = path.extension().is_some_and(|e| e == "onnx")
            || ModelConfigFile::read(path)?.is_some_and(|config| !config.is_hugging_face());
        if is_onnx {
            return Err(Error::file(
                path.join(MODEL_CONFIG_FILE),
                "a Hugging Face model",
                "an ONNX model",
            ));
        }
        let model = HfModel::open(path)?;
        Ok(match adapter {
            Some(adapter) => Arc::new(model.with_adapter(adapter)),
            None => Arc::new(model),
        })
    }
}

/// Parameters of Olive that change nothing here, with the reason: set, they are dropped with a warning.
const WITHOUT_EFFECT: &[(&str, &str)] = &[
    ("user_script", "user scripts are not run"),
    ("script_dir", "user scripts are not run"),
    ("device_map", "weights are streamed"),
    ("allow_tf32", "products are exact"),
    ("ephemeral_gpu_offload", "weights are streamed"),
    (
        "save_as_external_data",
        "large tensors are always kept beside the graph",
    ),
    ("all_tensors_to_one_file", "tensors are always kept in one file"),
    ("external_data_name", "the file is named after the model"),
    ("size_threshold", "the writer chooses"),
    ("convert_attribute", "attributes stay in the graph"),
    ("parallel_jobs", "work is always spread over all cores"),
    ("input_model_dtype", "weights are read in their own type"),
    ("kld_memory_mode", "weights are streamed"),
];

/// The parameters of `known` that `pass` takes, out of all of Olive's: what it does not have is dropped where it is
/// Olive's default or changes nothing.
///
/// # Errors
/// [`Error::Unsupported`] naming parameters that are set, would change something, and are not there.
pub fn params_for(
    pass: &dyn Pass,
    known: Option<&KnownPass>,
    values: &Map<String, Value>,
    notes: &mut Vec<String>,
) -> Result<Map<String, Value>> {
    let mut taken = Map::new();
    let mut absent = Vec::new();
    for (key, value) in values {
        let default = known
            .and_then(|known| known.param(key))
            .map(|param| &param.default);
        if pass.params().iter().any(|spec| spec.name == key) {
            taken.insert(key.clone(), value.clone());
        } else if value.is_null() || default.is_some_and(|default| same(default, value)) {
            // Leaving it out says the same.
        } else if let Some((_, why)) = WITHOUT_EFFECT.iter().find(|(name, _)| name == key) {
            let note = format!("`{key}` of {} has no effect: {why}", pass.name());
            if !notes.contains(&note) {
                notes.push(note);
            }
        } else {
            absent.push(format!("`{key}` = {value}"));
        }
    }
    if absent.is_empty() {
        Ok(taken)
    } else {
        Err(Error::unsupported(
            format!("{} of the pass {}", absent.join(", "), pass.name()),
            "leave it out, or give its default",
        ))
    }
}

/// Whether two values say the same; `1` and `1.0` do, and so do nothing and an empty list or object.
fn same(a: &Value, b: &Value) -> bool {
    let empty = |v: &Value| {
        v.is_null() || v.as_array().is_some_and(Vec::is_empty) || v.as_object().is_some_and(Map::is_empty)
    };
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (a, b) => a == b || (empty(a) && empty(b)),
    }
}
