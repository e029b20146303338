//! Passes of a workflow, one file each, and what those that train have in common.

mod dora;
mod lora;
mod merge;
mod qlora;
mod training;

use std::sync::Arc;

use olive_core::workflow::registry::PassRegistry;

pub use dora::DoraPass;
pub use lora::LoraPass;
pub use merge::MergeAdapterWeightsPass;
pub use qlora::QloraPass;
pub use training::SampleSource;

/// Adds every pass of this crate: `LoRA`, `QLoRA`, `DoRA` and `MergeAdapterWeights`. `samples` resolves the data
/// configs of those that train.
pub fn register_passes(registry: &mut PassRegistry, samples: Arc<SampleSource>) {
    registry.register(Box::new(LoraPass::new(Arc::clone(&samples))));
    registry.register(Box::new(QloraPass::new(Arc::clone(&samples))));
    registry.register(Box::new(DoraPass::new(samples)));
    registry.register(Box::new(MergeAdapterWeightsPass));
}
