//! Qwen 2, 2.5 (biased q, k, v) and Qwen 3 (RMS norm on each head's q and k).

use super::config::RawConfig;
use super::spec::{Family, ModelSpec};
use crate::error::Result;

pub(super) fn read_qwen2(raw: &RawConfig) -> Result<ModelSpec> {
    Ok(ModelSpec {
        qkv_bias: true,
        ..read(Family::Qwen2, raw)?
    })
}

pub(super) fn read_qwen3(raw: &RawConfig) -> Result<ModelSpec> {
    let attention_bias = raw.flag("attention_bias", false)?;
    Ok(ModelSpec {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        qk_norm: true,
        ..read(Family::Qwen3, raw)?
    })
}

/// A window is used only where `use_sliding_window` says so, and then from layer `max_window_layers` on; a mixed
/// stack is refused.
fn read(family: Family, raw: &RawConfig) -> Result<ModelSpec> {
    let mut spec = ModelSpec::common(family, raw)?;
    if raw.flag("use_sliding_window", false)? {
        match raw.optional_size("max_window_layers")?.unwrap_or(spec.n_layers) {
            0 => spec.sliding_window = raw.optional_size("sliding_window")?,
            first if first < spec.n_layers => {
                return Err(raw.error(
                    "max_window_layers",
                    "0 or at least num_hidden_layers",
                    first.to_string(),
                ));
            }
            _ => {}
        }
    }
    Ok(spec)
}
