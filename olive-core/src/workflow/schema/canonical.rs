//! One spelling out of several: wrappers (`config`, `params`, …) are dissolved and engine keys are gathered, so that
//! everything after this sees one form.

use serde_json::{Map, Value};

use super::shape::join;
use crate::error::{Error, Result};

/// Dissolves every wrapper of a workflow document.
///
/// # Errors
/// [`Error::Config`] if a key stands both inside and outside a wrapper, or the document is not an object.
pub fn canonicalise(origin: &str, value: &Value) -> Result<Map<String, Value>> {
    let mut top = value
        .as_object()
        .cloned()
        .ok_or_else(|| Error::config(origin, "document", "an object", super::shape::brief(value)))?;
    let folder = Flattener { origin };
    folder.gather_engine(&mut top)?;
    for (key, entry) in &mut top {
        match key.as_str() {
            "input_model" => folder.model(entry, key)?,
            "systems" => folder.each(entry, key, &|f, v, p| f.flatten(v, "config", p))?,
            "evaluators" => folder.each(entry, key, &|f, v, p| f.evaluator(v, p))?,
            "data_configs" => folder.each(entry, key, &|f, v, p| f.data_config(v, p))?,
            "passes" => folder.each(entry, key, &|f, v, p| match v {
                Value::Array(_) => f.each(v, p, &|f, v, p| f.pass(v, p)),
                _ => f.pass(v, p),
            })?,
            "engine" => folder.engine(entry, key)?,
            "builds" => folder.each(entry, key, &|f, v, p| f.engine(v, p))?,
            "workflow_host" => folder.flatten(entry, "config", key)?,
            _ => {}
        }
        folder.resources(entry, key)?;
    }
    Ok(top)
}

struct Flattener<'a> {
    origin: &'a str,
}

