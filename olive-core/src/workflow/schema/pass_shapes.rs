//! What the objects and lists among the parameters of passes hold.

use serde_json::{Map, Value};

use super::shape::{Field, Shape, field};
use super::surgeons;

/// The shape of a parameter that is more than a plain value; `None` where the table's kind says all.
pub(super) fn of(pass: &str, param: &str) -> Option<&'static Shape> {
    Some(match (pass, param) {
        (_, "overrides") => &OVERRIDES,
        (_, "customized_weight_config") => &WEIGHT_CONFIG,
        ("GraphSurgeries", "surgeries") => &SURGERIES,
        ("SpinQuant" | "LoRA" | "QLoRA" | "DoRA" | "LoHa" | "LoKr" | "LoftQ", "training_args") => {
            &TRAINING_ARGS
        }
        ("ModelBuilder" | "MobiusBuilder", "extra_options") => &BUILDER_OPTIONS,
        ("ModelBuilder", "search") => &GENAI_SEARCH,
        ("OnnxDynamicQuantization" | "OnnxStaticQuantization" | "OnnxQuantization", "extra_options") => {
            &ORT_QUANT_OPTIONS
        }
        ("OpenVINOOptimumConversion", "extra_args") => &OPENVINO_EXPORT,
        ("OpenVINOOptimumConversion", "ov_quant_config") => &OPENVINO_QUANT,
        ("EPContextBinaryGenerator", "provider_options") => &PROVIDER_OPTIONS,
        ("OrtTransformersOptimization", "optimization_options") => &FUSION_OPTIONS,
        _ => return None,
    })
}

/// Module name or `re:` pattern → what differs there.
static OVERRIDES: Shape = Shape::Map(&Shape::Record(&[
    field("bits", Shape::Int),
    field("sym", Shape::Bool),
    field("symmetric", Shape::Bool),
    field("group_size", Shape::Int),
]));

/// Node name → what differs there.
static WEIGHT_CONFIG: Shape = Shape::Map(&Shape::Record(&[
    field("bits", Shape::Int),
    field("group_size", Shape::Int),
    field("block_size", Shape::Int),
]));

static SURGERIES: Shape = Shape::List(&Shape::Depends(surgery));

fn surgery(object: &Map<String, Value>) -> Vec<&'static [Field]> {
    const NAME: &[Field] = &[field("surgeon", Shape::OneOf(surgeons::NAMES))];
    let surgeon = object.get("surgeon").and_then(Value::as_str).unwrap_or_default();
    vec![NAME, surgeons::params(surgeon)]
}

/// Options of execution providers, all providers together.
pub(super) const PROVIDER_OPTIONS: Shape = Shape::Record(PROVIDER_OPTION_FIELDS);

macro_rules! fields {
    ($($shape:ident: $($name:literal)*;)*) => { &[$($(field($name, Shape::$shape)),*),*] };
}

const PROVIDER_OPTION_FIELDS: &[Field] = fields! {
    Any: "device_id" "device_type" "device" "user_compute_stream" "do_copy_in_default_stream"
        "use_ep_level_unified_stream" "gpu_mem_limit" "arena_extend_strategy" "cudnn_conv_algo_search"
        "cudnn_conv_use_max_workspace" "cudnn_conv1d_pad_to_nc1d" "enable_cuda_graph"
        "enable_skip_layer_norm_strict_mode" "use_tf32" "prefer_nhwc" "tunable_op_enable"
        "tunable_op_tuning_enable" "tunable_op_max_tuning_duration_ms" "fuse_conv_bias" "sdpa_kernel"
        "gpu_external_alloc" "gpu_external_free" "gpu_external_empty_cache" "has_user_compute_stream"
        "precision" "num_of_threads" "num_streams" "cache_dir" "load_config" "enable_qdq_optimizer"
        "model_priority" "disable_dynamic_shapes" "enable_opencl_throttling" "reshape_input" "layout"
        "enable_causallm" "context" "backend_path" "backend_type" "htp_performance_mode"
        "htp_graph_finalization_optimization_mode" "soc_model" "htp_arch" "vtcm_mb" "profiling_level"
        "profiling_file_path" "rpc_control_latency" "qnn_context_priority" "qnn_saver_path"
        "enable_htp_fp16_precision" "offload_graph_io_quantization" "enable_htp_spill_fill_buffer"
        "enable_htp_shared_memory_allocator" "dump_json_qnn_graph" "json_qnn_graph_dir" "op_packages"
        "enable_vtcm_backup_buffer_sharing" "extended_udma" "performance_preference" "device_filter"
        "disable_metacommands" "enable_dynamic_graph_fusion" "enable_graph_capture" "enable_graph_serialization"
        "ep.context_enable" "ep.context_embed_mode" "validationMode" "storageBufferCacheMode"
        "uniformBufferCacheMode" "queryResolveBufferCacheMode" "defaultBufferCacheMode" "preferredLayout"
        "dawnBackendType" "powerPreference" "enableGraphCapture" "enablePIXCapture" "forceCpuNodeNames"
        "deviceId" "config_file" "cache_key" "cacheDir" "cacheKey" "xclbin" "target" "log_level" "ai_analyzer_visualization"
        "ai_analyzer_profiling" "trt_max_workspace_size" "trt_max_partition_iterations" "trt_min_subgraph_size"
        "trt_fp16_enable" "trt_bf16_enable" "trt_int8_enable" "trt_int8_calibration_table_name"
        "trt_int8_use_native_calibration_table" "trt_dla_enable" "trt_dla_core" "trt_dump_subgraphs"
        "trt_engine_cache_enable" "trt_engine_cache_path" "trt_engine_cache_prefix" "trt_timing_cache_enable"
        "trt_timing_cache_path" "trt_force_timing_cache" "trt_detailed_build_log" "trt_build_heuristics_enable"
        "trt_cuda_graph_enable" "trt_sparsity_enable" "trt_builder_optimization_level" "trt_auxiliary_streams"
        "trt_layer_norm_fp32_fallback" "trt_profile_min_shapes" "trt_profile_max_shapes" "trt_profile_opt_shapes"
        "trt_dump_ep_context_model" "trt_ep_context_file_path" "trt_ep_context_embed_mode"
        "nv_max_workspace_size" "nv_dump_subgraphs" "nv_detailed_build_log" "enable_cuda_graph_capture"
        "nv_profile_min_shapes" "nv_profile_max_shapes" "nv_profile_opt_shapes" "nv_cuda_graph_enable"
        "nv_multi_profile_enable" "nv_use_external_data_initializer" "nv_runtime_cache_path" "migraphx_fp16_enable"
        "migraphx_bf16_enable" "migraphx_int8_enable" "migraphx_fp8_enable" "migraphx_model_cache_dir"
        "migraphx_exhaustive_tune";
};

