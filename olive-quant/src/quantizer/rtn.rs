//! Round to nearest: every group on its own grid, no calibration.

use olive_core::kernels::wide;
use olive_core::packed::QuantMatrix;
use olive_core::{DType, Error, Result};
use rayon::prelude::*;

use super::affine::{Affine, Grid};

/// Groups that one task rounds.
const TASK: usize = 64;

/// Rounds `weight [rows, cols]` to grids of `group_size` inputs and packs it. `name` is for messages.
///
/// # Errors
/// [`Error::NotFinite`] if the weight is not finite; [`Error::Tensor`] if a group's range does not fit the
/// half-precision scale of the layout or the sizes do not fit.
pub fn quantize(
    name: &str,
    weight: &[f32],
    shape: [usize; 2],
    group_size: usize,
    affine: &Affine,
) -> Result<QuantMatrix> {
    let [rows, cols] = shape;
    if group_size == 0 || !cols.is_multiple_of(group_size) || weight.len() != rows * cols {
        let found = format!("groups of {group_size}, {} values", weight.len());
        return Err(Error::tensor(
            name,
            format!("groups that divide {shape:?}"),
            found,
        ));
    }
    let groups = cols / group_size;
    let mut values = vec![0u8; rows * cols];
    let mut grids = vec![
        Grid {
            scale: 0.0,
            zero: 0.0
        };
        rows * groups
    ];
    values
        .par_chunks_mut(TASK * group_size)
        .zip(grids.par_chunks_mut(TASK))
        .zip(weight.par_chunks(TASK * group_size))
        .for_each(|((values, grids), weight)| {
            wide(round_groups, (values, grids, weight, affine));
        });
    check(name, weight, &grids)?;
    let scales = grids.iter().map(|grid| grid.scale).collect();
    let zeros: Vec<u8> = grids.iter().map(|grid| grid.zero as u8).collect();
    QuantMatrix::pack(shape, 4, group_size, &values, (scales, DType::F16), Some(&zeros))
}

/// Chooses the grid of each group and rounds to it.
#[inline(always)]
fn round_groups(values: &mut [u8], grids: &mut [Grid], weight: &[f32], affine: &Affine) {
    let size = weight.len() / grids.len().max(1);
    let groups = values.chunks_exact_mut(size).zip(weight.chunks_exact(size));
    for ((values, group), own) in groups.zip(grids) {
        let grid = affine.grid(group);
        for (value, w) in values.iter_mut().zip(group) {
            *value = affine.level(grid, *w) as u8;
        }
        *own = grid;
    }
}

fn check(name: &str, weight: &[f32], grids: &[Grid]) -> Result<()> {
    let bad = weight.iter().filter(|w| !w.is_finite()).count();
    if bad > 0 {
        return Err(Error::NotFinite {
            what: format!("tensor `{name}`"),
            found: bad,
        });
    }
    let wide = grids.iter().filter(|grid| !grid.scale.is_finite()).count();
    if wide > 0 {
        return Err(Error::tensor(
            name,
            "groups whose scale fits half precision",
            format!("{wide} group(s) with a wider range"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantizer::affine::Arithmetic;
    use proptest::prelude::*;

    const AFFINE: fn() -> Affine = || Affine::new(4, Arithmetic::Single);

    proptest! {
        /// Unpacked, the matrix is the fake-quantized weight, whatever the shape, and survives the stored layout.
        #[test]
        fn packed_weights_are_the_fake_quantized_ones(
            rows in 1usize..4, groups in 1usize..4, wide in any::<bool>(), seed in any::<u32>(),
        ) {
            let (rows, group_size) = (rows * 8, if wide { 32 } else { 16 });
            let cols = groups * group_size;
            let weight: Vec<f32> = (0..(rows * cols) as u32)
                .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 9) as f32 / 4_194_304.0 - 1.0)
                .collect();
            let matrix = quantize("w", &weight, [rows, cols], group_size, &AFFINE()).unwrap();
            let mut fake = weight;
            for row in fake.chunks_exact_mut(cols) {
                AFFINE().fake_quantize(row, group_size);
            }
            prop_assert_eq!(matrix.dequantize(), fake);
            let stored = olive_core::packed::awq_gemm::store(&matrix).unwrap();
            let loaded = olive_core::packed::awq_gemm::load("w", [rows, cols], group_size, &stored).unwrap();
            prop_assert_eq!(loaded, matrix);
        }
    }

    #[test]
    fn weights_that_cannot_be_stored_are_refused_by_name() {
        let refuse = |bad: f32| {
            let mut weight = vec![0.5; 8 * 32];
            weight[40] = bad;
            let error = quantize("layer.w", &weight, [8, 32], 32, &AFFINE()).unwrap_err();
            error.to_string()
        };
        for bad in [f32::NAN, f32::INFINITY, 1e9] {
            assert!(refuse(bad).contains("`layer.w`"), "{bad}");
        }
        assert!(quantize("w", &[0.0; 48], [1, 48], 32, &AFFINE()).is_err());
    }
}
