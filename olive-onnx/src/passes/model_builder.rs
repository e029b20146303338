//! `ModelBuilder`: from a checkpoint to a model folder, with Olive's parameters and the extra options of
//! onnxruntime-genai's builder.

use std::sync::Arc;

use olive_core::{
    Error, ModelHandle, ModelKind, ParamKind, ParamSpec, Pass, PassConfig, PassContext, Result,
};
use serde_json::Value;

use super::params::{param, searched};
use crate::build::{BuilderOptions, Precision, Provider};
use crate::model::OnnxModel;
use crate::package::{build_model_folder, plan_model_folder};

/// Name of the folder with the graph inside a pass's output.
pub const MODEL_FOLDER: &str = "model";
const NAME: &str = "ModelBuilder";

/// The pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct ModelBuilder;

const PARAMS: &[ParamSpec] = &[
    param(
        "precision",
        ParamKind::OneOf(&Precision::NAMES),
        "\"fp32\"",
        "Precision of the linears and of the values between them.",
    ),
    param(
        "execution_provider",
        ParamKind::Text,
        "\"cpu\"",
        "What the graph is for: cpu, cuda, dml or webgpu, or ONNX Runtime's name of one. A workflow sets its own target.",
    ),
    param(
        "metadata_only",
        ParamKind::Bool,
        "false",
        "Write the runtime's config and the tokenizer without a graph.",
    ),
    param(
        "search",
        ParamKind::Object,
        "null",
        "Values for the `search` part of the runtime's config.",
    ),
    param(
        "int4_accuracy_level",
        ParamKind::OneOfInt(&[0, 1, 2, 3, 4]),
        "null",
        "What MatMulNBits may compute in; 4 allows int8 activations.",
    ),
    searched(
        param(
            "int4_block_size",
            ParamKind::OneOfInt(&[16, 32, 64, 128, 256]),
            "null",
            "Inputs that share a scale.",
        ),
        &["32", "64", "128"],
    ),
    searched(
        param(
            "int4_is_symmetric",
            ParamKind::Bool,
            "null",
            "Whether every zero point is the middle.",
        ),
        &["true", "false"],
    ),
    param(
        "int4_op_types_to_quantize",
        ParamKind::TextList,
        "null",
        "Operators to quantize: MatMul, Gather.",
    ),
    param(
        "int4_nodes_to_exclude",
        ParamKind::TextList,
        "null",
        "Nodes to keep in float, by name.",
    ),
    param(
        "int4_algo_config",
        ParamKind::OneOf(&[
            "default",
            "rtn",
            "rtn_last",
            "k_quant",
            "k_quant_last",
            "k_quant_mixed",
            "k_quant_linear",
        ]),
        "null",
        "How blocks are rounded, and which linears get 8 bits.",
    ),
    param(
        "use_qdq",
        ParamKind::Bool,
        "null",
        "DequantizeLinear and MatMul in place of MatMulNBits.",
    ),
    param(
        "use_8bits_moe",
        ParamKind::Bool,
        "null",
        "8-bit experts; without effect, no model here has experts.",
    ),
    param(
        "use_webgpu_fp32",
        ParamKind::Bool,
        "null",
        "Floats of 32 bits on WebGPU.",
    ),
    param(
        "use_cuda_bf16",
        ParamKind::Bool,
        "null",
        "bf16 in a quantized graph for CUDA.",
    ),
    param(
        "include_hidden_states",
        ParamKind::Bool,
        "null",
        "Hidden states as an output beside the logits.",
    ),
    param(
        "exclude_embeds",
        ParamKind::Bool,
        "null",
        "A graph without embedding, which takes inputs_embeds.",
    ),
    param(
        "exclude_lm_head",
        ParamKind::Bool,
        "null",
        "A graph without head, which gives hidden_states.",
    ),
    param(
        "enable_cuda_graph",
        ParamKind::Bool,
        "null",
        "Let the runtime capture CUDA graphs.",
    ),
    param(
        "extra_options",
        ParamKind::Object,
        "null",
        "Further options of onnxruntime-genai's builder, by name.",
    ),
];

