//! Dropout by counter: the masks of [`DropoutStream`], made anew wherever they are needed.

use cubecl::prelude::*;
use half::bf16;

use super::{Float8, Half8, unit_per_item};
use crate::cuda::device::{Gpu, Numbers};
use crate::cuda::matrix::{Element, Matrix};
use crate::decoder::{DropoutStream, child_key};

/// Dropout of rows: the decisions of a [`DropoutStream`].
#[derive(Debug, Clone, Copy)]
pub struct Dropout<'a> {
    probability: f64,
    key: u64,
    /// Each row's place in its micro-batch.
    places: &'a Numbers,
}

impl<'a> Dropout<'a> {
    /// The decisions of `stream` for rows at these places; the stream's own first row does not count.
    pub fn new(stream: &DropoutStream, places: &'a Numbers) -> Self {
        let (probability, key) = stream.parameters();
        Self {
            probability,
            key,
            places,
        }
    }

    /// That of a part of what this one is for, as [`DropoutStream::child`].
    pub fn child(&self, part: u64) -> Self {
        Self {
            key: child_key(self.key, part),
            ..*self
        }
    }

    /// Whether nothing is ever dropped.
    pub fn is_none(&self) -> bool {
        self.probability <= 0.0
    }
}

/// The finalizer of SplitMix64.
#[cube]
fn mix(value: u64) -> u64 {
    let a = (value ^ (value >> 30u64)) * 0xBF58_476D_1CE4_E5B9u64;
    let b = (a ^ (a >> 27u64)) * 0x94D0_49BB_1331_11EBu64;
    b ^ (b >> 31u64)
}

/// `out = x · mask`, or `out += x · mask`. Row `r` is row `places[r]` of its micro-batch.
#[cube(launch_unchecked)]
fn drop_out(
    x: &Array<bf16>,
    out: &mut Array<bf16>,
    places: &Array<u32>,
    items: u32,
    width: u32,
    key: u64,
    threshold: u32,
    keep: f32,
    #[comptime] adds: bool,
) {
    if ABSOLUTE_POS < items as usize {
        let row = ABSOLUTE_POS / width as usize;
        let col = ABSOLUTE_POS % width as usize;
        let index = u64::cast_from(places[row]) * u64::cast_from(width) + u64::cast_from(col as u32);
        let bits = mix(key + (index >> 1u64) * 0x9E37_79B9_7F4A_7C15u64);
        let mut half = u32::cast_from(bits & 0xFFFF_FFFFu64);
        if index & 1u64 == 1u64 {
            half = u32::cast_from(bits >> 32u64);
        }
        let mut value = 0.0f32;
        if half >= threshold {
            value = f32::cast_from(x[ABSOLUTE_POS]) * keep;
        }
        if comptime!(adds) {
            value += f32::cast_from(out[ABSOLUTE_POS]);
        }
        out[ABSOLUTE_POS] = bf16::cast_from(value);
    }
}

/// As [`drop_out`], eight elements at a time: rows are multiples of eight, so that a pair shares its 64 bits.
#[cube(launch_unchecked)]
fn drop_out_eights(
    x: &Array<Half8>,
    out: &mut Array<Half8>,
    places: &Array<u32>,
    items: u32,
    eights: u32,
    key: u64,
    threshold: u32,
    keep: f32,
    #[comptime] adds: bool,
) {
    if ABSOLUTE_POS < items as usize {
        let row = ABSOLUTE_POS / eights as usize;
        let eight = ABSOLUTE_POS % eights as usize;
        let first = u64::cast_from(places[row]) * u64::cast_from(eights) + u64::cast_from(eight as u32);
        let mut counter = key + first * 4u64 * 0x9E37_79B9_7F4A_7C15u64;
        let mut kept = Float8::cast_from(x[ABSOLUTE_POS]) * Float8::new(keep);
        #[unroll]
        for pair in 0..4u32 {
            let bits = mix(counter);
            if u32::cast_from(bits & 0xFFFF_FFFFu64) < threshold {
                kept[(2u32 * pair) as usize] = 0.0f32;
            }
            if u32::cast_from(bits >> 32u64) < threshold {
                kept[(2u32 * pair + 1u32) as usize] = 0.0f32;
            }
            counter += 0x9E37_79B9_7F4A_7C15u64;
        }
        if comptime!(adds) {
            kept += Float8::cast_from(out[ABSOLUTE_POS]);
        }
        out[ABSOLUTE_POS] = Half8::cast_from(kept);
    }
}

impl Gpu {
    /// `x · mask` in bfloat16.
    pub fn drop_out(&self, x: &Matrix, dropout: &Dropout<'_>) -> Matrix {
        let out = self.empty(x.rows, x.cols, Element::Bf16);
        self.drop(x, dropout, &out, false);
        out
    }

    /// `sum += x · mask`, the gradient of [`Gpu::drop_out`] where there is another.
    pub fn drop_out_add(&self, x: &Matrix, dropout: &Dropout<'_>, sum: &Matrix) {
        self.drop(x, dropout, sum, true);
    }

    fn drop(&self, x: &Matrix, dropout: &Dropout<'_>, out: &Matrix, adds: bool) {
        let threshold = (dropout.probability * 4_294_967_296.0) as u32;
        let keep = (1.0 / (1.0 - dropout.probability)) as f32;
        if x.cols.is_multiple_of(8) {
            let items = x.len() / 8;
            let (count, dim) = unit_per_item(items);
            // SAFETY: both have the same shape, rows of whole eights, and there is a place for each row.
            unsafe {
                drop_out_eights::launch_unchecked(
                    &self.client,
                    count,
                    dim,
                    x.arg(),
                    out.arg(),
                    dropout.places.arg(),
                    items as u32,
                    (x.cols / 8) as u32,
                    dropout.key,
                    threshold,
                    keep,
                    adds,
                );
            }
            return;
        }
        let (count, dim) = unit_per_item(x.len());
        // SAFETY: both have the same shape, and there is a place for each row.
        unsafe {
            drop_out::launch_unchecked(
                &self.client,
                count,
                dim,
                x.arg(),
                out.arg(),
                dropout.places.arg(),
                x.len() as u32,
                x.cols as u32,
                dropout.key,
                threshold,
                keep,
                adds,
            );
        }
    }
}
