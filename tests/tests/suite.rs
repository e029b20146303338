//! The integration tests of the workspace, in one binary.

#![expect(clippy::unwrap_used, reason = "an unwrap that fails is a failed test")]

mod anchors;
mod families;
mod merging;
mod protobuf;
mod tidy;
mod tones;
