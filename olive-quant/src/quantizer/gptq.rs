//! GPTQ (<https://arxiv.org/abs/2210.17323>): columns are rounded one after the other, and what rounding a column
//! lost is made up for by those that are still to come, as the Gram matrix `H` of the inputs says.
//!
//! ```text
//! channels that are never on: H_dd = 1, W_d = 0;  H += damp · mean(diag H) · I;  H⁻¹ = Uᵀ U
//! for each column i: q = Q(w_i);  e = (w_i - q) / U_ii;  w_j -= e U_ij for j > i
//! ```
//!
//! The sweep goes in blocks of 128 columns. A group's grid is chosen from its weights as they are when the sweep
//! reaches the block that the group starts in, as Olive chooses it; a whole-row group's from the first weights.
//!
//! **Deviations from Olive.** Grids are applied with the scale as it is stored. If `H` is not positive definite, the
//! damping is raised tenfold until it is. Where the result is worse than rounding to nearest under `H`, which
//! happens if there are few tokens, rounding to nearest is kept.

mod cholesky;

use ndarray::Array2;
use olive_core::kernels::{View, product, row_dots};
use olive_core::{Error, QuantMatrix, Result};
use rayon::prelude::*;

use super::minmax::{self, Grid, MinMax, RoundedRows};

/// Columns after which the remaining ones are updated.
const BLOCK: usize = 128;
/// Rows that one task sweeps.
const ROWS: usize = 64;
/// Dampings that are tried, each ten times the one before.
const DAMPINGS: usize = 6;

/// How to sweep.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GptqOptions {
    /// Share of the mean of the diagonal that is added to it.
    pub damp_percent: f64,
    /// Whether columns with the largest activations go first; for whole-row groups only.
    pub act_order: bool,
}

/// A swept weight.
#[derive(Debug, Clone, PartialEq)]
pub struct GptqWeight {
    /// The integers.
    pub matrix: QuantMatrix,
    /// The damping that was needed.
    pub damp_percent: f64,
    /// `tr(D H Dᵀ)` of the error `D`.
    pub loss: f64,
    /// The same for rounding to nearest; never below `loss`.
    pub loss_rtn: f64,
}

/// The weight to be rounded: name for messages, values `[rows, cols]`, group size.
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a> {
    /// For messages.
    pub name: &'a str,
    /// Row-major.
    pub values: &'a [f32],
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Inputs that share a grid; divides the inputs.
    pub group_size: usize,
}

/// Rounds `weight` under the Gram matrix `gram [in, in]` of its inputs.
///
/// # Errors
/// [`Error::Tensor`] or [`Error::NotFinite`] if weight or sizes are not usable, or no damping makes the Gram matrix
/// positive definite.
pub fn quantize(
    weight: Weight<'_>,
    gram: &[f32],
    grids: &MinMax,
    options: GptqOptions,
) -> Result<GptqWeight> {
    let Weight {
        name,
        values,
        shape,
        group_size,
    } = weight;
    let [_, cols] = shape;
    minmax::check_weight(name, values, shape, group_size)?;
    if gram.len() != cols * cols || (options.act_order && group_size != cols) {
        let found = format!("{} values, groups of {group_size}", gram.len());
        let expected = format!("a Gram matrix of {cols} inputs, whole-row groups to reorder them");
        return Err(Error::tensor(name, expected, found));
    }
    let order = column_order(gram, cols, options.act_order);
    let (factor, dead, damp_percent) = factor(name, gram, &order, options.damp_percent)?;
    let mut permuted: Vec<f32> = Vec::with_capacity(values.len());
    for row in values.chunks_exact(cols.max(1)) {
        permuted.extend(
            order
                .iter()
                .zip(&dead)
                .map(|(k, dead)| if *dead { 0.0 } else { row[*k] }),
        );
    }
    let (levels, own) = sweep(&mut permuted, &factor, cols, group_size, grids);
    let mut ordered = vec![0u8; levels.len()];
    for (to, from) in ordered
        .chunks_exact_mut(cols.max(1))
        .zip(levels.chunks_exact(cols.max(1)))
    {
        for (k, level) in order.iter().zip(from) {
            to[*k] = *level;
        }
    }
    let matrix = minmax::assemble(name, grids, (shape, group_size), &ordered, &own)?;
    let mut nearest = RoundedRows::default();
    grids.round_rows(values, group_size, None, &mut nearest);
    let rounded = minmax::assemble(name, grids, (shape, group_size), &nearest.levels, &nearest.grids)?;
    let (loss, loss_rtn) = (
        weighted_loss(&matrix, values, gram),
        weighted_loss(&rounded, values, gram),
    );
    let better = loss <= loss_rtn;
    Ok(GptqWeight {
        matrix: if better { matrix } else { rounded },
        damp_percent,
        loss: loss.min(loss_rtn),
        loss_rtn,
    })
}

/// Columns in the order of the sweep: as they are, or by falling activation.
fn column_order(gram: &[f32], cols: usize, act_order: bool) -> Vec<usize> {
    let mut order: Vec<usize> = (0..cols).collect();
    if act_order {
        order.sort_by(|a, b| gram[b * cols + b].total_cmp(&gram[a * cols + a]));
    }
    order
}

