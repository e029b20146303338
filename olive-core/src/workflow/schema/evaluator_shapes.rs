//! The shape of evaluators, their metrics and goals.

use serde_json::{Map, Value};

use super::pass_shapes::PROVIDER_OPTIONS;
use super::shape::{Field, Shape, field, ignored};
use super::shapes::{DATA_OR_NAME, PATH};

/// An evaluator.
pub const EVALUATOR: Shape = Shape::Depends(evaluator);

const PYTHON: &str = "user scripts are not run";

const KEYS: &[Field] = &[
    field("type", Shape::Text),
    field("name", Shape::Text),
    field("metrics", Shape::List(&Shape::Depends(metric))),
    ignored("user_script", Shape::Text, PYTHON),
    ignored("script_dir", Shape::Text, PYTHON),
    ignored("type_args", Shape::Map(&Shape::Any), PYTHON),
];

/// Evaluators on tasks with a name.
const TASK_KEYS: &[Field] = &[
    field(
        "tasks",
        Shape::List(&Shape::Either(&[Shape::Text, Shape::Record(TASK)])),
    ),
    field("batch_size", Shape::Any),
    field("max_length", Shape::Int),
    field("max_gen_toks", Shape::Int),
    field("limit", Shape::Float),
    field("num_fewshot", Shape::Int),
    field("device", Shape::Text),
    field("model_class", Shape::Text),
    field("execution_provider", Shape::Text),
    field(
        "provider_options",
        Shape::Either(&[Shape::List(&PROVIDER_OPTIONS), PROVIDER_OPTIONS]),
    ),
    field("bootstrap_iters", Shape::Int),
    field("apply_chat_template", Shape::Any),
    field("confirm_run_unsafe_code", Shape::Bool),
    field("fewshot_as_multiturn", Shape::Bool),
    field("system_instruction", Shape::Text),
    field("output_path", Shape::Text),
    field("log_samples", Shape::Bool),
    field("include_path", Shape::Text),
    field("model_args", Shape::Map(&Shape::Any)),
    field("gen_kwargs", Shape::Any),
    field("ep", Shape::Text),
    field("ep_options", Shape::Map(&Shape::Any)),
    field("pooling", Shape::Text),
    field("languages", Shape::List(&Shape::Text)),
    field("prompt", Shape::Any),
];

/// A task written out.
const TASK: &[Field] = &[
    field("task", Shape::Any),
    field("task_alias", Shape::Text),
    field("tag", Shape::Any),
    field("group", Shape::Any),
    field("dataset_path", Shape::Text),
    field("dataset_name", Shape::Text),
    field("dataset_kwargs", Shape::Map(&Shape::Any)),
    field("custom_dataset", Shape::Text),
    field("training_split", Shape::Text),
    field("validation_split", Shape::Text),
    field("test_split", Shape::Text),
    field("fewshot_split", Shape::Text),
    field("process_docs", Shape::Text),
    field("doc_to_text", Shape::Any),
    field("doc_to_target", Shape::Any),
    field("doc_to_choice", Shape::Any),
    field("doc_to_image", Shape::Any),
    field("doc_to_audio", Shape::Any),
    field("unsafe_code", Shape::Bool),
    field("process_results", Shape::Text),
    field("use_prompt", Shape::Text),
    field("description", Shape::Text),
    field("target_delimiter", Shape::Text),
    field("fewshot_delimiter", Shape::Text),
    field("fewshot_config", Shape::Map(&Shape::Any)),
    field("num_fewshot", Shape::Int),
    field("metric_list", Shape::List(&Shape::Record(TASK_METRIC))),
    field("output_type", Shape::Text),
    field("generation_kwargs", Shape::Record(GENERATION)),
    field("repeats", Shape::Int),
    field("filter_list", Shape::Any),
    field("should_decontaminate", Shape::Bool),
    field("doc_to_decontamination_query", Shape::Text),
    field("gen_prefix", Shape::Text),
    field("include", Shape::Text),
    field("metadata", Shape::Map(&Shape::Any)),
];

const TASK_METRIC: &[Field] = &[
    field("metric", Shape::Text),
    field("aggregation", Shape::Text),
    field("higher_is_better", Shape::Bool),
    field("hf_evaluate", Shape::Bool),
    field("ignore_case", Shape::Bool),
    field("ignore_punctuation", Shape::Bool),
    field("ignore_numbers", Shape::Bool),
    field("regexes_to_ignore", Shape::List(&Shape::Text)),
    field("multi_label", Shape::Bool),
    field("kwargs", Shape::Map(&Shape::Any)),
];

