//! Clipping: the largest magnitude of each group among evenly spaced shrinks of its own, down to half.
//!
//! Each group alone, as AutoAWQ does: ten shrinks `m = max|w| · (1 - i / 20)`, and of them the one with the least squared
//! error of the group's share of the output, `dᵀ H_gg d` with `d = Q(clamp(w, -m, m)) - w`; the first of equals wins.
//!
//! Jointly: because the shares of a row's groups add up to one output and their errors may cancel, shrinks half as far
//! apart, chosen as before and then in a few rounds over the groups of a row, each group taking the shrink with the
//! least error of the whole row given the others, `d_gᵀ H_gg d_g + 2 d_gᵀ Σ H_gh d_h`. No round raises the row's error.

use olive_core::kernels::{Packed, View, product, product_packed, row_dots, wide};
use rayon::prelude::*;

use crate::quantizer::affine::Affine;

/// Rows that one task handles.
const ROWS: usize = 32;
/// Rounds over the groups of a row.
const ROUNDS: usize = 4;

/// The outcome of a clip search.
#[derive(Debug, Clone)]
pub struct Clip {
    /// The largest magnitude of each group, `[rows, groups]`.
    pub limits: Vec<f32>,
    /// Which shrink was chosen, `[rows, groups]`.
    pub steps: Vec<u8>,
    /// Summed squared error of the outputs without clipping.
    pub before: f64,
    /// Summed squared error of the outputs with it.
    pub after: f64,
}

/// A clip search over rows of `cols` inputs in groups of `group_size`.
#[derive(Debug, Clone, Copy)]
pub struct ClipSearch<'a> {
    /// Inputs of a row.
    pub cols: usize,
    /// Inputs of a group.
    pub group_size: usize,
    /// `H [cols, cols]` of the input as the weight will see it.
    pub gram: &'a [f32],
    /// What rounds.
    pub affine: Affine,
    /// Whether groups are judged together after they were judged alone.
    pub jointly: bool,
}

impl ClipSearch<'_> {
    /// Shrinks that are tried, the first being none; the last leaves a little more than half.
    fn steps(&self) -> usize {
        if self.jointly { 20 } else { 10 }
    }

    /// Searches the clips of `weight [rows, cols]`.
    pub fn run(&self, weight: &[f32]) -> Clip {
        let groups = self.cols / self.group_size;
        let count = weight.len() / self.cols * groups;
        let mut clip = Clip {
            limits: vec![0.0; count],
            steps: vec![0; count],
            before: 0.0,
            after: 0.0,
        };
        let gram = GroupGram::new(self);
        let errors: Vec<(f64, f64)> = clip
            .limits
            .par_chunks_mut(ROWS * groups)
            .zip(clip.steps.par_chunks_mut(ROWS * groups))
            .zip(weight.par_chunks(ROWS * self.cols))
            .map(|((limits, steps), weight)| self.rows(&gram, weight, limits, steps))
            .collect();
        // Summed in the order of the rows, whoever computed them.
        for (before, after) in errors {
            clip.before += before;
            clip.after += after;
        }
        clip
    }

    fn rows(&self, gram: &GroupGram, weight: &[f32], limits: &mut [f32], steps: &mut [u8]) -> (f64, f64) {
        let (cols, size) = (self.cols, self.group_size);
        let (rows, groups, n_steps) = (weight.len() / cols, cols / size, self.steps());
        // [groups, rows, steps, size] and their own errors [groups, rows, steps].
        let mut deltas = vec![0.0f32; groups * rows * n_steps * size];
        let mut own = Vec::with_capacity(groups * rows * n_steps);
        let mut products = vec![0.0f32; rows * n_steps * size];
        for (group, deltas) in deltas.chunks_exact_mut(rows * n_steps * size).enumerate() {
            for (row, deltas) in deltas.chunks_exact_mut(n_steps * size).enumerate() {
                let values = &weight[row * cols + group * size..][..size];
                wide(ClipSearch::fill_deltas, (self, values, deltas));
            }
            let all = View::new(deltas, [rows * n_steps, size], size);
            product_packed(&mut products, size, false, 1.0, all, &gram.own[group]);
            own.extend(row_dots(&products, deltas, size));
        }
        let mut chosen = vec![0; groups * rows];
        let mut state = RowErrors::new(self, rows, &deltas, &chosen);
        let before = state.total();
        for (chosen, own) in chosen.iter_mut().zip(own.chunks_exact(n_steps)) {
            *chosen = first_least(own.iter().copied());
        }
        state = RowErrors::new(self, rows, &deltas, &chosen);
        for _ in 0..if self.jointly { ROUNDS } else { 0 } {
            for group in 0..groups {
                state.improve((self, gram), group, &deltas, &own, &mut chosen);
            }
        }
        let after = state.total();
        for row in 0..rows {
            for group in 0..groups {
                let step = chosen[group * rows + row];
                let values = &weight[row * cols + group * size..][..size];
                limits[row * groups + group] = self.limit(values, step);
                steps[row * groups + group] = step as u8;
            }
        }
        (before, after)
    }

    /// The largest magnitude that shrink `step` leaves.
    fn limit(&self, group: &[f32], step: usize) -> f32 {
        let largest = group.iter().fold(0.0f32, |largest, w| largest.max(w.abs()));
        self.affine
            .round(largest * (1.0 - step as f32 / (2 * self.steps()) as f32))
    }

    /// `Q(clamp(w)) - w` for every shrink, one after the other.
    #[inline(always)]
    fn fill_deltas(&self, group: &[f32], deltas: &mut [f32]) {
        let (low, high) = group
            .iter()
            .fold((0.0f32, 0.0f32), |(low, high), w| (low.min(*w), high.max(*w)));
        for (step, deltas) in deltas.chunks_exact_mut(group.len()).enumerate() {
            let most = self.limit(group, step);
            let grid = self.affine.grid_of_range(low.max(-most), high.min(most));
            for (delta, w) in deltas.iter_mut().zip(group) {
                *delta = self.affine.nearest(grid, w.clamp(-most, most)) - w;
            }
        }
    }
}

