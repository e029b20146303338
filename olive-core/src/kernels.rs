//! Kernels on host memory that calibration, training and evaluation share: matrix products, attention, and a way to
//! compile plain loops for wide registers.

pub mod attention;
mod exp;
pub mod product;
mod wide;

pub(crate) use exp::{dot, exp, largest, sigmoid, sum};
pub use product::{Packed, View, product, product_packed, product_parallel, row_dots};
pub use wide::wide;
