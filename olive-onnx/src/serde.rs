//! Reading and writing ONNX files. The only module that names protobuf types.
//!
//! The messages are the part of `onnx.proto3` that olive uses, with its field numbers; see `serde/onnx.proto`.

mod external;
mod proto;
mod read;
mod write;

pub use read::{decode_model, read_model};
pub use write::{WriteOptions, encode_model, write_model};
