//! `quantization_config` of a quantized checkpoint, whichever tool wrote it.

use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// `quantization_config` of a quantized checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct QuantizationConfig {
    /// `awq`, `gptq`, `olive`, `bitsandbytes`, `compressed-tensors`, …
    pub quant_method: String,
    /// Bits of a weight.
    #[serde(default = "four")]
    pub bits: usize,
    /// Inputs that share a scale.
    #[serde(default = "group_128")]
    pub group_size: i64,
    /// The layout within a method, as AutoAWQ writes it: `gemm`.
    #[serde(default)]
    pub version: Option<String>,
    /// Whether zero points are stored (AWQ).
    #[serde(default = "yes")]
    pub zero_point: bool,
    /// Whether every zero point is the middle (Olive, compressed-tensors).
    #[serde(default, alias = "sym")]
    pub symmetric: bool,
    /// Whether the inputs are in the order of activations (GPTQ).
    #[serde(default)]
    pub desc_act: bool,
    /// `gptq` or `gptq_v2` (GPTQ).
    #[serde(default)]
    pub checkpoint_format: Option<String>,
    /// Modules that stay dense.
    #[serde(default)]
    pub modules_to_not_convert: Option<Vec<String>>,
    /// Settings of modules by name or `re:` expression; the first that matches counts (Olive).
    #[serde(default)]
    pub overrides: Option<Map<String, Value>>,
    /// Whether the head is the packed embedding; the model's own flag is false then (Olive).
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// `pack-quantized` (compressed-tensors).
    #[serde(default)]
    pub format: Option<String>,
    /// What is quantized how (compressed-tensors).
    #[serde(default)]
    pub config_groups: Option<Map<String, Value>>,
    /// Whether weights have 4 bits (bitsandbytes).
    #[serde(default)]
    pub load_in_4bit: bool,
    /// `nf4` or `fp4` (bitsandbytes).
    #[serde(default)]
    pub bnb_4bit_quant_type: Option<String>,
}

fn four() -> usize {
    4
}
fn group_128() -> i64 {
    128
}
fn yes() -> bool {
    true
}

/// How one module is quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModuleQuantization {
    /// Bits of a weight.
    pub bits: usize,
    /// Inputs that share a scale; -1 for a whole row.
    pub group_size: i64,
    /// Whether every zero point is the middle of the range.
    pub symmetric: bool,
}

impl ModuleQuantization {
    /// Inputs that share a scale in a module of `cols` inputs; 0 if the setting is neither positive nor -1.
    pub fn group_for(self, cols: usize) -> usize {
        match self.group_size {
            -1 => cols,
            size => usize::try_from(size).unwrap_or(0),
        }
    }

    /// As [`group_for`](Self::group_for), for settings that olive can pack.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other bits than 4 and 8; [`Error::Tensor`] named `module` if the group does not
    /// divide its inputs.
    pub fn checked_group(self, module: &str, [_, cols]: [usize; 2]) -> Result<usize> {
        if !matches!(self.bits, 4 | 8) {
            let what = format!("`{module}` with {} bits", self.bits);
            return Err(Error::unsupported(what, "olive packs 4 and 8 bits"));
        }
        let group_size = self.group_for(cols);
        if group_size == 0 || !cols.is_multiple_of(group_size) {
            let expected = format!("a group size that divides {cols} inputs");
            return Err(Error::tensor(module, expected, self.group_size.to_string()));
        }
        Ok(group_size)
    }

    /// These settings with what `keys` says of `bits`, `group_size` and `symmetric`.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::UnknownKey`] under `origin`.
    pub fn overridden(self, origin: &str, keys: &Value) -> Result<Self> {
        let wrong = |key: &str, expected: &str, found: &Value| {
            Err(Error::config(origin, key, expected, found.to_string()))
        };
        let Some(keys) = keys.as_object() else {
            return wrong("overrides", "an object with bits, group_size, symmetric", keys);
        };
        let mut settings = self;
        for (key, value) in keys.iter().filter(|(_, value)| !value.is_null()) {
            let number = value.as_i64();
            match (key.as_str(), number, value.as_bool()) {
                ("bits", Some(bits @ (2 | 4 | 8 | 16)), _) => settings.bits = bits as usize,
                ("bits", ..) => return wrong(key, "2, 4, 8 or 16", value),
                ("group_size", Some(size), _) if size >= -1 => settings.group_size = size,
                ("group_size", ..) => return wrong(key, "a positive number or -1", value),
                ("symmetric", _, Some(symmetric)) => settings.symmetric = symmetric,
                ("symmetric", ..) => return wrong(key, "true or false", value),
                _ => {
                    return Err(Error::unknown_key(
                        origin,
                        key,
                        ["bits", "group_size", "symmetric"],
                    ));
                }
            }
        }
        Ok(settings)
    }
}

/// Whether an Olive pattern names `module`: the name itself, or `re:` and an expression for all of it.
///
/// # Errors
/// [`Error::Config`] under `origin` if the expression cannot be read.
pub fn pattern_matches(origin: &str, pattern: &str, module: &str) -> Result<bool> {
    match pattern.strip_prefix("re:") {
        None => Ok(pattern == module),
        Some(expression) => Ok(full_match(origin, pattern, expression)?.is_match(module)),
    }
}

fn full_match(origin: &str, pattern: &str, expression: &str) -> Result<Regex> {
    let read = Regex::new(&format!("^(?:{expression})$"));
    read.map_err(|e| Error::config(origin, pattern, "a regular expression", e.to_string()))
}

