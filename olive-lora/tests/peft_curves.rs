//! Training runs recorded with PEFT and the Trainer (see `tests/golden/peft`): losses, rates, norms, order, result.
#![expect(clippy::unwrap_used, reason = "what fails to unwrap fails the test")]

use std::path::{Path, PathBuf};

use olive_core::decoder::{Cpu, DecoderLayer, Embedding, Head, SequenceTables};
use olive_core::{
    CancelToken, Checkpoint, HfModel, ModelHandle, NoProgress, PassContext, Sample, TensorSource, fsio,
};
use olive_lora::train_log::LogEntry;
use olive_lora::{Adapter, LoraOptions, Targets, TrainingArguments, TrainingData, finetune};
use serde_json::{Value, json};

/// Single precision over 100 steps: the recorded runs are within 1e-6 of double precision.
const LOSS_TOLERANCE: f64 = 1e-4;
const NORM_TOLERANCE: f64 = 1e-3;
/// Both sides compute rates in double precision.
const RATE_TOLERANCE: f64 = 1e-15;

fn golden(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden/peft")
        .join(part)
}

fn samples(curve: &Value) -> Vec<Sample> {
    let checkpoint = curve["checkpoint"].as_str().unwrap();
    let examples: Value = fsio::read_json(golden(checkpoint).join("examples.json")).unwrap();
    let count = curve["examples"].as_u64().unwrap() as usize;
    (0..count)
        .map(|i| {
            let mut sample = Sample::from_ids(
                examples["input_ids"][i]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|id| id.as_u64().unwrap() as u32)
                    .collect(),
            );
            if curve["padded"].as_bool().unwrap() {
                let length = examples["padded_lengths"][i].as_u64().unwrap() as usize;
                sample.input_ids[length..].fill(2);
                sample.labels[length..].fill(-100);
                sample.length = length;
            }
            sample
        })
        .collect()
}

fn options(curve: &Value, init: PathBuf) -> LoraOptions {
    let lora = &curve["lora"];
    let targets = lora["target_modules"].as_array().unwrap();
    LoraOptions {
        r: lora["r"].as_u64().unwrap() as usize,
        alpha: lora["lora_alpha"].as_f64().unwrap(),
        dropout: 0.0,
        use_rslora: lora["use_rslora"].as_bool().unwrap(),
        use_dora: lora["use_dora"].as_bool().unwrap_or(false),
        target_modules: Some(Targets::Names(
            targets.iter().map(|t| t.as_str().unwrap().to_owned()).collect(),
        )),
        initial_adapter: Some(init),
        ..LoraOptions::default()
    }
}

fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap())
        .collect()
}

fn logits(model: &HfModel, adapter: &Path, ids: &[u32]) -> Vec<f32> {
    let (spec, source, device) = (model.spec(), model.tensors(), Default::default());
    let adapter = Adapter::open(adapter, spec).unwrap();
    let embedding = Embedding::<Cpu>::load(source, spec, &device).unwrap();
    let tables = SequenceTables::new(spec, ids.len(), &device);
    let mut x = embedding.forward(&[ids]).unwrap();
    for index in 0..spec.n_layers {
        let mut layer = DecoderLayer::load(source, spec, index, &device).unwrap();
        adapter.attach(&mut layer).unwrap();
        x = layer.forward(x, &tables);
    }
    let head = Head::load(source, spec, Some(&embedding), &device).unwrap();
    head.logits(x).into_data().into_vec().unwrap()
}

fn worst(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

fn check_run(name: &str) {
    let folder = golden("runs").join(name);
    let curve: Value = fsio::read_json(folder.join("curve.json")).unwrap();
    let model = HfModel::open(golden(curve["checkpoint"].as_str().unwrap())).unwrap();
    let train = samples(&curve);
    let mut training = curve["training"].as_object().unwrap().clone();
    training.insert("gradient_checkpointing".into(), json!(name.contains("llama")));
    let (arguments, warnings) = TrainingArguments::from_pairs(training).unwrap();
    assert!(warnings.is_empty(), "{warnings:?}");
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
    let options = options(&curve, folder.join("adapter_init"));
    finetune::<Cpu>(&model, data, &options, &arguments, &context).unwrap();

    let log = fsio::read_to_string(output.path().join("train_log.jsonl")).unwrap();
    let entries: Vec<LogEntry> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(entries.len(), curve["loss"].as_array().unwrap().len());
    let mut worst_loss = 0.0f64;
    for (step, expected) in numbers(&curve["loss"]).into_iter().enumerate() {
        worst_loss = worst_loss.max((entries[step].loss.unwrap() - expected).abs());
    }
    for (step, expected) in numbers(&curve["learning_rate"]).into_iter().enumerate() {
        let found = entries[step].learning_rate.unwrap();
        assert!(
            (found - expected).abs() <= RATE_TOLERANCE,
            "{name} {step}: {found} {expected}"
        );
    }
    let mut worst_norm = 0.0f64;
    if !curve["grad_norm"].is_null() {
        for (step, expected) in numbers(&curve["grad_norm"]).into_iter().enumerate() {
            worst_norm = worst_norm.max((entries[step].grad_norm.unwrap() / expected - 1.0).abs());
        }
    }
    eprintln!("{name}: loss within {worst_loss:.1e}, norm within {worst_norm:.1e}");
    assert!(
        worst_loss <= LOSS_TOLERANCE && worst_norm <= NORM_TOLERANCE,
        "{name}"
    );
    check_result(&model, &folder, output.path());
}

/// The adapter that comes out, and what the model answers with it.
fn check_result(model: &HfModel, folder: &Path, output: &Path) {
    let open = |folder: &Path| {
        Checkpoint::open_files(folder, vec![folder.join("adapter_model.safetensors")]).unwrap()
    };
    let (ours, theirs) = (open(&output.join("adapter")), open(&folder.join("adapter_final")));
    assert_eq!(ours.names(), theirs.names());
    for name in ours.names() {
        assert_eq!(ours.info(name), theirs.info(name), "{name}");
    }
    let golden = Checkpoint::open_files(folder, vec![folder.join("adapted_logits.safetensors")]).unwrap();
    let ids: Vec<u32> = golden
        .bytes("input_ids")
        .unwrap()
        .as_chunks::<8>()
        .0
        .iter()
        .map(|b| i64::from_le_bytes(*b) as u32)
        .collect();
    let source: &dyn TensorSource = &golden;
    let expected = source.read_f32("logits").unwrap();
    // Their adapter read by us is exact; ours has the noise of 100 steps of training in it.
    let theirs = worst(&logits(model, &folder.join("adapter_final"), &ids), &expected);
    let trained = worst(&logits(model, &output.join("adapter"), &ids), &expected);
    eprintln!("logits: with their adapter {theirs:.1e}, with ours {trained:.1e}");
    assert!(theirs <= 1e-4 && trained <= 5e-2);
}

#[test]
fn curves_of_phi3_are_those_of_peft() {
    for run in ["constant", "linear", "accumulate", "decay", "dora"] {
        check_run(&format!("phi3-{run}"));
    }
}

#[test]
fn curves_of_llama_are_those_of_peft() {
    for run in ["constant", "linear", "accumulate", "decay", "dora"] {
        check_run(&format!("llama-{run}"));
    }
}