impl ClipSearch<'_> {
    /// The error of group-and-row `index` with shrink `step`.
    fn at<'d>(&self, deltas: &'d [f32], index: usize, step: usize) -> &'d [f32] {
        &deltas[(index * self.steps() + step) * self.group_size..][..self.group_size]
    }
}

/// The index of the least value; the first of equals.
fn first_least(values: impl Iterator<Item = f64>) -> usize {
    let mut best = (0, f64::INFINITY);
    for (index, value) in values.enumerate() {
        if value < best.1 {
            best = (index, value);
        }
    }
    best.0
}

/// The error of some rows with a shrink chosen for each group, and its product with `H`.
struct RowErrors {
    rows: usize,
    cols: usize,
    /// `D [rows, cols]`.
    delta: Vec<f32>,
    /// `D H [rows, cols]`.
    product: Vec<f32>,
}

impl RowErrors {
    fn new(search: &ClipSearch<'_>, rows: usize, deltas: &[f32], chosen: &[usize]) -> Self {
        let (cols, size) = (search.cols, search.group_size);
        let mut delta = vec![0.0; rows * cols];
        for (index, step) in chosen.iter().enumerate() {
            let (group, row) = (index / rows, index % rows);
            delta[row * cols + group * size..][..size].copy_from_slice(search.at(deltas, index, *step));
        }
        let mut state = Self {
            rows,
            cols,
            product: vec![0.0; rows * cols],
            delta,
        };
        let gram = View::new(search.gram, [cols, cols], cols);
        product(
            &mut state.product,
            cols,
            false,
            1.0,
            View::new(&state.delta, [rows, cols], cols),
            gram,
        );
        state
    }

    /// `tr(D H Dᵀ)`.
    fn total(&self) -> f64 {
        row_dots(&self.product, &self.delta, self.cols).sum()
    }

