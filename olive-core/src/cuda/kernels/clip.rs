//! The clip search of AWQ: shrinks of the largest magnitude of each group, judged alone and jointly.

use cubecl::prelude::*;

use super::awq::{grid_scale, grid_zero, nearest};
use super::plane_per_row;
use crate::cuda::device::Gpu;
use crate::cuda::matrix::{Element, Matrix};

/// What shrink `step` leaves of the largest magnitude.
#[cube]
fn shrink(step: u32, steps: u32) -> f32 {
    1.0f32 - f32::cast_from(step) / f32::cast_from(2u32 * steps)
}

/// The values of a group that a unit of a plane holds, 0 beyond its end.
#[cube]
fn own_values(from: &Array<f32>, base: usize, group_size: u32, #[comptime] per_unit: u32) -> Array<f32> {
    let mut values = Array::<f32>::new(comptime!(per_unit as usize));
    #[unroll]
    for i in 0..per_unit {
        let at = i * 32u32 + UNIT_POS_X;
        values[i as usize] = 0.0f32;
        if at < group_size {
            values[i as usize] = from[base + at as usize];
        }
    }
    values
}

/// The smallest value of a group, or 0.
#[cube]
fn lowest(values: &Array<f32>, #[comptime] per_unit: u32) -> f32 {
    let mut low = 0.0f32;
    #[unroll]
    for i in 0..per_unit {
        low = min(low, values[i as usize]);
    }
    plane_min(low)
}

/// The largest value of a group, or 0.
#[cube]
fn highest(values: &Array<f32>, #[comptime] per_unit: u32) -> f32 {
    let mut high = 0.0f32;
    #[unroll]
    for i in 0..per_unit {
        high = max(high, values[i as usize]);
    }
    plane_max(high)
}

/// A plane for each group of some rows: `Q(clamp(w)) - w` for every shrink, into `[groups, rows, steps, size]`.
#[cube(launch_unchecked)]
fn clip_deltas(
    weight: &Array<f32>,
    out: &mut Array<f32>,
    items: u32,
    rows: u32,
    groups: u32,
    group_size: u32,
    steps: u32,
    levels: f32,
    #[comptime] per_unit: u32,
) {
    let item = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if item < items {
        let row = item / groups;
        let group = item % groups;
        let values = own_values(weight, item as usize * group_size as usize, group_size, per_unit);
        let low = lowest(&values, per_unit);
        let high = highest(&values, per_unit);
        let largest = max(high, -low);
        let mut step = 0u32;
        while step < steps {
            let most = largest * shrink(step, steps);
            let scale = grid_scale(max(low, -most), min(high, most), levels);
            let zero = grid_zero(max(low, -most), scale, levels);
            let target = ((group * rows + row) * steps + step) as usize * group_size as usize;
            #[unroll]
            for i in 0..per_unit {
                let at = i * 32u32 + UNIT_POS_X;
                if at < group_size {
                    let w = values[i as usize];
                    out[target + at as usize] = nearest(max(min(w, most), -most), scale, zero, levels) - w;
                }
            }
            step += 1u32;
        }
    }
}

/// A plane for each group of some rows and each shrink: `dᵀ H d` from `d` and `d H`, into `own [groups, rows of all,
/// steps]`.
#[cube(launch_unchecked)]
fn clip_errors(
    deltas: &Array<f32>,
    products: &Array<f32>,
    own: &mut Array<f32>,
    items: u32,
    rows: u32,
    first_row: u32,
    all_rows: u32,
    group_size: u32,
    steps: u32,
) {
    let item = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if item < items {
        let base = item as usize * group_size as usize;
        let mut sum = 0.0f32;
        let mut i = UNIT_POS_X;
        while i < group_size {
            sum += deltas[base + i as usize] * products[base + i as usize];
            i += CUBE_DIM_X;
        }
        let sum = plane_sum(sum);
        if UNIT_POS_X == 0u32 {
            let group = item / (rows * steps);
            let rest = item % (rows * steps);
            own[(group * all_rows * steps + first_row * steps + rest) as usize] = sum;
        }
    }
}

