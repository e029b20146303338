//! Reading the linears of a checkpoint, whatever kind of weight they are.

use crate::arch::{LinearSpec, ModelSpec};
use crate::checkpoint::TensorSource;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::packed::QuantMatrix;
use crate::packed::awq_gemm::{self, AwqTensors};

/// A weight `[out, in]`.
#[derive(Debug, Clone, PartialEq)]
pub enum WeightKind {
    /// Row-major values and the type in which they were stored.
    Dense(Vec<f32>, DType),
    /// Packed integers.
    Packed(QuantMatrix),
}

impl WeightKind {
    /// The weight as dense `f32`, row-major `[out, in]`.
    pub fn to_dense(&self) -> Vec<f32> {
        match self {
            Self::Dense(values, _) => values.clone(),
            Self::Packed(matrix) => matrix.dequantize(),
        }
    }
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
        let dense_name = format!("{}.weight", linear.name);
        let weight = match (source.info(&dense_name), &spec.quantization) {
            (None, Some(quantization)) => {
                let matrix = read_packed(source, &linear.name, shape, quantization)?;
                let bad = matrix.scales.iter().filter(|s| !s.is_finite()).count();
                if bad > 0 {
                    return Err(Error::NotFinite {
                        what: format!("tensor `{}.scales`", linear.name),
                        found: bad,
                    });
                }
                WeightKind::Packed(matrix)
            }
            _ => {
                let values = source.read_f32_checked(&dense_name, &shape)?;
                WeightKind::Dense(values, source.require(&dense_name)?.dtype)
            }
        };
        let bias = match linear.bias {
            true => Some(source.read_f32_checked(&format!("{}.bias", linear.name), &[linear.out_features])?),
            false => None,
        };
        Ok(Self { weight, bias })
    }
}

fn read_packed(
    source: &dyn TensorSource,
    name: &str,
    shape: [usize; 2],
    quantization: &crate::arch::QuantizationConfig,
) -> Result<QuantMatrix> {
    let [rows, cols] = shape;
    let group_size = match quantization.group_size {
        -1 => cols,
        size => usize::try_from(size).unwrap_or(0),
    };
    let version = quantization.version.as_deref().unwrap_or("gemm");
    if quantization.quant_method != "awq" || !version.eq_ignore_ascii_case("gemm") || quantization.bits != 4 {
        let what = format!(
            "a checkpoint with quant_method `{}`, version `{version}`, {} bits",
            quantization.quant_method, quantization.bits
        );
        return Err(Error::unsupported(
            what,
            "olive reads 4-bit AWQ in the `gemm` layout",
        ));
    }
    if group_size == 0 || !cols.is_multiple_of(group_size) {
        let expected = format!("a group size that divides {cols} inputs");
        return Err(Error::tensor(name, expected, quantization.group_size.to_string()));
    }
    let groups = cols / group_size;
    let read = |part: &str, dtype: DType, shape: [usize; 2]| -> Result<Vec<u8>> {
        let name = format!("{name}.{part}");
        let info = source.require(&name)?;
        if info.dtype != dtype || info.shape != shape {
            return Err(Error::tensor(
                &name,
                format!("{dtype}{shape:?}"),
                info.to_string(),
            ));
        }
        Ok(source.bytes(&name)?.into_owned())
    };
    let tensors = AwqTensors {
        qweight: read("qweight", DType::I32, [cols, rows / 8])?,
        qzeros: read("qzeros", DType::I32, [groups, rows / 8])?,
        scales: read("scales", DType::F16, [groups, rows])?,
    };
    awq_gemm::load(name, shape, group_size, &tensors)
}