type Visit<'v> = &'v dyn Fn(&Flattener<'_>, &mut Value, &str) -> Result<()>;

impl Flattener<'_> {
    /// Moves the keys of `value.wrapper` up into `value`.
    fn flatten(&self, value: &mut Value, wrapper: &str, path: &str) -> Result<()> {
        let Some(object) = value.as_object_mut() else {
            return Ok(());
        };
        let Some(inner) = object.get_mut(wrapper) else {
            return Ok(());
        };
        let inner = match inner.take() {
            Value::Object(inner) => inner,
            Value::Null => Map::new(),
            other => {
                let found = super::shape::brief(&other);
                return Err(Error::config(
                    self.origin,
                    join(path, wrapper),
                    "an object",
                    found,
                ));
            }
        };
        object.shift_remove(wrapper);
        for (key, entry) in inner {
            if object.get(&key).is_some_and(|outer| *outer != entry) {
                let expected = format!("`{key}` in one place");
                let found = format!("it both here and in `{wrapper}`");
                return Err(Error::config(self.origin, join(path, &key), expected, found));
            }
            object.insert(key, entry);
        }
        Ok(())
    }

    /// Visits the entries of a map or list.
    fn each(&self, value: &mut Value, path: &str, visit: Visit<'_>) -> Result<()> {
        match value {
            Value::Object(object) => object
                .iter_mut()
                .try_for_each(|(key, entry)| visit(self, entry, &join(path, key))),
            Value::Array(list) => list
                .iter_mut()
                .enumerate()
                .try_for_each(|(index, entry)| visit(self, entry, &format!("{path}[{index}]"))),
            _ => Ok(()),
        }
    }

    fn child(&self, value: &mut Value, key: &str, path: &str, visit: Visit<'_>) -> Result<()> {
        match value.get_mut(key) {
            Some(entry) => visit(self, entry, &join(path, key)),
            None => Ok(()),
        }
    }

    fn model(&self, value: &mut Value, path: &str) -> Result<()> {
        self.flatten(value, "config", path)?;
        self.child(value, "load_kwargs", path, &|f, v, p| {
            f.flatten(v, "extra_args", p)
        })?;
        self.child(value, "model_components", path, &|f, v, p| {
            f.each(v, p, &|f, v, p| f.model(v, p))
        })
    }

    fn evaluator(&self, value: &mut Value, path: &str) -> Result<()> {
        self.flatten(value, "config", path)?;
        self.child(value, "metrics", path, &|f, v, p| {
            f.each(v, p, &|f, v, p| {
                f.flatten(v, "config", p)?;
                f.child(v, "data_config", p, &|f, v, p| f.data_config(v, p))
            })
        })
    }

    fn data_config(&self, value: &mut Value, path: &str) -> Result<()> {
        self.flatten(value, "config", path)?;
        for part in [
            "load_dataset_config",
            "pre_process_data_config",
            "post_process_data_config",
            "dataloader_config",
        ] {
            self.child(value, part, path, &|f, v, p| {
                f.flatten(v, "params", p)?;
                f.flatten(v, "kwargs", p)
            })?;
        }
        Ok(())
    }

    fn pass(&self, value: &mut Value, path: &str) -> Result<()> {
        self.flatten(value, "config", path)?;
        self.child(value, "host", path, &|f, v, p| f.flatten(v, "config", p))?;
        self.child(value, "evaluator", path, &|f, v, p| f.evaluator(v, p))?;
        self.child(value, "training_args", path, &|f, v, p| {
            f.flatten(v, "extra_args", p)
        })?;
        let Some(object) = value.as_object_mut() else {
            return Ok(());
        };
        for (key, entry) in object {
            if key.ends_with("data_config") {
                self.data_config(entry, &join(path, key))?;
            }
        }
        Ok(())
    }

    fn engine(&self, value: &mut Value, path: &str) -> Result<()> {
        self.flatten(value, "config", path)?;
        for key in ["host", "target"] {
            self.child(value, key, path, &|f, v, p| f.flatten(v, "config", p))?;
        }
        self.child(value, "evaluator", path, &|f, v, p| f.evaluator(v, p))?;
        self.child(value, "search_strategy", path, &|f, v, p| {
            f.flatten(v, "config", p)?;
            f.flatten(v, "sampler_config", p)?;
            f.flatten(v, "search_algorithm_config", p)
        })?;
        self.child(value, "packaging_config", path, &|f, v, p| match v {
            Value::Array(_) => f.each(v, p, &|f, v, p| f.flatten(v, "config", p)),
            _ => f.flatten(v, "config", p),
        })
    }

    /// Moves engine keys that stand at the top into `engine`.
    fn gather_engine(&self, top: &mut Map<String, Value>) -> Result<()> {
        let is_engine = |key: &str| {
            super::shapes::ENGINE.iter().any(|f| f.name == key) || super::super::legacy::is_engine_key(key)
        };
        let moved: Vec<String> = top.keys().filter(|key| is_engine(key)).cloned().collect();
        let mut engine = match top.shift_remove("engine") {
            Some(engine @ (Value::Object(_) | Value::Null)) => engine,
            Some(other) => {
                let found = super::shape::brief(&other);
                return Err(Error::config(self.origin, "engine", "an object", found));
            }
            None => Value::Null,
        };
        if engine.is_null() {
            engine = Value::Object(Map::new());
        }
        self.flatten(&mut engine, "config", "engine")?;
        if let Some(object) = engine.as_object_mut() {
            for key in moved {
                let Some(entry) = top.shift_remove(&key) else {
                    continue;
                };
                if object.get(&key).is_some_and(|inner| *inner != entry) {
                    let expected = format!("`{key}` in one place");
                    return Err(Error::config(
                        self.origin,
                        key,
                        expected,
                        "it both here and in `engine`",
                    ));
                }
                object.insert(key, entry);
            }
        }
        top.insert("engine".to_owned(), engine);
        Ok(())
    }

    /// Dissolves `{"type": "azureml_…", "config": {…}}` wherever it stands for a path.
    fn resources(&self, value: &mut Value, path: &str) -> Result<()> {
        let is_resource = value.get("type").and_then(Value::as_str).is_some_and(|kind| {
            kind.starts_with("azureml_") || matches!(kind, "file" | "folder" | "string_name")
        });
        if is_resource {
            self.flatten(value, "config", path)?;
        }
        self.each(value, path, &|f, v, p| f.resources(v, p))
    }
}
