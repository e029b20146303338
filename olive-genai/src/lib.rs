//! The generate loop for ONNX model folders, on the CPU and without another runtime: a graph interpreter, kernels that
//! multiply with packed weights, a cache that grows, adapters, and the search of onnxruntime-genai.
//!
//! ```no_run
//! use olive_genai::{Generator, GeneratorParams, Model, Tokenizer};
//!
//! let model = Model::open("models/onnx-ao/model")?;
//! let tokenizer = Tokenizer::new(&model)?;
//! let mut params = GeneratorParams::new(&model);
//! params.set("max_length", 200)?;
//! let mut generator = Generator::new(&model, &params)?;
//! generator.append_tokens(&tokenizer.encode("What is the best thing to see in Chicago?")?)?;
//! let mut stream = tokenizer.stream();
//! for token in generator.tokens() {
//!     print!("{}", stream.decode(token?)?);
//! }
//! # Ok::<(), olive_core::Error>(())
//! ```

pub mod adapters;
pub mod config;
pub mod evaluate;
pub mod evaluators;
pub mod exec;
pub mod generator;
pub mod kernels;
pub mod model;
pub mod params;
pub mod report;
pub mod search;
pub mod tokenizer;
pub mod tuning;

pub use adapters::Adapters;
pub use config::GenaiConfig;
pub use evaluate::{Latency, Perplexity, latency, perplexity};
pub use generator::{FinishReason, Generator, Tokens};
pub use model::Model;
pub use params::{GeneratorParams, SearchOptions, SearchValue};
pub use report::{GenerateReport, generate, peak_memory_bytes};
pub use tokenizer::{TokenBatch, Tokenizer, TokenizerStream};
pub use tuning::{OrtSessionParamsTuning, Tuned, tune_threads};
