//! The integration tests of the workspace, in one binary.

mod anchors;
mod families;
mod protobuf;
mod tidy;