const GENERATION: &[Field] = &[
    field("until", Shape::Any),
    field("do_sample", Shape::Bool),
    field("temperature", Shape::Float),
    field("top_p", Shape::Float),
    field("top_k", Shape::Int),
    field("num_beams", Shape::Int),
    field("max_gen_toks", Shape::Int),
    field("max_new_tokens", Shape::Int),
    field("max_length", Shape::Int),
    field("min_new_tokens", Shape::Int),
    field("repetition_penalty", Shape::Float),
    field("length_penalty", Shape::Float),
    field("early_stopping", Shape::Bool),
    field("seed", Shape::Int),
];

/// Types of evaluators that take tasks instead of metrics.
pub const TASK_EVALUATORS: &[&str] = &["lmevaluator", "mtebevaluator", "lmmsevaluator"];

fn evaluator(object: &Map<String, Value>) -> Vec<&'static [Field]> {
    let kind = object.get("type").and_then(Value::as_str).unwrap_or_default();
    if TASK_EVALUATORS.contains(&kind.to_ascii_lowercase().as_str()) {
        vec![KEYS, TASK_KEYS]
    } else {
        vec![KEYS]
    }
}

const GOAL_TYPES: &[&str] = &[
    "threshold",
    "min-improvement",
    "percent-min-improvement",
    "max-degradation",
    "percent-max-degradation",
];

const SUB_TYPE: &[Field] = &[
    field("name", Shape::Text),
    field("metric_config", Shape::Depends(metric_config)),
    field("priority", Shape::Int),
    field("higher_is_better", Shape::Bool),
    field(
        "goal",
        Shape::Record(&[
            field("type", Shape::OneOf(GOAL_TYPES)),
            field("value", Shape::Float),
        ]),
    ),
];

fn metric_config(_: &Map<String, Value>) -> Vec<&'static [Field]> {
    const CONFIG: &[Field] = &[
        field("warmup_num", Shape::Int),
        field("repeat_test_num", Shape::Int),
        field("sleep_num", Shape::Int),
        field("task", Shape::Text),
        field("num_classes", Shape::Int),
        field("num_labels", Shape::Int),
        field("threshold", Shape::Float),
        field("average", Shape::Text),
        field("mdmc_average", Shape::Text),
        field("ignore_index", Shape::Int),
        field("top_k", Shape::Int),
        field("multiclass", Shape::Bool),
        field("subset_accuracy", Shape::Bool),
        field("pos_label", Shape::Int),
        field("max_fpr", Shape::Float),
        field("thresholds", Shape::Any),
        field("tolerance", Shape::Float),
        field("validate_args", Shape::Bool),
        field("multidim_average", Shape::Text),
        field("load_params", Shape::Map(&Shape::Any)),
        field("compute_params", Shape::Map(&Shape::Any)),
        field("result_key", Shape::Text),
    ];
    vec![CONFIG]
}

fn metric(_: &Map<String, Value>) -> Vec<&'static [Field]> {
    const METRIC: &[Field] = &[
        field("name", Shape::Text),
        field(
            "type",
            Shape::OneOf(&["accuracy", "latency", "throughput", "size_on_disk", "custom"]),
        ),
        field("backend", Shape::Text),
        field("sub_types", Shape::List(&Shape::Record(SUB_TYPE))),
        field("user_config", Shape::Record(USER_CONFIG)),
        field("data_config", DATA_OR_NAME),
        field("sample_log_num", Shape::Int),
        field("sample_log_dir", Shape::Text),
    ];
    vec![METRIC]
}

const USER_CONFIG: &[Field] = &[
    ignored("user_script", Shape::Text, PYTHON),
    ignored("script_dir", Shape::Text, PYTHON),
    ignored("evaluate_func", Shape::Text, PYTHON),
    ignored("evaluate_func_kwargs", Shape::Map(&Shape::Any), PYTHON),
    ignored("metric_func", Shape::Text, PYTHON),
    ignored("metric_func_kwargs", Shape::Map(&Shape::Any), PYTHON),
    ignored("post_processing_func", Shape::Text, PYTHON),
    ignored("post_func", Shape::Text, PYTHON),
    ignored("dataloader_func", Shape::Text, PYTHON),
    ignored("func_kwargs", Shape::Map(&Shape::Any), PYTHON),
    ignored("data_dir", PATH, PYTHON),
    ignored("batch_size", Shape::Int, PYTHON),
    ignored("input_names", Shape::Any, PYTHON),
    ignored("input_shapes", Shape::Any, PYTHON),
    ignored("input_types", Shape::Any, PYTHON),
    field("inference_settings", Shape::Map(&Shape::Any)),
    ignored("shared_kv_buffer", Shape::Bool, "the cache is always shared"),
    ignored("io_bind", Shape::Bool, "buffers are always bound"),
    ignored(
        "run_kwargs",
        Shape::Map(&Shape::Any),
        "there is no session to run",
    ),
    field("predict_with_kv_cache", Shape::Bool),
];
