//! `olive auto-opt` and `olive capture-onnx-graph`.

use olive_core::{Error, Result};
use serde_json::{Value, json};

use super::{Context, notes};
use crate::args::{AutoOptArgs, CaptureArgs, Device, Precision};
use crate::pipeline::{Pipeline, builder_options, fixed_shape, pairs};
use crate::workflow::input_model;

/// How weights that are not packed yet are stored.
pub(super) enum Stored {
    /// As the builder does it: its name of the precision, and whether blocks have no zero point.
    Built(&'static str, Option<bool>),
    /// By another pass, after the graph was built.
    Later,
}

/// What a precision of the command line means for the builder.
///
/// # Errors
/// [`Error::Config`] for one that no pass makes.
pub(super) fn stored(precision: Option<Precision>) -> Result<Stored> {
    Ok(match precision {
        None | Some(Precision::Fp32) => Stored::Built("fp32", None),
        Some(Precision::Fp16) => Stored::Built("fp16", None),
        Some(Precision::Bf16) => Stored::Built("bf16", None),
        Some(Precision::Int4) => Stored::Built("int4", None),
        Some(Precision::Uint4) => Stored::Built("int4", Some(false)),
        Some(Precision::Int8) => Stored::Built("int8", None),
        Some(Precision::Uint8) => Stored::Built("int8", Some(false)),
        Some(Precision::Nf4 | Precision::Fp4) => Stored::Later,
        Some(other) => {
            let found = format!("`{}`", other.name());
            let expected = "fp32, fp16, bf16, int8, uint8, int4 or uint4";
            return Err(Error::config("command line", "--precision", expected, found));
        }
    })
}

/// Runs `auto-opt`.
///
/// # Errors
/// Those of planning and running the passes.
pub fn auto_opt(args: &AutoOptArgs, context: &Context<'_>) -> Result<()> {
    notes::refuse_scripts(&args.model)?;
    notes::warn_no_effect(&[
        (
            "--use_dynamo_exporter",
            args.use_dynamo_exporter,
            "the graph is built, not traced",
        ),
        (
            "--seed",
            args.seed.is_some() && args.enable_search.is_none(),
            "nothing is random",
        ),
    ]);
    notes::warn_old(&args.no_effect);
    let model = input_model(&args.model)?;
    let onnx = model["type"] == "ONNXModel";
    let mut pipeline = Pipeline::new(model).target(args.accelerator.system());
    let splits = args.num_splits.is_some() || args.cost_model.is_some();
    if splits {
        let capture = json!({"num_splits": args.num_splits, "cost_model": args.cost_model});
        pipeline.pass("capture_split_info", "CaptureSplitInfo", capture);
    }
    match (onnx, stored(args.precision)?) {
        (true, stored) => onnx_precision(&mut pipeline, args.precision, &stored),
        (false, Stored::Built(precision, symmetric)) => {
            let mut parameters = json!({"precision": precision, "int4_is_symmetric": symmetric});
            if args.enable_search.is_some() {
                // What the builder has a choice of.
                parameters["int4_block_size"] = json!([32, 64, 128]);
                parameters["int4_algo_config"] = json!(["default", "k_quant"]);
            }
            pipeline.pass("builder", "ModelBuilder", parameters);
        }
        (false, Stored::Later) => {
            pipeline.pass("builder", "ModelBuilder", json!({"precision": "fp32"}));
            let precision = args.precision.map(Precision::name);
            pipeline.pass("bnb4", "OnnxBnb4Quantization", json!({"precision": precision}));
        }
    }
    if !args.fixed_dim_param.is_empty() || !args.fixed_dim_value.is_empty() {
        let flag = "--dynamic-to-fixed-shape-dim-value";
        let shape = fixed_shape(flag, &args.fixed_dim_param, &args.fixed_dim_value)?;
        pipeline.pass("to_fixed_shape", "DynamicToFixedShape", shape);
    }
    if let Some(overrides) = args.mixed_precision_overrides.first() {
        let parameters = json!({"overrides_config": overrides});
        pipeline.pass("mixed_precision_overrides", "MixedPrecisionOverrides", parameters);
    }
    if args.use_qdq_encoding {
        pipeline.pass("mnb_to_qdq", "MatMulNBitsToQDQ", json!({}));
    }
    if splits {
        pipeline.pass("split_model", "SplitModel", json!({}));
    }
    if let Some(sampler) = &args.enable_search {
        search(args, sampler, &mut pipeline)?;
    } else {
        warn_about_data(args);
    }
    let memory = args.accelerator.memory;
    pipeline.run(&args.output_path, memory, (&args.config, &args.common), context)
}

/// The passes that give an ONNX model a precision.
fn onnx_precision(pipeline: &mut Pipeline, precision: Option<Precision>, stored: &Stored) {
    pipeline.pass("peephole_optimizer", "OnnxPeepholeOptimizer", json!({}));
    match stored {
        Stored::Built("fp32", _) => {}
        Stored::Built("fp16", _) => pipeline.pass("float16", "OnnxFloatToFloat16", json!({})),
        Stored::Built("int4", symmetric) => {
            let parameters = json!({"is_symmetric": symmetric});
            pipeline.pass("matmul4", "OnnxBlockWiseRtnQuantization", parameters);
        }
        Stored::Built("int8", symmetric) => {
            let precision = if *symmetric == Some(false) {
                "uint8"
            } else {
                "int8"
            };
            pipeline.pass(
                "dynamic_quant",
                "OnnxDynamicQuantization",
                json!({"precision": precision}),
            );
        }
        Stored::Built(..) => {
            let parameters = json!({"name_pattern": ".*", "source_dtype": 1, "target_dtype": 16});
            pipeline.pass("bfloat16", "OnnxIODataTypeConverter", parameters);
        }
        Stored::Later => {
            let precision = precision.map(Precision::name);
            pipeline.pass("bnb4", "OnnxBnb4Quantization", json!({"precision": precision}));
        }
    }
}

fn warn_about_data(args: &AutoOptArgs) {
    const NO_DATA: &str = "data is used by `--enable_search`";
    notes::warn_no_effect(&[
        ("--data_name", args.data_name.is_some(), NO_DATA),
        ("--split", args.split.is_some(), NO_DATA),
        ("--subset", args.subset.is_some(), NO_DATA),
        ("--input_cols", !args.input_cols.is_empty(), NO_DATA),
    ]);
}

/// A search for the smallest model that foresees the data best.
fn search(args: &AutoOptArgs, sampler: &str, pipeline: &mut Pipeline) -> Result<()> {
    let Some(data) = &args.data_name else {
        let expected = "a data file, for `--enable_search`: perplexity is measured on it";
        return Err(Error::config("command line", "--data_name", expected, "none"));
    };
    let sampler = match sampler.to_ascii_lowercase().as_str() {
        "exhaustive" | "sequential" => "sequential",
        "random" => "random",
        "tpe" => "tpe",
        other => {
            let expected = "exhaustive, random or tpe";
            return Err(Error::config(
                "command line",
                "--enable_search",
                expected,
                format!("`{other}`"),
            ));
        }
    };
    let mut text = json!({"max_seq_len": 512, "max_samples": 32, "add_special_tokens": false});
    if !args.input_cols.is_empty() {
        text["text_cols"] = json!(args.input_cols);
    }
    let data = json!({
        "name": "search_data",
        "type": "HuggingfaceContainer",
        "load_dataset_config": {"data_name": data, "split": args.split, "subset": args.subset},
        "pre_process_data_config": text,
    });
    pipeline.set("data_configs", json!([data]));
    let metrics = json!([
        {"name": "text", "type": "accuracy", "data_config": "search_data",
         "sub_types": [{"name": "perplexity", "priority": 1}]},
        {"name": "size", "type": "size_on_disk", "sub_types": [{"name": "bytes", "priority": 2}]},
    ]);
    pipeline.set("evaluators", json!({"search_evaluator": {"metrics": metrics}}));
    pipeline.set("evaluator", json!("search_evaluator"));
    let mut strategy = json!({"execution_order": "joint", "sampler": sampler, "include_pass_params": false});
    if sampler != "sequential" {
        strategy["seed"] = json!(args.seed.unwrap_or(0));
    }
    pipeline.set("search_strategy", strategy);
    pipeline.set("no_artifacts", Value::Bool(false));
    Ok(())
}

/// Runs `capture-onnx-graph`.
///
/// # Errors
/// Those of planning and running the passes.
pub fn capture(args: &CaptureArgs, context: &Context<'_>) -> Result<()> {
    notes::refuse_scripts(&args.model)?;
    notes::refuse(&[
        (
            "--use_mobius_builder",
            args.use_mobius_builder,
            "it is another program's; `--use_model_builder` builds the graph",
        ),
        (
            "--model_variant",
            args.model_variant != "auto",
            "language models only",
        ),
    ])?;
    notes::warn_no_effect(&[(
        "--conversion_device",
        args.conversion_device != Device::Cpu,
        "graphs are built on the CPU, whatever they are for",
    )]);
    notes::warn_old(&args.no_effect);
    let mut pipeline = Pipeline::new(input_model(&args.model)?);
    let traced = args.use_dynamo_exporter
        || args.torch_dtype.is_some()
        || args.target_opset.is_some()
        || args.past_key_value_name != "past_key_values";
    if traced && !args.use_model_builder {
        let parameters = json!({
            "target_opset": args.target_opset,
            "use_dynamo_exporter": args.use_dynamo_exporter.then_some(true),
            "torch_dtype": args.torch_dtype,
            "past_key_value_name": args.past_key_value_name,
            "save_metadata_for_token_generation": args.use_ort_genai.then_some(true),
        });
        pipeline.pass("conversion", "OnnxConversion", parameters);
    } else {
        let Stored::Built(precision, symmetric) = stored(args.precision)? else {
            let found = args.precision.map(Precision::name).unwrap_or_default();
            let expected = "fp32, fp16, bf16, int8 or int4";
            return Err(Error::config(
                "command line",
                "--precision",
                expected,
                format!("`{found}`"),
            ));
        };
        let parameters = json!({
            "precision": precision,
            "int4_is_symmetric": symmetric,
            "int4_block_size": args.int4_block_size,
            "int4_accuracy_level": args.int4_accuracy_level,
            "exclude_embeds": args.exclude_embeds.then_some(true),
            "exclude_lm_head": args.exclude_lm_head.then_some(true),
            "enable_cuda_graph": args.enable_cuda_graph.then_some(true),
            "extra_options": builder_options("--extra_mb_options", args.extra_mb_options.as_deref())?,
        });
        pipeline.pass("builder", "ModelBuilder", parameters);
    }
    if let Some(text) = &args.fixed_param_dict {
        let flag = "--fixed_param_dict";
        let (mut names, mut sizes) = (Vec::new(), Vec::new());
        for (name, size) in pairs(flag, text)? {
            let size = size.parse::<i64>().map_err(|_| {
                Error::config(
                    "command line",
                    flag,
                    format!("a size for `{name}`"),
                    format!("`{size}`"),
                )
            })?;
            names.push(name.to_owned());
            sizes.push(size);
        }
        pipeline.pass(
            "to_fixed_shape",
            "DynamicToFixedShape",
            fixed_shape(flag, &names, &sizes)?,
        );
    }
    pipeline.run(&args.output_path, None, (&args.config, &args.common), context)
}
