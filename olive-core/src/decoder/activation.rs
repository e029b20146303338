//! The gate's activation and its derivative.

use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;
use burn::tensor::backend::Backend;

use super::host::{self, HostTensor};
use crate::arch::Activation;

/// `√(2/π)` of GELU's tanh approximation.
const GELU_SCALE: f64 = 0.797_884_560_802_865_4;
const GELU_CUBIC: f64 = 0.044_715;

/// `f(x)`.
pub fn forward<B: Backend>(activation: Activation, x: Tensor<B, 2>) -> Tensor<B, 2> {
    match activation {
        Activation::Silu => x.clone() * sigmoid(x),
        Activation::GeluTanh => {
            let tanh = gelu_tanh(&x);
            (x * tanh.add_scalar(1.0)).mul_scalar(0.5)
        }
    }
}

/// `f'(x)`.
pub fn derivative<B: Backend>(activation: Activation, x: Tensor<B, 2>) -> Tensor<B, 2> {
    match activation {
        // s (1 + x (1 - s))
        Activation::Silu => {
            let s = sigmoid(x.clone());
            s.clone() * (x * s.neg().add_scalar(1.0)).add_scalar(1.0)
        }
        // ½ (1 + t) + ½ x (1 - t²) c (1 + 3 k x²)
        Activation::GeluTanh => {
            let t = gelu_tanh(&x);
            let slope = (x.clone() * x.clone())
                .mul_scalar(3.0 * GELU_CUBIC)
                .add_scalar(1.0)
                .mul_scalar(GELU_SCALE);
            let curve = (t.clone() * t.clone()).neg().add_scalar(1.0);
            (t.add_scalar(1.0) + x * curve * slope).mul_scalar(0.5)
        }
    }
}

/// `f(gate) · up` of rows `[gate, up]`: `[n, 2 width]` to `[n, width]`.
pub fn gated<B: Backend>(activation: Activation, both: &Tensor<B, 2>) -> Tensor<B, 2> {
    let [n, width] = both.dims();
    if let Some(values) = HostTensor::of(both) {
        let inner = host::gated(activation, values.values(), width / 2);
        return host::tensor(inner, [n, width / 2], &both.device());
    }
    let (gate, up) = halves(both);
    forward(activation, gate) * up
}

/// The gradient of the input of [`gated`] from that of its output.
pub fn gated_backward<B: Backend>(
    activation: Activation,
    both: &Tensor<B, 2>,
    d_inner: Tensor<B, 2>,
) -> Tensor<B, 2> {
    let [n, width] = both.dims();
    if let (Some(values), Some(slopes)) = (HostTensor::of(both), HostTensor::of(&d_inner)) {
        let d_both = host::gated_backward(activation, values.values(), slopes.values(), width / 2);
        return host::tensor(d_both, [n, width], &both.device());
    }
    let (gate, up) = halves(both);
    let d_up = d_inner.clone() * forward(activation, gate.clone());
    let d_gate = d_inner * up * derivative(activation, gate);
    Tensor::cat(vec![d_gate, d_up], 1)
}

fn halves<B: Backend>(both: &Tensor<B, 2>) -> (Tensor<B, 2>, Tensor<B, 2>) {
    let [n, width] = both.dims();
    let part = |from: usize, to: usize| both.clone().slice([0..n, from..to]);
    (part(0, width / 2), part(width / 2, width))
}

fn gelu_tanh<B: Backend>(x: &Tensor<B, 2>) -> Tensor<B, 2> {
    let cubic = (x.clone() * x.clone() * x.clone()).mul_scalar(GELU_CUBIC);
    (x.clone() + cubic).mul_scalar(GELU_SCALE).tanh()
}
