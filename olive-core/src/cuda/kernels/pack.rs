//! Rounding to 4 bits and packing into AutoAWQ's layout, so that a layer leaves the device in its final form.

use cubecl::prelude::*;
use half::f16;

use super::awq::{grid_scale, grid_zero, nearest, round_even};
use super::{UNITS, plane_per_row, unit_per_item};
use crate::cuda::device::Gpu;
use crate::cuda::matrix::{Element, Matrix};
use crate::error::{Error, Result};
use crate::packed::awq_gemm::AwqTensors;

/// The largest value of a 4-bit grid.
const LEVELS: f32 = 15.0;

/// A plane for each group: its scale and zero point, `[groups, rows]`, and its shares of `‖Q(w) - w‖²` and `‖w‖²`.
#[cube(launch_unchecked)]
fn grids(
    weight: &Array<f32>,
    scales: &mut Array<f16>,
    zeros: &mut Array<f32>,
    shares: &mut Array<f32>,
    items: u32,
    rows: u32,
    groups: u32,
    group_size: u32,
    levels: f32,
) {
    let item = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if item < items {
        let base = item as usize * group_size as usize;
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
        let scale = grid_scale(low, high, levels);
        let zero = grid_zero(low, scale, levels);
        let mut error = 0.0f32;
        let mut whole = 0.0f32;
        let mut i = UNIT_POS_X;
        while i < group_size {
            let w = weight[base + i as usize];
            let d = nearest(w, scale, zero, levels) - w;
            error += d * d;
            whole += w * w;
            i += CUBE_DIM_X;
        }
        let error = plane_sum(error);
        let whole = plane_sum(whole);
        if UNIT_POS_X == 0u32 {
            let place = (item % groups * rows + item / groups) as usize;
            scales[place] = f16::cast_from(scale);
            zeros[place] = zero;
            shares[item as usize] = error;
            shares[(items + item) as usize] = whole;
        }
    }
}

/// Which of eight output features a nibble of a word holds: 0, 2, 4, 6, 1, 3, 5, 7.
#[cube]
fn offset(nibble: u32) -> u32 {
    (nibble & 3u32) * 2u32 + (nibble >> 2u32)
}

/// A cube for each tile of 32 inputs and 64 output features: its words of eight features, `[cols, rows / 8]`.
#[cube(launch_unchecked)]
fn pack_weight(
    weight: &Array<f32>,
    scales: &Array<f16>,
    zeros: &Array<f32>,
    words: &mut Array<u32>,
    rows: u32,
    cols: u32,
    group_size: u32,
    levels: f32,
) {
    // One word of padding a row of the tile keeps its columns in different banks.
    let mut tile = SharedMemory::<u32>::new(288usize);
    let x = UNIT_POS % 32u32;
    let y = UNIT_POS / 32u32;
    let col = CUBE_POS_X * 32u32 + x;
    let eight = CUBE_POS_Y * 8u32 + y;
    let per_row = rows / 8u32;
    let mut word = 0u32;
    if col < cols && eight < per_row {
        #[unroll]
        for nibble in 0..8u32 {
            let row = eight * 8u32 + offset(nibble);
            let place = (col / group_size * rows + row) as usize;
            let scale = f32::cast_from(scales[place]);
            let w = weight[row as usize * cols as usize + col as usize];
            let level = max(min(round_even(w / scale) + zeros[place], levels), 0.0f32);
            word |= u32::cast_from(level) << (nibble * 4u32);
        }
    }
    tile[(x * 9u32 + y) as usize] = word;
    sync_cube();
    let col = CUBE_POS_X * 32u32 + UNIT_POS / 8u32;
    let eight = CUBE_POS_Y * 8u32 + UNIT_POS % 8u32;
    if col < cols && eight < per_row {
        words[col as usize * per_row as usize + eight as usize] =
            tile[(UNIT_POS / 8u32 * 9u32 + UNIT_POS % 8u32) as usize];
    }
}

/// A unit for each word of eight zero points.
#[cube(launch_unchecked)]
fn pack_zeros(zeros: &Array<f32>, words: &mut Array<u32>, items: u32) {
    if ABSOLUTE_POS < items as usize {
        let mut word = 0u32;
        #[unroll]
        for nibble in 0..8u32 {
            let zero = zeros[ABSOLUTE_POS * 8usize + offset(nibble) as usize];
            word |= u32::cast_from(zero) << (nibble * 4u32);
        }
        words[ABSOLUTE_POS] = word;
    }
}

