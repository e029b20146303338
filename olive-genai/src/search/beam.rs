//! Beam search with the scores of onnxruntime-genai's CPU search.

use crate::params::SearchOptions;

/// A finished sequence: its tokens with the prompt, and its sum of log-probabilities over `length^penalty`.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// Prompt and new tokens, without the end token.
    pub tokens: Vec<u32>,
    /// The score.
    pub score: f32,
}

/// The beams of every prompt of a batch.
#[derive(Debug, Clone)]
pub struct BeamSearch {
    beams: usize,
    length_penalty: f32,
    early_stopping: bool,
    /// `[batch · beams]` sums of log-probabilities.
    scores: Vec<f32>,
    finished: Vec<Vec<Finished>>,
    done: Vec<bool>,
}

/// What a beam goes on as: the beam that it continues and the token that it adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Continuation {
    /// The row that it continues.
    pub row: usize,
    /// The token.
    pub token: u32,
}

impl BeamSearch {
    /// Beams for `batch` prompts: the first of each starts at 0, the others far below, since all are the same.
    pub fn new(batch: usize, options: &SearchOptions) -> Self {
        const FAR_BELOW: f32 = -1e9;
        let beams = options.num_beams;
        let start = |i: usize| if i.is_multiple_of(beams) { 0.0 } else { FAR_BELOW };
        Self {
            beams,
            length_penalty: options.length_penalty,
            early_stopping: options.early_stopping,
            scores: (0..batch * beams).map(start).collect(),
            finished: vec![Vec::new(); batch],
            done: vec![false; batch],
        }
    }

    /// Whether every prompt has enough finished sequences that no running beam can beat.
    pub fn is_done(&self) -> bool {
        self.done.iter().all(|done| *done)
    }

    /// Takes one step: `logits` is `[batch · beams, vocabulary]` with penalties applied to the log-probabilities by
    /// `adjust(row, scores)`; `sequences` are the rows so far.
    pub fn step(
        &mut self,
        logits: &[f32],
        sequences: &[Vec<u32>],
        ends: &[u32],
        pad: u32,
        adjust: impl Fn(usize, &mut [f32]),
    ) -> Vec<Continuation> {
        let vocabulary = logits.len() / self.scores.len();
        let mut scores = logits.to_vec();
        for (row, scores) in scores.chunks_exact_mut(vocabulary).enumerate() {
            log_softmax(scores);
            adjust(row, scores);
            scores.iter_mut().for_each(|s| *s += self.scores[row]);
        }
        let mut next = Vec::with_capacity(self.scores.len());
        for prompt in 0..self.done.len() {
            let first = prompt * self.beams;
            if self.done[prompt] {
                next.extend((0..self.beams).map(|b| Continuation {
                    row: first + b,
                    token: pad,
                }));
                continue;
            }
            let rows = &scores[first * vocabulary..(first + self.beams) * vocabulary];
            let best = best_of(rows, 2 * self.beams);
            self.place(prompt, &best, vocabulary, sequences, ends, &mut next);
        }
        next
    }

    fn place(
        &mut self,
        prompt: usize,
        best: &[(usize, f32)],
        vocabulary: usize,
        sequences: &[Vec<u32>],
        ends: &[u32],
        next: &mut Vec<Continuation>,
    ) {
        let first = prompt * self.beams;
        let length = sequences[first].len();
        let start = next.len();
        let mut scores = Vec::with_capacity(self.beams);
        for (rank, (index, score)) in best.iter().enumerate() {
            let (row, token) = (first + index / vocabulary, (index % vocabulary) as u32);
            if ends.contains(&token) {
                if rank < self.beams {
                    self.finish(prompt, &sequences[row], *score);
                }
            } else {
                next.push(Continuation { row, token });
                scores.push(*score);
            }
            if scores.len() == self.beams {
                break;
            }
        }
        while next.len() - start < self.beams {
            next.push(Continuation {
                row: first,
                token: ends.first().copied().unwrap_or(0),
            });
            scores.push(f32::MIN);
        }
        self.scores[first..first + self.beams].copy_from_slice(&scores);
        let top = best
            .iter()
            .map(|(_, score)| *score)
            .fold(f32::NEG_INFINITY, f32::max);
        self.done[prompt] = self.settled(prompt, top, length);
    }

