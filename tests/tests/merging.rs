//! LoRA and DoRA on `tiny-phi3`, dense and over AWQ and NF4 bases, then merged: the result answers as base and adapter
//! did, and the report says what rounding took.

use std::path::{Path, PathBuf};

use olive_core::data::token_blocks;
use olive_core::decoder::{Cpu, DecoderLayer, Embedding, Head, SequenceTables};
use olive_core::packed::nf4::Nf4Options;
use olive_core::text::TextTokenizer;
use olive_core::{CancelToken, DType, HfModel, LinearWeight, ModelHandle, NoProgress, PassContext, Sample};
use olive_lora::{
    Adapter, LoraOptions, MergeLayout, MergeReport, QloraOptions, TrainingArguments, TrainingData, finetune,
    finetune_qlora, merge,
};
use olive_quant::{CalibrationSet, QuantizeOptions, quantize};
use olive_tests::fixture;
use serde_json::json;

/// Logits in fp32 whose weights are rounded to bfloat16 (2^-9 of each weight) after the merge, or to half precision.
const LOGITS: f32 = 0.15;

fn context(output: &Path) -> (PathBuf, CancelToken) {
    (output.to_path_buf(), CancelToken::default())
}

fn samples() -> Vec<Sample> {
    let tokenizer = TextTokenizer::open(fixture("tiny-phi3")).unwrap();
    let texts = [std::fs::read_to_string(fixture("calibration-public-domain.txt")).unwrap()];
    let blocks = token_blocks(&tokenizer, &texts, 48, Some(8)).unwrap();
    blocks.into_iter().map(Sample::from_ids).collect()
}

