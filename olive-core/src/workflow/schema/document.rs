//! Reading a config file: JSON or YAML, with doubled keys refused.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::error::{Error, Result};
use crate::fsio;

/// A config file as it stands.
#[derive(Debug, Clone)]
pub struct Document {
    /// How errors name it: the path as given.
    pub origin: String,
    /// What relative paths in it are relative to.
    pub folder: PathBuf,
    /// Its contents.
    pub value: Value,
}

impl Document {
    /// Reads a file: `.json`, `.yaml` and `.yml` by their extension, anything else by its first character.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::Config`] if it is neither JSON nor YAML.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = fsio::read_to_string(path)?;
        let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        let json = match extension.as_deref() {
            Some("json") => true,
            Some("yaml" | "yml") => false,
            _ => text.trim_start().starts_with('{'),
        };
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        let origin = path.display().to_string();
        let value = if json {
            parse_json(&text, &origin)?
        } else {
            parse_yaml(&text, &origin)?
        };
        Ok(Self {
            origin,
            folder,
            value,
        })
    }

    /// A document that was never a file; its relative paths are relative to `folder`.
    pub fn from_value(origin: impl Into<String>, folder: impl Into<PathBuf>, value: Value) -> Self {
        Self {
            origin: origin.into(),
            folder: folder.into(),
            value,
        }
    }
}

/// Parses JSON.
///
/// # Errors
/// [`Error::Config`] with line and column, also for a key that an object has twice.
pub fn parse_json(text: &str, origin: &str) -> Result<Value> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut reader = serde_json::Deserializer::from_str(text);
    let wrong = |e: serde_json::Error| Error::config(origin, "document", "valid JSON", e.to_string());
    let value = Strict.deserialize(&mut reader).map_err(wrong)?;
    reader.end().map_err(wrong)?;
    Ok(value)
}

/// Parses YAML. Keys that are numbers or truth values become text.
///
/// # Errors
/// [`Error::Config`] with line and column.
pub fn parse_yaml(text: &str, origin: &str) -> Result<Value> {
    let wrong = |e: String| Error::config(origin, "document", "valid YAML", e);
    let value = serde_yaml_ng::Value::deserialize(serde_yaml_ng::Deserializer::from_str(text))
        .map_err(|e| wrong(e.to_string()))?;
    from_yaml(value).map_err(wrong)
}

fn from_yaml(value: serde_yaml_ng::Value) -> std::result::Result<Value, String> {
    use serde_yaml_ng::Value as Yaml;
    Ok(match value {
        Yaml::Null => Value::Null,
        Yaml::Bool(b) => Value::Bool(b),
        Yaml::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64().and_then(Number::from_f64)) {
            (Some(i), _, _) => Value::from(i),
            (_, Some(u), _) => Value::from(u),
            (_, _, Some(f)) => Value::Number(f),
            _ => return Err(format!("`{n}` is not a finite number")),
        },
        Yaml::String(text) => Value::String(text),
        Yaml::Sequence(list) => Value::Array(
            list.into_iter()
                .map(from_yaml)
                .collect::<std::result::Result<_, _>>()?,
        ),
        Yaml::Mapping(mapping) => {
            let mut object = Map::new();
            for (key, entry) in mapping {
                let key = match key {
                    Yaml::String(text) => text,
                    Yaml::Number(n) => n.to_string(),
                    Yaml::Bool(b) => b.to_string(),
                    other => return Err(format!("a key must be text, found {other:?}")),
                };
                object.insert(key, from_yaml(entry)?);
            }
            Value::Object(object)
        }
        Yaml::Tagged(tagged) => return Err(format!("the tag `{}` has no meaning here", tagged.tag)),
    })
}

/// Builds a [`Value`], refusing a key that an object has twice.
struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> std::result::Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> std::result::Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> std::result::Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E>(self, value: f64) -> std::result::Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> std::result::Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> std::result::Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(entry) = access.next_element_seed(Strict)? {
            list.push(entry);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> std::result::Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            let entry = access.next_value_seed(Strict)?;
            if object.contains_key(&key) {
                return Err(serde::de::Error::custom(format!(
                    "the key `{key}` stands here twice"
                )));
            }
            object.insert(key, entry);
        }
        Ok(Value::Object(object))
    }
}

/// Where a checked path stands in the document as it was written: canonical paths leave out the wrappers
/// (`config`, `params`, `engine`, …) that the file may have.
pub fn original_path(document: &Value, canonical: &str) -> String {
    let wanted = significant(canonical);
    let mut found = None;
    search(document, &mut String::new(), &wanted, &mut found);
    found.unwrap_or_else(|| canonical.to_owned())
}

const WRAPPERS: &[&str] = &[
    "config",
    "params",
    "engine",
    "sampler_config",
    "search_algorithm_config",
];

fn significant(path: &str) -> Vec<&str> {
    path.split('.').filter(|part| !WRAPPERS.contains(part)).collect()
}

fn search(value: &Value, path: &mut String, wanted: &[&str], found: &mut Option<String>) {
    if found.is_some() {
        return;
    }
    if !path.is_empty()
        && significant(path) == wanted
        && !WRAPPERS.iter().any(|w| path.ends_with(&format!(".{w}")))
    {
        *found = Some(path.clone());
        return;
    }
    let length = path.len();
    match value {
        Value::Object(object) => {
            for (key, entry) in object {
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(key);
                search(entry, path, wanted, found);
                path.truncate(length);
            }
        }
        Value::Array(list) => {
            for (index, entry) in list.iter().enumerate() {
                path.push_str(&format!("[{index}]"));
                search(entry, path, wanted, found);
                path.truncate(length);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_doubled_key_is_refused() {
        let error = parse_json(r#"{"a": 1, "b": {"x": 1, "x": 2}}"#, "t").unwrap_err();
        assert!(error.to_string().contains("`x` stands here twice"), "{error}");
        assert!(parse_yaml("a: 1\na: 2\n", "t").is_err());
    }

    #[test]
    fn yaml_and_json_give_the_same_value() {
        let yaml = parse_yaml("a: {0: batch}\nb: [1, 2.5, x]\nc: true\nd:\n", "t").unwrap();
        let json = parse_json(
            r#"{"a": {"0": "batch"}, "b": [1, 2.5, "x"], "c": true, "d": null}"#,
            "t",
        )
        .unwrap();
        assert_eq!(yaml, json);
    }

    #[test]
    fn the_written_path_is_found_again() {
        let value = serde_json::json!({"passes": {"m": {"type": "X", "config": {"wrong": 1}}}});
        assert_eq!(original_path(&value, "passes.m.wrong"), "passes.m.config.wrong");
        assert_eq!(original_path(&value, "passes.q.wrong"), "passes.q.wrong");
    }
}
