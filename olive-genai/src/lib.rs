//! olive-genai
pub mod kernels;
pub mod exec;
