//! What olive-onnx reads, builds and writes, held against the files of real packages.

mod building;
mod golden;
mod reading;
