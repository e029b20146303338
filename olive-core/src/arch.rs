//! Model families: how `config.json` becomes a [`ModelSpec`], and what the family calls its tensors. No maths.
//!
//! A family is one file: the fields of its config that differ, and its tensor names. Everything downstream
//! (decoder, quantizers, graph builder) reads the [`ModelSpec`] only.

mod config;
mod llama;
mod mistral;
mod phi3;
pub mod quantization;
mod qwen;
mod spec;

pub use config::RawConfig;
pub use quantization::{ModuleQuantization, QuantizationConfig};
pub use spec::{
    Activation, AttentionLayout, Family, LayerNames, LinearRole, LinearSpec, MlpLayout, ModelSpec,
    RopeScaling, RopeSpec,
};

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::fsio;

/// `config.json`'s `architectures[0]` and what reads it.
type Reader = fn(&RawConfig) -> Result<ModelSpec>;
const FAMILIES: &[(&str, Reader)] = &[
    ("LlamaForCausalLM", llama::read),
    ("MistralForCausalLM", mistral::read),
    ("Phi3ForCausalLM", phi3::read),
    ("Qwen2ForCausalLM", qwen::read_qwen2),
    ("Qwen3ForCausalLM", qwen::read_qwen3),
];

/// Reads `config.json` of a Hugging Face folder.
///
/// # Errors
/// [`Error::Io`] or [`Error::Json`] for the file; [`Error::Unsupported`] for an unknown architecture;
/// [`Error::Config`] for a field that is missing or inconsistent.
pub fn read_spec(folder: &Path) -> Result<ModelSpec> {
    let path = folder.join("config.json");
    spec_from(&path, fsio::read_json(&path)?)
}

/// Reads what stands in a `config.json`; `path` is for errors.
///
/// # Errors
/// As [`read_spec`].
pub fn spec_from(path: &Path, config: Value) -> Result<ModelSpec> {
    let raw = RawConfig::new(path, config)?;
    let architecture = raw.architecture()?;
    let known = FAMILIES.iter().find(|(name, _)| *name == architecture);
    let (_, read) = known.ok_or_else(|| {
        let names: Vec<_> = FAMILIES.iter().map(|(name, _)| *name).collect();
        Error::unsupported(
            format!("architecture `{architecture}` of `{}`", path.display()),
            format!("known are {}", names.join(", ")),
        )
    })?;
    let spec = read(&raw)?;
    spec.check(path)?;
    Ok(spec)
}
