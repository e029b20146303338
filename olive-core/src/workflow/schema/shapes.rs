//! The shape of a workflow document in today's spelling, wrappers (`config`, `params`) left out.

use serde_json::{Map, Value};

use super::data_shapes::DATA_CONFIG;
use super::evaluator_shapes::EVALUATOR;
use super::shape::{Field, Shape, field, ignored};

/// The whole document.
pub static WORKFLOW: Shape = Shape::Depends(workflow);

/// Keys of the engine were gathered before; here they are the names that a misspelt key at the top may be near.
fn workflow(_: &Map<String, Value>) -> Vec<&'static [Field]> {
    vec![TOP, ENGINE]
}

const TOP: &[Field] = &[
    field("workflow_id", Shape::Text),
    field("input_model", MODEL),
    field("systems", Shape::Map(&SYSTEM)),
    field("data_configs", Shape::List(&DATA_CONFIG)),
    field("evaluators", Shape::Map(&EVALUATOR)),
    field("engine", Shape::Record(ENGINE)),
    field(
        "passes",
        Shape::Map(&Shape::Either(&[Shape::List(&Shape::Pass), Shape::Pass])),
    ),
    field("builds", Shape::Map(&Shape::Record(BUILD))),
    ignored(
        "max_concurrent_builds",
        Shape::Int,
        "builds run one after another",
    ),
    field("azureml_client", Shape::Record(AZUREML_CLIENT)),
    field("workflow_host", SYSTEM_OR_NAME),
    ignored("$schema", Shape::Text, "it is for editors"),
];

/// A system, or the name of one.
pub const SYSTEM_OR_NAME: Shape = Shape::Either(&[Shape::Text, SYSTEM]);
/// An evaluator, or the name of one.
pub const EVALUATOR_OR_NAME: Shape = Shape::Either(&[Shape::Text, EVALUATOR]);
/// A data config, or the name of one.
pub const DATA_OR_NAME: Shape = Shape::Either(&[Shape::Text, DATA_CONFIG]);

const ORT_LOGS: &str = "ONNX Runtime is not used";
const SHARED: &str = "only the local cache is used";

/// The keys of `engine`, which may also stand at the top.
pub const ENGINE: &[Field] = &[
    field(
        "search_strategy",
        Shape::Either(&[Shape::Record(SEARCH), Shape::Bool]),
    ),
    field("host", SYSTEM_OR_NAME),
    field("target", SYSTEM_OR_NAME),
    field("evaluator", EVALUATOR_OR_NAME),
    field("evaluate_input_model", Shape::Bool),
    field("output_dir", Shape::Text),
    field("no_artifacts", Shape::Bool),
    field("plot_pareto_frontier", Shape::Bool),
    field(
        "packaging_config",
        Shape::Either(&[Shape::List(&Shape::Record(PACKAGING)), Shape::Record(PACKAGING)]),
    ),
    field("cache_config", Shape::Record(CACHE)),
    field(
        "cache_dir",
        Shape::Either(&[Shape::List(&Shape::Text), Shape::Text]),
    ),
    field("clean_cache", Shape::Bool),
    field("clean_evaluation_cache", Shape::Bool),
    ignored("enable_shared_cache", Shape::Bool, SHARED),
    field("log_severity_level", Shape::Int),
    ignored("ort_log_severity_level", Shape::Int, ORT_LOGS),
    ignored("ort_py_log_severity_level", Shape::Int, ORT_LOGS),
    ignored("log_to_file", Shape::Bool, "logs go to stderr; redirect them"),
];

const CACHE: &[Field] = &[
    field(
        "cache_dir",
        Shape::Either(&[Shape::List(&Shape::Text), Shape::Text]),
    ),
    field("clean_cache", Shape::Bool),
    field("clean_evaluation_cache", Shape::Bool),
    ignored("enable_shared_cache", Shape::Bool, SHARED),
    ignored("account_name", Shape::Text, SHARED),
    ignored("container_name", Shape::Text, SHARED),
    ignored("upload_to_shared_cache", Shape::Bool, SHARED),
    ignored("update_shared_cache", Shape::Bool, SHARED),
];

const SEARCH: &[Field] = &[
    field("execution_order", Shape::OneOf(&["joint", "pass-by-pass"])),
    field("sampler", Shape::OneOf(&["random", "sequential", "tpe"])),
    field("max_samples", Shape::Int),
    field("seed", Shape::Int),
    field("multivariate", Shape::Bool),
    field("group", Shape::Bool),
    field("output_model_num", Shape::Int),
    field("stop_when_goals_met", Shape::Bool),
    field("max_iter", Shape::Int),
    field("max_time", Shape::Float),
    field("include_pass_params", Shape::Bool),
];

