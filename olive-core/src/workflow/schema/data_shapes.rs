//! The shape of data configs: where the rows come from, how they become samples, how they are batched.

use serde_json::{Map, Value};

use super::shape::{Field, Shape, field, ignored};
use super::shapes::{PATH, resource_keys};

/// A data config.
pub const DATA_CONFIG: Shape = Shape::Depends(data_config);

const PYTHON: &str = "user scripts are not run";
const HUB: &str = "it is for the hub client";
const LOADER: &str = "samples are batched in order, in this process";

const KEYS: &[Field] = &[
    field("name", Shape::Text),
    field("type", Shape::Text),
    field("load_dataset_config", Shape::Depends(load_dataset)),
    field("pre_process_data_config", Shape::Depends(pre_process)),
    field("post_process_data_config", Shape::Depends(post_process)),
    field("dataloader_config", Shape::Depends(dataloader)),
    ignored("user_script", Shape::Text, PYTHON),
    ignored("script_dir", Shape::Text, PYTHON),
];

fn data_config(_: &Map<String, Value>) -> Vec<&'static [Field]> {
    vec![KEYS]
}

/// Keys that every component may have.
const COMPONENT: &[Field] = &[field("type", Shape::Text), field("name", Shape::Text)];

/// Components of a user script take whatever its function takes.
const SCRIPTED: &[Field] = &[
    ignored("user_script", Shape::Text, PYTHON),
    ignored("script_dir", Shape::Text, PYTHON),
];

const LOAD: &[Field] = &[
    field("data_name", Shape::Text),
    field("data_dir", PATH),
    field("subset", Shape::Text),
    field("name", Shape::Text),
    field("path", Shape::Text),
    field("split", Shape::Text),
    field("shuffle_seed", Shape::Int),
    field(
        "data_files",
        Shape::Either(&[Shape::Text, Shape::List(&PATH), Shape::Depends(files)]),
    ),
    field("col_filters", Shape::Any),
    field("max_samples", Shape::Int),
    field("limit", Shape::Any),
    field("seed", Shape::Int),
    ignored("trust_remote_code", Shape::Bool, "no code of a data set is run"),
    ignored("cache_dir", Shape::Text, HUB),
    field("revision", Shape::Text),
    ignored("token", Shape::Any, HUB),
    ignored("use_auth_token", Shape::Any, HUB),
    ignored("streaming", Shape::Bool, HUB),
    ignored("num_proc", Shape::Int, HUB),
    ignored("keep_in_memory", Shape::Bool, HUB),
    ignored("save_infos", Shape::Bool, HUB),
    ignored("download_mode", Shape::Text, HUB),
    ignored("download_config", Shape::Any, HUB),
    ignored("verification_mode", Shape::Text, HUB),
    ignored("ignore_verifications", Shape::Bool, HUB),
    ignored("storage_options", Shape::Any, HUB),
    ignored("features", Shape::Any, "columns are read as they are"),
    ignored("model_name", Shape::Text, "the model is the workflow's"),
    ignored("task", Shape::Text, "the task is the workflow's"),
    field("field", Shape::Text),
    field("delimiter", Shape::Text),
    field("column_names", Shape::List(&Shape::Text)),
    field("label_cols", Shape::Any),
    field("label_col", Shape::Any),
];

/// Rows made up instead of read.
const DUMMY: &[Field] = &[
    field("input_shapes", Shape::Any),
    field("input_names", Shape::Any),
    field("input_types", Shape::Any),
    field("input_dirs", Shape::Any),
    field("input_suffix", Shape::Text),
    field("input_order_file", Shape::Text),
    field("annotations_file", Shape::Text),
    field("input_data", Shape::Any),
    field("seq_len", Shape::Int),
    field("past_seq_len", Shape::Int),
    field("max_seq_len", Shape::Int),
    field("batch_size", Shape::Int),
    field("model_framework", Shape::Text),
    field("use_fp16", Shape::Bool),
    field("shared_kv", Shape::Bool),
    field("generative", Shape::Bool),
    field("use_step", Shape::Bool),
    field("ignore_input_fields", Shape::Any),
    field("ort_past_key_name", Shape::Text),
    field("ort_past_value_name", Shape::Text),
];

/// A split name → its files, or one resource that lives elsewhere.
fn files(object: &Map<String, Value>) -> Vec<&'static [Field]> {
    const SPLITS: &[Field] = &[
        field("train", Shape::Any),
        field("validation", Shape::Any),
        field("valid", Shape::Any),
        field("dev", Shape::Any),
        field("eval", Shape::Any),
        field("test", Shape::Any),
    ];
    if object.contains_key("type") {
        resource_keys()
    } else {
        vec![SPLITS]
    }
}

fn load_dataset(object: &Map<String, Value>) -> Vec<&'static [Field]> {
    match kind_of(object).as_str() {
        ""
        | "huggingface_dataset"
        | "local_dataset"
        | "simple_dataset"
        | "image_dataset"
        | "dummy_dataset"
        | "raw_dataset" => vec![COMPONENT, SCRIPTED, LOAD, DUMMY],
        other if other.starts_with("transformers_") => vec![COMPONENT, SCRIPTED, LOAD, DUMMY],
        _ => vec![COMPONENT, SCRIPTED, LOAD, DUMMY, OPEN],
    }
}

