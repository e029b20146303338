//! What AWQ does to weights: integer grids of groups, scales, and the sums that its decisions follow from.
//!
//! The grid of a group is that of olive-quant's `Affine` in single precision: scale in half precision, rounding half
//! to even, the range extended to zero.

use cubecl::prelude::*;
use half::{bf16, f16};

use super::{plane_per_row, unit_per_item};
use crate::cuda::device::Gpu;
use crate::cuda::matrix::{Element, Matrix};

/// Rows that a unit sums.
const SUMMED_ROWS: usize = 256;

#[cube]
pub(super) fn round_even(value: f32) -> f32 {
    let most = 1_048_576.0f32;
    let rounder = 12_582_912.0f32;
    let clamped = max(min(value, most), -most);
    (clamped + rounder) - rounder
}

/// The scale of the grid of a group with this smallest and largest value.
#[cube]
pub(super) fn grid_scale(low: f32, high: f32, levels: f32) -> f32 {
    let range = max(max(high, 0.0f32) - min(low, 0.0f32), 1e-5f32);
    f32::cast_from(f16::cast_from(range / levels))
}

#[cube]
pub(super) fn grid_zero(low: f32, scale: f32, levels: f32) -> f32 {
    max(min(-round_even(min(low, 0.0f32) / scale), levels), 0.0f32)
}

/// The value of the grid nearest to `w`.
#[cube]
pub(super) fn nearest(w: f32, scale: f32, zero: f32, levels: f32) -> f32 {
    let level = max(min(round_even(w / scale) + zero, levels), 0.0f32);
    (level - zero) * scale
}

/// A plane for each group: `Q(w · s) / s`, or that less `w`.
#[cube(launch_unchecked)]
fn round_scaled<F: Float>(
    weight: &Array<f32>,
    scales: &Array<f32>,
    out: &mut Array<F>,
    n_groups: u32,
    cols: u32,
    group_size: u32,
    levels: f32,
    #[comptime] difference: bool,
) {
    let group = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if group < n_groups {
        let per_row = cols / group_size;
        let first_col = group % per_row * group_size;
        let base = group as usize * group_size as usize;
        let mut low = 0.0f32;
        let mut high = 0.0f32;
        let mut i = UNIT_POS_X;
        while i < group_size {
            let v = weight[base + i as usize] * scales[(first_col + i) as usize];
            low = min(low, v);
            high = max(high, v);
            i += CUBE_DIM_X;
        }
        let low = plane_min(low);
        let high = plane_max(high);
        let scale = grid_scale(low, high, levels);
        let zero = grid_zero(low, scale, levels);
        let mut i = UNIT_POS_X;
        while i < group_size {
            let w = weight[base + i as usize];
            let s = scales[(first_col + i) as usize];
            let mut q = nearest(w * s, scale, zero, levels) / s;
            if comptime!(difference) {
                q -= w;
            }
            out[base + i as usize] = F::cast_from(q);
            i += CUBE_DIM_X;
        }
    }
}

/// A plane for each group: the largest magnitude.
#[cube(launch_unchecked)]
fn group_largest(weight: &Array<f32>, out: &mut Array<f32>, n_groups: u32, group_size: u32) {
    let group = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if group < n_groups {
        let base = group as usize * group_size as usize;
        let mut largest = 0.0f32;
        let mut i = UNIT_POS_X;
        while i < group_size {
            largest = max(largest, weight[base + i as usize].abs());
            i += CUBE_DIM_X;
        }
        let largest = plane_max(largest);
        if UNIT_POS_X == 0u32 {
            out[group as usize] = largest;
        }
    }
}

/// A unit for each column and some rows: the sum of `|w| / (largest of its group + 1e-6)`.
#[cube(launch_unchecked)]
fn share_sums(
    weight: &Array<f32>,
    largest: &Array<f32>,
    out: &mut Array<f32>,
    items: u32,
    rows: u32,
    cols: u32,
    group_size: u32,
    step: u32,
) {
    if ABSOLUTE_POS < items as usize {
        let item = ABSOLUTE_POS as u32;
        let col = item % cols;
        let mut row = item / cols * step;
        let end = min(row + step, rows);
        let per_row = cols / group_size;
        let mut sum = 0.0f32;
        while row < end {
            let most = largest[(row * per_row + col / group_size) as usize];
            sum += weight[row as usize * cols as usize + col as usize].abs() / (most + 1e-6f32);
            row += 1u32;
        }
        out[ABSOLUTE_POS] = sum;
    }
}

