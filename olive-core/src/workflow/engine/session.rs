//! One pipeline at work: the input model, cached runs of passes, cached evaluations.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::footprint::{Footprint, FootprintNode, MetricValue, Metrics};
use super::{Engine, now};
use crate::error::{Error, Result};
use crate::fsio;
use crate::model::{ModelConfigFile, ModelHandle, ModelKind};
use crate::pass::{Pass, PassConfig, PassContext};
use crate::workflow::cache::{Cache, FileHashes, Lock, ModelRecord, RunRecord, hash_value, short, snapshot};
use crate::workflow::plan::{Named, Pipeline, Plan, PlannedPass};
use crate::workflow::registry::{EvalContext, params_for};
use crate::workflow::schema::passes;
use crate::workflow::schema::{
    DataConfig, EvaluatorConfig, Location, MetricSpec, ModelSource, ModelType, Reference,
};
use crate::workflow::search::{Objective, resolve_goals};

/// A model on the way.
#[derive(Debug, Clone)]
pub(super) struct Node {
    /// The short form of its key.
    pub id: String,
    /// The hash of everything that defines it.
    pub key: String,
    /// The folder or file.
    pub path: PathBuf,
    /// Its adapter.
    pub adapter: Option<PathBuf>,
    /// Whether it is an ONNX model.
    pub onnx: bool,
}

pub(super) struct Session<'a> {
    pub engine: &'a Engine<'a>,
    pub plan: &'a Plan,
    pub pipeline: &'a Pipeline,
    pub input: Node,
    pub cache: Cache,
    pub hashes: FileHashes,
    pub footprint: Footprint,
    pub objectives: Vec<Objective>,
    pub ran: usize,
    pub cached: usize,
    pub failed: Vec<(String, String)>,
    pub notes: Vec<String>,
}

impl<'a> Session<'a> {
    /// Finds the input model, and says what it is by the hash of its files.
    pub fn open(engine: &'a Engine<'a>, plan: &'a Plan, pipeline: &'a Pipeline, first: bool) -> Result<Self> {
        let config = &plan.config;
        let cache = Cache::new(config.cache_dir(), &config.workflow_id);
        if first && config.engine.clean_cache {
            cache.clean(false)?;
        } else if first && config.engine.clean_evaluation_cache {
            cache.clean(true)?;
        }
        let hashes = match engine.keep_runs {
            true => FileHashes::open(config.cache_dir()),
            false => FileHashes::of_stamps(config.cache_dir()),
        };
        let input = input_node(engine, &pipeline.model, &hashes)?;
        let mut footprint = Footprint::default();
        footprint.add(FootprintNode::input(&input, &pipeline.model));
        let objectives = match &pipeline.evaluator {
            Some(evaluator) => Objective::of(&evaluator.value),
            None => Vec::new(),
        };
        Ok(Self {
            engine,
            plan,
            pipeline,
            input,
            cache,
            hashes,
            footprint,
            objectives,
            ran: 0,
            cached: 0,
            failed: Vec::new(),
            notes: Vec::new(),
        })
    }

    /// Keeps what was learned about files.
    pub fn save(&self) -> Result<()> {
        self.hashes.save()
    }

    /// Where the result goes.
    pub fn output_dir(&self) -> PathBuf {
        self.pipeline
            .output_dir
            .clone()
            .unwrap_or_else(|| PathBuf::from("."))
    }

    /// Opens a model that a pass or an evaluator wants.
    pub fn handle(&self, node: &Node) -> Result<std::sync::Arc<dyn ModelHandle>> {
        self.engine.opener.open(&node.path, node.adapter.as_deref())
    }

