//! The passes `Gptq`, `KQuant`, `Rtn` and `SelectiveMixedPrecision`, with Olive's parameters, to Olive's layout.

use std::sync::Arc;

use olive_core::arch::ModuleQuantization;
use olive_core::model::{self, MODEL_CONFIG_FILE, ModelConfigFile};
use olive_core::{
    Error, HfModel, ModelHandle, ModelKind, ParamKind, ParamSpec, Pass, PassConfig, PassContext, Result, fsio,
};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::options::{Rounding, UniformOptions};
use super::run::{check_model, model_config, quantize_uniform};
use crate::calibration::CalibrationSet;
use crate::output::{MODEL_FOLDER, check_replaceable};
use crate::pass::CalibrationProvider;
use crate::preflight::check_output;
use crate::quantizer::mixed_precision::{self, Choice, MixedPrecision, Precisions};

/// Where `SelectiveMixedPrecision` leaves its choice in `model_config.json`.
const MIXED_PRECISION: &str = "mixed_precision_info";

const BOTH: &[&str] = &["true", "false"];
const GROUPS: &[&str] = &["-1", "16", "32", "64", "128"];

const fn param(
    name: &'static str,
    kind: ParamKind,
    default: &'static str,
    search: &'static [&'static str],
    doc: &'static str,
) -> ParamSpec {
    ParamSpec {
        name,
        kind,
        default: Some(default),
        doc,
        search,
    }
}

const BITS: ParamSpec =
    param("bits", ParamKind::OneOfInt(&[2, 4, 8]), "4", &["4", "8"], "Bits of a weight; 2 is not supported.");
const GROUP_SIZE: ParamSpec =
    param("group_size", ParamKind::Int, "128", GROUPS, "Inputs that share a scale; -1 for a whole row.");
const KQUANT_GROUP_SIZE: ParamSpec =
    param("group_size", ParamKind::Int, "32", &[], "Inputs that share a scale; -1 for a whole row.");
const SYM: ParamSpec = param("sym", ParamKind::Bool, "false", BOTH, "Whether groups have no zero point.");
const LM_HEAD: ParamSpec = param("lm_head", ParamKind::Bool, "false", BOTH, "Whether the head is quantized.");
const EMBEDS: ParamSpec = param("embeds", ParamKind::Bool, "false", &[], "Whether the embedding is quantized.");
const VISION: ParamSpec = param(
    "quantize_vision",
    ParamKind::Bool,
    "false",
    &[],
    "Whether a vision tower is quantized; not supported.",
);
const MOE: ParamSpec =
    param("moe", ParamKind::Bool, "false", &[], "Whether experts are quantized; not supported.");
const EXCLUDED: ParamSpec = param(
    "modules_to_not_convert",
    ParamKind::TextList,
    "null",
    &[],
    "Modules that stay dense: parts of names, or `re:` and an expression for a whole name.",
);
const OVERRIDES: ParamSpec = param(
    "overrides",
    ParamKind::Object,
    "null",
    &[],
    "`bits`, `group_size`, `symmetric` by module: names, or `re:` and an expression; the first that matches counts.",
);

const RTN_PARAMS: &[ParamSpec] =
    &[BITS, GROUP_SIZE, SYM, LM_HEAD, VISION, EMBEDS, MOE, EXCLUDED, OVERRIDES];
const KQUANT_PARAMS: &[ParamSpec] =
    &[BITS, KQUANT_GROUP_SIZE, SYM, LM_HEAD, VISION, EMBEDS, MOE, EXCLUDED, OVERRIDES];
const GPTQ_PARAMS: &[ParamSpec] = &[
    BITS,
    GROUP_SIZE,
    SYM,
    LM_HEAD,
    VISION,
    MOE,
    EXCLUDED,
    OVERRIDES,
    param(
        "damp_percent",
        ParamKind::Float,
        "0.01",
        &["0.001", "0.01", "0.1"],
        "Share of the mean of the Gram matrix's diagonal that is added to it.",
    ),
    param(
        "desc_act",
        ParamKind::Bool,
        "null",
        &[],
        "Whether columns with the largest activations go first; by default for whole-row groups, which alone can.",
    ),
    param("data_config", ParamKind::DataConfig, "null", &[], "The calibration text."),
    param("moe_fallback_threshold", ParamKind::Float, "0.005", &[], "For experts; has no effect without them."),
    param("moe_fallback_min_k_multiple", ParamKind::Float, "2.0", &[], "For experts; has no effect without them."),
];
const MIXED_PARAMS: &[ParamSpec] = &[
    ParamSpec {
        default: None,
        ..param(
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
            "null",
            &[],
            "How modules are chosen; `kld_gradient` is not supported.",
        )
    },
    BITS,
    GROUP_SIZE,
    SYM,
    param("high_bits", ParamKind::OneOfInt(&[8, 16]), "8", &[], "Bits of chosen modules; 16 leaves them dense."),
    param("high_group_size", ParamKind::Int, "null", &[], "Group size of chosen modules; else as the others."),
    param("high_sym", ParamKind::Bool, "null", &[], "Whether chosen modules have no zero point; else as the others."),
    param(
        "ratio",
        ParamKind::Float,
        "null",
        &["0.5", "0.8", "0.9", "0.95"],
        "Share of the weights that keeps the low precision; scores need it.",
    ),
    param("kld_memory_mode", ParamKind::Text, "\"auto\"", &[], "For `kld_gradient`; has no effect without it."),
];

