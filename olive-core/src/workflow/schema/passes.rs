//! Every pass that Olive knows, with its parameters: so that any recipe can be checked and planned, also one whose
//! passes this program does not have.
//!
//! `passes.tsv` holds the facts. A line `Name <tab> runs|planned` begins a pass; each line below that begins with a
//! tab is a parameter: name, kind (`!` marks one that must be given), default as JSON, and, where a search may vary
//! it, the values as a JSON list. Where Olive makes default or values depend on another parameter, the default is
//! `null` and all values are listed.

use std::sync::OnceLock;

use serde_json::{Map, Value};

use super::pass_shapes;
use super::shape::{Checker, Shape, as_bool, as_float, as_int, brief, join};
use crate::error::{Error, Result};

const TABLE: &str = include_str!("passes.tsv");

/// The value that asks a search to try all values that the parameter has.
pub const SEARCHABLE_VALUES: &str = "SEARCHABLE_VALUES";
/// The value that asks for the default.
pub const DEFAULT_VALUE: &str = "DEFAULT_VALUE";

/// Keys of a pass besides its parameters, with the shape of each.
pub const PASS_KEYS: &[&str] = &["type", "host", "evaluator", "disable_search"];

/// What a parameter takes.
#[derive(Debug, Clone, PartialEq)]
pub enum KnownKind {
    /// True or false.
    Bool,
    /// A whole number.
    Int,
    /// A number.
    Float,
    /// Text.
    Text,
    /// A list.
    List,
    /// An object.
    Map,
    /// The name of a data config, or an inline one.
    Data,
    /// One of these texts.
    OneOf(Vec<&'static str>),
    /// Any of several types.
    Any,
}

/// A parameter of a pass that Olive knows.
#[derive(Debug, Clone)]
pub struct KnownParam {
    /// Its key.
    pub name: &'static str,
    /// What it takes.
    pub kind: KnownKind,
    /// Whether it must be given.
    pub required: bool,
    /// Its default; null where there is none or it depends on other parameters.
    pub default: Value,
    /// What a search tries, empty where it is not searchable.
    pub search: Vec<Value>,
}

/// A pass that Olive knows.
#[derive(Debug, Clone)]
pub struct KnownPass {
    /// Olive's name.
    pub name: &'static str,
    /// Whether olive is meant to run it; the others can be planned only.
    pub runs: bool,
    /// Its parameters, in Olive's order.
    pub params: Vec<KnownParam>,
}

impl KnownPass {
    /// The parameter of that name.
    pub fn param(&self, name: &str) -> Option<&KnownParam> {
        self.params.iter().find(|p| p.name == name)
    }
}

/// All passes, in Olive's order.
pub fn all() -> &'static [KnownPass] {
    static PASSES: OnceLock<Vec<KnownPass>> = OnceLock::new();
    PASSES.get_or_init(|| parse(TABLE))
}

/// The pass of that name, compared without case.
pub fn find(name: &str) -> Option<&'static KnownPass> {
    all().iter().find(|pass| pass.name.eq_ignore_ascii_case(name))
}

fn parse(table: &'static str) -> Vec<KnownPass> {
    let mut passes: Vec<KnownPass> = Vec::new();
    for line in table.lines() {
        let cells: Vec<&'static str> = line.split('\t').collect();
        match cells.as_slice() {
            ["", name, kind, default, rest @ ..] => {
                if let Some(pass) = passes.last_mut() {
                    pass.params
                        .push(parse_param(name, kind, default, rest.first().copied()));
                }
            }
            [name, status] => passes.push(KnownPass {
                name,
                runs: *status == "runs",
                params: Vec::new(),
            }),
            _ => {}
        }
    }
    passes
}