    /// Runs a pass on a model, or finds that it has been run.
    pub fn run_pass(&mut self, input: &Node, planned: &PlannedPass, values: &[usize]) -> Result<Node> {
        self.engine.cancel.check()?;
        let pass = self.engine.passes.find(&planned.kind);
        let pass = pass
            .ok_or_else(|| Error::unsupported(format!("the pass {}", planned.kind), "it is not built in"))?;
        let params = with_values(planned, values);
        let mut taken = params_for(pass, passes::find(&planned.kind), &params, &mut self.notes)?;
        let asks = |key: &str| pass.params().iter().any(|spec| spec.name == key);
        if asks("execution_provider") && !taken.contains_key("execution_provider") {
            let provider = &self.pipeline.target.value.accelerator.provider;
            taken.insert("execution_provider".to_owned(), provider.as_str().into());
        }
        let origin = format!("{}: pass {}", self.plan.config.origin, pass.name());
        let config = PassConfig::new(&origin, pass.params(), &taken)?;
        let key = self.run_key(input, pass, planned, &config)?;
        if let Some(node) = self.found(&key, input) {
            self.cached += 1;
            return Ok(node);
        }
        let lock = self.cache.lock(&key)?;
        if let Some(node) = self.found(&key, input) {
            self.cached += 1;
            return Ok(node);
        }
        let result = self.compute(input, pass, &config, &key);
        drop(lock);
        let node = result?;
        self.ran += 1;
        Ok(node)
    }

    /// The hash of everything that the result of a run depends on.
    fn run_key(
        &self,
        input: &Node,
        pass: &dyn Pass,
        planned: &PlannedPass,
        config: &PassConfig,
    ) -> Result<String> {
        let mut values = config.values().clone();
        let mut data = Map::new();
        for (name, config) in &planned.data {
            values.remove(name);
            data.insert(name.clone(), self.data_identity(config)?);
        }
        let files = pass.input_files(config);
        let files: Result<Vec<String>> = files.iter().map(|path| self.hashes.tree(path)).collect();
        Ok(hash_value(&json!({
            "input": input.key,
            "pass": pass.name(),
            "version": pass.version(),
            "config": values,
            "data": data,
            "files": files?,
            "device": self.engine.device,
            "accelerator": self.pipeline.target.value.accelerator.to_string(),
        })))
    }

    /// What a data config says, with the bytes of its files in place of their paths.
    fn data_identity(&self, data: &DataConfig) -> Result<Value> {
        let mut load = data.load_dataset.clone();
        if !data.files.is_empty() {
            for key in ["data_files", "data_dir"] {
                load.shift_remove(key);
            }
            let is_path = |name: &Value| {
                name.as_str()
                    .is_some_and(|n| data.files.iter().any(|f| f == Path::new(n)))
            };
            if load.get("data_name").is_some_and(is_path) {
                load.shift_remove("data_name");
            }
        }
        let files: Result<Vec<String>> = data.files.iter().map(|path| self.hashes.tree(path)).collect();
        Ok(json!({
            "load": load,
            "pre": data.pre_process,
            "post": data.post_process,
            "loader": data.dataloader,
            "files": files?,
        }))
    }

    /// The result of a finished run, with its line in the footprint.
    fn found(&mut self, key: &str, input: &Node) -> Option<Node> {
        let (run, model) = self.cache.finished(key)?;
        let node = self.node_of(key, &model)?;
        self.footprint
            .add(FootprintNode::of_run(&run, &model, &input.id, &node));
        Some(node)
    }

    fn node_of(&self, key: &str, model: &ModelRecord) -> Option<Node> {
        let path = self.unrelated(&model.model_path);
        let adapter = model.adapter_path.as_deref().map(|path| self.unrelated(path));
        let there = path.exists() && adapter.as_ref().is_none_or(|adapter| adapter.exists());
        there.then(|| Node {
            id: short(key).to_owned(),
            key: key.to_owned(),
            path,
            adapter,
            onnx: !model.kind.eq_ignore_ascii_case("hfmodel"),
        })
    }

