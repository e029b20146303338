//! Spellings of earlier Olive releases, mapped to today's: one table, [`RULES`], whose every line carries the example
//! that tests it.
//!
//! The rules see the document with its wrappers dissolved, so that a key is found whether or not it stood under
//! `config` or `params`. What a rule does is said in one warning, `legacy key X → Y`.

mod rewrites;
mod rules;

use serde_json::{Map, Value};

use super::schema::document::original_path;
use super::schema::shape::join;
use crate::error::{Error, Result};

pub use rules::RULES;

/// The kind of object that a rule applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The whole document.
    Top,
    /// The engine's part of it.
    Engine,
    /// A model.
    Model,
    /// The arguments that a Hugging Face model is loaded with.
    LoadKwargs,
    /// A system.
    System,
    /// One of a system's accelerators.
    Accelerator,
    /// A data config.
    DataConfig,
    /// How rows become samples.
    PreProcess,
    /// A metric of an evaluator.
    Metric,
    /// A sub type of a metric.
    SubType,
    /// A search strategy.
    Search,
    /// A pass of one of these types; of any type where the list is empty.
    Pass(&'static [&'static str]),
    /// The arguments of a training run.
    TrainingArgs,
}

/// What a rule does.
#[derive(Debug, Clone, Copy)]
pub enum Change {
    /// The key has another name; its value stays.
    Rename(&'static str),
    /// The key has gone, for this reason.
    Drop(&'static str),
    /// The object is rewritten; the text says what becomes of the key.
    Rewrite(Rewrite, &'static str),
}

/// Rewrites an object in which the rule's key stands; `Ok(false)` if there was nothing legacy about it.
pub type Rewrite = fn(&mut Map<String, Value>) -> std::result::Result<bool, String>;

/// One legacy form.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Where it stands.
    pub place: Place,
    /// The key.
    pub key: &'static str,
    /// What it became.
    pub change: Change,
    /// An object with the form, and the same object in today's spelling.
    pub example: (&'static str, &'static str),
}

/// Whether `key` at the top belongs to the engine in an earlier spelling.
pub(super) fn is_engine_key(key: &str) -> bool {
    RULES
        .iter()
        .any(|rule| rule.place == Place::Engine && rule.key == key)
}

/// Applies all rules to a canonical document. Returns what was mapped, one line each, without repetition; paths are
/// those of `written`, the document as it stood in the file.
///
/// # Errors
/// [`Error::Config`] where a form cannot be mapped without a change of meaning.
pub fn modernise(origin: &str, written: &Value, top: &mut Map<String, Value>) -> Result<Vec<String>> {
    let mut applier = Applier {
        origin,
        written,
        warnings: Vec::new(),
    };
    applier.document(top)?;
    Ok(applier.warnings)
}

struct Applier<'a> {
    origin: &'a str,
    written: &'a Value,
    warnings: Vec<String>,
}

impl Applier<'_> {
    fn document(&mut self, top: &mut Map<String, Value>) -> Result<()> {
        self.apply(Place::Top, top, "")?;
        if let Some(Value::Object(engine)) = top.get_mut("engine") {
            self.engine(engine, "engine")?;
        }
        if let Some(model) = top.get_mut("input_model") {
            self.model(model, "input_model")?;
        }
        self.map(top, "systems", |s, object, path| s.system(object, path))?;
        self.map(top, "builds", |s, object, path| s.engine(object, path))?;
        self.map(top, "evaluators", |s, object, path| s.evaluator(object, path))?;
        if let Some(Value::Array(list)) = top.get_mut("data_configs") {
            for (index, entry) in list.iter_mut().enumerate() {
                if let Value::Object(object) = entry {
                    self.data_config(object, &format!("data_configs[{index}]"))?;
                }
            }
        }
        let Some(Value::Object(passes)) = top.get_mut("passes") else {
            return Ok(());
        };
        for (name, entry) in passes {
            let path = join("passes", name);
            match entry {
                Value::Array(list) => {
                    for (index, entry) in list.iter_mut().enumerate() {
                        self.pass(entry, &format!("{path}[{index}]"))?;
                    }
                }
                entry => self.pass(entry, &path)?,
            }
        }
        Ok(())
    }

