//! Evaluators, metrics and goals.

use serde_json::Value;

use super::{Object, Reader, list, object, text};
use crate::error::{Error, Result};
use crate::workflow::schema::config::{EvaluatorConfig, Goal, GoalKind, MetricSpec, Reference, SubType};
use crate::workflow::schema::evaluator_shapes;
use crate::workflow::schema::location::resolve;
use crate::workflow::schema::shape::{as_bool, as_float, as_int, join};

impl Reader<'_> {
    pub(in crate::workflow) fn evaluator(&self, value: &Value, path: &str) -> Result<EvaluatorConfig> {
        let empty = Object::new();
        let evaluator = value.as_object().unwrap_or(&empty);
        let kind = text(evaluator, "type");
        let on_tasks = kind.as_deref().is_some_and(|kind| {
            evaluator_shapes::TASK_EVALUATORS.contains(&kind.to_ascii_lowercase().as_str())
        });
        let mut metrics = Vec::new();
        if on_tasks {
            let mut settings = evaluator.clone();
            settings.shift_remove("type");
            settings.shift_remove("metrics");
            if let Some(Value::Array(tasks)) = settings.get_mut("tasks") {
                tasks.iter_mut().for_each(|task| self.task_files(task));
            }
            metrics.push(MetricSpec {
                name: kind.clone().unwrap_or_default(),
                kind: "tasks".to_owned(),
                sub_types: Vec::new(),
                data: None,
                settings,
            });
        }
        for (index, metric) in list(evaluator, "metrics").iter().enumerate() {
            metrics.push(self.metric(metric, &format!("{path}.metrics[{index}]"))?);
        }
        // One value alone is the objective.
        if let [metric] = metrics.as_mut_slice()
            && let [sub] = metric.sub_types.as_mut_slice()
            && sub.priority.is_none()
        {
            sub.priority = Some(1);
        }
        Ok(EvaluatorConfig { kind, metrics })
    }

    /// Makes the files that a task names absolute, where they are here.
    fn task_files(&self, value: &mut Value) {
        match value {
            Value::String(text) => {
                let path = resolve(self.folder, text);
                if path.is_file() {
                    *text = path.display().to_string();
                }
            }
            Value::Array(list) => list.iter_mut().for_each(|entry| self.task_files(entry)),
            Value::Object(task) => {
                if let Some(path) = task.get_mut("dataset_path") {
                    self.task_files(path);
                }
                if let Some(files) = task
                    .get_mut("dataset_kwargs")
                    .and_then(|kwargs| kwargs.get_mut("data_files"))
                {
                    match files {
                        Value::Object(splits) => splits.values_mut().for_each(|entry| self.task_files(entry)),
                        files => self.task_files(files),
                    }
                }
            }
            _ => {}
        }
    }

    fn metric(&self, value: &Value, path: &str) -> Result<MetricSpec> {
        let empty = Object::new();
        let metric = value.as_object().unwrap_or(&empty);
        let required = |key: &str| text(metric, key).ok_or_else(|| self.missing(&join(path, key), "text"));
        let kind = required("type")?.to_ascii_lowercase();
        // Hugging Face's metrics are called whatever their authors call them.
        let any_name = text(metric, "backend")
            .is_some_and(|backend| backend.eq_ignore_ascii_case("huggingface_metrics"));
        let names = if any_name { "" } else { kind.as_str() };
        let mut sub_types = Vec::new();
        for (index, sub) in list(metric, "sub_types").iter().enumerate() {
            sub_types.push(self.sub_type(sub, (&kind, names), &format!("{path}.sub_types[{index}]"))?);
        }
        if sub_types.is_empty() && kind == "size_on_disk" {
            sub_types.push(SubType {
                name: "bytes".to_owned(),
                priority: None,
                higher_is_better: false,
                goal: None,
                config: Object::new(),
            });
        }
        if sub_types.is_empty() {
            return Err(self.missing(&join(path, "sub_types"), "at least one sub type"));
        }
        Ok(MetricSpec {
            name: required("name")?,
            kind,
            sub_types,
            data: self.data_reference(metric.get("data_config"), &join(path, "data_config"))?,
            settings: object(metric, "user_config"),
        })
    }

    /// `names` is the type of metric whose names are allowed; any are where it is empty.
    fn sub_type(&self, value: &Value, (kind, names): (&str, &str), path: &str) -> Result<SubType> {
        let empty = Object::new();
        let sub = value.as_object().unwrap_or(&empty);
        let name = text(sub, "name").ok_or_else(|| self.missing(&join(path, "name"), "text"))?;
        let allowed: &[&str] = match names {
            "accuracy" => ACCURACY,
            "latency" | "throughput" => STATISTICS,
            "size_on_disk" => &["bytes"],
            _ => &[],
        };
        if !allowed.is_empty() && !allowed.contains(&name.as_str()) {
            let expected = format!("one of {}", allowed.join(", "));
            return Err(Error::config(
                self.origin,
                join(path, "name"),
                expected,
                format!("`{name}`"),
            ));
        }
        let less = matches!(kind, "latency" | "size_on_disk")
            || matches!(name.as_str(), "perplexity" | "wer" | "rtfx");
        let priority = sub
            .get("priority")
            .and_then(as_int)
            .filter(|priority| *priority > 0);
        Ok(SubType {
            priority: priority.and_then(|priority| u32::try_from(priority).ok()),
            higher_is_better: sub.get("higher_is_better").and_then(as_bool).unwrap_or(!less),
            goal: self.goal(sub.get("goal"), &join(path, "goal"))?,
            config: object(sub, "metric_config"),
            name,
        })
    }

    fn goal(&self, value: Option<&Value>, path: &str) -> Result<Option<Goal>> {
        let Some(goal) = value.and_then(Value::as_object) else {
            return Ok(None);
        };
        let kind = match text(goal, "type")
            .unwrap_or_default()
            .to_ascii_lowercase()
            .as_str()
        {
            "threshold" => GoalKind::Threshold,
            "min-improvement" => GoalKind::MinImprovement,
            "percent-min-improvement" => GoalKind::PercentMinImprovement,
            "max-degradation" => GoalKind::MaxDegradation,
            "percent-max-degradation" => GoalKind::PercentMaxDegradation,
            _ => return Err(self.missing(&join(path, "type"), "the type of a goal")),
        };
        let value = goal.get("value").and_then(as_float);
        let value = value.ok_or_else(|| self.missing(&join(path, "value"), "a number"))?;
        if kind != GoalKind::Threshold && value < 0.0 {
            let key = join(path, "value");
            return Err(Error::config(
                self.origin,
                key,
                "a number that is not negative",
                value.to_string(),
            ));
        }
        Ok(Some(Goal { kind, value }))
    }

    pub(super) fn evaluator_reference(
        &self,
        value: Option<&Value>,
        path: &str,
    ) -> Result<Option<Reference<EvaluatorConfig>>> {
        Ok(match value {
            None | Some(Value::Null) => None,
            Some(Value::String(name)) => Some(Reference::Name(name.clone())),
            Some(value) => Some(Reference::Inline(Box::new(self.evaluator(value, path)?))),
        })
    }
}

/// Values that `accuracy` gives.
const ACCURACY: &[&str] = &[
    "accuracy_score",
    "f1_score",
    "precision",
    "recall",
    "auroc",
    "perplexity",
    "wer",
    "rtfx",
    "exact_match",
    "relaxed_accuracy",
    "word_sort_ratio",
];

/// Values that `latency` and `throughput` give.
const STATISTICS: &[&str] = &["avg", "max", "min", "p50", "p75", "p90", "p95", "p99", "p999"];
