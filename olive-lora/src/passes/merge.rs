//! The pass `MergeAdapterWeights`: Olive's, and with `layout` a choice of what a packed base becomes.
//!
//! Of a model that QLoRA left with `save_quant_config: false` the adapter is merged into the weights that QLoRA was
//! given, as Olive does it.

use std::sync::Arc;

use olive_core::{
    Error, HfModel, ModelHandle, ModelKind, ParamKind, ParamSpec, Pass, PassConfig, PassContext, Result,
};
use serde::Deserialize;

use crate::merge::{MergeLayout, merge};

const ORIGIN: &str = "pass `MergeAdapterWeights`";

const PARAMS: &[ParamSpec] = &[ParamSpec::optional(
    "layout",
    ParamKind::OneOf(&["auto", "same", "dense"]),
    "\"auto\"",
    "What a packed base becomes: its own layout again, or dense; auto is dense for NF4 and FP4.",
)];

#[derive(Deserialize)]
struct Params {
    layout: String,
}

/// Merges a model's adapter into its weights.
pub struct MergeAdapterWeightsPass;

impl Pass for MergeAdapterWeightsPass {
    fn name(&self) -> &'static str {
        "MergeAdapterWeights"
    }

    fn params(&self) -> &'static [ParamSpec] {
        PARAMS
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        (ModelKind::HuggingFace, ModelKind::HuggingFace)
    }

    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        let params: Params = config.parse(ORIGIN)?;
        let adapter = model.adapter().ok_or_else(|| {
            let what = format!("merging `{}`", model.path().display());
            Error::unsupported(what, "the model has no adapter; run LoRA, QLoRA or DoRA before")
        })?;
        let layout = match params.layout.as_str() {
            "same" => MergeLayout::Same,
            "dense" => MergeLayout::Dense,
            _ => MergeLayout::Auto,
        };
        merge(model, adapter, layout, context)?;
        Ok(Arc::new(HfModel::open(context.output)?))
    }
}
