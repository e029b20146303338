//! Single-pass kernels for tensors that the backend keeps in host memory.
//!
//! Burn's CPU backend walks broadcast and transposed operands element by element; what is not a matrix product in a
//! layer is done here in one pass over plain slices instead. Every kernel has its formula in plain Burn operations
//! beside it, which other backends run and against which the tests compare.

use std::any::Any;

use burn::backend::flex::FlexTensor;
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};

use super::Cpu;
use crate::arch::Activation;

/// Numbers that are summed side by side, so that a sum keeps its order whatever the vector width.
const LANES: usize = 16;

/// A contiguous `f32` tensor in host memory.
pub(super) struct HostTensor(FlexTensor);

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

/// A tensor from host memory.
pub(super) fn tensor<B: Backend, const D: usize>(
    values: Vec<f32>,
    shape: [usize; D],
    device: &B::Device,
) -> Tensor<B, D> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// `Σ a b`, in lanes.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + rest
}

/// `eˣ` within two units in the last place for `x <= 88`; 0 below -87.3. Without branches, so that loops over it
/// become vector code.
#[inline]
pub(super) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, the first exact in few bits.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting it rounds to a whole number.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.3, 88.0);
    let n = (clamped * LOG2_E + ROUND) - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    // Taylor's coefficients, adjusted to |r| <= ln 2 / 2 (Cephes).
    let p = 1.987_569_1e-4f32;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let power = f32::from_bits((((n as i32) + 127) << 23) as u32);
    let value = (p * r * r + r + 1.0) * power;
    if x < -87.3 { 0.0 } else { value }
}

#[inline]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x.max(-88.0)))
}

/// RMS norm of rows of `weight.len()` elements.
pub(super) fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let n = weight.len();
    let mut y = vec![0.0; x.len()];
    for (x, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
        let inverse = 1.0 / (dot(x, x) / n as f32 + epsilon).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * inverse * w;
        }
    }
    y
}

/// The gradient of the input of [`rms_norm`].
pub(super) fn rms_norm_backward(x: &[f32], dy: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let n = weight.len();
    let mut dx = vec![0.0; x.len()];
    for ((x, dy), dx) in x
        .chunks_exact(n)
        .zip(dy.chunks_exact(n))
        .zip(dx.chunks_exact_mut(n))
    {
        let inverse = 1.0 / (dot(x, x) / n as f32 + epsilon).sqrt();
        for ((g, dy), w) in dx.iter_mut().zip(dy).zip(weight) {
            *g = dy * w;
        }
        let shared = dot(dx, x) / n as f32 * inverse * inverse;
        for (g, x) in dx.iter_mut().zip(x) {
            *g = (*g - x * shared) * inverse;
        }
    }
    dx
}

/// `f(gate) · up` of rows `[gate, up]`.
pub(super) fn gated(activation: Activation, both: &[f32], width: usize) -> Vec<f32> {
    let mut inner = vec![0.0; both.len() / 2];
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
    inner
}

