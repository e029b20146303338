//! The asymmetric integer grid of a group, as AutoAWQ chooses it.
//!
//! ```text
//! scale = max(max(w) - min(w), 1e-5) / (2^bits - 1)
//! zero  = clamp(-round(min(w) / scale), 0, 2^bits - 1)
//! q     = clamp(round(w / scale) + zero, 0, 2^bits - 1)
//! w'    = (q - zero) * scale
//! ```
//!
//! Rounding is half to even. The scale is rounded to half precision before it is used, because that is the scale the
//! layout stores.
//!
//! **Deviation.** The range of a group that lies on one side of zero is extended to zero: clamping the zero point
//! would otherwise saturate most of the group (a constant group would become 1e-5). Groups with both signs, which
//! is all but a few, are not affected.

use half::f16;

/// The smallest range of a group.
const MIN_RANGE: f32 = 1e-5;
/// Values that are compared side by side.
const LANES: usize = 16;
/// Adding and subtracting it rounds a magnitude below 2^22 half to even.
const ROUNDER: f32 = 12_582_912.0;
/// Quotients beyond it end up clamped anyway; within it [`ROUNDER`] is exact.
const MAX_QUOTIENT: f32 = 1_048_576.0;

/// In which precision intermediate results are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arithmetic {
    /// Single precision, with the half-precision scale that is stored.
    Single,
    /// Every intermediate result rounded to half precision, as AutoAWQ computes.
    Half,
}

impl Arithmetic {
    #[inline(always)]
    fn round(self, value: f32) -> f32 {
        match self {
            Self::Single => value,
            Self::Half => f16::from_f32(value).to_f32(),
        }
    }
}

/// Scale and zero point of a group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grid {
    /// Exact in half precision; infinite if it does not fit.
    pub scale: f32,
    /// A whole number in `0..=levels`.
    pub zero: f32,
}

/// Rounds half to even; `|value|` is clamped to 2^20.
#[inline(always)]
fn round_even(value: f32) -> f32 {
    (value.clamp(-MAX_QUOTIENT, MAX_QUOTIENT) + ROUNDER) - ROUNDER
}

/// Chooses and applies grids of `bits` bits.
#[derive(Debug, Clone, Copy)]
pub struct Affine {
    levels: f32,
    arithmetic: Arithmetic,
}

impl Affine {
    /// Grids of `bits` bits.
    pub fn new(bits: usize, arithmetic: Arithmetic) -> Self {
        Self {
            levels: ((1u32 << bits) - 1) as f32,
            arithmetic,
        }
    }

    /// `value` in the precision of intermediate results.
    #[inline(always)]
    pub fn round(&self, value: f32) -> f32 {
        self.arithmetic.round(value)
    }

    /// The grid of a group. Not finite if the group is not.
    #[inline(always)]
    pub fn grid(&self, group: &[f32]) -> Grid {
        // Side by side, so that the loop becomes vector code; the smallest and largest do not depend on the order.
        let (mut lows, mut highs) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
        let (chunks, rest) = group.as_chunks::<LANES>();
        for chunk in chunks {
            for ((low, high), w) in lows.iter_mut().zip(&mut highs).zip(chunk) {
                *low = if *w < *low { *w } else { *low };
                *high = if *w > *high { *w } else { *high };
            }
        }
        let (mut low, mut high) = (f32::INFINITY, f32::NEG_INFINITY);
        for w in lows.iter().chain(rest) {
            low = if *w < low { *w } else { low };
        }
        for w in highs.iter().chain(rest) {
            high = if *w > high { *w } else { high };
        }
        self.grid_of_range(low, high)
    }

    /// The grid of a group with this smallest and largest value.
    #[inline(always)]
    pub fn grid_of_range(&self, low: f32, high: f32) -> Grid {
        let (low, high) = (low.min(0.0), high.max(0.0));
        let range = self
            .arithmetic
            .round(high - low)
            .max(self.arithmetic.round(MIN_RANGE));
        let scale = f16::from_f32(range / self.levels).to_f32();
        let zero = (-round_even(self.arithmetic.round(low / scale))).clamp(0.0, self.levels);
        Grid { scale, zero }
    }

    /// The integer nearest to `w`, in `0..=levels`.
    #[inline(always)]
    pub fn level(&self, grid: Grid, w: f32) -> f32 {
        let quotient = self.arithmetic.round(w / grid.scale);
        (round_even(quotient) + grid.zero).clamp(0.0, self.levels)
    }

    /// The value of the grid nearest to `w`.
    #[inline(always)]
    pub fn nearest(&self, grid: Grid, w: f32) -> f32 {
        self.arithmetic
            .round((self.level(grid, w) - grid.zero) * grid.scale)
    }

    /// Replaces the groups of a row by their nearest values on their own grids.
    #[inline(always)]
    pub fn fake_quantize(&self, row: &mut [f32], group_size: usize) {
        for group in row.chunks_exact_mut(group_size) {
            let grid = self.grid(group);
            for w in group {
                *w = self.nearest(grid, *w);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nearest(group: &[f32]) -> Vec<f32> {
        let mut out = group.to_vec();
        Affine::new(4, Arithmetic::Single).fake_quantize(&mut out, group.len());
        out
    }

    #[test]
    fn both_signs_follow_the_formula_in_double_precision() {
        let group: Vec<f32> = (0..128).map(|i| ((i * 37 % 101) as f32 - 40.0) / 17.0).collect();
        let (low, high) = group
            .iter()
            .fold((0.0f32, 0.0f32), |(l, h), w| (l.min(*w), h.max(*w)));
        let scale = f64::from(f16::from_f32((high - low) / 15.0).to_f32());
        let zero = (-(f64::from(low) / scale).round_ties_even()).clamp(0.0, 15.0);
        for (w, got) in group.iter().zip(nearest(&group)) {
            let q = ((f64::from(*w) / scale).round_ties_even() + zero).clamp(0.0, 15.0);
            assert!((f64::from(got) - (q - zero) * scale).abs() < 1e-6, "{w}");
        }
    }

    #[test]
    fn halves_round_to_even() {
        // Scale 1, zero 4: values in between two integers go to the even one.
        let group = [-4.0, 11.0, 0.5, 1.5, 2.5, -0.5, -1.5];
        assert_eq!(nearest(&group), [-4.0, 11.0, 0.0, 2.0, 2.0, 0.0, -2.0]);
    }

    #[test]
    fn one_sided_and_constant_groups_keep_their_values() {
        for group in [
            vec![0.5f32; 32],
            vec![-3.0; 32],
            (0..32).map(|i| 5.0 + i as f32 / 100.0).collect(),
        ] {
            let largest = group.iter().fold(0.0f32, |m, w| m.max(w.abs()));
            for (w, got) in group.iter().zip(nearest(&group)) {
                assert!((w - got).abs() <= largest / 15.0 * 0.51, "{w} became {got}");
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        assert_eq!(nearest(&[0.0; 16]), [0.0; 16]);
    }

    #[test]
    fn scales_are_what_half_precision_stores() {
        let grid = Affine::new(4, Arithmetic::Single).grid(&[-0.3, 0.7123]);
        assert_eq!(f16::from_f32(grid.scale).to_f32().to_bits(), grid.scale.to_bits());
        assert!(
            Affine::new(4, Arithmetic::Single)
                .grid(&[-1e6, 1e6])
                .scale
                .is_infinite()
        );
    }
}
