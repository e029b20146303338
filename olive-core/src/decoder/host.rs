//! Single-pass kernels for tensors that the backend keeps in host memory.
//!
//! Burn's CPU backend walks broadcast and transposed operands element by element; what is not a matrix product in a
//! layer is done here in one pass over plain slices instead, shared by the threads of the pool. Every kernel has its
//! formula in plain Burn operations beside it, which other backends run and against which the tests compare.

use std::any::Any;

use burn::backend::flex::FlexTensor;
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;

use super::Cpu;
use crate::arch::Activation;
use crate::kernels::{dot, sigmoid, wide};

/// Elements that one task handles.
const TASK: usize = 1 << 16;

/// A contiguous `f32` tensor in host memory.
pub struct HostTensor(FlexTensor);

impl HostTensor {
    /// The tensor's memory, if it is the host's and holds `f32`.
    pub fn of<B: Backend, const D: usize>(x: &Tensor<B, D>) -> Option<Self> {
        let x = (x as &dyn Any).downcast_ref::<Tensor<Cpu, D>>()?;
        let mut tensor = x.clone().into_primitive().tensor();
        if tensor.as_slice::<f32>().is_none() {
            tensor = tensor.to_contiguous();
        }
        tensor.as_slice::<f32>().is_some().then_some(Self(tensor))
    }

    /// Its elements, row-major.
    pub fn values(&self) -> &[f32] {
        self.0.as_slice().unwrap_or_default()
    }
}

/// Whether tensors of this backend are in host memory.
pub(super) fn is_host<B: Backend>() -> bool {
    std::any::TypeId::of::<B>() == std::any::TypeId::of::<Cpu>()
}

/// The elements of a tensor in host memory; not copied if nobody else holds it.
pub(super) fn take<B: Backend, const D: usize>(x: Tensor<B, D>) -> Vec<f32> {
    let values = x.into_data().convert::<f32>().into_vec();
    values.expect("invariant: converted to f32")
}

/// A tensor from host memory.
pub(super) fn tensor<B: Backend, const D: usize>(
    values: Vec<f32>,
    shape: [usize; D],
    device: &B::Device,
) -> Tensor<B, D> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// Calls `f(context, first row, rows)` for pieces of `out`, rows of `width`, compiled for wide registers: `f` is a
/// function that is always inlined.
pub(super) fn by_rows<C: Copy + Send + Sync>(
    out: &mut [f32],
    width: usize,
    f: impl Fn(C, usize, &mut [f32]) + Copy + Sync,
    context: C,
) {
    let rows = (TASK / width.max(1)).max(1);
    let pieces = out.par_chunks_mut((rows * width).max(1)).enumerate();
    pieces.for_each(|(index, out)| wide(f, (context, index * rows, out)));
}

/// Adds `other` to `values`, element by element.
pub(super) fn add(values: &mut [f32], other: &[f32]) {
    by_rows(values, 1, add_from, other);
}

#[inline(always)]
fn add_from(other: &[f32], first: usize, values: &mut [f32]) {
    for (value, other) in values.iter_mut().zip(&other[first..]) {
        *value += other;
    }
}

/// Adds `row` to every row.
pub(super) fn add_to_rows(values: &mut [f32], row: &[f32]) {
    by_rows(values, row.len(), add_row, row);
}

#[inline(always)]
fn add_row(row: &[f32], _: usize, values: &mut [f32]) {
    for values in values.chunks_exact_mut(row.len()) {
        for (value, other) in values.iter_mut().zip(row) {
            *value += other;
        }
    }
}

/// RMS norm of rows of `weight.len()` elements.
pub(super) fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    by_rows(&mut y, weight.len(), norm_rows, (x, weight, epsilon));
    y
}

#[inline(always)]
fn norm_rows((x, weight, epsilon): (&[f32], &[f32], f32), first: usize, y: &mut [f32]) {
    let n = weight.len();
    for (x, y) in x[first * n..].chunks_exact(n).zip(y.chunks_exact_mut(n)) {
        let inverse = 1.0 / (dot(x, x) / n as f32 + epsilon).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * inverse * w;
        }
    }
}

