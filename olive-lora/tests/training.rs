//! Runs as a whole: interruption and continuation, threads, packed bases, refusals, the files that come out.
#![expect(clippy::unwrap_used, reason = "what fails to unwrap fails the test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use olive_core::decoder::Cpu;
use olive_core::{CancelToken, Error, HfModel, ModelHandle, NoProgress, PassContext, Progress, Sample, fsio};
use olive_lora::{
    Adapter, LoraOptions, Targets, TrainReport, TrainingArguments, TrainingData, evaluate_perplexity,
    finetune,
};
use serde_json::{Value, json};

fn golden(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden")
        .join(part)
}

fn samples(count: usize, length: usize) -> Vec<Sample> {
    (0..count)
        .map(|i| {
            Sample::from_ids(
                (0..length)
                    .map(|t| (3 + (i * 7 + t * (1 + i % 3)) % 60) as u32)
                    .collect(),
            )
        })
        .collect()
}

fn options() -> LoraOptions {
    LoraOptions {
        r: 4,
        dropout: 0.1,
        ..LoraOptions::default()
    }
}

/// Asks for a stop after so many steps.
struct StopAfter {
    steps: u64,
    seen: AtomicU64,
    token: CancelToken,
}

impl Progress for StopAfter {
    fn start(&self, _stage: &str, _total: u64) {}
    fn update(&self, done: u64, note: &str) {
        if note.starts_with("loss") {
            self.seen.store(done, Ordering::Relaxed);
            if done == self.steps {
                self.token.cancel();
            }
        }
    }
    fn finish(&self) {}
}

fn train(
    model: &HfModel,
    arguments: Value,
    output: &Path,
    stop_after: Option<u64>,
) -> olive_core::Result<TrainReport> {
    let (train, eval) = (samples(11, 24), samples(3, 30));
    let pairs = arguments.as_object().unwrap().clone();
    let (arguments, _) = TrainingArguments::from_pairs(pairs).unwrap();
    let token = CancelToken::default();
    let stop = StopAfter {
        steps: stop_after.unwrap_or(u64::MAX),
        seen: AtomicU64::new(0),
        token: token.clone(),
    };
    let context = PassContext {
        output,
        progress: &stop,
        cancel: &token,
    };
    let data = TrainingData {
        train: &train,
        eval: Some(&eval),
    };
    finetune::<Cpu>(model, data, &options(), &arguments, &context)
}

/// Every file below a folder, without the timings of the log.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(folder).unwrap().to_string_lossy().into_owned();
            let mut bytes = std::fs::read(&path).unwrap();
            if name == "train_log.jsonl" {
                let text = String::from_utf8(bytes).unwrap();
                let untimed = text.lines().map(|line| {
                    let mut entry: serde_json::Map<String, Value> = serde_json::from_str(line).unwrap();
                    entry.remove("tokens_per_s");
                    Value::Object(entry).to_string()
                });
                bytes = untimed.collect::<Vec<_>>().join("\n").into_bytes();
            }
            found.insert(name, bytes);
        }
    }
    found
}

fn arguments() -> Value {
    json!({
        "max_steps": 9, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "lr_scheduler_type": "linear", "warmup_steps": 2, "save_steps": 4, "eval_steps": 3, "logging_steps": 2
    })
}

#[test]
fn a_run_that_was_stopped_ends_in_the_bytes_of_one_that_was_not() {
    let model = HfModel::open(golden("peft/phi3")).unwrap();
    let whole = tempfile::tempdir().unwrap();
    let report = train(&model, arguments(), whole.path(), None).unwrap();
    assert_eq!((report.steps, report.resumed_from), (9, None));
    let expected = files(whole.path());
    assert!(expected.contains_key("checkpoint-8/optimizer.safetensors"));
    assert!(expected.contains_key("checkpoint-9/trainer_state.json"));
    for stop in [1, 3, 5, 8] {
        let output = tempfile::tempdir().unwrap();
        let stopped = train(&model, arguments(), output.path(), Some(stop));
        assert!(matches!(stopped, Err(Error::Cancelled)), "{stopped:?}");
        assert!(!output.path().join("model_config.json").exists());
        let report = train(&model, arguments(), output.path(), None).unwrap();
        assert_eq!(report.resumed_from, Some(stop as usize));
        let found = files(output.path());
        assert_eq!(
            found.keys().collect::<Vec<_>>(),
            expected.keys().collect::<Vec<_>>()
        );
        for (name, bytes) in &found {
            assert!(bytes == &expected[name], "stopped after {stop}: `{name}` differs");
        }
    }
}

