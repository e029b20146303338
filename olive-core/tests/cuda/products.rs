//! Matrix products in every layout, by cuBLASLt and by Burn.

use super::*;
use olive_core::cuda::burns_product;

struct Case {
    size: [usize; 3],
    batch: usize,
    transposed: [bool; 2],
    operands: Element,
    out: Element,
    add: bool,
}

/// A stored operand `[rows, cols]` inside wider rows, and its elements in order.
fn operand(
    gpu: &Gpu,
    case: &Case,
    [rows, cols]: [usize; 2],
    transposed: bool,
    seed: u64,
) -> (Matrix, Vec<f32>) {
    let [stored_rows, stored_cols] = if transposed { [cols, rows] } else { [rows, cols] };
    let stride = stored_cols.next_multiple_of(8) + 8;
    let mut values = noise(case.batch * stored_rows * stride, seed);
    if case.operands == Element::Bf16 {
        values = rounded(&values);
    }
    let upload = match case.operands {
        Element::Bf16 => Gpu::upload_bf16,
        Element::F32 => Gpu::upload_f32,
    };
    let matrix = upload(gpu, &values, case.batch * stored_rows, stride);
    let mut dense = Vec::with_capacity(case.batch * rows * cols);
    for batch in 0..case.batch {
        for row in 0..rows {
            for col in 0..cols {
                let [r, c] = if transposed { [col, row] } else { [row, col] };
                dense.push(values[(batch * stored_rows + r) * stride + c]);
            }
        }
    }
    (matrix, dense)
}

fn view<'a>(matrix: &'a Matrix, batch: usize, transposed: bool) -> View<'a> {
    let view = matrix.view().every(matrix.rows / batch * matrix.cols);
    if transposed { view.t() } else { view }
}

/// What rounding may do: operands are exact, the result is rounded to its own type. Burn multiplies single precision
/// with ten bits of mantissa.
fn tolerance(case: &Case, burn: bool) -> f64 {
    match (case.operands, case.out) {
        (_, Element::Bf16) => 4e-3,
        (Element::F32, Element::F32) if burn => 1e-3,
        (_, Element::F32) => 2e-6,
    }
}

fn check(gpu: &Gpu, case: &Case, tolerance: f64, run: fn(&Gpu, Product<'_>)) {
    let [m, n, k] = case.size;
    let [ta, tb] = case.transposed;
    let (a, a_values) = operand(gpu, case, [m, k], ta, 1);
    let (b, b_values) = operand(gpu, case, [k, n], tb, 2);
    let stride = n.next_multiple_of(8);
    let before = rounded(&noise(case.batch * m * stride, 3));
    let out = match (case.add, case.out) {
        (true, Element::F32) => gpu.upload_f32(&before, case.batch * m, stride),
        (true, Element::Bf16) => gpu.upload_bf16(&before, case.batch * m, stride),
        (false, element) => gpu.empty(case.batch * m, stride, element),
    };
    let target = out.view().every(m * stride);
    let (a, b) = (view(&a, case.batch, ta), view(&b, case.batch, tb));
    let product = Product::new(case.size, a, b, target)
        .batch(case.batch)
        .times(0.75);
    run(gpu, if case.add { product.accumulate() } else { product });
    let found = gpu.download_f32(&out).unwrap();
    let (mut got, mut want) = (Vec::new(), Vec::new());
    for batch in 0..case.batch {
        for row in 0..m {
            for col in 0..n {
                let sum: f64 = (0..k)
                    .map(|i| {
                        f64::from(a_values[(batch * m + row) * k + i])
                            * f64::from(b_values[(batch * k + i) * n + col])
                    })
                    .sum();
                let place = (batch * m + row) * stride + col;
                let old = if case.add { f64::from(before[place]) } else { 0.0 };
                want.push(0.75 * sum + old);
                got.push(found[place]);
            }
        }
    }
    close(
        &got,
        &want,
        tolerance,
        &format!(
            "{:?} {:?} {:?} {:?}",
            case.size, case.transposed, case.operands, case.out
        ),
    );
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for size in [[64, 96, 128], [33, 40, 72], [1, 64, 48], [100, 8, 51]] {
        for transposed in [[false, false], [false, true], [true, false], [true, true]] {
            for (operands, out) in [
                (Element::Bf16, Element::Bf16),
                (Element::Bf16, Element::F32),
                (Element::F32, Element::F32),
            ] {
                for (batch, add) in [(1, false), (1, true), (3, false)] {
                    cases.push(Case {
                        size,
                        batch,
                        transposed,
                        operands,
                        out,
                        add,
                    });
                }
            }
        }
    }
    cases
}

#[test]
fn products_of_every_layout_equal_the_sums() {
    let Some(gpu) = gpu() else { return };
    assert!(gpu.has_blas(), "cuBLASLt is not used");
    for case in cases() {
        check(&gpu, &case, tolerance(&case, false), Gpu::product);
    }
}

#[test]
fn burns_products_do_too() {
    let Some(gpu) = gpu() else { return };
    for case in cases().iter().step_by(5) {
        check(&gpu, case, tolerance(case, true), burns_product);
    }
}

#[test]
fn tf32_rounds_operands_to_ten_bits_and_no_further() {
    let Some(gpu) = gpu() else { return };
    let (m, n, k) = (64, 48, 256);
    let (a, b) = (noise(m * k, 1), noise(k * n, 2));
    let (left, right) = (gpu.upload_f32(&a, m, k), gpu.upload_f32(&b, k, n));
    let out = gpu.empty(m, n, Element::F32);
    gpu.product(Product::new([m, n, k], left.view(), right.view(), out.view()).tf32());
    let mut want = Vec::new();
    for i in 0..m {
        for j in 0..n {
            want.push(
                (0..k)
                    .map(|l| f64::from(a[i * k + l]) * f64::from(b[l * n + j]))
                    .sum(),
            );
        }
    }
    close(&gpu.download_f32(&out).unwrap(), &want, 1e-3, "tf32");
}