fn arguments() -> TrainingArguments {
    let pairs = json!({"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 5e-3});
    TrainingArguments::from_pairs(pairs.as_object().unwrap().clone())
        .unwrap()
        .0
}

fn options(use_dora: bool) -> LoraOptions {
    LoraOptions {
        r: 16,
        alpha: 16.0,
        use_dora,
        ..LoraOptions::default()
    }
}

fn train(base: &Path, use_dora: bool, output: &Path) {
    let (output, cancel) = context(output);
    let model = HfModel::open(base).unwrap();
    let train = samples();
    let data = TrainingData {
        train: &train,
        eval: None,
    };
    let context = PassContext {
        output: &output,
        progress: &NoProgress,
        cancel: &cancel,
    };
    finetune::<Cpu>(&model, data, &options(use_dora), &arguments(), &context).unwrap();
}

fn merged(tuned: &Path, layout: MergeLayout, output: &Path) -> MergeReport {
    let (output, cancel) = context(output);
    let model = HfModel::open(tuned).unwrap();
    let context = PassContext {
        output: &output,
        progress: &NoProgress,
        cancel: &cancel,
    };
    merge(&model, model.adapter().unwrap(), layout, &context).unwrap()
}

/// Logits of a folder's model, with its adapter if it names one.
fn logits(folder: &Path) -> Vec<f32> {
    let model = HfModel::open(folder).unwrap();
    let (spec, source, device) = (model.spec(), model.tensors(), Default::default());
    let adapter = model.adapter().map(|folder| Adapter::open(folder, spec).unwrap());
    let ids = &samples()[0].input_ids;
    let embedding = Embedding::<Cpu>::load(source, spec, &device).unwrap();
    let tables = SequenceTables::new(spec, ids.len(), &device);
    let mut x = embedding.forward(&[ids]).unwrap();
    for index in 0..spec.n_layers {
        let mut layer = DecoderLayer::load(source, spec, index, &device).unwrap();
        if let Some(adapter) = &adapter {
            adapter.attach(&mut layer).unwrap();
        }
        x = layer.forward(x, &tables);
    }
    let head = Head::load(source, spec, Some(&embedding), &device).unwrap();
    head.logits(x).into_data().into_vec().unwrap()
}

fn distance(a: &[f32], b: &[f32]) -> (f32, f64) {
    let off = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    let mean = off.clone().map(f64::from).sum::<f64>() / a.len() as f64;
    (off.fold(0.0, f32::max), mean)
}

/// `‖W' - W‖` over all linears of two folders.
fn weight_distance(a: &Path, b: &Path) -> f64 {
    let (a, b) = (HfModel::open(a).unwrap(), HfModel::open(b).unwrap());
    let read = |model: &HfModel, linear: &olive_core::LinearSpec| {
        LinearWeight::read(model.tensors(), model.spec(), linear)
            .unwrap()
            .weight
            .into_dense()
    };
    let mut sum = 0.0;
    for linear in (0..a.spec().n_layers).flat_map(|layer| a.spec().linears(layer)) {
        let pairs = read(&a, &linear).into_iter().zip(read(&b, &linear));
        sum += pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    }
    sum.sqrt()
}

/// Trains over `base`, merges to a dense checkpoint, and compares with base and adapter.
fn check_dense_result(base: &Path, use_dora: bool, folder: &Path) -> MergeReport {
    let (tuned, result) = (folder.join("tuned"), folder.join("merged"));
    train(base, use_dora, &tuned);
    let report = merged(&tuned, MergeLayout::Dense, &result);
    let model = HfModel::open(&result).unwrap();
    assert!(!model.spec().is_quantized() && model.adapter().is_none());
    model.check_tensors().unwrap();
    let (before, wanted, found) = (logits(base), logits(&tuned), logits(&result));
    let (worst, mean) = distance(&found, &wanted);
    let (_, change) = distance(&before, &wanted);
    eprintln!(
        "dora {use_dora}: logits within {worst:.2e}, mean {mean:.1e}; the adapter moved them by {change:.1e}"
    );
    assert!(
        change > 20.0 * mean,
        "the adapter changed too little to test: {change}"
    );
    assert!(worst <= LOGITS, "{worst}");
    report
}

#[test]
fn merged_into_a_dense_base_the_answers_are_those_of_base_and_adapter() {
    for use_dora in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let report = check_dense_result(&fixture("tiny-phi3"), use_dora, folder.path());
        assert_eq!((report.base.as_str(), report.result.as_str()), ("dense", "dense"));
        assert!((report.kept - 1.0).abs() < 0.01, "{}", report.kept);
        assert_eq!(report.modules.len(), 8);
    }
}

#[test]
fn merged_into_an_awq_base_dense_or_in_its_layout() {
    let folder = tempfile::tempdir().unwrap();
    let quantized = folder.path().join("awq");
    quantize(
        &HfModel::open(fixture("tiny-phi3")).unwrap(),
        &CalibrationSet::new(Vec::new()),
        &QuantizeOptions::rtn(),
        &quantized,
        &NoProgress,
        &CancelToken::default(),
    )
    .unwrap();
    let report = check_dense_result(&quantized, false, folder.path());
    assert_eq!((report.base.as_str(), report.result.as_str()), ("awq", "dense"));
    assert!((report.kept - 1.0).abs() < 0.01, "{}", report.kept);

    let (tuned, same) = (folder.path().join("tuned"), folder.path().join("same"));
    let report = merged(&tuned, MergeLayout::Auto, &same);
    assert_eq!((report.base.as_str(), report.result.as_str()), ("awq", "awq"));
    let model = HfModel::open(&same).unwrap();
    model.check_tensors().unwrap();
    assert!(model.spec().is_quantized() && model.adapter().is_none());
    eprintln!(
        "AWQ: {:.3} of the change kept, error {:.3}",
        report.kept, report.error
    );
    // What the report says of the error is what is in the files: distances are in units of the change.
    let dense = folder.path().join("merged");
    let change = weight_distance(&quantized, &dense);
    let error = weight_distance(&same, &dense) / change;
    assert!(
        (error / report.error - 1.0).abs() < 0.02,
        "{error} {}",
        report.error
    );
    assert!(report.kept > 0.0 && report.kept < 1.2, "{}", report.kept);
}

#[test]
fn over_an_nf4_base_the_adapter_is_trained_and_merged() {
    let folder = tempfile::tempdir().unwrap();
    let model = HfModel::open(fixture("tiny-phi3")).unwrap();
    let (tuned, cancel) = context(&folder.path().join("tuned"));
    let train = samples();
    let qlora = QloraOptions {
        rounding: Nf4Options {
            double_quant: true,
            ..Nf4Options::default()
        },
        compute_dtype: DType::BF16,
        keep_rounded: true,
    };
    let report = finetune_qlora::<Cpu>(
        &model,
        TrainingData {
            train: &train,
            eval: None,
        },
        &options(false),
        qlora,
        &arguments(),
        &PassContext {
            output: &tuned,
            progress: &NoProgress,
            cancel: &cancel,
        },
    )
    .unwrap();
    assert!(report.final_loss < report.first_loss, "{report:?}");
    let trained = HfModel::open(&tuned).unwrap();
    trained.check_tensors().unwrap();
    assert_eq!(
        trained.spec().quantization.as_ref().unwrap().quant_method,
        "bitsandbytes"
    );
    // Without target modules every linear of the layers is adapted.
    let adapter = Adapter::open(trained.adapter().unwrap(), trained.spec()).unwrap();
    assert_eq!(adapter.modules.len(), 16);
    assert!(!tuned.join(".base").exists());

    let dense = folder.path().join("dense");
    let report = merged(&tuned, MergeLayout::Auto, &dense);
    assert_eq!(
        (report.base.as_str(), report.result.as_str()),
        ("bitsandbytes", "dense")
    );
    let (worst, mean) = distance(&logits(&dense), &logits(&tuned));
    eprintln!("NF4: logits within {worst:.2e}, mean {mean:.1e}");
    assert!(worst <= LOGITS, "{worst}");

    let same = folder.path().join("same");
    let report = merged(&tuned, MergeLayout::Same, &same);
    HfModel::open(&same).unwrap().check_tensors().unwrap();
    eprintln!(
        "NF4: {:.3} of the change kept, error {:.3}",
        report.kept, report.error
    );
    let change = weight_distance(&tuned, &dense);
    let error = weight_distance(&same, &dense) / change;
    assert!(
        (error / report.error - 1.0).abs() < 0.02,
        "{error} {}",
        report.error
    );
}

/// A run that is not to keep the rounded base names the one that it was given.
#[test]
fn without_the_rounded_base_the_result_is_the_model_and_its_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let model = HfModel::open(fixture("tiny-phi3")).unwrap();
    let (output, cancel) = context(folder.path());
    let train = samples();
    let qlora = QloraOptions {
        rounding: Nf4Options::default(),
        compute_dtype: DType::F32,
        keep_rounded: false,
    };
    let options = LoraOptions {
        target_modules: Some(olive_lora::Targets::from_text("o_proj")),
        ..options(false)
    };
    let context = PassContext {
        output: &output,
        progress: &NoProgress,
        cancel: &cancel,
    };
    let data = TrainingData {
        train: &train,
        eval: None,
    };
    finetune_qlora::<Cpu>(&model, data, &options, qlora, &arguments(), &context).unwrap();
    let result = HfModel::open(&output).unwrap();
    assert!(!result.spec().is_quantized());
    assert_eq!(
        Adapter::open(result.adapter().unwrap(), result.spec())
            .unwrap()
            .modules
            .len(),
        4
    );
}