/// A plane for each group: the first shrink of least own error, and its delta into `delta [rows, cols]`.
#[cube(launch_unchecked)]
fn choose_alone(
    weight: &Array<f32>,
    own: &Array<f32>,
    delta: &mut Array<f32>,
    chosen: &mut Array<f32>,
    items: u32,
    rows: u32,
    groups: u32,
    group_size: u32,
    steps: u32,
    levels: f32,
    #[comptime] per_unit: u32,
) {
    let item = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if item < items {
        let row = item / groups;
        let place = item % groups * rows + row;
        let mut best = 0u32;
        let mut least = own[(place * steps) as usize];
        let mut step = 1u32;
        while step < steps {
            let error = own[(place * steps + step) as usize];
            if error < least {
                least = error;
                best = step;
            }
            step += 1u32;
        }
        let base = item as usize * group_size as usize;
        let values = own_values(weight, base, group_size, per_unit);
        let low = lowest(&values, per_unit);
        let high = highest(&values, per_unit);
        let most = max(high, -low) * shrink(best, steps);
        let scale = grid_scale(max(low, -most), min(high, most), levels);
        let zero = grid_zero(max(low, -most), scale, levels);
        #[unroll]
        for i in 0..per_unit {
            let at = i * 32u32 + UNIT_POS_X;
            if at < group_size {
                let w = values[i as usize];
                delta[base + at as usize] = nearest(max(min(w, most), -most), scale, zero, levels) - w;
            }
        }
        if UNIT_POS_X == 0u32 {
            chosen[place as usize] = f32::cast_from(best);
        }
    }
}

/// A plane for each row of one group: the first shrink of least error of the whole row, the other groups being as they
/// are.
#[cube(launch_unchecked)]
fn choose_jointly(
    weight: &Array<f32>,
    own: &Array<f32>,
    others: &Array<f32>,
    delta: &mut Array<f32>,
    chosen: &mut Array<f32>,
    rows: u32,
    cols: u32,
    group: u32,
    group_size: u32,
    steps: u32,
    levels: f32,
    #[comptime] per_unit: u32,
) {
    let row = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if row < rows {
        let base = row as usize * cols as usize + (group * group_size) as usize;
        let place = group * rows + row;
        let values = own_values(weight, base, group_size, per_unit);
        let pulls = own_values(others, row as usize * group_size as usize, group_size, per_unit);
        let low = lowest(&values, per_unit);
        let high = highest(&values, per_unit);
        let largest = max(high, -low);
        let mut best = 0u32;
        let mut least = f32::new(3.0e38);
        let mut step = 0u32;
        while step < steps {
            let most = largest * shrink(step, steps);
            let scale = grid_scale(max(low, -most), min(high, most), levels);
            let zero = grid_zero(max(low, -most), scale, levels);
            let mut cross = 0.0f32;
            #[unroll]
            for i in 0..per_unit {
                let w = values[i as usize];
                let d = nearest(max(min(w, most), -most), scale, zero, levels) - w;
                cross += d * pulls[i as usize];
            }
            let error = own[(place * steps + step) as usize] + 2.0f32 * plane_sum(cross);
            if error < least {
                least = error;
                best = step;
            }
            step += 1u32;
        }
        let most = largest * shrink(best, steps);
        let scale = grid_scale(max(low, -most), min(high, most), levels);
        let zero = grid_zero(max(low, -most), scale, levels);
        #[unroll]
        for i in 0..per_unit {
            let at = i * 32u32 + UNIT_POS_X;
            if at < group_size {
                let w = values[i as usize];
                delta[base + at as usize] = nearest(max(min(w, most), -most), scale, zero, levels) - w;
            }
        }
        if UNIT_POS_X == 0u32 {
            chosen[place as usize] = f32::cast_from(best);
        }
    }
}

/// A plane for each group: clamps it to the shrink that was chosen.
#[cube(launch_unchecked)]
fn clamp_groups(
    weight: &mut Array<f32>,
    chosen: &Array<f32>,
    items: u32,
    rows: u32,
    groups: u32,
    group_size: u32,
    steps: u32,
) {
    let item = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if item < items {
        let base = item as usize * group_size as usize;
        let mut largest = 0.0f32;
        let mut i = UNIT_POS_X;
        while i < group_size {
            largest = max(largest, weight[base + i as usize].abs());
            i += CUBE_DIM_X;
        }
        let step = chosen[(item % groups * rows + item / groups) as usize];
        let most = plane_max(largest) * (1.0f32 - step / f32::cast_from(2u32 * steps));
        let mut i = UNIT_POS_X;
        while i < group_size {
            let w = weight[base + i as usize];
            weight[base + i as usize] = max(min(w, most), -most);
            i += CUBE_DIM_X;
        }
    }
}

/// What a clip search tries on groups of a weight's columns.
#[derive(Debug, Clone, Copy)]
pub struct ClipGrid {
    /// Columns of a group.
    pub group_size: usize,
    /// Shrinks of the largest magnitude, the first being none; the last leaves a little more than half.
    pub steps: usize,
    /// `2^bits - 1`.
    pub levels: f32,
}

impl ClipGrid {
    fn per_unit(&self) -> u32 {
        self.group_size.div_ceil(32) as u32
    }
}

