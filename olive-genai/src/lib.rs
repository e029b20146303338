//! olive-genai
pub mod kernels;
