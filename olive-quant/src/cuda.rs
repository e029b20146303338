//! AWQ on a GPU, a layer at a time: forward in bfloat16, statistics, scales and clips in single precision on the
//! device; the weights come back scaled and clipped, and are rounded and packed on the host while the device goes on.
//!
//! It searches what [`crate::quantizer::awq`] searches, in the same order. Products of statistics take operands with ten
//! bits of mantissa (TF32) or bfloat16 and sum in single precision: losses agree with the CPU's to about a percent, so
//! that of two candidates that are closer than that either may win.

mod clip;
mod layer;
mod run;
mod search;
mod statistics;

pub use run::quantize_on_gpu;
