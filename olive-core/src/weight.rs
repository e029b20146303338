//! Reading the linears of a checkpoint, whatever kind of weight they are.

use crate::arch::{LinearSpec, ModelSpec, ModuleQuantization, QuantizationConfig};
use crate::checkpoint::TensorSource;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::packed::awq_gemm::{self, AwqTensors};
use crate::packed::nf4::{self, Nf4Matrix};
use crate::packed::olive::StoredPart;
use crate::packed::{QuantMatrix, compressed_tensors, gptq, olive, parts};

/// A weight `[out, in]`.
#[derive(Debug, Clone, PartialEq)]
pub enum WeightKind {
    /// Row-major values and the type in which they were stored.
    Dense(Vec<f32>, DType),
    /// Packed integers.
    Packed(QuantMatrix),
    /// Packed normal floats.
    Nf4(Nf4Matrix),
}

impl WeightKind {
    /// The weight as dense `f32`, row-major `[out, in]`.
    pub fn to_dense(&self) -> Vec<f32> {
        match self {
            Self::Dense(values, _) => values.clone(),
            Self::Packed(matrix) => matrix.dequantize(),
            Self::Nf4(matrix) => matrix.dequantize(),
        }
    }

    /// As [`WeightKind::to_dense`], without a copy where it is dense already.
    pub fn into_dense(self) -> Vec<f32> {
        match self {
            Self::Dense(values, _) => values,
            packed => packed.to_dense(),
        }
    }

    /// Reads `<module>.weight [rows, cols]`: dense, or packed as `quantization` says. A module that is stored dense
    /// is read so, whatever the config says.
    ///
    /// # Errors
    /// [`Error::MissingTensors`], [`Error::Tensor`] or [`Error::NotFinite`] naming the tensor;
    /// [`Error::Unsupported`] for a packed layout that olive does not read.
    pub fn read(
        source: &dyn TensorSource,
        quantization: Option<&QuantizationConfig>,
        module: &str,
        shape: [usize; 2],
    ) -> Result<Self> {
        let dense_name = format!("{module}.weight");
        if let Some(quantization) = quantization
            && packed_parts(source, quantization, module)?.is_some()
        {
            let settings = quantization.module(module)?;
            return Ok(match Method::of(quantization)? {
                Method::Awq => Self::Packed(read_awq(source, module, shape, settings)?),
                Method::Gptq(version) => Self::Packed(gptq::read(source, module, shape, settings, version)?),
                Method::Olive => Self::Packed(olive::read(source, module, shape, settings)?),
                Method::CompressedTensors => {
                    Self::Packed(compressed_tensors::read(source, module, shape, settings)?)
                }
                Method::Nf4 => Self::Nf4(nf4::read(source, module, shape)?),
            });
        }
        let values = source.read_f32_checked(&dense_name, &shape)?;
        Ok(Self::Dense(values, source.require(&dense_name)?.dtype))
    }

