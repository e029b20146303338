//! Parameters that all training passes share, with Olive's names, and the run itself.

use std::sync::Arc;

use olive_core::decoder::Cpu;
use olive_core::{
    Error, HfModel, ModelHandle, ParamKind, ParamSpec, PassConfig, PassContext, Result, Sample,
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

/// The parameters of every adapter that is trained.
pub(super) const PARAMS: [ParamSpec; 12] = [
    ParamSpec {
        search: &["16", "32", "64"],
        ..ParamSpec::optional("r", ParamKind::Int, "64", "Rank of the adapter.")
    },
    ParamSpec::optional(
        "alpha",
        ParamKind::Float,
        "16.0",
        "The adapter is scaled by alpha / r.",
    ),
    ParamSpec::optional(
        "lora_dropout",
        ParamKind::Float,
        "0.05",
        "Share of an adapter's inputs dropped while training.",
    ),
    ParamSpec::optional(
        "target_modules",
        ParamKind::TextList,
        "null",
        "Modules that are adapted.",
    ),
    ParamSpec::optional(
        "modules_to_save",
        ParamKind::TextList,
        "null",
        "Modules trained as a whole; none can be.",
    ),
    ParamSpec::optional(
        "torch_dtype",
        ParamKind::OneOf(&["bfloat16", "float16", "float32"]),
        "\"bfloat16\"",
        "Accepted; the CPU computes in fp32.",
    ),
    ParamSpec::optional(
        "device_map",
        ParamKind::Text,
        "\"auto\"",
        "Accepted; the device is the command's choice.",
    ),
    ParamSpec::optional(
        "allow_tf32",
        ParamKind::Bool,
        "true",
        "Accepted; the CPU computes in fp32.",
    ),
    ParamSpec::optional(
        "ephemeral_gpu_offload",
        ParamKind::Bool,
        "false",
        "Accepted; nothing is moved between devices.",
    ),
    ParamSpec::required("train_data_config", ParamKind::DataConfig, "Data to train on."),
    ParamSpec::optional(
        "eval_data_config",
        ParamKind::DataConfig,
        "null",
        "Data to evaluate on.",
    ),
    ParamSpec::optional(
        "training_args",
        ParamKind::Object,
        "{}",
        "Fields of Hugging Face's TrainingArguments.",
    ),
];

/// Their values.
#[derive(Deserialize)]
pub(super) struct Params {
    r: i64,
    alpha: f64,
    lora_dropout: f64,
    target_modules: Option<Vec<String>>,
    modules_to_save: Option<Vec<String>>,
    train_data_config: Value,
    eval_data_config: Option<Value>,
    training_args: Map<String, Value>,
}

impl Params {
    /// The parameters of the pass `origin`.
    pub fn read(origin: &str, config: &PassConfig) -> Result<Self> {
        config.parse(origin)
    }

    /// The adapter that they describe.
    pub fn options(&self, origin: &str) -> Result<LoraOptions> {
        if let Some(modules) = self.modules_to_save.as_ref().filter(|list| !list.is_empty()) {
            let what = format!("modules_to_save = {} of the {origin}", modules.join(", "));
            return Err(Error::unsupported(
                what,
                "only low-rank parts are trained; remove it",
            ));
        }
        let r = usize::try_from(self.r)
            .map_err(|_| Error::config(origin, "r", "a rank above 0", self.r.to_string()))?;
        Ok(LoraOptions {
            r,
            alpha: self.alpha,
            dropout: self.lora_dropout,
            target_modules: self.target_modules.clone().map(Targets::Names),
            ..LoraOptions::default()
        })
    }

    /// Refuses what a run would refuse and can be known before.
    pub fn check(&self, model: &dyn ModelHandle, options: &LoraOptions) -> Result<()> {
        options.adapted_linears(model.spec())?;
        TrainingArguments::from_pairs(self.training_args.clone()).map(|_| ())
    }

    /// Reads data and arguments and hands them to `train`.
    pub fn with_data<T>(
        &self,
        model: &dyn ModelHandle,
        samples: &SampleSource,
        train: impl FnOnce(TrainingData<'_>, &TrainingArguments) -> Result<T>,
    ) -> Result<T> {
        let (arguments, warnings) = TrainingArguments::from_pairs(self.training_args.clone())?;
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        let own = samples(&self.train_data_config, model)?;
        let eval = self
            .eval_data_config
            .as_ref()
            .map(|config| samples(config, model))
            .transpose()?;
        let data = TrainingData {
            train: &own,
            eval: eval.as_deref(),
        };
        train(data, &arguments)
    }

    /// Trains the adapter `options` of `model`; the handle is that of the output folder.
    pub fn train(
        &self,
        model: &dyn ModelHandle,
        options: &LoraOptions,
        samples: &SampleSource,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        let report = self.with_data(model, samples, |data, arguments| {
            finetune::<Cpu>(model, data, options, arguments, context)
        })?;
        report.say();
        Ok(Arc::new(HfModel::open(context.output)?))
    }
}

/// Both lists of parameters, one after the other.
pub(super) const fn concat<const A: usize, const B: usize, const ALL: usize>(
    first: [ParamSpec; A],
    second: [ParamSpec; B],
) -> [ParamSpec; ALL] {
    assert!(A + B == ALL, "invariant: as long as both");
    let mut all = [first[0]; ALL];
    let mut index = 0;
    while index < ALL {
        all[index] = if index < A {
            first[index]
        } else {
            second[index - A]
        };
        index += 1;
    }
    all
}
