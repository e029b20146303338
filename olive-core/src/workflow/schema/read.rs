//! From a checked document to the typed [`RunConfig`].

mod data;
mod evaluator;
mod system;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::config::{
    Build, EngineConfig, ModelSource, ModelType, Packaging, PassEntry, RunConfig, SamplerKind, SearchConfig,
};
use super::document::{Document, original_path};
use super::location::{Location, resolve};
use super::shape::{Checker, as_bool, as_float, as_int, brief, join};
use super::{canonical, passes, shapes};
use crate::error::{Error, Result};
use crate::workflow::legacy;

type Object = Map<String, Value>;

impl RunConfig {
    /// Reads a workflow file.
    ///
    /// # Errors
    /// [`Error::UnknownKey`] or [`Error::Config`] with the file and the dotted key; [`Error::Io`].
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Self::from_document(&Document::read(path)?)
    }

    /// Reads a workflow that has been parsed.
    ///
    /// # Errors
    /// As [`RunConfig::read`].
    pub fn from_document(document: &Document) -> Result<Self> {
        Self::build(document).map_err(|error| as_written(error, &document.value))
    }

    fn build(document: &Document) -> Result<Self> {
        let origin = document.origin.as_str();
        let mut top = canonical::canonicalise(origin, &document.value)?;
        let mut warnings = legacy::modernise(origin, &document.value, &mut top)?;
        let value = Value::Object(top);
        let mut checker = Checker::new(origin);
        checker.check(&shapes::WORKFLOW, &value, "")?;
        for (path, why) in checker.into_findings().without_effect {
            let line = format!(
                "key `{}` has no effect: {why}",
                original_path(&document.value, &path)
            );
            if !warnings.contains(&line) {
                warnings.push(line);
            }
        }
        let reader = Reader {
            origin,
            folder: &document.folder,
        };
        reader.document(value, warnings)
    }
}

/// The same error, with its key as it stands in the file.
fn as_written(error: Error, written: &Value) -> Error {
    match error {
        Error::UnknownKey { origin, key, nearest } => Error::UnknownKey {
            origin,
            key: original_path(written, &key),
            nearest,
        },
        Error::Config {
            origin,
            key,
            expected,
            found,
        } => Error::Config {
            origin,
            key: original_path(written, &key),
            expected,
            found,
        },
        other => other,
    }
}

/// Reads the parts of one document.
pub(in crate::workflow) struct Reader<'a> {
    origin: &'a str,
    folder: &'a Path,
}

