//! Rounding whole rows: the formulas of the parent in loops without branches, which become vector code.

use olive_core::DType;
use olive_core::kernels::wide;

use super::{Grid, MinMax};

/// Values that a loop works on together.
const LANES: usize = 16;
/// Adding it rounds a float of a magnitude below 2^22 half to even, and leaves the integer in the low bits.
const ROUNDER: f32 = 12_582_912.0;

/// Gives a group its grid.
pub type ChooseGrid<'a> = dyn Fn(&[f32]) -> Grid + Sync + 'a;

/// Some rows of a rounded weight.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RoundedRows {
    /// The integers, `[rows, cols]`.
    pub levels: Vec<u8>,
    /// Grids, `[rows, groups]`.
    pub grids: Vec<Grid>,
    /// Sums of the squares of the error, and of the weight.
    pub squares: [f64; 2],
}

impl MinMax {
    /// Rounds finite `weight [rows, cols]` on the grids that `choose` gives to its groups, or else on those of
    /// [`MinMax::grid`].
    ///
    /// # Panics
    /// If the weight is no whole number of groups.
    pub fn round_rows(
        &self,
        weight: &[f32],
        group_size: usize,
        choose: Option<&ChooseGrid<'_>>,
        into: &mut RoundedRows,
    ) {
        assert!(weight.len().is_multiple_of(group_size), "invariant: whole groups");
        into.grids.clear();
        match choose {
            Some(choose) => into.grids.extend(weight.chunks_exact(group_size).map(choose)),
            None => {
                let mut ranges = vec![[0.0; 2]; weight.len() / group_size];
                wide(fill_ranges, (weight, group_size, ranges.as_mut_slice()));
                into.grids
                    .extend(ranges.into_iter().map(|range| self.grid_of(range)));
            }
        }
        into.levels.resize(weight.len(), 0);
        let (grids, levels) = (into.grids.as_slice(), into.levels.as_mut_slice());
        let arguments = (weight, group_size, grids, self.levels(), levels);
        into.squares = match self.arithmetic {
            DType::F16 => wide(fill_levels::<Half>, arguments),
            DType::BF16 => wide(fill_levels::<Brain>, arguments),
            _ => wide(fill_levels::<Single>, arguments),
        };
    }
}

/// The smallest and the largest value of every group, with zero.
#[inline(always)]
fn fill_ranges(weight: &[f32], group_size: usize, ranges: &mut [[f32; 2]]) {
    let lesser = |a: f32, b: f32| if b < a { b } else { a };
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    for (range, group) in ranges.iter_mut().zip(weight.chunks_exact(group_size)) {
        let (mut low, mut high) = ([0.0f32; LANES], [0.0f32; LANES]);
        let (chunks, rest) = group.as_chunks::<LANES>();
        for chunk in chunks {
            for i in 0..LANES {
                low[i] = lesser(low[i], chunk[i]);
                high[i] = greater(high[i], chunk[i]);
            }
        }
        let mut found = [0.0f32; 2];
        for (low, high) in low.into_iter().zip(high).chain(rest.iter().map(|w| (*w, *w))) {
            found = [lesser(found[0], low), greater(found[1], high)];
        }
        *range = found;
    }
}

/// Fills `levels`; the sums of [`RoundedRows::squares`].
#[inline(always)]
fn fill_levels<A: Arithmetic>(
    weight: &[f32],
    group_size: usize,
    grids: &[Grid],
    most: f32,
    levels: &mut [u8],
) -> [f64; 2] {
    // The level and the square of the error of a value.
    let round = |grid: Grid, w: f32| {
        let exact = A::round(A::round(w / grid.scale) + grid.zero);
        // Within whole limits it is the same to clamp before rounding.
        let exact = if exact > 0.0 { exact } else { 0.0 };
        let exact = if exact < most { exact } else { most };
        let shifted = exact + ROUNDER;
        let error = ((shifted - ROUNDER) - grid.zero) * grid.scale - w;
        (shifted.to_bits() as u8, error * error)
    };
    let mut sums = [0.0; 2];
    let groups = weight
        .chunks_exact(group_size)
        .zip(levels.chunks_exact_mut(group_size));
    for ((group, levels), grid) in groups.zip(grids) {
        let (mut error, mut whole) = ([0.0f32; LANES], [0.0f32; LANES]);
        let (chunks, rest) = group.as_chunks::<LANES>();
        let (own, last) = levels.as_chunks_mut::<LANES>();
        for (levels, chunk) in own.iter_mut().zip(chunks) {
            for i in 0..LANES {
                let (level, square) = round(*grid, chunk[i]);
                levels[i] = level;
                error[i] += square;
                whole[i] += chunk[i] * chunk[i];
            }
        }
        for ((level, w), i) in last.iter_mut().zip(rest).zip(0..) {
            let square;
            (*level, square) = round(*grid, *w);
            error[i] += square;
            whole[i] += w * w;
        }
        sums[0] += error.iter().map(|own| f64::from(*own)).sum::<f64>();
        sums[1] += whole.iter().map(|own| f64::from(*own)).sum::<f64>();
    }
    sums
}

