//! Cross entropy of rows of logits with its gradient, and sums over everything.

use cubecl::prelude::*;
use half::bf16;

use super::{Float4, Half4, cube_max, cube_per_row, cube_sum, unit_per_item};
use crate::cuda::device::{Gpu, Numbers};
use crate::cuda::matrix::{Element, Matrix};
use crate::error::Result;

/// Cubes that share a sum over everything, and so the shares of it.
pub const SHARES: usize = 512;

/// Loss of a row, and over its logits in bfloat16 the gradient `(softmax - onehot) · scale`.
#[cube(launch_unchecked)]
fn cross_entropy(
    logits: &Array<f32>,
    targets: &Array<u32>,
    losses: &mut Array<f32>,
    slopes: &mut Array<bf16>,
    vocab: u32,
    stride: u32,
    scale: f32,
    #[comptime] gradient: bool,
) {
    let mut shared = SharedMemory::<f32>::new(8usize);
    let base = CUBE_POS_X as usize * stride as usize;
    let mut largest = f32::new(-3.0e38);
    let mut i = UNIT_POS;
    while i < vocab {
        largest = max(largest, logits[base + i as usize]);
        i += CUBE_DIM;
    }
    let largest = cube_max(largest, &mut shared);
    let mut sum = 0.0f32;
    let mut i = UNIT_POS;
    while i < vocab {
        sum += (logits[base + i as usize] - largest).exp();
        i += CUBE_DIM;
    }
    let sum = cube_sum(sum, &mut shared);
    let target = targets[CUBE_POS_X as usize];
    if UNIT_POS == 0u32 {
        losses[CUBE_POS_X as usize] = sum.ln() - (logits[base + target as usize] - largest);
    }
    if comptime!(gradient) {
        let factor = scale / sum;
        let mut i = UNIT_POS;
        while i < stride {
            let mut slope = 0.0f32;
            if i < vocab {
                slope = (logits[base + i as usize] - largest).exp() * factor;
                if i == target {
                    slope -= scale;
                }
            }
            slopes[base + i as usize] = bf16::cast_from(slope);
            i += CUBE_DIM;
        }
    }
}

/// Each cube's share of `Σ x²`.
#[cube(launch_unchecked)]
fn square_sums(x: &Array<f32>, sums: &mut Array<f32>, items: u32) {
    let mut shared = SharedMemory::<f32>::new(8usize);
    let mut sum = 0.0f32;
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        sum += x[i] * x[i];
        i += CUBE_COUNT * CUBE_DIM as usize;
    }
    let total = cube_sum(sum, &mut shared);
    if UNIT_POS == 0u32 {
        sums[CUBE_POS_X as usize] = total;
    }
}

/// Each cube's share of `Σ (a - b)²`.
#[cube(launch_unchecked)]
fn square_differences(a: &Array<f32>, b: &Array<f32>, sums: &mut Array<f32>, items: u32) {
    let mut shared = SharedMemory::<f32>::new(8usize);
    let mut sum = 0.0f32;
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        let d = a[i] - b[i];
        sum += d * d;
        i += CUBE_COUNT * CUBE_DIM as usize;
    }
    let total = cube_sum(sum, &mut shared);
    if UNIT_POS == 0u32 {
        sums[CUBE_POS_X as usize] = total;
    }
}

/// Each cube's share of `Σ a b`.
#[cube(launch_unchecked)]
fn dot_sums(a: &Array<f32>, b: &Array<f32>, sums: &mut Array<f32>, items: u32) {
    let mut shared = SharedMemory::<f32>::new(8usize);
    let mut sum = 0.0f32;
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        sum += a[i] * b[i];
        i += CUBE_COUNT * CUBE_DIM as usize;
    }
    let total = cube_sum(sum, &mut shared);
    if UNIT_POS == 0u32 {
        sums[CUBE_POS_X as usize] = total;
    }
}

/// As [`dot_sums`], with `a` in bfloat16, four elements at a time.
#[cube(launch_unchecked)]
fn dot_half_sums(a: &Array<Half4>, b: &Array<Float4>, sums: &mut Array<f32>, quads: u32) {
    let mut shared = SharedMemory::<f32>::new(8usize);
    let mut sum = Float4::new(0.0f32);
    let mut i = ABSOLUTE_POS;
    while i < quads as usize {
        sum += Float4::cast_from(a[i]) * b[i];
        i += CUBE_COUNT * CUBE_DIM as usize;
    }
    let total = cube_sum(sum[0] + sum[1] + sum[2] + sum[3], &mut shared);
    if UNIT_POS == 0u32 {
        sums[CUBE_POS_X as usize] = total;
    }
}

/// Each cube's share of `Σ x`.
#[cube(launch_unchecked)]
fn value_sums(x: &Array<f32>, sums: &mut Array<f32>, items: u32) {
    let mut shared = SharedMemory::<f32>::new(8usize);
    let mut sum = 0.0f32;
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        sum += x[i];
        i += CUBE_COUNT * CUBE_DIM as usize;
    }
    let total = cube_sum(sum, &mut shared);
    if UNIT_POS == 0u32 {
        sums[CUBE_POS_X as usize] = total;
    }
}

