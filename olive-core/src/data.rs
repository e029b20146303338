//! Data: from files and templates to tokenised samples.
//!
//! ```no_run
//! use olive_core::data::{DataConfig, DataFormat, DataSource, TextGenConfig, TextSource};
//! use olive_core::text::TextTokenizer;
//!
//! let mut text = TextGenConfig::new(TextSource::template("{prompt}\n{response}")?);
//! text.max_seq_len = 512;
//! let data = DataConfig { source: DataSource::new(DataFormat::Json, ["travel.jsonl"]), text };
//! let samples = data.samples(&TextTokenizer::open("models/tiny-phi3")?)?;
//! assert!(samples.iter().all(|sample| sample.input_ids.len() == 512));
//! # Ok::<(), olive_core::Error>(())
//! ```

mod blocks;
mod config;
mod csv;
mod escape;
mod format;
mod parse;
mod python;
mod sample;
mod score;
mod source;
mod split;
mod strategy;
mod template;

pub use blocks::{DEFAULT_CALIBRATION_TEXT, token_blocks};
pub use config::{DataConfig, Strategy, TextGenConfig, TextSource};
pub use escape::decode_escapes;
pub use sample::{IGNORED_LABEL, Sample};
pub use score::SampleScore;
pub use source::{DataFormat, DataSource, Row, Table};
pub use template::Template;