    fn map(
        &mut self,
        top: &mut Map<String, Value>,
        key: &str,
        visit: impl Fn(&mut Self, &mut Map<String, Value>, &str) -> Result<()>,
    ) -> Result<()> {
        if let Some(Value::Object(entries)) = top.get_mut(key) {
            for (name, entry) in entries {
                if let Value::Object(object) = entry {
                    visit(self, object, &join(key, name))?;
                }
            }
        }
        Ok(())
    }

    fn engine(&mut self, engine: &mut Map<String, Value>, path: &str) -> Result<()> {
        self.apply(Place::Engine, engine, path)?;
        if let Some(Value::Object(search)) = engine.get_mut("search_strategy") {
            self.apply(Place::Search, search, &join(path, "search_strategy"))?;
        }
        for key in ["host", "target"] {
            if let Some(Value::Object(system)) = engine.get_mut(key) {
                self.system(system, &join(path, key))?;
            }
        }
        if let Some(Value::Object(evaluator)) = engine.get_mut("evaluator") {
            self.evaluator(evaluator, &join(path, "evaluator"))?;
        }
        Ok(())
    }

    fn model(&mut self, model: &mut Value, path: &str) -> Result<()> {
        let Value::Object(model) = model else {
            return Ok(());
        };
        self.apply(Place::Model, model, path)?;
        if let Some(Value::Object(load)) = model.get_mut("load_kwargs") {
            self.apply(Place::LoadKwargs, load, &join(path, "load_kwargs"))?;
        }
        if let Some(Value::Array(components)) = model.get_mut("model_components") {
            for (index, component) in components.iter_mut().enumerate() {
                self.model(component, &format!("{path}.model_components[{index}]"))?;
            }
        }
        Ok(())
    }

    fn system(&mut self, system: &mut Map<String, Value>, path: &str) -> Result<()> {
        self.apply(Place::System, system, path)?;
        if let Some(Value::Array(accelerators)) = system.get_mut("accelerators") {
            for (index, accelerator) in accelerators.iter_mut().enumerate() {
                if let Value::Object(object) = accelerator {
                    self.apply(
                        Place::Accelerator,
                        object,
                        &format!("{path}.accelerators[{index}]"),
                    )?;
                }
            }
        }
        Ok(())
    }

    fn data_config(&mut self, data: &mut Map<String, Value>, path: &str) -> Result<()> {
        self.apply(Place::DataConfig, data, path)?;
        if let Some(Value::Object(process)) = data.get_mut("pre_process_data_config") {
            self.apply(Place::PreProcess, process, &join(path, "pre_process_data_config"))?;
        }
        Ok(())
    }

    fn evaluator(&mut self, evaluator: &mut Map<String, Value>, path: &str) -> Result<()> {
        let Some(Value::Array(metrics)) = evaluator.get_mut("metrics") else {
            return Ok(());
        };
        for (index, metric) in metrics.iter_mut().enumerate() {
            let Value::Object(metric) = metric else { continue };
            let path = format!("{path}.metrics[{index}]");
            self.apply(Place::Metric, metric, &path)?;
            if let Some(Value::Object(data)) = metric.get_mut("data_config") {
                self.data_config(data, &join(&path, "data_config"))?;
            }
            let Some(Value::Array(subs)) = metric.get_mut("sub_types") else {
                continue;
            };
            for (index, sub) in subs.iter_mut().enumerate() {
                if let Value::Object(sub) = sub {
                    self.apply(Place::SubType, sub, &format!("{path}.sub_types[{index}]"))?;
                }
            }
        }
        Ok(())
    }

    fn pass(&mut self, pass: &mut Value, path: &str) -> Result<()> {
        let Value::Object(pass) = pass else { return Ok(()) };
        self.apply(Place::Pass(&[]), pass, path)?;
        if let Some(Value::Object(args)) = pass.get_mut("training_args") {
            self.apply(Place::TrainingArgs, args, &join(path, "training_args"))?;
        }
        if let Some(Value::Object(host)) = pass.get_mut("host") {
            self.system(host, &join(path, "host"))?;
        }
        if let Some(Value::Object(evaluator)) = pass.get_mut("evaluator") {
            self.evaluator(evaluator, &join(path, "evaluator"))?;
        }
        for (key, entry) in pass {
            if let (true, Value::Object(data)) = (key.ends_with("data_config"), entry) {
                self.data_config(data, &join(path, key))?;
            }
        }
        Ok(())
    }

