//! The pass contract: a model in, a model out, parameters checked before anything runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::model::{ModelHandle, ModelKind};
use crate::progress::{CancelToken, Progress};

/// The type of a pass parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ParamKind {
    /// True or false.
    Bool,
    /// A whole number.
    Int,
    /// A number.
    Float,
    /// Text.
    Text,
    /// One of these texts, compared without case.
    OneOf(&'static [&'static str]),
    /// One of these whole numbers.
    OneOfInt(&'static [i64]),
    /// A list of texts.
    TextList,
    /// Any object or list; the pass checks it itself.
    Object,
    /// Anything; the pass checks it itself.
    Any,
    /// The name of a data config, or an inline one.
    DataConfig,
}

/// A parameter of a pass.
#[derive(Debug, Clone, Copy)]
pub struct ParamSpec {
    /// The key in a config.
    pub name: &'static str,
    /// What it accepts.
    pub kind: ParamKind,
    /// The default, as JSON text; `None` if it must be given.
    pub default: Option<&'static str>,
    /// What it does, in one sentence.
    pub doc: &'static str,
    /// Values that a search tries if the user marks it searchable; empty where there are none.
    pub search: &'static [&'static str],
}

impl ParamSpec {
    /// A parameter that must be given.
    pub const fn required(name: &'static str, kind: ParamKind, doc: &'static str) -> Self {
        Self {
            name,
            kind,
            default: None,
            doc,
            search: &[],
        }
    }

    /// A parameter with a default, as JSON text.
    pub const fn optional(
        name: &'static str,
        kind: ParamKind,
        default: &'static str,
        doc: &'static str,
    ) -> Self {
        Self {
            name,
            kind,
            default: Some(default),
            doc,
            search: &[],
        }
    }
}

/// Checked parameters of a pass: every key is known, every default is filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct PassConfig {
    values: Map<String, Value>,
}

impl PassConfig {
    /// Checks `given` against `specs` and fills in defaults. `null` counts as not given.
    ///
    /// # Errors
    /// [`Error::UnknownKey`] or [`Error::Config`], naming `origin` and the key.
    pub fn new(origin: &str, specs: &[ParamSpec], given: &Map<String, Value>) -> Result<Self> {
        for key in given.keys() {
            if !specs.iter().any(|spec| spec.name == key) {
                return Err(Error::unknown_key(
                    origin,
                    key,
                    specs.iter().map(|spec| spec.name),
                ));
            }
        }
        let mut values = Map::new();
        for spec in specs {
            let value = match given.get(spec.name).filter(|value| !value.is_null()) {
                Some(value) => check_value(origin, spec, value)?,
                None => match spec.default {
                    Some(default) => serde_json::from_str(default).map_err(|e| {
                        Error::config(origin, spec.name, "a default that is valid JSON", e.to_string())
                    })?,
                    None => return Err(Error::config(origin, spec.name, "a value", "nothing")),
                },
            };
            values.insert(spec.name.to_owned(), value);
        }
        Ok(Self { values })
    }

    /// The parameters as the pass's own type.
    ///
    /// # Errors
    /// [`Error::Config`] if they do not fit it.
    pub fn parse<T: DeserializeOwned>(&self, origin: &str) -> Result<T> {
        serde_json::from_value(Value::Object(self.values.clone()))
            .map_err(|e| Error::config(origin, "config", "parameters of the pass", e.to_string()))
    }

    /// All values, for cache keys and reports.
    pub fn values(&self) -> &Map<String, Value> {
        &self.values
    }
}

