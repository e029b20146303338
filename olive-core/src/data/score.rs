//! What a model makes of a sample.

use crate::error::{Error, Result};

/// What a model makes of the labelled positions of a sample: all of those that a label follows.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SampleScore {
    /// Sum of the negative log-probabilities of the labels, in nats.
    pub loss: f64,
    /// Labels that were predicted.
    pub tokens: usize,
    /// Labels that had the highest probability of all tokens; of equal ones the first counts.
    pub hits: usize,
}

impl SampleScore {
    /// Counts one position in: `scores` are its logits, one a token of the vocabulary.
    ///
    /// # Errors
    /// [`Error::Tensor`] if `label` is no token; [`Error::NotFinite`].
    pub fn add(&mut self, scores: &[f32], label: usize) -> Result<()> {
        let Some(chosen) = scores.get(label) else {
            let expected = format!("ids below {}", scores.len());
            return Err(Error::tensor("labels", expected, label.to_string()));
        };
        let (mut best, mut top) = (0, f32::NEG_INFINITY);
        for (token, score) in scores.iter().enumerate() {
            if *score > top {
                (best, top) = (token, *score);
            }
        }
        let sum: f64 = scores
            .iter()
            .map(|score| (f64::from(*score) - f64::from(top)).exp())
            .sum();
        let loss = f64::from(top) + sum.ln() - f64::from(*chosen);
        if !loss.is_finite() {
            return Err(Error::NotFinite {
                what: "the loss".to_owned(),
                found: 1,
            });
        }
        self.loss += loss;
        self.tokens += 1;
        self.hits += usize::from(best == label);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_and_hits_are_those_of_a_softmax() {
        let scores = [1.0_f32, 3.0, -2.0, 3.0];
        let sum: f64 = scores.iter().map(|x| f64::from(*x).exp()).sum();
        let mut score = SampleScore::default();
        for label in [1, 3, 0] {
            score.add(&scores, label).unwrap();
        }
        let wanted: f64 = [3.0_f64, 3.0, 1.0].iter().map(|x| -(x.exp() / sum).ln()).sum();
        assert!((score.loss - wanted).abs() < 1e-12);
        assert_eq!((score.tokens, score.hits), (3, 1));
        assert!(score.add(&scores, 4).is_err());
        assert!(score.add(&[f32::NAN, 0.0], 0).is_err());
    }
}
