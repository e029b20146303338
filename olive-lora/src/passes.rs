//! Passes of a workflow, one file each, and what those that train have in common.

mod common;
mod lora;

use std::sync::Arc;

use olive_core::workflow::registry::PassRegistry;

pub use common::SampleSource;
pub use lora::LoraPass;

/// Adds every pass of this crate: `LoRA`. `samples` resolves the data configs of those that train.
pub fn register_passes(registry: &mut PassRegistry, samples: Arc<SampleSource>) {
    registry.register(Box::new(LoraPass::new(samples)));
}
