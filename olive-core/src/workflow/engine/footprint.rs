//! What was run and measured, in Olive's files: `footprint.json`, `output_footprint.json`, `run_history.txt`,
//! `metrics.json`, `input_model_metrics.json`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::session::Node;
use crate::error::Result;
use crate::fsio;
use crate::workflow::cache::{ModelRecord, RunRecord};
use crate::workflow::schema::ModelSource;
use crate::workflow::search::{Objective, Values};

/// One measured value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricValue {
    /// The value.
    pub value: f64,
    /// Its rank as an objective; −1 for none.
    pub priority: i64,
    /// Whether more is better.
    pub higher_is_better: bool,
}

/// Measured values by name, `metric-sub type`.
pub type Metrics = BTreeMap<String, MetricValue>;

/// A model of the footprint.
#[derive(Debug, Clone)]
pub struct FootprintNode {
    /// The model that it was made from.
    pub parent_model_id: Option<String>,
    /// Its id.
    pub model_id: String,
    /// What it is.
    pub model_config_data: Value,
    /// The pass that made it.
    pub from_pass: Option<String>,
    /// The parameters of that pass.
    pub pass_run_config: Value,
    /// Whether no other model beats it.
    pub is_pareto_frontier: bool,
    /// What it measures.
    pub metrics: Option<Metrics>,
    /// Whether its goals are met.
    pub is_goals_met: bool,
    /// Seconds since 1970; 0 for the input model.
    pub start_time: f64,
    /// Seconds since 1970; 0 for the input model.
    pub end_time: f64,
}

impl FootprintNode {
    pub(super) fn input(node: &Node, model: &ModelSource) -> Self {
        let place = model.path.as_ref().map(ToString::to_string);
        Self {
            parent_model_id: None,
            model_id: node.id.clone(),
            model_config_data: json!({
                "type": model.kind.name(),
                "config": {"model_path": place, "task": model.task, "load_kwargs": model.load_kwargs},
            }),
            from_pass: None,
            pass_run_config: Value::Null,
            is_pareto_frontier: false,
            metrics: None,
            is_goals_met: false,
            start_time: 0.0,
            end_time: 0.0,
        }
    }

    pub(super) fn of_run(run: &RunRecord, model: &ModelRecord, parent: &str, node: &Node) -> Self {
        Self {
            parent_model_id: Some(parent.to_owned()),
            model_id: node.id.clone(),
            model_config_data: json!({
                "type": model.kind,
                "config": {"model_path": model.model_path, "adapter_path": model.adapter_path},
            }),
            from_pass: Some(run.pass_name.clone()),
            pass_run_config: run.pass_config.clone(),
            is_pareto_frontier: false,
            metrics: None,
            is_goals_met: false,
            start_time: run.start_time,
            end_time: run.end_time,
        }
    }

    fn to_value(&self) -> Value {
        let metrics = self.metrics.as_ref().map(|metrics| {
            let direction = metrics
                .iter()
                .map(|(name, m)| (name, if m.higher_is_better { 1 } else { -1 }));
            let direction: BTreeMap<_, _> = direction.collect();
            json!({"value": metrics, "cmp_direction": direction, "is_goals_met": self.is_goals_met})
        });
        json!({
            "parent_model_id": self.parent_model_id,
            "model_id": self.model_id,
            "model_config_data": self.model_config_data,
            "from_pass": self.from_pass,
            "pass_run_config": self.pass_run_config,
            "is_pareto_frontier": self.is_pareto_frontier,
            "metrics": metrics,
            "start_time": self.start_time,
            "end_time": self.end_time,
        })
    }
}

/// All models of a pipeline, in the order in which they came up.
#[derive(Debug, Clone, Default)]
pub struct Footprint {
    nodes: Vec<FootprintNode>,
}

impl Footprint {
    pub(super) fn add(&mut self, node: FootprintNode) {
        if self.find(&node.model_id).is_none() {
            self.nodes.push(node);
        }
    }

    fn find(&self, id: &str) -> Option<&FootprintNode> {
        self.nodes.iter().find(|node| node.model_id == id)
    }

    /// All models.
    pub fn nodes(&self) -> &[FootprintNode] {
        &self.nodes
    }

    /// What a model measures.
    pub fn metrics(&self, id: &str) -> Option<&Metrics> {
        self.find(id).and_then(|node| node.metrics.as_ref())
    }

    pub(super) fn measured(&mut self, id: &str, metrics: &Metrics, objectives: &[Objective]) {
        let values: Values = metrics.iter().map(|(name, m)| (name.clone(), m.value)).collect();
        if let Some(node) = self.nodes.iter_mut().find(|node| node.model_id == id) {
            node.metrics.get_or_insert_default().extend(metrics.clone());
            node.is_goals_met = objectives.iter().all(|objective| objective.met(&values));
        }
    }

    pub(super) fn mark_front(&mut self, ids: &[String]) {
        for node in &mut self.nodes {
            node.is_pareto_frontier = ids.contains(&node.model_id);
        }
    }

    /// The models that no other beats.
    pub fn front(&self) -> impl Iterator<Item = &FootprintNode> {
        self.nodes.iter().filter(|node| node.is_pareto_frontier)
    }

    pub(super) fn write(&self, folder: &Path, input: &str, best: &Node, searched: bool) -> Result<()> {
        let map = |nodes: &mut dyn Iterator<Item = &FootprintNode>| -> Map<String, Value> {
            nodes
                .map(|node| (node.model_id.clone(), node.to_value()))
                .collect()
        };
        fsio::write_json(folder.join("footprint.json"), &map(&mut self.nodes.iter()), 4)?;
        fsio::write_json(folder.join("output_footprint.json"), &map(&mut self.front()), 4)?;
        fsio::write(folder.join("run_history.txt"), self.history().as_bytes())?;
        if let Some(metrics) = self.metrics(input) {
            fsio::write_json(folder.join("input_model_metrics.json"), metrics, 4)?;
        }
        if let Some(metrics) = self.metrics(&best.id).filter(|_| !searched || best.id != input) {
            fsio::write_json(folder.join("metrics.json"), metrics, 4)?;
        }
        Ok(())
    }

    /// The table of runs as text.
    fn history(&self) -> String {
        let head = [
            "model_id",
            "parent_model_id",
            "from_pass",
            "duration_sec",
            "metrics",
        ];
        let mut rows = vec![head.map(str::to_owned)];
        for node in &self.nodes {
            let seconds = match &node.from_pass {
                Some(_) => format!("{:.3}", node.end_time - node.start_time),
                None => String::new(),
            };
            let metrics = node
                .metrics
                .iter()
                .flatten()
                .map(|(name, m)| format!("{name}: {}", m.value));
            rows.push([
                node.model_id.clone(),
                node.parent_model_id.clone().unwrap_or_default(),
                node.from_pass.clone().unwrap_or_default(),
                seconds,
                metrics.collect::<Vec<_>>().join(", "),
            ]);
        }
        let width = |column: usize| {
            rows.iter()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..head.len()).map(width).collect();
        let rule = |fill: &str| {
            let cells: Vec<String> = widths.iter().map(|width| fill.repeat(width + 2)).collect();
            format!("+{}+\n", cells.join("+"))
        };
        let mut text = rule("-");
        for (index, row) in rows.iter().enumerate() {
            for (cell, width) in row.iter().zip(&widths) {
                text.push_str(&format!("| {cell:<width$} "));
            }
            text.push_str("|\n");
            text.push_str(&rule(if index == 0 { "=" } else { "-" }));
        }
        text
    }
}
