//! Quantizers, one file each: weight and statistics in, packed weight out.

pub mod affine;
pub mod awq;
pub mod rtn;
