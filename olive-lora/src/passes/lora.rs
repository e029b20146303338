//! The pass `LoRA`: fine-tuning as a step of a workflow, with Olive's parameter names.

use std::sync::Arc;

use olive_core::{ModelHandle, ModelKind, ParamSpec, Pass, PassConfig, PassContext, Result};

use super::training::{PARAMS, Params, SampleSource};

const ORIGIN: &str = "pass `LoRA`";

/// Trains a LoRA adapter.
pub struct LoraPass {
    samples: Arc<SampleSource>,
}

impl LoraPass {
    /// A pass whose data configs `samples` resolves.
    pub fn new(samples: Arc<SampleSource>) -> Self {
        Self { samples }
    }
}

impl Pass for LoraPass {
    fn name(&self) -> &'static str {
        "LoRA"
    }

    fn params(&self) -> &'static [ParamSpec] {
        &PARAMS
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        (ModelKind::HuggingFace, ModelKind::HuggingFace)
    }

    fn check(&self, model: &dyn ModelHandle, config: &PassConfig) -> Result<()> {
        let params = Params::read(ORIGIN, config)?;
        params.check(model, &params.options(ORIGIN)?)
    }

    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        let params = Params::read(ORIGIN, config)?;
        params.train(model, &params.options(ORIGIN)?, self.samples.as_ref(), context)
    }
}
