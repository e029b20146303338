//! Objectives, goals, and the points that no other point beats.

use std::collections::BTreeMap;

use crate::workflow::schema::{EvaluatorConfig, Goal, GoalKind};

/// Measured values by name, `metric-sub type`.
pub type Values = BTreeMap<String, f64>;

/// Something that a search makes better.
#[derive(Debug, Clone, PartialEq)]
pub struct Objective {
    /// `metric-sub type`.
    pub name: String,
    /// Its rank, 1 first.
    pub priority: u32,
    /// Whether more is better.
    pub higher_is_better: bool,
    /// What must be reached.
    pub goal: Option<Goal>,
    /// The goal as a value, once the input model was measured.
    pub bound: Option<f64>,
}

impl Objective {
    /// The objectives of an evaluator, by priority, then in the order in which they stand.
    pub fn of(evaluator: &EvaluatorConfig) -> Vec<Self> {
        let mut objectives: Vec<Self> = Vec::new();
        for metric in &evaluator.metrics {
            for sub in &metric.sub_types {
                if let Some(priority) = sub.priority {
                    objectives.push(Self {
                        name: format!("{}-{}", metric.name, sub.name),
                        priority,
                        higher_is_better: sub.higher_is_better,
                        goal: sub.goal,
                        bound: None,
                    });
                }
            }
        }
        objectives.sort_by_key(|objective| objective.priority);
        objectives
    }

    /// The value with its sign such that larger is better; what is not a number is worst.
    pub fn score(&self, values: &Values) -> f64 {
        match values.get(&self.name) {
            Some(value) if value.is_nan() => f64::NEG_INFINITY,
            Some(value) if self.higher_is_better => *value,
            Some(value) => -value,
            None => f64::NEG_INFINITY,
        }
    }

    /// Whether its goal is reached; an objective without one is.
    pub fn met(&self, values: &Values) -> bool {
        let Some(bound) = self.bound else { return true };
        match values.get(&self.name) {
            Some(value) if self.higher_is_better => *value >= bound,
            Some(value) => *value <= bound,
            None => false,
        }
    }
}

/// Turns goals into values, relative to what the input model measures. A relative goal without a baseline has none.
pub fn resolve_goals(objectives: &mut [Objective], baseline: Option<&Values>) {
    for objective in objectives {
        let Some(goal) = objective.goal else { continue };
        let base = baseline.and_then(|values| values.get(&objective.name)).copied();
        let better = if objective.higher_is_better { 1.0 } else { -1.0 };
        let value = goal.value;
        objective.bound = match (goal.kind, base) {
            (GoalKind::Threshold, _) => Some(value),
            (GoalKind::MinImprovement, Some(base)) => Some(base + better * value),
            (GoalKind::PercentMinImprovement, Some(base)) => Some(base * (1.0 + better * value / 100.0)),
            (GoalKind::MaxDegradation, Some(base)) => Some(base - better * value),
            (GoalKind::PercentMaxDegradation, Some(base)) => Some(base * (1.0 - better * value / 100.0)),
            (_, None) => None,
        };
    }
}

/// Whether `a` is nowhere worse than `b` and somewhere better.
fn dominates(a: &[f64], b: &[f64]) -> bool {
    let pairs = || a.iter().zip(b);
    pairs().all(|(x, y)| x >= y) && pairs().any(|(x, y)| x > y)
}

/// The indices of the points that no other point dominates. Of equal points all count.
pub fn non_dominated(scores: &[Vec<f64>]) -> Vec<usize> {
    let beaten = |at: usize| scores.iter().any(|other| dominates(other, &scores[at]));
    (0..scores.len()).filter(|at| !beaten(*at)).collect()
}

/// Front after front.
pub(super) fn fronts(scores: &[Vec<f64>]) -> Vec<Vec<usize>> {
    let mut left: Vec<usize> = (0..scores.len()).collect();
    let mut fronts = Vec::new();
    while !left.is_empty() {
        let here: Vec<Vec<f64>> = left.iter().map(|at| scores[*at].clone()).collect();
        let front: Vec<usize> = non_dominated(&here).into_iter().map(|at| left[at]).collect();
        left.retain(|at| !front.contains(at));
        fronts.push(front);
    }
    fronts
}

/// Orders candidates from best to worst: those that meet all goals first, then by objectives in order of priority,
/// then in the order in which they were found.
pub fn rank(objectives: &[Objective], candidates: &[&Values]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    let met = |at: usize| objectives.iter().all(|objective| objective.met(candidates[at]));
    order.sort_by(|a, b| {
        met(*b).cmp(&met(*a)).then_with(|| {
            let scores = objectives
                .iter()
                .map(|o| o.score(candidates[*b]).total_cmp(&o.score(candidates[*a])));
            scores.into_iter().find(|o| o.is_ne()).unwrap_or(a.cmp(b))
        })
    });
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objective(name: &str, higher_is_better: bool, goal: Option<(GoalKind, f64)>) -> Objective {
        Objective {
            name: name.to_owned(),
            priority: 1,
            higher_is_better,
            goal: goal.map(|(kind, value)| Goal { kind, value }),
            bound: None,
        }
    }

    #[test]
    fn the_front_is_what_nothing_beats() {
        let scores = [[1.0, 5.0], [2.0, 4.0], [2.0, 3.0], [0.0, 5.0], [1.0, 5.0]].map(Vec::from);
        assert_eq!(non_dominated(&scores), [0, 1, 4]);
        assert_eq!(fronts(&scores), [vec![0, 1, 4], vec![2, 3]]);
    }

    #[test]
    fn goals_are_relative_to_the_input_model() {
        let base: Values = [("a".to_owned(), 50.0)].into();
        let bound = |higher, kind, value| {
            let mut o = [objective("a", higher, Some((kind, value)))];
            resolve_goals(&mut o, Some(&base));
            o[0].bound.unwrap()
        };
        assert_eq!(bound(true, GoalKind::Threshold, 7.0), 7.0);
        assert_eq!(bound(true, GoalKind::MinImprovement, 5.0), 55.0);
        assert_eq!(bound(false, GoalKind::MinImprovement, 5.0), 45.0);
        assert_eq!(bound(true, GoalKind::PercentMaxDegradation, 10.0), 45.0);
        assert!((bound(false, GoalKind::PercentMaxDegradation, 10.0) - 55.0).abs() < 1e-9);
        let mut o = [objective("a", true, Some((GoalKind::MaxDegradation, 1.0)))];
        resolve_goals(&mut o, None);
        assert_eq!(o[0].bound, None);
    }

    #[test]
    fn goals_come_before_scores() {
        let mut objectives = [
            objective("a", true, None),
            objective("b", false, Some((GoalKind::Threshold, 3.0))),
        ];
        resolve_goals(&mut objectives, None);
        let values = |a: f64, b: f64| -> Values { [("a".to_owned(), a), ("b".to_owned(), b)].into() };
        let candidates = [values(9.0, 4.0), values(1.0, 3.0), values(2.0, 2.0)];
        let candidates: Vec<&Values> = candidates.iter().collect();
        assert_eq!(rank(&objectives, &candidates), [2, 1, 0]);
    }
}
