//! Moving rows, casts and sums.

use cubecl::prelude::*;
use half::bf16;

use super::{Float4, Half4, unit_per_item};
use crate::cuda::device::{Gpu, Numbers};
use crate::cuda::gemm::Product;
use crate::cuda::matrix::{Element, Matrix};

#[cube(launch_unchecked)]
fn fill_words(x: &mut Array<u32>, value: u32, items: u32) {
    if ABSOLUTE_POS < items as usize {
        x[ABSOLUTE_POS] = value;
    }
}

#[cube(launch_unchecked)]
fn embed_rows(table: &Array<Half4>, places: &Array<u32>, out: &mut Array<Float4>, items: u32, quads: u32) {
    if ABSOLUTE_POS < items as usize {
        let row = ABSOLUTE_POS / quads as usize;
        let col = ABSOLUTE_POS % quads as usize;
        out[ABSOLUTE_POS] = Float4::cast_from(table[places[row] as usize * quads as usize + col]);
    }
}

#[cube(launch_unchecked)]
fn gather_rows(x: &Array<Float4>, places: &Array<u32>, out: &mut Array<Float4>, items: u32, quads: u32) {
    if ABSOLUTE_POS < items as usize {
        let row = ABSOLUTE_POS / quads as usize;
        let col = ABSOLUTE_POS % quads as usize;
        out[ABSOLUTE_POS] = x[places[row] as usize * quads as usize + col];
    }
}

#[cube(launch_unchecked)]
fn scatter_rows(x: &Array<Float4>, places: &Array<u32>, out: &mut Array<Float4>, items: u32, quads: u32) {
    if ABSOLUTE_POS < items as usize {
        let row = ABSOLUTE_POS / quads as usize;
        let col = ABSOLUTE_POS % quads as usize;
        let place = places[row] as usize;
        out[place * quads as usize + col] = x[ABSOLUTE_POS];
    }
}

#[cube(launch_unchecked)]
fn narrow(x: &Array<Float4>, out: &mut Array<Half4>, items: u32) {
    if ABSOLUTE_POS < items as usize {
        out[ABSOLUTE_POS] = Half4::cast_from(x[ABSOLUTE_POS]);
    }
}

#[cube(launch_unchecked)]
fn add_in_place(sum: &mut Array<Float4>, x: &Array<Float4>, items: u32) {
    if ABSOLUTE_POS < items as usize {
        sum[ABSOLUTE_POS] += x[ABSOLUTE_POS];
    }
}

#[cube(launch_unchecked)]
fn add_bias(x: &mut Array<bf16>, bias: &Array<f32>, items: u32, stride: u32, first: u32, width: u32) {
    if ABSOLUTE_POS < items as usize {
        let row = ABSOLUTE_POS / width as usize;
        let col = ABSOLUTE_POS % width as usize;
        let at = row * stride as usize + first as usize + col;
        x[at] = bf16::cast_from(f32::cast_from(x[at]) + bias[col]);
    }
}

#[cube(launch_unchecked)]
fn add_bias_f32(x: &mut Array<f32>, bias: &Array<f32>, items: u32, width: u32) {
    if ABSOLUTE_POS < items as usize {
        x[ABSOLUTE_POS] += bias[ABSOLUTE_POS % width as usize];
    }
}

#[cube(launch_unchecked)]
fn place_sums<F: Float>(
    sums: &Array<f32>,
    add: &Array<F>,
    out: &mut Array<F>,
    items: u32,
    sizes_m: u32,
    sizes_n: u32,
    sums_stride: u32,
    stride: u32,
    batch_stride: u32,
    alpha: f32,
    #[comptime] adds: bool,
) {
    if ABSOLUTE_POS < items as usize {
        let col = ABSOLUTE_POS % sizes_n as usize;
        let row = ABSOLUTE_POS / sizes_n as usize;
        let batch = row / sizes_m as usize;
        let at = batch * batch_stride as usize + row % sizes_m as usize * stride as usize + col;
        let mut value = sums[row * sums_stride as usize + col] * alpha;
        if comptime!(adds) {
            value += f32::cast_from(add[at]);
        }
        out[at] = F::cast_from(value);
    }
}

impl Gpu {
    /// Writes zeros.
    pub fn fill_zeros(&self, x: &Matrix) {
        self.fill(x, 0);
    }

    /// Writes the same word everywhere.
    pub(in crate::cuda) fn fill(&self, x: &Matrix, word: u32) {
        let words = (x.len() * x.element.size()).div_ceil(4);
        let (count, dim) = unit_per_item(words);
        // SAFETY: memory is allocated in multiples of four bytes, and a matrix never ends inside a word of another
        // one: its rows are whole words.
        unsafe {
            let arg = ArrayArg::from_raw_parts(x.handle.clone(), words);
            fill_words::launch_unchecked(&self.client, count, dim, arg, word, words as u32);
        }
    }

