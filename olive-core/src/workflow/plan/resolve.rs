//! Resolving references and parameters.

use serde_json::{Map, Value};

use super::{Named, Pipeline, Plan, PlannedPass, Step};
use crate::error::{Error, Result, nearest_name};
use crate::pass::ParamKind;
use crate::workflow::registry::PassRegistry;
use crate::workflow::schema::passes::{self, DEFAULT_VALUE, KnownKind, SEARCHABLE_VALUES};
use crate::workflow::schema::read::Reader;
use crate::workflow::schema::{
    Build, DataConfig, EvaluatorConfig, ModelSource, ModelType, PassEntry, Reference, RunConfig,
    SearchConfig, System,
};

/// A parameter as resolving needs it, from the table or from a registered pass.
struct Param {
    name: String,
    required: bool,
    default: Value,
    search: Vec<Value>,
    is_data: bool,
    takes_list: bool,
}

pub(super) struct Resolver<'a> {
    pub(super) config: &'a RunConfig,
    pub(super) registry: &'a PassRegistry,
    warnings: Vec<String>,
    blockers: Vec<String>,
}

impl<'a> Resolver<'a> {
    pub(super) fn new(config: &'a RunConfig, registry: &'a PassRegistry) -> Self {
        Self {
            config,
            registry,
            warnings: config.warnings.clone(),
            blockers: Vec::new(),
        }
    }

    pub(super) fn plan(mut self) -> Result<Plan> {
        let mut pipelines = Vec::new();
        let builds: Vec<_> = self
            .config
            .builds
            .iter()
            .filter(|(name, _)| name != "_default")
            .collect();
        if builds.is_empty() {
            pipelines.push(self.pipeline(None, None)?);
        } else {
            let defaults = self.config.builds.iter().find(|(name, _)| name == "_default");
            for (name, build) in builds {
                let default = defaults.map(|(_, build)| build);
                pipelines.push(self.pipeline(Some((name, build)), default)?);
            }
        }
        self.block_remote()?;
        Ok(Plan {
            config: self.config.clone(),
            pipelines,
            warnings: self.warnings,
            blockers: self.blockers,
        })
    }

    pub(super) fn wrong(
        &self,
        key: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        Error::config(self.config.origin.as_str(), key, expected, found)
    }

    pub(super) fn block(&mut self, reason: String) {
        if !self.blockers.contains(&reason) {
            self.blockers.push(reason);
        }
    }

    pub(super) fn warn(&mut self, line: String) {
        if !self.warnings.contains(&line) {
            self.warnings.push(line);
        }
    }

    fn pipeline(&mut self, build: Option<(&String, &Build)>, default: Option<&Build>) -> Result<Pipeline> {
        let config = self.config;
        let engine = &config.engine;
        let levels: Vec<&Build> = build.map(|(_, build)| build).into_iter().chain(default).collect();
        let path = build.map_or(String::new(), |(name, _)| format!("builds.{name}."));
        let pick = |own: &dyn Fn(&Build) -> Option<Reference<System>>,
                    general: &Option<Reference<System>>| {
            levels.iter().find_map(|b| own(b)).or_else(|| general.clone())
        };
        let host = self.system(pick(&|b| b.host.clone(), &engine.host), &format!("{path}host"))?;
        let target = pick(&|b| b.target.clone(), &engine.target);
        let target = match target {
            None => host.clone(),
            some => self.system(some, &format!("{path}target"))?,
        };
        let evaluator = levels.iter().find_map(|b| b.evaluator.clone());
        let evaluator = self.evaluator(
            evaluator.or_else(|| engine.evaluator.clone()),
            &format!("{path}evaluator"),
        )?;
        let search = levels.iter().find_map(|b| b.search.clone());
        let search = search.unwrap_or_else(|| engine.search.clone());
        let steps = self.steps(build, &levels, search.as_ref(), &host)?;
        if search.is_some() {
            self.check_objectives(&steps, evaluator.as_ref())?;
        }
        let model = self.model(build)?;
        let output = levels.iter().find_map(|b| b.output_dir.clone());
        let output_dir = output.or_else(|| match build {
            Some((name, _)) => engine.output_dir.as_ref().map(|folder| folder.join(name)),
            None => engine.output_dir.clone(),
        });
        Ok(Pipeline {
            name: build.map(|(name, _)| name.clone()),
            model,
            steps,
            host,
            target,
            evaluator,
            search,
            output_dir,
            packaging: engine.packaging.clone(),
        })
    }

