//! Versions for AArch64 vectors.

pub(super) mod dotprod;
pub(super) mod neon;
mod part;
