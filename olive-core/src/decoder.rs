//! The decoder, written once in Burn for every family and generic over the backend: what calibration, evaluation
//! and training run.
//!
//! A layer is read on its own ([`DecoderLayer::load`]), so that a model never has to be in memory whole. Its
//! linears are [`Linear`]s: a frozen dense or packed weight, an optional bias, an optional low-rank part. Every block
//! has a backward written by hand for frozen weights; gradients exist for inputs and low-rank parts only, and a
//! forward without a tape keeps nothing.
//!
//! On the CPU use [`Cpu`]: its tensors are in host memory, where the kernels of [`crate::kernels`] work on them with
//! all threads of the pool.

pub mod activation;
mod attend;
pub mod attention;
mod dora;
mod dropout;
mod head;
mod host;
mod layer;
mod linear;
mod matmul;
mod norm;
mod perplexity;
mod score;
mod sequence;
mod stream;
mod trial;

pub use dora::Magnitude;
pub use dropout::DropoutStream;
#[cfg(feature = "cuda")]
pub(crate) use dropout::child_key;
pub use head::{CrossEntropy, Embedding, Head};
pub use host::HostTensor;
pub use layer::{DecoderLayer, GradientObserver, LayerGradients, LayerTape, Observer};
pub use linear::{BaseWeight, Linear, LinearTape, LowRank, LowRankGradient};
pub use norm::RmsNorm;
pub use perplexity::{Attachment, Perplexity, evaluate_perplexity};
pub use score::score_samples;
#[cfg(feature = "cuda")]
pub(crate) use sequence::rotary_tables;
pub use sequence::{QueryBlock, SequenceTables};
pub use trial::PackedHalf;

/// Burn's CPU backend in `f32`.
pub type Cpu = burn::backend::Flex;

#[cfg(test)]
mod tests;
