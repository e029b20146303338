//! Which point comes next.

use std::collections::BTreeSet;

use super::space::Space;
use super::tpe::Tpe;
use crate::workflow::schema::{SamplerKind, SearchConfig};

/// A point that was tried, and how good it was: objectives by priority, larger is better; `None` if it failed.
pub type Observation = (u64, Option<Vec<f64>>);

/// Chooses points, none twice. The same seed and the same observations give the same points.
pub trait Sampler {
    /// The number of the next point; `None` when there is none left.
    fn next(&mut self, tried: &[Observation]) -> Option<u64>;
}

/// The sampler that a search asks for.
pub fn sampler(config: &SearchConfig, space: &Space) -> Box<dyn Sampler> {
    match config.sampler {
        SamplerKind::Sequential => Box::new(Sequential {
            at: 0,
            end: space.len(),
        }),
        SamplerKind::Random => Box::new(Shuffled::new(space.len(), config.seed)),
        SamplerKind::Tpe => Box::new(Tpe::new(space.clone(), config.seed, config.multivariate)),
    }
}

struct Sequential {
    at: u64,
    end: u64,
}

impl Sampler for Sequential {
    fn next(&mut self, _tried: &[Observation]) -> Option<u64> {
        let next = (self.at < self.end).then_some(self.at);
        self.at += 1;
        next
    }
}

/// Points by chance, none twice.
pub(super) struct Shuffled {
    size: u64,
    random: SplitMix,
    seen: BTreeSet<u64>,
}

impl Shuffled {
    pub(super) fn new(size: u64, seed: u64) -> Self {
        Self {
            size,
            random: SplitMix(seed),
            seen: BTreeSet::new(),
        }
    }

    /// A point that is in neither set.
    pub(super) fn draw(&mut self, taken: &BTreeSet<u64>) -> Option<u64> {
        let left = self.size.saturating_sub(taken.len() as u64);
        if left == 0 {
            return None;
        }
        // The n-th of those that are left: exact, and quick as long as few are taken.
        let mut at = self.random.below(left);
        for used in taken {
            if *used <= at {
                at += 1;
            } else {
                break;
            }
        }
        Some(at)
    }
}

impl Sampler for Shuffled {
    fn next(&mut self, _tried: &[Observation]) -> Option<u64> {
        let seen = std::mem::take(&mut self.seen);
        let next = self.draw(&seen);
        self.seen = seen;
        self.seen.extend(next);
        next
    }
}

/// Steele, Lea and Flood's SplitMix64: small, and the same on every machine.
pub(super) struct SplitMix(pub(super) u64);

impl SplitMix {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`, without bias.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        let limit = u64::MAX - u64::MAX % end;
        loop {
            let draw = self.next();
            if draw < limit {
                return draw % end;
            }
        }
    }

    /// In `[0, 1)`.
    pub(super) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workflow::search::space::Slot;

    fn config(sampler: SamplerKind, seed: u64) -> SearchConfig {
        SearchConfig {
            joint: true,
            sampler,
            max_samples: None,
            seed,
            multivariate: true,
            output_model_num: None,
            stop_when_goals_met: false,
            max_iter: None,
            max_time: None,
            include_pass_params: true,
        }
    }

    /// Minimises a bowl over the grid; returns points and losses in the order in which they were tried.
    fn run(kind: SamplerKind, seed: u64, limit: usize) -> Vec<(u64, f64)> {
        let space = Space {
            slots: vec![
                Slot {
                    choices: vec![vec![8, 8], vec![5]],
                },
                Slot {
                    choices: vec![vec![6]],
                },
            ],
        };
        let mut sampler = sampler(&config(kind, seed), &space);
        let (mut tried, mut points): (Vec<Observation>, Vec<(u64, f64)>) = (Vec::new(), Vec::new());
        while tried.len() < limit {
            let Some(index) = sampler.next(&tried) else { break };
            let point = space.point(index).unwrap();
            let sum: f64 = point
                .iter()
                .flat_map(|c| &c.values)
                .map(|v| (*v as f64 - 2.0).powi(2))
                .sum();
            let loss = sum + 9.0 * point[0].pass as f64;
            tried.push((index, (index % 7 != 6).then_some(vec![-loss])));
            points.push((index, loss));
        }
        points
    }

    #[test]
    fn every_sampler_visits_each_point_once_and_repeats_itself() {
        let all = (64 + 5) * 6;
        for kind in [SamplerKind::Sequential, SamplerKind::Random, SamplerKind::Tpe] {
            let points = run(kind, 1, usize::MAX);
            assert_eq!(points.len(), all, "{kind:?}");
            assert_eq!(points.iter().map(|p| p.0).collect::<BTreeSet<_>>().len(), all);
            assert_eq!(points, run(kind, 1, usize::MAX));
        }
        assert_ne!(run(SamplerKind::Random, 1, 20), run(SamplerKind::Random, 2, 20));
    }

    /// After as many points by chance, TPE tries better ones than chance does, over many seeds.
    #[test]
    fn tpe_learns() {
        let mean = |kind| {
            let losses = (0..20).flat_map(|seed| run(kind, seed, 60).split_off(20));
            losses.map(|(_, loss)| loss).sum::<f64>() / (20.0 * 40.0)
        };
        assert!(mean(SamplerKind::Tpe) < 0.7 * mean(SamplerKind::Random));
    }
}
