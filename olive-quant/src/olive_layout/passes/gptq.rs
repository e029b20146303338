//! `Gptq`: rounding that makes up for its errors, calibrated.

use std::sync::Arc;

use olive_core::{ModelHandle, ModelKind, ParamKind, ParamSpec, Pass, PassConfig, PassContext, Result};

use super::params::{BITS, EXCLUDED, GROUP_SIZE, LM_HEAD, MOE, OVERRIDES, Parameters, SYM, VISION, searched};
use super::{HF_TO_HF, run_pass};
use crate::olive_layout::layout::Layout;
use crate::olive_layout::options::{Rounding, UniformOptions};
use crate::pass::CalibrationProvider;

const PARAMS: &[ParamSpec] = &[
    BITS,
    GROUP_SIZE,
    SYM,
    LM_HEAD,
    VISION,
    MOE,
    EXCLUDED,
    OVERRIDES,
    searched(
        ParamSpec::optional(
            "damp_percent",
            ParamKind::Float,
            "0.01",
            "Share of the mean of the Gram matrix's diagonal that is added to it.",
        ),
        &["0.001", "0.01", "0.1"],
    ),
    ParamSpec::optional(
        "desc_act",
        ParamKind::Bool,
        "null",
        "Whether columns with the largest activations go first; by default for whole-row groups, which alone can.",
    ),
    ParamSpec::optional(
        "data_config",
        ParamKind::DataConfig,
        "null",
        "The calibration text.",
    ),
    ParamSpec::optional(
        "moe_fallback_threshold",
        ParamKind::Float,
        "0.005",
        "For experts; has no effect without them.",
    ),
    ParamSpec::optional(
        "moe_fallback_min_k_multiple",
        ParamKind::Float,
        "2.0",
        "For experts; has no effect without them.",
    ),
];

/// Olive's `Gptq`.
#[derive(Clone)]
pub struct Gptq {
    calibration: CalibrationProvider,
}

impl Gptq {
    /// The pass, with what turns its `data_config` into tokens.
    pub fn new(calibration: CalibrationProvider) -> Self {
        Self { calibration }
    }

    fn options(model: &dyn ModelHandle, config: &PassConfig) -> Result<UniformOptions> {
        let own = Parameters::read(config, "Gptq")?;
        let rounding = Rounding::Gptq {
            damp_percent: own.damp_percent,
            desc_act: own.desc_act,
        };
        own.options(rounding, model)
    }
}

impl Pass for Gptq {
    fn name(&self) -> &'static str {
        "Gptq"
    }

    fn params(&self) -> &'static [ParamSpec] {
        PARAMS
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        HF_TO_HF
    }

    fn check(&self, model: &dyn ModelHandle, config: &PassConfig) -> Result<()> {
        Layout::new(model, &Self::options(model, config)?).map(|_| ())
    }

    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        let options = Self::options(model, config)?;
        let data = config
            .values()
            .get("data_config")
            .filter(|value| !value.is_null());
        run_pass(model, &(self.calibration)(model, data)?, &options, context)
    }
}