const PACKAGING: &[Field] = &[
    field(
        "type",
        Shape::OneOf(&[
            "Zipfile",
            "Dockerfile",
            "AzureMLModels",
            "AzureMLData",
            "AzureMLDeployment",
        ]),
    ),
    field("name", Shape::Text),
    ignored(
        "include_runtime_packages",
        Shape::Bool,
        "runtimes are not packaged",
    ),
    ignored("include_sample_code", Shape::Bool, "sample code is not packaged"),
    ignored(
        "export_in_mlflow_format",
        Shape::Bool,
        "MLflow folders are not written",
    ),
    field("requirements_file", Shape::Text),
    field("model_name", Shape::Text),
    field("version", Shape::Text),
    field("description", Shape::Text),
    field("model_package", Shape::Any),
    field("model_package_config", Shape::Any),
    field("deployment_config", Shape::Any),
    field("data_name", Shape::Text),
    field("azureml_client", Shape::Record(AZUREML_CLIENT)),
];

const BUILD: &[Field] = &[
    field("components", Shape::Any),
    field("pipeline", Shape::List(&Shape::Text)),
    field("output_dir", Shape::Text),
    field("host", SYSTEM_OR_NAME),
    field("target", SYSTEM_OR_NAME),
    field("evaluator", EVALUATOR_OR_NAME),
    field(
        "search_strategy",
        Shape::Either(&[Shape::Record(SEARCH), Shape::Bool]),
    ),
];

/// What connects to Azure Machine Learning.
pub const AZUREML_CLIENT: &[Field] = &[
    field("subscription_id", Shape::Text),
    field("resource_group", Shape::Text),
    field("workspace_name", Shape::Text),
    field("aml_config_path", Shape::Text),
    field("read_timeout", Shape::Int),
    field("max_operation_retries", Shape::Int),
    field("operation_retry_interval", Shape::Int),
    field("default_auth_params", Shape::Map(&Shape::Any)),
    field("keyvault_name", Shape::Text),
    field("max_concurrency", Shape::Int),
    field("registry_name", Shape::Text),
];

/// A path: text, or a resource that lives elsewhere.
pub const PATH: Shape = Shape::Either(&[Shape::Text, Shape::Record(RESOURCE)]);

const RESOURCE: &[Field] = &[
    field(
        "type",
        Shape::OneOf(&[
            "file",
            "folder",
            "string_name",
            "azureml_registry_model",
            "azureml_model",
            "azureml_datastore",
            "azureml_job_output",
        ]),
    ),
    field("path", Shape::Text),
    field("name", Shape::Text),
    field("registry_name", Shape::Text),
    field("version", Shape::Text),
    field("azureml_client", Shape::Record(AZUREML_CLIENT)),
    field("datastore_name", Shape::Text),
    field("datastore_url", Shape::Text),
    field("relative_path", Shape::Text),
    field("job_name", Shape::Text),
    field("output_name", Shape::Text),
];

/// The keys of a resource that lives elsewhere.
pub(super) fn resource_keys() -> Vec<&'static [Field]> {
    vec![RESOURCE]
}

/// A system.
pub const SYSTEM: Shape = Shape::Depends(system);

const ACCELERATOR: &[Field] = &[
    field("device", Shape::OneOf(&["cpu", "gpu", "npu", "cpu_spr"])),
    field(
        "execution_providers",
        Shape::List(&Shape::Either(&[Shape::Text, Shape::List(&Shape::Text)])),
    ),
    ignored("memory", Shape::Any, "memory is not limited"),
];

const SYSTEM_KEYS: &[Field] = &[
    field(
        "type",
        Shape::OneOf(&[
            "LocalSystem",
            "PythonEnvironment",
            "Docker",
            "AzureML",
            "IsolatedORT",
        ]),
    ),
    field("accelerators", Shape::List(&Shape::Record(ACCELERATOR))),
    ignored("hf_token", Shape::Bool, "the token is taken from the environment"),
];

const PYTHON_KEYS: &[Field] = &[
    field("python_environment_path", Shape::Text),
    field("environment_variables", Shape::Map(&Shape::Any)),
    field("prepend_to_path", Shape::Any),
    field("olive_managed_env", Shape::Bool),
    field("requirements_file", Shape::Text),
];

const DOCKER_KEYS: &[Field] = &[
    field("dockerfile", Shape::Text),
    field("build_context_path", Shape::Text),
    field("image_name", Shape::Text),
    field("work_dir", Shape::Text),
    field("build_args", Shape::Map(&Shape::Any)),
    field("run_params", Shape::Map(&Shape::Any)),
    field("clean_image", Shape::Bool),
    field("is_dev", Shape::Bool),
    field("local_docker_config", Shape::Any),
    field("olive_managed_env", Shape::Bool),
    field("requirements_file", Shape::Text),
];

