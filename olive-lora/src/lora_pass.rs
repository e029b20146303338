//! The pass `LoRA`: fine-tuning as a step of a workflow, with Olive's parameter names.

use std::sync::Arc;

use olive_core::decoder::Cpu;
use olive_core::{
    Error, HfModel, ModelHandle, ModelKind, ParamKind, ParamSpec, Pass, PassConfig, PassContext, Result,
    Sample,
};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::arguments::TrainingArguments;
use crate::finetune::finetune;
use crate::matching::Targets;
use crate::options::LoraOptions;
use crate::trainer::TrainingData;

/// Gives the samples that a data config describes, tokenised for a model.
pub type SampleSource = dyn Fn(&Value, &dyn ModelHandle) -> Result<Vec<Sample>> + Send + Sync;

/// Trains a LoRA adapter.
pub struct LoraPass {
    samples: Box<SampleSource>,
}

impl LoraPass {
    /// A pass whose data configs `samples` resolves.
    pub fn new(samples: Box<SampleSource>) -> Self {
        Self { samples }
    }
}

const fn param(
    name: &'static str,
    kind: ParamKind,
    default: Option<&'static str>,
    doc: &'static str,
) -> ParamSpec {
    ParamSpec {
        name,
        kind,
        default,
        doc,
        search: &[],
    }
}

const PARAMS: &[ParamSpec] = &[
    ParamSpec {
        search: &["16", "32", "64"],
        ..param("r", ParamKind::Int, Some("64"), "Rank of the adapter.")
    },
    param(
        "alpha",
        ParamKind::Float,
        Some("16.0"),
        "The adapter is scaled by alpha / r.",
    ),
    param(
        "lora_dropout",
        ParamKind::Float,
        Some("0.05"),
        "Share of an adapter's inputs dropped while training.",
    ),
    param(
        "target_modules",
        ParamKind::TextList,
        Some("null"),
        "Modules that are adapted.",
    ),
    param(
        "modules_to_save",
        ParamKind::TextList,
        Some("null"),
        "Modules trained as a whole; none can be.",
    ),
    param(
        "torch_dtype",
        ParamKind::OneOf(&["bfloat16", "float16", "float32"]),
        Some("\"bfloat16\""),
        "Accepted; the CPU computes in fp32.",
    ),
    param(
        "device_map",
        ParamKind::Text,
        Some("\"auto\""),
        "Accepted; the device is the command's choice.",
    ),
    param(
        "allow_tf32",
        ParamKind::Bool,
        Some("true"),
        "Accepted; the CPU computes in fp32.",
    ),
    param(
        "ephemeral_gpu_offload",
        ParamKind::Bool,
        Some("false"),
        "Accepted; nothing is moved between devices.",
    ),
    param(
        "train_data_config",
        ParamKind::DataConfig,
        None,
        "Data to train on.",
    ),
    param(
        "eval_data_config",
        ParamKind::DataConfig,
        Some("null"),
        "Data to evaluate on.",
    ),
    param(
        "training_args",
        ParamKind::Object,
        Some("{}"),
        "Fields of Hugging Face's TrainingArguments.",
    ),
];

#[derive(Deserialize)]
struct Params {
    r: i64,
    alpha: f64,
    lora_dropout: f64,
    target_modules: Option<Vec<String>>,
    modules_to_save: Option<Vec<String>>,
    train_data_config: Value,
    eval_data_config: Option<Value>,
    training_args: Map<String, Value>,
}

const ORIGIN: &str = "pass `LoRA`";

impl Params {
    fn options(&self) -> Result<LoraOptions> {
        if let Some(modules) = self.modules_to_save.as_ref().filter(|list| !list.is_empty()) {
            let what = format!("modules_to_save = {}", modules.join(", "));
            return Err(Error::unsupported(
                what,
                "only low-rank parts are trained; remove it",
            ));
        }
        let r = usize::try_from(self.r)
            .map_err(|_| Error::config(ORIGIN, "r", "a rank above 0", self.r.to_string()))?;
        Ok(LoraOptions {
            r,
            alpha: self.alpha,
            dropout: self.lora_dropout,
            target_modules: self.target_modules.clone().map(Targets::Names),
            ..LoraOptions::default()
        })
    }

    fn arguments(&self) -> Result<TrainingArguments> {
        let (arguments, warnings) = TrainingArguments::from_pairs(self.training_args.clone())?;
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        Ok(arguments)
    }
}

impl Pass for LoraPass {
    fn name(&self) -> &'static str {
        "LoRA"
    }

    fn params(&self) -> &'static [ParamSpec] {
        PARAMS
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        (ModelKind::HuggingFace, ModelKind::HuggingFace)
    }

    fn check(&self, model: &dyn ModelHandle, config: &PassConfig) -> Result<()> {
        let params: Params = config.parse(ORIGIN)?;
        params.options()?.adapted_linears(model.spec())?;
        TrainingArguments::from_pairs(params.training_args.clone()).map(|_| ())
    }

    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        let params: Params = config.parse(ORIGIN)?;
        let (options, arguments) = (params.options()?, params.arguments()?);
        let train = (self.samples)(&params.train_data_config, model)?;
        let eval = params
            .eval_data_config
            .as_ref()
            .map(|config| (self.samples)(config, model))
            .transpose()?;
        let data = TrainingData {
            train: &train,
            eval: eval.as_deref(),
        };
        let report = finetune::<Cpu>(model, data, &options, &arguments, context)?;
        tracing::info!(
            "{} steps, loss {:?} to {:?}",
            report.steps,
            report.first_loss,
            report.final_loss
        );
        Ok(Arc::new(HfModel::open(context.output)?))
    }
}
