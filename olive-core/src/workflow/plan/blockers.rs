//! Why a plan cannot run here: passes that are not built in, things that live elsewhere, searches without a goal.

use super::resolve::Resolver;
use super::{Named, PlannedPass, Step};
use crate::error::Result;
use crate::workflow::registry::params_for;
use crate::workflow::schema::passes::{self, KnownPass};
use crate::workflow::schema::{DataConfig, EvaluatorConfig, Location, ModelType, System, SystemKind};

impl Resolver<'_> {
    /// Notes why a pass cannot run here.
    pub(super) fn block_pass(&mut self, planned: &PlannedPass) {
        for (_, data) in &planned.data {
            self.block_data(data);
        }
        self.block_host(&planned.host);
        let Some(pass) = self.registry.find(&planned.kind) else {
            let reason = match passes::find(&planned.kind) {
                Some(KnownPass { runs: true, .. }) => "is not built into this program",
                _ => "belongs to another vendor's tools and can only be planned",
            };
            self.block(format!("the pass {} {reason}", planned.kind));
            return;
        };
        let mut values = planned.params.clone();
        for (name, tried) in &planned.search {
            if let Some(value) = tried.first() {
                values.insert(name.clone(), value.clone());
            }
        }
        let mut notes = Vec::new();
        if let Err(error) = params_for(pass, passes::find(&planned.kind), &values, &mut notes) {
            self.block(error.to_string());
        }
        for note in notes {
            self.warn(note);
        }
    }

    fn block_data(&mut self, data: &DataConfig) {
        for remote in &data.remote {
            if let Location::Azure(resource) = remote {
                self.block(format!("data config `{}` needs {}", data.name, resource.need()));
            }
        }
    }

    fn block_host(&mut self, host: &Named<System>) {
        match host.value.kind {
            SystemKind::Local => {}
            SystemKind::AzureMl => self.block(format!(
                "the host `{}` is a compute of Azure Machine Learning: jobs are not sent there; \
                 run this program on that compute, or give a host of type LocalSystem",
                host.name
            )),
            kind => self.warn(format!(
                "the host `{}` is of type {}: passes need neither Python nor a container and run in this process",
                host.name,
                kind.name()
            )),
        }
    }

    /// Notes what lives elsewhere, or needs Python.
    pub(super) fn block_remote(&mut self) -> Result<()> {
        let model = &self.config.input_model;
        for location in [&model.path, &model.adapter].into_iter().flatten() {
            if let Location::Azure(resource) = location {
                self.block(format!("the input model needs {}", resource.need()));
            }
        }
        match &model.kind {
            ModelType::Hf | ModelType::Onnx => {}
            ModelType::Composite if self.config.builds.iter().any(|(_, b)| !b.components.is_empty()) => {}
            kind => self.block(format!(
                "input models of type {} are not opened here; give an HfModel or an ONNXModel",
                kind.name()
            )),
        }
        let workflow_host = self.system(self.config.workflow_host.clone(), "workflow_host")?;
        self.block_host(&workflow_host);
        for packaging in &self.config.engine.packaging {
            if packaging.kind.to_ascii_lowercase().starts_with("azureml") {
                self.block(format!(
                    "packaging of type {} registers in Azure Machine Learning; give `Zipfile` and register it with \
                     `az ml model create`",
                    packaging.kind
                ));
            }
        }
        Ok(())
    }

    /// A search ranks by objectives; without any there is nothing to search for.
    pub(super) fn check_objectives(
        &self,
        steps: &[Step],
        evaluator: Option<&Named<EvaluatorConfig>>,
    ) -> Result<()> {
        if steps.is_empty() {
            return Ok(());
        }
        let expected = "an evaluator, or `search_strategy: false`";
        let Some(evaluator) = evaluator else {
            return Err(self.wrong("evaluator", expected, "a search without one"));
        };
        let key = format!("evaluators.{}.metrics", evaluator.name);
        let metrics = &evaluator.value.metrics;
        let ranked = metrics
            .iter()
            .flat_map(|m| &m.sub_types)
            .filter(|s| s.priority.is_some());
        let on_tasks = metrics.iter().any(|metric| metric.kind == "tasks");
        if ranked.count() == 0 && !on_tasks {
            return Err(self.wrong(key, "a `priority` for each objective", "none"));
        }
        Ok(())
    }
}
