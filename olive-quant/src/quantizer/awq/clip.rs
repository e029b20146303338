//! Clipping: the largest magnitude of each group that gives the least squared error of the group's share of the
//! output, among ten shrinks of the group's own.
//!
//! `m = max|w| · (1 - i / 20)` for `i` in `0..10`; `err = dᵀ H_g d` with `d = Q(clamp(w, -m, m)) - w`, which is the
//! summed squared difference of the group's share over all tokens. The first of equals wins.

use rayon::prelude::*;

use super::statistics::GroupGrams;
use crate::kernels::{View, product, row_dots};
use crate::quantizer::affine::Affine;

/// Shrinks that are tried, the first being none.
const STEPS: usize = 10;
/// The grid of shrinks is this fine.
const GRID: f32 = 20.0;
/// Rows that one task handles.
const ROWS: usize = 32;

/// The outcome of a clip search.
#[derive(Debug, Clone)]
pub struct Clip {
    /// The largest magnitude of each group, `[rows, groups]`.
    pub limits: Vec<f32>,
    /// Which shrink was chosen, `[rows, groups]`.
    pub steps: Vec<u8>,
    /// Summed error without clipping.
    pub before: f64,
    /// Summed error with it.
    pub after: f64,
}

/// Searches the clips of `weight [rows, cols]`.
pub fn search(weight: &[f32], cols: usize, grams: &GroupGrams, affine: &Affine) -> Clip {
    let (rows, groups) = (weight.len() / cols, cols / grams.group_size);
    let mut clip = Clip {
        limits: vec![0.0; rows * groups],
        steps: vec![0; rows * groups],
        before: 0.0,
        after: 0.0,
    };
    let errors: Vec<(f64, f64)> = clip
        .limits
        .par_chunks_mut(ROWS * groups)
        .zip(clip.steps.par_chunks_mut(ROWS * groups))
        .zip(weight.par_chunks(ROWS * cols))
        .map(|((limits, steps), weight)| search_rows(weight, cols, grams, affine, (limits, steps)))
        .collect();
    // Summed in the order of the rows, whoever computed them.
    for (before, after) in errors {
        clip.before += before;
        clip.after += after;
    }
    clip
}

fn search_rows(
    weight: &[f32],
    cols: usize,
    grams: &GroupGrams,
    affine: &Affine,
    (limits, steps): (&mut [f32], &mut [u8]),
) -> (f64, f64) {
    let size = grams.group_size;
    let (rows, groups) = (weight.len() / cols, cols / size);
    let mut deltas = vec![0.0f32; rows * STEPS * size];
    let mut products = vec![0.0f32; rows * STEPS * size];
    let (mut before, mut after) = (0.0, 0.0);
    for (index, gram) in grams.blocks.chunks_exact(size * size).enumerate() {
        for (row, deltas) in deltas.chunks_exact_mut(STEPS * size).enumerate() {
            let group = &weight[row * cols + index * size..][..size];
            fill_deltas(group, deltas, affine);
        }
        product(
            &mut products,
            size,
            false,
            View::new(&deltas, [rows * STEPS, size], size),
            View::new(gram, [size, size], size),
        );
        let mut errors = row_dots(&products, &deltas, size);
        for row in 0..rows {
            let group = &weight[row * cols + index * size..][..size];
            let mut best = (0, f64::INFINITY);
            for step in 0..STEPS {
                let error = errors.next().unwrap_or(f64::INFINITY);
                if step == 0 {
                    before += error;
                }
                if error < best.1 {
                    best = (step, error);
                }
            }
            after += best.1;
            limits[row * groups + index] = limit(group, best.0, affine);
            steps[row * groups + index] = best.0 as u8;
        }
    }
    (before, after)
}

/// The largest magnitude that shrink `step` leaves.
fn limit(group: &[f32], step: usize, affine: &Affine) -> f32 {
    let largest = group.iter().fold(0.0f32, |largest, w| largest.max(w.abs()));
    affine.round(largest * (1.0 - step as f32 / GRID))
}

/// `Q(clamp(w)) - w` for every shrink, one after the other.
fn fill_deltas(group: &[f32], deltas: &mut [f32], affine: &Affine) {
    let (low, high) = group.iter().fold((0.0f32, 0.0f32), |(low, high), w| (low.min(*w), high.max(*w)));
    for (step, deltas) in deltas.chunks_exact_mut(group.len()).enumerate() {
        let most = limit(group, step, affine);
        let grid = affine.grid_of_range(low.max(-most), high.min(most));
        for (delta, w) in deltas.iter_mut().zip(group) {
            *delta = affine.nearest(grid, w.clamp(-most, most)) - w;
        }
    }
}

/// Clamps `weight [rows, cols]` to `limits [rows, groups]`.
pub fn apply(weight: &mut [f32], cols: usize, limits: &[f32]) {
    let groups = limits.len() * cols / weight.len().max(1);
    let group_size = cols / groups.max(1);
    for (group, most) in weight.chunks_exact_mut(group_size).zip(limits) {
        for w in group {
            *w = w.clamp(-most, *most);
        }
    }
}
