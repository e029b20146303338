//! `olive tune-session-params`: the pass OrtSessionParamsTuning on one model folder.

use olive_core::{Pass, PassConfig, Result, fsio};
use olive_genai::OrtSessionParamsTuning;
use olive_genai::tuning::{PASS_NAME, SessionTuning};
use serde_json::{Map, Value, json};

use super::{Context, notes};
use crate::args::TuneSessionArgs;
use crate::output;

/// Device and provider, as Olive names the settings file.
const SETTINGS_FILE: &str = "cpu-cpu.json";

/// Runs the command.
///
/// # Errors
/// Those of the pass.
pub fn run(args: &TuneSessionArgs, context: &Context<'_>) -> Result<()> {
    notes::warn_no_effect(&[
        (
            "--disable_force_evaluate_other_eps",
            args.disable_force_evaluate_other_eps,
            "there is one provider",
        ),
        (
            "--predict_with_kv_cache",
            args.predict_with_kv_cache,
            "the loop always has a cache",
        ),
        ("--memory", args.memory.is_some(), "the model is not split"),
        (
            "--account_name",
            args.account_name.is_some(),
            "there is no shared cache",
        ),
        (
            "--container_name",
            args.container_name.is_some(),
            "there is no shared cache",
        ),
    ]);
    let given = parameters(args);
    let workflow = json!({
        "input_model": {"type": "ONNXModel", "model_path": args.model_name_or_path},
        "systems": {"local_system": {"type": "LocalSystem", "accelerators": [
            {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]}},
        "passes": {"session_params_tuning": with_type(&given)},
        "host": "local_system",
        "target": "local_system",
        "output_dir": args.output_path,
        "log_severity_level": args.common.log_level,
        "no_artifacts": true,
    });
    let config = PassConfig::new("command line", OrtSessionParamsTuning.params(), &given)?;
    let tuning = SessionTuning::new(&config)?;
    if notes::save_config(&args.config, &args.output_path, &workflow)? {
        return Ok(());
    }
    let tuned = tuning.tune(&args.model_name_or_path, context.progress, context.cancel)?;
    for trial in &tuned.trials {
        let threads = trial.intra_op_num_threads;
        tracing::info!("{threads} threads: {:.1} ms", trial.seconds * 1e3);
    }
    fsio::create_dir(&args.output_path)?;
    let settings = tuned.inference_settings(tuning.extra_session_config());
    fsio::write_json(args.output_path.join(SETTINGS_FILE), &settings, 4)?;
    let path = args.output_path.display();
    output::line(&format!("Inference session parameters are saved to {path}."))
}

fn with_type(parameters: &Map<String, Value>) -> Value {
    let mut pass = Map::from_iter([("type".to_owned(), PASS_NAME.into())]);
    pass.extend(parameters.clone());
    Value::Object(pass)
}

/// The parameters of the pass that the flags give.
fn parameters(args: &TuneSessionArgs) -> Map<String, Value> {
    let list = |values: &[i64]| (!values.is_empty()).then(|| json!(values));
    let set = |flag: bool| flag.then_some(Value::Bool(true));
    let given = [
        ("device", Some(json!(args.device.name()))),
        ("cpu_cores", args.cpu_cores.map(Value::from)),
        ("io_bind", set(args.io_bind)),
        ("enable_cuda_graph", set(args.enable_cuda_graph)),
        (
            "providers_list",
            (!args.providers_list.is_empty()).then(|| json!(args.providers_list)),
        ),
        ("execution_mode_list", list(&args.execution_mode_list)),
        ("opt_level_list", list(&args.opt_level_list)),
        ("trt_fp16_enable", set(args.trt_fp16_enable)),
        (
            "intra_thread_num_list",
            (!args.intra_thread_num_list.is_empty()).then(|| json!(args.intra_thread_num_list)),
        ),
        ("inter_thread_num_list", list(&args.inter_thread_num_list)),
        (
            "extra_session_config",
            args.extra_session_config.clone().map(Value::Object),
        ),
        ("enable_profiling", set(args.enable_profiling)),
    ];
    let given = given
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?)));
    given.collect()
}
