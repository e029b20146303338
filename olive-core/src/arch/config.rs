//! The fields of `config.json` that families share, in the spellings of transformers 4 and 5.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::quantization::QuantizationConfig;
use super::spec::{Activation, RopeScaling, RopeSpec};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// A parsed `config.json`, with errors that name the file and the key.
pub struct RawConfig {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl RawConfig {
    /// Wraps the parsed document.
    ///
    /// # Errors
    /// [`Error::File`] if it is not an object.
    pub fn new(path: &Path, value: Value) -> Result<Self> {
        match value {
            Value::Object(fields) => Ok(Self {
                path: path.to_path_buf(),
                fields,
            }),
            other => Err(Error::file(path, "a JSON object", kind_of(&other))),
        }
    }

    /// `architectures[0]`.
    ///
    /// # Errors
    /// [`Error::Config`] if it is missing.
    pub fn architecture(&self) -> Result<&str> {
        let first = self
            .fields
            .get("architectures")
            .and_then(|list| list.get(0))
            .and_then(Value::as_str);
        first.ok_or_else(|| self.error("architectures", "a list with a class name", "none"))
    }

    /// A value, `null` counting as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    /// An [`Error::Config`] about `key` in this file.
    pub fn error(&self, key: &str, expected: &str, found: impl Into<String>) -> Error {
        Error::config(format!("`{}`", self.path.display()), key, expected, found)
    }

    fn typed<T>(&self, key: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => read(value)
                .map(Some)
                .ok_or_else(|| self.error(key, expected, value.to_string())),
        }
    }

