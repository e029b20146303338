//! What olive-onnx reads, builds and writes, held against the files of real packages.

#![expect(clippy::unwrap_used, reason = "a broken expectation is a failed test")]

mod adapters;
mod building;
mod families;
mod golden;
mod hostile;
mod layouts;
mod options;
mod packed;
mod reading;
mod registry;
mod round_trip;
