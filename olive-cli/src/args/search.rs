//! Search options: how the next token is chosen. What is not given comes from the model's `genai_config.json`.

use clap::Args;

use super::parse_flag;

/// Flags for the search options of `genai_config.json`.
#[derive(Debug, Args)]
pub struct SearchArgs {
    /// Tokens of prompt and answer together, at most
    #[arg(long = "max_length")]
    pub max_length: Option<usize>,
    /// Tokens of prompt and answer together, at least
    #[arg(long = "min_length")]
    pub min_length: Option<usize>,
    /// Draw tokens at random in place of taking the likeliest
    #[arg(long = "do_sample", num_args = 0..=1, default_missing_value = "true", value_parser = parse_flag)]
    pub do_sample: Option<bool>,
    /// Draw among that many tokens
    #[arg(long = "top_k")]
    pub top_k: Option<usize>,
    /// Draw among the likeliest tokens that have this share together
    #[arg(long = "top_p")]
    pub top_p: Option<f32>,
    /// Above 1 evens the shares out, below 1 sharpens them
    #[arg(long = "temperature")]
    pub temperature: Option<f32>,
    /// Above 1 makes tokens that are there already less likely
    #[arg(long = "repetition_penalty")]
    pub repetition_penalty: Option<f32>,
    /// Tokens in a row that never repeat; 0 for no limit
    #[arg(long = "no_repeat_ngram_size")]
    pub no_repeat_ngram_size: Option<usize>,
    /// The seed of the draws; -1 for another one each time
    #[arg(long = "random_seed", alias = "seed", allow_negative_numbers = true)]
    pub random_seed: Option<i64>,
    /// Sequences that are followed at once
    #[arg(long = "num_beams")]
    pub num_beams: Option<usize>,
    /// Sequences that are returned
    #[arg(long = "num_return_sequences")]
    pub num_return_sequences: Option<usize>,
    /// With beams: above 0 favours long sequences, below 0 short ones
    #[arg(long = "length_penalty", allow_negative_numbers = true)]
    pub length_penalty: Option<f32>,
    /// With beams: stop when enough sequences have ended
    #[arg(long = "early_stopping", num_args = 0..=1, default_missing_value = "true", value_parser = parse_flag)]
    pub early_stopping: Option<bool>,
    /// With groups of beams; without effect there and here
    #[arg(long = "diversity_penalty", allow_negative_numbers = true)]
    pub diversity_penalty: Option<f32>,
    /// Tokens of the prompt that are run at once
    #[arg(long = "chunk_size")]
    pub chunk_size: Option<usize>,
    /// Accepted; the cache grows as needed
    #[arg(long = "past_present_share_buffer", num_args = 0..=1, default_missing_value = "true", value_parser = parse_flag, hide = true)]
    pub past_present_share_buffer: Option<bool>,
}
