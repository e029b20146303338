//! The clip search of [`crate::quantizer::awq::clip`], jointly, on the device.

use olive_core::Result;
use olive_core::cuda::{ClipGroup, Element, Gpu, Matrix, Product};

use crate::report::ClipReport;

/// Shrinks that are tried.
const STEPS: usize = 20;
/// Rounds over the groups of a row.
const ROUNDS: usize = 4;
/// Rows that are searched together.
const ROWS: usize = 4096;

/// Clamps `weight` (single precision) to the best clips for an input with this Gram matrix, and says what it gained.
///
/// # Errors
/// Those of reading from the device.
pub(super) fn clip(
    gpu: &Gpu,
    weight: &Matrix,
    gram: &Matrix,
    group_size: usize,
    levels: f32,
) -> Result<ClipReport> {
    let groups: Vec<ClipGroup> = (0..weight.cols)
        .step_by(group_size)
        .map(|first| ClipGroup {
            first,
            size: group_size,
            steps: STEPS,
            levels,
        })
        .collect();
    let mut errors = Vec::new();
    let mut choices = Vec::new();
    for first in (0..weight.rows).step_by(ROWS) {
        let rows = weight.rows(first, ROWS.min(weight.rows - first));
        let (shares, chosen) = clip_rows(gpu, &rows, gram, &groups);
        errors.push(shares);
        choices.push(chosen);
    }
    let (mut before, mut after) = (0.0, 0.0);
    for [first, last] in errors {
        before += gpu.total(&first)?;
        after += gpu.total(&last)?;
    }
    let (mut clipped, mut all) = (0, 0);
    for chosen in choices {
        let steps = gpu.download_f32(&chosen)?;
        clipped += steps.iter().filter(|step| **step > 0.0).count();
        all += steps.len();
    }
    Ok(ClipReport {
        gain: if before > 0.0 { 1.0 - after / before } else { 0.0 },
        clipped: clipped as f64 / all.max(1) as f64,
    })
}

/// The shares of the errors before and after, and the shrinks that were chosen, `[groups, rows]`.
fn clip_rows(gpu: &Gpu, weight: &Matrix, gram: &Matrix, groups: &[ClipGroup]) -> ([Matrix; 2], Matrix) {
    let (rows, cols) = (weight.rows, weight.cols);
    let own = gpu.empty(groups.len(), rows * STEPS, Element::F32);
    let chosen = gpu.empty(groups.len(), rows, Element::F32);
    let delta = gpu.empty(rows, cols, Element::F32);
    let unclipped = gpu.upload_f32(&vec![1.0; cols], 1, cols);
    let group_size = groups.first().map_or(cols, |group| group.size);
    let levels = groups.first().map_or(15.0, |group| group.levels);
    let plain = gpu.rounding_error(weight, &unclipped, group_size, levels);
    let before = gpu.dot_shares(&plain, &product_with(gpu, &plain, gram));
    drop(plain);
    for (index, group) in groups.iter().enumerate() {
        let deltas = gpu.clip_deltas(weight, *group);
        let products = gpu.empty(deltas.rows, group.size, Element::F32);
        let block = gram.from(group.first, group.first);
        let size = [deltas.rows, group.size, group.size];
        gpu.product(Product::new(size, deltas.view(), block, products.view()));
        let own = own.rows(index, 1);
        gpu.row_dots(&deltas, &products, &own);
        gpu.choose_alone(&deltas, &own, *group, &delta, &chosen.rows(index, 1));
    }
    let mut product = product_with(gpu, &delta, gram);
    for _ in 0..ROUNDS {
        for (index, group) in groups.iter().enumerate() {
            let share = gpu.empty(rows, group.size, Element::F32);
            let block = gram.from(group.first, group.first);
            let size = [rows, group.size, group.size];
            gpu.product(Product::new(
                size,
                delta.from(0, group.first),
                block,
                share.view(),
            ));
            let change = gpu.choose_jointly(
                weight,
                *group,
                &own.rows(index, 1),
                [&product, &share],
                &delta,
                &chosen.rows(index, 1),
            );
            let block = gram.from(group.first, 0);
            let size = [rows, cols, group.size];
            gpu.product(
                Product::new(size, change.view(), block, product.view())
                    .accumulate()
                    .tf32(),
            );
        }
    }
    product = product_with(gpu, &delta, gram);
    let after = gpu.dot_shares(&delta, &product);
    for (index, group) in groups.iter().enumerate() {
        gpu.clamp_group(weight, *group, &chosen.rows(index, 1));
    }
    ([before, after], chosen)
}

/// `D H`.
pub(super) fn product_with(gpu: &Gpu, delta: &Matrix, gram: &Matrix) -> Matrix {
    let product = gpu.empty(delta.rows, delta.cols, Element::F32);
    let size = [delta.rows, delta.cols, delta.cols];
    gpu.product(Product::new(size, delta.view(), gram.view(), product.view()).tf32());
    product
}