fn parse_param(
    name: &'static str,
    kind: &'static str,
    default: &'static str,
    search: Option<&'static str>,
) -> KnownParam {
    let (kind, required) = match kind.strip_suffix('!') {
        Some(kind) => (kind, true),
        None => (kind, false),
    };
    let kind = match kind {
        "bool" => KnownKind::Bool,
        "int" => KnownKind::Int,
        "float" => KnownKind::Float,
        "text" => KnownKind::Text,
        "list" => KnownKind::List,
        "map" => KnownKind::Map,
        "data" => KnownKind::Data,
        other => match other.strip_prefix("enum:") {
            Some(values) => KnownKind::OneOf(values.split('|').collect()),
            None => KnownKind::Any,
        },
    };
    let json = |text: &str| serde_json::from_str(text).unwrap_or(Value::Null);
    let search = search.map(json).and_then(|v| v.as_array().cloned());
    KnownParam {
        name,
        kind,
        required,
        default: json(default),
        search: search.unwrap_or_default(),
    }
}

/// Checks one pass of a document: its type, its keys, and the value of each.
///
/// # Errors
/// [`Error::UnknownKey`] or [`Error::Config`].
pub(super) fn check(checker: &mut Checker<'_>, value: &Value, path: &str) -> Result<()> {
    let object = value
        .as_object()
        .ok_or_else(|| checker.wrong(path, "an object", value))?;
    let Some(kind) = object.get("type").and_then(Value::as_str) else {
        return Err(without_type(checker, object, path));
    };
    let Some(pass) = find(kind) else {
        // Another crate's pass: its own table is checked when the plan meets the registry.
        for (key, entry) in object {
            if !PASS_KEYS.contains(&key.as_str()) {
                checker.free(entry, &join(path, key));
            }
        }
        return Ok(());
    };
    for (key, entry) in object {
        let here = join(path, key);
        match key.as_str() {
            "type" => {}
            "host" => checker.check(&super::shapes::SYSTEM_OR_NAME, entry, &here)?,
            "evaluator" => checker.check(&super::shapes::EVALUATOR_OR_NAME, entry, &here)?,
            "disable_search" => checker.check(&Shape::Bool, entry, &here)?,
            _ => match pass.param(key) {
                Some(param) => check_param(checker, pass, param, entry, &here)?,
                None => {
                    let known = pass.params.iter().map(|p| p.name);
                    let names = known.chain(PASS_KEYS.iter().copied()).chain(["config"]);
                    return Err(Error::unknown_key(checker.origin(), here, names));
                }
            },
        }
    }
    Ok(())
}

/// A pass without a type: most likely the key is misspelt, so the first key that no pass has is named.
fn without_type(checker: &Checker<'_>, object: &Map<String, Value>, path: &str) -> Error {
    let known = |key: &str| PASS_KEYS.contains(&key) || all().iter().any(|pass| pass.param(key).is_some());
    match object.keys().find(|key| !known(key)) {
        Some(key) => Error::unknown_key(checker.origin(), join(path, key), PASS_KEYS.iter().copied()),
        None => Error::config(
            checker.origin(),
            join(path, "type"),
            "the name of a pass",
            "nothing",
        ),
    }
}

fn check_param(
    checker: &mut Checker<'_>,
    pass: &KnownPass,
    param: &KnownParam,
    value: &Value,
    path: &str,
) -> Result<()> {
    if value.is_null() || value == SEARCHABLE_VALUES || value == DEFAULT_VALUE {
        return Ok(());
    }
    if let Some(shape) = pass_shapes::of(pass.name, param.name) {
        return checker.check(shape, value, path);
    }
    if param.kind == KnownKind::Data {
        return checker.check(&super::shapes::DATA_OR_NAME, value, path);
    }
    coerce(&param.kind, value)
        .map(drop)
        .map_err(|expected| checker.wrong(path, &expected, value))?;
    if matches!(param.kind, KnownKind::Map | KnownKind::List | KnownKind::Any) {
        checker.free(value, path);
    }
    Ok(())
}

