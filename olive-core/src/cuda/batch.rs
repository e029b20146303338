//! Sequences that go through the layers together: their tokens one after the other, without padding.

use super::device::{Gpu, Numbers};
use super::kernels::Rotation;
use crate::arch::ModelSpec;
use crate::decoder::rotary_tables;

/// Where the sequences of a batch lie among its rows.
#[derive(Debug, Clone)]
pub struct Batch {
    /// First row and length of each sequence.
    pub sequences: Vec<(usize, usize)>,
    /// Rotary tables, and each row's position in its sequence.
    pub rotation: Rotation,
    /// Each row's place in a micro-batch padded to its longest sequence, which decides what dropout drops.
    pub places: Numbers,
}

impl Batch {
    /// Sequences of these lengths. `total` is the length for which longrope's factors are chosen, padding included.
    pub fn new(gpu: &Gpu, spec: &ModelSpec, lengths: &[usize], total: usize) -> Self {
        let mut sequences = Vec::with_capacity(lengths.len());
        let (mut positions, mut places) = (Vec::new(), Vec::new());
        for (index, length) in lengths.iter().enumerate() {
            sequences.push((positions.len(), *length));
            positions.extend(0..*length as u32);
            places.extend((0..*length).map(|position| (index * total + position) as u32));
        }
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let (cos, sin) = rotary_tables(spec, longest, total);
        let half = spec.rope.rotary_dim / 2;
        Self {
            sequences,
            rotation: Rotation {
                cos: gpu.upload_f32(&cos, longest, half),
                sin: gpu.upload_f32(&sin, longest, half),
                positions: gpu.upload_u32(&positions),
            },
            places: gpu.upload_u32(&places),
        }
    }

    /// Tokens of all sequences.
    pub fn rows(&self) -> usize {
        self.places.len
    }
}