/// A rounded and packed weight on its way to the host.
pub struct PackedAwq {
    /// `[cols, rows / 8]` words.
    weight: Matrix,
    zeros: Matrix,
    /// Two half-precision numbers a word.
    scales: Matrix,
    shares: Matrix,
}

impl Gpu {
    /// Rounds `weight [rows, cols]` (single precision, `rows` a multiple of 8) to 4 bits in groups of `group_size`
    /// inputs.
    ///
    /// # Errors
    /// [`Error::Tensor`] for sizes that the layout does not hold.
    pub fn pack_awq(&self, name: &str, weight: &Matrix, group_size: usize) -> Result<PackedAwq> {
        let (rows, cols) = (weight.rows, weight.cols);
        if group_size == 0 || !cols.is_multiple_of(group_size) || !rows.is_multiple_of(8) {
            let expected =
                format!("groups of {group_size} that divide the inputs, and a multiple of 8 outputs");
            return Err(Error::tensor(name, expected, format!("[{rows}, {cols}]")));
        }
        let groups = cols / group_size;
        let items = rows * groups;
        let scales = self.empty(groups, rows / 2, Element::F32);
        let zeros = self.empty(groups, rows, Element::F32);
        let shares = self.empty(2, items, Element::F32);
        let words = self.empty(cols, rows / 8, Element::F32);
        let zero_words = self.empty(groups, rows / 8, Element::F32);
        // SAFETY: a word is as large as a single-precision number, and two half-precision numbers; there is a place for
        // each group and each word.
        unsafe {
            let halves = || ArrayArg::from_raw_parts(scales.handle.clone(), items);
            let whole = |x: &Matrix| ArrayArg::from_raw_parts(x.handle.clone(), x.len());
            let (count, dim) = plane_per_row(items);
            grids::launch_unchecked(
                &self.client,
                count,
                dim,
                weight.arg(),
                halves(),
                zeros.arg(),
                shares.arg(),
                items as u32,
                rows as u32,
                groups as u32,
                group_size as u32,
                LEVELS,
            );
            let count = CubeCount::Static(cols.div_ceil(32) as u32, rows.div_ceil(64) as u32, 1);
            pack_weight::launch_unchecked(
                &self.client,
                count,
                CubeDim::new_1d(UNITS as u32),
                weight.arg(),
                halves(),
                zeros.arg(),
                whole(&words),
                rows as u32,
                cols as u32,
                group_size as u32,
                LEVELS,
            );
            let (count, dim) = unit_per_item(zero_words.len());
            pack_zeros::launch_unchecked(
                &self.client,
                count,
                dim,
                zeros.arg(),
                whole(&zero_words),
                zero_words.len() as u32,
            );
        }
        Ok(PackedAwq {
            weight: words,
            zeros: zero_words,
            scales,
            shares,
        })
    }

    /// The tensors of a packed weight, and `‖Q(w) - w‖ / ‖w‖`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the weight or a scale in half precision is not finite; those of reading from the device.
    pub fn unload_awq(&self, name: &str, packed: &PackedAwq) -> Result<(AwqTensors, f64)> {
        let error = self.sum(&packed.shares.rows(0, 1))?.sqrt();
        let whole = self.sum(&packed.shares.rows(1, 1))?.sqrt();
        let scales = self.download(&packed.scales)?;
        let halves = scales.as_chunks::<2>().0.iter();
        let bad = halves
            .filter(|half| !f16::from_le_bytes(**half).is_finite())
            .count();
        if bad > 0 || !whole.is_finite() {
            let what = format!("a scale of `{name}` in half precision, or the weight itself");
            return Err(Error::NotFinite {
                what,
                found: bad.max(1),
            });
        }
        let tensors = AwqTensors {
            qweight: self.download(&packed.weight)?,
            qzeros: self.download(&packed.zeros)?,
            scales,
        };
        Ok((tensors, if error == 0.0 { 0.0 } else { error / whole }))
    }
}
