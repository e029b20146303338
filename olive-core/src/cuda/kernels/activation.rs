//! The gated activation of the MLP and its backward.

use cubecl::prelude::*;

use super::{Float4, Half4, unit_per_item};
use crate::arch::Activation;
use crate::cuda::device::Gpu;
use crate::cuda::matrix::{Element, Matrix};

/// `f(x)`: SiLU, or GELU by its tanh approximation.
#[cube]
fn activate(x: Float4, #[comptime] gelu: bool) -> Float4 {
    if comptime!(gelu) {
        let t = tanh_argument(x).tanh();
        x * (t + Float4::new(1.0f32)) * Float4::new(0.5f32)
    } else {
        x * sigmoid(x)
    }
}

/// `f'(x)`.
#[cube]
fn slope(x: Float4, #[comptime] gelu: bool) -> Float4 {
    let one = Float4::new(1.0f32);
    if comptime!(gelu) {
        let t = tanh_argument(x).tanh();
        let inner = (x * x * Float4::new(0.134_145f32) + one) * Float4::new(0.797_884_6f32);
        (t + one + x * (one - t * t) * inner) * Float4::new(0.5f32)
    } else {
        let s = sigmoid(x);
        s * (x * (one - s) + one)
    }
}

#[cube]
fn sigmoid(x: Float4) -> Float4 {
    let one = Float4::new(1.0f32);
    one / (one + (Float4::new(0.0f32) - x).exp())
}

/// `√(2/π) (x + 0.044715 x³)`.
#[cube]
fn tanh_argument(x: Float4) -> Float4 {
    (x + x * x * x * Float4::new(0.044_715f32)) * Float4::new(0.797_884_6f32)
}

#[cube(launch_unchecked)]
fn gated(both: &Array<Half4>, inner: &mut Array<Half4>, items: u32, width: u32, #[comptime] gelu: bool) {
    if ABSOLUTE_POS < items as usize {
        let quads = (width / 4u32) as usize;
        let row = ABSOLUTE_POS / quads;
        let at = row * quads + ABSOLUTE_POS;
        let gate = Float4::cast_from(both[at]);
        let up = Float4::cast_from(both[at + quads]);
        inner[ABSOLUTE_POS] = Half4::cast_from(activate(gate, gelu) * up);
    }
}

#[cube(launch_unchecked)]
fn gated_backward(
    both: &mut Array<Half4>,
    d_inner: &Array<Half4>,
    items: u32,
    width: u32,
    #[comptime] gelu: bool,
) {
    if ABSOLUTE_POS < items as usize {
        let quads = (width / 4u32) as usize;
        let row = ABSOLUTE_POS / quads;
        let at = row * quads + ABSOLUTE_POS;
        let gate = Float4::cast_from(both[at]);
        let up = Float4::cast_from(both[at + quads]);
        let d = Float4::cast_from(d_inner[ABSOLUTE_POS]);
        both[at] = Half4::cast_from(d * up * slope(gate, gelu));
        both[at + quads] = Half4::cast_from(d * activate(gate, gelu));
    }
}

impl Gpu {
    /// `f(gate) · up` of rows `[gate, up]`: `[n, 2 width]` to `[n, width]`, bfloat16.
    pub fn gated(&self, activation: Activation, both: &Matrix) -> Matrix {
        let inner = self.empty(both.rows, both.cols / 2, Element::Bf16);
        let items = inner.len() / 4;
        let (count, dim) = unit_per_item(items);
        // SAFETY: shapes agree; the width is a multiple of four, which opening the model checked.
        unsafe {
            gated::launch_unchecked(
                &self.client,
                count,
                dim,
                both.arg(),
                inner.arg(),
                items as u32,
                inner.cols as u32,
                activation == Activation::GeluTanh,
            );
        }
        inner
    }

    /// Replaces `both` by its gradient, from that of the output of [`Gpu::gated`].
    pub fn gated_backward(&self, activation: Activation, both: &Matrix, d_inner: &Matrix) {
        let items = d_inner.len() / 4;
        let (count, dim) = unit_per_item(items);
        // SAFETY: as for `gated`.
        unsafe {
            gated_backward::launch_unchecked(
                &self.client,
                count,
                dim,
                both.arg(),
                d_inner.arg(),
                items as u32,
                d_inner.cols as u32,
                activation == Activation::GeluTanh,
            );
        }
    }
}