/// Whether an entry of `modules_to_not_convert` names `module`: a part of its name, or `re:` and an expression for
/// all of it.
///
/// # Errors
/// [`Error::Config`] under `origin` if the expression cannot be read.
pub fn exclusion_matches(origin: &str, pattern: &str, module: &str) -> Result<bool> {
    match pattern.strip_prefix("re:") {
        None => Ok(module.contains(pattern)),
        Some(expression) => Ok(full_match(origin, pattern, expression)?.is_match(module)),
    }
}

impl QuantizationConfig {
    /// Reads the object in `config.json` and checks what does not depend on a tensor.
    ///
    /// # Errors
    /// Texts of what is wrong, for the caller to say where.
    pub(super) fn read(value: &Value) -> Result<Self, String> {
        let mut config = Self::deserialize(value).map_err(|e| e.to_string())?;
        if config.quant_method == "compressed-tensors" {
            config.read_config_groups()?;
        }
        Ok(config)
    }

    /// Takes bits, group size and symmetry from the one group of linears that `pack-quantized` checkpoints have.
    fn read_config_groups(&mut self) -> Result<(), String> {
        let groups = self.config_groups.iter().flatten().collect::<Vec<_>>();
        let [(_, group)] = groups.as_slice() else {
            return Err(format!("{} `config_groups` where olive reads one", groups.len()));
        };
        let targets = group.get("targets").and_then(Value::as_array);
        if targets.is_none_or(|targets| targets.as_slice() != [Value::from("Linear")]) {
            return Err("`targets` other than Linear".to_owned());
        }
        if group
            .get("input_activations")
            .is_some_and(|inputs| !inputs.is_null())
        {
            return Err("quantized `input_activations`".to_owned());
        }
        let weights = group.get("weights").cloned().unwrap_or_default();
        let text = |key: &str| weights.get(key).and_then(Value::as_str).unwrap_or_default();
        let size = weights.get("group_size").and_then(Value::as_i64);
        self.group_size = match (text("strategy"), size) {
            ("group", Some(size)) => size,
            ("channel", _) => -1,
            (other, _) => return Err(format!("weights with the strategy `{other}`")),
        };
        if text("type") != "int" {
            return Err(format!("weights of type `{}`", text("type")));
        }
        let bits = weights.get("num_bits").and_then(Value::as_u64);
        self.bits = bits.and_then(|bits| usize::try_from(bits).ok()).unwrap_or(0);
        self.symmetric = weights.get("symmetric").and_then(Value::as_bool).unwrap_or(true);
        Ok(())
    }

    /// How `module` is quantized, overrides included.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::UnknownKey`] for an override that cannot be read.
    pub fn module(&self, module: &str) -> Result<ModuleQuantization> {
        let origin = "`quantization_config`";
        let settings = ModuleQuantization {
            bits: self.bits,
            group_size: self.group_size,
            symmetric: self.symmetric,
        };
        for (pattern, keys) in self.overrides.iter().flatten() {
            if pattern_matches(origin, pattern, module)? {
                return settings.overridden(origin, keys);
            }
        }
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_first_override_that_matches_counts() {
        let config = QuantizationConfig::read(&json!({
            "quant_method": "olive", "bits": 4, "symmetric": true, "group_size": 32,
            "overrides": {
                "lm_head": {"bits": 8},
                "re:.*layers\\.[01]\\.mlp.*": {"group_size": 16, "symmetric": false},
                "re:.*mlp.*": {"bits": 8},
            },
        }))
        .unwrap();
        let of = |module| config.module(module).unwrap();
        let settings = |bits, group_size, symmetric| ModuleQuantization {
            bits,
            group_size,
            symmetric,
        };
        assert_eq!(of("lm_head"), settings(8, 32, true));
        assert_eq!(of("model.layers.0.mlp.down_proj"), settings(4, 16, false));
        assert_eq!(of("model.layers.7.mlp.down_proj"), settings(8, 32, true));
        assert_eq!(of("model.layers.7.self_attn.o_proj"), settings(4, 32, true));
        assert!(pattern_matches("t", "re:(", "x").is_err());
        assert!(!pattern_matches("t", "mlp", "model.mlp").unwrap());
        assert!(exclusion_matches("t", "mlp", "model.mlp").unwrap());
    }

    #[test]
    fn groups_of_compressed_tensors_are_read_or_refused() {
        let config = |targets: Value, strategy: &str, inputs: Value| {
            QuantizationConfig::read(&json!({
                "quant_method": "compressed-tensors", "format": "pack-quantized",
                "config_groups": {"group_0": {
                    "targets": targets, "input_activations": inputs,
                    "weights": {"num_bits": 8, "type": "int", "symmetric": false,
                                "strategy": strategy, "group_size": 64},
                }},
            }))
        };
        let read = config(json!(["Linear"]), "group", Value::Null).unwrap();
        assert_eq!((read.bits, read.group_size, read.symmetric), (8, 64, false));
        assert_eq!(
            config(json!(["Linear"]), "channel", Value::Null)
                .unwrap()
                .group_size,
            -1
        );
        for (targets, strategy, inputs) in [
            (json!(["re:.*"]), "group", Value::Null),
            (json!(["Linear"]), "tensor", Value::Null),
            (json!(["Linear"]), "group", json!({"num_bits": 8})),
        ] {
            assert!(config(targets, strategy, inputs).is_err());
        }
    }
}
