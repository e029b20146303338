//! The integer grid of a group as Olive chooses it, and round to nearest on it.
//!
//! ```text
//! low = min(min(w), 0), high = max(max(w), 0); symmetric: high = max(|low|, high), low = -high
//! low = high = 0: -1, 1
//! scale = (high - low) / (2^bits - 1)
//! zero  = symmetric ? 2^(bits-1) : clamp(round(-low / scale), 0, 2^bits - 1)
//! q     = clamp(round(w / scale + zero), 0, 2^bits - 1)
//! ```
//!
//! Rounding is half to even. Olive computes in the type of the weight, so that every intermediate result is rounded
//! to it; [`MinMax::of_weight`] does the same and gives the same integers.
//!
//! **Deviation.** Olive mirrors the range of a symmetric group only if the group has a negative value; a group
//! without one saturates at seven fifteenths of its range there. Here it is mirrored too.

use half::{bf16, f16};
use olive_core::{DType, Error, QuantMatrix, Result};

mod rows;

pub use rows::{ChooseGrid, RoundedRows};

/// Scale and zero point of a group.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Grid {
    /// Positive; exact in the type in which it is stored.
    pub scale: f32,
    /// A whole number of the range.
    pub zero: f32,
}

/// Chooses and applies grids.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MinMax {
    /// Bits of a value: 4 or 8.
    pub bits: usize,
    /// Whether the zero point is the middle.
    pub symmetric: bool,
    /// The type in which scales are stored.
    pub scale_dtype: DType,
    /// The type to which intermediate results are rounded.
    pub arithmetic: DType,
}

impl MinMax {
    /// Arithmetic in the weight's own type, as Olive's.
    pub fn of_weight(bits: usize, symmetric: bool, dtype: DType) -> Self {
        Self {
            bits,
            symmetric,
            scale_dtype: dtype,
            arithmetic: dtype,
        }
    }

    /// Arithmetic in single precision with the scale that is stored.
    pub fn single(bits: usize, symmetric: bool, scale_dtype: DType) -> Self {
        Self {
            bits,
            symmetric,
            scale_dtype,
            arithmetic: DType::F32,
        }
    }

