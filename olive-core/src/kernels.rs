//! Kernels on host memory that calibration, training and evaluation share: matrix products, attention, and a way to
//! compile plain loops for wide registers.

#[cfg(feature = "burn")]
pub mod attention;
#[cfg(feature = "burn")]
mod exp;
#[cfg(feature = "burn")]
pub mod product;
mod wide;

#[cfg(feature = "burn")]
pub(crate) use exp::{dot, exp, largest, sigmoid, sum};
#[cfg(feature = "burn")]
pub use product::{Packed, View, product, product_packed, product_parallel, row_dots};
pub use wide::wide;
