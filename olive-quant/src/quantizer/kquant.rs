//! The weighted least-squares search for scales and zero points of llama.cpp's k-quants
//! (<https://github.com/ggml-org/llama.cpp/pull/1684>), in the variant of Olive's `KQuant`.
//!
//! Each value weighs `sqrt(mean(x²)) + |x|`. Candidate grids are narrower or wider than the range of the group; for
//! each, the integers are rounded, and scale and offset follow by weighted least squares. The candidate with the
//! smallest weighted square error wins; the unchanged range is the first.
//!
//! ```text
//! asymmetric: q = clamp(round(f / (high - low) * (x - low)), 0, n), f = n, then n - 1 + 0.1 i for i in 0..20
//!             (scale, offset) = least squares of x on q;  zero = clamp(round(-offset / scale), 0, n)
//! symmetric:  q = clamp(round(f / max|x| * x), -2^(b-1), m), m = 2^(b-1) - 1, f = m, then m + 0.1 i, 0 < |i| < 10
//!             scale = Σ w q x / Σ w q²
//! ```
//!
//! The integers that are stored are those of the final, rounded scale and zero point. Sums are taken in double
//! precision, Olive's in single: of two candidates that are as good the other may win.
//!
//! Candidates are compared by the error of the fitted line, as in Olive. An asymmetric line whose offset is no whole
//! number of steps loses some of its advantage, or all of it, once its zero point is rounded.

use super::minmax::{Grid, MinMax};

const ASYMMETRIC_STEPS: i32 = 20;
const STEP: f64 = 0.1;
/// Adding and subtracting it rounds a magnitude below 2^51 half to even.
const ROUNDER: f64 = 6_755_399_441_055_744.0;

/// The best grid of a group.
pub fn grid(group: &[f32], grids: &MinMax) -> Grid {
    let search = Search::new(group, grids);
    let n = f64::from(grids.levels());
    let best = match grids.symmetric {
        true => {
            let middle = f64::from(grids.middle());
            let largest = f64::from(group.iter().fold(0.0f32, |most, x| most.max(x.abs())));
            let largest = if largest == 0.0 { 1.0 } else { largest };
            let top = middle - 1.0;
            let steps = (-9..10).filter(|i| *i != 0).map(|i| top + STEP * f64::from(i));
            search.best([0.0, largest], [-middle, top], top, steps)
        }
        false => {
            let range = grids.range(group).map(f64::from);
            let steps = (0..ASYMMETRIC_STEPS).map(|i| n - 1.0 + STEP * f64::from(i));
            search.best(range, [0.0, n], n, steps)
        }
    };
    let zero = match grids.symmetric {
        true => grids.middle(),
        false => (-best.offset / best.scale).round_ties_even().clamp(0.0, n) as f32,
    };
    Grid {
        scale: grids.stored_scale(best.scale as f32),
        zero,
    }
}

#[derive(Clone, Copy)]
struct Line {
    scale: f64,
    offset: f64,
}

struct Search<'a> {
    group: &'a [f32],
    weights: Vec<f64>,
    symmetric: bool,
}

impl<'a> Search<'a> {
    fn new(group: &'a [f32], grids: &MinMax) -> Self {
        let squares: f64 = group.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        let mean = (squares / group.len() as f64).sqrt();
        Self {
            group,
            weights: group.iter().map(|x| mean + f64::from(x.abs())).collect(),
            symmetric: grids.symmetric,
        }
    }

    /// The best line among the plain one of factor `first` and the fitted ones of `factors`.
    fn best(
        &self,
        [low, high]: [f64; 2],
        limits: [f64; 2],
        first: f64,
        factors: impl Iterator<Item = f64>,
    ) -> Line {
        let span = high - low;
        let mut levels = vec![0.0; self.group.len()];
        self.levels(first / span, low, limits, &mut levels);
        let mut best = Line {
            scale: span / first,
            offset: low,
        };
        let mut least = self.error(best, &levels);
        for factor in factors {
            self.levels(factor / span, low, limits, &mut levels);
            let Some(line) = self.fit(&levels) else { continue };
            let error = self.error(line, &levels);
            if error < least {
                (best, least) = (line, error);
            }
        }
        best
    }

    fn levels(&self, inverse: f64, low: f64, [least, most]: [f64; 2], levels: &mut [f64]) {
        for (level, x) in levels.iter_mut().zip(self.group) {
            let exact = (inverse * (f64::from(*x) - low)).clamp(least, most);
            *level = (exact + ROUNDER) - ROUNDER;
        }
    }

