//! Inputs of the benchmarks.

use std::path::{Path, PathBuf};

/// The demo model of the repository.
pub fn demo_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tiny-phi3")
}

/// `n` pseudo-random values in -1..1, the same for the same seed (splitmix64).
pub fn values(n: usize, seed: u64) -> Vec<f32> {
    words(n, seed)
        .into_iter()
        .map(|word| (word >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
        .collect()
}

/// `n` pseudo-random bytes.
pub fn bytes(n: usize, seed: u64) -> Vec<u8> {
    words(n, seed)
        .into_iter()
        .map(|word| (word >> 56) as u8)
        .collect()
}

fn words(n: usize, seed: u64) -> Vec<u64> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    (0..n).map(|_| next()).collect()
}
