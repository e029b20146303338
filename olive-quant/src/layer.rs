//! The weights of one decoder layer in host memory.

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use olive_core::decoder::{BaseWeight, DecoderLayer};
use olive_core::{Error, LinearRole, LinearSpec, LinearWeight, ModelSpec, Result, TensorSource, WeightKind};

use crate::options::QuantizeOptions;

/// A dense linear of the layer.
#[derive(Debug, Clone)]
pub struct LayerLinear {
    /// Name, role and sizes.
    pub spec: LinearSpec,
    /// `[out, in]`.
    pub weight: Vec<f32>,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
    /// Whether it will be quantized.
    pub converts: bool,
}

impl LayerLinear {
    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.spec.out_features, self.spec.in_features]
    }
}

/// Linears and norms of one layer.
#[derive(Debug, Clone)]
pub struct LayerWeights {
    /// Which layer of the model.
    pub index: usize,
    /// In the order of the forward pass.
    pub linears: Vec<LayerLinear>,
    /// `[hidden]`.
    pub input_norm: Vec<f32>,
    /// `[hidden]`.
    pub post_attention_norm: Vec<f32>,
    /// Tensors that are carried on unchanged: norms of heads, with their names.
    pub head_norms: Vec<(String, Vec<f32>)>,
}

impl LayerWeights {
    /// Reads layer `index` of a dense checkpoint.
    ///
    /// # Errors
    /// Those of reading tensors that must exist with their shapes and be finite; [`Error::Unsupported`] if a linear
    /// is packed.
    pub fn read(
        source: &dyn TensorSource,
        spec: &ModelSpec,
        index: usize,
        options: &QuantizeOptions,
    ) -> Result<Self> {
        let names = spec.layer_names(index);
        let norm = |name: &str, size| source.read_f32_checked(name, &[size]);
        let linears = spec.linears(index).into_iter().map(|linear| {
            let stored = LinearWeight::read(source, spec, &linear)?;
            let WeightKind::Dense(weight, _) = stored.weight else {
                let reason = "quantization starts from dense weights";
                return Err(Error::unsupported(
                    format!("packed linear `{}`", linear.name),
                    reason,
                ));
            };
            Ok(LayerLinear {
                converts: options.converts(&linear),
                spec: linear,
                weight,
                bias: stored.bias,
            })
        });
        let head_norms = [names.q_norm, names.k_norm].into_iter().flatten().map(|name| {
            let values = norm(&name, spec.head_dim)?;
            Ok((name, values))
        });
        Ok(Self {
            index,
            linears: linears.collect::<Result<_>>()?,
            input_norm: norm(&names.input_norm, spec.hidden_size)?,
            post_attention_norm: norm(&names.post_attention_norm, spec.hidden_size)?,
            head_norms: head_norms.collect::<Result<_>>()?,
        })
    }

    /// The linear of this role, if the layer stores one.
    pub fn linear(&self, role: LinearRole) -> Option<&LayerLinear> {
        self.linears.iter().find(|linear| linear.spec.role == role)
    }

    /// As [`LayerWeights::linear`], to be changed.
    pub fn linear_mut(&mut self, role: LinearRole) -> Option<&mut LayerLinear> {
        self.linears.iter_mut().find(|linear| linear.spec.role == role)
    }

    /// `layer` with these weights in place of its own.
    pub fn placed_in<B: Backend>(&self, layer: &DecoderLayer<B>, device: &B::Device) -> DecoderLayer<B> {
        let mut placed = layer.clone();
        let norm =
            |values: &[f32]| Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), device);
        placed.input_norm.weight = norm(&self.input_norm);
        placed.post_attention_norm.weight = norm(&self.post_attention_norm);
        for linear in &self.linears {
            replace_weight(&mut placed, linear.spec.role, linear.weight.clone(), device);
            if let Some(target) = placed.linear_mut(linear.spec.role) {
                target.bias = linear.bias.as_deref().map(norm);
            }
        }
        placed
    }
}

/// Gives the linear of `role` another weight of the same shape.
pub fn replace_weight<B: Backend>(
    layer: &mut DecoderLayer<B>,
    role: LinearRole,
    weight: Vec<f32>,
    device: &B::Device,
) {
    if let Some(linear) = layer.linear_mut(role) {
        let shape = linear.shape();
        linear.weight = BaseWeight::Dense(Tensor::from_data(TensorData::new(weight, shape), device));
    }
}
