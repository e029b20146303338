//! Products by Burn's own matmul, for machines without cuBLASLt.

use burn::tensor::DType;
use burn_cubecl::kernel::matmul::{MatmulStrategy, matmul};
use burn_cubecl::tensor::CubeTensor;
use burn_cuda::CudaDevice;
use cubecl::cuda::CudaRuntime;
use cubecl::zspace::metadata::Metadata;

use super::Product;
use crate::cuda::device::Gpu;
use crate::cuda::matrix::{Element, Matrix, View};

/// The operand `[batch, rows, cols]` as a tensor of Burn.
fn tensor(gpu: &Gpu, view: &View<'_>, batch: usize, [rows, cols]: [usize; 2]) -> CubeTensor<CudaRuntime> {
    let bytes = view.offset * view.matrix.element.size();
    let strides = match view.transposed {
        true => [view.batch_stride, 1, view.stride],
        false => [view.batch_stride, view.stride, 1],
    };
    let dtype = match view.matrix.element {
        Element::Bf16 => DType::BF16,
        Element::F32 => DType::F32,
    };
    CubeTensor::new(
        gpu.client.clone(),
        view.matrix.handle.clone().offset_start(bytes as u64),
        Metadata::new([batch, rows, cols], strides),
        CudaDevice::default(),
        dtype,
    )
}

/// As [`Gpu::product`], by Burn's matmul.
pub fn product(gpu: &Gpu, product: Product<'_>) {
    let [m, n, k] = product.size;
    let a = tensor(gpu, &product.a, product.batch, [m, k]);
    let b = tensor(gpu, &product.b, product.batch, [k, n]);
    match matmul(a, b, None, MatmulStrategy::Cube, DType::F32) {
        Ok(sums) => {
            let [_, row_stride, _] = [
                sums.meta.strides()[0],
                sums.meta.strides()[1],
                sums.meta.strides()[2],
            ];
            let sums_matrix = Matrix {
                handle: sums.handle.clone(),
                rows: product.batch * m,
                cols: row_stride,
                element: Element::F32,
            };
            gpu.place(&product, &sums_matrix);
        }
        Err(error) => Gpu::fail(&gpu.failure(), format!("Burn's matmul: {error:?}")),
    }
}
