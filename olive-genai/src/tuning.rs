//! `OrtSessionParamsTuning`: finds the number of threads with which a model folder answers fastest on this machine.
//!
//! Olive's pass tries ONNX Runtime's session options. Of these the loop of this crate has one, the threads of its
//! kernels; what else a workflow lists is said to be without effect.

use std::path::Path;
use std::sync::Arc;

use olive_core::model::MODEL_CONFIG_FILE;
use olive_core::{
    CancelToken, Error, ModelConfigFile, ModelHandle, ModelKind, ParamKind, ParamSpec, Pass, PassConfig,
    PassContext, Progress, Result, fsio,
};
use olive_onnx::OnnxModel;
use olive_onnx::model::GENAI_CONFIG_FILE;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::evaluate::latency;
use crate::model::Model;

/// The pass's name.
pub const PASS_NAME: &str = "OrtSessionParamsTuning";
const ORIGIN: &str = "pass `OrtSessionParamsTuning`";
const PROVIDER: &str = "CPUExecutionProvider";
/// Tokens of the prompt and of the answer of a measurement, at most; half of a shorter context each.
const PROMPT: usize = 64;
const ANSWER: usize = 32;
/// Answers of which the fastest counts.
const RUNS: usize = 3;

/// What a number of threads came to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ThreadTrial {
    /// The threads.
    pub intra_op_num_threads: usize,
    /// Seconds for a prompt and its answer.
    pub seconds: f64,
}

/// What a tuning found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tuned {
    /// The number of threads with the fastest answer.
    pub intra_op_num_threads: usize,
    /// Every number that was tried, in the order given.
    pub trials: Vec<ThreadTrial>,
}

impl Tuned {
    /// Olive's `inference_settings`, with more session options of the user's.
    pub fn inference_settings(&self, extra: &Map<String, Value>) -> Value {
        let mut session = Map::new();
        session.insert("intra_op_num_threads".into(), self.intra_op_num_threads.into());
        session.extend(extra.clone());
        json!({
            "execution_provider": [PROVIDER],
            "provider_options": [{}],
            "io_bind": false,
            "session_options": session,
        })
    }
}

/// The numbers that are tried where none are given: the powers of two up to `cores`, and `cores`.
pub fn default_threads(cores: usize) -> Vec<usize> {
    let mut threads: Vec<usize> = std::iter::successors(Some(1), |n| Some(n * 2))
        .take_while(|n| *n < cores)
        .collect();
    threads.push(cores.max(1));
    threads
}

