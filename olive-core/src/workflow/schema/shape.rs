//! What a document may hold, as data: a [`Shape`] says which keys an object knows and what their values look like.

use serde_json::Value;

use super::passes;
use crate::error::{Error, Result};

/// What a value may be.
#[derive(Debug, Clone, Copy)]
pub enum Shape {
    /// Anything; keys below are the user's own.
    Any,
    /// True or false, also as text or 0/1, as pydantic reads them.
    Bool,
    /// A whole number, also as text.
    Int,
    /// A number, also as text.
    Float,
    /// Text; numbers count, since YAML reads unquoted digits as numbers.
    Text,
    /// One of these texts, compared without case.
    OneOf(&'static [&'static str]),
    /// An object with these keys and no others.
    Record(&'static [Field]),
    /// An object whose keys are names that the user chose.
    Map(&'static Shape),
    /// A list.
    List(&'static Shape),
    /// The first of these whose JSON type fits.
    Either(&'static [Shape]),
    /// An object whose shape follows from its other keys.
    Depends(fn(&serde_json::Map<String, Value>) -> Vec<&'static [Field]>),
    /// A pass: its parameters come from the table of passes.
    Pass,
}

/// A key of a [`Shape::Record`].
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// The key.
    pub name: &'static str,
    /// Its value.
    pub shape: Shape,
    /// Why setting it changes nothing here, if so.
    pub without_effect: Option<&'static str>,
}

/// The name of a field that stands for any other key.
pub const OPEN: &str = "*";

/// A key that is used.
pub const fn field(name: &'static str, shape: Shape) -> Field {
    Field {
        name,
        shape,
        without_effect: None,
    }
}

/// A key that is known, checked, and changes nothing here.
pub const fn ignored(name: &'static str, shape: Shape, why: &'static str) -> Field {
    Field {
        name,
        shape,
        without_effect: Some(why),
    }
}

/// What a check found besides errors.
#[derive(Debug, Default)]
pub struct Findings {
    /// `(dotted path, why)` of keys that are set and change nothing.
    pub without_effect: Vec<(String, &'static str)>,
    /// Dotted paths of objects whose keys are the user's own.
    pub free_maps: Vec<String>,
}

/// Checks a document against a shape.
pub struct Checker<'a> {
    origin: &'a str,
    findings: Findings,
}

impl<'a> Checker<'a> {
    /// A checker whose errors name `origin`.
    pub fn new(origin: &'a str) -> Self {
        Self {
            origin,
            findings: Findings::default(),
        }
    }

    /// What was found.
    pub fn into_findings(self) -> Findings {
        self.findings
    }

    /// Checks `value`, which stands at `path`. `null` stands for a key that is not given.
    ///
    /// # Errors
    /// [`Error::UnknownKey`] or [`Error::Config`] with the dotted path.
    pub fn check(&mut self, shape: &Shape, value: &Value, path: &str) -> Result<()> {
        if value.is_null() {
            return Ok(());
        }
        match shape {
            Shape::Any => self.free(value, path),
            Shape::Record(fields) => self.record(&[fields], value, path)?,
            Shape::Depends(choose) => {
                let object = value
                    .as_object()
                    .ok_or_else(|| self.wrong(path, "an object", value))?;
                let fields = choose(object);
                self.record(&fields, value, path)?;
            }
            Shape::Map(inner) => {
                let object = value
                    .as_object()
                    .ok_or_else(|| self.wrong(path, "an object", value))?;
                self.findings.free_maps.push(path.to_owned());
                for (key, entry) in object {
                    self.check(inner, entry, &join(path, key))?;
                }
            }
            Shape::List(inner) => {
                let list = value
                    .as_array()
                    .ok_or_else(|| self.wrong(path, "a list", value))?;
                for (index, entry) in list.iter().enumerate() {
                    self.check(inner, entry, &format!("{path}[{index}]"))?;
                }
            }
            Shape::Either(shapes) => {
                let fitting = shapes.iter().find(|shape| fits_type(shape, value));
                let shape = fitting.ok_or_else(|| self.wrong(path, &describe_either(shapes), value))?;
                self.check(shape, value, path)?;
            }
            Shape::Pass => passes::check(self, value, path)?,
            scalar => {
                if !fits_type(scalar, value) {
                    return Err(self.wrong(path, &describe(scalar), value));
                }
            }
        }
        Ok(())
    }

    /// Checks an object against the union of several lists of fields.
    ///
    /// # Errors
    /// As [`Checker::check`].
    pub fn record(&mut self, fields: &[&'static [Field]], value: &Value, path: &str) -> Result<()> {
        let object = value
            .as_object()
            .ok_or_else(|| self.wrong(path, "an object", value))?;
        for (key, entry) in object {
            let here = join(path, key);
            let known = fields.iter().flat_map(|list| list.iter()).find(|f| f.name == key);
            let Some(known) = known else {
                if fields.iter().any(|list| list.iter().any(|f| f.name == OPEN)) {
                    self.findings.free_maps.push(path.to_owned());
                    self.free(entry, &here);
                    continue;
                }
                let names = fields.iter().flat_map(|list| list.iter()).map(|f| f.name);
                return Err(Error::unknown_key(self.origin, here, names));
            };
            if let Some(why) = known.without_effect
                && !entry.is_null()
            {
                self.findings.without_effect.push((here.clone(), why));
            }
            self.check(&known.shape, entry, &here)?;
        }
        Ok(())
    }

    /// Notes every object at and below `value` as free.
    pub fn free(&mut self, value: &Value, path: &str) {
        match value {
            Value::Object(object) => {
                self.findings.free_maps.push(path.to_owned());
                for (key, entry) in object {
                    self.free(entry, &join(path, key));
                }
            }
            Value::Array(list) => {
                for (index, entry) in list.iter().enumerate() {
                    self.free(entry, &format!("{path}[{index}]"));
                }
            }
            _ => {}
        }
    }

    /// Notes a key without effect.
    pub fn note(&mut self, path: String, why: &'static str) {
        self.findings.without_effect.push((path, why));
    }

    /// An error about the value at `path`.
    pub fn wrong(&self, path: &str, expected: &str, found: &Value) -> Error {
        Error::config(self.origin, path, expected, brief(found))
    }

    /// The name for errors.
    pub fn origin(&self) -> &'a str {
        self.origin
    }
}

/// `path.key`, or `key` at the top.
pub fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

/// A value as it stands in an error message: whole if short.
pub fn brief(value: &Value) -> String {
    const LONGEST: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Whether the JSON type of `value` is one that `shape` describes.
pub fn fits_type(shape: &Shape, value: &Value) -> bool {
    match shape {
        Shape::Any => true,
        Shape::Bool => as_bool(value).is_some(),
        Shape::Int => as_int(value).is_some(),
        Shape::Float => as_float(value).is_some(),
        Shape::Text => value.is_string() || value.is_number(),
        Shape::OneOf(allowed) => value
            .as_str()
            .is_some_and(|text| allowed.iter().any(|name| name.eq_ignore_ascii_case(text))),
        Shape::Record(_) | Shape::Map(_) | Shape::Depends(_) | Shape::Pass => value.is_object(),
        Shape::List(_) => value.is_array(),
        Shape::Either(shapes) => shapes.iter().any(|shape| fits_type(shape, value)),
    }
}

/// A truth value as pydantic reads it.
pub fn as_bool(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(b) => Some(*b),
        Value::Number(n) => match n.as_i64() {
            Some(0) => Some(false),
            Some(1) => Some(true),
            _ => None,
        },
        Value::String(text) => match text.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Some(true),
            "false" | "0" | "no" | "off" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// A whole number, also from `50.0` or `"50"`.
pub fn as_int(value: &Value) -> Option<i64> {
    match value {
        Value::Number(n) => n.as_i64().or_else(|| {
            let whole = n.as_f64().filter(|x| x.fract() == 0.0 && x.abs() < 9e15);
            whole.map(|x| x as i64)
        }),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

/// A number, also from text.
pub fn as_float(value: &Value) -> Option<f64> {
    match value {
        Value::Number(n) => n.as_f64(),
        Value::String(text) => text.trim().parse().ok().filter(|x: &f64| x.is_finite()),
        _ => None,
    }
}

fn describe(shape: &Shape) -> String {
    match shape {
        Shape::Any => "any value".to_owned(),
        Shape::Bool => "true or false".to_owned(),
        Shape::Int => "a whole number".to_owned(),
        Shape::Float => "a number".to_owned(),
        Shape::Text => "text".to_owned(),
        Shape::OneOf(allowed) => format!("one of {}", allowed.join(", ")),
        Shape::Record(_) | Shape::Map(_) | Shape::Depends(_) | Shape::Pass => "an object".to_owned(),
        Shape::List(_) => "a list".to_owned(),
        Shape::Either(shapes) => describe_either(shapes),
    }
}

fn describe_either(shapes: &[Shape]) -> String {
    shapes.iter().map(describe).collect::<Vec<_>>().join(" or ")
}
