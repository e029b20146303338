//! Runs of the graph behind a [`Generator`].

use olive_core::{Error, Result};

use super::Generator;
use crate::exec::{LogitRows, RunInput};

impl Generator {
    /// Computes the scores of the next token if they are not there. Called by itself where they are needed; programs
    /// written for the older `compute_logits` may call it.
    ///
    /// # Errors
    /// [`Error::Config`] without a prompt; errors of the graph.
    pub fn compute_logits(&mut self) -> Result<()> {
        if self.logits.is_some() {
            return Ok(());
        }
        let totals: Vec<usize> = self.rows.iter().map(Vec::len).collect();
        if totals.contains(&0) {
            return Err(Error::config("generator", "tokens", "a prompt", "none"));
        }
        let planned = totals.iter().copied().max().unwrap_or(0);
        self.match_tables(planned);
        let limit = match self.params.options.chunk_size {
            Some(size) if totals.len() == 1 => size,
            _ => usize::MAX,
        };
        loop {
            let past = self.cache.lengths().to_vec();
            let steps = totals
                .iter()
                .zip(&past)
                .map(|(total, past)| total - past)
                .max()
                .unwrap_or(0)
                .min(limit);
            let until: Vec<usize> = totals
                .iter()
                .zip(&past)
                .map(|(total, past)| (past + steps).min(*total))
                .collect();
            let last = until == totals;
            let logits = self.run(&past, &until, steps, planned)?;
            if last {
                self.logits = Some(logits);
                return Ok(());
            }
            crate::exec::Plan::recycle(&mut self.workspace, logits);
        }
    }

    fn run(&mut self, past: &[usize], until: &[usize], steps: usize, planned: usize) -> Result<Vec<f32>> {
        let pad = i64::from(self.model.config().model.pad_token_id);
        let mut tokens = Vec::with_capacity(past.len() * steps);
        for (row, (from, to)) in self.rows.iter().zip(past.iter().zip(until)) {
            tokens.extend_from_slice(&row[*from..*to]);
            tokens.extend(std::iter::repeat_n(pad, steps - (to - from)));
        }
        let input = RunInput {
            tokens: &tokens,
            steps,
            totals: until,
            planned,
        };
        let model = self.model.clone();
        let (workspace, cache, overrides) = (&mut self.workspace, &mut self.cache, &self.overrides);
        let plan = &model.inner.plan;
        let run = model.install(|| plan.run(workspace, cache, overrides, input, LogitRows::Last));
        let (logits, vocabulary) = run?;
        self.vocabulary = vocabulary;
        Ok(logits)
    }

    /// A graph with two sets of rotary tables chooses by the length of the sequence, and keys that were written with
    /// one set do not go with the other: crossing the border computes the sequence again. (onnxruntime-genai does so
    /// at 4,097 tokens, whatever the model says.)
    fn match_tables(&mut self, planned: usize) {
        let Some(threshold) = self.model.info().rope_threshold else {
            return;
        };
        let long = planned > threshold;
        if long != self.long_tables {
            let none = vec![0; self.rows.len()];
            self.cache.set_lengths(&none);
            self.long_tables = long;
        }
    }
}
