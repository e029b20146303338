//! The arguments of a training run: the fields of Hugging Face's TrainingArguments under both their old and their new
//! names, with the defaults that Olive's LoRA pass gives them.
//!
//! Every field is known: honoured, accepted without effect (with a warning), or refused by name. Two defaults differ
//! from Hugging Face's on purpose: each step is logged (`logging_steps` 1, not 500), and a loss that is not finite
//! stops the run.

mod table;
mod values;

use olive_core::{Error, Result};
use serde_json::{Map, Value};

use crate::adamw::AdamW;
use crate::schedule::{LearningRate, Schedule};
use table::{FIELDS, Support};
use values::Values;

/// Where errors about arguments say that they come from.
const ORIGIN: &str = "training arguments";

/// Optimizers of Hugging Face that are AdamW in full precision.
const ADAMW_NAMES: &[&str] = &[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adamw_apex_fused",
    "adamw_hf",
    "paged_adamw_32bit",
    "paged_adamw",
];

/// How often something is done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Interval {
    /// Never.
    Never,
    /// Every so many optimizer steps; below 1, that share of all steps.
    Steps(f64),
    /// After each epoch.
    Epoch,
}

impl Interval {
    /// Whether it is time after optimizer step `step` (from 1) of `total`.
    pub fn is_due(self, step: usize, total: usize, epoch_ends: bool) -> bool {
        match self {
            Self::Never => false,
            Self::Epoch => epoch_ends,
            Self::Steps(every) => {
                let every = if every < 1.0 {
                    (every * total as f64).ceil()
                } else {
                    every
                };
                step.is_multiple_of((every as usize).max(1))
            }
        }
    }
}

/// From where a run continues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// From the newest checkpoint of the same run in the output folder, if there is one.
    Automatic,
    /// From the newest checkpoint in the output folder, which must exist.
    Last,
    /// From this checkpoint folder.
    From(std::path::PathBuf),
    /// From the beginning.
    Never,
}

/// Arguments of a training run; see the module.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingArguments {
    /// Samples of a micro-batch.
    pub per_device_train_batch_size: usize,
    /// Micro-batches of an optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Optimizer steps; overrides the epochs.
    pub max_steps: Option<usize>,
    /// Passes over the data.
    pub num_train_epochs: f64,
    /// The base rate.
    pub learning_rate: f64,
    /// How the rate changes.
    pub schedule: Schedule,
    /// Share of the steps that warm up, if `warmup_steps` is 0.
    pub warmup_ratio: f64,
    /// Steps that warm up; below 1, a share.
    pub warmup_steps: f64,
    /// The optimizer's constants.
    pub adamw: AdamW,
    /// Limit of the global gradient norm; 0 for none.
    pub max_grad_norm: f64,
    /// Whether layers are computed again in the backward instead of kept.
    pub gradient_checkpointing: bool,
    /// Seed of the initial adapter and of dropout.
    pub seed: u64,
    /// Seed of the data order; `seed` if absent.
    pub data_seed: Option<u64>,
    /// Whether samples of similar length come together.
    pub group_by_length: bool,
    /// Whether an incomplete last micro-batch is left out.
    pub dataloader_drop_last: bool,
    /// When a line is added to the log.
    pub logging: Interval,
    /// Whether the first step is logged in any case.
    pub logging_first_step: bool,
    /// When a checkpoint is written.
    pub save: Interval,
    /// Whether one is written after the last step too: where the user asked for checkpoints.
    pub save_at_end: bool,
    /// How many checkpoints are kept.
    pub save_total_limit: Option<usize>,
    /// When the evaluation loss is computed.
    pub eval: Interval,
    /// Whether it is computed before the first step too.
    pub eval_on_start: bool,
    /// From where the run continues.
    pub resume: Resume,
}

impl Default for TrainingArguments {
    fn default() -> Self {
        Self {
            per_device_train_batch_size: 8,
            gradient_accumulation_steps: 1,
            max_steps: None,
            num_train_epochs: 3.0,
            learning_rate: 2e-4,
            schedule: Schedule::Constant,
            warmup_ratio: 0.03,
            warmup_steps: 0.0,
            adamw: AdamW {
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.0,
            },
            max_grad_norm: 1.0,
            gradient_checkpointing: true,
            seed: 42,
            data_seed: None,
            group_by_length: false,
            dataloader_drop_last: false,
            logging: Interval::Steps(1.0),
            logging_first_step: false,
            save: Interval::Steps(500.0),
            save_at_end: false,
            save_total_limit: None,
            eval: Interval::Steps(500.0),
            eval_on_start: false,
            resume: Resume::Automatic,
        }
    }
}

