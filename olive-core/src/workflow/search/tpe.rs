//! The tree-structured Parzen estimator (Bergstra et al., 2011), for parameters that are lists of values.
//!
//! What was tried is split into the better tenth and the rest; each part gives a density, one kernel for each point
//! in it and a flat one. The next point is, of some that are drawn from the better density, the one where the better
//! density exceeds the other the most. Points are ordered by the front that they are on, then by their objectives.

use std::collections::BTreeSet;

use super::objective::fronts;
use super::sampler::{Observation, Sampler, Shuffled, SplitMix};
use super::space::{Choice, Point, Space};

/// Points by chance before the estimator begins.
const STARTUP: usize = 10;
/// Points that are drawn to choose from.
const CANDIDATES: usize = 24;
/// The better part: a tenth, at most this many.
const MOST_GOOD: usize = 25;

pub(super) struct Tpe {
    space: Space,
    random: SplitMix,
    start: Shuffled,
    multivariate: bool,
}

impl Tpe {
    pub(super) fn new(space: Space, seed: u64, multivariate: bool) -> Self {
        let size = space.len();
        Self {
            space,
            random: SplitMix(seed ^ 0x5445_5045),
            start: Shuffled::new(size, seed),
            multivariate,
        }
    }

    /// A point from the density of `points`.
    fn draw(&mut self, points: &[Point]) -> Point {
        let mut component = self.random.below(points.len() as u64 + 1) as usize;
        let mut point = Vec::with_capacity(self.space.slots.len());
        for at in 0..self.space.slots.len() {
            if !self.multivariate {
                component = self.random.below(points.len() as u64 + 1) as usize;
            }
            let near = points.get(component).map(|p| p[at].clone());
            let choices = self.space.slots[at].choices.clone();
            let pass = self.category(near.as_ref().map(|c| c.pass), choices.len());
            let same = near.filter(|choice| choice.pass == pass);
            let values = choices[pass]
                .iter()
                .enumerate()
                .map(|(dim, size)| self.category(same.as_ref().map(|c| c.values[dim]), *size))
                .collect();
            point.push(Choice { pass, values });
        }
        point
    }

    /// One of `size` categories, by the kernel at `near`.
    fn category(&mut self, near: Option<usize>, size: usize) -> usize {
        match near {
            Some(near) if self.random.unit() < 0.5 => near,
            _ => self.random.below(size.max(1) as u64) as usize,
        }
    }

    /// The logarithm of the density of `points` at `point`.
    fn density(&self, points: &[Point], point: &Point) -> f64 {
        let flat: f64 = self.kernel(None, point);
        let sum: f64 = points.iter().map(|p| self.kernel(Some(p), point)).sum();
        ((sum + flat) / (points.len() + 1) as f64).ln()
    }

    fn kernel(&self, center: Option<&Point>, point: &Point) -> f64 {
        let one = |near: Option<usize>, value: usize, size: usize| {
            let flat = 1.0 / size.max(1) as f64;
            match near {
                Some(near) => 0.5 * flat + if near == value { 0.5 } else { 0.0 },
                None => flat,
            }
        };
        let mut density = 1.0;
        for (at, choice) in point.iter().enumerate() {
            let sizes = &self.space.slots[at].choices;
            let near = center.map(|c| &c[at]);
            density *= one(near.map(|c| c.pass), choice.pass, sizes.len());
            let same = near.filter(|c| c.pass == choice.pass);
            for (dim, (value, size)) in choice.values.iter().zip(&sizes[choice.pass]).enumerate() {
                density *= one(same.map(|c| c.values[dim]), *value, *size);
            }
        }
        density
    }

    /// The better points and the others. Failed ones are among the others.
    fn split(&self, tried: &[Observation]) -> (Vec<Point>, Vec<Point>) {
        let scored: Vec<(u64, &Vec<f64>)> = tried
            .iter()
            .filter_map(|(index, scores)| scores.as_ref().map(|s| (*index, s)))
            .collect();
        let scores: Vec<Vec<f64>> = scored.iter().map(|(_, s)| (*s).clone()).collect();
        let mut order: Vec<usize> = Vec::new();
        for mut front in fronts(&scores) {
            front.sort_by(|a, b| {
                let pairs = scores[*b].iter().zip(&scores[*a]);
                pairs
                    .map(|(x, y)| x.total_cmp(y))
                    .find(|o| o.is_ne())
                    .unwrap_or(scored[*a].0.cmp(&scored[*b].0))
            });
            order.extend(front);
        }
        let good = tried.len().div_ceil(10).min(MOST_GOOD).min(order.len());
        let point = |at: &usize| self.space.point(scored[*at].0);
        let better = order[..good].iter().filter_map(point).collect();
        let mut others: Vec<Point> = order[good..].iter().filter_map(point).collect();
        let failed = tried.iter().filter(|(_, scores)| scores.is_none());
        others.extend(failed.filter_map(|(index, _)| self.space.point(*index)));
        (better, others)
    }
}

impl Sampler for Tpe {
    fn next(&mut self, tried: &[Observation]) -> Option<u64> {
        let taken: BTreeSet<u64> = tried.iter().map(|(index, _)| *index).collect();
        if tried.len() < STARTUP {
            return self.start.draw(&taken);
        }
        let (better, others) = self.split(tried);
        let mut best: Option<(f64, u64)> = None;
        for _ in 0..CANDIDATES {
            let point = self.draw(&better);
            let Some(index) = self.space.index(&point).filter(|index| !taken.contains(index)) else {
                continue;
            };
            let score = self.density(&better, &point) - self.density(&others, &point);
            if best.is_none_or(|(other, _)| score > other) {
                best = Some((score, index));
            }
        }
        best.map(|(_, index)| index).or_else(|| self.start.draw(&taken))
    }
}
