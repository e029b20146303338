//! The loss of a half layer with other weights where tensors are in host memory: one sequence or some tokens a task,
//! those with the largest error first, so that a candidate that cannot win is given up early.

use burn::tensor::backend::Backend;
use olive_core::Result;
use olive_core::decoder::{DecoderLayer, HostTensor, PackedHalf};
use olive_core::kernels::{row_dots, wide};
use rayon::prelude::*;

use super::{Half, HalfRun, table};
use crate::quantizer::awq::search::subtract;

/// Tokens of an MLP's task.
const TOKENS: usize = 256;

/// A token: its sequence and its place.
type Token = (usize, usize);

/// What is computed together: a sequence, or tokens of an MLP.
pub(super) type Task = Vec<Token>;

impl<B: Backend> HalfRun<'_, B> {
    /// The squared difference of the output, or a part of it that exceeds `limit`; `None` where tensors are not in
    /// host memory. Whether the limit is exceeded does not depend on where the sum stops: it only grows.
    pub(super) fn sum_on_host(&self, layer: &DecoderLayer<B>, limit: f64) -> Result<Option<f64>> {
        let window = self.tables.first().map_or(usize::MAX, |tables| tables.window);
        let half = match self.half {
            Half::Attention => PackedHalf::attention(layer, window),
            Half::Mlp => PackedHalf::mlp(layer),
        };
        let values = |of: &[_]| of.iter().map(HostTensor::of).collect::<Option<Vec<_>>>();
        let (Some(half), Some(normed), Some(outputs)) = (half, values(&self.normed), values(&self.outputs))
        else {
            return Ok(None);
        };
        let rows = [&normed[..], &outputs[..]];
        let known = self.tasks.get();
        let natural;
        let tasks = match known {
            Some(tasks) => tasks,
            None => {
                natural = self.natural_tasks();
                &natural
            }
        };
        let mut sum = 0.0;
        let mut errors: Vec<(Token, f64)> = Vec::new();
        for tasks in tasks.chunks(rayon::current_num_threads().max(1)) {
            self.cancel.check()?;
            let found: Vec<Vec<f64>> = tasks
                .par_iter()
                .map(|task| self.task_errors(&half, rows, task))
                .collect();
            for (task, found) in tasks.iter().zip(found) {
                sum += found.iter().sum::<f64>();
                if known.is_none() {
                    errors.extend(task.iter().copied().zip(found));
                }
            }
            if sum > limit {
                return Ok(Some(sum));
            }
        }
        if known.is_none() {
            // The first candidate, rounding alone, is always computed to the end.
            _ = self.tasks.set(self.sorted_tasks(errors));
        }
        Ok(Some(sum))
    }

    /// Every task in the order of the tokens.
    fn natural_tasks(&self) -> Vec<Task> {
        let length = |x: &burn::tensor::Tensor<B, 3>| x.dims()[1];
        let sequences = self.normed.iter().enumerate();
        let tokens = sequences.map(|(sequence, x)| (0..length(x)).map(move |row| (sequence, row)));
        match self.half {
            Half::Attention => tokens.map(Iterator::collect).collect(),
            Half::Mlp => {
                let tokens: Task = tokens.flatten().collect();
                tokens.chunks(TOKENS).map(<[Token]>::to_vec).collect()
            }
        }
    }

    /// Every task, those with the largest errors first.
    fn sorted_tasks(&self, mut errors: Vec<(Token, f64)>) -> Vec<Task> {
        match self.half {
            Half::Mlp => {
                errors.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                let tokens: Task = errors.into_iter().map(|(token, _)| token).collect();
                tokens.chunks(TOKENS).map(<[Token]>::to_vec).collect()
            }
            Half::Attention => {
                let mut sums = vec![0.0; self.normed.len()];
                for ((sequence, _), error) in errors {
                    sums[sequence] += error;
                }
                let mut tasks = self.natural_tasks();
                let sum = |task: &Task| task.first().map_or(0.0, |(sequence, _)| sums[*sequence]);
                tasks.sort_by(|a, b| sum(b).total_cmp(&sum(a)).then(a.first().cmp(&b.first())));
                tasks
            }
        }
    }

    /// The squared difference at each token of a task.
    fn task_errors(
        &self,
        half: &PackedHalf,
        [normed, outputs]: [&[HostTensor]; 2],
        task: &[Token],
    ) -> Vec<f64> {
        let Some((first, _)) = task.first() else {
            return Vec::new();
        };
        let [_, length, hidden] = self.normed[*first].dims();
        let tables = table(self.tables, length);
        let place = |(_, row): Token| row * hidden..(row + 1) * hidden;
        let mut found = vec![0.0; task.len() * hidden];
        match self.half {
            Half::Attention => half.forward(normed[*first].values(), tables, &mut found),
            Half::Mlp => {
                let mut x = Vec::with_capacity(task.len() * hidden);
                for token in task {
                    x.extend_from_slice(&normed[token.0].values()[place(*token)]);
                }
                half.forward(&x, tables, &mut found);
            }
        }
        for (found, token) in found.chunks_exact_mut(hidden).zip(task) {
            let wanted = &outputs[token.0].values()[place(*token)];
            wide(subtract, (found, wanted));
        }
        row_dots(&found, &found, hidden).collect()
    }
}