/// Parameters that the three quantizers share; those a pass lacks take their defaults.
#[derive(Debug, Deserialize)]
struct Parameters {
    bits: usize,
    group_size: i64,
    sym: bool,
    lm_head: bool,
    quantize_vision: bool,
    moe: bool,
    #[serde(default)]
    embeds: bool,
    modules_to_not_convert: Option<Vec<String>>,
    overrides: Option<Map<String, Value>>,
    #[serde(default)]
    damp_percent: f64,
    #[serde(default)]
    desc_act: Option<bool>,
}

impl Parameters {
    fn read(config: &PassConfig, pass: &str) -> Result<Self> {
        let origin = format!("pass `{pass}`");
        let own: Self = config.parse(&origin)?;
        for (name, set) in [("quantize_vision", own.quantize_vision), ("moe", own.moe)] {
            if set {
                return Err(Error::config(&origin, name, "false: it is not supported", "true"));
            }
        }
        if own.bits == 2 {
            return Err(Error::config(&origin, "bits", "4 or 8", "2, which is not supported"));
        }
        if own.group_size < -1 || own.group_size == 0 {
            let found = own.group_size.to_string();
            return Err(Error::config(&origin, "group_size", "a positive number or -1", found));
        }
        Ok(own)
    }

    fn options(self, rounding: Rounding, model: &dyn ModelHandle) -> Result<UniformOptions> {
        let mut options = UniformOptions {
            rounding,
            settings: ModuleQuantization {
                bits: self.bits,
                group_size: self.group_size,
                symmetric: self.sym,
            },
            lm_head: self.lm_head,
            embeds: self.embeds,
            modules_to_not_convert: self.modules_to_not_convert.unwrap_or_default(),
            overrides: self.overrides.unwrap_or_default(),
        };
        if let Some(mixed) = mixed_precision_of(model)? {
            options.add_mixed_precision(&mixed)?;
        }
        Ok(options)
    }
}

/// What `SelectiveMixedPrecision` chose for the model, if it ran.
///
/// # Errors
/// [`Error::Io`], [`Error::Json`] or [`Error::Config`] if `model_config.json` cannot be read.
pub fn mixed_precision_of(model: &dyn ModelHandle) -> Result<Option<MixedPrecision>> {
    let Some(folder) = model.path().parent() else {
        return Ok(None);
    };
    let Some(config) = ModelConfigFile::read(folder)? else {
        return Ok(None);
    };
    if config.path(folder, "model_path").as_deref() != Some(model.path()) {
        return Ok(None);
    }
    let attributes = config.config.get("model_attributes").and_then(|own| own.get(MIXED_PRECISION));
    let Some(info) = attributes.filter(|info| !info.is_null()) else {
        return Ok(None);
    };
    let read = MixedPrecision::deserialize(info);
    read.map(Some).map_err(|e| {
        let origin = format!("`{}`", folder.join(MODEL_CONFIG_FILE).display());
        Error::config(origin, MIXED_PRECISION, "`default` and `overrides`", e.to_string())
    })
}

fn run_pass(
    model: &dyn ModelHandle,
    calibration: &CalibrationSet,
    options: &UniformOptions,
    context: &PassContext<'_>,
) -> Result<Arc<dyn ModelHandle>> {
    quantize_uniform(model, calibration, options, context.output, context.progress, context.cancel)?;
    Ok(Arc::new(HfModel::open(context.output)?))
}

const HF_TO_HF: (ModelKind, ModelKind) = (ModelKind::HuggingFace, ModelKind::HuggingFace);

/// Olive's `Rtn`.
#[derive(Debug, Clone, Copy, Default)]
pub struct OliveRtn;

impl Pass for OliveRtn {
    fn name(&self) -> &'static str {
        "Rtn"
    }

    fn params(&self) -> &'static [ParamSpec] {
        RTN_PARAMS
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        HF_TO_HF
    }

    fn check(&self, model: &dyn ModelHandle, config: &PassConfig) -> Result<()> {
        check_model(model, &Parameters::read(config, self.name())?.options(Rounding::Nearest, model)?)
    }

    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        let options = Parameters::read(config, self.name())?.options(Rounding::Nearest, model)?;
        run_pass(model, &CalibrationSet::default(), &options, context)
    }
}

