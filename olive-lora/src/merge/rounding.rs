//! Rounding a changed weight to the layout that it came from.

use olive_core::packed::QuantMatrix;
use olive_core::packed::nf4::{self, Absmax, Nf4Matrix, Nf4Options};
use olive_core::{DType, Result};
use rayon::prelude::*;

/// Shares of a group's range that its grid may span: clipping its ends can leave a smaller error.
const SPANS: [f32; 8] = [1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.8];

/// One group's grid and codes.
struct Group {
    scale: f32,
    zero: u8,
    codes: Vec<u8>,
}

/// `wanted` in the layout of `matrix`: of each group's old grid and grids made for the new values the one with the
/// smallest squared error.
pub fn integers(matrix: &QuantMatrix, wanted: &[f32]) -> Result<QuantMatrix> {
    let zeros = matrix.unpack_zeros();
    let groups: Vec<Group> = wanted
        .par_chunks(matrix.group_size)
        .zip(matrix.scales.par_iter().zip(&zeros))
        .map(|(values, (scale, zero))| best_group(matrix, values, *scale, *zero))
        .collect();
    let codes: Vec<u8> = groups
        .iter()
        .flat_map(|group| group.codes.iter().copied())
        .collect();
    let scales = groups.iter().map(|group| group.scale).collect();
    let zeros: Option<Vec<u8>> = matrix
        .zeros
        .as_ref()
        .map(|_| groups.iter().map(|group| group.zero).collect());
    QuantMatrix::pack(
        [matrix.rows, matrix.cols],
        matrix.bits,
        matrix.group_size,
        &codes,
        (scales, matrix.scale_dtype),
        zeros.as_deref(),
    )
}

fn best_group(matrix: &QuantMatrix, values: &[f32], scale: f32, zero: u8) -> Group {
    let grids = SPANS.iter().filter_map(|span| grid(matrix, values, *span));
    let mut best = round(values, scale, zero, matrix.bits);
    for (scale, zero) in grids {
        let candidate = round(values, scale, zero, matrix.bits);
        if candidate.0 < best.0 {
            best = candidate;
        }
    }
    best.1
}

/// A grid for `span` of the values' range; `None` if they are all zero.
fn grid(matrix: &QuantMatrix, values: &[f32], span: f32) -> Option<(f32, u8)> {
    let most = ((1u32 << matrix.bits) - 1) as f32;
    let low = span * values.iter().fold(0.0f32, |low, w| low.min(*w));
    let high = span * values.iter().fold(0.0f32, |high, w| high.max(*w));
    let middle = 1u32 << (matrix.bits - 1);
    let (scale, zero) = match matrix.zeros {
        // From `-middle` to `middle - 1` steps.
        None => (
            (-low / middle as f32).max(high / (middle - 1) as f32),
            middle as f32,
        ),
        Some(_) => {
            let scale = (high - low) / most;
            (scale, (-low / scale).round_ties_even())
        }
    };
    let scale = stored_scale(scale, matrix.scale_dtype);
    (scale > 0.0 && scale.is_finite()).then(|| (scale, zero.clamp(0.0, most) as u8))
}

fn stored_scale(scale: f32, dtype: DType) -> f32 {
    dtype.round(scale)
}

/// The group rounded to a grid, and its squared error.
fn round(values: &[f32], scale: f32, zero: u8, bits: usize) -> (f64, Group) {
    let (zero_point, most) = (f32::from(zero), ((1u32 << bits) - 1) as f32);
    // A scale of zero holds zeros only.
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut error = 0.0;
    let codes = values
        .iter()
        .map(|w| {
            let code = ((w * inverse).round_ties_even() + zero_point).clamp(0.0, most);
            error += f64::from((code - zero_point) * scale - w).powi(2);
            code as u8
        })
        .collect();
    (error, Group { scale, zero, codes })
}

/// `wanted` in the layout of `matrix`, as bitsandbytes rounds.
pub fn floats(name: &str, matrix: &Nf4Matrix, wanted: &[f32]) -> Result<Nf4Matrix> {
    let options = Nf4Options {
        quant_type: matrix.quant_type(),
        block_size: matrix.block_size,
        double_quant: matches!(matrix.absmax, Absmax::Nested(_)),
    };
    nf4::quantize(name, wanted, [matrix.rows, matrix.cols], options, matrix.dtype)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(zeros: bool, dtype: DType) -> QuantMatrix {
        let (rows, cols, group) = (6, 64, 32);
        let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 7 % 16) as u8).collect();
        let zero: Vec<u8> = (0..rows * cols / group).map(|i| (4 + i % 8) as u8).collect();
        let scales = (0..rows * cols / group)
            .map(|i| dtype.round(0.01 + 0.003 * i as f32))
            .collect();
        QuantMatrix::pack(
            [rows, cols],
            4,
            group,
            &codes,
            (scales, dtype),
            zeros.then_some(zero.as_slice()),
        )
        .unwrap()
    }

    #[test]
    fn what_did_not_change_keeps_every_bit() {
        for zeros in [true, false] {
            let matrix = matrix(zeros, DType::F16);
            assert_eq!(integers(&matrix, &matrix.dequantize()).unwrap(), matrix);
        }
    }

    #[test]
    fn no_other_grid_of_the_search_is_better_and_large_changes_survive() {
        for zeros in [true, false] {
            let matrix = matrix(zeros, DType::F16);
            let wanted: Vec<f32> = (0..6 * 64)
                .map(|i| ((i * 37 % 101) as f32 / 50.0 - 1.0) * 1.7)
                .collect();
            let stored = integers(&matrix, &wanted).unwrap();
            assert_eq!(stored.zeros.is_some(), zeros);
            assert!(
                stored
                    .scales
                    .iter()
                    .all(|scale| DType::F16.round(*scale) == *scale)
            );
            for (group, (got, want)) in stored.dequantize().chunks(32).zip(wanted.chunks(32)).enumerate() {
                let scale = stored.scales[group];
                for (got, want) in got.iter().zip(want) {
                    // Clipping moves an end by at most a fifth of the range.
                    assert!(
                        (got - want).abs() <= 0.5 * scale + 0.2 * 1.7,
                        "{group}: {got} {want}"
                    );
                }
                let error: f32 = got.iter().zip(want).map(|(g, w)| (g - w).powi(2)).sum();
                for span in SPANS {
                    let (scale, zero) = grid(&matrix, want, span).unwrap();
                    let (other, _) = round(want, scale, zero, 4);
                    assert!(f64::from(error) <= other * 1.0001 + 1e-9, "{group} {span}");
                }
            }
        }
    }

    #[test]
    fn a_group_of_zeros_is_stored() {
        let matrix = matrix(true, DType::F32);
        let stored = integers(&matrix, &[0.0; 6 * 64]).unwrap();
        assert!(stored.dequantize().iter().all(|w| *w == 0.0));
    }
}