/// The gradient of the input of [`rms_norm`].
pub(super) fn rms_norm_backward(x: &[f32], dy: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let mut dx = vec![0.0; x.len()];
    by_rows(&mut dx, weight.len(), norm_slopes, ([x, dy, weight], epsilon));
    dx
}

#[inline(always)]
fn norm_slopes(([x, dy, weight], epsilon): ([&[f32]; 3], f32), first: usize, dx: &mut [f32]) {
    let n = weight.len();
    let rows = x[first * n..]
        .chunks_exact(n)
        .zip(dy[first * n..].chunks_exact(n));
    for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(n)) {
        norm_slope(x, dy, dx, weight, epsilon);
    }
}

/// One row of [`rms_norm_backward`].
#[inline(always)]
fn norm_slope(x: &[f32], dy: &[f32], dx: &mut [f32], weight: &[f32], epsilon: f32) {
    let n = weight.len() as f32;
    let inverse = 1.0 / (dot(x, x) / n + epsilon).sqrt();
    for ((g, dy), w) in dx.iter_mut().zip(dy).zip(weight) {
        *g = dy * w;
    }
    let shared = dot(dx, x) / n * inverse * inverse;
    for (g, x) in dx.iter_mut().zip(x) {
        *g = (*g - x * shared) * inverse;
    }
}

/// `f(gate) · up` of rows `[gate, up]`.
pub(super) fn gated(activation: Activation, both: &[f32], width: usize) -> Vec<f32> {
    let mut inner = vec![0.0; both.len() / 2];
    by_rows(&mut inner, width, gated_from, (activation, both, width));
    inner
}

#[inline(always)]
fn gated_from((activation, both, width): (Activation, &[f32], usize), first: usize, inner: &mut [f32]) {
    gated_rows(activation, &both[first * 2 * width..], inner, width);
}

/// [`gated`] into `inner`, on this thread.
#[inline(always)]
pub(super) fn gated_rows(activation: Activation, both: &[f32], inner: &mut [f32], width: usize) {
    for (row, inner) in both.chunks_exact(2 * width).zip(inner.chunks_exact_mut(width)) {
        let (gate, up) = row.split_at(width);
        let gate_up = gate.iter().zip(up);
        match activation {
            Activation::Silu => {
                for (inner, (g, u)) in inner.iter_mut().zip(gate_up) {
                    *inner = g * sigmoid(*g) * u;
                }
            }
            Activation::GeluTanh => {
                for (inner, (g, u)) in inner.iter_mut().zip(gate_up) {
                    *inner = gelu(*g).0 * u;
                }
            }
        }
    }
}

/// The gradient of the input of [`gated`].
pub(super) fn gated_backward(
    activation: Activation,
    both: &[f32],
    d_inner: &[f32],
    width: usize,
) -> Vec<f32> {
    let mut d_both = vec![0.0; both.len()];
    by_rows(
        &mut d_both,
        2 * width,
        gate_slopes,
        (activation, [both, d_inner], width),
    );
    d_both
}

#[inline(always)]
fn gate_slopes(
    (activation, [both, d_inner], width): (Activation, [&[f32]; 2], usize),
    first: usize,
    d_both: &mut [f32],
) {
    let rows = both[first * 2 * width..]
        .chunks_exact(2 * width)
        .zip(d_inner[first * width..].chunks_exact(width));
    for ((row, d_inner), d_row) in rows.zip(d_both.chunks_exact_mut(2 * width)) {
        gate_slope(activation, row, d_inner, d_row);
    }
}

/// One row of [`gated_backward`].
#[inline(always)]
fn gate_slope(activation: Activation, row: &[f32], d_inner: &[f32], d_row: &mut [f32]) {
    let (gate, up) = row.split_at(d_inner.len());
    let (d_gate, d_up) = d_row.split_at_mut(d_inner.len());
    let inputs = gate.iter().zip(up).zip(d_inner);
    let slopes = d_gate.iter_mut().zip(d_up);
    match activation {
        Activation::Silu => {
            for (((g, u), d), (d_gate, d_up)) in inputs.zip(slopes) {
                let s = sigmoid(*g);
                *d_gate = d * u * (s * (1.0 + g * (1.0 - s)));
                *d_up = d * (g * s);
            }
        }
        Activation::GeluTanh => {
            for (((g, u), d), (d_gate, d_up)) in inputs.zip(slopes) {
                let (value, slope) = gelu(*g);
                *d_gate = d * u * slope;
                *d_up = d * value;
            }
        }
    }
}

