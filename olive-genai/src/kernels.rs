//! CPU kernels. Each has a plain version that is always compiled; faster ones are chosen at run time by [`mod@isa`].
//!
//! Every kernel splits its work into pieces whose borders depend on the shapes alone and sums in a fixed order, so the
//! number of threads never changes a bit of the result.

#[cfg(target_arch = "aarch64")]
mod aarch64;
pub(crate) mod activation;
mod ahead;
pub(crate) mod aligned;
pub mod attention;
pub(crate) mod dense;
pub(crate) mod exp;
mod float_blocks;
pub mod isa;
pub mod nbits;
pub mod norm;
pub mod panels;
pub(crate) mod parallel;
pub(crate) mod pool;
pub mod rope;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use isa::{Isa, isa};
pub use nbits::{NBitsShape, NBitsWeight, ZeroPoints};