/// Any other argument: the functions of a user's own script name theirs as they like.
const OPEN: &[Field] = &[field("*", Shape::Any)];

const TEXT_GENERATION: &[Field] = &[
    field("max_samples", Shape::Int),
    field("max_seq_len", Shape::Int),
    field("strategy", Shape::OneOf(STRATEGIES)),
    field("stride", Shape::Int),
    field(
        "text_cols",
        Shape::Either(&[Shape::Text, Shape::List(&Shape::Text)]),
    ),
    field("text_template", Shape::Text),
    ignored("text_formatting_func", Shape::Text, PYTHON),
    field("chat_template", Shape::Either(&[Shape::Bool, Shape::Text])),
    field("message_col", Shape::Text),
    field("add_special_tokens", Shape::Bool),
    field("use_attention_mask", Shape::Bool),
    field("pad_to_max_len", Shape::Bool),
    field("padding_side", Shape::OneOf(&["right", "left"])),
    field("drop_short_sequences", Shape::Bool),
    field("joiner", Shape::Text),
    field("processing_batch_size", Shape::Int),
    field("random_seed", Shape::Int),
    field("random_retries", Shape::Int),
    ignored("model_name", Shape::Text, "the model is the workflow's"),
    ignored("task", Shape::Text, "the task is the workflow's"),
    ignored("trust_remote_code", Shape::Bool, "no code of a model is run"),
];

/// How rows become samples.
pub const STRATEGIES: &[&str] = &[
    "line-by-line",
    "line-by-line-random",
    "join",
    "join-random",
    "join-sliding-window",
];

/// Preprocessing of other tasks.
const OTHER_TASKS: &[Field] = &[
    field("input_cols", Shape::Any),
    field("label_col", Shape::Any),
    field("label_cols", Shape::Any),
    field("labels", Shape::List(&Shape::Any)),
    field("align_labels", Shape::Bool),
    field("model_config_path", Shape::Text),
    field("padding", Shape::Any),
    field("truncation", Shape::Any),
    field("max_length", Shape::Int),
    field("is_split_into_words", Shape::Bool),
    field("batched", Shape::Bool),
    field("extended_mask_type", Shape::Any),
    field("extended_mask_value", Shape::Any),
    field("feature_extractor_args", Shape::Map(&Shape::Any)),
    field("max_duration", Shape::Float),
    field("labels_to_filter", Shape::List(&Shape::Text)),
    field("input_features", Shape::Any),
    field("size", Shape::Any),
    field("kv_cache", Shape::Bool),
];

fn pre_process(object: &Map<String, Value>) -> Vec<&'static [Field]> {
    match kind_of(object).as_str() {
        ""
        | "text_generation_huggingface_pre_process"
        | "huggingface_pre_process"
        | "pre_process"
        | "skip_pre_process"
        | "ner_huggingface_preprocess"
        | "audio_classification_pre_process"
        | "tokenizer_pre_process"
        | "image_pre_process" => vec![COMPONENT, SCRIPTED, TEXT_GENERATION, OTHER_TASKS],
        _ => vec![COMPONENT, SCRIPTED, TEXT_GENERATION, OTHER_TASKS, OPEN],
    }
}

fn post_process(_: &Map<String, Value>) -> Vec<&'static [Field]> {
    const POST: &[Field] = &[
        ignored("task", Shape::Text, "the task is the workflow's"),
        ignored("model_name", Shape::Text, "the model is the workflow's"),
        field("has_scores", Shape::Bool),
    ];
    vec![COMPONENT, SCRIPTED, POST]
}

fn dataloader(object: &Map<String, Value>) -> Vec<&'static [Field]> {
    const DATALOADER: &[Field] = &[
        field("batch_size", Shape::Int),
        field("drop_last", Shape::Bool),
        ignored("shuffle", Shape::Bool, LOADER),
        ignored("sampler", Shape::Any, LOADER),
        ignored("batch_sampler", Shape::Any, LOADER),
        ignored("num_workers", Shape::Int, LOADER),
        ignored("collate_fn", Shape::Text, PYTHON),
        ignored("pin_memory", Shape::Bool, LOADER),
        ignored("pin_memory_device", Shape::Text, LOADER),
        ignored("timeout", Shape::Float, LOADER),
        ignored("prefetch_factor", Shape::Int, LOADER),
        ignored("persistent_workers", Shape::Bool, LOADER),
        ignored("in_order", Shape::Bool, LOADER),
        ignored("task", Shape::Text, "the task is the workflow's"),
        ignored("model_name", Shape::Text, "the model is the workflow's"),
        field("fields_no_batching", Shape::List(&Shape::Text)),
    ];
    match kind_of(object).as_str() {
        "" | "default_dataloader" | "no_auto_batch_dataloader" | "default_calibration_dataloader" => {
            vec![COMPONENT, SCRIPTED, DATALOADER]
        }
        _ => vec![COMPONENT, SCRIPTED, DATALOADER, OPEN],
    }
}

fn kind_of(object: &Map<String, Value>) -> String {
    let kind = object.get("type").and_then(Value::as_str).unwrap_or_default();
    kind.to_ascii_lowercase()
}
