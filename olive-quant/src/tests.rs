//! Tests of the whole crate: against recorded results of AutoAWQ and Olive, and of whole runs.

mod autoawq;
mod olive;
mod runs;
mod uniform;