    fn finish(&mut self, prompt: usize, tokens: &[u32], sum: f32) {
        let score = sum / (tokens.len() as f32).powf(self.length_penalty);
        let finished = &mut self.finished[prompt];
        let at = finished.partition_point(|other| other.score >= score);
        finished.insert(
            at,
            Finished {
                tokens: tokens.to_vec(),
                score,
            },
        );
        finished.truncate(self.beams);
    }

    fn settled(&self, prompt: usize, top: f32, length: usize) -> bool {
        let finished = &self.finished[prompt];
        if finished.len() < self.beams {
            return false;
        }
        let reachable = top / (length as f32).powf(self.length_penalty);
        self.early_stopping || finished.last().is_some_and(|worst| worst.score >= reachable)
    }

    /// The best `count` sequences of a prompt, running beams of unfinished prompts included.
    pub fn best(&self, prompt: usize, sequences: &[Vec<u32>], count: usize) -> Vec<Finished> {
        let mut search = self.clone();
        if !search.done[prompt] {
            let running = sequences
                .iter()
                .zip(&self.scores)
                .skip(prompt * self.beams)
                .take(self.beams);
            for (tokens, sum) in running {
                search.finish(prompt, tokens, *sum);
            }
        }
        search.finished[prompt].iter().take(count).cloned().collect()
    }
}

fn log_softmax(scores: &mut [f32]) {
    let top = scores.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s));
    let sum: f32 = scores.iter().map(|s| (s - top).exp()).sum();
    let shift = top + sum.ln();
    scores.iter_mut().for_each(|s| *s -= shift);
}

/// The `count` largest with their places, largest first, the first of equals first.
fn best_of(scores: &[f32], count: usize) -> Vec<(usize, f32)> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let by_score = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
    if count < order.len() {
        order.select_nth_unstable_by(count, by_score);
        order.truncate(count);
    }
    order.sort_unstable_by(by_score);
    order.into_iter().map(|i| (i, scores[i])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table of next-token scores by last token; token 0 ends.
    fn model(sequence: &[u32]) -> Vec<f32> {
        let last = f64::from(sequence[sequence.len() - 1]);
        (0..6)
            .map(|i| ((last * 1.7 + f64::from(i) * 2.3 + sequence.len() as f64 * 0.9).sin() * 3.0) as f32)
            .collect()
    }

    /// The best sequence of all, by trying every one.
    fn exhaustive(prompt: &[u32], length: usize) -> (Vec<u32>, f32) {
        let mut best = (Vec::new(), f32::NEG_INFINITY);
        let mut open = vec![(prompt.to_vec(), 0.0f32)];
        while let Some((tokens, sum)) = open.pop() {
            if tokens.len() == length {
                let score = sum / tokens.len() as f32;
                if score > best.1 {
                    best = (tokens, score);
                }
                continue;
            }
            let mut scores = model(&tokens);
            log_softmax(&mut scores);
            for (token, score) in scores.iter().enumerate() {
                if token == 0 {
                    let score = (sum + score) / tokens.len() as f32;
                    if score > best.1 {
                        best = (tokens.clone(), score);
                    }
                } else {
                    let mut longer = tokens.clone();
                    longer.push(token as u32);
                    open.push((longer, sum + score));
                }
            }
        }
        best
    }

    #[test]
    fn wide_beams_find_the_best_sequence() {
        let options = SearchOptions {
            num_beams: 32,
            early_stopping: false,
            ..Default::default()
        };
        for first in 1..6 {
            let mut search = BeamSearch::new(1, &options);
            let mut sequences = vec![vec![first]; 32];
            while sequences[0].len() < 5 && !search.is_done() {
                let logits: Vec<f32> = sequences.iter().flat_map(|s| model(s)).collect();
                let next = search.step(&logits, &sequences, &[0], 0, |_, _| {});
                sequences = next
                    .iter()
                    .map(|c| sequences[c.row].iter().copied().chain([c.token]).collect())
                    .collect();
            }
            let found = search.best(0, &sequences, 1);
            let (tokens, score) = exhaustive(&[first], 5);
            assert_eq!(found[0].tokens, tokens);
            assert!((found[0].score - score).abs() < 1e-5);
        }
    }
}
