//! `olive generate`.

use olive_core::{Error, Result};
use serde_json::json;

use super::Context;
use super::session::Session;
use crate::args::GenerateArgs;
use crate::output;

/// Runs the command.
///
/// # Errors
/// Those of opening and running the model.
pub fn run(args: &GenerateArgs, context: &Context<'_>) -> Result<()> {
    let mut session = Session::open(&args.model, &args.search, &args.adapters)?;
    let prompt = match &args.prompt {
        Some(text) if args.chat => {
            let messages = json!([{"role": "user", "content": text}]);
            let text = session
                .tokenizer
                .apply_chat_template(&messages, None, None, true)?;
            session.tokenizer.encode(&text)?
        }
        Some(text) => session.tokenizer.encode(text)?,
        None => args.input_ids.clone(),
    };
    if prompt.is_empty() {
        return Err(Error::config(
            "command line",
            "--prompt",
            "at least one token",
            "none",
        ));
    }
    if let Some(new) = args.max_new_tokens {
        let longest = (prompt.len() + new).min(session.context_length());
        session.params.set("max_length", longest)?;
    }
    let mut failed = None;
    let say = |piece: &str| {
        if !args.json
            && let Err(error) = output::text(piece)
        {
            failed = Some(error);
        }
        failed.is_none() && !context.cancel.is_cancelled()
    };
    let report = olive_genai::generate(
        &session.model,
        &session.tokenizer,
        &session.params,
        &prompt,
        session.adapter(),
        say,
    )?;
    if let Some(error) = failed {
        return Err(error);
    }
    if args.json {
        output::json(&report)?;
    } else {
        output::line("")?;
        tracing::info!(
            "loaded in {:.2} s; {:.1} tokens/s of the prompt, {:.1} of the answer; {} MiB at most",
            report.load_s,
            report.prefill_tokens_per_s,
            report.decode_tokens_per_s,
            report.peak_memory_bytes >> 20,
        );
    }
    context.cancel.check()
}