/// The value in the type of `kind`. A list for a kind that is not a list means its entries, one at a time.
///
/// # Errors
/// What was expected.
pub fn coerce(kind: &KnownKind, value: &Value) -> std::result::Result<Value, String> {
    if let (Value::Array(list), false) = (
        value,
        matches!(kind, KnownKind::List | KnownKind::Any | KnownKind::Map),
    ) {
        let entries: std::result::Result<Vec<_>, _> = list.iter().map(|entry| coerce(kind, entry)).collect();
        return entries.map(Value::Array);
    }
    let expected = |text: &str| text.to_owned();
    match kind {
        _ if value.is_null() => Ok(Value::Null),
        KnownKind::Bool => as_bool(value)
            .map(Value::Bool)
            .ok_or_else(|| expected("true or false")),
        KnownKind::Int => as_int(value)
            .map(Value::from)
            .ok_or_else(|| expected("a whole number")),
        KnownKind::Float => as_float(value)
            .map(Value::from)
            .ok_or_else(|| expected("a number")),
        KnownKind::Text => match value {
            Value::String(_) => Ok(value.clone()),
            Value::Number(n) => Ok(Value::String(n.to_string())),
            _ => Err(expected("text")),
        },
        KnownKind::OneOf(allowed) => {
            let found = value
                .as_str()
                .and_then(|text| allowed.iter().find(|name| name.eq_ignore_ascii_case(text)));
            found
                .map(|name| Value::String((*name).to_owned()))
                .ok_or_else(|| format!("one of {}", allowed.join(", ")))
        }
        KnownKind::List => match value {
            Value::Array(_) => Ok(value.clone()),
            Value::String(_) | Value::Number(_) => Ok(Value::Array(vec![value.clone()])),
            _ => Err(expected("a list")),
        },
        KnownKind::Map => match value {
            Value::Object(_) | Value::Array(_) => Ok(value.clone()),
            _ => Err(expected("an object")),
        },
        KnownKind::Data => match value {
            Value::String(_) | Value::Object(_) => Ok(value.clone()),
            _ => Err(expected("the name of a data config")),
        },
        KnownKind::Any => Ok(value.clone()),
    }
}

/// The parameters of a pass that were given, coerced; defaults are not filled in.
///
/// # Errors
/// [`Error::Config`] naming the key.
pub fn coerce_all(
    origin: &str,
    path: &str,
    pass: &KnownPass,
    given: &Map<String, Value>,
) -> Result<Map<String, Value>> {
    let mut values = Map::new();
    for (key, value) in given {
        let Some(param) = pass.param(key) else { continue };
        if value.is_null() || value == SEARCHABLE_VALUES || value == DEFAULT_VALUE {
            values.insert(key.clone(), value.clone());
            continue;
        }
        let value = coerce(&param.kind, value)
            .map_err(|expected| Error::config(origin, join(path, key), expected, brief(value)))?;
        values.insert(key.clone(), value);
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_whole() {
        // Those of Olive's head, and one that it had before.
        assert_eq!(all().len(), 85 + 1);
        let builder = find("modelbuilder").unwrap();
        assert!(builder.runs);
        assert!(builder.param("precision").unwrap().required);
        assert_eq!(builder.param("int4_block_size").unwrap().search, [32, 64, 128]);
        let lora = find("LoRA").unwrap();
        assert_eq!(lora.param("lora_dropout").unwrap().default, 0.05);
        assert_eq!(lora.param("train_data_config").unwrap().kind, KnownKind::Data);
        for pass in all() {
            for param in &pass.params {
                if let KnownKind::OneOf(_) | KnownKind::Bool | KnownKind::Int | KnownKind::Float = param.kind
                {
                    assert!(
                        coerce(&param.kind, &param.default).is_ok(),
                        "{} {}",
                        pass.name,
                        param.name
                    );
                    for value in &param.search {
                        assert!(
                            coerce(&param.kind, value).is_ok(),
                            "{} {} {value}",
                            pass.name,
                            param.name
                        );
                    }
                }
            }
        }
    }
}