impl Reader<'_> {
    fn document(&self, value: Value, warnings: Vec<String>) -> Result<RunConfig> {
        let empty = Object::new();
        let top = value.as_object().unwrap_or(&empty);
        let model = top.get("input_model").filter(|model| !model.is_null());
        let model = model.ok_or_else(|| self.missing("input_model", "a model"))?;
        let data_configs = self.data_configs(top.get("data_configs"))?;
        let named = |key: &str| top.get(key).and_then(Value::as_object).into_iter().flatten();
        let mut systems = Vec::new();
        for (name, system) in named("systems") {
            systems.push((name.clone(), self.system(system, &join("systems", name))?));
        }
        let mut evaluators = Vec::new();
        for (name, evaluator) in named("evaluators") {
            if !evaluator.is_null() {
                evaluators.push((
                    name.clone(),
                    self.evaluator(evaluator, &join("evaluators", name))?,
                ));
            }
        }
        let mut passes = Vec::new();
        for (name, entry) in named("passes") {
            let path = join("passes", name);
            let entries = match entry {
                Value::Array(list) => {
                    let read = |(index, pass)| self.pass(pass, &format!("{path}[{index}]"));
                    list.iter().enumerate().map(read).collect::<Result<Vec<_>>>()?
                }
                entry => vec![self.pass(entry, &path)?],
            };
            if entries.is_empty() {
                return Err(Error::config(self.origin, path, "a pass", "an empty list"));
            }
            passes.push((name.clone(), entries));
        }
        let mut builds = Vec::new();
        for (name, build) in named("builds") {
            builds.push((name.clone(), self.build(build, &join("builds", name))?));
        }
        Ok(RunConfig {
            origin: self.origin.to_owned(),
            folder: self.folder.to_path_buf(),
            workflow_id: self.workflow_id(top)?,
            input_model: self.model(model, "input_model")?,
            systems,
            data_configs,
            evaluators,
            engine: self.engine(top.get("engine").and_then(Value::as_object).unwrap_or(&empty))?,
            passes,
            builds,
            workflow_host: self.system_reference(top.get("workflow_host"), "workflow_host")?,
            warnings,
            document: value,
        })
    }

    fn missing(&self, key: &str, expected: &str) -> Error {
        Error::config(self.origin, key, expected, "nothing")
    }

    /// The id is the name of a folder.
    fn workflow_id(&self, top: &Object) -> Result<String> {
        let id = text(top, "workflow_id").unwrap_or_else(|| "default_workflow".to_owned());
        let plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | ' ');
        if id.is_empty() || id.starts_with('.') || !id.chars().all(plain) {
            return Err(Error::config(self.origin, "workflow_id", "a plain name", id));
        }
        Ok(id)
    }

    fn path(&self, object: &Object, key: &str) -> Option<PathBuf> {
        text(object, key).map(|text| resolve(self.folder, &text))
    }

    fn location(&self, object: &Object, key: &str) -> Option<Location> {
        object
            .get(key)
            .and_then(|value| Location::read(value, self.folder))
    }

    fn model(&self, value: &Value, path: &str) -> Result<ModelSource> {
        let empty = Object::new();
        let model = value.as_object().unwrap_or(&empty);
        let kind =
            text(model, "type").ok_or_else(|| self.missing(&join(path, "type"), "the type of a model"))?;
        let kind = model_type(&kind).ok_or_else(|| {
            let nearest = crate::error::nearest_name(&kind, MODEL_TYPES.iter().copied());
            let expected = nearest.map_or_else(
                || MODEL_TYPES.join(", "),
                |n| format!("a type of model such as `{n}`"),
            );
            Error::config(self.origin, join(path, "type"), expected, format!("`{kind}`"))
        })?;
        let mut components = Vec::new();
        for (index, component) in list(model, "model_components").iter().enumerate() {
            components.push(self.model(component, &format!("{path}.model_components[{index}]"))?);
        }
        let location = self.location(model, "model_path");
        let needs_path = matches!(kind, ModelType::Hf | ModelType::Onnx);
        if needs_path && location.is_none() && path == "input_model" {
            return Err(self.missing(&join(path, "model_path"), "where the model is"));
        }
        Ok(ModelSource {
            kind,
            path: location,
            adapter: self.location(model, "adapter_path"),
            task: text(model, "task").unwrap_or_else(|| "text-generation-with-past".to_owned()),
            load_kwargs: object(model, "load_kwargs"),
            attributes: object(model, "model_attributes"),
            onnx_file_name: text(model, "onnx_file_name"),
            components,
        })
    }

    fn pass(&self, value: &Value, path: &str) -> Result<PassEntry> {
        let empty = Object::new();
        let pass = value.as_object().unwrap_or(&empty);
        let kind = text(pass, "type").unwrap_or_default();
        let mut given = pass.clone();
        for key in passes::PASS_KEYS {
            given.shift_remove(*key);
        }
        let (kind, given) = match passes::find(&kind) {
            Some(known) => (
                known.name.to_owned(),
                passes::coerce_all(self.origin, path, known, &given)?,
            ),
            None => (kind, given),
        };
        Ok(PassEntry {
            kind,
            given,
            host: self.system_reference(pass.get("host"), &join(path, "host"))?,
            evaluator: self.evaluator_reference(pass.get("evaluator"), &join(path, "evaluator"))?,
            disable_search: pass.get("disable_search").and_then(as_bool).unwrap_or(false),
        })
    }

    fn engine(&self, engine: &Object) -> Result<EngineConfig> {
        let flag = |key: &str, default: bool| engine.get(key).and_then(as_bool).unwrap_or(default);
        let cache = object(engine, "cache_config");
        let cached = |key: &str| flag(key, false) || cache.get(key).and_then(as_bool).unwrap_or(false);
        let cache_dir = engine
            .get("cache_dir")
            .or_else(|| cache.get("cache_dir"))
            .and_then(|value| match value {
                Value::Array(list) => list
                    .iter()
                    .filter_map(Value::as_str)
                    .find(|text| !text.contains("://")),
                value => value.as_str(),
            })
            .map(|text| resolve(self.folder, text));
        let packaging = match engine.get("packaging_config") {
            Some(Value::Array(list)) => list.iter().map(packaging).collect(),
            Some(value @ Value::Object(_)) => vec![packaging(value)],
            _ => Vec::new(),
        };
        let level = engine.get("log_severity_level").and_then(as_int);
        if let Some(level) = level.filter(|level| !(0..=4).contains(level)) {
            return Err(Error::config(
                self.origin,
                "log_severity_level",
                "0 to 4",
                level.to_string(),
            ));
        }
        Ok(EngineConfig {
            search: self.search(engine.get("search_strategy"), "search_strategy")?,
            host: self.system_reference(engine.get("host"), "host")?,
            target: self.system_reference(engine.get("target"), "target")?,
            evaluator: self.evaluator_reference(engine.get("evaluator"), "evaluator")?,
            evaluate_input_model: flag("evaluate_input_model", true),
            output_dir: self.path(engine, "output_dir"),
            no_artifacts: flag("no_artifacts", false),
            plot_pareto_frontier: flag("plot_pareto_frontier", false),
            packaging,
            cache_dir,
            clean_cache: cached("clean_cache"),
            clean_evaluation_cache: cached("clean_evaluation_cache"),
            log_severity_level: level.and_then(|level| u8::try_from(level).ok()),
        })
    }

    fn build(&self, value: &Value, path: &str) -> Result<Build> {
        let empty = Object::new();
        let build = value.as_object().unwrap_or(&empty);
        let texts = |key: &str| -> Vec<String> {
            let entries = match build.get(key) {
                Some(Value::String(text)) => return vec![text.clone()],
                Some(Value::Array(list)) => list.as_slice(),
                _ => &[],
            };
            entries
                .iter()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect()
        };
        let search = match build.get("search_strategy") {
            None | Some(Value::Null) => None,
            given => Some(self.search(given, &join(path, "search_strategy"))?),
        };
        Ok(Build {
            pipeline: texts("pipeline"),
            components: texts("components"),
            output_dir: self.path(build, "output_dir"),
            host: self.system_reference(build.get("host"), &join(path, "host"))?,
            target: self.system_reference(build.get("target"), &join(path, "target"))?,
            evaluator: self.evaluator_reference(build.get("evaluator"), &join(path, "evaluator"))?,
            search,
        })
    }

    fn search(&self, value: Option<&Value>, path: &str) -> Result<Option<SearchConfig>> {
        let empty = Object::new();
        let search = match value {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(object)) => object,
            Some(value) if as_bool(value) == Some(true) => &empty,
            Some(_) => return Ok(None),
        };
        let lower = |key: &str| text(search, key).map(|text| text.to_ascii_lowercase());
        let count = |key: &str| -> Result<Option<u64>> {
            let Some(value) = search.get(key).filter(|value| !value.is_null()) else {
                return Ok(None);
            };
            let count = as_int(value).and_then(|n| u64::try_from(n).ok());
            count
                .ok_or_else(|| {
                    Error::config(
                        self.origin,
                        join(path, key),
                        "a number that is not negative",
                        brief(value),
                    )
                })
                .map(Some)
        };
        Ok(Some(SearchConfig {
            joint: lower("execution_order").as_deref() != Some("pass-by-pass"),
            sampler: match lower("sampler").as_deref() {
                Some("random") => SamplerKind::Random,
                Some("tpe") => SamplerKind::Tpe,
                _ => SamplerKind::Sequential,
            },
            max_samples: count("max_samples")?.filter(|n| *n > 0),
            seed: count("seed")?.unwrap_or(1),
            multivariate: search.get("multivariate").and_then(as_bool).unwrap_or(true),
            output_model_num: count("output_model_num")?.and_then(|n| usize::try_from(n).ok()),
            stop_when_goals_met: search
                .get("stop_when_goals_met")
                .and_then(as_bool)
                .unwrap_or(false),
            max_iter: count("max_iter")?,
            max_time: search.get("max_time").and_then(as_float),
            include_pass_params: search
                .get("include_pass_params")
                .and_then(as_bool)
                .unwrap_or(true),
        }))
    }

    /// A reader for parts of a document that was read before.
    pub(in crate::workflow) fn of(config: &RunConfig) -> Reader<'_> {
        Reader {
            origin: &config.origin,
            folder: &config.folder,
        }
    }
}