    fn apply(&mut self, place: Place, object: &mut Map<String, Value>, path: &str) -> Result<()> {
        for rule in RULES {
            if !applies(rule.place, place, object) || !object.contains_key(rule.key) {
                continue;
            }
            let here = original_path(self.written, &join(path, rule.key));
            let wrong = |expected: String, found: &str| Error::config(self.origin, &here, expected, found);
            let became = match rule.change {
                Change::Rename(new) => {
                    let value = object.shift_remove(rule.key).unwrap_or_default();
                    if object.get(new).is_some_and(|other| *other != value) {
                        return Err(wrong(format!("this or `{new}`"), "both, with different values"));
                    }
                    object.insert(new.to_owned(), value);
                    format!("`{new}`")
                }
                Change::Drop(why) => {
                    object.shift_remove(rule.key);
                    format!("nothing ({why})")
                }
                Change::Rewrite(rewrite, became) => {
                    if !rewrite(object).map_err(|expected| wrong(expected, "a form that cannot be mapped"))? {
                        continue;
                    }
                    became.to_owned()
                }
            };
            let line = format!("legacy key `{here}` → {became}");
            if !self.warnings.contains(&line) {
                self.warnings.push(line);
            }
        }
        Ok(())
    }
}

/// Whether a rule for `wanted` applies to an object at `place`.
fn applies(wanted: Place, place: Place, object: &Map<String, Value>) -> bool {
    match (wanted, place) {
        (Place::Pass([]), Place::Pass(_)) => true,
        (Place::Pass(types), Place::Pass(_)) => {
            let kind = object.get("type").and_then(Value::as_str).unwrap_or_default();
            types.iter().any(|t| t.eq_ignore_ascii_case(kind))
        }
        _ => wanted == place,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every line of the table turns its own example into what it says, with a warning, and finds nothing more to
    /// do in the result.
    #[test]
    fn every_rule_maps_its_example() {
        for rule in RULES {
            let parse = |text: &str| match serde_json::from_str::<Value>(text) {
                Ok(Value::Object(object)) => object,
                other => panic!("example of `{}`: {other:?}", rule.key),
            };
            let written = Value::Object(Map::new());
            let mut applier = Applier {
                origin: "t",
                written: &written,
                warnings: Vec::new(),
            };
            let mut object = parse(rule.example.0);
            assert!(
                object.contains_key(rule.key),
                "the example of `{}` lacks it",
                rule.key
            );
            applier.apply(rule.place, &mut object, "").unwrap();
            assert_eq!(
                Value::Object(object.clone()),
                Value::Object(parse(rule.example.1)),
                "{:?} `{}`",
                rule.place,
                rule.key
            );
            assert!(!applier.warnings.is_empty());
            let warned = applier.warnings.len();
            applier.apply(rule.place, &mut object, "").unwrap();
            assert_eq!(applier.warnings.len(), warned, "`{}` is mapped twice", rule.key);
        }
    }

    #[test]
    fn what_would_change_meaning_is_refused() {
        let written = Value::Null;
        let refuse = |place, json: Value| {
            let mut applier = Applier {
                origin: "t",
                written: &written,
                warnings: Vec::new(),
            };
            let mut object = json.as_object().cloned().unwrap();
            applier.apply(place, &mut object, "").unwrap_err().to_string()
        };
        let both = refuse(
            Place::Pass(&[]),
            serde_json::json!({"type": "LoRA", "lora_r": 8, "r": 16}),
        );
        assert!(both.contains("`lora_r`"), "{both}");
        let pair = refuse(Place::PreProcess, serde_json::json!({"dataset_type": "pair"}));
        assert!(pair.contains("`dataset_type`"), "{pair}");
    }
}
