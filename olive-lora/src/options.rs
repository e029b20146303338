//! What adapter is trained: rank, scale, dropout and targets, with Olive's defaults.

use std::collections::BTreeMap;
use std::path::PathBuf;

use olive_core::{Error, Family, LinearSpec, ModelSpec, Result};

use crate::matching::{PatternMap, Targets, matched_linears};

/// Options of a LoRA adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraOptions {
    /// Rank.
    pub r: usize,
    /// The low-rank part is multiplied by `alpha / r`, or `alpha / √r`.
    pub alpha: f64,
    /// Share of the inputs of a low-rank part that is dropped while training.
    pub dropout: f64,
    /// What is adapted; `None` for the family's default.
    pub target_modules: Option<Targets>,
    /// What is not adapted although it is a target.
    pub exclude_modules: Option<Targets>,
    /// Layers that are adapted; all if `None`.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Ranks of modules whose path ends as the pattern says.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Alphas of modules whose path ends as the pattern says.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Whether the scale is `alpha / √r`.
    pub use_rslora: bool,
    /// Whether the magnitudes of the rows are trained too (DoRA).
    pub use_dora: bool,
    /// A PEFT folder from which training starts, instead of random `A` and zero `B`.
    pub initial_adapter: Option<PathBuf>,
    /// `base_model_name_or_path` of the written config; the base folder's name if `None`.
    pub base_model_name: Option<String>,
}

impl Default for LoraOptions {
    fn default() -> Self {
        Self {
            r: 64,
            alpha: 16.0,
            dropout: 0.05,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            use_rslora: false,
            use_dora: false,
            initial_adapter: None,
            base_model_name: None,
        }
    }
}

/// One linear that is adapted.
#[derive(Debug, Clone, PartialEq)]
pub struct AdaptedLinear {
    /// Its layer.
    pub layer: usize,
    /// The linear.
    pub linear: LinearSpec,
    /// Rank of the low-rank part.
    pub rank: usize,
    /// What the low-rank part is multiplied by.
    pub scaling: f64,
}

/// What Olive (for Phi-3) and PEFT (for the others) adapt by default.
pub fn default_targets(family: Family) -> Targets {
    let names: &[&str] = match family {
        Family::Phi3 => &["o_proj", "qkv_proj"],
        _ => &["q_proj", "v_proj"],
    };
    Targets::Names(names.iter().map(|name| (*name).to_owned()).collect())
}

impl LoraOptions {
    /// The targets, the family's default filled in.
    pub fn targets(&self, spec: &ModelSpec) -> Targets {
        self.target_modules
            .clone()
            .unwrap_or_else(|| default_targets(spec.family))
    }

    /// The linears that are adapted, in the order of the forward pass.
    ///
    /// # Errors
    /// [`Error::Config`] for a rank of 0, a dropout outside `[0, 1)`, an invalid pattern, or no match.
    pub fn adapted_linears(&self, spec: &ModelSpec) -> Result<Vec<AdaptedLinear>> {
        let wrong =
            |key: &str, expected: &str, found: String| Err(Error::config("adapter", key, expected, found));
        if !(0.0..1.0).contains(&self.dropout) {
            return wrong(
                "lora_dropout",
                "a number from 0, below 1",
                self.dropout.to_string(),
            );
        }
        if !self.alpha.is_finite() || self.alpha_pattern.values().any(|alpha| !alpha.is_finite()) {
            return wrong("lora_alpha", "a finite number", self.alpha.to_string());
        }
        let ranks = PatternMap::new("rank_pattern", self.rank_pattern.iter().map(|(k, v)| (k, *v)))?;
        let alphas = PatternMap::new("alpha_pattern", self.alpha_pattern.iter().map(|(k, v)| (k, *v)))?;
        let layers = self.layers_to_transform.as_deref();
        let matched = matched_linears(spec, &self.targets(spec), self.exclude_modules.as_ref(), layers)?;
        let mut adapted = Vec::with_capacity(matched.len());
        for (layer, linear) in matched {
            let rank = ranks.get(&linear.name).unwrap_or(self.r);
            let alpha = alphas.get(&linear.name).unwrap_or(self.alpha);
            if rank == 0 {
                return wrong("r", "a rank above 0", "0".to_owned());
            }
            let divisor = match self.use_rslora {
                true => (rank as f64).sqrt(),
                false => rank as f64,
            };
            adapted.push(AdaptedLinear {
                layer,
                linear,
                rank,
                scaling: alpha / divisor,
            });
        }
        Ok(adapted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(family: &str) -> ModelSpec {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/golden/peft")
            .join(family);
        olive_core::arch::read_spec(&folder).unwrap()
    }

    #[test]
    fn defaults_give_olives_modules_and_scale() {
        let ends = |family: &str| -> Vec<String> {
            let adapted = LoraOptions::default().adapted_linears(&spec(family)).unwrap();
            assert!(adapted.iter().all(|a| a.rank == 64 && a.scaling == 0.25));
            let first = adapted.iter().filter(|a| a.layer == 0);
            first
                .map(|a| a.linear.name.rsplit('.').next().unwrap().to_owned())
                .collect()
        };
        assert_eq!(ends("phi3"), ["qkv_proj", "o_proj"]);
        assert_eq!(ends("llama"), ["q_proj", "v_proj"]);
    }

    #[test]
    fn patterns_change_rank_and_scale() {
        let options = LoraOptions {
            r: 8,
            alpha: 8.0,
            use_rslora: true,
            rank_pattern: [("o_proj".to_owned(), 4)].into(),
            alpha_pattern: [("o_proj".to_owned(), 6.0)].into(),
            ..LoraOptions::default()
        };
        let adapted = options.adapted_linears(&spec("phi3")).unwrap();
        assert_eq!((adapted[0].rank, adapted[0].scaling), (8, 8.0 / 8f64.sqrt()));
        assert_eq!((adapted[1].rank, adapted[1].scaling), (4, 3.0));
    }

    #[test]
    fn impossible_options_are_refused_by_name() {
        for (options, key) in [
            (
                LoraOptions {
                    r: 0,
                    ..LoraOptions::default()
                },
                "`r`",
            ),
            (
                LoraOptions {
                    dropout: 1.0,
                    ..LoraOptions::default()
                },
                "lora_dropout",
            ),
            (
                LoraOptions {
                    alpha: f64::NAN,
                    ..LoraOptions::default()
                },
                "lora_alpha",
            ),
        ] {
            let error = options.adapted_linears(&spec("phi3")).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
