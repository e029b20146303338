//! Parameters that the quantizing passes share.

use olive_core::arch::ModuleQuantization;
use olive_core::{Error, ModelHandle, ParamKind, ParamSpec, PassConfig, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::mixed::mixed_precision_of;
use crate::olive_layout::options::{Rounding, UniformOptions};

const BOTH: &[&str] = &["true", "false"];

/// A parameter that a search may try values of.
pub(super) const fn searched(spec: ParamSpec, search: &'static [&'static str]) -> ParamSpec {
    ParamSpec { search, ..spec }
}

pub(super) const BITS: ParamSpec = searched(
    ParamSpec::optional(
        "bits",
        ParamKind::OneOfInt(&[2, 4, 8]),
        "4",
        "Bits of a weight; 2 is not supported.",
    ),
    &["4", "8"],
);
pub(super) const GROUP_SIZE: ParamSpec = searched(
    ParamSpec::optional(
        "group_size",
        ParamKind::Int,
        "128",
        "Inputs that share a scale; -1 for a whole row.",
    ),
    &["-1", "16", "32", "64", "128"],
);
pub(super) const SYM: ParamSpec = searched(
    ParamSpec::optional(
        "sym",
        ParamKind::Bool,
        "false",
        "Whether groups have no zero point.",
    ),
    BOTH,
);
pub(super) const LM_HEAD: ParamSpec = searched(
    ParamSpec::optional(
        "lm_head",
        ParamKind::Bool,
        "false",
        "Whether the head is quantized.",
    ),
    BOTH,
);
pub(super) const EMBEDS: ParamSpec = ParamSpec::optional(
    "embeds",
    ParamKind::Bool,
    "false",
    "Whether the embedding is quantized.",
);
pub(super) const VISION: ParamSpec = ParamSpec::optional(
    "quantize_vision",
    ParamKind::Bool,
    "false",
    "Whether a vision tower is quantized; not supported.",
);
pub(super) const MOE: ParamSpec = ParamSpec::optional(
    "moe",
    ParamKind::Bool,
    "false",
    "Whether experts are quantized; not supported.",
);
pub(super) const EXCLUDED: ParamSpec = ParamSpec::optional(
    "modules_to_not_convert",
    ParamKind::TextList,
    "null",
    "Modules that stay dense: parts of names, or `re:` and an expression for a whole name.",
);
pub(super) const OVERRIDES: ParamSpec = ParamSpec::optional(
    "overrides",
    ParamKind::Object,
    "null",
    "`bits`, `group_size`, `symmetric` by module: names, or `re:` and an expression; the first that matches counts.",
);

/// What the passes are given; a parameter that a pass lacks takes its default.
#[derive(Debug, Deserialize)]
pub(super) struct Parameters {
    bits: usize,
    group_size: i64,
    sym: bool,
    lm_head: bool,
    quantize_vision: bool,
    moe: bool,
    #[serde(default)]
    embeds: bool,
    modules_to_not_convert: Option<Vec<String>>,
    overrides: Option<Map<String, Value>>,
    #[serde(default)]
    pub damp_percent: f64,
    #[serde(default)]
    pub desc_act: Option<bool>,
}

impl Parameters {
    /// Reads and checks what does not depend on a model.
    pub fn read(config: &PassConfig, pass: &str) -> Result<Self> {
        let origin = format!("pass `{pass}`");
        let own: Self = config.parse(&origin)?;
        for (name, set) in [("quantize_vision", own.quantize_vision), ("moe", own.moe)] {
            if set {
                let expected = "false: models with a vision tower or experts are not read";
                return Err(Error::config(&origin, name, expected, "true"));
            }
        }
        if own.bits == 2 {
            let found = "2, which is not supported";
            return Err(Error::config(&origin, "bits", "4 or 8", found));
        }
        Ok(own)
    }

    /// The options for a model, with what `SelectiveMixedPrecision` chose for it.
    pub fn options(self, rounding: Rounding, model: &dyn ModelHandle) -> Result<UniformOptions> {
        let mut options = UniformOptions {
            rounding,
            settings: ModuleQuantization {
                bits: self.bits,
                group_size: self.group_size,
                symmetric: self.sym,
            },
            lm_head: self.lm_head,
            embeds: self.embeds,
            modules_to_not_convert: self.modules_to_not_convert.unwrap_or_default(),
            overrides: self.overrides.unwrap_or_default(),
        };
        if let Some(mixed) = mixed_precision_of(model)? {
            options.add_mixed_precision(&mixed)?;
        }
        Ok(options)
    }
}