    /// The tensors of `module` in the layout of `quantization`; a dense weight is `<module>.weight` in its type.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the weight does not fit the layout; [`Error::Unsupported`] for a layout that olive does
    /// not know.
    pub fn store(&self, quantization: Option<&QuantizationConfig>, module: &str) -> Result<Vec<StoredPart>> {
        let matrix = match self {
            Self::Dense(values, dtype) => {
                let bytes = dtype.from_f32(values);
                let bytes =
                    bytes.ok_or_else(|| Error::tensor(module, "a floating-point type", dtype.to_string()))?;
                return Ok(vec![(
                    format!("{module}.weight"),
                    *dtype,
                    vec![values.len()],
                    bytes,
                )]);
            }
            Self::Nf4(matrix) => return nf4::store(module, matrix),
            Self::Packed(matrix) => matrix,
        };
        let quantization = quantization
            .ok_or_else(|| Error::tensor(module, "a quantization config for a packed weight", "none"))?;
        let named = |parts: Vec<(&str, DType, Vec<usize>, Vec<u8>)>| {
            let name = |part: &str| format!("{module}.{part}");
            let parts = parts.into_iter();
            parts
                .map(|(part, dtype, shape, bytes)| (name(part), dtype, shape, bytes))
                .collect()
        };
        match Method::of(quantization)? {
            Method::Awq => {
                let (rows, groups, stored) = (matrix.rows, matrix.groups(), awq_gemm::store(matrix)?);
                Ok(named(vec![
                    ("qweight", DType::I32, vec![matrix.cols, rows / 8], stored.qweight),
                    ("qzeros", DType::I32, vec![groups, rows / 8], stored.qzeros),
                    ("scales", DType::F16, vec![groups, rows], stored.scales),
                ]))
            }
            Method::Gptq(version) => {
                let stored = gptq::store(matrix, version)?;
                let bytes = [stored.qweight, stored.qzeros, stored.scales, stored.g_idx];
                let parts = gptq::plan(matrix).into_iter().zip(bytes);
                Ok(named(
                    parts
                        .map(|((part, dtype, shape), bytes)| (part, dtype, shape, bytes))
                        .collect(),
                ))
            }
            Method::Olive => olive::store(module, matrix),
            Method::CompressedTensors => compressed_tensors::store(module, matrix),
            Method::Nf4 => Err(Error::tensor(module, "normal floats", "packed integers")),
        }
    }
}

/// The tensors in which a packed `module` is stored, those that exist; `None` if it is stored dense.
///
/// # Errors
/// [`Error::Unsupported`] for a method that olive does not read; [`Error::Config`] for a broken override.
pub fn stored_names(
    source: &dyn TensorSource,
    quantization: &QuantizationConfig,
    module: &str,
) -> Result<Option<Vec<String>>> {
    let parts = packed_parts(source, quantization, module)?;
    let there = |parts: PackedParts| {
        let names = parts.required.into_iter().chain(parts.optional);
        names.filter(|name| source.info(name).is_some()).collect()
    };
    Ok(parts.map(there))
}

/// A linear as it is stored: weight and optional bias.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearWeight {
    /// `[out, in]`.
    pub weight: WeightKind,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
}

impl LinearWeight {
    /// Reads a linear of a layer: dense, or packed as the spec's quantization config says.
    ///
    /// # Errors
    /// [`Error::MissingTensors`], [`Error::Tensor`] or [`Error::NotFinite`] naming the tensor;
    /// [`Error::Unsupported`] for a packed layout that olive does not read.
    pub fn read(source: &dyn TensorSource, spec: &ModelSpec, linear: &LinearSpec) -> Result<Self> {
        let shape = [linear.out_features, linear.in_features];
        let weight = WeightKind::read(source, spec.quantization.as_ref(), &linear.name, shape)?;
        let bias = match linear.bias {
            true => Some(source.read_f32_checked(&format!("{}.bias", linear.name), &[linear.out_features])?),
            false => None,
        };
        Ok(Self { weight, bias })
    }
}

/// The tensors that a packed module is stored in.
pub(crate) struct PackedParts {
    /// Those that must exist.
    pub required: Vec<String>,
    /// Those that may.
    pub optional: Vec<String>,
}

/// The parts of `module`; `None` if it is stored dense. A module with neither is said to be packed if it is one of
/// a decoder layer.
///
/// # Errors
/// [`Error::Unsupported`] for a method that olive does not read; [`Error::Config`] for a broken override.
pub(crate) fn packed_parts(
    source: &dyn TensorSource,
    quantization: &QuantizationConfig,
    module: &str,
) -> Result<Option<PackedParts>> {
    let method = Method::of(quantization)?;
    if method == Method::Nf4 {
        let stored = nf4::stored_parts(source, module);
        return Ok(stored.map(|(required, optional)| PackedParts {
            required: required.into(),
            optional: optional.into(),
        }));
    }
    if source.info(&format!("{module}.weight")).is_some() {
        return Ok(None);
    }
    let zeros = !quantization.module(module)?.symmetric;
    let (required, optional): (Vec<&str>, &[&str]) = match method {
        Method::Awq => (vec!["qweight", "qzeros", "scales"], &[]),
        Method::Gptq(_) => (vec!["qweight", "qzeros", "scales"], &["g_idx"]),
        Method::Olive => {
            let parts = olive::stored_parts(source, module);
            (parts[..if zeros { 3 } else { 2 }].to_vec(), &[])
        }
        Method::CompressedTensors => {
            let zeros = zeros.then_some("weight_zero_point");
            let parts = ["weight_packed", "weight_scale", "weight_shape"];
            (parts.into_iter().chain(zeros).collect(), &["weight_g_idx"])
        }
        Method::Nf4 => (Vec::new(), &[]),
    };
    let name = |part: &&str| format!("{module}.{part}");
    let stored = required.iter().any(|part| source.info(&name(part)).is_some());
    Ok((stored || module.contains(".layers.")).then(|| PackedParts {
        required: required.iter().map(name).collect(),
        optional: optional.iter().map(name).collect(),
    }))
}