/// GELU by its tanh approximation, and its derivative.
fn gelu(x: f32) -> (f32, f32) {
    const SCALE: f32 = 0.797_884_6;
    const CUBIC: f32 = 0.044_715;
    let t = (SCALE * (x + CUBIC * x * x * x)).tanh();
    let slope = SCALE * (1.0 + 3.0 * CUBIC * x * x);
    (
        0.5 * x * (1.0 + t),
        0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope,
    )
}

/// Rotary tables `[seq, half]`, for the heads in the first columns of rows.
#[derive(Clone, Copy)]
pub(super) struct Rotation<'a> {
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    /// Pairs of a head that are rotated.
    pub half: usize,
    /// 1, or -1 to turn back.
    pub sign: f32,
    /// Heads that are rotated, from the first column on.
    pub heads: usize,
    pub head_dim: usize,
}

impl Rotation<'_> {
    /// Rotates one sequence of rows of `width`, in place.
    pub fn apply(&self, rows: &mut [f32], width: usize) {
        by_rows(rows, width, turn, (*self, width));
    }
}

/// Rotates the rows of `width` from position `first` on, on this thread.
#[inline(always)]
pub(super) fn turn((own, width): (Rotation<'_>, usize), first: usize, rows: &mut [f32]) {
    let half = own.half;
    let tables = own.cos[first * half..]
        .chunks_exact(half)
        .zip(own.sin[first * half..].chunks_exact(half));
    for (row, (cos, sin)) in rows.chunks_exact_mut(width).zip(tables) {
        for vector in row.chunks_exact_mut(own.head_dim).take(own.heads) {
            let (low, rest) = vector.split_at_mut(half);
            for ((a, b), (cos, sin)) in low.iter_mut().zip(rest).zip(cos.iter().zip(sin)) {
                let sin = sin * own.sign;
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

/// RMS norm of each head of `columns` (the first column, and how many heads), in place.
pub(super) fn norm_heads(
    rows: &mut [f32],
    width: usize,
    columns: (usize, usize),
    weight: &[f32],
    epsilon: f32,
) {
    by_rows(rows, width, norm_head_rows, (width, columns, weight, epsilon));
}

/// [`norm_heads`] on this thread.
#[inline(always)]
pub(super) fn norm_head_rows(
    (width, (first, heads), weight, epsilon): (usize, (usize, usize), &[f32], f32),
    _: usize,
    rows: &mut [f32],
) {
    let d = weight.len();
    for row in rows.chunks_exact_mut(width) {
        for vector in row[first..first + heads * d].chunks_exact_mut(d) {
            let inverse = 1.0 / (dot(vector, vector) / d as f32 + epsilon).sqrt();
            for (x, w) in vector.iter_mut().zip(weight) {
                *x = *x * inverse * w;
            }
        }
    }
}

/// The gradient of the input of [`norm_heads`], in place of that of its output; `x` is that input.
pub(super) fn norm_heads_backward(
    x: &[f32],
    d_rows: &mut [f32],
    width: usize,
    columns: (usize, usize),
    weight: &[f32],
    epsilon: f32,
) {
    by_rows(d_rows, width, head_slopes, (x, width, columns, weight, epsilon));
}

type HeadSlopes<'a> = (&'a [f32], usize, (usize, usize), &'a [f32], f32);

#[inline(always)]
fn head_slopes((x, width, (first, heads), weight, epsilon): HeadSlopes<'_>, row: usize, d_rows: &mut [f32]) {
    let d = weight.len();
    let mut slope = vec![0.0; d];
    let rows = x[row * width..]
        .chunks_exact(width)
        .zip(d_rows.chunks_exact_mut(width));
    for (x, d_row) in rows {
        let vectors = x[first..first + heads * d].chunks_exact(d);
        for (x, dy) in vectors.zip(d_row[first..first + heads * d].chunks_exact_mut(d)) {
            norm_slope(x, dy, &mut slope, weight, epsilon);
            dy.copy_from_slice(&slope);
        }
    }
}
