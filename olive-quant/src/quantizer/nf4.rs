//! Rounding to NF4, with or without double quantization, as bitsandbytes does
//! (<https://arxiv.org/abs/2305.14314>, sections 3 and A).
//!
//! Values are divided by the largest magnitude of their block of 64 and go to the nearest of the sixteen values; one
//! halfway between two goes to the lower. Double quantization takes the mean from the 64-blocks' magnitudes and
//! stores the rest in blocks of 256 with the dynamic 8-bit map (<https://arxiv.org/abs/1511.04561>).

use olive_core::packed::nf4::{Absmax, BLOCK, CODE, NESTED_BLOCK, NestedAbsmax, Nf4Matrix};
use olive_core::{DType, Result};
use rayon::prelude::*;

use super::minmax::check_weight;

/// The value that stands for zero.
const ZERO: u8 = 7;

/// Quantizes `weight [rows, cols]`, which was stored as `dtype`. `name` is for messages.
///
/// # Errors
/// [`olive_core::Error::NotFinite`] or [`olive_core::Error::Tensor`] if the weight is not usable.
pub fn quantize(
    name: &str,
    weight: &[f32],
    shape: [usize; 2],
    double_quant: bool,
    dtype: DType,
) -> Result<Nf4Matrix> {
    let [rows, cols] = shape;
    check_weight(name, weight, shape, cols.max(1))?;
    let mut values = vec![0u8; weight.len().div_ceil(2)];
    let absmax: Vec<f32> = values
        .par_chunks_mut(BLOCK / 2)
        .zip(weight.par_chunks(BLOCK))
        .with_min_len(64)
        .map(|(values, block)| {
            let absmax = block.iter().fold(0.0f32, |most, w| most.max(w.abs()));
            for (byte, pair) in values.iter_mut().zip(block.chunks(2)) {
                let code = |w: Option<&f32>| w.map_or(0, |w| nearest(*w, absmax));
                *byte = (code(pair.first()) << 4) | code(pair.get(1));
            }
            absmax
        })
        .collect();
    Ok(Nf4Matrix {
        rows,
        cols,
        block_size: BLOCK,
        values,
        absmax: match double_quant {
            true => Absmax::Nested(nest(&absmax)),
            false => Absmax::Plain(absmax),
        },
        code: CODE,
        dtype,
    })
}

/// The index of the value nearest to `w / absmax`.
fn nearest(w: f32, absmax: f32) -> u8 {
    if absmax == 0.0 {
        return ZERO;
    }
    let x = w / absmax;
    CODE.windows(2).filter(|pair| x > (pair[0] + pair[1]) / 2.0).count() as u8
}

/// The 256 values of the dynamic map, ascending: seven decades with 1, 2, 4 … 64 values of either sign, 0 and 1.
pub fn dynamic_map() -> Vec<f32> {
    let mut map = vec![0.0f32, 1.0];
    for decade in 0..7 {
        let count = 1usize << decade;
        let bound = |i: usize| (0.1 + 0.9 * i as f64 / count as f64) as f32;
        let magnitude = 10f64.powi(decade - 6) as f32;
        for i in 0..count {
            let value = magnitude * ((bound(i) + bound(i + 1)) / 2.0);
            map.extend([value, -value]);
        }
    }
    map.sort_by(f32::total_cmp);
    map
}

fn nest(absmax: &[f32]) -> NestedAbsmax {
    let map = dynamic_map();
    let mean = absmax.iter().map(|value| f64::from(*value)).sum::<f64>() / absmax.len().max(1) as f64;
    let offset = mean as f32;
    let rest: Vec<f32> = absmax.iter().map(|value| value - offset).collect();
    let mut codes = Vec::with_capacity(rest.len());
    let mut nested = Vec::new();
    for block in rest.chunks(NESTED_BLOCK) {
        let largest = block.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        let divisor = if largest == 0.0 { 1.0 } else { largest };
        codes.extend(block.iter().map(|value| nearest_of(&map, value / divisor)));
        nested.push(largest);
    }
    NestedAbsmax {
        codes,
        absmax: nested,
        map,
        offset,
        block_size: NESTED_BLOCK,
    }
}

/// The index of the value of the ascending `map` nearest to `x`.
fn nearest_of(map: &[f32], x: f32) -> u8 {
    let above = map.partition_point(|value| *value < x).min(map.len() - 1);
    let below = above.saturating_sub(1);
    let index = if (x - map[below]).abs() <= (map[above] - x).abs() { below } else { above };
    index as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_go_to_the_nearest_with_halves_below() {
        for (i, pair) in CODE.windows(2).enumerate() {
            let middle = (pair[0] + pair[1]) / 2.0;
            assert_eq!(usize::from(nearest(middle, 1.0)), i);
            assert_eq!(usize::from(nearest(middle.next_up(), 1.0)), i + 1);
            assert_eq!(usize::from(nearest(pair[0], 1.0)), i);
        }
        assert_eq!(nearest(1.0, 1.0), 15);
        assert_eq!(nearest(0.0, 0.0), ZERO);
    }

    #[test]
    fn the_dynamic_map_has_both_signs_zero_and_one() {
        let map = dynamic_map();
        assert_eq!(map.len(), 256);
        assert_eq!((map[127], map[255]), (0.0, 1.0));
        assert!(map.is_sorted() && map.windows(2).all(|pair| pair[0] < pair[1]));
        for i in 1..127 {
            assert_eq!(map[127 - i], -map[127 + i]);
        }
        // The largest: the last of 64 in the top decade.
        assert!((map[254] - (1.0 - 0.9 / 128.0)).abs() < 1e-6);
        for value in [0.0, 1.0, -0.5, 1e-7, -0.993] {
            let found = map[usize::from(nearest_of(&map, value))];
            assert!(map.iter().all(|other| (found - value).abs() <= (other - value).abs()));
        }
    }

    #[test]
    fn errors_are_within_half_a_gap_and_double_quantization_adds_little() {
        let shape = [40, 100];
        let w: Vec<f32> = (0..4000u32)
            .map(|i| ((i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0) * (1.0 + (i / 64) as f32 / 30.0))
            .collect();
        let plain = quantize("w", &w, shape, false, DType::BF16).unwrap();
        let widest = CODE.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0f32, f32::max);
        for (i, (got, w)) in plain.dequantize().iter().zip(&w).enumerate() {
            assert!((got - w).abs() <= plain.absmax.get(i / 64) * widest * 0.5001);
        }
        let double = quantize("w", &w, shape, true, DType::BF16).unwrap();
        assert_eq!(double.values, plain.values);
        assert!(double.byte_len() < plain.byte_len());
        for block in 0..w.len().div_ceil(64) {
            let (want, got) = (plain.absmax.get(block), double.absmax.get(block));
            assert!((want - got).abs() < 0.03 * want, "{want} {got}");
        }
    }
}