/// Measures a model folder with each number of threads.
///
/// # Errors
/// [`Error::Config`] without a number, or with 0; [`Error::Cancelled`]; those of opening and running the model.
pub fn tune_threads(
    folder: &Path,
    threads: &[usize],
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<Tuned> {
    if threads.is_empty() || threads.contains(&0) {
        let found = format!("{threads:?}");
        return Err(Error::config(
            ORIGIN,
            "intra_thread_num_list",
            "numbers above 0",
            found,
        ));
    }
    progress.start("threads", threads.len() as u64);
    let mut trials = Vec::new();
    for (done, &count) in threads.iter().enumerate() {
        cancel.check()?;
        let model = Model::open_with_threads(folder, Some(count))?;
        let half = (model.config().model.context_length / 2).max(1);
        let vocabulary = model.config().model.vocab_size.max(1);
        // Which tokens they are does not change the work.
        let prompt: Vec<u32> = (0..PROMPT.min(half))
            .map(|i| ((i * 7 + 1) % vocabulary) as u32)
            .collect();
        let measured = latency(&model, &prompt, ANSWER.min(half), RUNS)?;
        let after_first = measured.new_tokens.saturating_sub(1) as f64;
        trials.push(ThreadTrial {
            intra_op_num_threads: count,
            seconds: measured.first_token_s + measured.token_s * after_first,
        });
        progress.update(done as u64 + 1, &format!("{count} threads"));
    }
    progress.finish();
    let fastest = trials.iter().min_by(|a, b| a.seconds.total_cmp(&b.seconds));
    Ok(Tuned {
        intra_op_num_threads: fastest.map_or(1, |trial| trial.intra_op_num_threads),
        trials,
    })
}

/// The pass. It leaves the same graph, with the threads in `genai_config.json` and Olive's `inference_settings` in
/// `model_config.json`.
#[derive(Debug, Clone, Copy, Default)]
pub struct OrtSessionParamsTuning;

const ANY_LIST: &str = "A number or a list of numbers; the loop has no such option.";

const PARAMS: &[ParamSpec] = &[
    ParamSpec::optional(
        "user_script",
        ParamKind::Text,
        "null",
        "A Python script; not supported.",
    ),
    ParamSpec::optional(
        "script_dir",
        ParamKind::Text,
        "null",
        "Its folder; not supported.",
    ),
    ParamSpec::optional(
        "data_config",
        ParamKind::DataConfig,
        "null",
        "Without effect: which tokens are measured does not change the time.",
    ),
    ParamSpec::optional(
        "device",
        ParamKind::Text,
        "\"cpu\"",
        "What the model runs on; the CPU.",
    ),
    ParamSpec::optional(
        "cpu_cores",
        ParamKind::Int,
        "null",
        "Threads that are tried at most; those of the machine.",
    ),
    ParamSpec::optional("io_bind", ParamKind::Bool, "false", "Without effect."),
    ParamSpec::optional(
        "enable_cuda_graph",
        ParamKind::Bool,
        "false",
        "Not supported: CUDA only.",
    ),
    ParamSpec::optional(
        "providers_list",
        ParamKind::Any,
        "\"CPUExecutionProvider\"",
        "Execution providers, or one; the loop is CPUExecutionProvider.",
    ),
    ParamSpec::optional("provider_options_list", ParamKind::Any, "{}", "Without effect."),
    ParamSpec::optional("execution_mode_list", ParamKind::Any, "null", ANY_LIST),
    ParamSpec::optional("opt_level_list", ParamKind::Any, "null", ANY_LIST),
    ParamSpec::optional(
        "trt_fp16_enable",
        ParamKind::Bool,
        "false",
        "Not supported: TensorRT only.",
    ),
    ParamSpec::optional(
        "intra_thread_num_list",
        ParamKind::Any,
        "null",
        "Threads to try, a number or a list; powers of two up to the number of cores.",
    ),
    ParamSpec::optional("inter_thread_num_list", ParamKind::Any, "null", ANY_LIST),
    ParamSpec::optional(
        "extra_session_config",
        ParamKind::Object,
        "null",
        "More session options, written as they are.",
    ),
    ParamSpec::optional(
        "force_evaluate_other_eps",
        ParamKind::Bool,
        "false",
        "Without effect.",
    ),
    ParamSpec::optional("enable_profiling", ParamKind::Bool, "false", "Without effect."),
];

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}

#[derive(Deserialize)]
struct Parameters {
    user_script: Option<String>,
    script_dir: Option<String>,
    device: String,
    cpu_cores: Option<usize>,
    io_bind: bool,
    enable_cuda_graph: bool,
    providers_list: OneOrMany<String>,
    execution_mode_list: Value,
    opt_level_list: Value,
    trt_fp16_enable: bool,
    intra_thread_num_list: Option<OneOrMany<Option<usize>>>,
    inter_thread_num_list: Value,
    extra_session_config: Option<Map<String, Value>>,
    force_evaluate_other_eps: bool,
    enable_profiling: bool,
}

/// The pass's parameters, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct SessionTuning {
    threads: Vec<usize>,
    extra: Map<String, Value>,
}

