//! `ModelBuilder`: from a checkpoint to a model folder, with Olive's parameters. Those that ask for what the CPU graph
//! does not have are refused by name.

use std::sync::Arc;

use olive_core::{
    Error, ModelHandle, ModelKind, ParamKind, ParamSpec, Pass, PassConfig, PassContext, Result,
};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::build::{BuilderOptions, Precision};
use crate::model::OnnxModel;
use crate::package::{build_model_folder, plan_model_folder};

/// Name of the folder with the graph inside a pass's output.
pub const MODEL_FOLDER: &str = "model";
const NAME: &str = "ModelBuilder";

/// The pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct ModelBuilder;

const fn param(name: &'static str, kind: ParamKind, default: &'static str, doc: &'static str) -> ParamSpec {
    ParamSpec {
        name,
        kind,
        default: Some(default),
        doc,
        search: &[],
    }
}

const fn searched(spec: ParamSpec, search: &'static [&'static str]) -> ParamSpec {
    ParamSpec { search, ..spec }
}

const PARAMS: &[ParamSpec] = &[
    param(
        "precision",
        ParamKind::OneOf(&["fp32", "int4"]),
        "\"fp32\"",
        "Precision of the linears.",
    ),
    param(
        "metadata_only",
        ParamKind::Bool,
        "false",
        "Write the runtime's config without a graph; refused if true.",
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
            "Whether every zero point is 8.",
        ),
        &["true", "false"],
    ),
    param(
        "int4_op_types_to_quantize",
        ParamKind::TextList,
        "null",
        "Operators to quantize; `MatMul` is the only one.",
    ),
    param(
        "int4_nodes_to_exclude",
        ParamKind::TextList,
        "null",
        "Nodes to keep in float; refused if any.",
    ),
    param(
        "int4_algo_config",
        ParamKind::OneOf(&["default"]),
        "null",
        "How blocks are rounded.",
    ),
    param(
        "use_qdq",
        ParamKind::Bool,
        "null",
        "Quantize and dequantize nodes; refused if true.",
    ),
    param(
        "use_8bits_moe",
        ParamKind::Bool,
        "null",
        "8-bit experts; refused if true.",
    ),
    param(
        "use_webgpu_fp32",
        ParamKind::Bool,
        "null",
        "For WebGPU; refused if true.",
    ),
    param(
        "use_cuda_bf16",
        ParamKind::Bool,
        "null",
        "For CUDA; refused if true.",
    ),
    param(
        "include_hidden_states",
        ParamKind::Bool,
        "null",
        "Hidden states as an output; refused if true.",
    ),
    param(
        "exclude_embeds",
        ParamKind::Bool,
        "null",
        "A graph without embedding; refused if true.",
    ),
    param(
        "exclude_lm_head",
        ParamKind::Bool,
        "null",
        "A graph without head; refused if true.",
    ),
    param(
        "enable_cuda_graph",
        ParamKind::Bool,
        "null",
        "For CUDA; refused if true.",
    ),
    param(
        "extra_options",
        ParamKind::Object,
        "null",
        "Further options by name; refused if any.",
    ),
];

#[derive(Deserialize)]
struct Values {
    precision: String,
    search: Option<Map<String, Value>>,
    int4_accuracy_level: Option<i64>,
    int4_block_size: Option<usize>,
    int4_is_symmetric: Option<bool>,
    int4_op_types_to_quantize: Option<Vec<String>>,
}

/// Parameters that are refused unless they are off.
const REFUSED: &[&str] = &[
    "metadata_only",
    "int4_nodes_to_exclude",
    "use_qdq",
    "use_8bits_moe",
    "use_webgpu_fp32",
    "use_cuda_bf16",
    "include_hidden_states",
    "exclude_embeds",
    "exclude_lm_head",
    "enable_cuda_graph",
    "extra_options",
];

fn options(config: &PassConfig) -> Result<BuilderOptions> {
    let origin = format!("pass `{NAME}`");
    for key in REFUSED {
        let value = config.values().get(*key).unwrap_or(&Value::Null);
        let off = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        if !off {
            let expected = "nothing; olive's builder makes whole graphs for the CPU";
            return Err(Error::config(origin, *key, expected, value.to_string()));
        }
    }
    let values: Values = config.parse(&origin)?;
    if let Some(types) = values
        .int4_op_types_to_quantize
        .filter(|types| types.iter().any(|kind| kind != "MatMul"))
    {
        let found = types.join(", ");
        return Err(Error::config(
            origin,
            "int4_op_types_to_quantize",
            "`MatMul` only",
            found,
        ));
    }
    let defaults = BuilderOptions::default();
    let options = BuilderOptions {
        precision: match values.precision.as_str() {
            "int4" => Precision::Int4,
            _ => Precision::Fp32,
        },
        block_size: values.int4_block_size.unwrap_or(defaults.block_size),
        is_symmetric: values.int4_is_symmetric.unwrap_or(defaults.is_symmetric),
        accuracy_level: values.int4_accuracy_level,
        search: values.search.unwrap_or_default(),
    };
    options.check()?;
    Ok(options)
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
            "int4_accuracy_level": 1, "use_qdq": false, "int4_op_types_to_quantize": ["MatMul"]});
        let options = parse(given).unwrap();
        assert_eq!((options.precision, options.block_size), (Precision::Int4, 128));
        assert_eq!((options.is_symmetric, options.accuracy_level), (false, Some(1)));
        assert_eq!(
            BuilderOptions::with_precision(Precision::Int4).effective_accuracy_level(),
            4
        );
    }

    #[test]
    fn what_the_builder_does_not_do_is_refused_by_name() {
        for (key, value) in [
            ("precision", json!("int8")),
            ("metadata_only", json!(true)),
            ("int4_block_size", json!(48)),
            ("int4_algo_config", json!("k_quant_last")),
            ("int4_nodes_to_exclude", json!(["/lm_head/MatMul"])),
            ("int4_op_types_to_quantize", json!(["MatMul", "Gather"])),
            ("use_qdq", json!(true)),
            ("extra_options", json!({"fuse_qkv": false})),
        ] {
            let error = parse(json!({key: value})).unwrap_err();
            assert!(error.to_string().contains(&format!("`{key}`")), "{error}");
            assert!(error.is_usage());
        }
    }
}
