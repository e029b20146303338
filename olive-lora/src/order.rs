//! Which samples each optimizer step sees: the order of Hugging Face's Trainer.
//!
//! Epoch `e` (from 0) goes through `torch.randperm(n)` seeded with `data_seed + e`, in micro-batches, of which
//! `gradient_accumulation_steps` make one optimizer step; the last group of an epoch may be smaller.

use olive_core::rng::TorchRng;

/// How an epoch is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPlan {
    /// Samples.
    pub samples: usize,
    /// Samples of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of an optimizer step.
    pub accumulation: usize,
    /// Whether an incomplete last micro-batch is left out.
    pub drop_last: bool,
    /// Seed of epoch 0.
    pub seed: u64,
    /// Whether samples of similar length come together.
    pub by_length: bool,
}

/// The samples of one optimizer step, as indices, a list a micro-batch.
pub type StepSamples = Vec<Vec<usize>>;

impl BatchPlan {
    /// Micro-batches of an epoch.
    pub fn batches_per_epoch(&self) -> usize {
        match self.drop_last {
            true => self.samples / self.batch_size,
            false => self.samples.div_ceil(self.batch_size),
        }
    }

    /// Optimizer steps of an epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.batches_per_epoch().div_ceil(self.accumulation)
    }

    /// The optimizer steps of epoch `epoch`, in order. `lengths` are the samples' lengths.
    pub fn epoch(&self, epoch: usize, lengths: &[usize]) -> Vec<StepSamples> {
        let mut order = TorchRng::new(self.seed.wrapping_add(epoch as u64)).permutation(self.samples);
        if self.by_length {
            order = self.group_by_length(order, lengths);
        }
        let batches: Vec<Vec<usize>> = order
            .chunks(self.batch_size)
            .take(self.batches_per_epoch())
            .map(Vec::from)
            .collect();
        batches.chunks(self.accumulation).map(Vec::from).collect()
    }

    /// Mega-batches of up to 50 steps, each sorted by falling length; the one with the longest sample is moved to
    /// the front so that too large a batch fails at once.
    fn group_by_length(&self, order: Vec<usize>, lengths: &[usize]) -> Vec<usize> {
        let step = self.batch_size * self.accumulation;
        let multiple = (self.samples / (step * 4)).clamp(1, 50);
        let mut groups: Vec<Vec<usize>> = order.chunks(multiple * step).map(Vec::from).collect();
        for group in &mut groups {
            group.sort_by(|a, b| lengths[*b].cmp(&lengths[*a]));
        }
        let longest = |group: &Vec<usize>| group.first().map_or(0, |i| lengths[*i]);
        // The first of equals, as an arg-max gives it.
        let at = (0..groups.len()).rev().max_by_key(|i| longest(&groups[*i]));
        if let Some(at) = at.filter(|at| *at > 0) {
            let first = groups[0][0];
            groups[0][0] = std::mem::replace(&mut groups[at][0], first);
        }
        groups.concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(samples: usize, batch_size: usize, accumulation: usize) -> BatchPlan {
        BatchPlan {
            samples,
            batch_size,
            accumulation,
            drop_last: false,
            seed: 42,
            by_length: false,
        }
    }

    #[test]
    fn an_epoch_sees_every_sample_once_in_groups_of_the_asked_size() {
        let plan = plan(18, 4, 2);
        let steps = plan.epoch(0, &[1; 18]);
        let sizes: Vec<Vec<usize>> = steps.iter().map(|s| s.iter().map(Vec::len).collect()).collect();
        assert_eq!(sizes, [vec![4, 4], vec![4, 4], vec![2]]);
        assert_eq!((plan.batches_per_epoch(), plan.steps_per_epoch()), (5, 3));
        let mut seen = steps.concat().concat();
        seen.sort_unstable();
        assert_eq!(seen, (0..18).collect::<Vec<_>>());
        assert_ne!(plan.epoch(0, &[1; 18]), plan.epoch(1, &[1; 18]));
        let whole = BatchPlan {
            drop_last: true,
            ..plan
        };
        assert_eq!(whole.epoch(0, &[1; 18]).concat().len(), 4);
    }

    #[test]
    fn grouping_by_length_sorts_within_groups_and_starts_with_the_longest() {
        let lengths: Vec<usize> = (0..64).map(|i| (i * 37) % 64).collect();
        let grouped = BatchPlan {
            by_length: true,
            ..plan(64, 4, 1)
        };
        let order = grouped.epoch(3, &lengths).concat().concat();
        assert_eq!(lengths[order[0]], 63);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..64).collect::<Vec<_>>());
        for group in order.chunks(16) {
            assert!(group[1..].windows(2).all(|w| lengths[w[0]] >= lengths[w[1]]));
        }
    }
}
