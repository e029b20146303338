//! AWQ and GPTQ's calibration on a GPU, a layer at a time: forward in bfloat16, statistics, scales and clips in single precision on the
//! device, where the weights are also rounded and packed; the host writes finished layers while the device goes on.
//!
//! It searches what [`crate::quantizer::awq`] searches, in the same order. Products of statistics take operands with ten
//! bits of mantissa (TF32) or bfloat16 and sum in single precision: losses agree with the CPU's to about a percent, so
//! that of two candidates that are closer than that either may win.

mod clip;
mod gptq;
mod layer;
mod run;
mod search;
mod statistics;

pub use gptq::quantize_uniform_on_gpu;
pub use run::quantize_on_gpu;
