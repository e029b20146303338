//! `KQuant`: grids by weighted least squares.

use std::sync::Arc;

use olive_core::{ModelHandle, ModelKind, ParamSpec, Pass, PassConfig, PassContext, Result};

use super::params::{BITS, EMBEDS, EXCLUDED, GROUP_SIZE, LM_HEAD, MOE, OVERRIDES, Parameters, SYM, VISION};
use super::{HF_TO_HF, run_pass};
use crate::calibration::CalibrationSet;
use crate::olive_layout::layout::Layout;
use crate::olive_layout::options::{Rounding, UniformOptions};

const PARAMS: &[ParamSpec] = &[
    BITS,
    ParamSpec {
        default: Some("32"),
        search: &[],
        ..GROUP_SIZE
    },
    SYM,
    LM_HEAD,
    VISION,
    EMBEDS,
    MOE,
    EXCLUDED,
    OVERRIDES,
];

/// Olive's `KQuant`.
#[derive(Debug, Clone, Copy, Default)]
pub struct KQuant;

impl KQuant {
    fn options(model: &dyn ModelHandle, config: &PassConfig) -> Result<UniformOptions> {
        Parameters::read(config, "KQuant")?.options(Rounding::KQuant, model)
    }
}

impl Pass for KQuant {
    fn name(&self) -> &'static str {
        "KQuant"
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
        run_pass(model, &CalibrationSet::default(), &options, context)
    }
}
