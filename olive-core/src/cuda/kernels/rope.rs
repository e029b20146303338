//! Rotary position embedding of heads in place.

use cubecl::prelude::*;

use super::{Float4, Half4, unit_per_item};
use crate::cuda::device::{Gpu, Numbers};
use crate::cuda::matrix::Matrix;

/// Rotary tables of some positions, and the position of each row.
#[derive(Debug, Clone)]
pub struct Rotation {
    /// `[positions, rotary_dim / 2]`.
    pub cos: Matrix,
    /// `[positions, rotary_dim / 2]`.
    pub sin: Matrix,
    /// One a row.
    pub positions: Numbers,
}

/// Rotates the first `2 half` elements of each of the first `heads` heads of a row.
#[cube(launch_unchecked)]
fn rotate(
    x: &mut Array<Half4>,
    cos: &Array<Float4>,
    sin: &Array<Float4>,
    positions: &Array<u32>,
    items: u32,
    width: u32,
    heads: u32,
    head_dim: u32,
    half: u32,
    sign: f32,
) {
    if ABSOLUTE_POS < items as usize {
        let item = ABSOLUTE_POS as u32;
        let quads = half / 4u32;
        let quad = item % quads;
        let head = item / quads % heads;
        let row = item / quads / heads;
        let at = row as usize * (width / 4u32) as usize + (head * (head_dim / 4u32) + quad) as usize;
        let table = (positions[row as usize] * quads + quad) as usize;
        let c = cos[table];
        let s = sin[table] * Float4::new(sign);
        let a = Float4::cast_from(x[at]);
        let b = Float4::cast_from(x[at + quads as usize]);
        x[at] = Half4::cast_from(a * c - b * s);
        x[at + quads as usize] = Half4::cast_from(b * c + a * s);
    }
}

impl Gpu {
    /// Rotates the first `heads` heads of every row of `x` (bfloat16) by its position; `back` turns the other way,
    /// which is the gradient.
    pub fn rotate(&self, x: &Matrix, rotation: &Rotation, heads: usize, head_dim: usize, back: bool) {
        let half = rotation.cos.cols;
        let items = x.rows * heads * half / 4;
        let (count, dim) = unit_per_item(items);
        // SAFETY: there is a position a row, within the tables; sizes are multiples of four, which opening the model
        // checked.
        unsafe {
            rotate::launch_unchecked(
                &self.client,
                count,
                dim,
                x.arg(),
                rotation.cos.arg(),
                rotation.sin.arg(),
                rotation.positions.arg(),
                items as u32,
                x.cols as u32,
                heads as u32,
                head_dim as u32,
                half as u32,
                if back { -1.0f32 } else { 1.0f32 },
            );
        }
    }
}
