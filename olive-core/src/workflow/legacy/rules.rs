//! The table.

use super::Change::{Drop, Rename, Rewrite};
use super::rewrites as to;
use super::{Change, Place, Rule};

const fn rule(
    place: Place,
    key: &'static str,
    change: Change,
    before: &'static str,
    after: &'static str,
) -> Rule {
    Rule {
        place,
        key,
        change,
        example: (before, after),
    }
}

const ADAPTERS: &[&str] = &["LoRA", "QLoRA", "DoRA", "LoHa", "LoKr", "LoftQ"];
const PLAIN_ADAPTERS: &[&str] = &["LoRA", "DoRA", "LoHa", "LoKr"];
const AWQ: &[&str] = &["AutoAWQQuantizer"];
const BUILDER: &[&str] = &["ModelBuilder"];
const ORT_QUANT: &[&str] = &[
    "OnnxQuantization",
    "OnnxDynamicQuantization",
    "OnnxStaticQuantization",
];
const ANY: Place = Place::Pass(&[]);

/// Every legacy form, in the order in which they are applied.
pub const RULES: &[Rule] = &[
    // The whole document.
    rule(
        Place::Top,
        "data_configs",
        Rewrite(
            to::data_config_list,
            "a list of data configs, each with its `name`",
        ),
        r#"{"data_configs": {"train": {"type": "HuggingfaceContainer"}}}"#,
        r#"{"data_configs": [{"name": "train", "type": "HuggingfaceContainer"}]}"#,
    ),
    rule(
        Place::Top,
        "pass_flows",
        Rewrite(
            to::pass_flows,
            "the order of `passes` (one flow) or `builds` (several)",
        ),
        r#"{"passes": {"a": {"type": "Rtn"}, "b": {"type": "ModelBuilder"}}, "pass_flows": [["b", "a"]]}"#,
        r#"{"passes": {"b": {"type": "ModelBuilder"}, "a": {"type": "Rtn"}}}"#,
    ),
    rule(
        Place::Top,
        "auto_optimizer_config",
        Drop("passes are given one by one"),
        r#"{"auto_optimizer_config": {"opt_level": 0}}"#,
        "{}",
    ),
    rule(
        Place::Top,
        "metrics",
        Rewrite(to::named_metrics, "the metrics of the evaluators that name them"),
        r#"{"metrics": [{"name": "m", "type": "latency"}], "evaluators": {"e": {"metrics": ["m"]}}}"#,
        r#"{"evaluators": {"e": {"metrics": [{"name": "m", "type": "latency"}]}}}"#,
    ),
    rule(
        Place::Top,
        "verbose",
        Drop("`log_severity_level` says how much is logged"),
        r#"{"verbose": true}"#,
        "{}",
    ),
    rule(
        Place::Top,
        "engine",
        Rewrite(
            to::engine_providers,
            "`execution_providers` of the accelerators of host and target",
        ),
        r#"{"engine": {"target": "aml", "execution_providers": ["CUDAExecutionProvider"]},
            "systems": {"aml": {"type": "AzureML", "accelerators": ["gpu"]}}}"#,
        r#"{"engine": {"target": "aml"}, "systems": {"aml": {"type": "AzureML",
            "accelerators": [{"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}]}}}"#,
    ),
    // The engine.
    rule(
        Place::Engine,
        "execution_providers",
        Drop("there is no system that it could belong to"),
        r#"{"execution_providers": ["CPUExecutionProvider"]}"#,
        "{}",
    ),
    rule(
        Place::Engine,
        "clean_run_cache",
        Rename("clean_cache"),
        r#"{"clean_run_cache": true}"#,
        r#"{"clean_cache": true}"#,
    ),
    rule(
        Place::Engine,
        "output_name",
        Drop("outputs are named by their folder"),
        r#"{"output_name": "x"}"#,
        "{}",
    ),
    rule(
        Place::Engine,
        "verbose",
        Drop("`log_severity_level` says how much is logged"),
        r#"{"verbose": true}"#,
        "{}",
    ),
    // Models.
    rule(
        Place::Model,
        "hf_config",
        Rewrite(
            to::hf_config,
            "`type: HfModel` with `model_path`, `task` and `load_kwargs`",
        ),
        r#"{"type": "PyTorchModel", "hf_config": {"model_name": "microsoft/phi-2", "task": "text-generation",
            "model_loading_args": {"trust_remote_code": true}}}"#,
        r#"{"type": "HfModel", "model_path": "microsoft/phi-2", "task": "text-generation",
            "load_kwargs": {"trust_remote_code": true}}"#,
    ),
    rule(
        Place::Model,
        "from_pretrained_args",
        Rename("load_kwargs"),
        r#"{"type": "HfModel", "from_pretrained_args": {"torch_dtype": "float16"}}"#,
        r#"{"type": "HfModel", "load_kwargs": {"torch_dtype": "float16"}}"#,
    ),
    rule(
        Place::Model,
        "model_loading_args",
        Rename("load_kwargs"),
        r#"{"type": "HfModel", "model_loading_args": {"torch_dtype": "float16"}}"#,
        r#"{"type": "HfModel", "load_kwargs": {"torch_dtype": "float16"}}"#,
    ),
    rule(
        Place::Model,
        "model_storage_kind",
        Drop("files and folders are told apart by looking"),
        r#"{"type": "ONNXModel", "model_storage_kind": "folder"}"#,
        r#"{"type": "ONNXModel"}"#,
    ),
    // Systems.
    rule(
        Place::System,
        "device",
        Rewrite(to::system_device, "`accelerators` with that `device`"),
        r#"{"type": "LocalSystem", "device": "gpu"}"#,
        r#"{"type": "LocalSystem", "accelerators": [{"device": "gpu"}]}"#,
    ),
    rule(
        Place::System,
        "accelerators",
        Rewrite(
            to::accelerator_names,
            "accelerators with `device` and `execution_providers`",
        ),
        r#"{"type": "LocalSystem", "accelerators": ["gpu"]}"#,
        r#"{"type": "LocalSystem", "accelerators": [{"device": "gpu"}]}"#,
    ),
    rule(
        Place::System,
        "type",
        Rewrite(to::system_type, "`PythonEnvironment`"),
        r#"{"type": "IsolatedORT", "python_environment_path": "x"}"#,
        r#"{"type": "PythonEnvironment", "python_environment_path": "x"}"#,
    ),
    rule(
        Place::Accelerator,
        "execution_providers",
        Rewrite(to::provider_list, "a list of execution providers"),
        r#"{"device": "cpu", "execution_providers": "CPUExecutionProvider"}"#,
        r#"{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}"#,
    ),
    // Data.
    rule(
        Place::DataConfig,
        "components",
        Rewrite(
            to::data_components,
            "`load_dataset_config`, `pre_process_data_config`, …",
        ),
        r#"{"name": "d", "components": {"load_dataset": {"type": "local_dataset", "params": {"data_dir": "x"}},
            "dataloader": {"params": {"batch_size": 4}}}}"#,
        r#"{"name": "d", "load_dataset_config": {"type": "local_dataset", "data_dir": "x"},
            "dataloader_config": {"batch_size": 4}}"#,
    ),
    rule(
        Place::DataConfig,
        "params_config",
        Rewrite(
            to::data_params,
            "`load_dataset_config`, `pre_process_data_config`, `dataloader_config`",
        ),
        r#"{"name": "d", "params_config": {"data_name": "json", "data_files": "x.json", "split": "train",
            "batch_size": 2, "component_kwargs": {"pre_process_data": {"corpus_strategy": "join"}}}}"#,
        r#"{"name": "d", "load_dataset_config": {"data_name": "json", "data_files": "x.json", "split": "train"},
            "dataloader_config": {"batch_size": 2}, "pre_process_data_config": {"corpus_strategy": "join"}}"#,
    ),
    rule(
        Place::DataConfig,
        "default_components",
        Drop("components follow from type and task"),
        r#"{"name": "d", "default_components": {}}"#,
        r#"{"name": "d"}"#,
    ),
    rule(
        Place::DataConfig,
        "default_components_type",
        Drop("components follow from type and task"),
        r#"{"name": "d", "default_components_type": {}}"#,
        r#"{"name": "d"}"#,
    ),
    rule(
        Place::PreProcess,
        "dataset_type",
        Rewrite(to::dataset_type, "nothing (every data set is a corpus)"),
        r#"{"dataset_type": "corpus", "text_cols": ["a"]}"#,
        r#"{"text_cols": ["a"]}"#,
    ),
    rule(
        Place::PreProcess,
        "corpus_strategy",
        Rename("strategy"),
        r#"{"corpus_strategy": "join"}"#,
        r#"{"strategy": "join"}"#,
    ),
    rule(
        Place::PreProcess,
        "source_max_len",
        Rename("max_seq_len"),
        r#"{"source_max_len": 2048}"#,
        r#"{"max_seq_len": 2048}"#,
    ),
    // Evaluators.
    rule(
        Place::Metric,
        "sub_type",
        Rewrite(to::metric_sub_type, "`sub_types` with one entry"),
        r#"{"name": "l", "type": "latency", "sub_type": "avg", "goal": {"type": "threshold", "value": 1}}"#,
        r#"{"name": "l", "type": "latency",
            "sub_types": [{"name": "avg", "goal": {"type": "threshold", "value": 1}}]}"#,
    ),
    rule(
        Place::SubType,
        "priority_rank",
        Rename("priority"),
        r#"{"name": "avg", "priority_rank": 1}"#,
        r#"{"name": "avg", "priority": 1}"#,
    ),
    // Searches.
    rule(
        Place::Search,
        "search_algorithm",
        Rewrite(to::search_algorithm, "`sampler`"),
        r#"{"execution_order": "joint", "search_algorithm": "exhaustive"}"#,
        r#"{"execution_order": "joint", "sampler": "sequential"}"#,
    ),
    rule(
        Place::Search,
        "num_samples",
        Rename("max_samples"),
        r#"{"sampler": "tpe", "num_samples": 5}"#,
        r#"{"sampler": "tpe", "max_samples": 5}"#,
    ),
    // Passes of any type.
    rule(
        ANY,
        "type",
        Rewrite(to::pass_type, "the pass's name of today"),
        r#"{"type": "OrtPerfTuning"}"#,
        r#"{"type": "OrtSessionParamsTuning"}"#,
    ),
    rule(
        ANY,
        "clean_run_cache",
        Drop("`clean_cache` is the engine's"),
        r#"{"type": "Rtn", "clean_run_cache": true}"#,
        r#"{"type": "Rtn"}"#,
    ),
    rule(
        ANY,
        "output_name",
        Drop("outputs are named by their folder"),
        r#"{"type": "Rtn", "output_name": "x"}"#,
        r#"{"type": "Rtn"}"#,
    ),
    // Passes of one type.
    rule(
        Place::Pass(ADAPTERS),
        "lora_r",
        Rename("r"),
        r#"{"type": "LoRA", "lora_r": 64}"#,
        r#"{"type": "LoRA", "r": 64}"#,
    ),
    rule(
        Place::Pass(ADAPTERS),
        "lora_alpha",
        Rename("alpha"),
        r#"{"type": "QLoRA", "lora_alpha": 64}"#,
        r#"{"type": "QLoRA", "alpha": 64}"#,
    ),
    rule(
        Place::Pass(PLAIN_ADAPTERS),
        "double_quant",
        Drop("it belongs to `QLoRA`"),
        r#"{"type": "LoRA", "double_quant": true}"#,
        r#"{"type": "LoRA"}"#,
    ),
    rule(
        Place::Pass(PLAIN_ADAPTERS),
        "quant_type",
        Drop("it belongs to `QLoRA`"),
        r#"{"type": "LoRA", "quant_type": "nf4"}"#,
        r#"{"type": "LoRA"}"#,
    ),
    rule(
        Place::Pass(PLAIN_ADAPTERS),
        "compute_dtype",
        Drop("it belongs to `QLoRA`"),
        r#"{"type": "LoRA", "compute_dtype": "bfloat16"}"#,
        r#"{"type": "LoRA"}"#,
    ),
    rule(
        Place::Pass(ADAPTERS),
        "use_ort_trainer",
        Drop("there is one trainer"),
        r#"{"type": "LoRA", "use_ort_trainer": false}"#,
        r#"{"type": "LoRA"}"#,
    ),
    rule(
        Place::Pass(ADAPTERS),
        "ortmodule_onnx_opset_version",
        Drop("there is one trainer"),
        r#"{"type": "LoRA", "ortmodule_onnx_opset_version": 16}"#,
        r#"{"type": "LoRA"}"#,
    ),
    rule(
        Place::Pass(ADAPTERS),
        "bias",
        Rewrite(to::no_bias, "nothing (biases are not trained)"),
        r#"{"type": "LoRA", "bias": "none"}"#,
        r#"{"type": "LoRA"}"#,
    ),
    rule(
        Place::TrainingArgs,
        "evaluation_strategy",
        Rename("eval_strategy"),
        r#"{"evaluation_strategy": "steps"}"#,
        r#"{"eval_strategy": "steps"}"#,
    ),
    rule(
        Place::Pass(AWQ),
        "w_bit",
        Rename("bits"),
        r#"{"type": "AutoAWQQuantizer", "w_bit": 4}"#,
        r#"{"type": "AutoAWQQuantizer", "bits": 4}"#,
    ),
    rule(
        Place::Pass(AWQ),
        "pack_model_for_onnx_conversion",
        Drop("packed weights are converted as they are"),
        r#"{"type": "AutoAWQQuantizer", "pack_model_for_onnx_conversion": true}"#,
        r#"{"type": "AutoAWQQuantizer"}"#,
    ),
    rule(
        Place::Pass(ORT_QUANT),
        "weight_type",
        Rewrite(to::weight_type, "`precision`"),
        r#"{"type": "OnnxDynamicQuantization", "weight_type": "QUInt8"}"#,
        r#"{"type": "OnnxDynamicQuantization", "precision": "uint8"}"#,
    ),
    rule(
        Place::Pass(ORT_QUANT),
        "activation_type",
        Rewrite(to::activation_type, "the name of today's precision"),
        r#"{"type": "OnnxStaticQuantization", "activation_type": "QInt8"}"#,
        r#"{"type": "OnnxStaticQuantization", "activation_type": "int8"}"#,
    ),
    rule(
        Place::Pass(BUILDER),
        "block_size",
        Rename("int4_block_size"),
        r#"{"type": "ModelBuilder", "block_size": 64}"#,
        r#"{"type": "ModelBuilder", "int4_block_size": 64}"#,
    ),
    rule(
        Place::Pass(BUILDER),
        "accuracy_level",
        Rename("int4_accuracy_level"),
        r#"{"type": "ModelBuilder", "accuracy_level": 4}"#,
        r#"{"type": "ModelBuilder", "int4_accuracy_level": 4}"#,
    ),
    rule(
        Place::Pass(BUILDER),
        "is_symmetric",
        Rename("int4_is_symmetric"),
        r#"{"type": "ModelBuilder", "is_symmetric": true}"#,
        r#"{"type": "ModelBuilder", "int4_is_symmetric": true}"#,
    ),
    rule(
        Place::Pass(BUILDER),
        "op_types_to_quantize",
        Rename("int4_op_types_to_quantize"),
        r#"{"type": "ModelBuilder", "op_types_to_quantize": ["MatMul"]}"#,
        r#"{"type": "ModelBuilder", "int4_op_types_to_quantize": ["MatMul"]}"#,
    ),
    rule(
        Place::Pass(BUILDER),
        "nodes_to_exclude",
        Rename("int4_nodes_to_exclude"),
        r#"{"type": "ModelBuilder", "nodes_to_exclude": ["/lm_head/MatMul"]}"#,
        r#"{"type": "ModelBuilder", "int4_nodes_to_exclude": ["/lm_head/MatMul"]}"#,
    ),
    rule(
        Place::Pass(BUILDER),
        "algo_config",
        Rename("int4_algo_config"),
        r#"{"type": "ModelBuilder", "algo_config": "k_quant_mixed"}"#,
        r#"{"type": "ModelBuilder", "int4_algo_config": "k_quant_mixed"}"#,
    ),
    rule(
        Place::Pass(ORT_QUANT),
        "MatMulConstBOnly",
        Rewrite(to::ort_quant_option, "`extra_options`"),
        r#"{"type": "OnnxDynamicQuantization", "MatMulConstBOnly": false}"#,
        r#"{"type": "OnnxDynamicQuantization", "extra_options": {"MatMulConstBOnly": false}}"#,
    ),
    rule(
        Place::Pass(&["QuaRot"]),
        "w_rtn",
        Drop("weights are rotated; another pass rounds them"),
        r#"{"type": "QuaRot", "w_rtn": false}"#,
        r#"{"type": "QuaRot"}"#,
    ),
    rule(
        Place::Pass(&["QuaRot"]),
        "w_gptq",
        Drop("weights are rotated; another pass rounds them"),
        r#"{"type": "QuaRot", "w_gptq": false}"#,
        r#"{"type": "QuaRot"}"#,
    ),
    rule(
        Place::Pass(&["QuaRot"]),
        "rotate",
        Drop("weights are rotated; another pass rounds them"),
        r#"{"type": "QuaRot", "rotate": false}"#,
        r#"{"type": "QuaRot"}"#,
    ),
    rule(
        Place::Pass(&["QuaRot"]),
        "calibration_data_config",
        Drop("weights are rotated without data"),
        r#"{"type": "QuaRot", "calibration_data_config": "d"}"#,
        r#"{"type": "QuaRot"}"#,
    ),
    rule(
        Place::LoadKwargs,
        "model_loading_args",
        Rewrite(to::nested_load_args, "`load_kwargs` itself"),
        r#"{"model_loading_args": {"torch_dtype": "float16"}}"#,
        r#"{"torch_dtype": "float16"}"#,
    ),
];