/// The options that parameters ask for.
pub(super) fn options(config: &PassConfig) -> Result<BuilderOptions> {
    let origin = format!("pass `{NAME}`");
    let mut options = BuilderOptions::default();
    let values = config.values();
    let own = [
        "precision",
        "execution_provider",
        "metadata_only",
        "search",
        "extra_options",
    ];
    for (key, value) in values.iter().filter(|(key, _)| !own.contains(&key.as_str())) {
        options.set(key, value)?;
    }
    match values.get("extra_options").unwrap_or(&Value::Null) {
        Value::Null => {}
        Value::Object(extra) => {
            for (key, value) in extra {
                options.set(key, value)?;
            }
        }
        other => {
            let expected = "an object";
            return Err(Error::config(
                origin,
                "extra_options",
                expected,
                other.to_string(),
            ));
        }
    }
    let text = |key: &str| values.get(key).and_then(Value::as_str).unwrap_or_default();
    if let Some(precision) = Precision::from_name(text("precision")) {
        options.precision = precision;
    }
    options.provider = provider(text("execution_provider"))?;
    options.config_only |= values.get("metadata_only") == Some(&Value::Bool(true));
    match values.get("search").unwrap_or(&Value::Null) {
        Value::Null => {}
        Value::Object(search) => options.search = search.clone(),
        other => return Err(Error::config(origin, "search", "an object", other.to_string())),
    }
    options.check()?;
    Ok(options)
}

/// The provider of this name. One of ONNX Runtime's that has no graphs of its own gets those for the CPU.
fn provider(name: &str) -> Result<Provider> {
    if let Some(provider) = Provider::from_name(name) {
        return Ok(provider);
    }
    if name.to_ascii_lowercase().ends_with("executionprovider") {
        tracing::warn!("{name} has no graph of its own; it gets the graph for the CPU");
        return Ok(Provider::Cpu);
    }
    let expected = "cpu, cuda, dml, webgpu, or ONNX Runtime's name of a provider";
    let origin = format!("pass `{NAME}`");
    Err(Error::config(
        origin,
        "execution_provider",
        expected,
        format!("`{name}`"),
    ))
}

impl Pass for ModelBuilder {
    fn name(&self) -> &'static str {
        NAME
    }

    fn params(&self) -> &'static [ParamSpec] {
        PARAMS
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        (ModelKind::HuggingFace, ModelKind::Onnx)
    }

    fn version(&self) -> u32 {
        2
    }

    fn check(&self, model: &dyn ModelHandle, config: &PassConfig) -> Result<()> {
        plan_model_folder(model, model.adapter(), &options(config)?).map(|_| ())
    }

    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        let output = context.output.join(MODEL_FOLDER);
        let options = options(config)?;
        build_model_folder(
            model,
            model.adapter(),
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
    use serde_json::json;

    fn parse(given: Value) -> Result<BuilderOptions> {
        let given = given.as_object().cloned().unwrap();
        options(&PassConfig::new("pass `ModelBuilder`", PARAMS, &given)?)
    }

    #[test]
    fn olives_parameters_become_options() {
        assert_eq!(parse(json!({})).unwrap(), BuilderOptions::default());
        let given = json!({"precision": "INT4", "int4_block_size": 128, "int4_is_symmetric": false,
            "int4_accuracy_level": 1, "use_qdq": false, "int4_op_types_to_quantize": ["MatMul"],
            "execution_provider": "CUDAExecutionProvider", "metadata_only": true,
            "int4_nodes_to_exclude": ["/lm_head/MatMul"], "extra_options": {"prune_lm_head": "1"}});
        let options = parse(given).unwrap();
        assert_eq!((options.precision, options.block_size), (Precision::Int4, 128));
        assert_eq!((options.is_symmetric, options.accuracy_level), (false, Some(1)));
        assert_eq!((options.provider, options.config_only), (Provider::Cuda, true));
        assert!(options.prune_lm_head && options.nodes_to_exclude.contains("/lm_head/MatMul"));
        let other = parse(json!({"execution_provider": "QNNExecutionProvider"})).unwrap();
        assert_eq!(other.provider, Provider::Cpu);
    }

    #[test]
    fn what_the_builder_does_not_do_is_refused_by_name() {
        for (key, value) in [
            ("precision", json!("int3")),
            ("int4_block_size", json!(48)),
            ("int4_algo_config", json!("hqq")),
            ("int4_op_types_to_quantize", json!(["MatMul", "Gemm"])),
            ("execution_provider", json!("tpu")),
            ("extra_options", json!(["fuse_qkv"])),
            ("search", json!([])),
        ] {
            let error = parse(json!({key: value})).unwrap_err();
            assert!(error.to_string().contains(&format!("`{key}`")), "{error}");
            assert!(error.is_usage());
        }
        let error = parse(json!({"extra_options": {"fuse_qvk": true}})).unwrap_err();
        assert!(error.to_string().contains("fuse_qkv"), "{error}");
    }
}
