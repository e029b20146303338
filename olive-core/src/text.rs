//! Text to token ids and back: a model folder's tokenizer, its special tokens and its chat template.

mod chat;
mod clock;
mod special;
mod tokenizer;

pub use chat::{ChatInputs, ChatTemplates};
pub use special::SpecialTokens;
pub use tokenizer::TextTokenizer;