/// Olive's `KQuant`.
#[derive(Debug, Clone, Copy, Default)]
pub struct KQuant;

impl Pass for KQuant {
    fn name(&self) -> &'static str {
        "KQuant"
    }

    fn params(&self) -> &'static [ParamSpec] {
        KQUANT_PARAMS
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        HF_TO_HF
    }

    fn check(&self, model: &dyn ModelHandle, config: &PassConfig) -> Result<()> {
        check_model(model, &Parameters::read(config, self.name())?.options(Rounding::KQuant, model)?)
    }

    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        let options = Parameters::read(config, self.name())?.options(Rounding::KQuant, model)?;
        run_pass(model, &CalibrationSet::default(), &options, context)
    }
}

/// Olive's `Gptq`.
#[derive(Clone)]
pub struct Gptq {
    calibration: CalibrationProvider,
}

impl Gptq {
    /// The pass, with what turns its `data_config` into tokens.
    pub fn new(calibration: CalibrationProvider) -> Self {
        Self { calibration }
    }

    fn options(model: &dyn ModelHandle, config: &PassConfig) -> Result<UniformOptions> {
        let own = Parameters::read(config, "Gptq")?;
        let rounding = Rounding::Gptq {
            damp_percent: own.damp_percent,
            desc_act: own.desc_act,
        };
        own.options(rounding, model)
    }
}

impl Pass for Gptq {
    fn name(&self) -> &'static str {
        "Gptq"
    }

    fn params(&self) -> &'static [ParamSpec] {
        GPTQ_PARAMS
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        HF_TO_HF
    }

    fn check(&self, model: &dyn ModelHandle, config: &PassConfig) -> Result<()> {
        check_model(model, &Self::options(model, config)?)
    }

    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        let options = Self::options(model, config)?;
        let data = config.values().get("data_config").filter(|value| !value.is_null());
        run_pass(model, &(self.calibration)(model, data)?, &options, context)
    }
}

/// Olive's `SelectiveMixedPrecision`: the same model, with the settings of its modules in `model_config.json`, which
/// `Gptq`, `KQuant` and `Rtn` follow.
#[derive(Debug, Clone, Copy, Default)]
pub struct SelectiveMixedPrecision;

#[derive(Debug, Deserialize)]
struct MixedParameters {
    algorithm: String,
    bits: usize,
    group_size: i64,
    sym: bool,
    high_bits: usize,
    high_group_size: Option<i64>,
    high_sym: Option<bool>,
    ratio: Option<f64>,
}

fn mixed_parameters(config: &PassConfig) -> Result<(Choice, Precisions)> {
    let origin = "pass `SelectiveMixedPrecision`";
    let own: MixedParameters = config.parse(origin)?;
    let choice = Choice::deserialize(Value::String(own.algorithm.clone())).map_err(|_| {
        Error::config(origin, "algorithm", "a rule or score other than kld_gradient", own.algorithm.clone())
    })?;
    let ratio = match own.ratio {
        Some(ratio) if (0.0..=1.0).contains(&ratio) => ratio,
        None if !choice.is_scored() => 1.0,
        found => {
            let found = found.map_or_else(|| "nothing".to_owned(), |ratio| ratio.to_string());
            return Err(Error::config(origin, "ratio", "0 to 1", found));
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
        MIXED_PARAMS
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        HF_TO_HF
    }

    fn check(&self, model: &dyn ModelHandle, config: &PassConfig) -> Result<()> {
        let (choice, precisions) = mixed_parameters(config)?;
        let spec = model.spec();
        let what = || format!("model `{}`", model.path().display());
        if model.kind() != ModelKind::HuggingFace || spec.quantization.is_some() {
            return Err(Error::unsupported(what(), "modules are chosen in a dense Hugging Face checkpoint"));
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
        let (choice, precisions) = mixed_parameters(config)?;
        context.cancel.check()?;
        let chosen = mixed_precision::choose(model.tensors(), model.spec(), choice, &precisions)?;
        let folder = context.output.join(MODEL_FOLDER);
        fsio::create_dir(&folder)?;
        let mut files = model::companion_files(model.path())?;
        files.extend(HfModel::open(model.path())?.weight_files());
        for file in files {
            let target = folder.join(file.file_name().unwrap_or_default());
            fsio::link_or_copy(&file, &target)?;
        }
        let mut written = model_config(Some(json!({ MIXED_PRECISION: chosen })));
        if let Some(adapter) = model.adapter() {
            let name = "adapter";
            let target = context.output.join(name);
            fsio::create_dir(&target)?;
            for file in ["adapter_config.json", "adapter_model.safetensors"] {
                fsio::link_or_copy(&adapter.join(file), &target.join(file))?;
            }
            written.config.insert("adapter_path".to_owned(), name.into());
        }
        written.write(context.output)?;
        Ok(Arc::new(HfModel::open(context.output)?))
    }
}
