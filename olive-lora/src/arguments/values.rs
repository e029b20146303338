//! Typed access to values that may be the text of a command line.

use std::path::PathBuf;

use olive_core::{Error, Result};
use serde_json::{Map, Value};

use super::{Interval, ORIGIN, Resume};

/// Honoured fields that were given, by name.
pub(super) struct Values<'a>(pub &'a Map<String, Value>);

impl Values<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| {
            let absent = value
                .as_str()
                .is_some_and(|text| matches!(text, "None" | "none" | "null"));
            !value.is_null() && !absent
        })
    }

    pub fn given(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    fn wrong(name: &str, expected: &str, found: &Value) -> Error {
        Error::config(ORIGIN, name, expected, found.to_string())
    }

    pub fn text(&self, name: &str) -> Result<Option<&str>> {
        // `lr_scheduler_type` may be none of the absent spellings, but `eval_strategy` is `no` by name.
        match self.get(name) {
            None => Ok(None),
            Some(value) => value
                .as_str()
                .map(Some)
                .ok_or_else(|| Self::wrong(name, "a name", value)),
        }
    }

    pub fn flag(&self, name: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(name) else {
            return Ok(default);
        };
        let text = value.as_str().map(str::to_ascii_lowercase);
        match (value.as_bool(), text.as_deref()) {
            (Some(flag), _) => Ok(flag),
            (_, Some("true" | "1" | "yes" | "t" | "y")) => Ok(true),
            (_, Some("false" | "0" | "no" | "f" | "n")) => Ok(false),
            _ => Err(Self::wrong(name, "true or false", value)),
        }
    }

    fn number(&self, name: &str, expected: &str, fits: impl Fn(f64) -> bool) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let number = value
            .as_f64()
            .or_else(|| value.as_str().and_then(|text| text.trim().parse().ok()));
        match number.filter(|number| number.is_finite() && fits(*number)) {
            Some(number) => Ok(Some(number)),
            None => Err(Self::wrong(name, expected, value)),
        }
    }

    pub fn positive(&self, name: &str, default: f64) -> Result<f64> {
        Ok(self
            .number(name, "a number above 0", |n| n > 0.0)?
            .unwrap_or(default))
    }

    pub fn not_negative(&self, name: &str, default: f64) -> Result<f64> {
        Ok(self
            .number(name, "a number from 0", |n| n >= 0.0)?
            .unwrap_or(default))
    }

    pub fn share(&self, name: &str, default: f64) -> Result<f64> {
        Ok(self
            .number(name, "a number from 0 to 1", |n| (0.0..=1.0).contains(&n))?
            .unwrap_or(default))
    }

    pub fn optional_count(&self, name: &str) -> Result<Option<usize>> {
        let whole = |n: f64| n >= 1.0 && n.fract() == 0.0 && n < 1e15;
        Ok(self
            .number(name, "a whole number from 1", whole)?
            .map(|n| n as usize))
    }

    pub fn count(&self, name: &str, default: usize) -> Result<usize> {
        Ok(self.optional_count(name)?.unwrap_or(default))
    }

    /// `max_steps`, which Hugging Face turns off with -1.
    pub fn max_steps(&self) -> Result<Option<usize>> {
        let whole = |n: f64| n == -1.0 || (n >= 1.0 && n.fract() == 0.0 && n < 1e15);
        let steps = self.number("max_steps", "a whole number from 1, or -1", whole)?;
        Ok(steps.filter(|n| *n > 0.0).map(|n| n as usize))
    }

    pub fn seed(&self, name: &str) -> Result<Option<u64>> {
        let whole = |n: f64| n >= 0.0 && n.fract() == 0.0 && n < 9e15;
        Ok(self
            .number(name, "a whole number from 0", whole)?
            .map(|n| n as u64))
    }

    /// An object, or its JSON text.
    pub fn object(&self, name: &str) -> Result<Map<String, Value>> {
        let Some(value) = self.get(name) else {
            return Ok(Map::new());
        };
        let parsed = value
            .as_str()
            .and_then(|text| serde_json::from_str::<Value>(text).ok());
        parsed
            .as_ref()
            .unwrap_or(value)
            .as_object()
            .cloned()
            .ok_or_else(|| Self::wrong(name, "an object", value))
    }

    pub fn interval(&self, strategy: &str, steps: &str, default: Interval) -> Result<Interval> {
        let every = self.number(steps, "a number above 0", |n| n > 0.0)?;
        let by_steps = every.map_or(default, Interval::Steps);
        match self.text(strategy)? {
            None | Some("steps") => Ok(by_steps),
            Some("no") => Ok(Interval::Never),
            Some("epoch") => Ok(Interval::Epoch),
            Some(other) => Err(Error::config(ORIGIN, strategy, "one of no, steps, epoch", other)),
        }
    }

    /// Whether checkpoints were asked for, as opposed to written by default.
    pub fn asks_to_save(&self) -> Result<bool> {
        let strategy = self.text("save_strategy")?;
        Ok(strategy != Some("no") && (strategy.is_some() || self.given("save_steps")))
    }

    pub fn group_by_length(&self) -> Result<bool> {
        match self.text("train_sampling_strategy")? {
            None | Some("random") => self.flag("group_by_length", false),
            Some("group_by_length") => Ok(true),
            Some(other) => {
                let expected = "random or group_by_length";
                Err(Error::config(ORIGIN, "train_sampling_strategy", expected, other))
            }
        }
    }

    pub fn resume(&self) -> Result<Resume> {
        let from_start = self.flag("overwrite_output_dir", false)?;
        let name = "resume_from_checkpoint";
        match self.get(name) {
            None if from_start => Ok(Resume::Never),
            None => Ok(Resume::Automatic),
            Some(Value::String(text)) if !text.eq_ignore_ascii_case("true") => {
                match text.eq_ignore_ascii_case("false") {
                    true => Ok(Resume::Never),
                    false => Ok(Resume::From(PathBuf::from(text))),
                }
            }
            Some(_) => match self.flag(name, true)? {
                true => Ok(Resume::Last),
                false => Ok(Resume::Never),
            },
        }
    }
}
