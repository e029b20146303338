//! The pass `AutoAWQQuantizer` with Olive's parameters, and the registration of all passes of this crate.

use std::sync::Arc;

use olive_core::workflow::registry::PassRegistry;
use olive_core::{
    Error, HfModel, ModelHandle, ModelKind, ParamKind, ParamSpec, Pass, PassConfig, PassContext, Result,
};
use serde_json::Value;

use crate::calibration::CalibrationSet;
use crate::olive_layout::{Gptq, KQuant, Rtn, SelectiveMixedPrecision};
use crate::options::{QuantizeOptions, Search};
use crate::preflight::check_model;
use crate::run::quantize;

/// Makes the calibration of a model from the pass's `data_config`; `None` asks for the default text.
pub type CalibrationProvider =
    Arc<dyn Fn(&dyn ModelHandle, Option<&Value>) -> Result<CalibrationSet> + Send + Sync>;

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

const AWQ_PARAMS: &[ParamSpec] = &[
    param(
        "user_script",
        ParamKind::Text,
        Some("null"),
        "A Python script; not supported.",
    ),
    param(
        "script_dir",
        ParamKind::Text,
        Some("null"),
        "Its folder; not supported.",
    ),
    param(
        "input_model_dtype",
        ParamKind::OneOf(&["fp16", "fp32", "bf16"]),
        Some("\"fp16\""),
        "The model's dtype; the stored one is read whatever is said here.",
    ),
    param(
        "zero_point",
        ParamKind::Bool,
        Some("true"),
        "Whether groups have a zero point.",
    ),
    param(
        "q_group_size",
        ParamKind::Int,
        Some("128"),
        "Inputs that share a scale; -1 for a whole row.",
    ),
    param("bits", ParamKind::OneOfInt(&[4]), Some("4"), "Bits of a weight."),
    param(
        "version",
        ParamKind::OneOf(&["gemm"]),
        Some("\"gemm\""),
        "The checkpoint's layout.",
    ),
    param(
        "duo_scaling",
        ParamKind::Bool,
        Some("true"),
        "Whether scales weigh activations against weights, or follow activations alone.",
    ),
    param(
        "modules_to_not_convert",
        ParamKind::TextList,
        Some("[]"),
        "Linears whose name contains one of these stay in half precision.",
    ),
    param(
        "export_compatible",
        ParamKind::Bool,
        Some("false"),
        "Scale only, without rounding; not supported.",
    ),
    param(
        "awq_search",
        ParamKind::OneOf(&["exact", "hybrid", "fast"]),
        Some("\"exact\""),
        "How scales before a nonlinearity are judged: by the block's output, for all or for the best few, or by the \
         linears' outputs.",
    ),
    param(
        "data_config",
        ParamKind::DataConfig,
        Some("null"),
        "The calibration text.",
    ),
];

/// Refuses a parameter that is set to anything but its harmless value.
fn refuse_set(config: &PassConfig, origin: &str, names: &[&str]) -> Result<()> {
    for name in names {
        let value = config.values().get(*name).unwrap_or(&Value::Null);
        let harmless = matches!(value, Value::Null | Value::Bool(false))
            || value.as_object().is_some_and(serde_json::Map::is_empty);
        if !harmless {
            return Err(Error::config(
                origin,
                *name,
                "nothing: it is not supported",
                value.to_string(),
            ));
        }
    }
    Ok(())
}

fn texts(config: &PassConfig, name: &str) -> Vec<String> {
    let list = config.values().get(name).and_then(Value::as_array);
    list.into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

fn integer(config: &PassConfig, name: &str, default: i64) -> i64 {
    config
        .values()
        .get(name)
        .and_then(Value::as_i64)
        .unwrap_or(default)
}

fn flag(config: &PassConfig, name: &str, default: bool) -> bool {
    config
        .values()
        .get(name)
        .and_then(Value::as_bool)
        .unwrap_or(default)
}

/// Olive's `AutoAWQQuantizer`.
#[derive(Clone)]
pub struct AutoAwqQuantizer {
    calibration: CalibrationProvider,
}

impl AutoAwqQuantizer {
    /// The pass, with what turns its `data_config` into tokens.
    pub fn new(calibration: CalibrationProvider) -> Self {
        Self { calibration }
    }

    fn options(config: &PassConfig) -> Result<QuantizeOptions> {
        let origin = "pass `AutoAWQQuantizer`";
        refuse_set(
            config,
            origin,
            &["user_script", "script_dir", "export_compatible"],
        )?;
        let options = QuantizeOptions {
            group_size: integer(config, "q_group_size", 128),
            zero_point: flag(config, "zero_point", true),
            duo_scaling: flag(config, "duo_scaling", true),
            modules_to_not_convert: texts(config, "modules_to_not_convert"),
            search: match config.values().get("awq_search").and_then(Value::as_str) {
                Some("fast") => Search::Fast,
                Some("hybrid") => Search::Hybrid,
                _ => Search::Exact,
            },
            ..QuantizeOptions::default()
        };
        options.check()?;
        Ok(options)
    }
}

impl Pass for AutoAwqQuantizer {
    fn name(&self) -> &'static str {
        "AutoAWQQuantizer"
    }

    fn params(&self) -> &'static [ParamSpec] {
        AWQ_PARAMS
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        (ModelKind::HuggingFace, ModelKind::HuggingFace)
    }

    fn check(&self, model: &dyn ModelHandle, config: &PassConfig) -> Result<()> {
        check_model(model, &Self::options(config)?)
    }

    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        let options = Self::options(config)?;
        let data = config
            .values()
            .get("data_config")
            .filter(|value| !value.is_null());
        let calibration = (self.calibration)(model, data)?;
        quantize(
            model,
            &calibration,
            &options,
            context.output,
            context.progress,
            context.cancel,
        )?;
        Ok(Arc::new(HfModel::open(context.output)?))
    }
}

/// Adds every pass of this crate to `registry`; `calibration` turns the `data_config` of those that calibrate into
/// tokens.
pub fn register_passes(registry: &mut PassRegistry, calibration: &CalibrationProvider) {
    registry.register(Box::new(AutoAwqQuantizer::new(calibration.clone())));
    registry.register(Box::new(Rtn));
    registry.register(Box::new(Gptq::new(calibration.clone())));
    registry.register(Box::new(KQuant));
    registry.register(Box::new(SelectiveMixedPrecision::new(calibration.clone())));
}
