//! `SelectiveMixedPrecision`: which modules the quantizing passes after it give more bits.

use std::sync::Arc;

use olive_core::arch::ModuleQuantization;
use olive_core::decoder::Cpu;
use olive_core::model::{self, MODEL_CONFIG_FILE};
use olive_core::{
    Error, HfModel, ModelHandle, ModelKind, ParamKind, ParamSpec, Pass, PassConfig, PassContext, Result, fsio,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::HF_TO_HF;
use super::params::{BITS, GROUP_SIZE, SYM, searched};
use crate::olive_layout::run::model_attributes;
use crate::output::{check_replaceable, place_folder};
use crate::pass::CalibrationProvider;
use crate::preflight::check_output;
use crate::quantizer::mixed_precision::kld::{self, Alignments};
use crate::quantizer::mixed_precision::{self, Choice, MixedPrecision, Precisions};

/// Where the choice is left in the `model_attributes` of `model_config.json`.
const MIXED_PRECISION: &str = "mixed_precision_info";

const PARAMS: &[ParamSpec] = &[
    searched(
        ParamSpec::required(
            "algorithm",
            ParamKind::OneOf(&[
                "iqe",
                "iqe_relative",
                "k_quant_down",
                "k_quant_last",
                "k_quant_mixed",
                "kld_gradient",
                "snr",
                "snr_relative",
            ]),
            "How modules are chosen; `kld_gradient` looks at the calibration text.",
        ),
        &[
            "\"k_quant_down\"",
            "\"k_quant_mixed\"",
            "\"k_quant_last\"",
            "\"iqe\"",
            "\"iqe_relative\"",
            "\"kld_gradient\"",
            "\"snr\"",
            "\"snr_relative\"",
        ],
    ),
    BITS,
    GROUP_SIZE,
    SYM,
    searched(
        ParamSpec::optional(
            "high_bits",
            ParamKind::OneOfInt(&[8, 16]),
            "8",
            "Bits of chosen modules; 16 leaves them dense.",
        ),
        &["8", "16"],
    ),
    searched(
        ParamSpec::optional(
            "high_group_size",
            ParamKind::Int,
            "null",
            "Group size of chosen modules; else as the others.",
        ),
        &["null", "-1", "16", "32", "64", "128"],
    ),
    searched(
        ParamSpec::optional(
            "high_sym",
            ParamKind::Bool,
            "null",
            "Whether chosen modules have no zero point; else as the others.",
        ),
        &["null", "true", "false"],
    ),
    searched(
        ParamSpec::optional(
            "ratio",
            ParamKind::Float,
            "null",
            "Share of the weights that keeps the low precision; scores need it.",
        ),
        &["0.5", "0.8", "0.9", "0.95"],
    ),
    ParamSpec::optional(
        "kld_memory_mode",
        ParamKind::OneOf(&["auto", "full", "multi_gpu", "low_memory", "offload"]),
        "\"auto\"",
        "Has no effect: `kld_gradient` holds one layer at a time.",
    ),
];

/// What `SelectiveMixedPrecision` chose for the model, if it ran.
///
/// # Errors
/// [`Error::Io`], [`Error::Json`] or [`Error::Config`] if `model_config.json` cannot be read.
pub fn mixed_precision_of(model: &dyn ModelHandle) -> Result<Option<MixedPrecision>> {
    let attributes = model_attributes(model)?;
    let info = attributes.as_ref().and_then(|own| own.get(MIXED_PRECISION));
    let Some(info) = info.filter(|info| !info.is_null()) else {
        return Ok(None);
    };
    MixedPrecision::deserialize(info).map(Some).map_err(|e| {
        let origin = format!("`{MODEL_CONFIG_FILE}` of `{}`", model.path().display());
        Error::config(
            origin,
            MIXED_PRECISION,
            "`default` and `overrides`",
            e.to_string(),
        )
    })
}

/// Olive's `SelectiveMixedPrecision`: the same model, with the settings of its modules in `model_config.json`, which
/// `Gptq`, `KQuant` and `Rtn` follow.
#[derive(Clone)]
pub struct SelectiveMixedPrecision {
    calibration: CalibrationProvider,
}

impl SelectiveMixedPrecision {
    /// The pass, with what gives the tokens for `kld_gradient`.
    pub fn new(calibration: CalibrationProvider) -> Self {
        Self { calibration }
    }
}

#[derive(Debug, Deserialize)]
struct Parameters {
    algorithm: String,
    bits: usize,
    group_size: i64,
    sym: bool,
    high_bits: usize,
    high_group_size: Option<i64>,
    high_sym: Option<bool>,
    ratio: Option<f64>,
}

fn parameters(config: &PassConfig) -> Result<(Choice, Precisions)> {
    let origin = "pass `SelectiveMixedPrecision`";
    let own: Parameters = config.parse(origin)?;
    if own.bits == 2 {
        let found = "2, which is not supported";
        return Err(Error::config(origin, "bits", "4 or 8", found));
    }
    let choice = Choice::deserialize(Value::String(own.algorithm.clone())).map_err(|_| {
        let expected = "a rule or a score";
        Error::config(origin, "algorithm", expected, own.algorithm.clone())
    })?;
    let ratio = match own.ratio {
        Some(ratio) if ratio > 0.0 && ratio < 1.0 => ratio,
        None if !choice.is_scored() => 1.0,
        found => {
            let found = found.map_or_else(|| "nothing".to_owned(), |ratio| ratio.to_string());
            return Err(Error::config(
                origin,
                "ratio",
                "more than 0 and less than 1",
                found,
            ));
        }
    };
    let low = ModuleQuantization {
        bits: own.bits,
        group_size: own.group_size,
        symmetric: own.sym,
    };
    let high = ModuleQuantization {
        bits: own.high_bits,
        group_size: own.high_group_size.unwrap_or(own.group_size),
        symmetric: own.high_sym.unwrap_or(own.sym),
    };
    Ok((choice, Precisions { low, high, ratio }))
}

impl Pass for SelectiveMixedPrecision {
    fn name(&self) -> &'static str {
        "SelectiveMixedPrecision"
    }

    fn params(&self) -> &'static [ParamSpec] {
        PARAMS
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        HF_TO_HF
    }

    fn check(&self, model: &dyn ModelHandle, config: &PassConfig) -> Result<()> {
        let (choice, precisions) = parameters(config)?;
        let spec = model.spec();
        let what = || format!("model `{}`", model.path().display());
        if model.kind() != ModelKind::HuggingFace || spec.quantization.is_some() {
            let reason = "modules are chosen in a dense Hugging Face checkpoint";
            return Err(Error::unsupported(what(), reason));
        }
        if model.adapter().is_some() {
            let reason = "it has an adapter; merge it first";
            return Err(Error::unsupported(what(), reason));
        }
        if choice.is_scored() {
            for linear in spec.linears(0) {
                let shape = [linear.out_features, linear.in_features];
                for settings in [precisions.low, precisions.high] {
                    if settings.bits != 16 {
                        settings.checked_group(&linear.name, shape)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        self.check(model, config)?;
        check_output(model.path(), context.output)?;
        check_replaceable(context.output)?;
        let (choice, precisions) = parameters(config)?;
        context.cancel.check()?;
        let alignments = match choice.calibrates() {
            true => {
                let calibration = (self.calibration)(model, None)?;
                let (progress, cancel) = (context.progress, context.cancel);
                kld::alignments::<Cpu>(model, &calibration, &precisions, progress, cancel)?
            }
            false => Alignments::new(),
        };
        let chosen =
            mixed_precision::choose(model.tensors(), model.spec(), choice, &precisions, &alignments)?;
        let mut files = model::companion_files(model.path())?;
        files.extend(HfModel::open(model.path())?.weight_files());
        let mut attributes = model_attributes(model)?.unwrap_or_else(|| json!({}));
        attributes[MIXED_PRECISION] = json!(chosen);
        place_folder(context.output, Some(attributes), |staging| {
            for file in files {
                context.cancel.check()?;
                fsio::link_or_copy(&file, &staging.join(file.file_name().unwrap_or_default()))?;
            }
            Ok(())
        })?;
        Ok(Arc::new(HfModel::open(context.output)?))
    }
}