impl TrainingArguments {
    /// Arguments from pairs of a field's name and its value, typed or as the text of a command line. The second
    /// result are warnings about fields that have no effect.
    ///
    /// # Errors
    /// [`Error::UnknownKey`] for a field that TrainingArguments never had; [`Error::Config`] for a wrong value or one
    /// given twice; [`Error::Unsupported`] for a field that would change the result and is not implemented.
    pub fn from_pairs<N: AsRef<str>>(
        pairs: impl IntoIterator<Item = (N, Value)>,
    ) -> Result<(Self, Vec<String>)> {
        let mut given = Map::new();
        let mut warnings = Vec::new();
        for (name, value) in pairs {
            let name = name.as_ref();
            if let Some((field, value)) = admit(name, value, &mut warnings)?
                && given.insert(field.to_owned(), value).is_some()
            {
                return Err(Error::config(
                    ORIGIN,
                    name,
                    "one value",
                    "two, or two spellings of it",
                ));
            }
        }
        let arguments = Self::from_values(&Values(&given), &mut warnings)?;
        Ok((arguments, warnings))
    }

    fn from_values(values: &Values<'_>, warnings: &mut Vec<String>) -> Result<Self> {
        let default = Self::default();
        let learning_rate = values.positive("learning_rate", default.learning_rate)?;
        let name = values.text("lr_scheduler_type")?.unwrap_or("constant");
        let schedule = Schedule::from_name(name, &values.object("lr_scheduler_kwargs")?, learning_rate)?;
        if let Some(optimizer) = values.text("optim")?
            && !ADAMW_NAMES.contains(&optimizer)
        {
            let reason = format!("use AdamW: one of {}", ADAMW_NAMES.join(", "));
            return Err(Error::unsupported(format!("optim `{optimizer}`"), reason));
        }
        let arguments = Self {
            per_device_train_batch_size: values
                .count("per_device_train_batch_size", default.per_device_train_batch_size)?,
            gradient_accumulation_steps: values.count("gradient_accumulation_steps", 1)?,
            max_steps: values.max_steps()?,
            num_train_epochs: values.positive("num_train_epochs", default.num_train_epochs)?,
            learning_rate,
            schedule,
            warmup_ratio: values.share("warmup_ratio", default.warmup_ratio)?,
            warmup_steps: values.not_negative("warmup_steps", 0.0)?,
            adamw: AdamW {
                beta1: values.share("adam_beta1", default.adamw.beta1)?,
                beta2: values.share("adam_beta2", default.adamw.beta2)?,
                epsilon: values.not_negative("adam_epsilon", default.adamw.epsilon)?,
                weight_decay: values.not_negative("weight_decay", 0.0)?,
            },
            max_grad_norm: values.not_negative("max_grad_norm", default.max_grad_norm)?,
            gradient_checkpointing: values.flag("gradient_checkpointing", true)?,
            seed: values.seed("seed")?.unwrap_or(default.seed),
            data_seed: values.seed("data_seed")?,
            group_by_length: values.group_by_length()?,
            dataloader_drop_last: values.flag("dataloader_drop_last", false)?,
            logging: values.interval("logging_strategy", "logging_steps", default.logging)?,
            logging_first_step: values.flag("logging_first_step", false)?,
            save: values.interval("save_strategy", "save_steps", default.save)?,
            save_at_end: values.asks_to_save()?,
            save_total_limit: values.optional_count("save_total_limit")?,
            eval: values.interval("eval_strategy", "eval_steps", default.eval)?,
            eval_on_start: values.flag("eval_on_start", false)?,
            resume: values.resume()?,
        };
        let warms_up = arguments.warmup_steps > 0.0 || values.given("warmup_ratio");
        if arguments.schedule == Schedule::Constant && warms_up {
            warnings.push("the schedule `constant` has no warm-up; see `constant_with_warmup`".to_owned());
        }
        Ok(arguments)
    }

    /// Optimizer steps of the whole run, given those of an epoch.
    pub fn total_steps(&self, steps_per_epoch: usize) -> usize {
        self.max_steps
            .unwrap_or_else(|| (self.num_train_epochs * steps_per_epoch.max(1) as f64).ceil() as usize)
    }

    /// The rate of each of `total` optimizer steps.
    pub fn learning_rates(&self, total: usize) -> LearningRate {
        let warmup = match self.warmup_steps {
            none if none <= 0.0 => (self.warmup_ratio * total as f64).ceil(),
            share if share < 1.0 => (share * total as f64).ceil(),
            steps => steps,
        };
        LearningRate {
            schedule: self.schedule,
            base: self.learning_rate,
            warmup_steps: warmup as usize,
            training_steps: total,
        }
    }
}