impl SessionTuning {
    /// Checks the parameters, and warns about those without effect.
    ///
    /// # Errors
    /// [`Error::Config`] naming a parameter that asks for what the loop cannot do.
    pub fn new(config: &PassConfig) -> Result<Self> {
        let given: Parameters = config.parse(ORIGIN)?;
        let scripts = [
            ("user_script", &given.user_script),
            ("script_dir", &given.script_dir),
        ];
        for (key, value) in scripts {
            if let Some(value) = value {
                let found = format!("`{value}`");
                return Err(Error::config(ORIGIN, key, "null: no script is ever run", found));
            }
        }
        let cuda = [
            ("enable_cuda_graph", given.enable_cuda_graph),
            ("trt_fp16_enable", given.trt_fp16_enable),
        ];
        if let Some((key, _)) = cuda.into_iter().find(|(_, set)| *set) {
            return Err(Error::config(
                ORIGIN,
                key,
                "false: the loop runs on the CPU",
                "true",
            ));
        }
        if !given.device.eq_ignore_ascii_case("cpu") {
            let found = format!("`{}`", given.device);
            return Err(Error::config(
                ORIGIN,
                "device",
                "`cpu`, which the loop runs on",
                found,
            ));
        }
        let providers = given.providers_list.into_vec();
        if let Some(other) = providers.iter().find(|name| !name.eq_ignore_ascii_case(PROVIDER)) {
            let expected = format!("`{PROVIDER}`, which the loop is");
            return Err(Error::config(
                ORIGIN,
                "providers_list",
                expected,
                format!("`{other}`"),
            ));
        }
        for (key, set) in [
            ("io_bind", given.io_bind),
            ("force_evaluate_other_eps", given.force_evaluate_other_eps),
            ("enable_profiling", given.enable_profiling),
            ("execution_mode_list", !given.execution_mode_list.is_null()),
            ("opt_level_list", !given.opt_level_list.is_null()),
            ("inter_thread_num_list", !given.inter_thread_num_list.is_null()),
        ] {
            if set {
                tracing::warn!("{ORIGIN}: `{key}` has no effect; the loop has no such option");
            }
        }
        let listed = given
            .intra_thread_num_list
            .map_or_else(Vec::new, OneOrMany::into_vec);
        let mut threads: Vec<usize> = listed.into_iter().flatten().collect();
        if threads.is_empty() {
            let all = || std::thread::available_parallelism().map_or(1, usize::from);
            threads = default_threads(given.cpu_cores.unwrap_or_else(all));
        }
        Ok(Self {
            threads,
            extra: given.extra_session_config.unwrap_or_default(),
        })
    }

    /// Session options that are written as they are.
    pub fn extra_session_config(&self) -> &Map<String, Value> {
        &self.extra
    }

    /// Measures a model folder.
    ///
    /// # Errors
    /// As [`tune_threads`].
    pub fn tune(&self, folder: &Path, progress: &dyn Progress, cancel: &CancelToken) -> Result<Tuned> {
        tune_threads(folder, &self.threads, progress, cancel)
    }
}

impl Pass for OrtSessionParamsTuning {
    fn name(&self) -> &'static str {
        PASS_NAME
    }

    fn params(&self) -> &'static [ParamSpec] {
        PARAMS
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        (ModelKind::Onnx, ModelKind::Onnx)
    }

    fn check(&self, _model: &dyn ModelHandle, config: &PassConfig) -> Result<()> {
        SessionTuning::new(config).map(|_| ())
    }

    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        let tuning = SessionTuning::new(config)?;
        let source = Model::open(model.path())?;
        let source = source.folder();
        let tuned = tuning.tune(source, context.progress, context.cancel)?;
        write_tuned(source, context.output, &tuned, &tuning.extra)?;
        Ok(Arc::new(OnnxModel::open(context.output)?))
    }
}

