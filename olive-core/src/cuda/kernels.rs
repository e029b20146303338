//! Kernels in CubeCL. Each does in one pass over its operands what Burn's operations would do in several.
//!
//! Layouts are row-major. Elements in memory are bfloat16 or single precision as the kernels say; arithmetic is in
//! single precision. No kernel uses atomics: a result does not depend on the order in which cubes run.

mod activation;
mod awq;
mod dropout;
mod loss;
mod norm;
mod optimizer;
mod packed;
mod rope;
mod rows;
mod softmax;

pub use awq::ClipGroup;
pub use dropout::Dropout;
pub use optimizer::AdamWStep;
pub use packed::{DevicePacked, NormalFloats};
pub use rope::Rotation;

use cubecl::prelude::*;
use half::bf16;

/// Four bfloat16 numbers that are read at once.
pub(super) type Half4 = Vector<bf16, Const<4>>;
/// Four single-precision numbers that are read at once.
pub(super) type Float4 = Vector<f32, Const<4>>;

/// Units of a cube.
pub(super) const UNITS: usize = 256;
/// Units of a plane: a warp.
pub(super) const PLANE: u32 = 32;
/// Planes of a cube that has one row for each.
pub(super) const ROWS: u32 = 8;

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
