//! `olive optimize`: one command from a checkpoint, or an ONNX model, to a model for a device.

use olive_core::{Error, Result};
use serde_json::{Value, json};

use super::{Context, notes};
use crate::args::{Exporter, OptimizeArgs, Precision};
use crate::pipeline::{Pipeline, builder_options, fixed_shape};
use crate::workflow::input_model;

/// The device of each provider where the user names none.
const DEVICES: &[(&str, &str)] = &[
    ("CPUExecutionProvider", "cpu"),
    ("OpenVINOExecutionProvider", "cpu"),
    ("QNNExecutionProvider", "npu"),
    ("VitisAIExecutionProvider", "npu"),
];

/// Runs the command.
///
/// # Errors
/// Those of planning and running the passes.
pub fn run(args: &OptimizeArgs, context: &Context<'_>) -> Result<()> {
    notes::refuse_scripts(&args.model)?;
    notes::warn_no_effect(&[(
        "--qnn_env_path",
        args.qnn_env_path.is_some(),
        "Qualcomm's tools are not run",
    )]);
    let named = DEVICES.iter().find(|(provider, _)| *provider == args.provider);
    let device = args
        .device
        .map_or(named.map_or("gpu", |(_, device)| *device), |device| device.name());
    let system = json!({
        "type": "LocalSystem",
        "accelerators": [{"device": device, "execution_providers": [args.provider]}],
    });
    let model = input_model(&args.model)?;
    let onnx = model["type"] == "ONNXModel";
    let mut pipeline = Pipeline::new(model).target(system);
    let width = Width::of(args)?;
    let splits = args.num_split.is_some() || args.memory.is_some();
    match onnx {
        true => quantize_graph(args, &width, &mut pipeline),
        false => {
            quantize_checkpoint(args, &width, &mut pipeline);
            if splits {
                let parameters = json!({"num_splits": args.num_split});
                pipeline.pass("capture_split_info", "CaptureSplitInfo", parameters);
            }
            build(args, &width, &mut pipeline)?;
        }
    }
    finish(args, &width, splits, &mut pipeline)?;
    let memory = args.memory.map(|mega| mega << 20);
    pipeline.run(&args.output_path, memory, (&args.config, &args.common), context)
}

/// What a precision means.
struct Width {
    /// The builder's name of it.
    name: &'static str,
    /// Bits of whole numbers.
    bits: Option<u32>,
    /// Whether blocks have no zero point.
    symmetric: bool,
}

impl Width {
    fn of(args: &OptimizeArgs) -> Result<Self> {
        let new = |name, bits, symmetric| Self {
            name,
            bits,
            symmetric,
        };
        Ok(match args.precision {
            Precision::Fp32 => new("fp32", None, true),
            Precision::Fp16 => new("fp16", None, true),
            Precision::Bf16 => new("bf16", None, true),
            Precision::Int4 => new("int4", Some(4), true),
            Precision::Uint4 => new("int4", Some(4), false),
            Precision::Int8 => new("int8", Some(8), true),
            Precision::Uint8 => new("int8", Some(8), false),
            other => {
                let found = format!("`{}`", other.name());
                let expected = "fp32, fp16, bf16, int8, uint8, int4 or uint4";
                return Err(Error::config("command line", "--precision", expected, found));
            }
        })
    }

    /// Whether weights are quantized before the graph is built: by their effect on the calibration data.
    fn calibrated(&self) -> bool {
        self.bits == Some(4)
    }
}

fn quantize_checkpoint(args: &OptimizeArgs, width: &Width, pipeline: &mut Pipeline) {
    if !width.calibrated() {
        return;
    }
    if args.act_precision.is_some() {
        pipeline.pass("quarot", "QuaRot", json!({}));
    }
    let parameters = json!({"bits": width.bits, "sym": width.symmetric, "group_size": args.block_size});
    pipeline.pass("gptq", "Gptq", parameters);
}