fn check_value(origin: &str, spec: &ParamSpec, value: &Value) -> Result<Value> {
    let wrong = |expected: String| Error::config(origin, spec.name, expected, value.to_string());
    let fits = match spec.kind {
        ParamKind::Bool => value.is_boolean(),
        ParamKind::Int => value.as_i64().is_some(),
        ParamKind::Float => value.is_number(),
        ParamKind::Text => value.is_string(),
        ParamKind::TextList => value
            .as_array()
            .is_some_and(|list| list.iter().all(Value::is_string)),
        ParamKind::Object => value.is_object() || value.is_array(),
        ParamKind::Any => true,
        ParamKind::DataConfig => value.is_string() || value.is_object(),
        ParamKind::OneOfInt(allowed) => {
            return match value.as_i64().filter(|n| allowed.contains(n)) {
                Some(_) => Ok(value.clone()),
                None => Err(wrong(format!("one of {allowed:?}"))),
            };
        }
        ParamKind::OneOf(allowed) => {
            let text = value.as_str().unwrap_or_default();
            let known = allowed.iter().find(|name| name.eq_ignore_ascii_case(text));
            return known
                .map(|name| Value::String((*name).to_owned()))
                .ok_or_else(|| wrong(format!("one of {}", allowed.join(", "))));
        }
    };
    if fits {
        Ok(value.clone())
    } else {
        Err(wrong(format!("{:?}", spec.kind)))
    }
}

/// What a running pass is given besides model and parameters.
pub struct PassContext<'a> {
    /// An empty or resumable folder of its own; what it leaves there is its result.
    pub output: &'a Path,
    /// Where it says how far it is.
    pub progress: &'a dyn Progress,
    /// Whether it should stop.
    pub cancel: &'a CancelToken,
}

/// A step of a workflow: takes a model, leaves another in [`PassContext::output`].
pub trait Pass: Send + Sync {
    /// Olive's name: `AutoAWQQuantizer`, `LoRA`, `ModelBuilder`.
    fn name(&self) -> &'static str;
    /// Its parameters.
    fn params(&self) -> &'static [ParamSpec];
    /// What it takes and what it gives.
    fn transforms(&self) -> (ModelKind, ModelKind);
    /// Counts the changes of its code that change what it makes: results of an earlier version are not reused.
    fn version(&self) -> u32 {
        1
    }
    /// Files and folders besides the model that it reads; data configs are known without it. A change in one of
    /// them makes the pass run again.
    fn input_files(&self, _config: &PassConfig) -> Vec<PathBuf> {
        Vec::new()
    }
    /// Checks model and parameters before any work is done.
    ///
    /// # Errors
    /// Whatever would make [`Pass::run`] fail and can be known now.
    fn check(&self, _model: &dyn ModelHandle, _config: &PassConfig) -> Result<()> {
        Ok(())
    }
    /// Does the work.
    ///
    /// # Errors
    /// [`Error::Cancelled`] if asked to stop; else what went wrong. Nothing half-written is left under a final
    /// name.
    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPECS: &[ParamSpec] = &[
        ParamSpec {
            name: "bits",
            kind: ParamKind::OneOfInt(&[4, 8]),
            default: Some("4"),
            doc: "",
            search: &[],
        },
        ParamSpec {
            name: "sym",
            kind: ParamKind::Bool,
            default: Some("false"),
            doc: "",
            search: &[],
        },
        ParamSpec {
            name: "mode",
            kind: ParamKind::OneOf(&["exact", "fast"]),
            default: Some("\"exact\""),
            doc: "",
            search: &[],
        },
    ];

    fn given(json: Value) -> Map<String, Value> {
        json.as_object().cloned().unwrap()
    }

    #[test]
    fn defaults_are_filled_and_names_fold_case() {
        let config = PassConfig::new(
            "t",
            SPECS,
            &given(serde_json::json!({"mode": "FAST", "sym": null})),
        )
        .unwrap();
        assert_eq!(
            Value::Object(config.values().clone()),
            serde_json::json!({"bits": 4, "sym": false, "mode": "fast"})
        );
    }

    #[test]
    fn unknown_keys_and_wrong_values_are_refused_by_name() {
        let refuse = |json| {
            PassConfig::new("pass `x`", SPECS, &given(json))
                .unwrap_err()
                .to_string()
        };
        assert!(refuse(serde_json::json!({"bitz": 4})).contains("did you mean `bits`"));
        assert!(refuse(serde_json::json!({"bits": 3})).contains("`bits`: expected one of [4, 8]"));
        assert!(refuse(serde_json::json!({"sym": 1})).contains("`sym`"));
    }
}
