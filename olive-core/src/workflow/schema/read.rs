//! From a checked document to the typed [`RunConfig`].

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::config::{
    Accelerator, Build, DataConfig, EngineConfig, EvaluatorConfig, Goal, GoalKind, MetricSpec, ModelSource,
    ModelType, Packaging, PassEntry, Reference, RunConfig, SamplerKind, SearchConfig, SubType, System,
    SystemKind,
};
use super::document::{Document, original_path};
use super::location::{Location, resolve};
use super::shape::{Checker, as_bool, as_float, as_int, brief, join};
use super::{canonical, evaluator_shapes, passes, shapes};
use crate::data::Template;
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

    pub(in crate::workflow) fn system(&self, value: &Value, path: &str) -> Result<System> {
        let empty = Object::new();
        let system = value.as_object().unwrap_or(&empty);
        let kind =
            text(system, "type").ok_or_else(|| self.missing(&join(path, "type"), "the type of a system"))?;
        let kind = match kind.to_ascii_lowercase().as_str() {
            "pythonenvironment" | "isolatedort" => SystemKind::PythonEnvironment,
            "docker" => SystemKind::Docker,
            "azureml" => SystemKind::AzureMl,
            _ => SystemKind::Local,
        };
        let accelerators = list(system, "accelerators");
        let accelerator = match accelerators.as_slice() {
            [] => Accelerator::default(),
            [one] => self.accelerator(one, &format!("{path}.accelerators[0]"))?,
            several => {
                let found = format!("{}", several.len());
                let key = join(path, "accelerators");
                return Err(Error::config(self.origin, key, "one accelerator", found));
            }
        };
        let mut settings = system.clone();
        settings.shift_remove("type");
        settings.shift_remove("accelerators");
        Ok(System {
            kind,
            accelerator,
            settings,
        })
    }

    fn accelerator(&self, value: &Value, path: &str) -> Result<Accelerator> {
        let empty = Object::new();
        let accelerator = value.as_object().unwrap_or(&empty);
        let device = text(accelerator, "device").map(|device| device.to_ascii_lowercase());
        let key = join(path, "execution_providers");
        let providers = list(accelerator, "execution_providers");
        let name = |value: &Value| match value {
            Value::Array(pair) => pair.first().and_then(Value::as_str).map(str::to_owned),
            value => value.as_str().map(str::to_owned),
        };
        let provider = match providers.as_slice() {
            [] => None,
            [one] => name(one),
            _ => {
                let found = brief(&Value::Array(providers));
                return Err(Error::config(self.origin, key, "one execution provider", found));
            }
        };
        let known = match &provider {
            None => None,
            Some(name) => Some(find_provider(name).ok_or_else(|| {
                let names = PROVIDERS
                    .iter()
                    .map(|(name, _)| *name)
                    .collect::<Vec<_>>()
                    .join(", ");
                Error::config(self.origin, &key, format!("one of {names}"), format!("`{name}`"))
            })?),
        };
        let (device, provider) = match (device, known) {
            (Some(device), Some((name, devices))) => {
                let plain = device.trim_end_matches("_spr");
                if !devices.contains(&plain) {
                    let expected = format!("a provider for the device `{device}`");
                    return Err(Error::config(self.origin, key, expected, format!("`{name}`")));
                }
                (device, name)
            }
            (None, Some((name, devices))) => (devices[0].to_owned(), name),
            (Some(device), None) => {
                let provider = match device.as_str() {
                    "gpu" => "CUDAExecutionProvider",
                    "npu" => "QNNExecutionProvider",
                    _ => "CPUExecutionProvider",
                };
                (device, provider)
            }
            (None, None) => return Ok(Accelerator::default()),
        };
        Ok(Accelerator {
            device,
            provider: provider.to_owned(),
        })
    }

    fn data_configs(&self, value: Option<&Value>) -> Result<Vec<DataConfig>> {
        let mut configs: Vec<DataConfig> = Vec::new();
        for (index, entry) in value.and_then(Value::as_array).into_iter().flatten().enumerate() {
            let path = format!("data_configs[{index}]");
            let config = self.data_config(entry, &path)?;
            let key = join(&path, "name");
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
            if config.name.is_empty() || !config.name.chars().all(plain) {
                let expected = "a name of letters, digits and `_`";
                return Err(Error::config(
                    self.origin,
                    key,
                    expected,
                    format!("`{}`", config.name),
                ));
            }
            if configs.iter().any(|other| other.name == config.name) {
                let found = format!("`{}` twice", config.name);
                return Err(Error::config(self.origin, key, "a name of its own", found));
            }
            configs.push(config);
        }
        Ok(configs)
    }

    pub(in crate::workflow) fn data_config(&self, value: &Value, path: &str) -> Result<DataConfig> {
        let empty = Object::new();
        let config = value.as_object().unwrap_or(&empty);
        let mut load = object(config, "load_dataset_config");
        let (files, remote) = self.data_files(&mut load);
        let pre_process = object(config, "pre_process_data_config");
        if let Some(template) = text(&pre_process, "text_template") {
            Template::parse(&template).map_err(|problem| {
                let key = join(&join(path, "pre_process_data_config"), "text_template");
                Error::config(self.origin, key, "columns in braces", problem)
            })?;
        }
        Ok(DataConfig {
            name: text(config, "name").unwrap_or_default(),
            kind: text(config, "type"),
            load_dataset: load,
            pre_process,
            post_process: object(config, "post_process_data_config"),
            dataloader: object(config, "dataloader_config"),
            files,
            remote,
        })
    }

    /// Makes the paths of a `load_dataset_config` absolute and lists them.
    fn data_files(&self, load: &mut Object) -> (Vec<PathBuf>, Vec<Location>) {
        /// Formats, as opposed to repositories of the hub, whose `data_files` are inside the repository.
        const FORMATS: &[&str] = &["json", "jsonl", "csv", "tsv", "text", "txt", "parquet", "arrow"];
        let (mut files, mut remote) = (Vec::new(), Vec::new());
        let name = text(load, "data_name");
        if let Some(name) = &name
            && resolve(self.folder, name).exists()
            && !FORMATS.contains(&name.as_str())
        {
            let path = resolve(self.folder, name);
            load.insert("data_name".to_owned(), Value::from(path.display().to_string()));
            files.push(path);
        }
        let formats = name.is_none_or(|name| FORMATS.contains(&name.as_str()));
        if let Some(value) = load.get_mut("data_files") {
            self.absolute(value, formats, &mut files, &mut remote);
        }
        if let Some(value) = load.get_mut("data_dir") {
            self.absolute(value, formats, &mut files, &mut remote);
        }
        (files, remote)
    }

    fn absolute(&self, value: &mut Value, here: bool, files: &mut Vec<PathBuf>, remote: &mut Vec<Location>) {
        match value {
            Value::String(text) if here && !text.contains("://") => {
                let split: Vec<String> = text
                    .split(',')
                    .map(|part| {
                        let path = resolve(self.folder, part.trim());
                        let shown = path.display().to_string();
                        files.push(path);
                        shown
                    })
                    .collect();
                *text = split.join(",");
            }
            Value::Object(object) if object.contains_key("type") => {
                let resource = Value::Object(object.clone());
                match Location::read(&resource, self.folder) {
                    Some(Location::Local(path)) => {
                        *value = Value::from(path.display().to_string());
                        files.push(path);
                    }
                    Some(other) => remote.push(other),
                    None => {}
                }
            }
            Value::Object(object) => {
                for entry in object.values_mut() {
                    self.absolute(entry, here, files, remote);
                }
            }
            Value::Array(list) => {
                for entry in list {
                    self.absolute(entry, here, files, remote);
                }
            }
            _ => {}
        }
    }

    pub(in crate::workflow) fn evaluator(&self, value: &Value, path: &str) -> Result<EvaluatorConfig> {
        let empty = Object::new();
        let evaluator = value.as_object().unwrap_or(&empty);
        let kind = text(evaluator, "type");
        let on_tasks = kind.as_deref().is_some_and(|kind| {
            evaluator_shapes::TASK_EVALUATORS.contains(&kind.to_ascii_lowercase().as_str())
        });
        let mut metrics = Vec::new();
        if on_tasks {
            let mut settings = evaluator.clone();
            settings.shift_remove("type");
            settings.shift_remove("metrics");
            metrics.push(MetricSpec {
                name: kind.clone().unwrap_or_default(),
                kind: "tasks".to_owned(),
                sub_types: Vec::new(),
                data: None,
                settings,
            });
        }
        for (index, metric) in list(evaluator, "metrics").iter().enumerate() {
            metrics.push(self.metric(metric, &format!("{path}.metrics[{index}]"))?);
        }
        // One value alone is the objective.
        if let [metric] = metrics.as_mut_slice()
            && let [sub] = metric.sub_types.as_mut_slice()
            && sub.priority.is_none()
        {
            sub.priority = Some(1);
        }
        Ok(EvaluatorConfig { kind, metrics })
    }

    fn metric(&self, value: &Value, path: &str) -> Result<MetricSpec> {
        let empty = Object::new();
        let metric = value.as_object().unwrap_or(&empty);
        let required = |key: &str| text(metric, key).ok_or_else(|| self.missing(&join(path, key), "text"));
        let kind = required("type")?.to_ascii_lowercase();
        let mut sub_types = Vec::new();
        for (index, sub) in list(metric, "sub_types").iter().enumerate() {
            sub_types.push(self.sub_type(sub, &kind, &format!("{path}.sub_types[{index}]"))?);
        }
        if sub_types.is_empty() && kind == "size_on_disk" {
            sub_types.push(SubType {
                name: "bytes".to_owned(),
                priority: None,
                higher_is_better: false,
                goal: None,
                config: Object::new(),
            });
        }
        if sub_types.is_empty() {
            return Err(self.missing(&join(path, "sub_types"), "at least one sub type"));
        }
        Ok(MetricSpec {
            name: required("name")?,
            kind,
            sub_types,
            data: self.data_reference(metric.get("data_config"), &join(path, "data_config"))?,
            settings: object(metric, "user_config"),
        })
    }

    fn sub_type(&self, value: &Value, kind: &str, path: &str) -> Result<SubType> {
        let empty = Object::new();
        let sub = value.as_object().unwrap_or(&empty);
        let name = text(sub, "name").ok_or_else(|| self.missing(&join(path, "name"), "text"))?;
        let allowed: &[&str] = match kind {
            "accuracy" => ACCURACY,
            "latency" | "throughput" => STATISTICS,
            "size_on_disk" => &["bytes"],
            _ => &[],
        };
        if !allowed.is_empty() && !allowed.contains(&name.as_str()) {
            let expected = format!("one of {}", allowed.join(", "));
            return Err(Error::config(
                self.origin,
                join(path, "name"),
                expected,
                format!("`{name}`"),
            ));
        }
        let less = matches!(kind, "latency" | "size_on_disk")
            || matches!(name.as_str(), "perplexity" | "wer" | "rtfx");
        let priority = sub
            .get("priority")
            .and_then(as_int)
            .filter(|priority| *priority > 0);
        Ok(SubType {
            priority: priority.and_then(|priority| u32::try_from(priority).ok()),
            higher_is_better: sub.get("higher_is_better").and_then(as_bool).unwrap_or(!less),
            goal: self.goal(sub.get("goal"), &join(path, "goal"))?,
            config: object(sub, "metric_config"),
            name,
        })
    }

    fn goal(&self, value: Option<&Value>, path: &str) -> Result<Option<Goal>> {
        let Some(goal) = value.and_then(Value::as_object) else {
            return Ok(None);
        };
        let kind = match text(goal, "type")
            .unwrap_or_default()
            .to_ascii_lowercase()
            .as_str()
        {
            "threshold" => GoalKind::Threshold,
            "min-improvement" => GoalKind::MinImprovement,
            "percent-min-improvement" => GoalKind::PercentMinImprovement,
            "max-degradation" => GoalKind::MaxDegradation,
            "percent-max-degradation" => GoalKind::PercentMaxDegradation,
            _ => return Err(self.missing(&join(path, "type"), "the type of a goal")),
        };
        let value = goal.get("value").and_then(as_float);
        let value = value.ok_or_else(|| self.missing(&join(path, "value"), "a number"))?;
        if kind != GoalKind::Threshold && value < 0.0 {
            let key = join(path, "value");
            return Err(Error::config(
                self.origin,
                key,
                "a number that is not negative",
                value.to_string(),
            ));
        }
        Ok(Some(Goal { kind, value }))
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

    fn system_reference(&self, value: Option<&Value>, path: &str) -> Result<Option<Reference<System>>> {
        Ok(match value {
            None | Some(Value::Null) => None,
            Some(Value::String(name)) => Some(Reference::Name(name.clone())),
            Some(value) => Some(Reference::Inline(Box::new(self.system(value, path)?))),
        })
    }

    fn evaluator_reference(
        &self,
        value: Option<&Value>,
        path: &str,
    ) -> Result<Option<Reference<EvaluatorConfig>>> {
        Ok(match value {
            None | Some(Value::Null) => None,
            Some(Value::String(name)) => Some(Reference::Name(name.clone())),
            Some(value) => Some(Reference::Inline(Box::new(self.evaluator(value, path)?))),
        })
    }

    fn data_reference(&self, value: Option<&Value>, path: &str) -> Result<Option<Reference<DataConfig>>> {
        Ok(match value {
            None | Some(Value::Null) => None,
            Some(Value::String(name)) => Some(Reference::Name(name.clone())),
            Some(value) => Some(Reference::Inline(Box::new(self.data_config(value, path)?))),
        })
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

/// Execution providers and the devices that they drive, the usual one first.
const PROVIDERS: &[(&str, &[&str])] = &[
    ("CPUExecutionProvider", &["cpu", "gpu", "npu"]),
    ("CUDAExecutionProvider", &["gpu"]),
    ("DmlExecutionProvider", &["gpu", "npu"]),
    ("JsExecutionProvider", &["gpu"]),
    ("MIGraphXExecutionProvider", &["gpu"]),
    ("NvTensorRTRTXExecutionProvider", &["gpu"]),
    ("OpenVINOExecutionProvider", &["cpu", "gpu", "npu"]),
    ("QNNExecutionProvider", &["npu", "gpu", "cpu"]),
    ("ROCMExecutionProvider", &["gpu"]),
    ("TensorrtExecutionProvider", &["gpu"]),
    ("VitisAIExecutionProvider", &["npu"]),
    ("WebGpuExecutionProvider", &["gpu"]),
];

fn find_provider(name: &str) -> Option<(&'static str, &'static [&'static str])> {
    PROVIDERS
        .iter()
        .find(|(known, _)| known.eq_ignore_ascii_case(name))
        .copied()
}

/// Values that `accuracy` gives.
const ACCURACY: &[&str] = &[
    "accuracy_score",
    "f1_score",
    "precision",
    "recall",
    "auroc",
    "perplexity",
    "wer",
    "rtfx",
    "exact_match",
    "relaxed_accuracy",
    "word_sort_ratio",
];

/// Values that `latency` and `throughput` give.
const STATISTICS: &[&str] = &["avg", "max", "min", "p50", "p75", "p90", "p95", "p99", "p999"];
