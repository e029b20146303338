//! A pass of one's own: registered beside the others, it can be named in a workflow, searched and cached like them.
//!
//! `cargo run --example own_pass -- workflow.json`, with a pass `{"type": "ContextLength", "tokens": 2048}` in it.

use std::sync::Arc;

use olive_core::workflow::engine::Engine;
use olive_core::workflow::plan::Plan;
use olive_core::workflow::registry::{EvaluatorRegistry, HfOpener, PassRegistry};
use olive_core::workflow::schema::RunConfig;
use olive_core::{CancelToken, Error, HfModel, LogProgress, ModelHandle, ModelKind, ParamKind, ParamSpec};
use olive_core::{Pass, PassConfig, PassContext, Result, fsio};
use serde_json::{Map, Value};

/// Declares another longest text.
struct ContextLength;

impl Pass for ContextLength {
    fn name(&self) -> &'static str {
        "ContextLength"
    }
    fn params(&self) -> &'static [ParamSpec] {
        const TOKENS: ParamSpec = ParamSpec::required("tokens", ParamKind::Int, "The longest text.");
        &[TOKENS]
    }
    fn transforms(&self) -> (ModelKind, ModelKind) {
        (ModelKind::HuggingFace, ModelKind::HuggingFace)
    }
    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        to: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        let folder = to.output.join("model");
        for entry in std::fs::read_dir(model.path()).map_err(Error::io("list", model.path()))? {
            let source = entry.map_err(Error::io("list", model.path()))?.path();
            fsio::link_or_copy(&source, &folder.join(source.file_name().unwrap_or_default()))?;
        }
        let mut fields: Map<String, Value> = fsio::read_json(model.path().join("config.json"))?;
        let tokens = config.values()["tokens"].clone();
        fields.insert("max_position_embeddings".into(), tokens);
        fsio::write_json(folder.join("config.json"), &fields, 2)?;
        Ok(Arc::new(HfModel::open(folder)?))
    }
}

fn main() -> Result<()> {
    let mut passes = PassRegistry::new();
    passes.register(Box::new(ContextLength));
    let file = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "workflow.json".to_owned());
    let plan = Plan::new(&RunConfig::read(file)?, &passes)?;
    print!("{plan}");
    let engine = Engine {
        passes: &passes,
        evaluators: &EvaluatorRegistry::new(),
        opener: &HfOpener,
        progress: &LogProgress::default(),
        cancel: &CancelToken::default(),
        device: "cpu",
        keep_runs: true,
    };
    for outcome in engine.run(&plan)? {
        println!("{}", outcome.output_dir.display());
    }
    Ok(())
}