/// The arguments of a training run, named as `transformers.TrainingArguments` names them.
static TRAINING_ARGS: Shape = Shape::Record(fields! {
    Int: "per_device_train_batch_size" "per_device_eval_batch_size" "gradient_accumulation_steps"
        "eval_accumulation_steps" "max_steps" "seed" "data_seed" "local_rank" "dataloader_num_workers"
        "dataloader_prefetch_factor" "save_total_limit" "past_index" "ddp_timeout" "torch_empty_cache_steps"
        "gradient_accumulation_kwargs" "ddp_bucket_cap_mb" "fsdp_min_num_params" "auto_find_batch_size_start";
    Float: "learning_rate" "weight_decay" "adam_beta1" "adam_beta2" "adam_epsilon" "max_grad_norm"
        "num_train_epochs" "warmup_ratio" "warmup_steps" "logging_steps" "eval_steps" "save_steps" "eval_delay"
        "label_smoothing_factor" "neftune_noise_alpha";
    Bool: "overwrite_output_dir" "do_train" "do_eval" "do_predict" "prediction_loss_only" "gradient_checkpointing"
        "group_by_length" "bf16" "fp16" "tf32" "bf16_full_eval" "fp16_full_eval" "use_cpu" "no_cuda"
        "dataloader_drop_last" "dataloader_pin_memory" "dataloader_persistent_workers" "remove_unused_columns"
        "load_best_model_at_end" "greater_is_better" "ignore_data_skip" "logging_first_step"
        "logging_nan_inf_filter" "save_safetensors" "save_on_each_node" "save_only_model" "restore_callback_states_from_checkpoint"
        "push_to_hub" "hub_private_repo" "hub_always_push" "ddp_find_unused_parameters" "ddp_broadcast_buffers"
        "disable_tqdm" "skip_memory_metrics" "include_inputs_for_metrics" "include_num_input_tokens_seen"
        "include_tokens_per_second" "auto_find_batch_size" "full_determinism" "torch_compile" "jit_mode_eval"
        "use_ipex" "use_legacy_prediction_loop" "eval_on_start" "batch_eval_metrics" "split_batches"
        "eval_do_concat_batches" "use_liger_kernel" "average_tokens_across_devices" "use_mps_device"
        "use_module_with_loss" "eval_use_gather_object" "log_on_each_node";
    Text: "output_dir" "optim" "optim_args" "lr_scheduler_type" "eval_strategy" "save_strategy" "logging_strategy"
        "logging_dir" "log_level" "log_level_replica" "run_name" "resume_from_checkpoint" "hub_model_id"
        "hub_strategy" "hub_token" "hub_revision" "metric_for_best_model" "length_column_name" "half_precision_backend"
        "fp16_opt_level" "fp16_backend" "ddp_backend" "torch_compile_backend" "torch_compile_mode" "torchdynamo"
        "project" "trackio_space_id" "parallelism_config";
    Any: "report_to" "deepspeed" "fsdp" "fsdp_config" "accelerator_config" "lr_scheduler_kwargs" "label_names" "debug"
        "gradient_checkpointing_kwargs" "optim_target_modules" "liger_kernel_config" "include_for_metrics"
        "extra_args";
});