const AZUREML_KEYS: &[Field] = &[
    field("azureml_client_config", Shape::Record(AZUREML_CLIENT)),
    field("aml_compute", Shape::Text),
    field(
        "aml_docker_config",
        Shape::Record(&[
            field("base_image", Shape::Text),
            field("dockerfile", Shape::Text),
            field("build_context_path", Shape::Text),
            field("conda_file_path", Shape::Text),
            field("name", Shape::Text),
            field("version", Shape::Text),
        ]),
    ),
    field(
        "aml_environment_config",
        Shape::Record(&[
            field("name", Shape::Text),
            field("version", Shape::Text),
            field("label", Shape::Text),
        ]),
    ),
    field("tags", Shape::Map(&Shape::Any)),
    field("resources", Shape::Map(&Shape::Any)),
    field("instance_count", Shape::Int),
    field("is_dev", Shape::Bool),
    field("olive_managed_env", Shape::Bool),
    field("requirements_file", Shape::Text),
    field("datastores", Shape::Any),
    field("workflow_host", Shape::Any),
];

fn system(object: &Map<String, Value>) -> Vec<&'static [Field]> {
    let kind = object.get("type").and_then(Value::as_str).unwrap_or_default();
    let own: &'static [Field] = match kind.to_ascii_lowercase().as_str() {
        "pythonenvironment" | "isolatedort" => PYTHON_KEYS,
        "docker" => DOCKER_KEYS,
        "azureml" => AZUREML_KEYS,
        _ => &[],
    };
    vec![SYSTEM_KEYS, own]
}

/// A model.
pub const MODEL: Shape = Shape::Depends(model);

const PYTHON_MODEL: &str = "models are not built by Python code here";

const MODEL_KEYS: &[Field] = &[
    field("type", Shape::Text),
    field("model_path", PATH),
    field("model_attributes", Shape::Map(&Shape::Any)),
];

const HF_KEYS: &[Field] = &[
    field("task", Shape::Text),
    field("load_kwargs", Shape::Record(LOAD_KWARGS)),
    ignored("io_config", IO_CONFIG, "inputs follow from the architecture"),
    field("adapter_path", PATH),
    ignored("test_model_path", Shape::Text, "reduced test models are not made"),
    ignored(
        "test_model_config",
        Shape::Any,
        "reduced test models are not made",
    ),
    ignored("model_name", Shape::Text, "the path names the model"),
];

const PYTORCH_KEYS: &[Field] = &[
    field("model_file_format", Shape::Text),
    ignored("model_loader", Shape::Text, PYTHON_MODEL),
    ignored("model_script", PATH, PYTHON_MODEL),
    ignored("script_dir", PATH, PYTHON_MODEL),
    ignored("io_config", IO_CONFIG, PYTHON_MODEL),
    ignored("dummy_inputs_func", Shape::Text, PYTHON_MODEL),
    ignored("dummy_inputs", Shape::Any, PYTHON_MODEL),
];

const ONNX_KEYS: &[Field] = &[
    field("onnx_file_name", Shape::Text),
    field("inference_settings", Shape::Record(INFERENCE_SETTINGS)),
    ignored("use_ort_extensions", Shape::Bool, "ONNX Runtime is not used"),
    field("external_initializers_file_name", Shape::Text),
    field("constant_inputs_file_name", Shape::Text),
    field("generative", Shape::Bool),
];

const INFERENCE_SETTINGS: &[Field] = &[
    field("execution_provider", Shape::Any),
    field("provider_options", Shape::Any),
    field("session_options", Shape::Map(&Shape::Any)),
    field("io_bind", Shape::Bool),
    field("use_ort_extensions", Shape::Bool),
];

const COMPOSITE_KEYS: &[Field] = &[
    field("model_components", Shape::List(&MODEL)),
    field("model_component_names", Shape::List(&Shape::Text)),
];

const OTHER_KEYS: &[Field] = &[
    field("model_name", Shape::Text),
    field("model_names", Shape::List(&Shape::Text)),
    field("model_name_pattern", Shape::Text),
    field("num_ranks", Shape::Int),
    field("model_variant", Shape::Text),
    field("load_kwargs", Shape::Map(&Shape::Any)),
    field("adapter_path", PATH),
    field("model_file_format", Shape::Text),
    field("io_config", IO_CONFIG),
    field("inference_settings", Shape::Any),
    field("model_components", Shape::List(&MODEL)),
    field("model_component_names", Shape::List(&Shape::Text)),
    field("task", Shape::Text),
];