    /// The largest integer.
    pub fn levels(&self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// The integer that stands for zero in a symmetric grid.
    pub fn middle(&self) -> f32 {
        (1u32 << (self.bits - 1)) as f32
    }

    /// The smallest and the largest value that the grid of a group has to hold.
    pub fn range(&self, group: &[f32]) -> [f32; 2] {
        let extremes = group.iter().fold([0.0f32; 2], |[l, h], w| [l.min(*w), h.max(*w)]);
        self.whole_range(extremes)
    }

    /// The range for a group whose values are all between these two.
    fn whole_range(&self, [mut low, mut high]: [f32; 2]) -> [f32; 2] {
        if self.symmetric {
            high = high.max(-low);
            low = -high;
        }
        if low == 0.0 && high == 0.0 {
            [-1.0, 1.0]
        } else {
            [low, high]
        }
    }

    /// The grid of a group of finite values.
    pub fn grid(&self, group: &[f32]) -> Grid {
        self.grid_of(self.range(group))
    }

    /// The grid of a group whose values are all between these two, zero being one of them.
    fn grid_of(&self, extremes: [f32; 2]) -> Grid {
        let round = |value: f32| self.arithmetic.round(value);
        let [low, high] = self.whole_range(extremes);
        let scale = self.stored_scale(round(round(high - low) / self.levels()));
        let zero = match self.symmetric {
            true => self.middle(),
            false => (-round(low / scale)).round_ties_even().clamp(0.0, self.levels()),
        };
        Grid { scale, zero }
    }

    /// A scale as it is stored; the smallest positive number of that type where it would vanish.
    pub fn stored_scale(&self, scale: f32) -> f32 {
        let stored = self.scale_dtype.round(scale);
        if stored > 0.0 {
            return stored;
        }
        match self.scale_dtype {
            DType::F16 => f16::MIN_POSITIVE_SUBNORMAL.to_f32(),
            DType::BF16 => bf16::MIN_POSITIVE_SUBNORMAL.to_f32(),
            _ => f32::MIN_POSITIVE,
        }
    }

    /// The integer for `w`.
    #[inline]
    pub fn level(&self, grid: Grid, w: f32) -> f32 {
        let quotient = self.arithmetic.round(w / grid.scale);
        self.arithmetic
            .round(quotient + grid.zero)
            .round_ties_even()
            .clamp(0.0, self.levels())
    }

    /// What the integer nearest to `w` stands for.
    #[inline]
    pub fn nearest(&self, grid: Grid, w: f32) -> f32 {
        (self.level(grid, w) - grid.zero) * grid.scale
    }
}

/// Refuses sizes that do not fit and weights that are not finite.
///
/// # Errors
/// [`Error::Tensor`] or [`Error::NotFinite`] under `name`.
pub fn check_weight(name: &str, weight: &[f32], shape: [usize; 2], group_size: usize) -> Result<()> {
    let [rows, cols] = shape;
    if group_size == 0 || !cols.is_multiple_of(group_size) || weight.len() != rows * cols {
        let found = format!("groups of {group_size}, {} values", weight.len());
        return Err(Error::tensor(
            name,
            format!("groups that divide {shape:?}"),
            found,
        ));
    }
    let found = weight.iter().filter(|w| !w.is_finite()).count();
    if found > 0 {
        let what = format!("tensor `{name}`");
        return Err(Error::NotFinite { what, found });
    }
    Ok(())
}

/// Refuses scales that do not fit their type.
///
/// # Errors
/// [`Error::Tensor`] under `name`.
pub fn check_scales(name: &str, grids: &MinMax, own: &[Grid]) -> Result<()> {
    let wide = own.iter().filter(|grid| !grid.scale.is_finite()).count();
    if wide == 0 {
        return Ok(());
    }
    let expected = format!("groups whose scale fits {}", grids.scale_dtype);
    let found = format!("{wide} group(s) with a wider range");
    Err(Error::tensor(name, expected, found))
}

/// The matrix of these integers and grids.
///
/// # Errors
/// [`Error::Tensor`] under `name` if a scale does not fit its type or the sizes do not fit.
pub fn assemble(
    name: &str,
    grids: &MinMax,
    (shape, group_size): ([usize; 2], usize),
    values: &[u8],
    own: &[Grid],
) -> Result<QuantMatrix> {
    check_scales(name, grids, own)?;
    let scales = own.iter().map(|grid| grid.scale).collect();
    let zeros: Option<Vec<u8>> = (!grids.symmetric).then(|| own.iter().map(|grid| grid.zero as u8).collect());
    let scales = (scales, grids.scale_dtype);
    QuantMatrix::pack(shape, grids.bits, group_size, values, scales, zeros.as_deref())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(n: u32, seed: u32) -> Vec<f32> {
        let noise =
            |i: u32| (i.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 0.9;
        (0..n).map(|i| DType::BF16.round(noise(i))).collect()
    }

    #[test]
    fn values_are_within_half_a_step() {
        for bits in [4, 8] {
            for symmetric in [false, true] {
                let grids = MinMax::single(bits, symmetric, DType::F32);
                for seed in 0..20 {
                    let w = group(32, seed);
                    let grid = grids.grid(&w);
                    let limit = grid.scale * 0.5 + 1e-6;
                    assert!(w.iter().all(|w| (grids.nearest(grid, *w) - w).abs() <= limit));
                }
            }
        }
    }

    #[test]
    fn one_sided_symmetric_groups_do_not_saturate() {
        let w: Vec<f32> = (0..64).map(|i| 0.1 + i as f32 / 64.0).collect();
        let grids = MinMax::of_weight(4, true, DType::F32);
        let grid = grids.grid(&w);
        assert!(
            w.iter()
                .all(|w| (grids.nearest(grid, *w) - w).abs() <= grid.scale * 0.51)
        );
    }

    #[test]
    fn groups_of_zeros_stay_zero_and_tiny_ones_finite() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let grids = MinMax::of_weight(4, false, dtype);
            assert_eq!(grids.nearest(grids.grid(&[0.0; 16]), 0.0), 0.0);
            let tiny = [1e-40f32, -1e-40];
            let grid = grids.grid(&tiny);
            assert!(grid.scale > 0.0 && grids.nearest(grid, tiny[0]).is_finite());
        }
    }

    #[test]
    fn scales_that_do_not_fit_are_refused_by_name() {
        let grids = MinMax::of_weight(4, false, DType::F16);
        let grid = grids.grid(&[1e6; 16]);
        let error = assemble("layer.w", &grids, ([1, 16], 16), &[0; 16], &[grid]).unwrap_err();
        assert!(error.to_string().contains("`layer.w`"));
        assert!(check_weight("w", &[f32::NAN; 16], [1, 16], 16).is_err());
        assert!(check_weight("w", &[0.0; 24], [1, 24], 16).is_err());
    }
}
