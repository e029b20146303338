//! Operators, one file a group.

pub mod attention;
pub mod control;
pub mod elementwise;
pub mod gather;
pub mod matmul;
pub mod norm;
pub mod reduce;
pub mod shape;
