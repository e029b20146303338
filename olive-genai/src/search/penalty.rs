//! Changes of the scores before a token is chosen.

use crate::params::SearchOptions;

/// Forbids, in this order: end tokens below the least length; discourages tokens that occurred; forbids tokens that
/// would repeat a run of tokens. `sequence` is everything so far, prompt included.
pub fn penalize(scores: &mut [f32], sequence: &[u32], options: &SearchOptions, ends: &[u32]) {
    if sequence.len() < options.min_length {
        for end in ends {
            if let Some(score) = scores.get_mut(*end as usize) {
                *score = f32::MIN;
            }
        }
    }
    if options.repetition_penalty != 1.0 {
        let mut seen: Vec<u32> = sequence.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            if let Some(score) = scores.get_mut(id as usize) {
                let penalty = options.repetition_penalty;
                *score = if *score < 0.0 {
                    *score * penalty
                } else {
                    *score / penalty
                };
            }
        }
    }
    let size = options.no_repeat_ngram_size;
    if size > 0 && sequence.len() + 1 > size {
        let last = &sequence[sequence.len() + 1 - size..];
        for run in sequence.windows(size) {
            if run[..size - 1] == *last
                && let Some(score) = scores.get_mut(run[size - 1] as usize)
            {
                *score = f32::MIN;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_option_changes_only_its_tokens() {
        let mut options = SearchOptions {
            min_length: 4,
            ..Default::default()
        };
        let start = [1.0f32, -2.0, 3.0, -4.0, 5.0];
        let mut scores = start;
        penalize(&mut scores, &[0, 1, 0], &options, &[4, 9]);
        assert_eq!(scores, [1.0, -2.0, 3.0, -4.0, f32::MIN]);
        scores = start;
        penalize(&mut scores, &[0, 1, 0, 1], &options, &[4]);
        assert_eq!(scores, start);
        options = SearchOptions {
            repetition_penalty: 2.0,
            ..Default::default()
        };
        penalize(&mut scores, &[0, 1, 0, 1], &options, &[4]);
        assert_eq!(scores, [0.5, -4.0, 3.0, -4.0, 5.0]);
        options = SearchOptions {
            no_repeat_ngram_size: 2,
            ..Default::default()
        };
        scores = start;
        penalize(&mut scores, &[0, 1, 2, 0], &options, &[]);
        assert_eq!(scores, [1.0, f32::MIN, 3.0, -4.0, 5.0]);
        options.no_repeat_ngram_size = 1;
        scores = start;
        penalize(&mut scores, &[0, 2], &options, &[]);
        assert_eq!(scores, [f32::MIN, -2.0, f32::MIN, -4.0, 5.0]);
        options.no_repeat_ngram_size = 3;
        scores = start;
        penalize(&mut scores, &[0], &options, &[]);
        assert_eq!(scores, start);
    }
}
