//! Linears on the device: a frozen weight in bfloat16 or packed, an optional bias, an optional low-rank part.

use rayon::prelude::*;

use super::device::Gpu;
use super::gemm::Product;
use super::kernels::{DevicePacked, Dropout, NormalFloats};
use super::matrix::{Element, Matrix, View};
use crate::arch::{LinearRole, LinearSpec, ModelSpec};
use crate::checkpoint::TensorSource;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::weight::{LinearWeight, WeightKind};

/// A frozen weight `[out, in]` in device memory.
#[derive(Debug, Clone)]
pub enum DeviceWeight {
    /// In bfloat16.
    Dense(Matrix),
    /// Packed integers.
    Packed(DevicePacked),
    /// Packed normal floats.
    Nf4(NormalFloats),
}

impl DeviceWeight {
    /// The weight in bfloat16; a packed one is dequantized into `scratch`, which the next one overwrites.
    pub fn dense(&self, gpu: &Gpu, scratch: &Matrix) -> Matrix {
        let [rows, cols] = match self {
            Self::Dense(weight) => return weight.clone(),
            Self::Packed(packed) => packed.shape,
            Self::Nf4(packed) => packed.shape,
        };
        let weight = scratch.part(0, rows, cols);
        match self {
            Self::Packed(packed) => gpu.dequantize(packed, &weight),
            Self::Nf4(packed) => gpu.dequantize_nf4(packed, &weight),
            Self::Dense(_) => {}
        }
        weight
    }
}

/// The trainable part `s · B A` of a linear.
#[derive(Debug, Clone)]
pub struct DeviceLowRank {
    /// `A [rank, in]`, bfloat16.
    pub a: Matrix,
    /// `B [out, rank]`, bfloat16.
    pub b: Matrix,
    /// `s`.
    pub scaling: f64,
    /// The gradients of `A` and `B` in single precision, which backwards add to; none where nothing is trained.
    pub gradients: Option<[Matrix; 2]>,
}

/// The input of a low-rank part.
fn dropped(gpu: &Gpu, x: &Matrix, dropout: &Dropout<'_>) -> Matrix {
    match dropout.is_none() {
        true => x.clone(),
        false => gpu.drop_out(x, dropout),
    }
}

/// `y = x Wᵀ + bias + s · dropout(x) Aᵀ Bᵀ`.
#[derive(Debug, Clone)]
pub struct DeviceLinear {
    /// Which linear of the layer.
    pub role: LinearRole,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// The frozen weight.
    pub weight: DeviceWeight,
    /// `[1, out]`, single precision.
    pub bias: Option<Matrix>,
    /// The trainable part.
    pub low_rank: Option<DeviceLowRank>,
}

impl DeviceLinear {
    /// Reads a linear of a layer.
    ///
    /// # Errors
    /// Those of [`LinearWeight::read`]; [`Error::Unsupported`] for groups that the GPU does not read.
    pub fn load(gpu: &Gpu, source: &dyn TensorSource, spec: &ModelSpec, linear: &LinearSpec) -> Result<Self> {
        let shape = [linear.out_features, linear.in_features];
        let (weight, bias) = match dense_bf16(gpu, source, &format!("{}.weight", linear.name), shape)? {
            Some(weight) => {
                let bias = match linear.bias {
                    true => Some(source.read_f32_checked(&format!("{}.bias", linear.name), &shape[..1])?),
                    false => None,
                };
                (DeviceWeight::Dense(weight), bias)
            }
            None => {
                let stored = LinearWeight::read(source, spec, linear)?;
                let weight = match &stored.weight {
                    WeightKind::Dense(values, _) => {
                        DeviceWeight::Dense(gpu.upload_bf16(values, shape[0], shape[1]))
                    }
                    WeightKind::Packed(matrix) => {
                        DeviceWeight::Packed(gpu.upload_packed(&linear.name, matrix)?)
                    }
                    WeightKind::Nf4(matrix) => DeviceWeight::Nf4(gpu.upload_nf4(&linear.name, matrix)?),
                };
                (weight, stored.bias)
            }
        };
        Ok(Self {
            role: linear.role,
            shape,
            weight,
            bias: bias.map(|bias| gpu.upload_f32(&bias, 1, bias.len())),
            low_rank: None,
        })
    }

    /// Elements that dequantizing the weight needs; 0 for a dense one.
    pub fn scratch_len(&self) -> usize {
        match self.weight {
            DeviceWeight::Dense(_) => 0,
            _ => self.shape[0] * self.shape[1],
        }
    }

