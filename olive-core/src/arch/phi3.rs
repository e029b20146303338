//! Phi-3 and Phi-3.5: fused `qkv_proj` and `gate_up_proj`, longrope, partial rotary embedding.

use super::config::RawConfig;
use super::spec::{AttentionLayout, Family, MlpLayout, ModelSpec};
use crate::error::Result;

pub(super) fn read(raw: &RawConfig) -> Result<ModelSpec> {
    Ok(ModelSpec {
        sliding_window: raw.optional_size("sliding_window")?,
        attention_layout: AttentionLayout::Fused,
        mlp_layout: MlpLayout::Fused,
        ..ModelSpec::common(Family::Phi3, raw)?
    })
}
