//! Searching: points are run and measured, failing ones are passed over, the front is what nothing beats.

use std::time::Instant;

use super::session::{Node, Session, with_values};
use super::{Outcome, expired, plain};
use crate::error::{Error, Result};
use crate::workflow::plan::{Named, PlannedPass, Step};
use crate::workflow::schema::{EvaluatorConfig, SearchConfig};
use crate::workflow::search::{Choice, Observation, Space, Values, non_dominated, rank, sampler};

/// A candidate and what it measures.
struct Candidate {
    node: Node,
    values: Values,
}

/// What ends a search.
struct Limits {
    start: Instant,
    tried: u64,
    met: bool,
}

impl Session<'_> {
    /// Searches the space of the pipeline.
    pub(super) fn search(&mut self, search: &SearchConfig) -> Result<Outcome> {
        let evaluator = self.pipeline.evaluator.as_ref();
        let evaluator =
            evaluator.ok_or_else(|| Error::unsupported("a search without an evaluator", "give one"))?;
        let relative = self.objectives.iter().any(|o| o.goal.is_some());
        if self.plan.config.engine.evaluate_input_model || relative {
            self.measure_input(evaluator)?;
        }
        let mut limits = Limits {
            start: Instant::now(),
            tried: 0,
            met: false,
        };
        let mut found = Vec::new();
        if search.joint {
            self.jointly(search, evaluator, &mut limits, &mut found)?;
        } else {
            let input = self.input.clone();
            self.pass_by_pass(search, evaluator, 0, &input, &mut limits, &mut found)?;
        }
        self.conclude_search(found)
    }

    fn conclude_search(&mut self, mut found: Vec<Candidate>) -> Result<Outcome> {
        let mut seen = std::collections::BTreeSet::new();
        found.retain(|candidate| seen.insert(candidate.node.id.clone()));
        if found.is_empty() {
            let reasons: Vec<String> = self
                .failed
                .iter()
                .map(|(at, why)| format!("{at}: {why}"))
                .collect();
            return Err(Error::unsupported(
                "every point of the search",
                format!("all of them failed: {}", reasons.join("; ")),
            ));
        }
        let scores: Vec<Vec<f64>> = found.iter().map(|c| self.scores(&c.values)).collect();
        let front = non_dominated(&scores);
        let ids: Vec<String> = front.iter().map(|at| found[*at].node.id.clone()).collect();
        self.footprint.mark_front(&ids);
        let values: Vec<&Values> = front.iter().map(|at| &found[*at].values).collect();
        let order = rank(&self.objectives, &values);
        let nodes: Vec<Node> = order.iter().map(|at| found[front[*at]].node.clone()).collect();
        self.conclude(nodes, true)
    }

    fn scores(&self, values: &Values) -> Vec<f64> {
        self.objectives
            .iter()
            .map(|objective| objective.score(values))
            .collect()
    }

    /// All passes at once.
    fn jointly(
        &mut self,
        search: &SearchConfig,
        evaluator: &Named<EvaluatorConfig>,
        limits: &mut Limits,
        found: &mut Vec<Candidate>,
    ) -> Result<()> {
        let steps = &self.pipeline.steps;
        let space = Space::of(steps);
        let mut sampler = sampler(search, &space);
        let mut tried: Vec<Observation> = Vec::new();
        while !self.over(search, limits) {
            let Some(index) = sampler.next(&tried) else { break };
            let Some(point) = space.point(index) else { break };
            limits.tried += 1;
            let input = self.input.clone();
            let scores = self
                .try_point(steps, &point, &input, evaluator)?
                .map(|candidate| {
                    let scores = self.scores(&candidate.values);
                    limits.met |= self.all_met(&candidate.values);
                    found.push(candidate);
                    scores
                });
            tried.push((index, scores));
            self.hashes.save()?;
        }
        Ok(())
    }

    /// One pass after another: all points of one, then on from the best, then from the next best.
    fn pass_by_pass(
        &mut self,
        search: &SearchConfig,
        evaluator: &Named<EvaluatorConfig>,
        at: usize,
        input: &Node,
        limits: &mut Limits,
        found: &mut Vec<Candidate>,
    ) -> Result<()> {
        let steps = &self.pipeline.steps;
        let Some(step) = steps.get(at..=at) else {
            return Ok(());
        };
        let last = at + 1 == steps.len();
        let space = Space::of(step);
        let mut sampler = sampler(search, &space);
        let mut tried: Vec<Observation> = Vec::new();
        let mut here: Vec<Candidate> = Vec::new();
        while !self.over(search, limits) && search.max_samples.is_none_or(|most| (tried.len() as u64) < most)
        {
            let Some(index) = sampler.next(&tried) else { break };
            let Some(point) = space.point(index) else { break };
            limits.tried += 1;
            let candidate = self.try_point(step, &point, input, evaluator)?;
            tried.push((index, candidate.as_ref().map(|c| self.scores(&c.values))));
            if let Some(candidate) = candidate {
                limits.met |= last && self.all_met(&candidate.values);
                here.push(candidate);
            }
        }
        self.hashes.save()?;
        if last {
            found.append(&mut here);
            return Ok(());
        }
        let values: Vec<&Values> = here.iter().map(|c| &c.values).collect();
        for best in rank(&self.objectives, &values) {
            if self.over(search, limits) && !found.is_empty() {
                break;
            }
            let node = here[best].node.clone();
            self.pass_by_pass(search, evaluator, at + 1, &node, limits, found)?;
        }
        Ok(())
    }

    fn over(&self, search: &SearchConfig, limits: &Limits) -> bool {
        let most = match (search.joint, search.max_samples, search.max_iter) {
            (true, Some(samples), Some(iterations)) => Some(samples.min(iterations)),
            (true, Some(samples), None) => Some(samples),
            (_, _, iterations) => iterations,
        };
        most.is_some_and(|most| limits.tried >= most)
            || expired(limits.start, search.max_time)
            || (search.stop_when_goals_met && limits.met)
    }

    fn all_met(&self, values: &Values) -> bool {
        self.objectives.iter().all(|objective| objective.met(values))
    }

    /// Runs and measures one point; `None` if it fails.
    fn try_point(
        &mut self,
        steps: &[Step],
        point: &[Choice],
        input: &Node,
        evaluator: &Named<EvaluatorConfig>,
    ) -> Result<Option<Candidate>> {
        let tried = (|| {
            let mut node = input.clone();
            for (pass, choice) in chosen(steps, point) {
                node = self.run_pass(&node, pass, &choice.values)?;
            }
            let metrics = self.measure(&node, evaluator)?;
            let values = metrics.into_iter().map(|(name, m)| (name, m.value)).collect();
            Ok(Candidate { node, values })
        })();
        match tried {
            Ok(candidate) => Ok(Some(candidate)),
            Err(error @ Error::Cancelled) => Err(error),
            Err(error) if error.is_usage() => Err(error),
            Err(error) => {
                let name = describe(steps, point);
                tracing::warn!("{name} failed: {error}");
                self.failed.push((name, error.to_string()));
                Ok(None)
            }
        }
    }
}

fn chosen<'s>(steps: &'s [Step], point: &'s [Choice]) -> impl Iterator<Item = (&'s PlannedPass, &'s Choice)> {
    let pairs = steps.iter().zip(point);
    pairs.filter_map(|(step, choice)| step.choices.get(choice.pass).map(|pass| (pass, choice)))
}

/// A point in words: the passes and the values that are searched.
fn describe(steps: &[Step], point: &[Choice]) -> String {
    let words = chosen(steps, point).map(|(pass, choice)| {
        let params = with_values(pass, &choice.values);
        let searched: Vec<String> = pass
            .search
            .iter()
            .filter_map(|(name, _)| params.get(name).map(|value| format!("{name} {}", plain(value))))
            .collect();
        match searched.is_empty() {
            true => pass.kind.clone(),
            false => format!("{} ({})", pass.kind, searched.join(", ")),
        }
    });
    words.collect::<Vec<_>>().join(" → ")
}