/// The gradient of the input of [`gated`].
pub(super) fn gated_backward(
    activation: Activation,
    both: &[f32],
    d_inner: &[f32],
    width: usize,
) -> Vec<f32> {
    let mut d_both = vec![0.0; both.len()];
    for ((row, d_inner), d_row) in both
        .chunks_exact(2 * width)
        .zip(d_inner.chunks_exact(width))
        .zip(d_both.chunks_exact_mut(2 * width))
    {
        let (gate, up) = row.split_at(width);
        let (d_gate, d_up) = d_row.split_at_mut(width);
        for i in 0..width {
            let (value, slope) = match activation {
                Activation::Silu => {
                    let s = sigmoid(gate[i]);
                    (gate[i] * s, s * (1.0 + gate[i] * (1.0 - s)))
                }
                Activation::GeluTanh => gelu(gate[i]),
            };
            d_gate[i] = d_inner[i] * up[i] * slope;
            d_up[i] = d_inner[i] * value;
        }
    }
    d_both
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

/// Where the heads of a tensor are: columns `first..first + heads * head_dim` of rows of `width`.
#[derive(Clone, Copy)]
pub(super) struct HeadColumns {
    pub width: usize,
    pub first: usize,
    pub heads: usize,
    pub head_dim: usize,
}

/// `[batch * seq, width]` to `[batch, heads, seq, head_dim]`.
pub(super) fn split_heads(rows: &[f32], batch: usize, columns: HeadColumns) -> Vec<f32> {
    let HeadColumns {
        width,
        first,
        heads,
        head_dim,
    } = columns;
    let seq = rows.len() / width / batch;
    let mut out = Vec::with_capacity(batch * heads * seq * head_dim);
    for sequence in rows.chunks_exact(seq * width) {
        for head in 0..heads {
            let at = first + head * head_dim;
            for row in sequence.chunks_exact(width) {
                out.extend_from_slice(&row[at..at + head_dim]);
            }
        }
    }
    out
}

/// The inverse of [`split_heads`], into columns of `rows`.
pub(super) fn merge_heads(values: &[f32], rows: &mut [f32], batch: usize, columns: HeadColumns) {
    let HeadColumns {
        width,
        first,
        heads,
        head_dim,
    } = columns;
    let seq = rows.len() / width / batch;
    let mut parts = values.chunks_exact(head_dim);
    for sequence in rows.chunks_exact_mut(seq * width) {
        for head in 0..heads {
            let at = first + head * head_dim;
            for (row, part) in sequence.chunks_exact_mut(width).zip(parts.by_ref()) {
                row[at..at + head_dim].copy_from_slice(part);
            }
        }
    }
}

/// Rotates the first `2 half` elements of vectors of `head_dim` by the tables `[seq, half]`, in place; `sign` -1 turns
/// back.
pub(super) fn rotate(x: &mut [f32], head_dim: usize, (cos, sin): (&[f32], &[f32]), half: usize, sign: f32) {
    for sequence in x.chunks_exact_mut(cos.len() / half * head_dim) {
        let tables = cos.chunks_exact(half).zip(sin.chunks_exact(half));
        for (vector, (cos, sin)) in sequence.chunks_exact_mut(head_dim).zip(tables) {
            let (first, rest) = vector.split_at_mut(half);
            for ((a, b), (cos, sin)) in first.iter_mut().zip(rest).zip(cos.iter().zip(sin)) {
                let sin = sin * sign;
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

/// Which scores `[rows, keys]` of a block are seen: row `r` is query `first_query + r % queries`.
#[derive(Clone, Copy)]
pub(super) struct CausalRows {
    pub first_query: usize,
    pub queries: usize,
    pub first_key: usize,
    pub keys: usize,
    pub window: usize,
}

impl CausalRows {
    fn seen(&self, row: usize) -> std::ops::Range<usize> {
        let query = self.first_query + row % self.queries;
        let oldest = (query + 1).saturating_sub(self.window).max(self.first_key);
        oldest - self.first_key..query + 1 - self.first_key
    }
}

/// Softmax of each row over the keys that it sees, in place; 0 elsewhere.
pub(super) fn causal_softmax(scores: &mut [f32], rows: CausalRows) {
    for (index, row) in scores.chunks_exact_mut(rows.keys).enumerate() {
        let seen = rows.seen(index);
        row[..seen.start].fill(0.0);
        row[seen.end..].fill(0.0);
        let row = &mut row[seen];
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (chunks, rest) = row.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane = if *x > *lane { *x } else { *lane };
            }
        }
        let largest = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, x| m.max(*x));
        row.iter_mut().for_each(|x| *x = exp(*x - largest));
        let inverse = 1.0 / sum(row);
        row.iter_mut().for_each(|x| *x *= inverse);
    }
}

/// `Σ a`, in lanes.
fn sum(a: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = a.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, a) in lanes.iter_mut().zip(chunk) {
            *lane += a;
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

/// `dS = P ∘ (dP - rowsum(dO ∘ O))`, into `dp`; `p` is 0 where a key is not seen.
pub(super) fn softmax_backward(p: &[f32], dp: &mut [f32], row_sums: &[f32]) {
    let keys = p.len() / row_sums.len().max(1);
    let rows = p.chunks_exact(keys).zip(dp.chunks_exact_mut(keys));
    for ((p, dp), row_sum) in rows.zip(row_sums) {
        for (dp, p) in dp.iter_mut().zip(p) {
            *dp = p * (*dp - row_sum);
        }
    }
}

/// `rowsum(a ∘ b)` of rows of `width`.
pub(super) fn row_dots(a: &[f32], b: &[f32], width: usize) -> Vec<f32> {
    let rows = a.chunks_exact(width).zip(b.chunks_exact(width));
    rows.map(|(a, b)| dot(a, b)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_accurate_and_saturates() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01 + 0.000_37;
            let exact = f64::from(x).exp();
            let relative = (f64::from(exp(x)) / exact - 1.0).abs();
            assert!(relative < 2.5e-7, "{x}: {relative}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-200.0), 0.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(sigmoid(-1000.0) < 1e-37 && sigmoid(1000.0) == 1.0);
    }

    #[test]
    fn heads_are_split_and_merged_back() {
        let columns = HeadColumns {
            width: 14,
            first: 3,
            heads: 2,
            head_dim: 4,
        };
        let rows: Vec<f32> = (0..2 * 5 * 14).map(|i| i as f32).collect();
        let heads = split_heads(&rows, 2, columns);
        // Batch 1, head 1, position 2, element 3.
        assert_eq!(heads[((2 + 1) * 5 + 2) * 4 + 3], rows[(5 + 2) * 14 + 3 + 4 + 3]);
        let mut back = vec![-1.0; rows.len()];
        merge_heads(&heads, &mut back, 2, columns);
        for (i, (found, expected)) in back.iter().zip(&rows).enumerate() {
            let inside = (3..11).contains(&(i % 14));
            assert_eq!(*found, if inside { *expected } else { -1.0 });
        }
    }

    #[test]
    fn softmax_sees_the_window_only() {
        let rows = CausalRows {
            first_query: 4,
            queries: 2,
            first_key: 2,
            keys: 4,
            window: 2,
        };
        let mut scores = vec![0.0; 4 * 4];
        causal_softmax(&mut scores, rows);
        let expected = [0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.5, 0.5].repeat(2);
        assert_eq!(scores[4..8], expected[4..8]);
        assert_eq!(scores, expected);
    }
}
