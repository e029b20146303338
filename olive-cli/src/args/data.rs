//! Flags for text data.

use std::path::PathBuf;

use clap::Args;
use olive_core::data::decode_escapes;

use super::parse_flag;

/// Which columns and how much of them.
#[derive(Debug, Args)]
pub struct TextDataArgs {
    /// Data files, separated by commas
    #[arg(long = "data_files", value_delimiter = ',')]
    pub data_files: Vec<PathBuf>,
    /// The column with the text
    #[arg(long = "text_field", group = "text_source")]
    pub text_field: Option<String>,
    /// A template with `{column}` fields, such as "<|user|>\n{prompt}<|end|>"; `\n` becomes a line end
    #[arg(long = "text_template", group = "text_source", value_parser = decode_escapes)]
    pub text_template: Option<String>,
    /// Put the column `messages` through the model's chat template
    #[arg(long = "use_chat_template", group = "text_source")]
    pub use_chat_template: bool,
    /// Tokens of a sample [default: 1024]
    #[arg(long = "max_seq_len")]
    pub max_seq_len: Option<usize>,
    /// Samples at most [default: 256]
    #[arg(long = "max_samples")]
    pub max_samples: Option<usize>,
    /// Put the tokenizer's special tokens around each text
    #[arg(long = "add_special_tokens", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = parse_flag)]
    pub add_special_tokens: bool,
    /// Accepted; it changes no result
    #[arg(long = "batch_size", default_value_t = 1, hide = true)]
    pub batch_size: usize,
    /// Accepted; text models have the inputs that they have
    #[arg(long = "input_cols", num_args = 0.., hide = true)]
    pub input_cols: Vec<String>,
}
