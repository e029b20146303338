//! Products of the decoder's tensors: the shared kernels where tensors are in host memory, the backend elsewhere.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use super::host::{self, HostTensor};
use crate::kernels::{View, product_parallel};

fn view<'a>(values: &'a HostTensor, shape: [usize; 2]) -> View<'a> {
    View::new(values.values(), shape, shape[1].max(1))
}

/// `scale · x wᵀ`: `[n, in]` and `[out, in]` to `[n, out]`.
pub(super) fn times_transposed<B: Backend>(x: &Tensor<B, 2>, w: &Tensor<B, 2>, scale: f64) -> Tensor<B, 2> {
    let ([n, _], [out, _]) = (x.dims(), w.dims());
    if let (Some(a), Some(b)) = (HostTensor::of(x), HostTensor::of(w)) {
        let (a, b) = (view(&a, x.dims()), view(&b, w.dims()).transposed());
        return on_host([n, out], scale, a, b, &x.device());
    }
    scaled(x.clone().matmul(w.clone().transpose()), scale)
}

/// `scale · x w`: `[n, out]` and `[out, in]` to `[n, in]`.
pub(super) fn times<B: Backend>(x: &Tensor<B, 2>, w: &Tensor<B, 2>, scale: f64) -> Tensor<B, 2> {
    let ([n, _], [_, inputs]) = (x.dims(), w.dims());
    if let (Some(a), Some(b)) = (HostTensor::of(x), HostTensor::of(w)) {
        let (a, b) = (view(&a, x.dims()), view(&b, w.dims()));
        return on_host([n, inputs], scale, a, b, &x.device());
    }
    scaled(x.clone().matmul(w.clone()), scale)
}

/// `scale · aᵀ b`: `[n, p]` and `[n, q]` to `[p, q]`.
pub(super) fn transposed_times<B: Backend>(a: &Tensor<B, 2>, b: &Tensor<B, 2>, scale: f64) -> Tensor<B, 2> {
    let ([_, p], [_, q]) = (a.dims(), b.dims());
    if let (Some(left), Some(right)) = (HostTensor::of(a), HostTensor::of(b)) {
        let (left, right) = (view(&left, a.dims()).transposed(), view(&right, b.dims()));
        return on_host([p, q], scale, left, right, &a.device());
    }
    scaled(a.clone().transpose().matmul(b.clone()), scale)
}

/// `y + scale · x wᵀ`.
pub(super) fn add_times_transposed<B: Backend>(
    y: Tensor<B, 2>,
    x: &Tensor<B, 2>,
    w: &Tensor<B, 2>,
    scale: f64,
) -> Tensor<B, 2> {
    if let (Some(a), Some(b)) = (HostTensor::of(x), HostTensor::of(w)) {
        return add_on_host(y, scale, view(&a, x.dims()), view(&b, w.dims()).transposed());
    }
    y + scaled(x.clone().matmul(w.clone().transpose()), scale)
}

/// `y + scale · x w`.
pub(super) fn add_times<B: Backend>(
    y: Tensor<B, 2>,
    x: &Tensor<B, 2>,
    w: &Tensor<B, 2>,
    scale: f64,
) -> Tensor<B, 2> {
    if let (Some(a), Some(b)) = (HostTensor::of(x), HostTensor::of(w)) {
        return add_on_host(y, scale, view(&a, x.dims()), view(&b, w.dims()));
    }
    y + scaled(x.clone().matmul(w.clone()), scale)
}

/// `a + b`; takes the memory of the one that nobody else holds.
pub(super) fn add<B: Backend>(a: Tensor<B, 2>, b: Tensor<B, 2>) -> Tensor<B, 2> {
    let (shape, device) = (b.dims(), b.device());
    match HostTensor::of(&a) {
        Some(other) => {
            let mut values = host::take(b);
            host::add(&mut values, other.values());
            host::tensor(values, shape, &device)
        }
        None => a + b,
    }
}

fn scaled<B: Backend>(x: Tensor<B, 2>, scale: f64) -> Tensor<B, 2> {
    if scale == 1.0 { x } else { x.mul_scalar(scale) }
}

fn on_host<B: Backend>(
    shape: [usize; 2],
    scale: f64,
    a: View<'_>,
    b: View<'_>,
    device: &B::Device,
) -> Tensor<B, 2> {
    let mut out = vec![0.0; shape[0] * shape[1]];
    product_parallel(&mut out, shape[1], false, scale as f32, a, b);
    host::tensor(out, shape, device)
}

fn add_on_host<B: Backend>(y: Tensor<B, 2>, scale: f64, a: View<'_>, b: View<'_>) -> Tensor<B, 2> {
    let (shape, device) = (y.dims(), y.device());
    let mut values = host::take(y);
    product_parallel(&mut values, shape[1], true, scale as f32, a, b);
    host::tensor(values, shape, &device)
}
