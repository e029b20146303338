//! What a run is asked to do.

use olive_core::arch::ModuleQuantization;
use olive_core::arch::quantization::{exclusion_matches, pattern_matches};
use olive_core::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::quantizer::mixed_precision::MixedPrecision;

/// How weights are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rounding {
    /// To the nearest integer.
    Nearest,
    /// To grids found by weighted least squares.
    KQuant,
    /// Under the Gram matrix of the inputs.
    Gptq {
        /// Share of the mean of the Gram matrix's diagonal that is added to it.
        damp_percent: f64,
        /// Whether columns with the largest activations go first; by default for whole-row groups, which alone can.
        desc_act: Option<bool>,
    },
}

impl Rounding {
    /// GPTQ with Olive's defaults.
    pub const GPTQ: Self = Self::Gptq {
        damp_percent: 0.01,
        desc_act: None,
    };

    /// Whether calibration is looked at.
    pub fn calibrates(self) -> bool {
        matches!(self, Self::Gptq { .. })
    }
}

/// Options of [`quantize_uniform`](super::quantize_uniform).
#[derive(Debug, Clone, PartialEq)]
pub struct UniformOptions {
    /// How weights are rounded.
    pub rounding: Rounding,
    /// How modules are quantized that nothing else is said of.
    pub settings: ModuleQuantization,
    /// Whether the head is quantized.
    pub lm_head: bool,
    /// Whether the embedding is quantized.
    pub embeds: bool,
    /// Modules that stay dense: parts of names, or `re:` expressions.
    pub modules_to_not_convert: Vec<String>,
    /// Settings by module: names or `re:` expressions; the first that matches counts.
    pub overrides: Map<String, Value>,
}

pub(super) const ORIGIN: &str = "quantization";

impl UniformOptions {
    /// 4 bits in asymmetric groups: of 128 inputs, of 32 for k-quant.
    pub fn new(rounding: Rounding) -> Self {
        Self {
            rounding,
            settings: ModuleQuantization {
                bits: 4,
                group_size: if rounding == Rounding::KQuant { 32 } else { 128 },
                symmetric: false,
            },
            lm_head: false,
            embeds: false,
            modules_to_not_convert: Vec::new(),
            overrides: Map::new(),
        }
    }

    /// Adds what a mixed-precision choice says: its defaults replace these, its overrides fill up what the overrides
    /// of the same module leave open.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::UnknownKey`] for settings that cannot be read.
    pub fn add_mixed_precision(&mut self, mixed: &MixedPrecision) -> Result<()> {
        self.settings = self
            .settings
            .overridden(ORIGIN, &Value::Object(mixed.default.clone()))?;
        for (module, settings) in &mixed.overrides {
            let mut merged = settings.as_object().cloned().unwrap_or_default();
            let own = self.overrides.get(module).and_then(Value::as_object);
            for (key, value) in own.into_iter().flatten().filter(|(_, value)| !value.is_null()) {
                merged.insert(key.clone(), value.clone());
            }
            self.overrides.insert(module.clone(), Value::Object(merged));
        }
        Ok(())
    }

    /// Checks what does not depend on a model.
    ///
    /// # Errors
    /// [`Error::Config`] naming the option.
    pub fn check(&self) -> Result<()> {
        let size = self.settings.group_size;
        if size < -1 || size == 0 {
            let expected = "a positive number or -1";
            return Err(Error::config(ORIGIN, "group_size", expected, size.to_string()));
        }
        if let Rounding::Gptq {
            damp_percent,
            desc_act,
        } = self.rounding
        {
            if !(damp_percent.is_finite() && damp_percent >= 0.0) {
                let found = damp_percent.to_string();
                return Err(Error::config(ORIGIN, "damp_percent", "0 or more", found));
            }
            if desc_act == Some(true) && size != -1 {
                let expected = "false: only groups of whole rows (-1) can be reordered";
                return Err(Error::config(ORIGIN, "desc_act", expected, "true"));
            }
            if self.embeds {
                let expected = "false: an embedding has no inputs to calibrate on";
                return Err(Error::config(ORIGIN, "embeds", expected, "true"));
            }
        }
        Ok(())
    }

    /// How `module` is quantized; `None` if it is to stay dense. 16 bits are dense too.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::UnknownKey`] for an override or pattern that cannot be read.
    pub fn module(&self, module: &str) -> Result<Option<ModuleQuantization>> {
        for pattern in &self.modules_to_not_convert {
            if exclusion_matches(ORIGIN, pattern, module)? {
                return Ok(None);
            }
        }
        for (pattern, keys) in &self.overrides {
            if pattern_matches(ORIGIN, pattern, module)? {
                return self.settings.overridden(ORIGIN, keys).map(Some);
            }
        }
        Ok(Some(self.settings))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap()
    }

    #[test]
    fn exclusions_come_first_then_the_first_override() {
        let mut options = UniformOptions::new(Rounding::Nearest);
        options.modules_to_not_convert = vec!["o_proj".to_owned(), r"re:.*\.1\.mlp\.up_proj".to_owned()];
        options.overrides = object(json!({
            "re:.*q_proj": {"bits": 8},
            "a.q_proj": {"bits": 16},
            "a.k_proj": {"group_size": -1, "symmetric": true, "bits": null},
        }));
        let module = |name: &str| options.module(name).unwrap();
        assert_eq!(module("a.o_proj"), None);
        assert_eq!(module("layers.1.mlp.up_proj"), None);
        assert_eq!(module("layers.11.mlp.up_proj").unwrap().bits, 4);
        assert_eq!(module("a.q_proj").unwrap().bits, 8);
        let k = module("a.k_proj").unwrap();
        assert_eq!((k.bits, k.group_size, k.symmetric), (4, -1, true));
    }

    #[test]
    fn mixed_precision_fills_what_overrides_leave_open() {
        let mut options = UniformOptions::new(Rounding::Nearest);
        options.overrides = object(json!({"lm_head": {"group_size": 32}}));
        let mixed = MixedPrecision {
            default: object(json!({"bits": 8})),
            overrides: object(json!({"lm_head": {"bits": 8, "group_size": 64}, "a": {"bits": 4}})),
        };
        options.add_mixed_precision(&mixed).unwrap();
        assert_eq!(options.settings.bits, 8);
        let expected = json!({"lm_head": {"bits": 8, "group_size": 32}, "a": {"bits": 4}});
        assert_eq!(Value::Object(options.overrides), expected);
    }

    #[test]
    fn options_that_cannot_be_are_refused_by_name() {
        let refuse = |change: &dyn Fn(&mut UniformOptions)| {
            let mut options = UniformOptions::new(Rounding::GPTQ);
            change(&mut options);
            options.check().unwrap_err().to_string()
        };
        assert!(refuse(&|o| o.embeds = true).contains("`embeds`"));
        assert!(refuse(&|o| o.settings.group_size = 0).contains("`group_size`"));
        let gptq = |damp_percent, desc_act| Rounding::Gptq {
            damp_percent,
            desc_act,
        };
        assert!(refuse(&|o| o.rounding = gptq(f64::NAN, None)).contains("`damp_percent`"));
        assert!(refuse(&|o| o.rounding = gptq(0.1, Some(true))).contains("`desc_act`"));
    }
}