    /// The passes of a pipeline, in order.
    fn steps(
        &mut self,
        build: Option<(&String, &Build)>,
        levels: &[&Build],
        search: Option<&SearchConfig>,
        host: &Named<System>,
    ) -> Result<Vec<Step>> {
        let config = self.config;
        let names = levels.iter().map(|b| &b.pipeline).find(|names| !names.is_empty());
        let chosen: Vec<&(String, Vec<PassEntry>)> = match (names, build) {
            (Some(names), Some((build, _))) => names
                .iter()
                .map(|name| {
                    let found = config.passes.iter().find(|(key, _)| key == name);
                    found.ok_or_else(|| {
                        let known = config.passes.iter().map(|(key, _)| key.as_str());
                        self.unknown(&format!("builds.{build}.pipeline"), "a pass", name, known)
                    })
                })
                .collect::<Result<_>>()?,
            _ => config.passes.iter().collect(),
        };
        let mut steps = Vec::new();
        for (name, entries) in chosen {
            let mut choices = Vec::new();
            for (index, entry) in entries.iter().enumerate() {
                let path = match entries.len() {
                    1 => format!("passes.{name}"),
                    _ => format!("passes.{name}[{index}]"),
                };
                choices.push(self.pass(entry, &path, search, host)?);
            }
            if choices.len() > 1 && search.is_none() {
                self.warn(format!(
                    "`passes.{name}` has {} alternatives; without `search_strategy` the first is used",
                    choices.len()
                ));
                choices.truncate(1);
            }
            steps.push(Step {
                name: name.clone(),
                choices,
            });
        }
        Ok(steps)
    }

    /// The model that a build starts from: one component, or the whole.
    fn model(&mut self, build: Option<(&String, &Build)>) -> Result<ModelSource> {
        let model = &self.config.input_model;
        let Some((name, build)) = build else {
            return Ok(model.clone());
        };
        match build.components.as_slice() {
            [] => Ok(model.clone()),
            [one] if model.kind == ModelType::Composite => {
                let names = self.config.document.pointer("/input_model/model_component_names");
                let names = names.and_then(Value::as_array).into_iter().flatten();
                let names: Vec<&str> = names.filter_map(Value::as_str).collect();
                let at = names.iter().position(|n| n == one);
                let component = at.and_then(|at| model.components.get(at)).cloned();
                component.ok_or_else(|| {
                    self.unknown(
                        &format!("builds.{name}.components"),
                        "a component",
                        one,
                        names.into_iter(),
                    )
                })
            }
            _ => {
                self.block(format!(
                    "build `{name}` chooses components of a model that is not composite"
                ));
                Ok(model.clone())
            }
        }
    }

