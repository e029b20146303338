//! Root-mean-square norm.

use super::isa::{isa, multiversion};
use super::parallel;

/// Rows of a piece.
const PIECE_ROWS: usize = 8;

/// `out = x / sqrt(mean(x²) + epsilon) · weight` for every row of `weight.len()` values.
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let (isa, width) = (isa(), weight.len());
    parallel::for_pieces(out, width * PIECE_ROWS, x.len(), |i, out| {
        let x = &x[i * width * PIECE_ROWS..][..out.len()];
        norm_rows(isa, x, weight, epsilon, out);
    });
}

multiversion! {
    fn norm_rows(isa; x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) = norm_rows_plain
}

#[inline(always)]
fn norm_rows_plain(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let square = super::dense::dot_plain(x, x) / width as f32;
        let factor = 1.0 / (square + epsilon).sqrt();
        for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
            *out = x * factor * w;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norm_equals_the_definition() {
        let x: Vec<f32> = (0..70).map(|i| (i as f32 * 0.7).sin()).collect();
        let weight: Vec<f32> = (0..35).map(|i| 1.0 + i as f32 * 0.01).collect();
        let mut out = vec![0.0; 70];
        rms_norm(&x, &weight, 1e-5, &mut out);
        for r in 0..2 {
            let row = &x[r * 35..r * 35 + 35];
            let mean: f64 = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 35.0;
            for i in 0..35 {
                let want = f64::from(row[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                assert!((f64::from(out[r * 35 + i]) - want).abs() < 1e-6);
            }
        }
    }
}
