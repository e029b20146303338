//! Softmax over the keys that a query sees, and its backward.

use cubecl::prelude::*;
use half::bf16;

use super::{Float4, Half4, PLANE, plane_per_row};
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

/// Quads of keys of a row that a unit of a plane may hold in registers.
const HELD: usize = 16;

/// As [`causal_softmax`], each row read once, four keys at a time; a unit holds `held` quads.
#[cube(launch_unchecked)]
fn causal_softmax_held(
    scores: &Array<Float4>,
    probabilities: &mut Array<Half4>,
    rows: u32,
    keys: u32,
    stride: u32,
    window: u32,
    scale: f32,
    #[comptime] held: u32,
) {
    let row = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if row < rows {
        let query = row % keys;
        let mut first = 0u32;
        if query >= window {
            first = query - window + 1u32;
        }
        let quads = stride / 4u32;
        let base = row as usize * quads as usize;
        let low = f32::new(-3.0e38);
        let mut values = Array::<Float4>::new(comptime!(held as usize));
        let mut largest = Float4::new(low);
        #[unroll]
        for i in 0..held {
            let quad = i * 32u32 + UNIT_POS_X;
            let key = quad * 4u32;
            let mut v = Float4::new(low);
            if key <= query && key + 4u32 > first {
                let read = scores[base + quad as usize];
                #[unroll]
                for j in 0..4u32 {
                    if key + j >= first && key + j <= query {
                        v[j as usize] = read[j as usize];
                    }
                }
            }
            values[i as usize] = v;
            largest = max(largest, v);
        }
        let most = max(max(largest[0], largest[1]), max(largest[2], largest[3]));
        let most = Float4::new(plane_max(most));
        let mut sum = Float4::new(0.0f32);
        #[unroll]
        for i in 0..held {
            // What is not seen is so far below that nothing of it is left.
            let e = ((values[i as usize] - most) * Float4::new(scale)).exp();
            values[i as usize] = e;
            sum += e;
        }
        let inverse = Float4::new(1.0f32 / plane_sum(sum[0] + sum[1] + sum[2] + sum[3]));
        #[unroll]
        for i in 0..held {
            let quad = i * 32u32 + UNIT_POS_X;
            if quad < quads {
                probabilities[base + quad as usize] = Half4::cast_from(values[i as usize] * inverse);
            }
        }
    }
}

/// As [`softmax_backward`], each row read once, four keys at a time.
#[cube(launch_unchecked)]
fn softmax_backward_held(
    probabilities: &mut Array<Half4>,
    slopes: &Array<Float4>,
    rows: u32,
    keys: u32,
    stride: u32,
    scale: f32,
    #[comptime] held: u32,
) {
    let row = CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y;
    if row < rows {
        let query = row % keys;
        let base = row as usize * (stride / 4u32) as usize;
        let mut ps = Array::<Float4>::new(comptime!(held as usize));
        let mut ds = Array::<Float4>::new(comptime!(held as usize));
        let mut sum = Float4::new(0.0f32);
        #[unroll]
        for i in 0..held {
            let quad = i * 32u32 + UNIT_POS_X;
            let mut p = Float4::new(0.0f32);
            let mut d = Float4::new(0.0f32);
            if quad * 4u32 <= query {
                p = Float4::cast_from(probabilities[base + quad as usize]);
                let read = slopes[base + quad as usize];
                // Beyond the last key there may be anything.
                #[unroll]
                for j in 0..4u32 {
                    if quad * 4u32 + j <= query {
                        d[j as usize] = read[j as usize];
                    }
                }
            }
            ps[i as usize] = p;
            ds[i as usize] = d;
            sum += p * d;
        }
        let sum = Float4::new(plane_sum(sum[0] + sum[1] + sum[2] + sum[3]));
        #[unroll]
        for i in 0..held {
            let quad = i * 32u32 + UNIT_POS_X;
            if quad * 4u32 <= query {
                let slope = ps[i as usize] * (ds[i as usize] - sum) * Float4::new(scale);
                probabilities[base + quad as usize] = Half4::cast_from(slope);
            }
        }
    }
}

/// Quads that each unit holds of rows of `stride` keys: a power of two, so that few kernels are compiled; `None` for
/// rows that are too long or not whole quads.
fn held(stride: usize) -> Option<u32> {
    let held = stride.div_ceil(4 * PLANE as usize).next_power_of_two();
    (stride.is_multiple_of(4) && held <= HELD).then_some(held as u32)
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
        if let Some(held) = held(scores.cols) {
            // SAFETY: both have the same shape, rows of whole quads.
            unsafe {
                causal_softmax_held::launch_unchecked(
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
                    held,
                );
            }
            return;
        }
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
        if let Some(held) = held(slopes.cols) {
            // SAFETY: both have the same shape, rows of whole quads.
            unsafe {
                softmax_backward_held::launch_unchecked(
                    &self.client,
                    count,
                    dim,
                    probabilities.arg(),
                    slopes.arg(),
                    slopes.rows as u32,
                    keys as u32,
                    slopes.cols as u32,
                    scale as f32,
                    held,
                );
            }
            return;
        }
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
