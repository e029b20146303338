//! Data: from files and templates to tokenised samples.

mod sample;

pub use sample::{IGNORED_LABEL, Sample};