impl Gpu {
    /// `Q(clamp(w)) - w` of every group of `weight [rows, cols]` for every shrink, `[groups · rows · steps, size]`.
    pub fn clip_deltas(&self, weight: &Matrix, grid: ClipGrid) -> Matrix {
        let groups = weight.cols / grid.group_size;
        let out = self.empty(groups * weight.rows * grid.steps, grid.group_size, Element::F32);
        let items = groups * weight.rows;
        let (count, dim) = plane_per_row(items);
        // SAFETY: groups divide the columns, and `out` has a row for each shrink of each of them.
        unsafe {
            clip_deltas::launch_unchecked(
                &self.client,
                count,
                dim,
                weight.arg(),
                out.arg(),
                items as u32,
                weight.rows as u32,
                groups as u32,
                grid.group_size as u32,
                grid.steps as u32,
                grid.levels,
                grid.per_unit(),
            );
        }
        out
    }

    /// The errors `dᵀ H d` of groups of `rows` rows from row `first` on, from deltas as [`Gpu::clip_deltas`] gives them
    /// and their products with the groups' Gram matrices, into `own [groups, all rows · steps]`.
    pub fn clip_errors(
        &self,
        [deltas, products]: [&Matrix; 2],
        grid: ClipGrid,
        (first, rows): (usize, usize),
        own: &Matrix,
    ) {
        let (count, dim) = plane_per_row(deltas.rows);
        // SAFETY: both have the same shape, and `own` has a place for each of their rows.
        unsafe {
            clip_errors::launch_unchecked(
                &self.client,
                count,
                dim,
                deltas.arg(),
                products.arg(),
                own.arg(),
                deltas.rows as u32,
                rows as u32,
                first as u32,
                (own.cols / grid.steps) as u32,
                grid.group_size as u32,
                grid.steps as u32,
            );
        }
    }

    /// For each group the first shrink of least error `own [groups, rows · steps]`: `Q(clamp(w)) - w`, `[rows, cols]`,
    /// and which it is, `[groups, rows]`.
    pub fn choose_alone(&self, weight: &Matrix, own: &Matrix, grid: ClipGrid) -> [Matrix; 2] {
        let groups = weight.cols / grid.group_size;
        let delta = self.empty(weight.rows, weight.cols, Element::F32);
        let chosen = self.empty(groups, weight.rows, Element::F32);
        let items = groups * weight.rows;
        let (count, dim) = plane_per_row(items);
        // SAFETY: shapes agree as documented.
        unsafe {
            choose_alone::launch_unchecked(
                &self.client,
                count,
                dim,
                weight.arg(),
                own.arg(),
                delta.arg(),
                chosen.arg(),
                items as u32,
                weight.rows as u32,
                groups as u32,
                grid.group_size as u32,
                grid.steps as u32,
                grid.levels,
                grid.per_unit(),
            );
        }
        [delta, chosen]
    }

    /// For each row the shrink of its group `group` that has the least error of the whole row, into `delta` and
    /// `chosen`. `others [rows, size]` are the columns of the group of `D H`, where `D` are the deltas of all other
    /// groups.
    pub fn choose_jointly(
        &self,
        weight: &Matrix,
        (grid, group): (ClipGrid, usize),
        own: &Matrix,
        others: &Matrix,
        [delta, chosen]: [&Matrix; 2],
    ) {
        let (count, dim) = plane_per_row(weight.rows);
        // SAFETY: shapes agree as documented, and there is a group of this number.
        unsafe {
            choose_jointly::launch_unchecked(
                &self.client,
                count,
                dim,
                weight.arg(),
                own.arg(),
                others.arg(),
                delta.arg(),
                chosen.arg(),
                weight.rows as u32,
                weight.cols as u32,
                group as u32,
                grid.group_size as u32,
                grid.steps as u32,
                grid.levels,
                grid.per_unit(),
            );
        }
    }

    /// Clamps every group of `weight` to the shrink that was chosen, `[groups, rows]`.
    pub fn clamp_groups(&self, weight: &Matrix, grid: ClipGrid, chosen: &Matrix) {
        let groups = weight.cols / grid.group_size;
        let items = groups * weight.rows;
        let (count, dim) = plane_per_row(items);
        // SAFETY: groups divide the columns, and there is a choice for each.
        unsafe {
            clamp_groups::launch_unchecked(
                &self.client,
                count,
                dim,
                weight.arg(),
                chosen.arg(),
                items as u32,
                weight.rows as u32,
                groups as u32,
                grid.group_size as u32,
                grid.steps as u32,
            );
        }
    }
}