    /// A size that must be there and not be zero.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn size(&self, key: &str) -> Result<usize> {
        let size = self.optional_size(key)?;
        size.filter(|n| *n > 0).ok_or_else(|| {
            let found = self
                .get(key)
                .map_or_else(|| "nothing".to_owned(), Value::to_string);
            self.error(key, "a positive integer", found)
        })
    }

    /// A size that may be absent.
    ///
    /// # Errors
    /// [`Error::Config`] if it is there but no size.
    pub fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a non-negative integer", |v| {
            v.as_u64().and_then(|n| usize::try_from(n).ok())
        })
    }

    /// A number that may be absent.
    ///
    /// # Errors
    /// [`Error::Config`] if it is there but no number.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// A switch, `default` if absent.
    ///
    /// # Errors
    /// [`Error::Config`] if it is there but not true or false.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self
            .typed(key, "true or false", Value::as_bool)?
            .unwrap_or(default))
    }

    /// A text that may be absent.
    ///
    /// # Errors
    /// [`Error::Config`] if it is there but no text.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.error(key, "a string", other.to_string())),
        }
    }

    /// Token ids given as one number or a list; empty if absent.
    ///
    /// # Errors
    /// [`Error::Config`] if it is neither.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let read = |v: &Value| match v {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|n| vec![n]),
        };
        Ok(self
            .typed(key, "a token id or a list of them", read)?
            .unwrap_or_default())
    }

    /// `hidden_act`.
    ///
    /// # Errors
    /// [`Error::Config`] for an activation that olive does not know.
    pub fn activation(&self) -> Result<Activation> {
        match self.text("hidden_act")?.unwrap_or("silu") {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
            other => Err(self.error("hidden_act", "`silu` or `gelu_pytorch_tanh`", other)),
        }
    }

    /// The type in which the weights are stored.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown name.
    pub fn weight_dtype(&self) -> Result<DType> {
        let name = match self.text("torch_dtype")? {
            Some(name) => Some(name),
            None => self.text("dtype")?,
        };
        match name {
            None | Some("float32") => Ok(DType::F32),
            Some("float16") => Ok(DType::F16),
            Some("bfloat16") => Ok(DType::BF16),
            Some(other) => Err(self.error("torch_dtype", "float32, float16 or bfloat16", other)),
        }
    }

    /// `quantization_config`, if the checkpoint is quantized.
    ///
    /// # Errors
    /// [`Error::Config`] if it lacks `quant_method`.
    pub fn quantization(&self) -> Result<Option<QuantizationConfig>> {
        let Some(value) = self.get("quantization_config") else {
            return Ok(None);
        };
        let read = QuantizationConfig::read(value);
        read.map(Some).map_err(|found| {
            self.error(
                "quantization_config",
                "a quantization config with `quant_method`",
                found,
            )
        })
    }

    /// Rotary embedding: `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5).
    ///
    /// # Errors
    /// [`Error::Config`] for a scaling that is unknown or incomplete.
    pub fn rope(&self, head_dim: usize, max_position: usize) -> Result<RopeSpec> {
        let parameters = self.get("rope_parameters").and_then(Value::as_object);
        let theta = match parameters
            .and_then(|p| p.get("rope_theta"))
            .and_then(Value::as_f64)
        {
            Some(theta) => theta,
            None => self.number("rope_theta")?.unwrap_or(10_000.0),
        };
        let partial = match parameters
            .and_then(|p| p.get("partial_rotary_factor"))
            .and_then(Value::as_f64)
        {
            Some(factor) => factor,
            None => self.number("partial_rotary_factor")?.unwrap_or(1.0),
        };
        let rotary_dim = (head_dim as f64 * partial) as usize;
        let scaling = match parameters {
            Some(p) => Some(p),
            None => self.get("rope_scaling").and_then(Value::as_object),
        };
        let scaling = match scaling {
            Some(fields) => self.rope_scaling(fields, rotary_dim, max_position)?,
            None => RopeScaling::None,
        };
        Ok(RopeSpec {
            theta,
            rotary_dim,
            scaling,
        })
    }

    fn rope_scaling(
        &self,
        fields: &Map<String, Value>,
        rotary_dim: usize,
        max_position: usize,
    ) -> Result<RopeScaling> {
        let kind = ["rope_type", "type"]
            .iter()
            .find_map(|k| fields.get(*k).and_then(Value::as_str));
        let number = |key: &str| -> Result<f64> {
            fields
                .get(key)
                .and_then(Value::as_f64)
                .ok_or_else(|| self.error(&format!("rope_scaling.{key}"), "a number", "nothing"))
        };
        let original = fields
            .get("original_max_position_embeddings")
            .and_then(Value::as_u64);
        let original = original.and_then(|n| usize::try_from(n).ok());
        match kind.unwrap_or("default") {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear {
                factor: number("factor")?,
            }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position: original.ok_or_else(|| {
                    self.error(
                        "rope_scaling.original_max_position_embeddings",
                        "a positive integer",
                        "nothing",
                    )
                })?,
            }),
            "longrope" | "su" => {
                let own = self.optional_size("original_max_position_embeddings")?;
                let original = own.or(original).unwrap_or(max_position);
                Ok(RopeScaling::LongRope {
                    short_factor: self.rope_factors(fields, "short_factor", rotary_dim)?,
                    long_factor: self.rope_factors(fields, "long_factor", rotary_dim)?,
                    original_max_position: original,
                    attention_factor: fields
                        .get("attention_factor")
                        .and_then(Value::as_f64)
                        .unwrap_or_else(|| longrope_attention_factor(max_position, original)),
                })
            }
            other => Err(self.error("rope_scaling.type", "default, linear, llama3 or longrope", other)),
        }
    }

    fn rope_factors(&self, fields: &Map<String, Value>, key: &str, rotary_dim: usize) -> Result<Vec<f64>> {
        let list = fields.get(key).and_then(Value::as_array);
        let factors: Option<Vec<f64>> = list.and_then(|l| l.iter().map(Value::as_f64).collect());
        let factors = factors.unwrap_or_default();
        if factors.len() != rotary_dim / 2 {
            let expected = format!("{} numbers", rotary_dim / 2);
            return Err(self.error(
                &format!("rope_scaling.{key}"),
                &expected,
                format!("{}", factors.len()),
            ));
        }
        Ok(factors)
    }
}

/// `sqrt(1 + ln(s) / ln(original))` with `s = max / original`, 1 if the context was not extended.
fn longrope_attention_factor(max_position: usize, original: usize) -> f64 {
    let scale = max_position as f64 / original as f64;
    if scale <= 1.0 {
        1.0
    } else {
        (1.0 + scale.ln() / (original as f64).ln()).sqrt()
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
