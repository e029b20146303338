//! The decoder on a CUDA GPU, over Burn's CUDA backend: its memory, its stream, kernels in CubeCL, matrix products by
//! cuBLASLt on the same stream (Burn's matmul where that library is missing).
//!
//! Weights and activations are bfloat16 (packed weights stay packed), sums, residual stream, statistics, adapters'
//! gradients and optimizer state single precision. The arithmetic is that of [`decoder`](crate::decoder), with the
//! same hand-written backward; the tests compare the two.
//!
//! Nothing here is linked: driver, run-time compiler and cuBLASLt are opened when [`Gpu::open`] is called, and what
//! is missing is an error that says so.

pub mod attention;
mod batch;
mod device;
mod gemm;
mod head;
mod kernels;
mod layer;
mod linear;
mod matrix;
mod perplexity;
pub mod probe;

pub use batch::Batch;
pub use device::{Gpu, Numbers};
pub use gemm::{Product, burns_product};
pub use head::{DeviceEmbedding, DeviceHead, DeviceLoss, Targets};
pub use kernels::{AdamWStep, ClipGrid, DevicePacked, Dropout, NormalFloats, PackedAwq, Rotation, SHARES};
pub use layer::{DeviceLayer, DeviceTape, Pass, check_model};
pub use linear::{DeviceLinear, DeviceLowRank, DeviceWeight};
pub use matrix::{Element, Matrix, View};
pub use perplexity::{DeviceAttachment, evaluate_perplexity, grown};
