//! The pass `DoRA`: LoRA whose rows' magnitudes are trained apart (<https://arxiv.org/abs/2402.09353>).

use std::sync::Arc;

use olive_core::{ModelHandle, ModelKind, ParamSpec, Pass, PassConfig, PassContext, Result};

use super::training::{PARAMS, Params, SampleSource};
use crate::options::LoraOptions;

const ORIGIN: &str = "pass `DoRA`";

/// Trains a DoRA adapter.
pub struct DoraPass {
    samples: Arc<SampleSource>,
}

impl DoraPass {
    /// A pass whose data configs `samples` resolves.
    pub fn new(samples: Arc<SampleSource>) -> Self {
        Self { samples }
    }
}

fn options(params: &Params) -> Result<LoraOptions> {
    Ok(LoraOptions {
        use_dora: true,
        ..params.options(ORIGIN)?
    })
}

impl Pass for DoraPass {
    fn name(&self) -> &'static str {
        "DoRA"
    }

    fn params(&self) -> &'static [ParamSpec] {
        &PARAMS
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        (ModelKind::HuggingFace, ModelKind::HuggingFace)
    }

    fn check(&self, model: &dyn ModelHandle, config: &PassConfig) -> Result<()> {
        let params = Params::read(ORIGIN, config)?;
        params.check(model, &options(&params)?)
    }

    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        let params = Params::read(ORIGIN, config)?;
        params.train(model, &options(&params)?, self.samples.as_ref(), context)
    }
}
