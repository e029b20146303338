//! Versions for x86-64 vectors.

pub mod avx2;
pub mod avx512;