/// A unit for each column and some rows: the sum of `|x|`.
#[cube(launch_unchecked)]
fn abs_sums(x: &Array<bf16>, out: &mut Array<f32>, items: u32, rows: u32, cols: u32, step: u32) {
    if ABSOLUTE_POS < items as usize {
        let item = ABSOLUTE_POS as u32;
        let col = item % cols;
        let mut row = item / cols * step;
        let end = min(row + step, rows);
        let mut sum = 0.0f32;
        while row < end {
            sum += f32::cast_from(x[row as usize * cols as usize + col as usize]).abs();
            row += 1u32;
        }
        out[ABSOLUTE_POS] = sum;
    }
}

/// A unit for each column: its sum.
#[cube(launch_unchecked)]
fn column_totals(x: &Array<f32>, out: &mut Array<f32>, rows: u32, cols: u32) {
    if ABSOLUTE_POS < cols as usize {
        let mut sum = 0.0f32;
        let mut row = 0u32;
        while row < rows {
            sum += x[row as usize * cols as usize + ABSOLUTE_POS];
            row += 1u32;
        }
        out[ABSOLUTE_POS] = sum;
    }
}

#[cube(launch_unchecked)]
fn widen(x: &Array<bf16>, out: &mut Array<f32>, items: u32) {
    if ABSOLUTE_POS < items as usize {
        out[ABSOLUTE_POS] = f32::cast_from(x[ABSOLUTE_POS]);
    }
}

/// `w[n, k] · columns[k]`.
#[cube(launch_unchecked)]
fn scale_columns(weight: &mut Array<f32>, columns: &Array<f32>, items: u32, cols: u32) {
    if ABSOLUTE_POS < items as usize {
        weight[ABSOLUTE_POS] *= columns[ABSOLUTE_POS % cols as usize];
    }
}

/// `w[n, k] / rows[n]`, and with `both` also divided by `rows[k]`.
#[cube(launch_unchecked)]
fn divide_rows(weight: &mut Array<f32>, rows: &Array<f32>, items: u32, cols: u32, #[comptime] both: bool) {
    if ABSOLUTE_POS < items as usize {
        let mut divisor = rows[ABSOLUTE_POS / cols as usize];
        if comptime!(both) {
            divisor *= rows[ABSOLUTE_POS % cols as usize];
        }
        weight[ABSOLUTE_POS] /= divisor;
    }
}

impl Gpu {
    /// `Q(w · s) / s` of groups of `group_size` columns, in bfloat16; `scales` are one a column.
    pub fn round_scaled(&self, weight: &Matrix, scales: &Matrix, group_size: usize, levels: f32) -> Matrix {
        self.rounded::<bf16>(weight, scales, group_size, levels, Element::Bf16, false)
    }

    /// `Q(w · s) / s - w`, in single precision.
    pub fn rounding_error(&self, weight: &Matrix, scales: &Matrix, group_size: usize, levels: f32) -> Matrix {
        self.rounded::<f32>(weight, scales, group_size, levels, Element::F32, true)
    }

    /// As [`Gpu::rounding_error`], in bfloat16.
    pub fn rounding_error_half(
        &self,
        weight: &Matrix,
        scales: &Matrix,
        group_size: usize,
        levels: f32,
    ) -> Matrix {
        self.rounded::<bf16>(weight, scales, group_size, levels, Element::Bf16, true)
    }

    fn rounded<F: Float + CubeElement>(
        &self,
        weight: &Matrix,
        scales: &Matrix,
        group_size: usize,
        levels: f32,
        element: Element,
        difference: bool,
    ) -> Matrix {
        let out = self.empty(weight.rows, weight.cols, element);
        let n_groups = weight.len() / group_size;
        let (count, dim) = plane_per_row(n_groups);
        // SAFETY: groups divide the columns, and there is a scale for each column.
        unsafe {
            round_scaled::launch_unchecked::<F, cubecl::cuda::CudaRuntime>(
                &self.client,
                count,
                dim,
                weight.arg(),
                scales.arg(),
                out.arg(),
                n_groups as u32,
                weight.cols as u32,
                group_size as u32,
                levels,
                difference,
            );
        }
        out
    }

