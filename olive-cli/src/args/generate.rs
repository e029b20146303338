//! `olive generate`.

use std::path::PathBuf;

use clap::Args;

use super::{CommonArgs, SearchArgs};

/// Flags of `olive generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// The ONNX model folder, or the output folder that holds it in `model/`
    #[arg(short = 'm', long = "model", alias = "model_name_or_path")]
    pub model: PathBuf,
    /// The text to continue
    #[arg(
        short = 'p',
        long = "prompt",
        required_unless_present = "input_ids",
        conflicts_with = "input_ids"
    )]
    pub prompt: Option<String>,
    /// The token ids to continue, separated by commas
    #[arg(long = "input_ids", value_delimiter = ',')]
    pub input_ids: Vec<u32>,
    /// Put the prompt through the model's chat template
    #[arg(long = "chat", conflicts_with = "input_ids")]
    pub chat: bool,
    /// Tokens to generate, at most
    #[arg(long = "max_new_tokens")]
    pub max_new_tokens: Option<usize>,
    /// An adapter to load, as name=file; the last one given answers
    #[arg(long = "adapter", value_name = "NAME=FILE", value_parser = parse_adapter)]
    pub adapters: Vec<(String, PathBuf)>,
    /// Print one JSON object in place of the text
    #[arg(long = "json")]
    pub json: bool,
    #[command(flatten)]
    pub search: SearchArgs,
    #[command(flatten)]
    pub common: CommonArgs,
}

/// `name=file`; a file alone is its own name.
pub(super) fn parse_adapter(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, file)) if !name.is_empty() && !file.is_empty() => Ok((name.to_owned(), file.into())),
        _ => Err("expected NAME=FILE".to_owned()),
    }
}
