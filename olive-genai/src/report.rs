//! One prompt, one answer, and what it took.

use std::time::Instant;

use olive_core::Result;
use serde::Serialize;

use crate::adapters::Adapters;
use crate::generator::{FinishReason, Generator};
use crate::model::Model;
use crate::params::GeneratorParams;
use crate::tokenizer::Tokenizer;

/// An answer with its speed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GenerateReport {
    /// The prompt's tokens.
    pub prompt_ids: Vec<u32>,
    /// The new tokens, without the end token.
    pub output_ids: Vec<u32>,
    /// The new tokens as text.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Seconds that opening the model took.
    pub load_s: f64,
    /// Tokens of the prompt a second.
    pub prefill_tokens_per_s: f64,
    /// New tokens after the first a second; 0 if there are none.
    pub decode_tokens_per_s: f64,
    /// The most memory that the process has held; 0 where the system does not tell.
    pub peak_memory_bytes: u64,
}

/// Answers a prompt of one row, with the named adapter if one is given. `say` gets the text piece by piece and stops
/// the answer by giving `false`.
///
/// # Errors
/// Those of [`Generator`] and [`Tokenizer`].
pub fn generate(
    model: &Model,
    tokenizer: &Tokenizer,
    params: &GeneratorParams,
    prompt: &[u32],
    adapter: Option<(&Adapters, &str)>,
    mut say: impl FnMut(&str) -> bool,
) -> Result<GenerateReport> {
    let mut generator = Generator::new(model, params)?;
    if let Some((adapters, name)) = adapter {
        generator.set_active_adapter(adapters, name)?;
    }
    let start = Instant::now();
    generator.append_tokens(prompt)?;
    let prefill = start.elapsed().as_secs_f64();
    let mut stream = tokenizer.stream();
    let mut output_ids = Vec::new();
    let mut decode = Vec::new();
    let mut go_on = true;
    let beams = params.options().num_beams > 1;
    while go_on && !generator.is_done() {
        let start = Instant::now();
        generator.generate_next_token()?;
        decode.push(start.elapsed().as_secs_f64());
        if generator.finish_reason() == Some(FinishReason::Stop) || beams {
            continue;
        }
        let token = generator.get_next_tokens().first().copied().unwrap_or_default();
        output_ids.push(token);
        let piece = stream.decode(token)?;
        go_on = piece.is_empty() || say(&piece);
    }
    if beams {
        output_ids = generator.get_sequence(0)?.split_off(prompt.len());
        say(&tokenizer.decode(&output_ids)?);
    } else {
        let rest = stream.finish()?;
        if go_on && !rest.is_empty() {
            say(&rest);
        }
    }
    // The first token comes from the prompt's own run.
    let later: f64 = decode.iter().skip(1).sum();
    let count = decode.len().saturating_sub(1);
    Ok(GenerateReport {
        prompt_ids: prompt.to_vec(),
        text: tokenizer.decode(&output_ids)?,
        output_ids,
        finish_reason: generator.finish_reason().unwrap_or(FinishReason::Stop),
        load_s: model.load_seconds(),
        prefill_tokens_per_s: prompt.len() as f64 / prefill.max(f64::MIN_POSITIVE),
        decode_tokens_per_s: if count > 0 { count as f64 / later } else { 0.0 },
        peak_memory_bytes: peak_memory_bytes(),
    })
}

/// The most memory that this process has held; 0 where the system does not tell.
pub fn peak_memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line
        .and_then(|line| line.trim().strip_suffix("kB"))
        .and_then(|n| n.trim().parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}
