//! What is kept of a linear's input `X [tokens, channels]`: channel means of `|X|` and the Gram matrix `H = XᵀX`.
//!
//! `‖X Dᵀ‖² = tr(D H Dᵀ)`, so that every squared error of a linear with error `D` follows from `H` exactly, at a cost
//! that does not depend on the number of tokens; the error of one group follows from a diagonal block of `H`. Products
//! are summed sequence by sequence, each block by one thread: the order is fixed.

use rayon::prelude::*;

use crate::kernels::{View, product};

/// Rows and columns of `H` that one task computes.
const BLOCK: usize = 256;

/// Statistics of one linear input.
#[derive(Debug, Clone)]
pub struct InputStatistics {
    channels: usize,
    tokens: usize,
    abs_sums: Vec<f64>,
    gram: Vec<f32>,
}

/// `X_gᵀ X_g` for each group `g` of channels.
#[derive(Debug, Clone)]
pub struct GroupGrams {
    /// Channels of a group.
    pub group_size: usize,
    /// `[groups, group_size, group_size]`.
    pub blocks: Vec<f32>,
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
        for row in x.chunks_exact(channels) {
            for (sum, value) in self.abs_sums.iter_mut().zip(row) {
                *sum += f64::from(value.abs());
            }
        }
        self.gram.par_chunks_mut(channels * BLOCK).enumerate().for_each(|(block, out)| {
            let first = block * BLOCK;
            let height = out.len() / channels;
            let left = View::new(&x[first..], [rows, height], channels);
            // The upper triangle of blocks; the rest is mirrored at the end.
            let right = View::new(&x[first..], [rows, channels - first], channels);
            product(&mut out[first..], channels, true, left.transposed(), right);
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
        self.abs_sums.iter().map(|sum| sum / self.tokens.max(1) as f64).collect()
    }

    /// `H [channels, channels]`, once finished.
    pub fn gram(&self) -> &[f32] {
        &self.gram
    }

    /// The diagonal blocks of the Gram matrix for groups of `group_size` channels, once finished.
    pub fn group_grams(&self, group_size: usize) -> GroupGrams {
        let n = self.channels;
        let blocks = (0..n).flat_map(|row| {
            let first = row / group_size * group_size;
            &self.gram[row * n + first..][..group_size]
        });
        GroupGrams {
            group_size,
            blocks: blocks.copied().collect(),
        }
    }

    /// Bytes that statistics of such an input take.
    pub fn byte_len(channels: usize) -> u64 {
        (channels * channels * size_of::<f32>()) as u64
    }
}

impl GroupGrams {
    /// The same for an input whose channels are divided by `scales`.
    pub fn divided_by(&self, scales: &[f32]) -> Self {
        let mut divided = self.clone();
        let size = self.group_size;
        for (block, scales) in divided.blocks.chunks_exact_mut(size * size).zip(scales.chunks_exact(size)) {
            for (row, row_scale) in block.chunks_exact_mut(size).zip(scales) {
                for (value, scale) in row.iter_mut().zip(scales) {
                    *value = (f64::from(*value) / (f64::from(*row_scale) * f64::from(*scale))) as f32;
                }
            }
        }
        divided
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
        let (tokens, channels, group) = (1300, 384, 32);
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
        let grams = statistics.group_grams(group);
        let want: f64 = column(33).zip(column(40)).map(|(a, b)| a * b).sum();
        let got = f64::from(grams.blocks[(group * group) + group + 8]);
        assert!((got - want).abs() < 1e-2);
    }

    #[test]
    fn dividing_the_input_divides_the_blocks() {
        let (tokens, channels) = (64, 32);
        let x = inputs(tokens, channels);
        let scales: Vec<f32> = (0..channels).map(|c| 0.5 + c as f32 / 10.0).collect();
        let divided: Vec<f32> = x.iter().enumerate().map(|(i, v)| v / scales[i % channels]).collect();
        let blocks = |x: &[f32]| {
            let mut statistics = InputStatistics::new(channels);
            statistics.add(x);
            statistics.finish();
            statistics.group_grams(16)
        };
        let (want, got) = (blocks(&divided), blocks(&x).divided_by(&scales));
        for (a, b) in want.blocks.iter().zip(&got.blocks) {
            assert!((a - b).abs() < 1e-4 * a.abs().max(1.0));
        }
    }
}