fn packaging(value: &Value) -> Packaging {
    let mut settings = value.as_object().cloned().unwrap_or_default();
    let kind = text(&settings, "type").unwrap_or_else(|| "Zipfile".to_owned());
    let name = text(&settings, "name").unwrap_or_else(|| "OutputModels".to_owned());
    settings.shift_remove("type");
    settings.shift_remove("name");
    Packaging { kind, name, settings }
}

fn text(object: &Object, key: &str) -> Option<String> {
    match object.get(key)? {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

fn object(parent: &Object, key: &str) -> Object {
    parent
        .get(key)
        .and_then(Value::as_object)
        .cloned()
        .unwrap_or_default()
}

fn list(parent: &Object, key: &str) -> Vec<Value> {
    parent
        .get(key)
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default()
}

/// Olive's types of models.
const MODEL_TYPES: &[&str] = &[
    "HfModel",
    "PyTorchModel",
    "ONNXModel",
    "CompositeModel",
    "DistributedHfModel",
    "DistributedOnnxModel",
    "DiffusersModel",
    "OpenVINOModel",
    "QNNModel",
    "QairtModel",
    "QairtPreparedModel",
    "QairtContainerModel",
    "TensorFlowModel",
];

fn model_type(name: &str) -> Option<ModelType> {
    let known = MODEL_TYPES
        .iter()
        .find(|known| known.eq_ignore_ascii_case(name))?;
    Some(match *known {
        "HfModel" => ModelType::Hf,
        "PyTorchModel" => ModelType::PyTorch,
        "ONNXModel" => ModelType::Onnx,
        "CompositeModel" => ModelType::Composite,
        other => ModelType::Other(other.to_owned()),
    })
}
