//! The passes `Rtn`, `KQuant`, `Gptq` and `SelectiveMixedPrecision`, with Olive's parameters, to Olive's layout.

mod gptq;
mod kquant;
mod mixed;
mod params;
mod rtn;

use std::sync::Arc;

use olive_core::{HfModel, ModelHandle, ModelKind, PassContext, Result};

pub use gptq::Gptq;
pub use kquant::KQuant;
pub use mixed::{SelectiveMixedPrecision, mixed_precision_of};
pub use rtn::Rtn;

use super::options::UniformOptions;
use super::run::quantize_uniform;
use crate::calibration::CalibrationSet;

const HF_TO_HF: (ModelKind, ModelKind) = (ModelKind::HuggingFace, ModelKind::HuggingFace);

fn run_pass(
    model: &dyn ModelHandle,
    calibration: &CalibrationSet,
    options: &UniformOptions,
    context: &PassContext<'_>,
) -> Result<Arc<dyn ModelHandle>> {
    quantize_uniform(
        model,
        calibration,
        options,
        context.output,
        context.progress,
        context.cancel,
    )?;
    Ok(Arc::new(HfModel::open(context.output)?))
}