fn model(object: &Map<String, Value>) -> Vec<&'static [Field]> {
    let kind = object.get("type").and_then(Value::as_str).unwrap_or_default();
    let own: &'static [Field] = match kind.to_ascii_lowercase().as_str() {
        "hfmodel" | "" => HF_KEYS,
        "pytorchmodel" => PYTORCH_KEYS,
        "onnxmodel" => ONNX_KEYS,
        "compositemodel" => COMPOSITE_KEYS,
        _ => OTHER_KEYS,
    };
    vec![MODEL_KEYS, own]
}

const DTYPES: &str = "weights keep the type of the checkpoint";
const MEMORY: &str = "weights are streamed";
const ATTENTION: &str = "there is one attention";
const HUB: &str = "it is for the hub client";

/// The arguments of `from_pretrained`.
const LOAD_KWARGS: &[Field] = &[
    field("torch_dtype", Shape::Text),
    field("dtype", Shape::Text),
    ignored("device_map", Shape::Any, MEMORY),
    ignored("max_memory", Shape::Any, MEMORY),
    ignored("offload_folder", Shape::Text, MEMORY),
    ignored("offload_state_dict", Shape::Bool, MEMORY),
    ignored("offload_buffers", Shape::Bool, MEMORY),
    ignored("low_cpu_mem_usage", Shape::Bool, MEMORY),
    field("quantization_method", Shape::Text),
    field("quantization_config", Shape::Map(&Shape::Any)),
    ignored("trust_remote_code", Shape::Bool, "no code of a model is run"),
    ignored("attn_implementation", Shape::Text, ATTENTION),
    ignored("use_flash_attention_2", Shape::Bool, ATTENTION),
    ignored("use_cache", Shape::Bool, ATTENTION),
    ignored("use_safetensors", Shape::Bool, "only safetensors are read"),
    ignored("variant", Shape::Text, DTYPES),
    field("revision", Shape::Text),
    ignored("code_revision", Shape::Text, "no code of a model is run"),
    ignored("subfolder", Shape::Text, HUB),
    ignored("cache_dir", Shape::Text, HUB),
    ignored("force_download", Shape::Bool, HUB),
    ignored("resume_download", Shape::Bool, HUB),
    ignored("local_files_only", Shape::Bool, HUB),
    ignored("token", Shape::Any, HUB),
    ignored("use_auth_token", Shape::Any, HUB),
    ignored("proxies", Shape::Map(&Shape::Any), HUB),
    ignored("ignore_mismatched_sizes", Shape::Bool, "sizes must match"),
    ignored("from_tf", Shape::Bool, "only safetensors are read"),
    ignored("from_flax", Shape::Bool, "only safetensors are read"),
    ignored("return_dict", Shape::Bool, "it is for Python"),
    ignored("output_attentions", Shape::Bool, "it is for Python"),
    ignored("output_hidden_states", Shape::Bool, "it is for Python"),
    ignored("config", Shape::Any, "the config is the folder's"),
    ignored("_attn_implementation", Shape::Text, ATTENTION),
    ignored("extra_args", Shape::Map(&Shape::Any), "they are for Python"),
];

const IO_CONFIG: Shape = Shape::Either(&[Shape::Text, Shape::Record(IO_KEYS)]);

const IO_KEYS: &[Field] = &[
    field("input_names", Shape::List(&Shape::Text)),
    field("output_names", Shape::List(&Shape::Text)),
    field("input_shapes", Shape::Any),
    field("input_types", Shape::Any),
    field("output_shapes", Shape::Any),
    field("output_types", Shape::Any),
    field("dynamic_axes", Shape::Map(&Shape::Any)),
    field("dynamic_shapes", Shape::Any),
    field("string_to_int_dim_params", Shape::List(&Shape::Text)),
    field("kv_cache", Shape::Either(&[Shape::Record(KV_CACHE), Shape::Bool])),
];

const KV_CACHE: &[Field] = &[
    field("num_hidden_layers", Shape::Int),
    field("num_attention_heads", Shape::Int),
    field("num_key_value_heads", Shape::Int),
    field("hidden_size", Shape::Int),
    field("head_dim", Shape::Int),
    field("ort_past_key_name", Shape::Text),
    field("ort_past_value_name", Shape::Text),
    field("ort_present_key_name", Shape::Text),
    field("ort_present_value_name", Shape::Text),
    field("world_size", Shape::Int),
    field("past_sequence_length", Shape::Int),
    field("batch_size", Shape::Int),
    field("sequence_length", Shape::Int),
    field("dtype", Shape::Text),
    field("shared_kv", Shape::Bool),
    field("sequence_length_idx", Shape::Int),
    field("past_kv_dynamic_axis", Shape::Any),
    field("present_kv_dynamic_axis", Shape::Any),
    field("past_sequence_length_name", Shape::Text),
];