/// What is left of a pair: the field's own name and its value, if it is honoured.
fn admit(name: &str, value: Value, warnings: &mut Vec<String>) -> Result<Option<(&'static str, Value)>> {
    let find = |name: &str| FIELDS.iter().find(|(known, _)| *known == name);
    let Some((field, support)) = find(name) else {
        return Err(Error::unknown_key(
            ORIGIN,
            name,
            FIELDS.iter().map(|(known, _)| *known),
        ));
    };
    let (field, support) = match support {
        Support::Alias(target) => find(target).map_or((*field, *support), |(f, s)| (*f, *s)),
        _ => (*field, *support),
    };
    match support {
        Support::Honoured | Support::Alias(_) => Ok(Some((field, value))),
        Support::NoEffect(reason) => {
            if !is_neutral(&value) {
                warnings.push(format!("training argument `{name}` has no effect: {reason}"));
            }
            Ok(None)
        }
        Support::Refused(reason) if !is_neutral(&value) => {
            let what = format!("training argument `{name}` = {value}");
            Err(Error::unsupported(what, reason))
        }
        Support::Refused(_) => Ok(None),
    }
}

fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => {
            let text = text.to_ascii_lowercase();
            matches!(text.as_str(), "" | "none" | "no" | "false" | "null" | "[]")
                || text.parse::<f64>().is_ok_and(|number| number == 0.0)
        }
        Value::Array(list) => list.is_empty() || list.iter().all(is_neutral),
        Value::Object(map) => map.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: Value) -> Result<(TrainingArguments, Vec<String>)> {
        let pairs = pairs.as_object().cloned().unwrap();
        TrainingArguments::from_pairs(pairs)
    }

    fn refused(pairs: Value) -> Error {
        parse(pairs).unwrap_err()
    }

    #[test]
    fn defaults_are_those_of_olive() {
        let (arguments, warnings) = parse(serde_json::json!({})).unwrap();
        assert_eq!(arguments, TrainingArguments::default());
        assert!(warnings.is_empty());
    }

    #[test]
    fn text_of_a_command_line_and_typed_values_mean_the_same() {
        let typed = serde_json::json!({
            "max_steps": 100, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "save_strategy": "no",
            "gradient_checkpointing": false, "group_by_length": true, "eval_strategy": "epoch",
            "resume_from_checkpoint": true, "lr_scheduler_kwargs": {"num_cycles": 2}
        });
        let text = serde_json::json!({
            "max_steps": "100", "learning_rate": "3e-3", "lr_scheduler_type": "cosine", "save_strategy": "no",
            "gradient_checkpointing": "False", "train_sampling_strategy": "group_by_length",
            "evaluation_strategy": "epoch", "resume_from_checkpoint": "true",
            "lr_scheduler_kwargs": "{\"num_cycles\": 2}"
        });
        let (a, b) = (parse(typed).unwrap().0, parse(text).unwrap().0);
        assert_eq!(a, b);
        assert_eq!(
            (a.max_steps, a.save, a.eval),
            (Some(100), Interval::Never, Interval::Epoch)
        );
        assert!(a.group_by_length && !a.gradient_checkpointing);
        assert_eq!(a.resume, Resume::Last);
    }

    #[test]
    fn fields_are_known_or_refused_by_name() {
        let error = refused(serde_json::json!({"learning_rat": 1}));
        assert!(
            error.to_string().contains("did you mean `learning_rate`"),
            "{error}"
        );
        assert!(error.is_usage());
        for (name, value) in [
            ("optim", "adamw_bnb_8bit"),
            ("label_smoothing_factor", "0.1"),
            ("neftune_noise_alpha", "5"),
            ("deepspeed", "zero3.json"),
            ("load_best_model_at_end", "True"),
        ] {
            let error = refused(serde_json::json!({ name: value }));
            assert!(error.to_string().contains(name), "{error}");
        }
        for (name, value) in [
            ("max_steps", "many"),
            ("per_device_train_batch_size", "0"),
            ("learning_rate", "-1"),
            ("bf16", "true"),
        ] {
            let result = parse(serde_json::json!({ name: value }));
            match name {
                "bf16" => assert_eq!(result.unwrap().1.len(), 1),
                _ => assert!(result.unwrap_err().to_string().contains(name)),
            }
        }
        let twice = serde_json::json!({"eval_strategy": "no", "evaluation_strategy": "no"});
        assert!(parse(twice).is_err());
    }

    #[test]
    fn fields_are_sorted_and_aliases_lead_somewhere() {
        assert!(FIELDS.windows(2).all(|pair| pair[0].0 < pair[1].0));
        for (_, support) in FIELDS {
            if let Support::Alias(target) = support {
                assert!(FIELDS.iter().any(|(name, _)| name == target));
            }
        }
    }

    #[test]
    fn steps_and_warm_up_follow_the_epochs() {
        let (arguments, _) = parse(
            serde_json::json!({"num_train_epochs": 2.5, "warmup_ratio": 0.1, "lr_scheduler_type": "linear"}),
        )
        .unwrap();
        assert_eq!(arguments.total_steps(7), 18);
        assert_eq!(arguments.learning_rates(18).warmup_steps, 2);
        assert!(Interval::Steps(0.25).is_due(5, 18, false));
        assert!(!Interval::Steps(0.25).is_due(4, 18, true));
        assert!(Interval::Epoch.is_due(4, 18, true));
    }
}