    fn unknown<'n>(&self, key: &str, what: &str, name: &str, known: impl Iterator<Item = &'n str>) -> Error {
        let known: Vec<&str> = known.collect();
        let expected = match nearest_name(name, known.iter().copied()) {
            Some(nearest) => format!("the name of {what} such as `{nearest}`"),
            None if known.is_empty() => format!("the name of {what}, of which there are none"),
            None => format!("the name of {what}: {}", known.join(", ")),
        };
        self.wrong(key, expected, format!("`{name}`"))
    }

    pub(super) fn system(&self, reference: Option<Reference<System>>, key: &str) -> Result<Named<System>> {
        Ok(match reference {
            None => Named {
                name: String::new(),
                value: System::default(),
            },
            Some(Reference::Inline(system)) => Named {
                name: String::new(),
                value: *system,
            },
            Some(Reference::Name(name)) => {
                let known = self.config.systems.iter().map(|(key, _)| key.as_str());
                let system = self.config.system(&name).cloned();
                let value = system.ok_or_else(|| self.unknown(key, "a system", &name, known))?;
                Named { name, value }
            }
        })
    }

    fn evaluator(
        &mut self,
        reference: Option<Reference<EvaluatorConfig>>,
        key: &str,
    ) -> Result<Option<Named<EvaluatorConfig>>> {
        let mut named = match reference {
            None => return Ok(None),
            Some(Reference::Inline(evaluator)) => Named {
                name: String::new(),
                value: *evaluator,
            },
            Some(Reference::Name(name)) => {
                let known = self.config.evaluators.iter().map(|(key, _)| key.as_str());
                let evaluator = self.config.evaluator(&name).cloned();
                let value = evaluator.ok_or_else(|| self.unknown(key, "an evaluator", &name, known))?;
                Named { name, value }
            }
        };
        for metric in &mut named.value.metrics {
            if let Some(Reference::Name(name)) = &metric.data {
                let data = self.data(
                    name,
                    &format!("evaluators.{}.{}.data_config", named.name, metric.name),
                )?;
                metric.data = Some(Reference::Inline(Box::new(data)));
            }
        }
        Ok(Some(named))
    }

    fn data(&self, name: &str, key: &str) -> Result<DataConfig> {
        let known = self.config.data_configs.iter().map(|data| data.name.as_str());
        let data = self.config.data_config(name).cloned();
        data.ok_or_else(|| self.unknown(key, "a data config", name, known))
    }

    fn params(&self, kind: &str, path: &str) -> Result<Vec<Param>> {
        if let Some(known) = passes::find(kind) {
            return Ok(known.params.iter().map(Param::known).collect());
        }
        if let Some(pass) = self.registry.find(kind) {
            return Ok(pass.params().iter().map(Param::registered).collect());
        }
        let names = self.registry.names();
        Err(self.unknown(
            &format!("{path}.type"),
            "a pass",
            kind,
            names.into_iter().map(|(name, _)| name),
        ))
    }

    fn pass(
        &mut self,
        entry: &PassEntry,
        path: &str,
        search: Option<&SearchConfig>,
        host: &Named<System>,
    ) -> Result<PlannedPass> {
        let params = self.params(&entry.kind, path)?;
        if let Some(key) = entry
            .given
            .keys()
            .find(|key| !params.iter().any(|p| p.name == **key))
        {
            let known = params.iter().map(|p| p.name.as_str());
            return Err(Error::unknown_key(
                self.config.origin.as_str(),
                format!("{path}.{key}"),
                known,
            ));
        }
        let mut planned = PlannedPass {
            kind: entry.kind.clone(),
            params: Map::new(),
            given: Vec::new(),
            search: Vec::new(),
            data: Vec::new(),
            host: match &entry.host {
                None => host.clone(),
                own => self.system(own.clone(), &format!("{path}.host"))?,
            },
            evaluator: self.evaluator(entry.evaluator.clone(), &format!("{path}.evaluator"))?,
            runs: self.registry.find(&entry.kind).is_some(),
        };
        for param in &params {
            self.param(entry, param, path, search, &mut planned)?;
        }
        self.hold_out(&mut planned, path)?;
        self.block_pass(&planned);
        Ok(planned)
    }

    /// Earlier releases let a training pass hold out a part of its rows for evaluation. Here these are two splits of
    /// one data config: the first rows to train on, the last ones to evaluate on.
    fn hold_out(&mut self, planned: &mut PlannedPass, path: &str) -> Result<()> {
        let Some(size) = planned.params.get("eval_dataset_size").and_then(Value::as_f64) else {
            return Ok(());
        };
        let key = format!("{path}.eval_dataset_size");
        planned.params.shift_remove("eval_dataset_size");
        planned.given.retain(|name| name != "eval_dataset_size");
        if planned.data.iter().any(|(name, _)| name == "eval_data_config") {
            self.warn(format!("key `{key}` has no effect: `eval_data_config` is given"));
            return Ok(());
        }
        let Some((_, train)) = planned
            .data
            .iter_mut()
            .find(|(name, _)| name == "train_data_config")
        else {
            return Ok(());
        };
        let whole = train
            .load_dataset
            .get("split")
            .and_then(Value::as_str)
            .unwrap_or("train")
            .to_owned();
        if whole.contains(['[', '+']) {
            return Err(self.wrong(
                key,
                "an `eval_data_config`, since the split is cut already",
                whole,
            ));
        }
        let (head, tail) = if size > 0.0 && size < 1.0 {
            let percent = ((1.0 - size) * 100.0).round().clamp(1.0, 99.0);
            (format!("[:{percent}%]"), format!("[{percent}%:]"))
        } else if size >= 1.0 && size.fract() == 0.0 {
            (format!("[:-{size}]"), format!("[-{size}:]"))
        } else {
            return Err(self.wrong(
                key,
                "a part between 0 and 1, or a number of rows",
                size.to_string(),
            ));
        };
        let mut eval = train.clone();
        eval.name = format!("{}_held_out", train.name);
        train
            .load_dataset
            .insert("split".to_owned(), Value::from(format!("{whole}{head}")));
        eval.load_dataset
            .insert("split".to_owned(), Value::from(format!("{whole}{tail}")));
        let line = format!(
            "`{key}`: rows {whole}{head} of `{}` are trained on, {whole}{tail} held out",
            train.name
        );
        planned
            .params
            .insert("train_data_config".to_owned(), train.to_value());
        planned
            .params
            .insert("eval_data_config".to_owned(), eval.to_value());
        planned.given.push("eval_data_config".to_owned());
        planned.data.push(("eval_data_config".to_owned(), eval));
        self.warn(line);
        Ok(())
    }

    /// Gives one parameter its value, or the values that are tried.
    fn param(
        &mut self,
        entry: &PassEntry,
        param: &Param,
        path: &str,
        search: Option<&SearchConfig>,
        planned: &mut PlannedPass,
    ) -> Result<()> {
        let key = format!("{path}.{}", param.name);
        let given = entry.given.get(&param.name).filter(|value| !value.is_null());
        let all = search.is_some_and(|search| search.include_pass_params) && !entry.disable_search;
        let value = match given {
            Some(value) if value == SEARCHABLE_VALUES => {
                if search.is_none() {
                    return Err(self.wrong(key, "a value, or a `search_strategy`", SEARCHABLE_VALUES));
                }
                if param.search.is_empty() {
                    param.default.clone()
                } else {
                    planned.given.push(param.name.clone());
                    planned.search.push((param.name.clone(), param.search.clone()));
                    return Ok(());
                }
            }
            Some(value) if value == DEFAULT_VALUE => param.default.clone(),
            Some(Value::Array(values)) if !param.takes_list => {
                if search.is_none() {
                    let found = Value::Array(values.clone()).to_string();
                    return Err(self.wrong(key, "one value, or a `search_strategy`", found));
                }
                planned.given.push(param.name.clone());
                planned.search.push((param.name.clone(), values.clone()));
                return Ok(());
            }
            Some(value) => {
                planned.given.push(param.name.clone());
                value.clone()
            }
            None if all && !param.search.is_empty() => {
                planned.search.push((param.name.clone(), param.search.clone()));
                return Ok(());
            }
            None if param.required => return Err(self.wrong(key, "a value", "nothing")),
            None => param.default.clone(),
        };
        let value = if param.is_data && !value.is_null() {
            let data = match &value {
                Value::String(name) => self.data(name, &key)?,
                value => Reader::of(self.config).data_config(value, &key)?,
            };
            let value = data.to_value();
            planned.data.push((param.name.clone(), data));
            value
        } else {
            value
        };
        planned.params.insert(param.name.clone(), value);
        Ok(())
    }
}

impl Param {
    fn known(param: &passes::KnownParam) -> Self {
        let list = matches!(param.kind, KnownKind::List | KnownKind::Any | KnownKind::Map);
        Self {
            name: param.name.to_owned(),
            required: param.required,
            default: param.default.clone(),
            search: param.search.clone(),
            is_data: param.kind == KnownKind::Data,
            takes_list: list || param.name.ends_with("_list"),
        }
    }

    fn registered(spec: &crate::pass::ParamSpec) -> Self {
        let json = |text: &str| serde_json::from_str(text).unwrap_or(Value::Null);
        Self {
            name: spec.name.to_owned(),
            required: spec.default.is_none(),
            default: spec.default.map_or(Value::Null, json),
            search: spec.search.iter().map(|text| json(text)).collect(),
            is_data: spec.kind == ParamKind::DataConfig,
            takes_list: matches!(spec.kind, ParamKind::TextList | ParamKind::Object),
        }
    }
}