    /// Sums over some rows each of `|w| / (largest of its group + 1e-6)`, `[parts, cols]`.
    pub fn share_sums(&self, weight: &Matrix, group_size: usize) -> Matrix {
        let groups = weight.cols / group_size;
        let largest = self.empty(weight.rows, groups, Element::F32);
        let (count, dim) = plane_per_row(largest.len());
        let parts = weight.rows.div_ceil(SUMMED_ROWS);
        let out = self.empty(parts, weight.cols, Element::F32);
        // SAFETY: groups divide the columns; there is a place for each part of each column.
        unsafe {
            group_largest::launch_unchecked(
                &self.client,
                count,
                dim,
                weight.arg(),
                largest.arg(),
                largest.len() as u32,
                group_size as u32,
            );
            let (count, dim) = unit_per_item(out.len());
            share_sums::launch_unchecked(
                &self.client,
                count,
                dim,
                weight.arg(),
                largest.arg(),
                out.arg(),
                out.len() as u32,
                weight.rows as u32,
                weight.cols as u32,
                group_size as u32,
                SUMMED_ROWS as u32,
            );
        }
        out
    }

    /// Sums over some rows each of `|x|` (bfloat16), `[parts, cols]`.
    pub fn abs_sums(&self, x: &Matrix) -> Matrix {
        let parts = x.rows.div_ceil(SUMMED_ROWS);
        let out = self.empty(parts, x.cols, Element::F32);
        let (count, dim) = unit_per_item(out.len());
        // SAFETY: there is a place for each part of each column.
        unsafe {
            abs_sums::launch_unchecked(
                &self.client,
                count,
                dim,
                x.arg(),
                out.arg(),
                out.len() as u32,
                x.rows as u32,
                x.cols as u32,
                SUMMED_ROWS as u32,
            );
        }
        out
    }

    /// The sums of the columns of a matrix of few rows (single precision), `[1, cols]`.
    pub fn column_totals(&self, x: &Matrix) -> Matrix {
        let out = self.empty(1, x.cols, Element::F32);
        let (count, dim) = unit_per_item(x.cols);
        // SAFETY: there is a place for each column.
        unsafe {
            column_totals::launch_unchecked(
                &self.client,
                count,
                dim,
                x.arg(),
                out.arg(),
                x.rows as u32,
                x.cols as u32,
            );
        }
        out
    }

    /// `x` (bfloat16) in single precision.
    pub fn widen(&self, x: &Matrix) -> Matrix {
        let out = self.empty(x.rows, x.cols, Element::F32);
        let (count, dim) = unit_per_item(x.len());
        // SAFETY: both have the same shape.
        unsafe {
            widen::launch_unchecked(&self.client, count, dim, x.arg(), out.arg(), x.len() as u32);
        }
        out
    }

    /// Multiplies the columns of `weight` (single precision) by `columns`.
    pub fn scale_columns(&self, weight: &Matrix, columns: &Matrix) {
        let (count, dim) = unit_per_item(weight.len());
        // SAFETY: there is a factor for each column.
        unsafe {
            scale_columns::launch_unchecked(
                &self.client,
                count,
                dim,
                weight.arg(),
                columns.arg(),
                weight.len() as u32,
                weight.cols as u32,
            );
        }
    }

    /// Divides the rows of `weight` (single precision) by `rows`; with `both`, its columns too.
    pub fn divide_rows(&self, weight: &Matrix, rows: &Matrix, both: bool) {
        let (count, dim) = unit_per_item(weight.len());
        // SAFETY: there is a divisor for each row, and with `both` the matrix is square.
        unsafe {
            divide_rows::launch_unchecked(
                &self.client,
                count,
                dim,
                weight.arg(),
                rows.arg(),
                weight.len() as u32,
                weight.cols as u32,
                both,
            );
        }
    }
}
