//! Rounding to 4-bit floats as bitsandbytes does on the CPU (<https://arxiv.org/abs/2305.14314>, sections 3 and A).
//!
//! Values are multiplied by the inverse of the largest magnitude of their block (those of a last, shorter block are
//! divided by it) and go to the nearest of the sixteen values; one halfway between two goes to the lower. Double
//! quantization takes the mean from the blocks' magnitudes and stores the rest in blocks of 256 with the dynamic 8-bit
//! map (<https://arxiv.org/abs/1511.04561>).

use rayon::prelude::*;

use super::{Absmax, BLOCK, NESTED_BLOCK, NestedAbsmax, Nf4Matrix, QuantType};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Stands for the largest magnitude of a block of zeros.
const SMALLEST: f32 = 1e-38;

/// How a weight is rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nf4Options {
    /// Which sixteen values.
    pub quant_type: QuantType,
    /// Values that share an absolute maximum, an even number.
    pub block_size: usize,
    /// Whether the absolute maxima are quantized too.
    pub double_quant: bool,
}

impl Default for Nf4Options {
    fn default() -> Self {
        Self {
            quant_type: QuantType::Nf4,
            block_size: BLOCK,
            double_quant: false,
        }
    }
}

/// Quantizes `weight [rows, cols]`, row-major, which was stored as `dtype`; `name` is for messages.
///
/// # Errors
/// [`Error::NotFinite`], or [`Error::Tensor`] if the length is another or the number of values is odd.
pub fn quantize(
    name: &str,
    weight: &[f32],
    [rows, cols]: [usize; 2],
    options: Nf4Options,
    dtype: DType,
) -> Result<Nf4Matrix> {
    let Nf4Options {
        quant_type,
        block_size,
        double_quant,
    } = options;
    if block_size == 0 || !block_size.is_multiple_of(2) {
        return Err(Error::tensor(
            name,
            "blocks of an even size",
            block_size.to_string(),
        ));
    }
    if weight.len() != rows * cols || !weight.len().is_multiple_of(2) {
        let expected = format!("{rows} x {cols} values, an even number of them");
        return Err(Error::tensor(name, expected, format!("{} values", weight.len())));
    }
    let found = weight.iter().filter(|w| !w.is_finite()).count();
    if found > 0 {
        return Err(Error::NotFinite {
            what: format!("tensor `{name}`"),
            found,
        });
    }
    let grid = Grid::new(quant_type);
    let mut values = vec![0u8; weight.len() / 2];
    let absmax: Vec<f32> = values
        .par_chunks_mut(block_size / 2)
        .zip(weight.par_chunks(block_size))
        .with_min_len(64)
        .map(|(values, block)| grid.round_block(block, values, block.len() == block_size))
        .collect();
    Ok(Nf4Matrix {
        rows,
        cols,
        block_size,
        values,
        absmax: match double_quant {
            true => Absmax::Nested(nest(&absmax)),
            false => Absmax::Plain(absmax),
        },
        code: *quant_type.code(),
        dtype,
    })
}

/// The sixteen values in ascending order, their codes, and what lies between them.
struct Grid {
    codes: [u8; 16],
    middles: [f32; 15],
}

impl Grid {
    fn new(quant_type: QuantType) -> Self {
        let code = quant_type.code();
        let mut codes: [u8; 16] = std::array::from_fn(|i| i as u8);
        codes.sort_by(|a, b| code[usize::from(*a)].total_cmp(&code[usize::from(*b)]));
        let value = |i: usize| code[usize::from(codes[i])];
        let middles = std::array::from_fn(|i| (value(i) + value(i + 1)) / 2.0);
        Self { codes, middles }
    }

    /// The code of the value nearest to `x`.
    fn nearest(&self, x: f32) -> u8 {
        self.codes[self.middles.iter().filter(|middle| x > **middle).count()]
    }

    /// Rounds a block, two codes a byte, and gives its largest magnitude.
    fn round_block(&self, block: &[f32], values: &mut [u8], whole: bool) -> f32 {
        let largest = block.iter().fold(0.0f32, |most, w| most.max(w.abs()));
        let absmax = largest.max(SMALLEST);
        let inverse = 1.0 / absmax;
        let code = |w: f32| self.nearest(if whole { w * inverse } else { w / absmax });
        for (byte, pair) in values.iter_mut().zip(block.as_chunks::<2>().0) {
            *byte = (code(pair[0]) << 4) | code(pair[1]);
        }
        if whole { largest } else { absmax }
    }
}

