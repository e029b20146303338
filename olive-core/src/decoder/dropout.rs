//! Dropout whose mask is a function of where an element is, so that nothing has to be kept for the backward.
//!
//! Element `i` of a module's input in a step is kept if the 32 bits that SplitMix64 gives for (seed, step, module,
//! `i`) are not below `p · 2³²`. The mask depends neither on the number of threads nor on how rows are grouped.

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};

use super::host;

/// A stream of keep-or-drop decisions for the input of one linear.
#[derive(Debug, Clone, PartialEq)]
pub struct DropoutStream {
    probability: f64,
    parts: Vec<Part>,
}

/// Consecutive rows of one sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Part {
    rows: usize,
    key: u64,
    first_row: u64,
}

impl DropoutStream {
    /// Keeps everything.
    pub const fn none() -> Self {
        Self {
            probability: 0.0,
            parts: Vec::new(),
        }
    }

    /// Drops with `probability` (below 1); `first_row` is the place of the first row in its micro-batch.
    pub fn new(probability: f64, seed: u64, first_row: usize) -> Self {
        let part = Part {
            rows: usize::MAX,
            key: mix(seed ^ 0x6F6C_6976_6544_726F),
            first_row: first_row as u64,
        };
        Self {
            probability,
            parts: vec![part],
        }
    }

    /// The stream of sequences whose rows follow one another: the stream and the number of rows of each.
    pub fn join(streams: impl IntoIterator<Item = (Self, usize)>) -> Self {
        let mut joined = Self::none();
        for (stream, rows) in streams {
            joined.probability = stream.probability;
            joined
                .parts
                .extend(stream.parts.first().map(|part| Part { rows, ..*part }));
        }
        joined
    }

    /// The stream of a part of what this one is for: a step, a layer, a linear.
    pub fn child(&self, part: u64) -> Self {
        let turn = |own: &Part| Part {
            key: mix(own.key ^ mix(part.wrapping_add(0x9E37_79B9_7F4A_7C15))),
            ..*own
        };
        Self {
            probability: self.probability,
            parts: self.parts.iter().map(turn).collect(),
        }
    }

    /// Whether nothing is ever dropped.
    pub fn is_none(&self) -> bool {
        self.probability <= 0.0
    }

    /// The probability, and what all decisions follow from.
    #[cfg(feature = "cuda")]
    pub(crate) fn parameters(&self) -> (f64, u64) {
        (self.probability, self.parts.first().map_or(0, |part| part.key))
    }

    /// The factors of `rows` rows of `cols` elements: 0 or `1 / (1 - p)`.
    pub fn mask(&self, rows: usize, cols: usize) -> Vec<f32> {
        let mut factors = vec![1.0; rows * cols];
        self.scale(&mut factors, cols);
        factors
    }

    /// Multiplies rows of `cols` elements by their factors.
    fn scale(&self, values: &mut [f32], cols: usize) {
        let mut rest = values;
        for part in &self.parts {
            let (own, after) = rest.split_at_mut(part.rows.saturating_mul(cols).min(rest.len()));
            rest = after;
            host::by_rows(own, cols, scale_rows, (self.probability, *part, cols));
        }
    }

    /// `x [n, features]` times the mask.
    pub fn apply<B: Backend>(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        if self.is_none() {
            return x;
        }
        let [rows, cols] = x.dims();
        let device = x.device();
        if host::is_host::<B>() {
            let mut values = host::take(x);
            self.scale(&mut values, cols);
            return host::tensor(values, [rows, cols], &device);
        }
        let mask = Tensor::from_data(TensorData::new(self.mask(rows, cols), [rows, cols]), &device);
        x * mask
    }
}

/// Multiplies rows from row `first` of a part on.
#[inline(always)]
fn scale_rows((probability, part, cols): (f64, Part, usize), first: usize, values: &mut [f32]) {
    let threshold = (probability * 4_294_967_296.0) as u32;
    let keep = (1.0 / (1.0 - probability)) as f32;
    let start = (part.first_row + first as u64).wrapping_mul(cols as u64);
    let bits = |pair: u64| mix(part.key.wrapping_add(pair.wrapping_mul(0x9E37_79B9_7F4A_7C15)));
    let factor = |half: u32| if half >= threshold { keep } else { 0.0 };
    // One hash serves the two elements of an even-odd pair of indices; an odd start begins within a pair.
    let lead = ((start & 1) as usize).min(values.len());
    let (ahead, pairs) = values.split_at_mut(lead);
    for value in ahead {
        *value *= factor((bits(start >> 1) >> 32) as u32);
    }
    let base = (start + lead as u64) >> 1;
    let (pairs, last) = pairs.as_chunks_mut::<2>();
    let after = base + pairs.len() as u64;
    for (index, pair) in pairs.iter_mut().enumerate() {
        let bits = bits(base + index as u64);
        pair[0] *= factor(bits as u32);
        pair[1] *= factor((bits >> 32) as u32);
    }
    for value in last {
        *value *= factor(bits(after) as u32);
    }
}

/// The key of a part of what `key` is for.
#[cfg(feature = "cuda")]
pub(crate) fn child_key(key: u64, part: u64) -> u64 {
    mix(key ^ mix(part.wrapping_add(0x9E37_79B9_7F4A_7C15)))
}

/// The finalizer of SplitMix64.
#[inline(always)]
fn mix(value: u64) -> u64 {
    let mut z = value;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_has_its_rate_and_does_not_depend_on_grouping() {
        let whole = DropoutStream::new(0.25, 7, 0).child(3).mask(64, 33);
        let dropped = whole.iter().filter(|v| **v == 0.0).count() as f64 / whole.len() as f64;
        assert!((dropped - 0.25).abs() < 0.03, "{dropped}");
        assert!(whole.iter().all(|v| *v == 0.0 || *v == 1.0 / 0.75));
        let tail = DropoutStream::new(0.25, 7, 40).child(3).mask(24, 33);
        assert_eq!(whole[40 * 33..], tail);
        assert_ne!(whole, DropoutStream::new(0.25, 7, 0).child(4).mask(64, 33));
        assert_ne!(whole, DropoutStream::new(0.25, 8, 0).child(3).mask(64, 33));
        let part = |first| DropoutStream::new(0.25, 7, first);
        let joined = DropoutStream::join([(part(40), 24), (part(0), 10)])
            .child(3)
            .mask(34, 33);
        assert_eq!(joined[..24 * 33], tail);
        assert_eq!(joined[24 * 33..], whole[..10 * 33]);
    }
}
