//! Softmax over the keys that a query sees, and its backward.

use cubecl::prelude::*;
use half::bf16;

use super::plane_per_row;
use crate::cuda::device::Gpu;
use crate::cuda::matrix::Matrix;

/// A plane for each row; row `r` is query `r % keys`, which sees itself and the `window - 1` keys before it.
#[cube(launch_unchecked)]
fn causal_softmax(
    scores: &Array<f32>,
    probabilities: &mut Array<bf16>,
    rows: u32,
    keys: u32,
    stride: u32,
    window: u32,
    scale: f32,
) {
    let row = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if row < rows {
        let query = row % keys;
        let mut first = 0u32;
        if query >= window {
            first = query - window + 1u32;
        }
        let base = row as usize * stride as usize;
        let mut largest = f32::new(-3.0e38);
        let mut key = first + UNIT_POS_X;
        while key <= query {
            largest = max(largest, scores[base + key as usize]);
            key += CUBE_DIM_X;
        }
        let largest = plane_max(largest);
        let mut sum = 0.0f32;
        let mut key = first + UNIT_POS_X;
        while key <= query {
            sum += ((scores[base + key as usize] - largest) * scale).exp();
            key += CUBE_DIM_X;
        }
        let inverse = 1.0f32 / plane_sum(sum);
        let mut key = UNIT_POS_X;
        while key < keys {
            let mut p = 0.0f32;
            if key >= first && key <= query {
                p = ((scores[base + key as usize] - largest) * scale).exp() * inverse;
            }
            probabilities[base + key as usize] = bf16::cast_from(p);
            key += CUBE_DIM_X;
        }
    }
}

/// `dS = scale · P ∘ (dP - rowsum(P ∘ dP))`, over `P`.
#[cube(launch_unchecked)]
fn softmax_backward(
    probabilities: &mut Array<bf16>,
    slopes: &Array<f32>,
    rows: u32,
    keys: u32,
    stride: u32,
    scale: f32,
) {
    let row = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if row < rows {
        let query = row % keys;
        let base = row as usize * stride as usize;
        let mut sum = 0.0f32;
        let mut key = UNIT_POS_X;
        while key <= query {
            sum += f32::cast_from(probabilities[base + key as usize]) * slopes[base + key as usize];
            key += CUBE_DIM_X;
        }
        let sum = plane_sum(sum);
        let mut key = UNIT_POS_X;
        while key <= query {
            let p = f32::cast_from(probabilities[base + key as usize]);
            let ds = p * (slopes[base + key as usize] - sum) * scale;
            probabilities[base + key as usize] = bf16::cast_from(ds);
            key += CUBE_DIM_X;
        }
    }
}

impl Gpu {
    /// Softmax of `scale · scores` over the first `keys` columns, in bfloat16; row `r` is query `r % keys`. 0 where a
    /// query does not see a key.
    pub fn causal_softmax(
        &self,
        scores: &Matrix,
        keys: usize,
        scale: f64,
        window: usize,
        probabilities: &Matrix,
    ) {
        let (count, dim) = plane_per_row(scores.rows);
        // SAFETY: both have the same shape.
        unsafe {
            causal_softmax::launch_unchecked(
                &self.client,
                count,
                dim,
                scores.arg(),
                probabilities.arg(),
                scores.rows as u32,
                keys as u32,
                scores.cols as u32,
                window.min(u32::MAX as usize) as u32,
                scale as f32,
            );
        }
    }

    /// Replaces probabilities by the gradient of `scores`, from that of the probabilities.
    pub fn softmax_backward(&self, probabilities: &Matrix, slopes: &Matrix, keys: usize, scale: f64) {
        let (count, dim) = plane_per_row(slopes.rows);
        // SAFETY: both have the same shape.
        unsafe {
            softmax_backward::launch_unchecked(
                &self.client,
                count,
                dim,
                probabilities.arg(),
                slopes.arg(),
                slopes.rows as u32,
                keys as u32,
                slopes.cols as u32,
                scale as f32,
            );
        }
    }
}
