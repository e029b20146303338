//! RMS norm, `y = x / √(mean(x²) + ε) · w` over the last dimension, with its backward for a frozen `w`.

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};

use super::host::{self, HostTensor};
use crate::checkpoint::TensorSource;
use crate::error::Result;

/// An RMS norm with a frozen weight.
#[derive(Debug, Clone)]
pub struct RmsNorm<B: Backend> {
    /// `[features]`.
    pub weight: Tensor<B, 1>,
    /// `ε`.
    pub epsilon: f64,
}

impl<B: Backend> RmsNorm<B> {
    /// Reads the weight `name [features]`.
    ///
    /// # Errors
    /// Those of reading a tensor that must exist with that shape and be finite.
    pub fn load(
        source: &dyn TensorSource,
        name: &str,
        features: usize,
        epsilon: f64,
        device: &B::Device,
    ) -> Result<Self> {
        let values = source.read_f32_checked(name, &[features])?;
        let weight = Tensor::from_data(TensorData::new(values, [features]), device);
        Ok(Self { weight, epsilon })
    }

    /// `1 / √(mean(x²) + ε)`, one number for each vector.
    fn inverse<const D: usize>(&self, x: &Tensor<B, D>) -> Tensor<B, D> {
        let mean = (x.clone() * x.clone()).mean_dim(D - 1);
        mean.add_scalar(self.epsilon).sqrt().recip()
    }

    /// Normalises the last dimension.
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        if let (Some(values), Some(weight)) = (HostTensor::of(&x), HostTensor::of(&self.weight)) {
            let y = host::rms_norm(values.values(), weight.values(), self.epsilon as f32);
            return host::tensor(y, x.dims(), &x.device());
        }
        let inverse = self.inverse(&x);
        x * inverse * self.weight.clone().unsqueeze::<D>()
    }

    /// The gradient of `x` from that of `y`:
    /// `dx = i · (g - x · i² · mean(g · x))` with `g = dy · w` and `i` the inverse root.
    pub fn backward<const D: usize>(&self, x: &Tensor<B, D>, dy: Tensor<B, D>) -> Tensor<B, D> {
        let host = (
            HostTensor::of(x),
            HostTensor::of(&dy),
            HostTensor::of(&self.weight),
        );
        if let (Some(values), Some(slope), Some(weight)) = host {
            let epsilon = self.epsilon as f32;
            let dx = host::rms_norm_backward(values.values(), slope.values(), weight.values(), epsilon);
            return host::tensor(dx, x.dims(), &x.device());
        }
        let inverse = self.inverse(x);
        let g = dy * self.weight.clone().unsqueeze::<D>();
        let mean = (g.clone() * x.clone()).mean_dim(D - 1);
        let shared = mean * inverse.clone() * inverse.clone();
        (g - x.clone() * shared) * inverse
    }
}
