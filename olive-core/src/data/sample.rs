//! A tokenised training or calibration sample.

/// The label of a position that is not trained on, as PyTorch's cross entropy ignores it.
pub const IGNORED_LABEL: i64 = -100;

/// Token ids with the label of each position. The loss shifts by one: position `t` predicts `labels[t + 1]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// The same ids, or [`IGNORED_LABEL`]; as long as `input_ids`.
    pub labels: Vec<i64>,
    /// Real tokens at the beginning; the rest is padding on the right.
    pub length: usize,
}

impl Sample {
    /// A sample without padding that is trained on everywhere.
    pub fn from_ids(input_ids: Vec<u32>) -> Self {
        let labels = input_ids.iter().map(|id| i64::from(*id)).collect();
        let length = input_ids.len();
        Self {
            input_ids,
            labels,
            length,
        }
    }
}