    /// Weighted least squares of the group on its levels; `None` if they do not determine a rising line.
    fn fit(&self, levels: &[f64]) -> Option<Line> {
        let [mut w, mut wx, mut wq, mut wqq, mut wqx] = [0.0f64; 5];
        for ((weight, x), q) in self.weights.iter().zip(self.group).zip(levels) {
            let x = f64::from(*x);
            w += weight;
            wx += weight * x;
            wq += weight * q;
            wqq += weight * q * q;
            wqx += weight * q * x;
        }
        let line = match self.symmetric {
            true => Line {
                scale: wqx / wqq,
                offset: 0.0,
            },
            false => {
                let determinant = w * wqq - wq * wq;
                if determinant <= 0.0 {
                    return None;
                }
                Line {
                    scale: (w * wqx - wx * wq) / determinant,
                    offset: (wqq * wx - wq * wqx) / determinant,
                }
            }
        };
        (line.scale.is_finite() && line.scale > 0.0).then_some(line)
    }

    fn error(&self, line: Line, levels: &[f64]) -> f64 {
        let terms = self.weights.iter().zip(self.group).zip(levels);
        terms
            .map(|((weight, x), q)| weight * (line.scale * q + line.offset - f64::from(*x)).powi(2))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use olive_core::DType;
    use proptest::prelude::*;

    /// Sums of uniform numbers: bell-shaped, as weights are.
    fn weights(n: u32, seed: u32) -> Vec<f32> {
        let uniform = |i: u32| (i.wrapping_mul(2_654_435_761).rotate_left(9) >> 8) as f32 / 8_388_608.0 - 1.0;
        let bell = |i: u32| {
            (0..6)
                .map(|k| uniform((i + seed).wrapping_mul(7) + k))
                .sum::<f32>()
                * 0.02
        };
        (0..n).map(bell).collect()
    }

    fn weighted_error(group: &[f32], value: impl Fn(f32) -> f64) -> f64 {
        let mean = (group.iter().map(|x| f64::from(x * x)).sum::<f64>() / group.len() as f64).sqrt();
        let error = |x: f32| (value(x) - f64::from(x)).powi(2) * (mean + f64::from(x.abs()));
        group.iter().map(|x| error(*x)).sum()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_search_lowers_the_error_of_the_range(seed in 0u32..1_000_000, wide in any::<bool>()) {
            let grids = MinMax::single(if wide { 8 } else { 4 }, true, DType::F32);
            let (mut searched, mut plain) = (0.0, 0.0);
            for group in weights(2048, seed).chunks_exact(32) {
                let error = |grid| weighted_error(group, |x| f64::from(grids.nearest(grid, x)));
                searched += error(grid(group, &grids));
                plain += error(grids.grid(group));
            }
            prop_assert!(searched < plain, "{searched} {plain}");
        }

        #[test]
        fn the_line_is_never_worse_than_the_range(seed in 0u32..1_000_000, wide in any::<bool>()) {
            let grids = MinMax::single(if wide { 8 } else { 4 }, false, DType::F32);
            let n = f64::from(grids.levels());
            for group in weights(512, seed).chunks_exact(32) {
                let range = grids.range(group).map(f64::from);
                let search = Search::new(group, &grids);
                let steps = (0..ASYMMETRIC_STEPS).map(|i| n - 1.0 + STEP * f64::from(i));
                let best = search.best(range, [0.0, n], n, steps);
                let [low, high] = range;
                let plain = Line { scale: (high - low) / n, offset: low };
                let error = |line: Line| weighted_error(group, |x| {
                    let level = ((f64::from(x) - line.offset) / line.scale).round().clamp(0.0, n);
                    line.scale * level + line.offset
                });
                prop_assert!(error(best) <= error(plain) * (1.0 + 1e-9));
            }
        }
    }

    #[test]
    fn constant_and_zero_groups_are_kept() {
        for symmetric in [false, true] {
            let grids = MinMax::single(4, symmetric, DType::F32);
            for value in [0.0f32, 0.25, -3.0] {
                let group = [value; 32];
                let found = grids.nearest(grid(&group, &grids), value);
                assert!(
                    (found - value).abs() <= value.abs() * 0.04,
                    "{value} became {found}"
                );
            }
        }
    }
}