/// Leaves in `output` the model folder `source` with the options that were found: its files by hard links where the
/// file system has them, its two configs changed.
fn write_tuned(source: &Path, output: &Path, tuned: &Tuned, extra: &Map<String, Value>) -> Result<()> {
    fsio::create_dir(output)?;
    for entry in std::fs::read_dir(source).map_err(Error::io("list", source))? {
        let path = entry.map_err(Error::io("list", source))?.path();
        let name = path.file_name().unwrap_or_default();
        if path.is_file() && name != GENAI_CONFIG_FILE && name != MODEL_CONFIG_FILE {
            fsio::link_or_copy(&path, &output.join(name))?;
        }
    }
    let mut config = ModelConfigFile::read(source)?.unwrap_or_else(|| ModelConfigFile {
        kind: "ONNXModel".to_owned(),
        config: Map::from_iter([("model_path".to_owned(), ".".into())]),
    });
    config
        .config
        .insert("inference_settings".to_owned(), tuned.inference_settings(extra));
    config.write(output)?;
    let path = source.join(GENAI_CONFIG_FILE);
    let mut genai: Value = fsio::read_json(&path)?;
    let Some(decoder) = genai.pointer_mut("/model/decoder").and_then(Value::as_object_mut) else {
        return Err(Error::file(path, "an object `model.decoder`", "none"));
    };
    let options = decoder.entry("session_options").or_insert_with(|| json!({}));
    let Some(options) = options.as_object_mut() else {
        return Err(Error::file(path, "an object `session_options`", "another value"));
    };
    options.insert(
        "intra_op_num_threads".to_owned(),
        tuned.intra_op_num_threads.into(),
    );
    options.extend(extra.clone());
    fsio::write_json(output.join(GENAI_CONFIG_FILE), &genai, 4)
}

#[cfg(test)]
mod tests {
    use olive_core::{HfModel, NoProgress};
    use olive_onnx::{BuilderOptions, Precision, build_model_folder};

    use super::*;

    fn config(given: Value) -> Result<PassConfig> {
        PassConfig::new(ORIGIN, PARAMS, given.as_object().unwrap())
    }

    #[test]
    fn powers_of_two_and_the_cores_are_tried() {
        assert_eq!(default_threads(1), [1]);
        assert_eq!(default_threads(2), [1, 2]);
        assert_eq!(default_threads(6), [1, 2, 4, 6]);
    }

    #[test]
    fn what_the_loop_cannot_do_is_refused() {
        let refuse = |given| {
            let config = config(given).unwrap();
            SessionTuning::new(&config).unwrap_err().to_string()
        };
        assert!(refuse(json!({"providers_list": "CUDAExecutionProvider"})).contains("providers_list"));
        assert!(refuse(json!({"enable_cuda_graph": true})).contains("enable_cuda_graph"));
        assert!(refuse(json!({"device": "gpu"})).contains("device"));
        assert!(refuse(json!({"user_script": "x.py"})).contains("user_script"));
    }

    #[test]
    fn a_folder_gets_its_threads_and_answers_as_before() {
        let scratch = tempfile::tempdir().unwrap();
        let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/tiny-phi3");
        let built = scratch.path().join("model");
        let model = HfModel::open(fixture).unwrap();
        build_model_folder(
            &model,
            None,
            &BuilderOptions::with_precision(Precision::Int4),
            &built,
            &NoProgress,
            &CancelToken::default(),
        )
        .unwrap();
        let input = OnnxModel::open(&built).unwrap();
        let output = scratch.path().join("tuned");
        let context = PassContext {
            output: &output,
            progress: &NoProgress,
            cancel: &CancelToken::default(),
        };
        let given = json!({"intra_thread_num_list": [2, 1], "extra_session_config": {"log_id": "x"}});
        let config = config(given).unwrap();
        OrtSessionParamsTuning.check(&input, &config).unwrap();
        OrtSessionParamsTuning.run(&input, &config, &context).unwrap();
        let tuned = Model::open(&output).unwrap();
        assert!([1, 2].contains(&tuned.config().threads().unwrap()));
        let written: Value = fsio::read_json(output.join(GENAI_CONFIG_FILE)).unwrap();
        assert_eq!(written["model"]["decoder"]["session_options"]["log_id"], "x");
        let settings: Value = fsio::read_json(output.join(MODEL_CONFIG_FILE)).unwrap();
        assert_eq!(
            settings["config"]["inference_settings"]["execution_provider"][0],
            PROVIDER
        );
        let same = |name: &str| {
            std::fs::read(built.join(name)).unwrap() == std::fs::read(output.join(name)).unwrap()
        };
        assert!(same("model.onnx") && same("model.onnx.data"));
    }
}
