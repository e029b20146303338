//! The stages of the lab on the demo model: quantize, a training step, build, prefill and decode.
#![expect(clippy::unwrap_used, reason = "an unwrap that fails stops the benchmark")]

use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use olive_benches::demo_model;
use olive_core::data::DataConfig;
use olive_core::decoder::Cpu;
use olive_core::text::TextTokenizer;
use olive_core::{CancelToken, HfModel, NoProgress, PassContext, Sample};
use olive_genai::{Generator, GeneratorParams, Model};
use olive_lora::{LoraOptions, TrainingArguments, TrainingData, finetune};
use olive_onnx::build::{BuilderOptions, Precision};
use olive_onnx::package::build_model_folder;
use olive_quant::{CalibrationSet, QuantizeOptions, quantize};

fn blocks(count: usize, length: usize) -> Vec<Vec<u32>> {
    let tokenizer = TextTokenizer::open(demo_model()).unwrap();
    DataConfig::default_calibration(&tokenizer, length, count).unwrap()
}

fn stage_quantize(c: &mut Criterion) {
    let model = HfModel::open(demo_model()).unwrap();
    let calibration = CalibrationSet::new(blocks(2, 512));
    let folder = tempfile::tempdir().unwrap();
    let mut group = c.benchmark_group("quantize");
    group.throughput(Throughput::Elements(calibration.tokens() as u64));
    for (name, options) in [
        ("awq", QuantizeOptions::default()),
        ("rtn", QuantizeOptions::rtn()),
    ] {
        group.bench_function(name, |b| {
            b.iter(|| {
                let output = folder.path().join(name);
                let cancel = CancelToken::default();
                let report = quantize(&model, &calibration, &options, &output, &NoProgress, &cancel).unwrap();
                assert!(report.totals.loss <= report.totals.loss_rtn);
            });
        });
    }
    group.finish();
}

fn stage_train(c: &mut Criterion) {
    let model = HfModel::open(demo_model()).unwrap();
    let samples: Vec<Sample> = blocks(4, 256).into_iter().map(Sample::from_ids).collect();
    let pairs = [
        ("max_steps", 1.into()),
        ("per_device_train_batch_size", 4.into()),
        ("save_strategy", "no".into()),
    ];
    let (arguments, _) = TrainingArguments::from_pairs(pairs).unwrap();
    let mut group = c.benchmark_group("train");
    group.throughput(Throughput::Elements(4 * 256));
    group.bench_function("step with load and save", |b| {
        b.iter(|| {
            let folder = tempfile::tempdir().unwrap();
            let output = folder.path().join("ft");
            let cancel = CancelToken::default();
            let context = PassContext {
                output: &output,
                progress: &NoProgress,
                cancel: &cancel,
            };
            let data = TrainingData {
                train: &samples,
                eval: None,
            };
            let report =
                finetune::<Cpu>(&model, data, &LoraOptions::default(), &arguments, &context).unwrap();
            assert!(report.final_loss.is_some_and(|loss| loss > 1.0 && loss < 10.0));
        });
    });
    group.finish();
}

fn build(folder: &Path, precision: Precision) {
    let model = HfModel::open(demo_model()).unwrap();
    let options = BuilderOptions::with_precision(precision);
    let report = build_model_folder(
        &model,
        None,
        &options,
        folder,
        &NoProgress,
        &CancelToken::default(),
    )
    .unwrap();
    assert!(report.model_bytes > 1 << 20);
}

fn stage_build(c: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let mut group = c.benchmark_group("build");
    for (name, precision) in [("fp32", Precision::Fp32), ("int4", Precision::Int4)] {
        group.bench_function(name, |b| b.iter(|| build(&folder.path().join(name), precision)));
    }
    group.finish();
}

fn stage_generate(c: &mut Criterion) {
    const NEW: usize = 32;
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model");
    build(&output, Precision::Int4);
    let model = Model::open(&output).unwrap();
    let prompt = blocks(1, 256).remove(0);
    let mut params = GeneratorParams::new(&model);
    params
        .set("max_length", 512.0)
        .unwrap()
        .set("min_length", 512.0)
        .unwrap();
    params.set("do_sample", false).unwrap();
    let mut group = c.benchmark_group("generate");
    group.throughput(Throughput::Elements(prompt.len() as u64));
    group.bench_function("prefill", |b| {
        b.iter(|| {
            Generator::new(&model, &params)
                .unwrap()
                .append_tokens(&prompt)
                .unwrap()
        });
    });
    group.throughput(Throughput::Elements(NEW as u64));
    let mut generator = Generator::new(&model, &params).unwrap();
    generator.append_tokens(&prompt).unwrap();
    group.bench_function("decode", |b| {
        b.iter(|| {
            generator.rewind_to(prompt.len()).unwrap();
            for _ in 0..NEW {
                generator.generate_next_token().unwrap();
            }
            assert_eq!(generator.token_count(), prompt.len() + NEW);
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = stage_quantize, stage_train, stage_build, stage_generate
}
criterion_main!(benches);
