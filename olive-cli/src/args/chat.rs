//! `olive chat`.

use std::path::PathBuf;

use clap::Args;

use super::generate::parse_adapter;
use super::{CommonArgs, SearchArgs};

/// Flags of `olive chat`.
#[derive(Debug, Args)]
pub struct ChatArgs {
    /// The ONNX model folder, or the output folder that holds it in `model/`
    #[arg(short = 'm', long = "model", alias = "model_name_or_path")]
    pub model: PathBuf,
    /// What the model is told before the conversation
    #[arg(long = "system")]
    pub system: Option<String>,
    /// Tokens of an answer, at most
    #[arg(long = "max_new_tokens", default_value_t = 512)]
    pub max_new_tokens: usize,
    /// An adapter to load, as name=file; the last one given answers
    #[arg(long = "adapter", value_name = "NAME=FILE", value_parser = parse_adapter)]
    pub adapters: Vec<(String, PathBuf)>,
    #[command(flatten)]
    pub search: SearchArgs,
    #[command(flatten)]
    pub common: CommonArgs,
}