#[test]
fn a_run_continues_from_a_checkpoint_when_it_was_killed_or_is_told_to() {
    let model = HfModel::open(golden("peft/phi3")).unwrap();
    let whole = tempfile::tempdir().unwrap();
    train(&model, arguments(), whole.path(), None).unwrap();
    let expected = files(whole.path());
    // A killed run leaves its checkpoints and a half-written one.
    let output = tempfile::tempdir().unwrap();
    let copy = output.path().join("checkpoint-4");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(whole.path().join("checkpoint-4")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    std::fs::create_dir(output.path().join("checkpoint-6")).unwrap();
    std::fs::write(
        output.path().join("checkpoint-6/adapter_model.safetensors"),
        b"half",
    )
    .unwrap();
    for told in [json!(null), json!("true"), json!(copy.to_str().unwrap())] {
        let mut given = arguments();
        given["resume_from_checkpoint"] = told;
        for late in ["checkpoint-8", "checkpoint-9"] {
            let _ = std::fs::remove_dir_all(output.path().join(late));
        }
        let report = train(&model, given, output.path(), None).unwrap();
        assert_eq!(report.resumed_from, Some(4));
        let found = files(output.path());
        for (name, bytes) in &expected {
            assert!(&found[name] == bytes, "`{name}` differs");
        }
    }
    // Another rate is another run: its checkpoint is not taken silently, and refused when asked for.
    let mut other = arguments();
    other["learning_rate"] = json!(5e-3);
    assert_eq!(
        train(&model, other.clone(), output.path(), None)
            .unwrap()
            .resumed_from,
        None
    );
    other["seed"] = json!(1);
    other["resume_from_checkpoint"] = json!(copy.to_str().unwrap());
    let error = train(&model, other, output.path(), None).unwrap_err();
    assert!(error.to_string().contains("another run"), "{error}");
    let mut first = arguments();
    first["resume_from_checkpoint"] = json!(true);
    let empty = tempfile::tempdir().unwrap();
    assert!(train(&model, first, empty.path(), None).is_err());
}

#[test]
fn the_number_of_threads_and_recomputing_change_nothing() {
    let model = HfModel::open(golden("peft/llama")).unwrap();
    let mut results = Vec::new();
    for (threads, recompute) in [(1, true), (3, true), (2, false)] {
        let output = tempfile::tempdir().unwrap();
        let mut given = arguments();
        given["gradient_checkpointing"] = json!(recompute);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| train(&model, given, output.path(), None))
            .unwrap();
        results.push(std::fs::read(output.path().join("adapter/adapter_model.safetensors")).unwrap());
    }
    assert!(results[0] == results[1] && results[0] == results[2]);
}

