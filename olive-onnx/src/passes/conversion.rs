//! `OnnxConversion`: the export of a checkpoint, by the builder. Olive traces the model in PyTorch; the architectures that
//! olive knows are built, which gives the same model with a key/value cache, ready for the runtime.

use std::sync::Arc;

use olive_core::{
    Error, ModelHandle, ModelKind, ParamKind, ParamSpec, Pass, PassConfig, PassContext, Result,
};
use serde_json::Value;

use super::model_builder::MODEL_FOLDER;
use super::params::{param, with_external_data};
use crate::build::{BuilderOptions, Precision};
use crate::model::OnnxModel;
use crate::package::{build_model_folder, plan_model_folder};

const NAME: &str = "OnnxConversion";
const ORIGIN: &str = "pass `OnnxConversion`";

/// The opset of ONNX's own operators in built graphs.
const OPSET: i64 = 22;

/// The pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct OnnxConversion;

const PARAMS: [ParamSpec; 17] = with_external_data([
    param(
        "user_script",
        ParamKind::Text,
        "null",
        "A Python script; refused, none is run.",
    ),
    param(
        "script_dir",
        ParamKind::Text,
        "null",
        "Its folder; refused, none is run.",
    ),
    param(
        "target_opset",
        ParamKind::Int,
        "20",
        "The opset to target; graphs are built for 22, and a later one is refused.",
    ),
    param(
        "use_dynamo_exporter",
        ParamKind::Bool,
        "false",
        "Without effect: the graph is built, not traced.",
    ),
    param(
        "past_key_value_name",
        ParamKind::Text,
        "\"past_key_values\"",
        "Prefix of the cache's inputs; only the default.",
    ),
    param(
        "device",
        ParamKind::Text,
        "null",
        "Without effect: the graph is built, not traced.",
    ),
    param(
        "torch_dtype",
        ParamKind::OneOf(&["float32", "float16", "bfloat16", "fp32", "fp16", "bf16", "auto"]),
        "null",
        "Type of the graph's floats; float32 holds those of every checkpoint exactly.",
    ),
    param(
        "parallel_jobs",
        ParamKind::Int,
        "null",
        "Without effect: work is spread over all cores.",
    ),
    param(
        "merge_adapter_weights",
        ParamKind::Bool,
        "false",
        "Merge an adapter first; refused for a model with one, MergeAdapterWeights does it.",
    ),
    param(
        "save_metadata_for_token_generation",
        ParamKind::Bool,
        "false",
        "Without effect: config and tokenizer always go along.",
    ),
    param(
        "optimize",
        ParamKind::Bool,
        "true",
        "Without effect: built graphs have nothing to fold.",
    ),
    param(
        "dynamic",
        ParamKind::Bool,
        "true",
        "Symbolic sizes; false is refused, DynamicToFixedShape fixes them.",
    ),
]);

fn options(model: &dyn ModelHandle, config: &PassConfig) -> Result<BuilderOptions> {
    let value = |key: &str| config.values().get(key).unwrap_or(&Value::Null);
    let refuse =
        |key: &str, expected: &str| Err(Error::config(ORIGIN, key, expected, value(key).to_string()));
    for key in ["user_script", "script_dir"] {
        if !value(key).is_null() {
            return refuse(key, "nothing; olive runs no Python");
        }
    }
    if value("target_opset")
        .as_i64()
        .is_none_or(|opset| !(1..=OPSET).contains(&opset))
    {
        return refuse("target_opset", "at most 22, which graphs are built for");
    }
    if value("past_key_value_name") != "past_key_values" {
        return refuse("past_key_value_name", "`past_key_values`");
    }
    if value("merge_adapter_weights") == &Value::Bool(true) && model.adapter().is_some() {
        return refuse(
            "merge_adapter_weights",
            "false; the pass MergeAdapterWeights merges",
        );
    }
    if value("dynamic") == &Value::Bool(false) {
        return refuse("dynamic", "true; the pass DynamicToFixedShape fixes sizes");
    }
    Ok(BuilderOptions::with_precision(
        match value("torch_dtype").as_str() {
            Some("float16" | "fp16") => Precision::Fp16,
            Some("bfloat16" | "bf16") => Precision::Bf16,
            _ => Precision::Fp32,
        },
    ))
}

impl Pass for OnnxConversion {
    fn name(&self) -> &'static str {
        NAME
    }

    fn params(&self) -> &'static [ParamSpec] {
        &PARAMS
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        (ModelKind::HuggingFace, ModelKind::Onnx)
    }

    fn check(&self, model: &dyn ModelHandle, config: &PassConfig) -> Result<()> {
        plan_model_folder(model, model.adapter(), &options(model, config)?).map(|_| ())
    }

    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        let output = context.output.join(MODEL_FOLDER);
        let options = options(model, config)?;
        let adapter = model.adapter();
        build_model_folder(
            model,
            adapter,
            &options,
            &output,
            context.progress,
            context.cancel,
        )?;
        Ok(Arc::new(OnnxModel::open(&output)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use olive_core::HfModel;
    use serde_json::json;
    use std::path::Path;

    fn parse(given: Value) -> Result<BuilderOptions> {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tiny-phi3");
        let given = given.as_object().cloned().unwrap();
        options(
            &HfModel::open(fixture)?,
            &PassConfig::new(ORIGIN, &PARAMS, &given)?,
        )
    }

    #[test]
    fn the_type_becomes_a_precision_and_what_needs_python_is_refused_by_name() {
        let precision = |given| parse(given).unwrap().precision;
        assert_eq!(precision(json!({})), Precision::Fp32);
        assert_eq!(
            precision(json!({"torch_dtype": "float16", "target_opset": 17})),
            Precision::Fp16
        );
        assert_eq!(
            precision(json!({"torch_dtype": "bfloat16", "device": "cpu"})),
            Precision::Bf16
        );
        for (key, value) in [
            ("user_script", json!("script.py")),
            ("target_opset", json!(28)),
            ("dynamic", json!(false)),
            ("past_key_value_name", json!("past")),
            ("torch_dtype", json!("int8")),
        ] {
            let error = parse(json!({key: value})).unwrap_err().to_string();
            assert!(error.contains(&format!("`{key}`")), "{error}");
        }
    }
}