/// `U` in single precision, which columns are dead, and the damping. One matrix in double precision exists at a time.
fn factor(
    name: &str,
    gram: &[f32],
    order: &[usize],
    damp_percent: f64,
) -> Result<(Vec<f32>, Vec<bool>, f64)> {
    let n = order.len();
    let at = |i: usize, j: usize| f64::from(gram[order[i] * n + order[j]]);
    let dead: Vec<bool> = (0..n).map(|i| at(i, i) == 0.0).collect();
    let diagonal = |i: usize| if dead[i] { 1.0 } else { at(i, i) };
    let mean = (0..n).map(diagonal).sum::<f64>() / n.max(1) as f64;
    let mut damp = damp_percent;
    for attempt in 0..DAMPINGS {
        if attempt > 0 {
            tracing::warn!("`{name}`: the Gram matrix is singular with a damping of {damp}");
            damp = if damp > 0.0 { damp * 10.0 } else { 1e-4 };
        }
        let mut h = Array2::from_shape_fn((n, n), |(i, j)| at(i, j));
        for i in 0..n {
            h[[i, i]] = diagonal(i) + damp * mean;
        }
        if cholesky::upper_inverse_factor(&mut h).is_some() {
            return Ok((h.iter().map(|v| *v as f32).collect(), dead, damp));
        }
    }
    let found = format!("none with a damping of {damp}");
    let expected = "activations with a positive definite Gram matrix";
    Err(Error::tensor(name, expected, found))
}

/// Sweeps all rows; the integers and, a group after the other, the grids.
fn sweep(
    weight: &mut [f32],
    factor: &[f32],
    cols: usize,
    group_size: usize,
    grids: &MinMax,
) -> (Vec<u8>, Vec<Grid>) {
    let groups = cols / group_size;
    let mut levels = vec![0u8; weight.len()];
    let mut own = vec![Grid::default(); weight.len() / group_size];
    weight
        .par_chunks_mut(ROWS * cols)
        .zip(levels.par_chunks_mut(ROWS * cols))
        .zip(own.par_chunks_mut(ROWS * groups))
        .for_each(|((weight, levels), own)| {
            let mut rows = Rows {
                cols,
                group_size,
                factor,
                grids,
                weight,
                levels,
                own,
            };
            for first in (0..cols).step_by(BLOCK) {
                rows.sweep_block(first, (first + BLOCK).min(cols));
            }
        });
    (levels, own)
}

/// Some rows in the sweep.
struct Rows<'a> {
    cols: usize,
    group_size: usize,
    factor: &'a [f32],
    grids: &'a MinMax,
    weight: &'a mut [f32],
    levels: &'a mut [u8],
    own: &'a mut [Grid],
}

impl Rows<'_> {
    fn sweep_block(&mut self, first: usize, end: usize) {
        let (cols, width) = (self.cols, end - first);
        let rows = self.weight.len() / cols;
        let mut errors = vec![0.0f32; rows * width];
        for (row, errors) in errors.chunks_exact_mut(width).enumerate() {
            self.sweep_row(row, first, errors);
        }
        if end < cols {
            let later = View::new(&self.factor[first * cols + end..], [width, cols - end], cols);
            product(
                &mut self.weight[end..],
                cols,
                true,
                1.0,
                View::new(&errors, [rows, width], width),
                later,
            );
        }
    }

    /// Rounds the columns of the block in one row; leaves the negated errors.
    fn sweep_row(&mut self, row: usize, first: usize, errors: &mut [f32]) {
        let (cols, group_size, groups) = (self.cols, self.group_size, self.cols / self.group_size);
        let weight = &self.weight[row * cols..(row + 1) * cols];
        let mut block = weight[first..first + errors.len()].to_vec();
        for i in 0..block.len() {
            let column = first + i;
            let own = &mut self.own[row * groups + column / group_size];
            if column.is_multiple_of(group_size) {
                *own = self.grids.grid(&weight[column..column + group_size]);
            }
            let level = self.grids.level(*own, block[i]);
            self.levels[row * cols + column] = level as u8;
            let factor = &self.factor[column * cols + column..column * cols + first + block.len()];
            let error = (block[i] - (level - own.zero) * own.scale) / factor[0];
            for (w, u) in block[i..].iter_mut().zip(factor) {
                *w -= error * u;
            }
            errors[i] = -error;
        }
    }
}

/// `tr(D H Dᵀ)` with `D` the error of `matrix`.
pub fn weighted_loss(matrix: &QuantMatrix, weight: &[f32], gram: &[f32]) -> f64 {
    let cols = matrix.cols;
    let mut delta = matrix.dequantize();
    for (d, w) in delta.iter_mut().zip(weight) {
        *d -= w;
    }
    let losses: Vec<f64> = delta
        .par_chunks(ROWS * cols)
        .map(|delta| {
            let rows = delta.len() / cols;
            let mut projected = vec![0.0f32; delta.len()];
            let gram = View::new(gram, [cols, cols], cols);
            product(
                &mut projected,
                cols,
                false,
                1.0,
                View::new(delta, [rows, cols], cols),
                gram,
            );
            row_dots(&projected, delta, cols).sum()
        })
        .collect();
    losses.iter().sum()
}

#[cfg(test)]
mod tests;
