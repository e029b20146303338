//! Packed weights: AutoAWQ's layout, rounding to the default int4 blocks, and products with packed weights on every
//! instruction set of this machine. Each result is checked against a plain one first.
#![expect(clippy::unwrap_used, reason = "an unwrap that fails stops the benchmark")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use olive_benches::{bytes, values};
use olive_core::packed::awq_gemm;
use olive_core::{DType, QuantMatrix};
use olive_genai::kernels::{Isa, NBitsShape, NBitsWeight, ZeroPoints};
use olive_onnx::ir::{OnnxType, Tensor};

fn awq_layout(c: &mut Criterion) {
    const SHAPE: [usize; 2] = [2048, 2048];
    let [rows, cols] = SHAPE;
    let q: Vec<u8> = bytes(rows * cols, 1).into_iter().map(|b| b & 15).collect();
    let zeros: Vec<u8> = bytes(rows * cols / 128, 2).into_iter().map(|b| b & 15).collect();
    let scales = vec![0.5; rows * cols / 128];
    let matrix = QuantMatrix::pack(SHAPE, 4, 128, &q, (scales, DType::F16), Some(&zeros)).unwrap();
    let stored = awq_gemm::store(&matrix).unwrap();
    assert_eq!(awq_gemm::load("w", SHAPE, 128, &stored).unwrap(), matrix);
    let mut group = c.benchmark_group("awq_gemm");
    group.throughput(Throughput::Bytes((rows * cols / 2) as u64));
    group.bench_function("store", |b| b.iter(|| awq_gemm::store(&matrix).unwrap()));
    group.bench_function("load", |b| {
        b.iter(|| awq_gemm::load("w", SHAPE, 128, &stored).unwrap())
    });
    group.finish();
}

/// A weight `[n, k]` in blocks of 32.
fn weight(n: usize, k: usize, bits: usize) -> NBitsWeight {
    let data = bytes(n * k * bits / 8, 3);
    let packed = Tensor::inline("w", OnnxType::Uint8, [n, k / 32, 32 * bits / 8], data).unwrap();
    let scales: Vec<f32> = values(n * k / 32, 4).into_iter().map(|s| s * 0.01).collect();
    let shape = NBitsShape {
        n,
        k,
        bits,
        block: 32,
    };
    NBitsWeight::new(shape, packed, &scales, ZeroPoints::Constant(1 << (bits - 1))).unwrap()
}

/// The largest distance from the product in f64, relative to the largest element.
fn error(weight: &NBitsWeight, x: &[f32], y: &[f32]) -> f64 {
    let mut row = vec![0.0; weight.k];
    let (mut worst, mut largest) = (0.0f64, 0.0f64);
    for n in 0..weight.n {
        weight.dequantize_row(n, &mut row);
        for (m, x) in x.chunks_exact(weight.k).enumerate() {
            let exact: f64 = x
                .iter()
                .zip(&row)
                .map(|(x, w)| f64::from(*x) * f64::from(*w))
                .sum();
            worst = worst.max((exact - f64::from(y[m * weight.n + n])).abs());
            largest = largest.max(exact.abs());
        }
    }
    worst / largest
}

fn products(c: &mut Criterion) {
    const N: usize = 2048;
    const K: usize = 2048;
    for bits in [4, 8] {
        let weight = weight(N, K, bits);
        for rows in [1, 64] {
            let x = values(rows * K, 5);
            let mut y = vec![0.0; rows * N];
            let mut group = c.benchmark_group(format!("nbits/{bits}-bit/{rows}-row"));
            match rows {
                1 => group.throughput(Throughput::Bytes((N * K * bits / 8) as u64)),
                _ => group.throughput(Throughput::Elements((2 * rows * N * K) as u64)),
            };
            for isa in Isa::available() {
                for (name, quantized, tolerance) in [("float", false, 1e-5), ("int8", true, 2e-2)] {
                    weight.matmul_with(isa, &x, quantized, &mut y);
                    let error = error(&weight, &x, &y);
                    assert!(error <= tolerance, "{} {name}: {error}", isa.name());
                    group.bench_function(BenchmarkId::new(isa.name(), name), |b| {
                        b.iter(|| weight.matmul_with(isa, &x, quantized, &mut y));
                    });
                }
            }
            group.finish();
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = awq_layout, products
}
criterion_main!(benches);