/// Options of the graph builder.
static BUILDER_OPTIONS: Shape = Shape::Record(fields! {
    Int: "int4_accuracy_level" "int4_block_size" "qmoe_block_size" "num_hidden_layers" "matmulnbits_weights_prepacked"
        "qmoe_weights_prepacked";
    Bool: "int4_is_symmetric" "config_only" "hf_remote" "exclude_embeds" "exclude_lm_head" "prune_lm_head"
        "include_hidden_states" "shared_embeddings" "enable_cuda_graph" "enable_webgpu_graph" "use_qdq"
        "use_8bits_moe" "disable_qkv_fusion" "fuse_qk_norm_gqa" "use_webgpu_fp32" "use_cuda_bf16" "include_prompt_templates";
    Text: "int4_algo_config" "matmul_mixed_precision" "filename" "moe_quant_type" "adapter_path" "int8_algo_config";
    Any: "int4_op_types_to_quantize" "int4_nodes_to_exclude" "int4_customized_weight_config" "hf_token";
});

/// The `search` part of a genai config.
static GENAI_SEARCH: Shape = Shape::Record(fields! {
    Int: "max_length" "min_length" "num_beams" "num_return_sequences" "top_k" "no_repeat_ngram_size" "random_seed"
        "batch_size" "chunk_size";
    Float: "temperature" "top_p" "repetition_penalty" "length_penalty" "diversity_penalty";
    Bool: "do_sample" "early_stopping" "past_present_share_buffer";
});

/// The extra options of ONNX Runtime's static and dynamic quantizers.
static ORT_QUANT_OPTIONS: Shape = Shape::Record(fields! {
    Any: "ActivationSymmetric" "WeightSymmetric" "EnableSubgraph" "ForceQuantizeNoInputCheck" "MatMulConstBOnly"
        "AddQDQPairToWeight" "OpTypesToExcludeOutputQuantization" "DedicatedQDQPair"
        "QDQOpTypePerChannelSupportToAxis" "CalibTensorRangeSymmetric" "CalibMovingAverage"
        "CalibMovingAverageConstant" "CalibMaxIntermediateOutputs" "CalibStridedMinMax" "SmoothQuant"
        "SmoothQuantAlpha" "SmoothQuantFolding" "UseQDQContribOps" "MinimumRealRange" "TensorQuantOverrides"
        "QDQKeepRemovableActivations" "QDQDisableWeightAdjustForInt32Bias" "extra.Sigmoid.nnapi"
        "DefaultTensorType" "QuantizeBias" "WeightBits" "SimplifyModel" "DisableShapeInference" "ForceSymmetric"
        "ActivationScaled" "WeightScaled" "CalibTensorRange" "LowerBoundOptimizations";
});

/// Arguments of Optimum's OpenVINO export.
static OPENVINO_EXPORT: Shape = Shape::Record(fields! {
    Any: "task" "library" "library_name" "framework" "cache_dir" "trust_remote_code" "pad_token_id" "subfolder"
        "revision" "force_download" "local_files_only" "use_auth_token" "token" "model_kwargs"
        "custom_export_configs" "fn_get_submodels" "compression_option" "compression_ratio" "ov_config" "stateful"
        "disable_stateful" "convert_tokenizer" "disable_convert_tokenizer" "model_loading_args" "device" "variant"
        "export_all" "output";
});

/// Arguments of Optimum's OpenVINO quantization.
static OPENVINO_QUANT: Shape = Shape::Record(fields! {
    Any: "weight_format" "quant_mode" "ratio" "sym" "group_size" "group_size_fallback" "backup_precision" "dataset"
        "all_layers" "awq" "gptq" "scale_estimation" "lora_correction" "sensitivity_metric" "quantization_statistics_path"
        "num_samples" "smooth_quant_alpha" "trust_remote_code" "bits" "ignored_scope" "tokenizer" "processor"
        "quant_method" "weight_only" "activation_format" "advanced_parameters" "statistics_path" "save_onnx_model"
        "fast_bias_correction" "overflow_fix" "subset_size";
});

/// Options of ONNX Runtime's transformer fusions.
static FUSION_OPTIONS: Shape = Shape::Record(fields! {
    Bool: "enable_gelu" "enable_layer_norm" "enable_attention" "enable_rotary_embeddings" "enable_skip_layer_norm"
        "enable_embed_layer_norm" "enable_bias_skip_layer_norm" "enable_bias_gelu" "enable_gelu_approximation"
        "enable_qordered_matmul" "enable_shape_inference" "enable_gemm_fast_gelu" "enable_group_norm"
        "enable_skip_group_norm" "enable_bias_splitgelu" "enable_packed_qkv" "enable_packed_kv" "enable_bias_add"
        "enable_nhwc_conv" "use_multi_head_attention" "disable_multi_head_attention_bias" "use_raw_attention_mask"
        "no_attention_mask" "disable_attention" "disable_layer_norm" "disable_gelu" "disable_skip_layer_norm"
        "disable_embed_layer_norm" "disable_bias_skip_layer_norm" "disable_bias_gelu" "enable_conformer_attention"
        "enable_simplified_layer_norm" "group_norm_channels_last" "use_group_norm_channels_last";
    Any: "attention_mask_format" "attention_op_type" "model_type";
});
