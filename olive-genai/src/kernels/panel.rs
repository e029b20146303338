//! A few output features of a packed weight, unpacked to bytes for integer products with many rows.
//!
//! The elements keep the order of [`super::activation`]; zero points and scales are repeated for every lane, so that
//! the kernels only load them.

use std::ops::Range;

use super::activation::{LANES, unit_elements};
use super::aligned::Aligned;
use super::isa::{Isa, multiversion};
use super::nbits::NBitsWeight;

/// Bytes that a panel should not exceed: it is read once for every few rows and has to stay in the second-level cache.
const PANEL_BYTES: usize = 1 << 17;
/// Panels hold a multiple of this many features where the weight has them.
const FEATURES: usize = 4;

/// Unpacked output features.
#[derive(Debug)]
pub struct Panel {
    /// Features in use.
    pub features: usize,
    /// Units of a feature.
    pub units: usize,
    /// `[features, units, unit]`, zero behind the row's end.
    pub elements: Aligned<u8>,
    /// `[features, units, 16]`: the zero point of the lane's block.
    pub zeros: Aligned<i32>,
    /// `[features, units, 16]`: the scale of the lane's block, zero behind the row's end.
    pub scales: Aligned<f32>,
}

impl Panel {
    /// Room for as many features as a panel should have, up to `most`.
    pub fn new(weight: &NBitsWeight, most: usize) -> Self {
        let unit = unit_elements(weight.bits);
        let units = weight.row_bytes().div_ceil(64);
        let feature = units * (unit + 2 * 4 * LANES);
        let fitting = (PANEL_BYTES / feature / FEATURES).max(1) * FEATURES;
        let features = fitting.min(most);
        Self {
            features,
            units,
            elements: Aligned::new(features * units * unit),
            zeros: Aligned::new(features * units * LANES),
            scales: Aligned::new(features * units * LANES),
        }
    }

    /// Unpacks output features, not more than the panel was made for, with instructions that the processor has.
    pub fn unpack(&mut self, isa: Isa, weight: &NBitsWeight, features: Range<usize>) {
        let unit = unit_elements(weight.bits);
        let lane_blocks = weight.lane_blocks();
        self.features = features.len();
        for (f, n) in features.enumerate() {
            let (row, row_scales) = (weight.row(n), weight.row_scales(n));
            let elements = &mut self.elements[f * self.units * unit..][..self.units * unit];
            if weight.bits == 4 {
                split_nibbles(isa, row, elements);
            } else {
                elements[..row.len()].copy_from_slice(row);
            }
            let lanes = f * self.units * LANES..(f + 1) * self.units * LANES;
            let zeros = self.zeros[lanes.clone()].chunks_exact_mut(LANES);
            let scales = self.scales[lanes].chunks_exact_mut(LANES);
            for (u, (zeros, scales)) in zeros.zip(scales).enumerate() {
                let first = weight.unit_blocks(u).start;
                for (l, block) in lane_blocks.iter().enumerate() {
                    let block = first + *block as usize;
                    let inside = block < weight.blocks;
                    scales[l] = if inside { row_scales[block] } else { 0.0 };
                    zeros[l] = if inside {
                        weight.integer_zero_point(n, block)
                    } else {
                        0
                    };
                }
            }
        }
    }
}

multiversion! {
    /// Low nibbles of 64 bytes, then their high nibbles, for each 64 bytes of a row.
    fn split_nibbles(isa; packed: &[u8], out: &mut [u8]) = split_nibbles_plain
}

#[inline(always)]
fn split_nibbles_plain(packed: &[u8], out: &mut [u8]) {
    for (packed, out) in packed.chunks(64).zip(out.chunks_exact_mut(128)) {
        let (low, high) = out.split_at_mut(64);
        for ((byte, low), high) in packed.iter().zip(low).zip(high) {
            *low = byte & 15;
            *high = byte >> 4;
        }
    }
}