    fn compute(&mut self, input: &Node, pass: &dyn Pass, config: &PassConfig, key: &str) -> Result<Node> {
        let folder = self.cache.run_folder(key);
        let output = folder.join("models");
        // What a finished run left and somebody changed is no basis to continue from.
        if folder.join("run.json").exists() {
            std::fs::remove_dir_all(&folder).map_err(Error::io("remove", &folder))?;
        }
        fsio::create_dir(&output)?;
        let start = now();
        let made = (|| {
            let model = self.handle(input)?;
            check_kind(pass, model.as_ref())?;
            pass.check(model.as_ref(), config)?;
            let context = PassContext {
                output: &output,
                progress: self.engine.progress,
                cancel: self.engine.cancel,
            };
            pass.run(model.as_ref(), config, &context)
        })();
        let made = match made {
            Ok(made) => made,
            Err(error @ (Error::Cancelled | Error::Config { .. } | Error::UnknownKey { .. })) => {
                return Err(error);
            }
            Err(error) => {
                // The next run starts afresh; what was finished before the error is rarely worth trusting.
                let _ = std::fs::remove_dir_all(&folder);
                return Err(Error::stage(pass.name())(error));
            }
        };
        let model = ModelRecord {
            kind: match made.kind() {
                ModelKind::HuggingFace => "HfModel".to_owned(),
                ModelKind::Onnx => "ONNXModel".to_owned(),
            },
            model_path: self.related(made.path()),
            adapter_path: made.adapter().map(|path| self.related(path)),
            files: snapshot(&output)?,
        };
        let run = RunRecord {
            input_model_id: input.id.clone(),
            output_model_id: short(key).to_owned(),
            pass_name: pass.name().to_owned(),
            pass_version: pass.version(),
            pass_config: Value::Object(config.values().clone()),
            accelerator_spec: self.pipeline.target.value.accelerator.to_string(),
            key: key.to_owned(),
            start_time: start,
            end_time: now(),
        };
        self.cache.finish(&run, &model)?;
        let node = self.node_of(key, &model).ok_or_else(|| {
            Error::file(
                &output,
                "the model that the pass says it made",
                format!("no `{}`", model.model_path),
            )
        })?;
        self.footprint
            .add(FootprintNode::of_run(&run, &model, &input.id, &node));
        Ok(node)
    }

    /// A path as `model.json` keeps it: relative to the runs, or to the input model, where it can be.
    fn related(&self, path: &Path) -> String {
        let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        let (path, runs, input) = (real(path), real(&self.cache.runs()), real(&self.input.path));
        if let Ok(inside) = path.strip_prefix(&runs) {
            return inside.to_string_lossy().into_owned();
        }
        if let Some(adapter) = &self.input.adapter
            && let Ok(inside) = path.strip_prefix(real(adapter))
        {
            return format!("input-adapter/{}", inside.to_string_lossy());
        }
        match path.strip_prefix(&input) {
            Ok(inside) => format!("input/{}", inside.to_string_lossy()),
            Err(_) => path.to_string_lossy().into_owned(),
        }
    }

    fn unrelated(&self, path: &str) -> PathBuf {
        let inside = |folder: &Path, rest: &str| match rest.trim_start_matches('/') {
            "" => folder.to_path_buf(),
            rest => folder.join(rest),
        };
        if let (Some(rest), Some(adapter)) = (path.strip_prefix("input-adapter"), &self.input.adapter) {
            return inside(adapter, rest);
        }
        match path.strip_prefix("input") {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => inside(&self.input.path, rest),
            // An absolute path replaces what it is joined to.
            _ => self.cache.runs().join(path),
        }
    }

    /// Measures the input model. A metric of the result (an ONNX model's latency) may have no meaning for it: then
    /// this is noted, and a goal has nothing to be relative to.
    pub fn measure_input(&mut self, evaluator: &Named<EvaluatorConfig>) -> Result<Metrics> {
        let input = self.input.clone();
        self.measure_metrics(&input, evaluator, true)
    }

