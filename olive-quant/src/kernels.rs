//! The dense products of the search, on host memory.

mod product;

pub use product::{View, product, row_dots};