    /// Chooses the shrink of `group` anew in every row, the other groups being as they are.
    fn improve(
        &mut self,
        (search, gram): (&ClipSearch<'_>, &GroupGram),
        group: usize,
        deltas: &[f32],
        own: &[f64],
        chosen: &mut [usize],
    ) {
        let (rows, cols, size) = (self.rows, self.cols, search.group_size);
        let first = group * size;
        // What the other groups contribute: (D H) without this group's own share.
        let mut share = vec![0.0; rows * size];
        let delta = View::new(&self.delta[first..], [rows, size], cols);
        product_packed(&mut share, size, false, 1.0, delta, &gram.own[group]);
        let (mut changed, mut changes) = (Vec::new(), Vec::new());
        let mut others = vec![0.0f32; size];
        for row in 0..rows {
            let index = group * rows + row;
            let all = &self.product[row * cols + first..][..size];
            for (other, (all, own)) in others.iter_mut().zip(all.iter().zip(&share[row * size..])) {
                *other = all - own;
            }
            let n_steps = search.steps();
            let errors = (0..n_steps).map(|step| {
                let cross: f64 = row_dots(search.at(deltas, index, step), &others, size).sum();
                own[index * n_steps + step] + 2.0 * cross
            });
            let step = first_least(errors);
            if step == chosen[index] {
                continue;
            }
            let new = search.at(deltas, index, step);
            let old = search.at(deltas, index, chosen[index]);
            changed.push(row);
            changes.extend(new.iter().zip(old).map(|(new, old)| new - old));
            self.delta[row * cols + first..][..size].copy_from_slice(new);
            chosen[index] = step;
        }
        let mut moved = vec![0.0f32; changed.len() * cols];
        let changes = View::new(&changes, [changed.len(), size], size);
        product_packed(&mut moved, cols, false, 1.0, changes, &gram.rows[group]);
        for (row, moved) in changed.into_iter().zip(moved.chunks_exact(cols)) {
            for (product, moved) in self.product[row * cols..][..cols].iter_mut().zip(moved) {
                *product += moved;
            }
        }
    }
}

/// The Gram matrix as the groups of a row need it.
struct GroupGram {
    /// `H_gg` of each group.
    own: Vec<Packed>,
    /// The rows of each group, `[group size, cols]`, where groups are judged together.
    rows: Vec<Packed>,
}

impl GroupGram {
    fn new(search: &ClipSearch<'_>) -> Self {
        let (cols, size) = (search.cols, search.group_size);
        let groups = 0..cols / size;
        let own = |group: usize| View::new(&search.gram[group * size * (cols + 1)..], [size, size], cols);
        let rows = |group: usize| View::new(&search.gram[group * size * cols..], [size, cols], cols);
        Self {
            own: groups.clone().map(|group| Packed::new(own(group))).collect(),
            rows: match search.jointly {
                true => groups.map(|group| Packed::new(rows(group))).collect(),
                false => Vec::new(),
            },
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantizer::affine::Arithmetic;
    use crate::quantizer::awq::statistics::InputStatistics;

    fn values(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32)
            .map(|i| {
                ((i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 8_388_608.0 - 1.0).powi(3)
            })
            .collect()
    }

    /// Squared error of the outputs over the tokens, plainly.
    fn token_error(x: &[f32], weight: &[f32], rounded: &[f32], cols: usize) -> f64 {
        let mut sum = 0.0;
        for x in x.chunks_exact(cols) {
            for (w, q) in weight.chunks_exact(cols).zip(rounded.chunks_exact(cols)) {
                let terms = x.iter().zip(w.iter().zip(q));
                let y: f64 = terms
                    .map(|(x, (w, q))| f64::from(*x) * (f64::from(*q) - f64::from(*w)))
                    .sum();
                sum += y * y;
            }
        }
        sum
    }

    #[test]
    fn errors_are_those_over_the_tokens_and_judging_jointly_lowers_them() {
        let (rows, cols, group_size, tokens) = (40, 96, 32, 300);
        let (x, weight) = (values(tokens * cols, 5), values(rows * cols, 9));
        let mut statistics = InputStatistics::new(cols);
        statistics.add(&x);
        statistics.finish();
        let affine = Affine::new(4, Arithmetic::Single);
        let run = |jointly| {
            let search = ClipSearch {
                cols,
                group_size,
                gram: statistics.gram(),
                affine,
                jointly,
            };
            search.run(&weight)
        };
        let mut last = f64::INFINITY;
        for jointly in [false, true] {
            let clip = run(jointly);
            for (limits, expected) in [(None, clip.before), (Some(&clip.limits), clip.after)] {
                let mut rounded = weight.clone();
                if let Some(limits) = limits {
                    apply(&mut rounded, cols, limits);
                }
                for row in rounded.chunks_exact_mut(cols) {
                    affine.fake_quantize(row, group_size);
                }
                let error = token_error(&x, &weight, &rounded, cols);
                assert!((error / expected - 1.0).abs() < 1e-4, "{error} {expected}");
            }
            assert!(clip.after < last);
            last = clip.after;
        }
    }
}