impl Gpu {
    /// Losses `[1, rows]` of `logits [rows, stride]` (single precision, `vocab` of them counted) and, with a scale,
    /// the gradient of their sum times it in bfloat16, `[rows, stride]`.
    pub fn cross_entropy(
        &self,
        logits: &Matrix,
        vocab: usize,
        targets: &Numbers,
        scale: Option<f64>,
    ) -> (Matrix, Option<Matrix>) {
        let losses = self.empty(1, logits.rows, Element::F32);
        let slopes = scale.map(|_| self.empty(logits.rows, logits.cols, Element::Bf16));
        let (count, dim) = cube_per_row(logits.rows);
        // SAFETY: a target a row, each below `vocab`; without a gradient its argument is not touched.
        unsafe {
            cross_entropy::launch_unchecked(
                &self.client,
                count,
                dim,
                logits.arg(),
                targets.arg(),
                losses.arg(),
                slopes.as_ref().unwrap_or(&losses).arg(),
                vocab as u32,
                logits.cols as u32,
                scale.unwrap_or(0.0) as f32,
                scale.is_some(),
            );
        }
        (losses, slopes)
    }

    /// `Σ x²` (single precision; the shares of the cubes are added in double precision).
    ///
    /// # Errors
    /// As [`Gpu::download`].
    pub fn square_sum(&self, x: &Matrix) -> Result<f64> {
        let sums = self.empty(1, SHARES, Element::F32);
        let (_, dim) = unit_per_item(1);
        // SAFETY: there is a place for the share of each cube.
        unsafe {
            let count = CubeCount::Static(SHARES as u32, 1, 1);
            square_sums::launch_unchecked(&self.client, count, dim, x.arg(), sums.arg(), x.len() as u32);
        }
        self.total(&sums)
    }

    /// `Σ x`, as [`Gpu::square_sum`].
    ///
    /// # Errors
    /// As [`Gpu::download`].
    pub fn sum(&self, x: &Matrix) -> Result<f64> {
        let sums = self.empty(1, SHARES, Element::F32);
        let (_, dim) = unit_per_item(1);
        // SAFETY: there is a place for the share of each cube.
        unsafe {
            let count = CubeCount::Static(SHARES as u32, 1, 1);
            value_sums::launch_unchecked(&self.client, count, dim, x.arg(), sums.arg(), x.len() as u32);
        }
        self.total(&sums)
    }

    /// `Σ (a - b)²`, as [`Gpu::square_sum`].
    ///
    /// # Errors
    /// As [`Gpu::download`].
    pub fn square_difference(&self, a: &Matrix, b: &Matrix) -> Result<f64> {
        let sums = self.square_difference_shares(a, b);
        self.total(&sums)
    }

    /// The shares of `Σ (a - b)²`, to be added by [`Gpu::total`] later.
    pub fn square_difference_shares(&self, a: &Matrix, b: &Matrix) -> Matrix {
        let sums = self.empty(1, SHARES, Element::F32);
        let (_, dim) = unit_per_item(1);
        // SAFETY: both have the same number of elements; there is a place for the share of each cube.
        unsafe {
            let count = CubeCount::Static(SHARES as u32, 1, 1);
            square_differences::launch_unchecked(
                &self.client,
                count,
                dim,
                a.arg(),
                b.arg(),
                sums.arg(),
                a.len() as u32,
            );
        }
        sums
    }

    /// `Σ a b`, as [`Gpu::square_sum`].
    ///
    /// # Errors
    /// As [`Gpu::download`].
    pub fn dot(&self, a: &Matrix, b: &Matrix) -> Result<f64> {
        let sums = self.dot_shares(a, b);
        self.total(&sums)
    }

    /// The shares of `Σ a b`, to be added by [`Gpu::total`] later.
    pub fn dot_shares(&self, a: &Matrix, b: &Matrix) -> Matrix {
        let sums = self.empty(1, SHARES, Element::F32);
        let (_, dim) = unit_per_item(1);
        // SAFETY: as for `square_difference`.
        unsafe {
            let count = CubeCount::Static(SHARES as u32, 1, 1);
            dot_sums::launch_unchecked(
                &self.client,
                count,
                dim,
                a.arg(),
                b.arg(),
                sums.arg(),
                a.len() as u32,
            );
        }
        sums
    }

    /// As [`Gpu::dot_shares`], with `a` in bfloat16, a multiple of four elements, into `sums [1, SHARES]`.
    pub fn dot_half_shares(&self, a: &Matrix, b: &Matrix, sums: &Matrix) {
        let (_, dim) = unit_per_item(1);
        // SAFETY: as for `square_difference`; elements are read four at a time.
        unsafe {
            let count = CubeCount::Static(SHARES as u32, 1, 1);
            dot_half_sums::launch_unchecked(
                &self.client,
                count,
                dim,
                a.arg(),
                b.arg(),
                sums.arg(),
                (a.len() / 4) as u32,
            );
        }
    }

    /// The sum of all elements of a small matrix.
    ///
    /// # Errors
    /// As [`Gpu::download`].
    pub fn total(&self, shares: &Matrix) -> Result<f64> {
        Ok(self.download_f32(shares)?.iter().map(|v| f64::from(*v)).sum())
    }
}
