//! What a run is asked to do, module by module.

use olive_core::arch::ModuleQuantization;
use olive_core::arch::quantization::{exclusion_matches, pattern_matches};
use olive_core::{Error, LinearSpec, ModelSpec, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::quantizer::mixed_precision::{MixedPrecision, module_name};

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

/// A module to be quantized.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// `model.layers.0.mlp.down_proj`, `lm_head`, …
    pub module: String,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// How.
    pub settings: ModuleQuantization,
}

const ORIGIN: &str = "quantization";

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

    /// Adds what a mixed-precision choice says, after the overrides that are there already.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::UnknownKey`] for settings that cannot be read.
    pub fn add_mixed_precision(&mut self, mixed: &MixedPrecision) -> Result<()> {
        self.settings = self.settings.overridden(ORIGIN, &Value::Object(mixed.default.clone()))?;
        for (module, settings) in &mixed.overrides {
            if !self.overrides.contains_key(module) {
                self.overrides.insert(module.clone(), settings.clone());
            }
        }
        Ok(())
    }

    /// How `module` is quantized; `None` if it stays dense.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::UnknownKey`] for an override or pattern that cannot be read.
    pub fn module(&self, module: &str) -> Result<Option<ModuleQuantization>> {
        for pattern in &self.modules_to_not_convert {
            if exclusion_matches(ORIGIN, pattern, module)? {
                return Ok(None);
            }
        }
        let mut settings = self.settings;
        for (pattern, keys) in &self.overrides {
            if pattern_matches(ORIGIN, pattern, module)? {
                settings = settings.overridden(ORIGIN, keys)?;
                break;
            }
        }
        Ok((settings.bits != 16).then_some(settings))
    }

    /// A linear of a layer, if it is quantized.
    ///
    /// # Errors
    /// As [`UniformOptions::module`].
    pub fn linear(&self, linear: &LinearSpec) -> Result<Option<Target>> {
        let settings = self.module(&linear.name)?;
        Ok(settings.map(|settings| Target {
            module: linear.name.clone(),
            shape: [linear.out_features, linear.in_features],
            settings,
        }))
    }

    /// Head or embedding with this weight, if it is quantized.
    ///
    /// # Errors
    /// As [`UniformOptions::module`].
    pub fn table(&self, spec: &ModelSpec, weight: &str) -> Result<Option<Target>> {
        let wanted = if weight == spec.embedding_name() { self.embeds } else { self.lm_head };
        let module = module_name(weight);
        let settings = self.module(&module)?.filter(|_| wanted);
        Ok(settings.map(|settings| Target {
            module,
            shape: [spec.vocab_size, spec.hidden_size],
            settings,
        }))
    }

    /// Everything that is quantized, in the order of the forward pass.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Tensor`] or [`Error::Unsupported`] for settings that do not fit the model.
    pub fn targets(&self, spec: &ModelSpec) -> Result<Vec<Target>> {
        if spec.tie_word_embeddings && self.lm_head != self.embeds {
            let expected = "as `embeds`: head and embedding are one tensor";
            return Err(Error::config(ORIGIN, "lm_head", expected, self.lm_head.to_string()));
        }
        if let Rounding::Gptq { damp_percent, desc_act } = self.rounding {
            if !(damp_percent.is_finite() && damp_percent >= 0.0) {
                return Err(Error::config(ORIGIN, "damp_percent", "0 or more", damp_percent.to_string()));
            }
            if desc_act == Some(true) && self.settings.group_size != -1 {
                let expected = "false: only groups of whole rows (-1) can be reordered";
                return Err(Error::config(ORIGIN, "desc_act", expected, "true"));
            }
            if self.embeds {
                return Err(Error::config(ORIGIN, "embeds", "false: an embedding has no inputs", "true"));
            }
        }
        let mut targets = Vec::new();
        targets.extend(self.table(spec, spec.embedding_name())?);
        for layer in 0..spec.n_layers {
            for linear in spec.linears(layer) {
                targets.extend(self.linear(&linear)?);
            }
        }
        if !spec.tie_word_embeddings {
            targets.extend(self.table(spec, spec.lm_head_name())?);
        }
        for target in &targets {
            target.settings.checked_group(&target.module, target.shape)?;
        }
        Ok(targets)
    }

    /// `quantization_config` as Olive writes it.
    ///
    /// # Errors
    /// As [`UniformOptions::module`].
    pub fn config(&self, spec: &ModelSpec) -> Result<Value> {
        // A module that an override leaves at 16 bits is one that is not converted.
        let mut excluded = self.modules_to_not_convert.clone();
        let mut overrides = Map::new();
        for (pattern, keys) in &self.overrides {
            match self.settings.overridden(ORIGIN, keys)?.bits {
                16 => excluded.push(pattern.clone()),
                _ => _ = overrides.insert(pattern.clone(), keys.clone()),
            }
        }
        Ok(json!({
            "quant_method": "olive",
            "bits": self.settings.bits,
            "symmetric": self.settings.symmetric,
            "group_size": self.settings.group_size,
            "lm_head": self.lm_head,
            "embeds": self.embeds,
            "moe": false,
            "quantize_vision": false,
            "modules_to_not_convert": excluded,
            "overrides": if overrides.is_empty() { Value::Null } else { Value::Object(overrides) },
            "tie_word_embeddings": spec.tie_word_embeddings,
        }))
    }
}