    /// Writes `y [n, out]` to `out`, added to `add` where it is given; `first` is the column of `out` at which it
    /// begins. Gives `dropout(x) Aᵀ`, which the backward needs.
    pub(super) fn forward(
        &self,
        gpu: &Gpu,
        x: &Matrix,
        (out, first): (&Matrix, usize),
        add: Option<&Matrix>,
        (dropout, scratch): (&Dropout<'_>, &Matrix),
    ) -> Option<Matrix> {
        let [outputs, inputs] = self.shape;
        let weight = self.weight.dense(gpu, scratch);
        let y = out.from(0, first);
        let base = Product::new([x.rows, outputs, inputs], x.view(), weight.t(), y);
        gpu.product(match add {
            Some(add) => base.plus(add.from(0, first)),
            None => base,
        });
        let inner = self.project(gpu, x, dropout);
        if let (Some(low_rank), Some(inner)) = (&self.low_rank, &inner) {
            let size = [x.rows, outputs, low_rank.a.rows];
            let outer = Product::new(size, inner.view(), low_rank.b.t(), y);
            gpu.product(outer.times(low_rank.scaling as f32).accumulate());
        }
        if let Some(bias) = &self.bias {
            gpu.add_bias(out, bias, first);
        }
        inner
    }

    /// `dropout(x) Aᵀ [n, rank]`, if there is a low-rank part.
    pub(super) fn project(&self, gpu: &Gpu, x: &Matrix, dropout: &Dropout<'_>) -> Option<Matrix> {
        self.low_rank.as_ref().map(|low_rank| {
            let rank = low_rank.a.rows;
            let dropped = dropped(gpu, x, &dropout.child(self.role as u64));
            let inner = gpu.empty(x.rows, rank, Element::Bf16);
            let size = [x.rows, rank, self.shape[1]];
            gpu.product(Product::new(size, dropped.view(), low_rank.a.t(), inner.view()));
            inner
        })
    }

    /// From `dy [n, out]` (bfloat16) the gradient of `x`, written to `dx [n, in]` or added to it; gradients of the
    /// low-rank part are added to theirs. `x` and `inner` are what the forward was given and gave.
    pub(super) fn backward(
        &self,
        gpu: &Gpu,
        (x, inner): (Option<&Matrix>, Option<&Matrix>),
        dy: View<'_>,
        (dx, adds): (&Matrix, bool),
        (dropout, scratch): (&Dropout<'_>, &Matrix),
    ) {
        let [outputs, inputs] = self.shape;
        let n = dx.rows;
        let weight = self.weight.dense(gpu, scratch);
        let base = Product::new([n, inputs, outputs], dy, weight.view(), dx.view());
        gpu.product(if adds { base.accumulate() } else { base });
        let (Some(low_rank), Some(x), Some(inner)) = (&self.low_rank, x, inner) else {
            return;
        };
        let rank = low_rank.a.rows;
        let scaling = low_rank.scaling as f32;
        let u = gpu.empty(n, rank, Element::Bf16);
        gpu.product(Product::new([n, rank, outputs], dy, low_rank.b.view(), u.view()).times(scaling));
        let dropout = dropout.child(self.role as u64);
        if let Some([da, db]) = &low_rank.gradients {
            let size = [outputs, rank, n];
            let product = Product::new(size, dy.t(), inner.view(), db.view());
            gpu.product(product.times(scaling).accumulate());
            let dropped = dropped(gpu, x, &dropout);
            gpu.product(Product::new([rank, inputs, n], u.t(), dropped.view(), da.view()).accumulate());
        }
        let size = [n, inputs, rank];
        if dropout.is_none() {
            gpu.product(Product::new(size, u.view(), low_rank.a.view(), dx.view()).accumulate());
        } else {
            let d_dropped = gpu.empty(n, inputs, Element::Bf16);
            gpu.product(Product::new(size, u.view(), low_rank.a.view(), d_dropped.view()));
            gpu.drop_out_add(&d_dropped, &dropout, dx);
        }
    }
}

/// Bytes that one task copies.
const COPIED: usize = 1 << 20;

/// A tensor that is stored in bfloat16, copied straight to pinned memory and checked as `read_f32_checked` does; `None`
/// for other types.
///
/// # Errors
/// [`Error::Tensor`] for another shape, [`Error::NotFinite`].
fn dense_bf16(gpu: &Gpu, source: &dyn TensorSource, name: &str, shape: [usize; 2]) -> Result<Option<Matrix>> {
    let Some(info) = source.info(name).filter(|info| info.dtype == DType::BF16) else {
        return Ok(None);
    };
    if info.shape != shape {
        return Err(Error::tensor(
            name,
            format!("shape {shape:?}"),
            format!("{:?}", info.shape),
        ));
    }
    let stored = source.bytes(name)?;
    let copy = |(target, stored): (&mut [u8], &[u8])| -> usize {
        target.copy_from_slice(stored);
        let numbers = target.as_chunks::<2>().0.iter();
        numbers
            .map(|pair| usize::from(u16::from_le_bytes(*pair) & 0x7F80 == 0x7F80))
            .sum()
    };
    let (matrix, bad) = gpu.upload_with(shape, Element::Bf16, |target| {
        let pieces = target.par_chunks_mut(COPIED).zip(stored.par_chunks(COPIED));
        pieces.map(copy).sum::<usize>()
    });
    if bad > 0 {
        let what = format!("tensor `{name}`");
        return Err(Error::NotFinite { what, found: bad });
    }
    Ok(Some(matrix))
}

/// A table `[rows, cols]` in bfloat16, dequantized if it is packed.
///
/// # Errors
/// Those of [`WeightKind::read`].
pub(super) fn load_table(
    gpu: &Gpu,
    source: &dyn TensorSource,
    spec: &ModelSpec,
    name: &str,
    shape: [usize; 2],
) -> Result<Matrix> {
    let module = name.trim_end_matches(".weight");
    if let Some(table) = dense_bf16(gpu, source, &format!("{module}.weight"), shape)? {
        return Ok(table);
    }
    let values = WeightKind::read(source, spec.quantization.as_ref(), module, shape)?.into_dense();
    Ok(gpu.upload_bf16(&values, shape[0], shape[1]))
}