/// What [`DType::round`] does to finite values, without branches.
trait Arithmetic {
    fn round(value: f32) -> f32;
}

struct Single;
struct Half;
struct Brain;

impl Arithmetic for Single {
    #[inline(always)]
    fn round(value: f32) -> f32 {
        value
    }
}

impl Arithmetic for Brain {
    #[inline(always)]
    fn round(value: f32) -> f32 {
        let bits = value.to_bits();
        f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
    }
}

impl Arithmetic for Half {
    #[inline(always)]
    fn round(value: f32) -> f32 {
        /// What is smaller has no full mantissa.
        const NORMAL: f32 = 1.0 / 16384.0;
        /// The first float that is beyond the range after its mantissa was rounded.
        const BEYOND: f32 = 65536.0;
        let magnitude = value.abs();
        let bits = magnitude.to_bits();
        let normal = f32::from_bits(bits.wrapping_add(0xfff + (bits >> 13 & 1)) & 0xffff_e000);
        let normal = if normal < BEYOND { normal } else { f32::INFINITY };
        // Floats between a half and one are as far apart as the smallest halves.
        let small = (magnitude + 0.5) - 0.5;
        (if magnitude < NORMAL { small } else { normal }).copysign(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_without_branches_is_that_of_the_type() {
        // Every exponent, with mantissas around the ties of both types.
        let mantissas = [
            0u32, 1, 0xfff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x3001, 0x7fff, 0x8000, 0x8001, 0x1_8000,
        ];
        for high in (0..0x7f80).step_by(3) {
            for low in mantissas {
                for sign in [0, 1 << 31] {
                    let value = f32::from_bits(((high << 16) + low) | sign);
                    if !value.is_finite() {
                        continue;
                    }
                    let found = [Half::round(value), Brain::round(value), Single::round(value)];
                    let wanted = [DType::F16, DType::BF16, DType::F32].map(|dtype| dtype.round(value));
                    assert_eq!(found.map(f32::to_bits), wanted.map(f32::to_bits), "{value:e}");
                }
            }
        }
    }

    #[test]
    fn rows_are_rounded_as_value_by_value() {
        let noise = |i: u32| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 0.9;
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (bits, symmetric, group_size) in
                [(4, false, 32), (4, true, 24), (8, false, 16), (8, true, 40)]
            {
                let weight: Vec<f32> = (0..group_size as u32 * 64)
                    .map(|i| dtype.round(noise(i) * 0.01f32.powi((i / 640 % 4) as i32)))
                    .collect();
                let grids = MinMax::of_weight(bits, symmetric, dtype);
                let mut rows = RoundedRows::default();
                grids.round_rows(&weight, group_size, None, &mut rows);
                let mut squares = [0.0f64; 2];
                for ((group, levels), grid) in weight
                    .chunks(group_size)
                    .zip(rows.levels.chunks(group_size))
                    .zip(&rows.grids)
                {
                    assert_eq!(*grid, grids.grid(group));
                    for (w, level) in group.iter().zip(levels) {
                        assert_eq!(f32::from(*level), grids.level(*grid, *w));
                        squares[0] += f64::from(grids.nearest(*grid, *w) - w).powi(2);
                        squares[1] += f64::from(*w).powi(2);
                    }
                }
                for (found, wanted) in rows.squares.iter().zip(squares) {
                    assert!(
                        (found - wanted).abs() <= 1e-6 * wanted,
                        "{dtype} {bits}: {found} {wanted}"
                    );
                }
            }
        }
    }
}
