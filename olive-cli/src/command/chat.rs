//! `olive chat`: a conversation that keeps the cache from turn to turn.

use std::io::{BufRead, IsTerminal, Write};

use olive_core::{Error, Result};
use olive_genai::{FinishReason, Generator};
use serde_json::{Value, json};

use super::Context;
use super::session::Session;
use crate::args::ChatArgs;
use crate::output;

/// Runs the command: reads a line, answers, until the input ends or says `/exit`. `/clear` forgets the conversation.
///
/// # Errors
/// Those of opening and running the model.
pub fn run(args: &ChatArgs, context: &Context<'_>) -> Result<()> {
    let session = Session::open(&args.model, &args.search, &args.adapters)?;
    let mut generator = Generator::new(&session.model, &session.params)?;
    if let Some((adapters, name)) = session.adapter() {
        generator.set_active_adapter(adapters, name)?;
    }
    let system = args
        .system
        .as_ref()
        .map(|text| json!({"role": "system", "content": text}));
    let opening: Vec<Value> = system.into_iter().collect();
    let mut conversation = opening.clone();
    let stdin = std::io::stdin();
    let interactive = stdin.is_terminal();
    let mut lines = stdin.lock().lines();
    loop {
        if interactive {
            eprint!("> ");
            let _ = std::io::stderr().flush();
        }
        let Some(line) = lines.next() else { return Ok(()) };
        let line = line.map_err(Error::io("read", "stdin"))?;
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => return Ok(()),
            "/clear" => conversation.clone_from(&opening),
            text => {
                conversation.push(json!({"role": "user", "content": text}));
                let answer = turn(
                    &session,
                    &mut generator,
                    &conversation,
                    args.max_new_tokens,
                    context,
                )?;
                conversation.push(json!({"role": "assistant", "content": answer}));
            }
        }
        context.cancel.check()?;
    }
}

/// Answers the last message. What the conversation shares with the tokens in the cache is not run again.
fn turn(
    session: &Session,
    generator: &mut Generator,
    conversation: &[Value],
    max_new_tokens: usize,
    context: &Context<'_>,
) -> Result<String> {
    let messages = Value::from(conversation.to_vec());
    let text = session
        .tokenizer
        .apply_chat_template(&messages, None, None, true)?;
    let ids = session.tokenizer.encode(&text)?;
    let cached = generator.get_sequence(0)?;
    // At least the last token is run again: its logits begin the answer.
    let shared = cached
        .iter()
        .zip(&ids)
        .take_while(|(a, b)| a == b)
        .count()
        .min(ids.len().saturating_sub(1));
    if shared < cached.len() || generator.is_done() {
        generator.rewind_to(shared)?;
    }
    generator.append_tokens(&ids[shared..])?;
    let mut stream = session.tokenizer.stream();
    let mut answer = String::new();
    for _ in 0..max_new_tokens {
        if generator.is_done() || context.cancel.is_cancelled() {
            break;
        }
        generator.generate_next_token()?;
        if generator.finish_reason() == Some(FinishReason::Stop) {
            break;
        }
        let token = generator.get_next_tokens().first().copied();
        let piece = token
            .map(|token| stream.decode(token))
            .transpose()?
            .unwrap_or_default();
        output::text(&piece)?;
        answer.push_str(&piece);
    }
    let rest = stream.finish()?;
    output::line(&rest)?;
    answer.push_str(&rest);
    Ok(answer)
}
