//! Quantizers, one file each: weight and statistics in, packed weight out.

pub mod affine;
pub mod awq;
pub mod gptq;
pub mod kquant;
pub mod minmax;
pub mod mixed_precision;
pub mod rtn;