fn build(args: &OptimizeArgs, width: &Width, pipeline: &mut Pipeline) -> Result<()> {
    let extra = builder_options("--extra_mb_options", args.extra_mb_options.as_deref())?;
    match args.exporter.unwrap_or(Exporter::Builder) {
        Exporter::Builder => {
            let block = args.block_size.filter(|size| *size > 0).unwrap_or(32);
            let parameters = match width.bits {
                Some(4) => json!({
                    "precision": width.name,
                    "int4_block_size": block,
                    "int4_accuracy_level": 4,
                    "int4_op_types_to_quantize": ["MatMul", "Gather"],
                    "extra_options": extra,
                }),
                _ => json!({"precision": width.name, "extra_options": extra}),
            };
            pipeline.pass("model_builder", "ModelBuilder", parameters);
            let webgpu = args.provider == "WebGpuExecutionProvider";
            if webgpu && width.name != "fp32" {
                let parameters = json!({"name_pattern": "logits", "source_dtype": 10, "target_dtype": 1});
                pipeline.pass("io_types", "OnnxIODataTypeConverter", parameters);
            }
        }
        exporter => {
            if !extra.is_null() {
                notes::warn_no_effect(&[("--extra_mb_options", true, "the graph builder is not asked for")]);
            }
            let dynamo = (exporter == Exporter::Dynamo).then_some(true);
            let dtype = match width.name {
                "fp16" => Value::from("float16"),
                "bf16" => Value::from("bfloat16"),
                _ => Value::Null,
            };
            let kind = match exporter {
                Exporter::Optimum => "OptimumConversion",
                _ => "OnnxConversion",
            };
            let parameters = match exporter {
                Exporter::Optimum => json!({}),
                _ => json!({"use_dynamo_exporter": dynamo, "torch_dtype": dtype}),
            };
            pipeline.pass("conversion", kind, parameters);
            pipeline.pass("peephole_optimizer", "OnnxPeepholeOptimizer", json!({}));
            if width.bits == Some(8) {
                pipeline.pass("dynamic_quant", "OnnxDynamicQuantization", eight_bits(width));
            }
        }
    }
    Ok(())
}

fn eight_bits(width: &Width) -> Value {
    json!({"precision": if width.symmetric { "int8" } else { "uint8" }})
}

/// The precision of a model that is a graph already.
fn quantize_graph(args: &OptimizeArgs, width: &Width, pipeline: &mut Pipeline) {
    pipeline.pass("peephole_optimizer", "OnnxPeepholeOptimizer", json!({}));
    match (width.name, width.bits) {
        ("fp16", _) => pipeline.pass("float16", "OnnxFloatToFloat16", json!({})),
        (_, Some(4)) => {
            let parameters = json!({
                "bits": 4,
                "block_size": args.block_size.filter(|size| *size > 0),
                "is_symmetric": width.symmetric,
                "accuracy_level": 4,
            });
            pipeline.pass("weight_only", "OnnxBlockWiseRtnQuantization", parameters);
        }
        (_, Some(_)) => pipeline.pass("dynamic_quant", "OnnxDynamicQuantization", eight_bits(width)),
        _ => {}
    }
}

/// What is done to the graph of either origin.
fn finish(args: &OptimizeArgs, width: &Width, splits: bool, pipeline: &mut Pipeline) -> Result<()> {
    if let Some(precision) = args.act_precision {
        let weights = format!(
            "{}int{}",
            if width.symmetric { "" } else { "u" },
            width.bits.unwrap_or(8)
        );
        let parameters = json!({"precision": weights, "activation_type": precision.name()});
        pipeline.pass("static_quant", "OnnxStaticQuantization", parameters);
    }
    if args.use_qdq_format && width.bits.is_some() {
        pipeline.pass("mnb_to_qdq", "MatMulNBitsToQDQ", json!({}));
    }
    if !args.surgeries.is_empty() {
        let surgeries: Vec<Value> = args
            .surgeries
            .iter()
            .map(|name| json!({"surgeon": name}))
            .collect();
        pipeline.pass("surgeries", "GraphSurgeries", json!({"surgeries": surgeries}));
    }
    if !args.dim_param.is_empty() || !args.dim_value.is_empty() {
        let shape = fixed_shape("--dim_value", &args.dim_param, &args.dim_value)?;
        pipeline.pass("to_fixed_shape", "DynamicToFixedShape", shape);
    }
    if splits {
        pipeline.pass("split_model", "SplitModel", json!({}));
    }
    if args.provider == "QNNExecutionProvider" && splits {
        pipeline.pass("static_llm", "StaticLLM", json!({}));
    }
    if args.enable_aot {
        pipeline.pass("aot", "EPContextBinaryGenerator", json!({}));
    }
    Ok(())
}