/// The 256 values of the dynamic map, ascending: seven decades with 1, 2, 4 … 64 values of either sign, 0 and 1.
pub fn dynamic_map() -> Vec<f32> {
    let mut map = vec![0.0f32, 1.0];
    for decade in 0..7 {
        let count = 1usize << decade;
        let step = (1.0 - 0.1f32) / count as f32;
        // As `torch.linspace` counts: from the nearer end, products and sums rounded once.
        let bound = |i: usize| match i < count.div_ceil(2) {
            true => step.mul_add(i as f32, 0.1),
            false => (-step).mul_add((count - i) as f32, 1.0),
        };
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
    let mean = absmax.iter().map(|value| f64::from(*value)).sum::<f64>() / absmax.len().max(1) as f64;
    nest_from(absmax, mean as f32)
}

/// The magnitudes less `offset`, in 8 bits.
fn nest_from(absmax: &[f32], offset: f32) -> NestedAbsmax {
    let map = dynamic_map();
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

/// The index of the value of the ascending `map` nearest to `x`; halfway between two it is the lower.
fn nearest_of(map: &[f32], x: f32) -> u8 {
    let above = map.partition_point(|value| *value < x).min(map.len() - 1);
    let below = above.saturating_sub(1);
    let index = if (x - map[below]).abs() <= (map[above] - x).abs() {
        below
    } else {
        above
    };
    index as u8
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::checkpoint::{Checkpoint, TensorSource};
    use crate::packed::nf4::{self, CODE};

    #[test]
    fn values_go_to_the_nearest_with_halves_below() {
        let grid = Grid::new(QuantType::Nf4);
        for (i, pair) in CODE.windows(2).enumerate() {
            let middle = (pair[0] + pair[1]) / 2.0;
            assert_eq!(usize::from(grid.nearest(middle)), i);
            assert_eq!(usize::from(grid.nearest(middle.next_up())), i + 1);
            assert_eq!(usize::from(grid.nearest(pair[0])), i);
        }
        assert_eq!((grid.nearest(1.0), grid.nearest(0.0)), (15, 7));
    }

    #[test]
    fn the_dynamic_map_has_both_signs_zero_and_one() {
        let map = dynamic_map();
        assert_eq!(map.len(), 256);
        assert_eq!((map[127], map[255]), (0.0, 1.0));
        assert!(map.windows(2).all(|pair| pair[0] < pair[1]));
        for i in 1..127 {
            assert_eq!(map[127 - i], -map[127 + i]);
        }
        for value in [0.0, 1.0, -0.5, 1e-7, -0.993] {
            let found = map[usize::from(nearest_of(&map, value))];
            assert!(
                map.iter()
                    .all(|other| (found - value).abs() <= (other - value).abs())
            );
        }
    }

    #[test]
    fn weights_that_cannot_be_stored_are_refused_by_name() {
        for (weight, shape) in [
            (vec![0.0; 3], [1, 3]),
            (vec![0.0; 4], [1, 3]),
            (vec![f32::NAN, 0.0], [1, 2]),
        ] {
            let error = quantize("some.weight", &weight, shape, Nf4Options::default(), DType::F32);
            assert!(error.unwrap_err().to_string().contains("some.weight"));
        }
    }

    /// Codes, magnitudes, maps and states of bitsandbytes itself, and the values that it gives back.
    #[test]
    fn bytes_are_those_of_bitsandbytes() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/nf4");
        let golden = Checkpoint::open_files(&folder, vec![folder.join("quantized.safetensors")]).unwrap();
        let source: &dyn TensorSource = &golden;
        let mut checked = 0;
        for case in ["normal", "edges", "ragged", "half"] {
            let info = source.require(&format!("{case}.dense")).unwrap().clone();
            let weight = source.read_f32(&format!("{case}.dense")).unwrap();
            let shape = [info.shape[0], info.shape[1]];
            for (quant_type, type_name) in [(QuantType::Nf4, "nf4"), (QuantType::Fp4, "fp4")] {
                for double in [false, true] {
                    let module = format!("{case}.{type_name}.{}", if double { "double" } else { "plain" });
                    let options = |double_quant| Nf4Options {
                        quant_type,
                        block_size: BLOCK,
                        double_quant,
                    };
                    let ours = quantize(&module, &weight, shape, options(double), info.dtype).unwrap();
                    let theirs = nf4::read(source, &module, shape).unwrap();
                    assert_eq!(ours.values, theirs.values, "{module}");
                    assert_eq!((ours.code, ours.dtype), (theirs.code, theirs.dtype), "{module}");
                    match (&ours.absmax, &theirs.absmax) {
                        (Absmax::Plain(ours), Absmax::Plain(theirs)) => assert_eq!(ours, theirs, "{module}"),
                        (Absmax::Nested(ours), Absmax::Nested(theirs)) => {
                            // Their mean is a single-precision sum whose order depends on the processor.
                            let off = (ours.offset / theirs.offset - 1.0).abs();
                            assert!(off < 1e-6, "{module}: {} {}", ours.offset, theirs.offset);
                            let plain =
                                quantize(&module, &weight, shape, options(false), info.dtype).unwrap();
                            let Absmax::Plain(plain) = plain.absmax else {
                                panic!()
                            };
                            assert_eq!(&nest_from(&plain, theirs.offset), theirs, "{module}");
                        }
                        _ => panic!("{module}: one is nested, the other is not"),
                    }
                    // What it gives back, in the weight's own type.
                    let expected = source.read_f32(&format!("{module}.dequantized")).unwrap();
                    let found: Vec<f32> = theirs.dequantize().iter().map(|w| info.dtype.round(*w)).collect();
                    assert_eq!(found, expected, "{module}");
                    // A module written by olive has their tensors, byte by byte but for the spaces of the state.
                    let infos = nf4::plan(&module, shape, options(double));
                    for ((name, dtype, shape, bytes), (planned, planned_info)) in
                        nf4::store(&module, &theirs).unwrap().into_iter().zip(infos)
                    {
                        let info = source.require(&name).unwrap();
                        assert_eq!((&name, &shape), (&planned, &planned_info.shape));
                        let theirs = source.bytes(&name).unwrap();
                        if name.contains("quant_state") {
                            let state =
                                |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).unwrap();
                            assert_eq!(state(&bytes), state(&theirs), "{name}");
                        } else {
                            assert_eq!((info.dtype, &info.shape), (dtype, &shape), "{name}");
                            assert_eq!(theirs, bytes, "{name}");
                        }
                    }
                    checked += 1;
                }
            }
        }
        assert_eq!(checked, 16);
    }
}
