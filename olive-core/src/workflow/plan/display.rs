//! The plan as text, for `--dry_run`.

use std::fmt;

use serde_json::Value;

use super::{Pipeline, Plan, PlannedPass};
use crate::workflow::schema::{DataConfig, Location, ModelSource, SamplerKind, SearchConfig};

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "workflow    {} ({})",
            self.config.workflow_id, self.config.origin
        )?;
        writeln!(f, "cache       {}", self.config.cache_dir().display())?;
        for pipeline in &self.pipelines {
            write!(f, "{pipeline}")?;
        }
        for data in &self.config.data_configs {
            write_data(f, data)?;
        }
        for blocker in &self.blockers {
            writeln!(f, "cannot run  {blocker}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = &self.name {
            writeln!(f, "build       {name}")?;
        }
        write_model(f, &self.model)?;
        let system = |named: &super::Named<crate::workflow::schema::System>| {
            let name = if named.name.is_empty() {
                "default"
            } else {
                &named.name
            };
            format!(
                "{name} ({}, {})",
                named.value.kind.name(),
                named.value.accelerator
            )
        };
        writeln!(f, "host        {}", system(&self.host))?;
        writeln!(f, "target      {}", system(&self.target))?;
        for (index, step) in self.steps.iter().enumerate() {
            for (choice, pass) in step.choices.iter().enumerate() {
                let label = match (choice, step.choices.len()) {
                    (0, _) => format!("{:>2}. {}", index + 1, step.name),
                    _ => "    or".to_owned(),
                };
                writeln!(f, "{label:<12}{}", pass.kind)?;
                write_params(f, pass)?;
            }
        }
        if let Some(evaluator) = &self.evaluator {
            let names: Vec<String> = evaluator.value.metrics.iter().map(describe_metric).collect();
            writeln!(f, "evaluator   {}: {}", evaluator.name, names.join("; "))?;
        }
        if let Some(search) = &self.search {
            writeln!(f, "search      {}", describe_search(search, self.points()))?;
        }
        match &self.output_dir {
            Some(folder) => writeln!(f, "output      {}", folder.display()),
            None => writeln!(f, "output      the working folder"),
        }
    }
}

fn write_model(f: &mut fmt::Formatter<'_>, model: &ModelSource) -> fmt::Result {
    let place = match &model.path {
        Some(Location::Azure(resource)) => resource.need(),
        Some(location) => location.to_string(),
        None => format!("{} components", model.components.len()),
    };
    write!(f, "model       {} {place}", model.kind.name())?;
    if let Some(adapter) = &model.adapter {
        write!(f, " with adapter {adapter}")?;
    }
    writeln!(f, ", task {}", model.task)
}

/// The parameters that were given, then how many are left at their defaults.
fn write_params(f: &mut fmt::Formatter<'_>, pass: &PlannedPass) -> fmt::Result {
    for name in &pass.given {
        if let Some((_, values)) = pass.search.iter().find(|(key, _)| key == name) {
            writeln!(f, "              {name} ∈ {}", Value::Array(values.clone()))?;
        } else if let Some((_, data)) = pass.data.iter().find(|(key, _)| key == name) {
            writeln!(f, "              {name} = data config {}", data.name)?;
        } else if let Some(value) = pass.params.get(name) {
            writeln!(f, "              {name} = {}", shortened(value))?;
        }
    }
    let unasked = pass.search.iter().filter(|(name, _)| !pass.given.contains(name));
    for (name, values) in unasked {
        writeln!(
            f,
            "              {name} ∈ {} (searched)",
            Value::Array(values.clone())
        )?;
    }
    let defaults: Vec<String> = pass
        .params
        .iter()
        .filter(|(name, value)| !pass.given.contains(*name) && !value.is_null())
        .map(|(name, value)| format!("{name} {}", shortened(value)))
        .collect();
    if !defaults.is_empty() {
        writeln!(f, "              defaults: {}", defaults.join(", "))?;
    }
    Ok(())
}

fn shortened(value: &Value) -> String {
    crate::workflow::schema::shape::brief(value)
}

fn write_data(f: &mut fmt::Formatter<'_>, data: &DataConfig) -> fmt::Result {
    let text = |key: &str| data.load_dataset.get(key).and_then(Value::as_str);
    let name = text("data_name").unwrap_or("rows made up");
    write!(f, "data        {}: {name}", data.name)?;
    for file in &data.files {
        write!(f, " {}", file.display())?;
    }
    if let Some(split) = text("split") {
        write!(f, ", split {split}")?;
    }
    for (key, value) in &data.pre_process {
        write!(f, ", {key} {}", shortened(value))?;
    }
    writeln!(f)
}

fn describe_metric(metric: &crate::workflow::schema::MetricSpec) -> String {
    let subs: Vec<&str> = metric.sub_types.iter().map(|sub| sub.name.as_str()).collect();
    if metric.kind == "tasks" {
        let tasks = metric.settings.get("tasks").and_then(Value::as_array);
        let names = tasks.into_iter().flatten().map(|task| match task {
            Value::String(name) => name.clone(),
            task => task
                .get("task")
                .and_then(Value::as_str)
                .unwrap_or("a task")
                .to_owned(),
        });
        return format!("tasks {}", names.collect::<Vec<_>>().join(", "));
    }
    format!("{} {} ({})", metric.kind, metric.name, subs.join(", "))
}

fn describe_search(search: &SearchConfig, points: u64) -> String {
    let sampler = match search.sampler {
        SamplerKind::Sequential => "sequential".to_owned(),
        SamplerKind::Random => format!("random, seed {}", search.seed),
        SamplerKind::Tpe => format!("tpe, seed {}", search.seed),
    };
    let order = if search.joint { "joint" } else { "pass by pass" };
    let limit = search
        .max_samples
        .map_or(String::new(), |n| format!(", at most {n}"));
    format!("{order}, {sampler}, {points} points{limit}")
}
