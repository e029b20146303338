//! What AWQ does to weights: integer grids of groups, scales, clips, and the sums that its decisions follow from.
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
fn round_even(value: f32) -> f32 {
    let most = 1_048_576.0f32;
    let rounder = 12_582_912.0f32;
    let clamped = max(min(value, most), -most);
    (clamped + rounder) - rounder
}

/// The scale of the grid of a group with this smallest and largest value.
#[cube]
fn grid_scale(low: f32, high: f32, levels: f32) -> f32 {
    let range = max(max(high, 0.0f32) - min(low, 0.0f32), 1e-5f32);
    f32::cast_from(f16::cast_from(range / levels))
}

#[cube]
fn grid_zero(low: f32, scale: f32, levels: f32) -> f32 {
    max(min(-round_even(min(low, 0.0f32) / scale), levels), 0.0f32)
}

/// The value of the grid nearest to `w`.
#[cube]
fn nearest(w: f32, scale: f32, zero: f32, levels: f32) -> f32 {
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

/// A plane for each row of a group: `Q(clamp(w)) - w` for every shrink of the largest magnitude, one after the other.
#[cube(launch_unchecked)]
fn clip_deltas(
    weight: &Array<f32>,
    out: &mut Array<f32>,
    rows: u32,
    cols: u32,
    first: u32,
    group_size: u32,
    steps: u32,
    levels: f32,
) {
    let row = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if row < rows {
        let base = row as usize * cols as usize + first as usize;
        let mut low = 0.0f32;
        let mut high = 0.0f32;
        let mut i = UNIT_POS_X;
        while i < group_size {
            let w = weight[base + i as usize];
            low = min(low, w);
            high = max(high, w);
            i += CUBE_DIM_X;
        }
        let low = plane_min(low);
        let high = plane_max(high);
        let largest = max(high, -low);
        let mut step = 0u32;
        while step < steps {
            let most = largest * shrink(step, steps);
            let scale = grid_scale(max(low, -most), min(high, most), levels);
            let zero = grid_zero(max(low, -most), scale, levels);
            let target = (row * steps + step) as usize * group_size as usize;
            let mut i = UNIT_POS_X;
            while i < group_size {
                let w = weight[base + i as usize];
                out[target + i as usize] = nearest(max(min(w, most), -most), scale, zero, levels) - w;
                i += CUBE_DIM_X;
            }
            step += 1u32;
        }
    }
}

/// What shrink `step` leaves of the largest magnitude.
#[cube]
fn shrink(step: u32, steps: u32) -> f32 {
    1.0f32 - f32::cast_from(step) / f32::cast_from(2u32 * steps)
}

/// A plane for each row: `Σ a b`.
#[cube(launch_unchecked)]
fn row_dots(a: &Array<f32>, b: &Array<f32>, out: &mut Array<f32>, rows: u32, width: u32) {
    let row = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if row < rows {
        let base = row as usize * width as usize;
        let mut sum = 0.0f32;
        let mut i = UNIT_POS_X;
        while i < width {
            sum += a[base + i as usize] * b[base + i as usize];
            i += CUBE_DIM_X;
        }
        let sum = plane_sum(sum);
        if UNIT_POS_X == 0u32 {
            out[row as usize] = sum;
        }
    }
}

/// A plane for each row of a group: the first shrink of least own error, and its delta into `delta`.
#[cube(launch_unchecked)]
fn choose_alone(
    deltas: &Array<f32>,
    own: &Array<f32>,
    delta: &mut Array<f32>,
    chosen: &mut Array<f32>,
    rows: u32,
    cols: u32,
    first: u32,
    group_size: u32,
    steps: u32,
) {
    let row = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if row < rows {
        let mut best = 0u32;
        let mut least = own[(row * steps) as usize];
        let mut step = 1u32;
        while step < steps {
            let error = own[(row * steps + step) as usize];
            if error < least {
                least = error;
                best = step;
            }
            step += 1u32;
        }
        let source = (row * steps + best) as usize * group_size as usize;
        let target = row as usize * cols as usize + first as usize;
        let mut i = UNIT_POS_X;
        while i < group_size {
            delta[target + i as usize] = deltas[source + i as usize];
            i += CUBE_DIM_X;
        }
        if UNIT_POS_X == 0u32 {
            chosen[row as usize] = f32::cast_from(best);
        }
    }
}

/// A plane for each row of a group: the first shrink of least error of the whole row, the other groups being as they
/// are; `change` is what it changes.
#[cube(launch_unchecked)]
fn choose_jointly(
    weight: &Array<f32>,
    own: &Array<f32>,
    product: &Array<f32>,
    share: &Array<f32>,
    delta: &mut Array<f32>,
    chosen: &mut Array<f32>,
    change: &mut Array<f32>,
    rows: u32,
    cols: u32,
    first: u32,
    group_size: u32,
    steps: u32,
    levels: f32,
) {
    let row = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if row < rows {
        let base = row as usize * cols as usize + first as usize;
        let narrow = row as usize * group_size as usize;
        let mut low = 0.0f32;
        let mut high = 0.0f32;
        let mut i = UNIT_POS_X;
        while i < group_size {
            let w = weight[base + i as usize];
            low = min(low, w);
            high = max(high, w);
            i += CUBE_DIM_X;
        }
        let low = plane_min(low);
        let high = plane_max(high);
        let largest = max(high, -low);
        let mut best = 0u32;
        let mut least = f32::new(3.0e38);
        let mut step = 0u32;
        while step < steps {
            let most = largest * shrink(step, steps);
            let scale = grid_scale(max(low, -most), min(high, most), levels);
            let zero = grid_zero(max(low, -most), scale, levels);
            let mut cross = 0.0f32;
            let mut i = UNIT_POS_X;
            while i < group_size {
                let w = weight[base + i as usize];
                let d = nearest(max(min(w, most), -most), scale, zero, levels) - w;
                cross += d * (product[base + i as usize] - share[narrow + i as usize]);
                i += CUBE_DIM_X;
            }
            let error = own[(row * steps + step) as usize] + 2.0f32 * plane_sum(cross);
            if error < least {
                least = error;
                best = step;
            }
            step += 1u32;
        }
        let most = largest * shrink(best, steps);
        let scale = grid_scale(max(low, -most), min(high, most), levels);
        let zero = grid_zero(max(low, -most), scale, levels);
        let mut i = UNIT_POS_X;
        while i < group_size {
            let w = weight[base + i as usize];
            let d = nearest(max(min(w, most), -most), scale, zero, levels) - w;
            change[narrow + i as usize] = d - delta[base + i as usize];
            delta[base + i as usize] = d;
            i += CUBE_DIM_X;
        }
        if UNIT_POS_X == 0u32 {
            chosen[row as usize] = f32::cast_from(best);
        }
    }
}

/// A plane for each row of a group: clamps it to the shrink that was chosen.
#[cube(launch_unchecked)]
fn clamp_group(
    weight: &mut Array<f32>,
    chosen: &Array<f32>,
    rows: u32,
    cols: u32,
    first: u32,
    group_size: u32,
    steps: u32,
) {
    let row = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if row < rows {
        let base = row as usize * cols as usize + first as usize;
        let mut largest = 0.0f32;
        let mut i = UNIT_POS_X;
        while i < group_size {
            largest = max(largest, weight[base + i as usize].abs());
            i += CUBE_DIM_X;
        }
        let largest = plane_max(largest);
        let most = largest * (1.0f32 - chosen[row as usize] / f32::cast_from(2u32 * steps));
        let mut i = UNIT_POS_X;
        while i < group_size {
            let w = weight[base + i as usize];
            weight[base + i as usize] = max(min(w, most), -most);
            i += CUBE_DIM_X;
        }
    }
}

/// A group of columns of a weight, and the shrinks of its largest magnitude that are tried.
#[derive(Debug, Clone, Copy)]
pub struct ClipGroup {
    /// First column.
    pub first: usize,
    /// Columns.
    pub size: usize,
    /// Shrinks, the first being none; the last leaves a little more than half.
    pub steps: usize,
    /// `2^bits - 1`.
    pub levels: f32,
}

impl Gpu {
    /// `Q(w · s) / s` of groups of `group_size` columns, in bfloat16; `scales` are one a column.
    pub fn round_scaled(&self, weight: &Matrix, scales: &Matrix, group_size: usize, levels: f32) -> Matrix {
        self.rounded::<bf16>(weight, scales, group_size, levels, Element::Bf16)
    }

    /// `Q(w · s) / s - w`, in single precision.
    pub fn rounding_error(&self, weight: &Matrix, scales: &Matrix, group_size: usize, levels: f32) -> Matrix {
        self.rounded::<f32>(weight, scales, group_size, levels, Element::F32)
    }

    fn rounded<F: Float + CubeElement>(
        &self,
        weight: &Matrix,
        scales: &Matrix,
        group_size: usize,
        levels: f32,
        element: Element,
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
                element == Element::F32,
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

    /// `Q(clamp(w)) - w` of a group for every shrink, `[rows * steps, size]`.
    pub fn clip_deltas(&self, weight: &Matrix, group: ClipGroup) -> Matrix {
        let out = self.empty(weight.rows * group.steps, group.size, Element::F32);
        let (count, dim) = plane_per_row(weight.rows);
        // SAFETY: the group lies in the weight.
        unsafe {
            clip_deltas::launch_unchecked(
                &self.client,
                count,
                dim,
                weight.arg(),
                out.arg(),
                weight.rows as u32,
                weight.cols as u32,
                group.first as u32,
                group.size as u32,
                group.steps as u32,
                group.levels,
            );
        }
        out
    }

    /// `Σ a b` of each row, into `out` with an element a row.
    pub fn row_dots(&self, a: &Matrix, b: &Matrix, out: &Matrix) {
        let (count, dim) = plane_per_row(a.rows);
        // SAFETY: both have the same shape.
        unsafe {
            row_dots::launch_unchecked(
                &self.client,
                count,
                dim,
                a.arg(),
                b.arg(),
                out.arg(),
                a.rows as u32,
                a.cols as u32,
            );
        }
    }

    /// For each row of a group, the first shrink of least error `own [rows * steps]`, into `chosen [rows]`, and its
    /// delta into the group's columns of `delta`.
    pub fn choose_alone(
        &self,
        deltas: &Matrix,
        own: &Matrix,
        group: ClipGroup,
        delta: &Matrix,
        chosen: &Matrix,
    ) {
        let (count, dim) = plane_per_row(delta.rows);
        // SAFETY: shapes agree as documented.
        unsafe {
            choose_alone::launch_unchecked(
                &self.client,
                count,
                dim,
                deltas.arg(),
                own.arg(),
                delta.arg(),
                chosen.arg(),
                delta.rows as u32,
                delta.cols as u32,
                group.first as u32,
                group.size as u32,
                group.steps as u32,
            );
        }
    }

    /// For each row of a group, the shrink of least error of the whole row: `product` is `delta · H`, `share` the
    /// group's own part of it. Gives what changes in `delta`, `[rows, size]`.
    pub fn choose_jointly(
        &self,
        weight: &Matrix,
        group: ClipGroup,
        own: &Matrix,
        [product, share]: [&Matrix; 2],
        delta: &Matrix,
        chosen: &Matrix,
    ) -> Matrix {
        let change = self.empty(weight.rows, group.size, Element::F32);
        let (count, dim) = plane_per_row(weight.rows);
        // SAFETY: shapes agree as documented.
        unsafe {
            choose_jointly::launch_unchecked(
                &self.client,
                count,
                dim,
                weight.arg(),
                own.arg(),
                product.arg(),
                share.arg(),
                delta.arg(),
                chosen.arg(),
                change.arg(),
                weight.rows as u32,
                weight.cols as u32,
                group.first as u32,
                group.size as u32,
                group.steps as u32,
                group.levels,
            );
        }
        change
    }

    /// Clamps a group of `weight` to the shrinks that were chosen.
    pub fn clamp_group(&self, weight: &Matrix, group: ClipGroup, chosen: &Matrix) {
        let (count, dim) = plane_per_row(weight.rows);
        // SAFETY: the group lies in the weight; there is a choice for each row.
        unsafe {
            clamp_group::launch_unchecked(
                &self.client,
                count,
                dim,
                weight.arg(),
                chosen.arg(),
                weight.rows as u32,
                weight.cols as u32,
                group.first as u32,
                group.size as u32,
                group.steps as u32,
            );
        }
    }
}
