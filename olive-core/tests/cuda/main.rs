//! Every kernel against its formula in double precision, on a GPU.
//!
//! They run with `OLIVE_TEST_DEVICE=gpu` and say so where they do not. All device memory starts as NaN here, so that
//! an element which no kernel wrote is seen.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod kernels;
mod layers;
mod products;

use olive_core::cuda::*;

/// Operands in bfloat16 have eight bits; what their rounding may do to the result of several products.
const HALF: f64 = 3e-2;
/// Single precision, and functions that the device computes in a few units of the last place.
const SINGLE: f64 = 2e-5;

/// The GPU, if tests shall use it.
fn gpu() -> Option<Gpu> {
    if std::env::var("OLIVE_TEST_DEVICE").as_deref() != Ok("gpu") {
        eprintln!("SKIPPED: OLIVE_TEST_DEVICE is not `gpu`");
        return None;
    }
    let gpu = Gpu::open().unwrap();
    gpu.poison();
    Some(gpu)
}

/// Numbers in [-1, 1) that look random.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = olive_core::rng::TorchRng::new(seed);
    (0..n).map(|_| rng.uniform_f32(-1.0, 1.0)).collect()
}

/// The nearest bfloat16 numbers.
fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect()
}

fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// `‖found - expected‖ / ‖expected‖`, which no NaN passes.
fn close(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let norm = |x: f64, y: f64| (x - y) * (x - y);
    let error: f64 = found
        .iter()
        .zip(expected)
        .map(|(a, b)| norm(f64::from(*a), *b))
        .sum();
    let whole: f64 = expected.iter().map(|b| b * b).sum();
    let relative = (error / whole.max(1e-30)).sqrt();
    assert!(
        relative <= tolerance,
        "{what}: relative error {relative:e}, at most {tolerance:e}"
    );
}
