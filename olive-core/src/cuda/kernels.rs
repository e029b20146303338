//! Kernels in CubeCL. Each does in one pass over its operands what Burn's operations would do in several.
//!
//! Layouts are row-major. Elements in memory are bfloat16 or single precision as the kernels say; arithmetic is in
//! single precision. No kernel uses atomics: a result does not depend on the order in which cubes run.

mod activation;
mod awq;
mod clip;
mod dropout;
mod loss;
mod norm;
mod optimizer;
mod pack;
mod packed;
mod rope;
mod rows;
mod softmax;

pub use clip::ClipGrid;
pub use dropout::Dropout;
pub use loss::SHARES;
pub use optimizer::AdamWStep;
pub use pack::PackedAwq;
pub use packed::{DevicePacked, NormalFloats};
pub use rope::Rotation;

use cubecl::prelude::*;
use half::bf16;

/// Four bfloat16 numbers that are read at once.
pub(super) type Half4 = Vector<bf16, Const<4>>;
/// Four single-precision numbers that are read at once.
pub(super) type Float4 = Vector<f32, Const<4>>;

/// Eight bfloat16 numbers that are read at once.
pub(super) type Half8 = Vector<bf16, Const<8>>;
/// Eight single-precision numbers in registers.
pub(super) type Float8 = Vector<f32, Const<8>>;

/// Units of a cube.
pub(super) const UNITS: usize = 256;
/// Units of a plane: a warp.
pub(super) const PLANE: u32 = 32;
/// Planes of a cube that has one row for each.
pub(super) const ROWS: u32 = 8;

/// The text of all kernels: compiled ones are kept for as long as it is the same.
pub(super) const SOURCES: [&str; 13] = [
    include_str!("kernels.rs"),
    include_str!("kernels/activation.rs"),
    include_str!("kernels/awq.rs"),
    include_str!("kernels/clip.rs"),
    include_str!("kernels/dropout.rs"),
    include_str!("kernels/loss.rs"),
    include_str!("kernels/norm.rs"),
    include_str!("kernels/optimizer.rs"),
    include_str!("kernels/pack.rs"),
    include_str!("kernels/packed.rs"),
    include_str!("kernels/rope.rs"),
    include_str!("kernels/rows.rs"),
    include_str!("kernels/softmax.rs"),
];

/// A cube for each row.
pub(super) fn cube_per_row(rows: usize) -> (CubeCount, CubeDim) {
    (
        CubeCount::Static(rows as u32, 1, 1),
        CubeDim::new_1d(UNITS as u32),
    )
}

/// A plane for each row.
pub(super) fn plane_per_row(rows: usize) -> (CubeCount, CubeDim) {
    let cubes = rows.div_ceil(ROWS as usize) as u32;
    (CubeCount::Static(cubes, 1, 1), CubeDim::new_2d(PLANE, ROWS))
}

/// A unit for each of `n` pieces of work.
pub(super) fn unit_per_item(n: usize) -> (CubeCount, CubeDim) {
    let cubes = n.div_ceil(UNITS) as u32;
    (CubeCount::Static(cubes, 1, 1), CubeDim::new_1d(UNITS as u32))
}

/// The sum over the units of a cube of [`UNITS`], for each of them.
#[cube]
pub(super) fn cube_sum(value: f32, shared: &mut SharedMemory<f32>) -> f32 {
    let own = plane_sum(value);
    if UNIT_POS_PLANE == 0u32 {
        shared[(UNIT_POS / 32u32) as usize] = own;
    }
    sync_cube();
    let mut total = 0.0f32;
    #[unroll]
    for plane in 0..8u32 {
        total += shared[plane as usize];
    }
    // The memory is free for the next sum.
    sync_cube();
    total
}

/// The largest over the units of a cube of [`UNITS`], for each of them.
#[cube]
pub(super) fn cube_max(value: f32, shared: &mut SharedMemory<f32>) -> f32 {
    let own = plane_max(value);
    if UNIT_POS_PLANE == 0u32 {
        shared[(UNIT_POS / 32u32) as usize] = own;
    }
    sync_cube();
    let mut most = shared[0];
    #[unroll]
    for plane in 1..8u32 {
        most = max(most, shared[plane as usize]);
    }
    sync_cube();
    most
}