    /// Measures a model, or finds that it has been measured.
    pub fn measure(&mut self, node: &Node, evaluator: &Named<EvaluatorConfig>) -> Result<Metrics> {
        self.measure_metrics(node, evaluator, false)
    }

    fn measure_metrics(
        &mut self,
        node: &Node,
        evaluator: &Named<EvaluatorConfig>,
        lenient: bool,
    ) -> Result<Metrics> {
        let mut metrics = Metrics::new();
        for metric in &evaluator.value.metrics {
            self.engine.cancel.check()?;
            let measured = match self.measured(node, metric) {
                Ok(measured) => measured,
                Err(error @ Error::Unsupported { .. }) if lenient => {
                    let note = format!("the input model is not measured: {error}");
                    if !self.notes.contains(&note) {
                        self.notes.push(note);
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            for (name, value, higher_is_better) in measured {
                let sub = metric.sub_types.iter().find(|sub| sub.name == name);
                let entry = MetricValue {
                    value,
                    priority: sub.and_then(|sub| sub.priority).map_or(-1, i64::from),
                    higher_is_better: sub.map_or(higher_is_better, |sub| sub.higher_is_better),
                };
                metrics.insert(format!("{}-{name}", metric.name), entry);
            }
        }
        self.note_tasks(evaluator, &metrics);
        if node.id == self.input.id {
            let values = metrics.iter().map(|(name, m)| (name.clone(), m.value)).collect();
            resolve_goals(&mut self.objectives, Some(&values));
        }
        self.footprint.measured(&node.id, &metrics, &self.objectives);
        Ok(metrics)
    }

    /// The values of one metric: name, value, whether more is better.
    fn measured(&self, node: &Node, metric: &MetricSpec) -> Result<Vec<(String, f64, bool)>> {
        let accelerator = &self.pipeline.target.value.accelerator;
        let missing =
            || Error::unsupported(format!("the metric type `{}`", metric.kind), "it is not built in");
        let measurer = self.engine.evaluators.find(&metric.kind).ok_or_else(missing)?;
        let data = match &metric.data {
            Some(Reference::Inline(data)) => Some(data.as_ref()),
            _ => None,
        };
        let identity = data.map(|data| self.data_identity(data)).transpose()?;
        let subs: Vec<Value> = metric
            .sub_types
            .iter()
            .map(|sub| json!({"name": sub.name, "config": sub.config, "higher": sub.higher_is_better}))
            .collect();
        let files = measurer.input_files(metric);
        let files: Result<Vec<String>> = files.iter().map(|path| self.hashes.tree(path)).collect();
        let key = hash_value(&json!({
            "model": node.key,
            "metric": metric.kind,
            "subs": subs,
            "settings": metric.settings,
            "data": identity,
            "files": files?,
            "version": measurer.version(),
            "device": self.engine.device,
        }));
        let path = self.cache.evaluation(&node.key, &accelerator.to_string(), &key);
        if let Some(measured) = read_evaluation(&path, &key) {
            return Ok(measured);
        }
        let _lock = Lock::take(&path.with_extension("lock"))?;
        if let Some(measured) = read_evaluation(&path, &key) {
            return Ok(measured);
        }
        let context = EvalContext {
            data,
            accelerator,
            progress: self.engine.progress,
            cancel: self.engine.cancel,
        };
        let handle = self.handle(node)?;
        let measured = measurer.evaluate(handle.as_ref(), metric, &context)?;
        let measured: Vec<(String, f64, bool)> = measured
            .into_iter()
            .map(|m| (m.name, m.value, m.higher_is_better))
            .collect();
        fsio::write_json(&path, &json!({"key": key, "values": measured}), 4)?;
        Ok(measured)
    }

    /// Tasks name their values themselves; where nothing else is an objective, they are, in order.
    fn note_tasks(&mut self, evaluator: &Named<EvaluatorConfig>, metrics: &Metrics) {
        let on_tasks = evaluator
            .value
            .metrics
            .iter()
            .any(|metric| metric.kind == "tasks");
        if !on_tasks || !self.objectives.is_empty() {
            return;
        }
        for (rank, (name, metric)) in metrics.iter().enumerate() {
            self.objectives.push(Objective {
                name: name.clone(),
                priority: u32::try_from(rank + 1).unwrap_or(u32::MAX),
                higher_is_better: metric.higher_is_better,
                goal: None,
                bound: None,
            });
        }
    }
}

/// The parameters of a pass at one point of a search.
pub(super) fn with_values(planned: &PlannedPass, values: &[usize]) -> Map<String, Value> {
    let mut params = planned.params.clone();
    for ((name, tried), at) in planned.search.iter().zip(values) {
        if let Some(value) = tried.get(*at) {
            params.insert(name.clone(), value.clone());
        }
    }
    params
}

fn read_evaluation(path: &Path, key: &str) -> Option<Vec<(String, f64, bool)>> {
    let value: Value = fsio::read_json(path).ok()?;
    if value.get("key").and_then(Value::as_str) != Some(key) {
        return None;
    }
    serde_json::from_value(value.get("values")?.clone()).ok()
}

fn check_kind(pass: &dyn Pass, model: &dyn ModelHandle) -> Result<()> {
    let (takes, _) = pass.transforms();
    if model.kind() == takes {
        return Ok(());
    }
    let name = |kind| match kind {
        ModelKind::HuggingFace => "a Hugging Face model",
        ModelKind::Onnx => "an ONNX model",
    };
    Err(Error::unsupported(
        format!("{} as input of {}", name(model.kind()), pass.name()),
        format!("it takes {}", name(takes)),
    ))
}

/// The model that a pipeline starts from, fetched if it is on the hub.
fn input_node(engine: &Engine<'_>, model: &ModelSource, hashes: &FileHashes) -> Result<Node> {
    let fetch = |location: &Location| match location {
        Location::Local(path) => Ok(path.clone()),
        Location::Hub(name) => crate::hub::resolve(name, engine.progress),
        Location::Azure(resource) => Err(Error::unsupported("a model in Azure", resource.need())),
    };
    let place = model.path.as_ref();
    let place = place.ok_or_else(|| Error::unsupported("a model without `model_path`", "say where it is"))?;
    let mut path = fetch(place)?;
    if !path.exists() {
        return Err(Error::file(&path, "a model", "nothing"));
    }
    if let (true, Some(name)) = (path.is_dir(), &model.onnx_file_name) {
        path = fsio::contained(&path, name)?;
    }
    let adapter = model.adapter.as_ref().map(fetch).transpose()?;
    let key = hash_value(&json!({
        "type": model.kind.name(),
        "files": input_hashes(&path, hashes)?,
        "adapter": adapter.as_ref().map(|path| hashes.tree(path)).transpose()?,
        "task": model.task,
        "load_kwargs": model.load_kwargs,
        "attributes": model.attributes,
    }));
    Ok(Node {
        id: short(&key).to_owned(),
        key,
        path,
        adapter,
        onnx: model.kind == ModelType::Onnx,
    })
}

/// The hashes of everything that a model path means: a folder, what its `model_config.json` names elsewhere, or the
/// files beside an ONNX file.
fn input_hashes(path: &Path, hashes: &FileHashes) -> Result<Vec<String>> {
    let folder = match path.is_file() {
        true => path
            .parent()
            .filter(|p| !p.as_os_str().is_empty())
            .unwrap_or(Path::new(".")),
        false => path,
    };
    let mut found = vec![hashes.tree(folder)?];
    if path.is_file() {
        found.push(
            path.file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
        );
    }
    if let Some(config) = ModelConfigFile::read(folder)? {
        for key in ["model_path", "adapter_path"] {
            let named = config.path(folder, key);
            if let Some(named) = named.filter(|named| named.exists() && !named.starts_with(folder)) {
                found.push(hashes.tree(&named)?);
            }
        }
    }
    Ok(found)
}
