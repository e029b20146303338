//! QLoRA: adapters trained over a base that is rounded to 4-bit floats first (<https://arxiv.org/abs/2305.14314>).

use std::path::Path;

use burn::tensor::backend::Backend;
use olive_core::packed::nf4::{self, Nf4Options};
use olive_core::{DType, Error, HfModel, LinearWeight, ModelHandle, ModelKind, PassContext, Result, fsio};
use serde_json::{Value, json};

use crate::arguments::TrainingArguments;
use crate::checkpoint::remove;
use crate::finetune::{TrainReport, check_model, finetune_over};
use crate::matching::Targets;
use crate::options::LoraOptions;
use crate::output::{self, Replacement};
use crate::trainer::TrainingData;

/// Where the rounded base is while it is trained over; the result links its files.
const BASE_FOLDER: &str = ".base";

/// How the base is rounded, and what the result names as its model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QloraOptions {
    /// The rounding; blocks of 64 as bitsandbytes has them.
    pub rounding: Nf4Options,
    /// The type that bitsandbytes computes in when it loads the result.
    pub compute_dtype: DType,
    /// Whether the result's model is the rounded base, or else the one that was given.
    pub keep_rounded: bool,
}

/// Writes `model` with every linear of its decoder layers in bitsandbytes' 4-bit layout, as transformers stores it;
/// embeddings, norms and head stay as they are. `folder` is replaced.
///
/// # Errors
/// [`Error::Unsupported`] if the model is no dense Hugging Face checkpoint; [`Error::NotFinite`] or [`Error::Tensor`]
/// naming a weight; [`Error::Cancelled`]; errors of reading and writing.
pub fn quantize_base(
    model: &dyn ModelHandle,
    options: QloraOptions,
    folder: &Path,
    context: &PassContext<'_>,
) -> Result<()> {
    let (spec, source) = (model.spec(), model.tensors());
    check_dense(model)?;
    let linears: Vec<_> = (0..spec.n_layers).flat_map(|layer| spec.linears(layer)).collect();
    let replacements: Vec<Replacement> = linears
        .iter()
        .map(|linear| Replacement {
            old: vec![format!("{}.weight", linear.name)],
            new: nf4::plan(
                &linear.name,
                [linear.out_features, linear.in_features],
                options.rounding,
            ),
        })
        .collect();
    let produce = |index: usize| {
        let linear = &linears[index];
        let shape = [linear.out_features, linear.in_features];
        let dtype = source.require(&format!("{}.weight", linear.name))?.dtype;
        let weight = LinearWeight::read(source, spec, linear)?.weight.into_dense();
        let matrix = nf4::quantize(&linear.name, &weight, shape, options.rounding, dtype)?;
        nf4::store(&linear.name, &matrix)
    };
    let stage = ("rounding the base to 4 bits", context);
    output::write_model(model, &replacements, folder, stage, produce, |config| {
        config.insert("quantization_config".to_owned(), quantization_config(options));
    })
}

/// Refuses a model whose weights are packed already.
pub(crate) fn check_dense(model: &dyn ModelHandle) -> Result<()> {
    let what = || format!("QLoRA on `{}`", model.path().display());
    if model.kind() != ModelKind::HuggingFace {
        return Err(Error::unsupported(what(), "it is an ONNX model"));
    }
    match &model.spec().quantization {
        None => Ok(()),
        Some(quantization) => {
            let reason = format!(
                "its weights are in the layout of {} already; LoRA trains over them",
                quantization.quant_method
            );
            Err(Error::unsupported(what(), reason))
        }
    }
}

/// What transformers writes for its `BitsAndBytesConfig`.
fn quantization_config(options: QloraOptions) -> Value {
    json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": options.compute_dtype.to_string(),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": options.rounding.quant_type.name(),
        "bnb_4bit_use_double_quant": options.rounding.double_quant,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": null,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    })
}

/// The options with QLoRA's default targets: every linear of the decoder layers.
pub fn with_all_linears(options: &LoraOptions) -> LoraOptions {
    let targets = options.target_modules.clone();
    LoraOptions {
        target_modules: Some(targets.unwrap_or_else(|| Targets::from_text("all-linear"))),
        ..options.clone()
    }
}

/// Rounds the base and trains a LoRA adapter over it; the files are those of [`crate::finetune`], with the rounded
/// checkpoint as `model/` if the options keep it.
///
/// # Errors
/// Those of [`quantize_base`] and of [`crate::finetune`].
pub fn finetune_qlora<B: Backend>(
    model: &dyn ModelHandle,
    data: TrainingData<'_>,
    lora: &LoraOptions,
    qlora: QloraOptions,
    arguments: &TrainingArguments,
    context: &PassContext<'_>,
) -> Result<TrainReport> {
    check_model(model)?;
    check_dense(model)?;
    fsio::create_dir(context.output)?;
    let mut lora = with_all_linears(lora);
    lora.adapted_linears(model.spec())?;
    if lora.base_model_name.is_none() {
        let name = model.path().file_name().unwrap_or_default().to_string_lossy();
        lora.base_model_name = Some(name.into_owned());
    }
    let folder = context.output.join(BASE_FOLDER);
    quantize_base(model, qlora, &folder, context)?;
    let base = HfModel::open(&folder)?;
    let shown = if qlora.keep_rounded { &folder } else { model.path() };
    let report = finetune_over::<B>(&base, shown, data, &lora, arguments, context);
    drop(base);
    remove(&folder)?;
    report
}
