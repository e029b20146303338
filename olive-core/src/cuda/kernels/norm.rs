//! RMS norm and its backward.

use cubecl::prelude::*;

use super::{Float4, Half4, cube_per_row, cube_sum};
use crate::cuda::device::Gpu;
use crate::cuda::matrix::{Element, Matrix};

#[cube(launch_unchecked)]
fn rms_norm(x: &Array<Float4>, weight: &Array<Float4>, y: &mut Array<Half4>, width: u32, epsilon: f32) {
    let mut shared = SharedMemory::<f32>::new(8usize);
    let quads = width / 4u32;
    let first = CUBE_POS_X as usize * quads as usize;
    let mut sum = 0.0f32;
    let mut i = UNIT_POS;
    while i < quads {
        let v = x[first + i as usize];
        let square = v * v;
        sum += square[0] + square[1] + square[2] + square[3];
        i += CUBE_DIM;
    }
    let total = cube_sum(sum, &mut shared);
    let inverse = f32::inverse_sqrt(total / f32::cast_from(width) + epsilon);
    let mut i = UNIT_POS;
    while i < quads {
        let v = x[first + i as usize] * Float4::new(inverse) * weight[i as usize];
        y[first + i as usize] = Half4::cast_from(v);
        i += CUBE_DIM;
    }
}

/// `dx += i · (g - x · i² · mean(g · x))`, `g = dy · w`; the new `dx` is also written to `rounded`.
#[cube(launch_unchecked)]
fn rms_norm_backward(
    x: &Array<Float4>,
    weight: &Array<Float4>,
    dy: &Array<Half4>,
    dx: &mut Array<Float4>,
    rounded: &mut Array<Half4>,
    width: u32,
    epsilon: f32,
) {
    let mut shared = SharedMemory::<f32>::new(8usize);
    let quads = width / 4u32;
    let first = CUBE_POS_X as usize * quads as usize;
    let mut squares = 0.0f32;
    let mut slopes = 0.0f32;
    let mut i = UNIT_POS;
    while i < quads {
        let v = x[first + i as usize];
        let g = Float4::cast_from(dy[first + i as usize]) * weight[i as usize];
        let square = v * v;
        let slope = v * g;
        squares += square[0] + square[1] + square[2] + square[3];
        slopes += slope[0] + slope[1] + slope[2] + slope[3];
        i += CUBE_DIM;
    }
    let n = f32::cast_from(width);
    let squares = cube_sum(squares, &mut shared);
    let slopes = cube_sum(slopes, &mut shared);
    let inverse = f32::inverse_sqrt(squares / n + epsilon);
    let common = slopes / n * inverse * inverse;
    let mut i = UNIT_POS;
    while i < quads {
        let at = first + i as usize;
        let g = Float4::cast_from(dy[at]) * weight[i as usize];
        let v = dx[at] + (g - x[at] * Float4::new(common)) * Float4::new(inverse);
        dx[at] = v;
        rounded[at] = Half4::cast_from(v);
        i += CUBE_DIM;
    }
}

impl Gpu {
    /// `x / √(mean(x²) + ε) · weight` of each row of `x` (single precision), in bfloat16.
    pub fn rms_norm(&self, x: &Matrix, weight: &Matrix, epsilon: f64) -> Matrix {
        let y = self.empty(x.rows, x.cols, Element::Bf16);
        self.rms_norm_into(x, weight, epsilon, &y);
        y
    }

    /// As [`Gpu::rms_norm`], into `y`.
    pub fn rms_norm_into(&self, x: &Matrix, weight: &Matrix, epsilon: f64, y: &Matrix) {
        let (count, dim) = cube_per_row(x.rows);
        // SAFETY: shapes agree; widths are multiples of four, which opening the model checked.
        unsafe {
            rms_norm::launch_unchecked(
                &self.client,
                count,
                dim,
                x.arg(),
                weight.arg(),
                y.arg(),
                x.cols as u32,
                epsilon as f32,
            );
        }
    }

    /// Adds the gradient of the input `x` of [`Gpu::rms_norm`] to `dx` (both single precision), from that of its
    /// output `dy` (bfloat16); gives the sum in bfloat16.
    pub fn rms_norm_backward(
        &self,
        x: &Matrix,
        weight: &Matrix,
        epsilon: f64,
        dy: &Matrix,
        dx: &Matrix,
    ) -> Matrix {
        let rounded = self.empty(x.rows, x.cols, Element::Bf16);
        let (count, dim) = cube_per_row(x.rows);
        // SAFETY: as for `rms_norm`.
        unsafe {
            rms_norm_backward::launch_unchecked(
                &self.client,
                count,
                dim,
                x.arg(),
                weight.arg(),
                dy.arg(),
                dx.arg(),
                rounded.arg(),
                x.cols as u32,
                epsilon as f32,
            );
        }
        rounded
    }
}