    /// Rows of a table (bfloat16) in single precision.
    pub fn embed(&self, table: &Matrix, places: &Numbers) -> Matrix {
        let out = self.empty(places.len, table.cols, Element::F32);
        let items = out.len() / 4;
        let (count, dim) = unit_per_item(items);
        // SAFETY: places were checked against the table by the caller; the width is a multiple of four.
        unsafe {
            embed_rows::launch_unchecked(
                &self.client,
                count,
                dim,
                table.arg(),
                places.arg(),
                out.arg(),
                items as u32,
                (table.cols / 4) as u32,
            );
        }
        out
    }

    /// Rows of `x` (single precision).
    pub fn gather(&self, x: &Matrix, places: &Numbers) -> Matrix {
        let out = self.empty(places.len, x.cols, Element::F32);
        let items = out.len() / 4;
        let (count, dim) = unit_per_item(items);
        // SAFETY: as for `embed`.
        unsafe {
            gather_rows::launch_unchecked(
                &self.client,
                count,
                dim,
                x.arg(),
                places.arg(),
                out.arg(),
                items as u32,
                (x.cols / 4) as u32,
            );
        }
        out
    }

    /// Writes the rows of `x` to places in `out` that differ from each other (both single precision).
    pub fn scatter(&self, x: &Matrix, places: &Numbers, out: &Matrix) {
        let items = x.len() / 4;
        let (count, dim) = unit_per_item(items);
        // SAFETY: as for `embed`.
        unsafe {
            scatter_rows::launch_unchecked(
                &self.client,
                count,
                dim,
                x.arg(),
                places.arg(),
                out.arg(),
                items as u32,
                (x.cols / 4) as u32,
            );
        }
    }

    /// `x` (single precision) in bfloat16.
    pub fn round(&self, x: &Matrix) -> Matrix {
        let out = self.empty(x.rows, x.cols, Element::Bf16);
        self.round_into(x, &out);
        out
    }

    /// As [`Gpu::round`], into `out`.
    pub fn round_into(&self, x: &Matrix, out: &Matrix) {
        let items = x.len() / 4;
        let (count, dim) = unit_per_item(items);
        // SAFETY: both have the same shape, a multiple of four elements.
        unsafe {
            narrow::launch_unchecked(&self.client, count, dim, x.arg(), out.arg(), items as u32);
        }
    }

    /// Adds `x` to `sum` (both single precision).
    pub fn add(&self, sum: &Matrix, x: &Matrix) {
        let items = x.len() / 4;
        let (count, dim) = unit_per_item(items);
        // SAFETY: both have the same shape, a multiple of four elements.
        unsafe {
            add_in_place::launch_unchecked(&self.client, count, dim, sum.arg(), x.arg(), items as u32);
        }
    }

    /// Adds `bias [1, width]` (single precision) to columns `first..first + width` of `x`.
    pub fn add_bias(&self, x: &Matrix, bias: &Matrix, first: usize) {
        let items = x.rows * bias.cols;
        let (count, dim) = unit_per_item(items);
        // SAFETY: the columns lie in `x`; in single precision, the bias is as wide as `x`.
        unsafe {
            match x.element {
                Element::Bf16 => add_bias::launch_unchecked(
                    &self.client,
                    count,
                    dim,
                    x.arg(),
                    bias.arg(),
                    items as u32,
                    x.cols as u32,
                    first as u32,
                    bias.cols as u32,
                ),
                Element::F32 => add_bias_f32::launch_unchecked(
                    &self.client,
                    count,
                    dim,
                    x.arg(),
                    bias.arg(),
                    items as u32,
                    bias.cols as u32,
                ),
            }
        }
    }

    /// Writes `alpha · sums + add` to the result of a product; `sums` are the batch's rows, one after the other.
    pub(in crate::cuda) fn place(&self, product: &Product<'_>, sums: &Matrix) {
        let [m, n, _] = product.size;
        let items = product.batch * m * n;
        let (count, dim) = unit_per_item(items);
        let out = &product.out;
        let add = product.add.as_ref().unwrap_or(out);
        // SAFETY: the views lie in their matrices.
        let arg = |view: &crate::cuda::matrix::View<'_>| unsafe {
            let bytes = (view.offset * view.matrix.element.size()) as u64;
            let len = view.matrix.len() - view.offset;
            ArrayArg::from_raw_parts(view.matrix.handle.clone().offset_start(bytes), len)
        };
        macro_rules! launch {
            ($element:ty) => {
                place_sums::launch_unchecked::<$element, cubecl::cuda::CudaRuntime>(
                    &self.client,
                    count,
                    dim,
                    sums.arg(),
                    arg(add),
                    arg(out),
                    items as u32,
                    m as u32,
                    n as u32,
                    sums.cols as u32,
                    out.stride as u32,
                    out.batch_stride as u32,
                    product.alpha,
                    product.add.is_some(),
                )
            };
        }
        // SAFETY: as above.
        unsafe {
            match out.matrix.element {
                Element::Bf16 => launch!(bf16),
                Element::F32 => launch!(f32),
            }
        }
    }
}
