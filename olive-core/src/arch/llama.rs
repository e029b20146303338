//! Llama 1–3: the family that the others vary.

use super::config::RawConfig;
use super::spec::{Family, ModelSpec};
use crate::error::Result;

pub(super) fn read(raw: &RawConfig) -> Result<ModelSpec> {
    let attention_bias = raw.flag("attention_bias", false)?;
    Ok(ModelSpec {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: raw.flag("mlp_bias", false)?,
        ..ModelSpec::common(Family::Llama, raw)?
    })
}
