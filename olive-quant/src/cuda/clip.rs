//! The clip search of [`crate::quantizer::awq::clip`], jointly, on the device.
//!
//! All groups are judged alone at once. In a round, what the other groups pull at a group is one product over all rows of
//! the weight, so that a round is a few kernels a group.

use olive_core::Result;
use olive_core::cuda::{ClipGrid, Element, Gpu, Matrix, Product};

use crate::report::ClipReport;

/// Shrinks that are tried.
const STEPS: usize = 20;
/// Rounds over the groups of a row.
const ROUNDS: usize = 4;
/// Rows whose product with the Gram matrix exists at a time.
const ROWS: usize = 8192;
/// Elements of the deltas of all shrinks that exist at a time.
const DELTAS: usize = 1 << 25;

/// What a search found, still on the device.
pub(super) struct Clip {
    /// Shares of the error without clips and with them.
    errors: [Vec<Matrix>; 2],
    /// `[groups, rows]`.
    chosen: Matrix,
}

impl Clip {
    /// What it gained.
    ///
    /// # Errors
    /// Those of reading from the device.
    pub fn report(&self, gpu: &Gpu) -> Result<ClipReport> {
        let total = |shares: &[Matrix]| shares.iter().map(|part| gpu.total(part)).sum::<Result<f64>>();
        let (before, after) = (total(&self.errors[0])?, total(&self.errors[1])?);
        let steps = gpu.download_f32(&self.chosen)?;
        let clipped = steps.iter().filter(|step| **step > 0.0).count();
        Ok(ClipReport {
            gain: if before > 0.0 { 1.0 - after / before } else { 0.0 },
            clipped: clipped as f64 / steps.len().max(1) as f64,
        })
    }
}

/// Clamps `weight` (single precision) to the best clips for an input with this Gram matrix.
pub(super) fn clip(gpu: &Gpu, weight: &Matrix, gram: &Matrix, group_size: usize, levels: f32) -> Clip {
    let grid = ClipGrid {
        group_size,
        steps: STEPS,
        levels,
    };
    let unclipped = gpu.upload_f32(&vec![1.0; weight.cols], 1, weight.cols);
    let before = pieces(weight, ROWS)
        .map(|(first, rows)| {
            let plain = gpu.rounding_error(&weight.rows(first, rows), &unclipped, group_size, levels);
            gpu.dot_shares(&plain, &product_with(gpu, &plain, gram))
        })
        .collect();
    let own = own_errors(gpu, weight, gram, grid);
    let [delta, chosen] = gpu.choose_alone(weight, &own, grid);
    let others = gpu.zeros(weight.rows, group_size, Element::F32);
    for _ in 0..ROUNDS {
        for group in 0..weight.cols / group_size {
            pull(gpu, &delta, gram, group * group_size, &others);
            gpu.choose_jointly(weight, (grid, group), &own, &others, [&delta, &chosen]);
        }
    }
    let after = pieces(weight, ROWS)
        .map(|(first, rows)| {
            let delta = delta.rows(first, rows);
            gpu.dot_shares(&delta, &product_with(gpu, &delta, gram))
        })
        .collect();
    gpu.clamp_groups(weight, grid, &chosen);
    Clip {
        errors: [before, after],
        chosen,
    }
}

/// First row and number of rows of pieces of at most `most` rows.
fn pieces(weight: &Matrix, most: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
    let rows = weight.rows;
    (0..rows)
        .step_by(most)
        .map(move |first| (first, most.min(rows - first)))
}

/// The errors of each group alone for every shrink, `[groups, rows * steps]`.
fn own_errors(gpu: &Gpu, weight: &Matrix, gram: &Matrix, grid: ClipGrid) -> Matrix {
    let (cols, size) = (weight.cols, grid.group_size);
    let groups = cols / size;
    let own = gpu.empty(groups, weight.rows * STEPS, Element::F32);
    for (first, rows) in pieces(weight, (DELTAS / (cols * STEPS)).max(1)) {
        let deltas = gpu.clip_deltas(&weight.rows(first, rows), grid);
        let products = gpu.empty(deltas.rows, size, Element::F32);
        let apart = rows * STEPS * size;
        let product = Product::new(
            [rows * STEPS, size, size],
            deltas.view().every(apart),
            gram.view().every(size * (cols + 1)),
            products.view().every(apart),
        );
        gpu.product(product.batch(groups));
        gpu.clip_errors([&deltas, &products], grid, (first, rows), &own);
    }
    own
}

/// The columns from `first` on of `D H`, where `D` is `delta` without these columns.
fn pull(gpu: &Gpu, delta: &Matrix, gram: &Matrix, first: usize, others: &Matrix) {
    let (rows, size) = (others.rows, others.cols);
    let behind = first + size;
    let out = others.view();
    if first > 0 {
        let product = Product::new([rows, size, first], delta.view(), gram.from(0, first), out);
        gpu.product(product.tf32());
    }
    if behind < delta.cols {
        let shape = [rows, size, delta.cols - behind];
        let product = Product::new(shape, delta.from(0, behind), gram.from(behind, first), out).tf32();
        gpu.product(if first > 0 { product.accumulate() } else { product });
    }
}

/// `D H`.
fn product_with(gpu: &Gpu, delta: &Matrix, gram: &Matrix) -> Matrix {
    let product = gpu.empty(delta.rows, delta.cols, Element::F32);
    let size = [delta.rows, delta.cols, delta.cols];
    gpu.product(Product::new(size, delta.view(), gram.view(), product.view()).tf32());
    product
}
