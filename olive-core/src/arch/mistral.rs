//! Mistral: Llama with a sliding attention window on every layer.

use super::config::RawConfig;
use super::spec::{Family, ModelSpec};
use crate::error::Result;

pub(super) fn read(raw: &RawConfig) -> Result<ModelSpec> {
    Ok(ModelSpec {
        sliding_window: raw.optional_size("sliding_window")?,
        ..ModelSpec::common(Family::Mistral, raw)?
    })
}
