//! What is kept of a linear's input `X [tokens, channels]`: channel means of `|X|` and the Gram matrix `H = XᵀX`.
//!
//! `‖X Dᵀ‖² = tr(D H Dᵀ)`, so that every squared error of a linear with error `D` follows from `H` exactly, at a cost
//! that does not depend on the number of tokens; the error of one group follows from a diagonal block of `H`. Products
//! are summed sequence by sequence, each block by one thread: the order is fixed.

use olive_core::kernels::{View, product, wide};
use rayon::prelude::*;

/// Rows and columns of `H` that one task computes.
const BLOCK: usize = 128;

/// Statistics of one linear input.
#[derive(Debug, Clone)]
pub struct InputStatistics {
    channels: usize,
    tokens: usize,
    abs_sums: Vec<f64>,
    gram: Vec<f32>,
}

impl InputStatistics {
    /// Empty statistics of an input of `channels` channels.
    pub fn new(channels: usize) -> Self {
        Self {
            channels,
            tokens: 0,
            abs_sums: vec![0.0; channels],
            gram: vec![0.0; channels * channels],
        }
    }

    /// Adds the rows `x [tokens, channels]`; the order of calls is the order of the tokens.
    pub fn add(&mut self, x: &[f32]) {
        let channels = self.channels;
        let rows = x.len() / channels;
        wide(add_magnitudes, (self.abs_sums.as_mut_slice(), x));
        self.gram
            .par_chunks_mut(channels * BLOCK)
            .enumerate()
            .for_each(|(block, out)| {
                let first = block * BLOCK;
                let height = out.len() / channels;
                let left = View::new(&x[first..], [rows, height], channels);
                // The upper triangle of blocks; the rest is mirrored at the end.
                let right = View::new(&x[first..], [rows, channels - first], channels);
                product(&mut out[first..], channels, true, 1.0, left.transposed(), right);
            });
        self.tokens += rows;
    }

    /// Mirrors the Gram matrix; call once, after the last [`InputStatistics::add`].
    pub fn finish(&mut self) {
        let n = self.channels;
        for row in BLOCK..n {
            for col in 0..row / BLOCK * BLOCK {
                self.gram[row * n + col] = self.gram[col * n + row];
            }
        }
    }

    /// Channels of the input.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Tokens that were added.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Mean of `|x|` in each channel.
    pub fn abs_means(&self) -> Vec<f64> {
        self.abs_sums
            .iter()
            .map(|sum| sum / self.tokens.max(1) as f64)
            .collect()
    }

    /// `H [channels, channels]`, once finished.
    pub fn gram(&self) -> &[f32] {
        &self.gram
    }

    /// Makes them those of the same input with its channels divided by `scales`.
    pub fn divide_by(&mut self, scales: &[f32]) {
        let n = self.channels;
        self.gram
            .par_chunks_exact_mut(n)
            .zip(scales)
            .for_each(|(row, own)| {
                for (value, scale) in row.iter_mut().zip(scales) {
                    *value = (f64::from(*value) / (f64::from(*own) * f64::from(*scale))) as f32;
                }
            });
        for (sum, scale) in self.abs_sums.iter_mut().zip(scales) {
            *sum /= f64::from(*scale);
        }
    }

    /// Bytes that statistics of such an input take.
    pub fn byte_len(channels: usize) -> u64 {
        (channels * channels * size_of::<f32>()) as u64
    }
}

/// Adds `|x|` of every row to the sums of the channels.
#[inline(always)]
fn add_magnitudes(sums: &mut [f64], x: &[f32]) {
    for row in x.chunks_exact(sums.len()) {
        for (sum, value) in sums.iter_mut().zip(row) {
            *sum += f64::from(value.abs());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs(tokens: usize, channels: usize) -> Vec<f32> {
        (0..(tokens * channels) as u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0)
            .collect()
    }

    #[test]
    fn sums_over_uneven_sequences_equal_the_definition() {
        let (tokens, channels) = (1300, 384);
        let x = inputs(tokens, channels);
        let mut statistics = InputStatistics::new(channels);
        for part in [0..7, 7..8, 8..600, 600..1300] {
            statistics.add(&x[part.start * channels..part.end * channels]);
        }
        statistics.finish();
        let column = |c: usize| x.iter().skip(c).step_by(channels).map(|v| f64::from(*v));
        for (i, j) in [(0, 0), (3, 200), (300, 5), (383, 383), (383, 0), (256, 255)] {
            let want: f64 = column(i).zip(column(j)).map(|(a, b)| a * b).sum();
            let got = f64::from(statistics.gram()[i * channels + j]);
            assert!((got - want).abs() < 1e-2, "{i} {j}: {got} {want}");
        }
        let mean = column(17).map(f64::abs).sum::<f64>() / tokens as f64;
        assert!((statistics.abs_means()[17] - mean).abs() < 1e-9);
    }

    #[test]
    fn dividing_the_input_divides_the_statistics() {
        let (tokens, channels) = (64, 32);
        let x = inputs(tokens, channels);
        let scales: Vec<f32> = (0..channels).map(|c| 0.5 + c as f32 / 10.0).collect();
        let divided: Vec<f32> = x
            .iter()
            .enumerate()
            .map(|(i, v)| v / scales[i % channels])
            .collect();
        let statistics = |x: &[f32]| {
            let mut statistics = InputStatistics::new(channels);
            statistics.add(x);
            statistics.finish();
            statistics
        };
        let want = statistics(&divided);
        let mut got = statistics(&x);
        got.divide_by(&scales);
        for (a, b) in want.gram().iter().zip(got.gram()) {
            assert!((a - b).abs() < 1e-4 * a.abs().max(1.0));
        }
        for (a, b) in want.abs_means().iter().zip(got.abs_means()) {
            assert!((a - b).abs() < 1e-6);
        }
    }
}
