//! The weights of one layer on the device, as they are scaled and clipped.

use olive_core::cuda::{DeviceLayer, DeviceWeight, Gpu, Matrix, PackedAwq};
use olive_core::{Error, LinearRole, LinearSpec, ModelSpec, Result, TensorSource};

use crate::encode::Encoded;
use crate::layer::{LayerLinear, LayerWeights};
use crate::options::QuantizeOptions;
use crate::quantizer::awq::mapping::{Mapping, Producer};

/// A dense linear of the layer.
pub(super) struct DeviceLinearWeight {
    pub spec: LinearSpec,
    /// `[out, in]`, single precision.
    pub weight: Matrix,
    pub converts: bool,
}

/// Linears on the device; norms and biases on the host.
pub(super) struct DeviceLayerWeights {
    pub linears: Vec<DeviceLinearWeight>,
    /// Without the values of linears.
    host: LayerWeights,
}

impl DeviceLayerWeights {
    /// Those of `layer`, whose linears must be dense.
    ///
    /// # Errors
    /// Those of reading norms and biases; [`Error::Unsupported`] if a linear is packed.
    pub fn new(
        gpu: &Gpu,
        source: &dyn TensorSource,
        spec: &ModelSpec,
        layer: &DeviceLayer,
        options: &QuantizeOptions,
    ) -> Result<Self> {
        let names = spec.layer_names(layer.index);
        let norm = |name: &str| source.read_f32_checked(name, &[spec.hidden_size]);
        let mut linears = Vec::new();
        let mut host = Vec::new();
        for linear in spec.linears(layer.index) {
            let Some(DeviceWeight::Dense(weight)) = layer.linear(linear.role).map(|own| &own.weight) else {
                let reason = "quantization starts from dense weights";
                return Err(Error::unsupported(
                    format!("packed linear `{}`", linear.name),
                    reason,
                ));
            };
            let bias = match linear.bias {
                true => {
                    Some(source.read_f32_checked(&format!("{}.bias", linear.name), &[linear.out_features])?)
                }
                false => None,
            };
            let converts = options.converts(&linear);
            linears.push(DeviceLinearWeight {
                weight: gpu.widen(weight),
                spec: linear.clone(),
                converts,
            });
            host.push(LayerLinear {
                spec: linear,
                weight: Vec::new(),
                bias,
                converts,
            });
        }
        Ok(Self {
            linears,
            host: LayerWeights {
                index: layer.index,
                linears: host,
                input_norm: norm(&names.input_norm)?,
                post_attention_norm: norm(&names.post_attention_norm)?,
                head_norms: Vec::new(),
            },
        })
    }

    pub fn linear(&self, role: LinearRole) -> Option<&DeviceLinearWeight> {
        self.linears.iter().find(|linear| linear.spec.role == role)
    }

    /// Moves the scales of a mapping: as [`crate::quantizer::awq::scale::apply`].
    ///
    /// # Errors
    /// [`Error::Tensor`] if the producer does not have a row for each scale.
    pub fn apply(&mut self, gpu: &Gpu, mapping: &Mapping, scales: &[f32]) -> Result<()> {
        let columns = gpu.upload_f32(scales, 1, scales.len());
        for role in &mapping.roles {
            if let Some(linear) = self.linear(*role) {
                gpu.scale_columns(&linear.weight, &columns);
            }
        }
        let role = match mapping.producer {
            Producer::InputNorm => {
                divide(&mut self.host.input_norm, scales);
                return Ok(());
            }
            Producer::PostAttentionNorm => {
                divide(&mut self.host.post_attention_norm, scales);
                return Ok(());
            }
            Producer::LastRows(role) => role,
        };
        let own = mapping.sharing.own(scales);
        let Some(linear) = self.linear(role) else {
            return Ok(());
        };
        let rows = linear.spec.out_features;
        let Some(first) = rows.checked_sub(own.len()) else {
            let expected = format!("at least {} output features", own.len());
            return Err(Error::tensor(&linear.spec.name, expected, rows.to_string()));
        };
        let last = linear.weight.rows(first, own.len());
        gpu.divide_rows(&last, &gpu.upload_f32(&own, 1, own.len()), false);
        let host = self
            .host
            .linears
            .iter_mut()
            .find(|linear| linear.spec.role == role);
        if let Some(bias) = host.and_then(|linear| linear.bias.as_mut()) {
            divide(&mut bias[first..], &own);
        }
        Ok(())
    }

    /// `layer` with these weights, rounded to bfloat16, and norms in place of its own.
    pub fn placed_in(&self, gpu: &Gpu, layer: &DeviceLayer) -> DeviceLayer {
        let mut placed = layer.clone();
        let upload = |values: &[f32]| gpu.upload_f32(values, 1, values.len());
        placed.input_norm = upload(&self.host.input_norm);
        placed.post_attention_norm = upload(&self.host.post_attention_norm);
        for (linear, host) in self.linears.iter().zip(&self.host.linears) {
            if let Some(target) = placed.linear_mut(linear.spec.role) {
                target.weight = DeviceWeight::Dense(gpu.round(&linear.weight));
                target.bias = host.bias.as_deref().map(upload);
            }
        }
        placed
    }

    /// Rounds and packs the linears that are quantized; what else the layer stores stays as it is.
    ///
    /// # Errors
    /// Those of [`Gpu::pack_awq`].
    pub fn pack(self, gpu: &Gpu, options: &QuantizeOptions) -> Result<PackedLayer> {
        let linears = self.linears.into_iter().map(|linear| {
            let name = linear.spec.name;
            let content = match linear.converts {
                true => {
                    let group_size = options.group_for(linear.spec.in_features);
                    let packed = gpu.pack_awq(&format!("{name}.weight"), &linear.weight, group_size)?;
                    Content::Packed(Box::new(packed))
                }
                false => Content::Dense(linear.weight),
            };
            Ok((name, content))
        });
        Ok(PackedLayer {
            linears: linears.collect::<Result<_>>()?,
            host: self.host,
        })
    }
}

/// A finished linear on the device.
enum Content {
    Packed(Box<PackedAwq>),
    Dense(Matrix),
}

/// A finished layer, its linears on the device.
pub(super) struct PackedLayer {
    linears: Vec<(String, Content)>,
    host: LayerWeights,
}

impl PackedLayer {
    /// Norms, biases and dense linears, and of each packed linear its tensors and the error of its rounding.
    ///
    /// # Errors
    /// Those of [`Gpu::unload_awq`].
    pub fn unload(mut self, gpu: &Gpu) -> Result<(LayerWeights, Vec<Encoded>, Vec<f64>)> {
        let (mut tensors, mut errors) = (Vec::new(), Vec::new());
        for ((name, content), host) in self.linears.iter().zip(&mut self.host.linears) {
            match content {
                Content::Dense(weight) => {
                    host.weight = gpu.download_f32(weight)?;
                    errors.push(0.0);
                }
                Content::Packed(packed) => {
                    let (parts, error) = gpu.unload_awq(&format!("{name}.weight"), packed)?;
                    tensors.extend([
                        (format!("{name}.qweight"), parts.qweight),
                        (format!("{name}.qzeros"), parts.qzeros),
                        (format!("{name}.scales"), parts.scales),
                    ]);
                    errors.push(error);
                }
            }
        }
        Ok((self.host, tensors, errors))
    }
}

fn divide(values: &mut [f32], scales: &[f32]) {
    for (value, scale) in values.iter_mut().zip(scales) {
        *value /= scale;
    }
}
