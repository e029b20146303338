//! Tests of the whole crate: against recorded results of AutoAWQ, and of whole runs.

mod autoawq;
mod runs;