/// A packed layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Awq,
    Gptq(gptq::Version),
    Olive,
    CompressedTensors,
    Nf4,
}

impl Method {
    fn of(quantization: &QuantizationConfig) -> Result<Self> {
        let unsupported = |detail: String, reason: &str| {
            let what = format!(
                "a checkpoint with quant_method `{}`{detail}",
                quantization.quant_method
            );
            Err(Error::unsupported(what, reason))
        };
        let version = quantization.version.as_deref().unwrap_or("gemm");
        let format = quantization.format.as_deref().unwrap_or_default();
        let quant_type = quantization.bnb_4bit_quant_type.as_deref().unwrap_or("fp4");
        match quantization.quant_method.as_str() {
            "awq" if version.eq_ignore_ascii_case("gemm") && quantization.bits == 4 => Ok(Self::Awq),
            "awq" => unsupported(
                format!(", version `{version}`, {} bits", quantization.bits),
                "olive reads 4-bit AWQ in the `gemm` layout",
            ),
            "gptq" if quantization.desc_act && quantization.group_size != -1 => unsupported(
                " and `desc_act`".to_owned(),
                "olive reads groups of consecutive inputs",
            ),
            "gptq" => Ok(Self::Gptq(gptq::version(
                quantization.checkpoint_format.as_deref(),
            )?)),
            "olive" => Ok(Self::Olive),
            "compressed-tensors" if format == "pack-quantized" => Ok(Self::CompressedTensors),
            "compressed-tensors" => {
                unsupported(format!(" and format `{format}`"), "olive reads `pack-quantized`")
            }
            "bitsandbytes" if quantization.load_in_4bit && matches!(quant_type, "nf4" | "fp4") => {
                Ok(Self::Nf4)
            }
            "bitsandbytes" => unsupported(
                format!(" and type `{quant_type}`"),
                "olive reads 4-bit `nf4` and `fp4`",
            ),
            _ => unsupported(
                String::new(),
                "olive reads awq, gptq, olive, compressed-tensors and bitsandbytes",
            ),
        }
    }
}

fn read_awq(
    source: &dyn TensorSource,
    name: &str,
    shape: [usize; 2],
    settings: ModuleQuantization,
) -> Result<QuantMatrix> {
    let [rows, cols] = shape;
    let group_size = settings.checked_group(name, shape)?;
    let groups = cols / group_size;
    let read = |part: &str, dtype: DType, shape: [usize; 2]| {
        parts::bytes(source, &format!("{name}.{part}"), dtype, &shape)
    };
    let tensors = AwqTensors {
        qweight: read("qweight", DType::I32, [cols, rows / 8])?,
        qzeros: read("qzeros", DType::I32, [groups, rows / 8])?,
        scales: read("scales", DType::F16, [groups, rows])?,
    };
    let matrix = awq_gemm::load(name, shape, group_size, &tensors)?;
    let found = matrix.scales.iter().filter(|scale| !scale.is_finite()).count();
    if found > 0 {
        let what = format!("tensor `{name}.scales`");
        return Err(Error::NotFinite { what, found });
    }
    Ok(matrix)
}
