//! The plain version of the integer kernels.

use std::ops::Range;

use super::activation::QuantActivations;
use super::nbits::{GROUP, NBitsWeight};
use super::parallel::Columns;

/// Integer products of some groups of features with all rows.
pub fn integer_piece(
    weight: &NBitsWeight,
    groups: Range<usize>,
    acts: &QuantActivations,
    out: &mut Columns<'_>,
) {
    for (i, group) in groups.enumerate() {
        for row in 0..acts.rows {
            let sums = if weight.bits == 4 {
                group_dot::<4>(weight, group, acts, row)
            } else {
                group_dot::<8>(weight, group, acts, row)
            };
            let columns = i * GROUP..(i * GROUP + GROUP).min(out.width());
            let count = columns.len();
            out.row(row, columns).copy_from_slice(&sums[..count]);
        }
    }
}

/// The features of a group with a row. Loops have fixed lengths, so that the compiler makes vectors of them.
fn group_dot<const BITS: usize>(
    weight: &NBitsWeight,
    group: usize,
    acts: &QuantActivations,
    row: usize,
) -> [f32; GROUP] {
    let mut sums = [0.0f32; GROUP];
    for b in 0..weight.blocks {
        let at = row * acts.blocks + b;
        let values = &acts.values[at * acts.block..(at + 1) * acts.block];
        let centre = acts.centres[at];
        let mut dots = match weight.point_bytes(group, b) {
            Some(points) => std::array::from_fn(|l| (centre >> (BITS - 1)) * i32::from(points[l])),
            None => [centre; GROUP],
        };
        let steps = weight.steps(group, b).as_chunks::<64>().0;
        for (step, values) in steps.iter().zip(values.chunks_exact(32 / BITS)) {
            for (dot, bytes) in dots.iter_mut().zip(step.as_chunks::<4>().0) {
                for j in 0..4 {
                    let byte = i32::from(bytes[j]);
                    if BITS == 4 {
                        *dot += (byte & 15) * i32::from(values[j]) + (byte >> 4) * i32::from(values[4 + j]);
                    } else {
                        *dot += byte * i32::from(values[j]);
                    }
                }
            }
        }
        let scales = weight.scales(group, b);
        for l in 0..GROUP {
            sums[l] = (dots[l] as f32).mul_add(scales[l] * acts.scales[at], sums[l]);
        }
    }
    sums
}