#[test]
fn the_output_folder_is_olives_and_opens_as_a_model() {
    let model = HfModel::open(golden("peft/phi3")).unwrap();
    let output = tempfile::tempdir().unwrap();
    train(&model, arguments(), output.path(), None).unwrap();
    let opened = HfModel::open(output.path()).unwrap();
    assert_eq!(opened.spec(), model.spec());
    let adapter = opened.adapter().unwrap();
    let read = Adapter::open(adapter, opened.spec()).unwrap();
    assert!(
        read.modules
            .iter()
            .all(|module| module.b.iter().any(|v| *v != 0.0))
    );
    let base = std::fs::read(golden("peft/phi3/model.safetensors")).unwrap();
    assert_eq!(
        std::fs::read(output.path().join("model/model.safetensors")).unwrap(),
        base
    );
    let config: Value = fsio::read_json(output.path().join("model_config.json")).unwrap();
    assert_eq!(config["config"]["model_path"], "model");
    assert_eq!(config["config"]["adapter_path"], "adapter");
    let log = fsio::read_to_string(output.path().join("train_log.jsonl")).unwrap();
    // Steps 2, 4, 6, 8 and evaluations after 3, 6, 9.
    assert_eq!(log.lines().count(), 7);
    assert!(log.lines().filter(|line| line.contains("eval_loss")).count() == 3);
    let names: Vec<String> = std::fs::read_dir(output.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    assert!(names.iter().all(|name| !name.starts_with('.')), "{names:?}");
    let again = finetune::<Cpu>(
        &opened,
        TrainingData {
            train: &samples(2, 8),
            eval: None,
        },
        &options(),
        &TrainingArguments::default(),
        &PassContext {
            output: output.path(),
            progress: &NoProgress,
            cancel: &CancelToken::default(),
        },
    );
    assert!(again.unwrap_err().to_string().contains("adapter"));
}

#[test]
fn a_fresh_adapter_changes_nothing_and_a_trained_one_helps() {
    let model = HfModel::open(golden("peft/phi3")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    Adapter::new(&model, &options(), 1)
        .unwrap()
        .write(folder.path(), "base")
        .unwrap();
    let blocks: Vec<Vec<u32>> = samples(3, 30).into_iter().map(|s| s.input_ids).collect();
    let perplexity = |adapter: Option<&Path>| {
        evaluate_perplexity::<Cpu>(&model, &blocks, adapter, &NoProgress, &CancelToken::default())
            .unwrap()
            .loss
    };
    assert_eq!(perplexity(None), perplexity(Some(folder.path())));
    let output = tempfile::tempdir().unwrap();
    let mut given = arguments();
    given["max_steps"] = json!(30);
    let report = train(&model, given, output.path(), None).unwrap();
    let adapted = perplexity(Some(&output.path().join("adapter")));
    assert!(adapted < perplexity(None) - 0.5, "{adapted}");
    assert!((report.eval_loss.unwrap() - adapted).abs() < 1e-5);
}

#[test]
fn a_packed_base_trains_as_its_dequantized_values_do() {
    let shared = std::env::var_os("OLIVE_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared"),
        PathBuf::from,
    );
    let packed = shared.join("golden/autoawq/quantized");
    if !packed.is_dir() {
        eprintln!("SKIPPED: `{}` is not there", packed.display());
        return;
    }
    let packed = HfModel::open(packed).unwrap();
    let dense = tempfile::tempdir().unwrap();
    write_dequantized(&packed, dense.path());
    let dense = HfModel::open(dense.path()).unwrap();
    let mut losses = Vec::new();
    for model in [&packed, &dense] {
        let output = tempfile::tempdir().unwrap();
        train(model, arguments(), output.path(), None).unwrap();
        let log = fsio::read_to_string(output.path().join("train_log.jsonl")).unwrap();
        let of = |line: &str| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64();
        losses.push(log.lines().filter_map(of).collect::<Vec<f64>>());
    }
    assert!(!losses[0].is_empty());
    for (a, b) in losses[0].iter().zip(&losses[1]) {
        assert!((a - b).abs() < 1e-5, "{losses:?}");
    }
}

/// A dense checkpoint with the values that a packed one stands for.
fn write_dequantized(packed: &HfModel, folder: &Path) {
    use olive_core::{CheckpointPlan, CheckpointWriter, DType, LinearWeight};
    let spec = packed.spec();
    let mut plan = CheckpointPlan::default();
    for (name, shape) in spec.dense_tensors() {
        plan.push(name, DType::F32, shape);
    }
    let mut writer = CheckpointWriter::create(folder, &plan).unwrap();
    let linears: Vec<_> = (0..spec.n_layers).flat_map(|layer| spec.linears(layer)).collect();
    for (name, info) in &plan.tensors {
        let linear = linears
            .iter()
            .find(|linear| format!("{}.weight", linear.name) == *name);
        let values = match linear {
            Some(linear) => LinearWeight::read(packed.tensors(), spec, linear)
                .unwrap()
                .weight
                .to_dense(),
            None => packed.tensors().read_f32_checked(name, &info.shape).unwrap(),
        };
        writer
            .write(name, &DType::F32.from_f32(&values).unwrap())
            .unwrap();
    }
    writer.finish().unwrap();
    let mut config: serde_json::Map<String, Value> =
        fsio::read_json(packed.path().join("config.json")).unwrap();
    config.remove("quantization_config");
    fsio::write_json(folder.join("config.json"), &config, 2).unwrap();
}

#[test]
fn bad_data_and_adapters_are_refused_by_name() {
    let model = HfModel::open(golden("peft/phi3")).unwrap();
    let output = tempfile::tempdir().unwrap();
    let run = |train: &[Sample], options: &LoraOptions| {
        let context = PassContext {
            output: output.path(),
            progress: &NoProgress,
            cancel: &CancelToken::default(),
        };
        let data = TrainingData { train, eval: None };
        finetune::<Cpu>(&model, data, options, &TrainingArguments::default(), &context)
            .unwrap_err()
            .to_string()
    };
    let mut unlabelled = samples(2, 8);
    unlabelled[1].labels.fill(-100);
    assert!(run(&unlabelled, &options()).contains("training sample 1"));
    assert!(run(&[], &options()).contains("training data"));
    let mut foreign = samples(2, 8);
    foreign[0].input_ids[3] = 100_000;
    assert!(run(&foreign, &options()).contains("100000"));
    let llama = golden("peft/runs/llama-constant/adapter_init");
    let other = LoraOptions {
        initial_adapter: Some(llama.clone()),
        ..options()
    };
    assert!(run(&samples(2, 8), &other).contains("target_modules"));
    assert!(Adapter::open(&llama, model.spec()).is_err());
    let missing = tempfile::tempdir().unwrap();
    let source = golden("peft/runs/phi3-constant/adapter_init");
    fsio::write(
        missing.path().join("adapter_config.json"),
        &std::fs::read(source.join("adapter_config.json")).unwrap(),
    )
    .unwrap();
    std::fs::copy(
        golden("peft/runs/phi3-accumulate/adapter_init/adapter_model.safetensors"),
        missing.path().join("adapter_model.safetensors"),
    )
    .unwrap();
    let error = Adapter::open(missing.path(), model.spec())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("down_proj") || error.contains("gate_up"),
        "{error}"
    );
    assert!(
        std::fs::read_dir(output.path()).unwrap().count() == 0,
        "nothing is left behind"
    );
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_names_the_step() {
    let model = HfModel::open(golden("peft/phi3")).unwrap();
    let output = tempfile::tempdir().unwrap();
    let mut given = arguments();
    given["learning_rate"] = json!(1e30);
    given["lr_scheduler_type"] = json!("constant");
    let error = train(&model, given, output.path(), None).unwrap_err();
    assert!(matches!(error, Error::NotFinite { .. }), "{error}");
    assert!(error.to_string().contains("optimizer step"), "{error}");
    assert!(!output.path().join("adapter").exists());
}

#[test]
fn targets_of_the_command_line_are_adapted() {
    let model = HfModel::open(golden("peft/llama")).unwrap();
    let options = LoraOptions {
        target_modules: Some(Targets::from_text("all-linear")),
        ..options()
    };
    assert_eq!(Adapter::new(&model, &options, 0).unwrap().modules.len(), 14);
}

/// The lab's data and rate on the demo model: 60 steps of 8 blocks of 1,024 tokens.
#[test]
#[ignore = "takes minutes"]
fn tiny_phi3_learns_the_style_of_the_travel_data() {
    use olive_core::data::{DataConfig, DataFormat, DataSource, TextGenConfig, TextSource};
    let shared = std::env::var_os("OLIVE_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared"),
        PathBuf::from,
    );
    let folder = std::env::var_os("OLIVE_MODEL").map_or(shared.join("models/tiny-phi3"), PathBuf::from);
    let steps = std::env::var("OLIVE_STEPS").map_or(60, |steps| steps.parse().unwrap());
    if !folder.is_dir() {
        eprintln!("SKIPPED: `{}` is not there", folder.display());
        return;
    }
    let template = "<|user|>\n{prompt}<|end|>\n<|assistant|>\n{response}<|end|>";
    let data = DataConfig {
        source: DataSource::new(DataFormat::Json, [shared.join("data/data_sample_travel.jsonl")]),
        text: TextGenConfig::new(TextSource::template(template).unwrap()),
    };
    let tokenizer = olive_core::text::TextTokenizer::open(&folder).unwrap();
    let train = data.samples(&tokenizer).unwrap();
    let model = HfModel::open(&folder).unwrap();
    let (arguments, _) =
        TrainingArguments::from_pairs([("max_steps", json!(steps)), ("learning_rate", json!(3e-3))]).unwrap();
    let output = tempfile::tempdir().unwrap();
    let context = PassContext {
        output: output.path(),
        progress: &NoProgress,
        cancel: &CancelToken::default(),
    };
    let data = TrainingData {
        train: &train,
        eval: None,
    };
    let report = finetune::<Cpu>(&model, data, &LoraOptions::default(), &arguments, &context).unwrap();
    eprintln!("{} blocks: {report:#?}", train.len());
    if steps == 60 {
        assert!(report.first_loss.unwrap() > 5.0 && report.final_loss.unwrap() < 2.6);
    }
}
