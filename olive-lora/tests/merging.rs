//! Merging adapters: weights and logits that PEFT's `merge_and_unload` recorded (see `tests/golden/peft`).
#![expect(clippy::unwrap_used, reason = "what fails to unwrap fails the test")]

use std::path::{Path, PathBuf};

use olive_core::checkpoint::{CheckpointPlan, CheckpointWriter};
use olive_core::decoder::{Cpu, DecoderLayer, Embedding, Head, SequenceTables};
use olive_core::{
    CancelToken, Checkpoint, DType, HfModel, LinearWeight, ModelHandle, NoProgress, PassContext, QuantMatrix,
    TensorSource, WeightKind, fsio,
};
use olive_lora::{MERGE_REPORT_FILE, MergeLayout, MergeReport, merge};
use serde_json::{Map, Value, json};

fn golden(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden/peft")
        .join(part)
}

fn merged(model: &HfModel, adapter: &Path, output: &Path) -> MergeReport {
    let context = PassContext {
        output,
        progress: &NoProgress,
        cancel: &CancelToken::default(),
    };
    merge(model, adapter, MergeLayout::Auto, &context).unwrap()
}

/// The recorded prompt and logits of a folder.
fn recorded(file: &Path) -> (Vec<u32>, Vec<f32>) {
    let golden = Checkpoint::open_files(file.parent().unwrap(), vec![file.to_path_buf()]).unwrap();
    let ids = golden.bytes("input_ids").unwrap();
    let ids = ids
        .as_chunks::<8>()
        .0
        .iter()
        .map(|b| i64::from_le_bytes(*b) as u32);
    let source: &dyn TensorSource = &golden;
    (ids.collect(), source.read_f32("logits").unwrap())
}

fn logits(model: &HfModel, ids: &[u32]) -> Vec<f32> {
    let (spec, source, device) = (model.spec(), model.tensors(), Default::default());
    let embedding = Embedding::<Cpu>::load(source, spec, &device).unwrap();
    let tables = SequenceTables::new(spec, ids.len(), &device);
    let mut x = embedding.forward(&[ids]).unwrap();
    for index in 0..spec.n_layers {
        x = DecoderLayer::load(source, spec, index, &device)
            .unwrap()
            .forward(x, &tables);
    }
    let head = Head::load(source, spec, Some(&embedding), &device).unwrap();
    head.logits(x).into_data().into_vec().unwrap()
}

fn worst(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let pairs = found.iter().zip(expected);
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The checkpoint with every weight in bfloat16.
fn in_bfloat16(source: &Path, target: &Path) {
    let model = HfModel::open(source).unwrap();
    let mut plan = CheckpointPlan::default();
    for name in model.tensors().names() {
        plan.push(
            name,
            DType::BF16,
            model.tensors().require(name).unwrap().shape.clone(),
        );
    }
    let mut writer = CheckpointWriter::create(target, &plan).unwrap();
    for name in model.tensors().names() {
        let values = model.tensors().read_f32(name).unwrap();
        writer
            .write(name, &DType::BF16.from_f32(&values).unwrap())
            .unwrap();
    }
    writer.finish().unwrap();
    let mut config: Map<String, Value> = fsio::read_json(source.join("config.json")).unwrap();
    config.insert("torch_dtype".into(), "bfloat16".into());
    fsio::write_json(target.join("config.json"), &config, 2).unwrap();
}

#[test]
fn merged_weights_and_logits_are_those_of_peft() {
    for (name, base, dtype) in [
        ("patterns", "phi3", DType::F32),
        ("expression", "llama", DType::F32),
        ("dora", "llama", DType::F32),
        ("dora-half", "phi3", DType::BF16),
        ("half", "llama", DType::BF16),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let base = match dtype {
            DType::F32 => golden(base),
            _ => {
                let half = folder.path().join("half");
                in_bfloat16(&golden(base), &half);
                half
            }
        };
        let model = HfModel::open(&base).unwrap();
        let case = golden("merged").join(name);
        let output = folder.path().join("out");
        let report = merged(&model, &case.join("adapter"), &output);
        let result = HfModel::open(&output).unwrap();
        assert!(result.adapter().is_none());
        result.check_tensors().unwrap();
        let file = case.join("merged.safetensors");
        let expected = Checkpoint::open_files(&case, vec![file]).unwrap();
        assert_eq!(report.modules.len(), expected.names().len(), "{name}");
        let mut off = 0.0f32;
        for tensor in model.tensors().names() {
            let Some(info) = expected.info(tensor) else {
                assert_eq!(
                    result.tensors().bytes(tensor).unwrap(),
                    model.tensors().bytes(tensor).unwrap()
                );
                continue;
            };
            assert_eq!(
                (info, info.dtype),
                (result.tensors().info(tensor).unwrap(), dtype),
                "{name} {tensor}"
            );
            let source: &dyn TensorSource = &expected;
            let (theirs, ours) = (
                source.read_f32(tensor).unwrap(),
                result.tensors().read_f32(tensor).unwrap(),
            );
            match dtype {
                // A step of the type: sums in another order may round to the neighbour.
                DType::BF16 => {
                    for (a, b) in ours.iter().zip(&theirs) {
                        assert!((a - b).abs() <= b.abs() / 128.0, "{name} {tensor}: {a} {b}");
                    }
                    let equal = ours.iter().zip(&theirs).filter(|(a, b)| a == b).count();
                    assert!(
                        equal * 1000 >= ours.len() * 995,
                        "{name} {tensor}: {equal} of {}",
                        ours.len()
                    );
                }
                _ => {
                    let size = theirs.iter().fold(0.0f32, |most, w| most.max(w.abs()));
                    off = off.max(worst(&ours, &theirs) / size);
                }
            }
        }
        let (ids, expected) = recorded(&case.join("logits.safetensors"));
        let logits_off = worst(&logits(&result, &ids), &expected);
        eprintln!("{name}: weights within {off:.1e}, logits within {logits_off:.1e}");
        assert!(off <= 1e-6, "{name}: {off}");
        // In bfloat16 theirs are computed in bfloat16, too.
        assert!(
            logits_off <= if dtype == DType::F32 { 1e-4 } else { 0.1 },
            "{name}: {logits_off}"
        );
        assert!((report.kept - 1.0).abs() < 0.02, "{name}: {}", report.kept);
        assert!(output.join(MERGE_REPORT_FILE).is_file());
    }
}

#[test]
fn trained_adapters_merged_answer_as_base_and_adapter_did() {
    for family in ["phi3", "llama"] {
        let model = HfModel::open(golden(family)).unwrap();
        for run in ["constant", "linear", "accumulate", "decay", "dora"] {
            let folder = golden("runs").join(format!("{family}-{run}"));
            let output = tempfile::tempdir().unwrap();
            merged(&model, &folder.join("adapter_final"), output.path());
            let (ids, expected) = recorded(&folder.join("adapted_logits.safetensors"));
            let found = logits(&HfModel::open(output.path()).unwrap(), &ids);
            assert!(worst(&found, &expected) <= 1e-4, "{family} {run}");
        }
    }
}

/// Rounds every linear to 4 bits in groups of 32 and stores the model in the layout that `config` names.
fn packed_model(source: &Path, config: &Value, target: &Path) {
    let model = HfModel::open(source).unwrap();
    let (spec, tensors) = (model.spec(), model.tensors());
    let mut json: Map<String, Value> = fsio::read_json(source.join("config.json")).unwrap();
    json.insert("quantization_config".into(), config.clone());
    std::fs::create_dir_all(target).unwrap();
    fsio::write_json(target.join("config.json"), &json, 2).unwrap();
    let quantization = olive_core::arch::read_spec(target).unwrap().quantization.unwrap();
    let mut parts = Vec::new();
    for name in tensors.names() {
        let module = name.trim_end_matches(".weight");
        let linears = (0..spec.n_layers).flat_map(|layer| spec.linears(layer));
        match linears.into_iter().find(|linear| linear.name == module) {
            Some(linear) => {
                let weight = tensors.read_f32(name).unwrap();
                let shape = [linear.out_features, linear.in_features];
                let packed = WeightKind::Packed(round(&weight, shape, !quantization.symmetric));
                parts.extend(packed.store(Some(&quantization), module).unwrap());
            }
            None => {
                let info = tensors.require(name).unwrap();
                parts.push((
                    name.to_owned(),
                    info.dtype,
                    info.shape.clone(),
                    tensors.bytes(name).unwrap().into_owned(),
                ));
            }
        }
    }
    let mut plan = CheckpointPlan::default();
    for (name, dtype, shape, _) in &parts {
        plan.push(name.clone(), *dtype, shape.clone());
    }
    let mut writer = CheckpointWriter::create(target, &plan).unwrap();
    for (name, _, _, bytes) in &parts {
        writer.write(name, bytes).unwrap();
    }
    writer.finish().unwrap();
}

fn round(weight: &[f32], shape: [usize; 2], zeros: bool) -> QuantMatrix {
    let (mut codes, mut scales, mut points) = (Vec::new(), Vec::new(), Vec::new());
    for (index, group) in weight.chunks(32).enumerate() {
        let largest = group.iter().fold(0.0f32, |most, w| most.max(w.abs()));
        let scale = DType::F16.round(largest / 6.0);
        let zero = if zeros { 7 + (index % 3) as u8 } else { 8 };
        codes.extend(
            group
                .iter()
                .map(|w| ((w / scale).round() + f32::from(zero)).clamp(0.0, 15.0) as u8),
        );
        scales.push(scale);
        points.push(zero);
    }
    QuantMatrix::pack(
        shape,
        4,
        32,
        &codes,
        (scales, DType::F16),
        zeros.then_some(&points),
    )
    .unwrap()
}

#[test]
fn every_packed_layout_is_merged_into_itself_or_dense() {
    let gptq = |extra: Value| {
        let mut config = json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": false});
        config
            .as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        config
    };
    let compressed = json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": null, "weights": {
            "num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 32}}},
    });
    let adapter = golden("merged/patterns/adapter");
    for config in [
        json!({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": true}),
        gptq(json!({})),
        gptq(json!({"checkpoint_format": "gptq_v2"})),
        json!({"quant_method": "olive", "bits": 4, "group_size": 32, "symmetric": true}),
        json!({"quant_method": "olive", "bits": 4, "group_size": 32, "symmetric": false}),
        compressed,
    ] {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base");
        packed_model(&golden("phi3"), &config, &base);
        let model = HfModel::open(&base).unwrap();
        model.check_tensors().unwrap();
        let run = |layout, output: &Path| {
            let context = PassContext {
                output,
                progress: &NoProgress,
                cancel: &CancelToken::default(),
            };
            let report = merge(&model, &adapter, layout, &context).unwrap();
            let result = HfModel::open(output).unwrap();
            result.check_tensors().unwrap();
            (report, result)
        };
        let (dense_report, dense) = run(MergeLayout::Dense, &folder.path().join("dense"));
        assert!(!dense.spec().is_quantized());
        assert!(
            (dense_report.kept - 1.0).abs() < 1e-3,
            "{config}: {}",
            dense_report.kept
        );
        let (report, same) = run(MergeLayout::Auto, &folder.path().join("same"));
        assert_eq!(report.result, config["quant_method"].as_str().unwrap());
        // Names, types and shapes are the base's.
        assert_eq!(same.tensors().names(), model.tensors().names());
        for name in model.tensors().names() {
            assert_eq!(same.tensors().info(name), model.tensors().info(name), "{name}");
        }
        // This adapter changes much, so that most of it survives, and the files hold what the report says.
        let (mut change, mut error) = (0.0, 0.0);
        for linear in (0..model.spec().n_layers).flat_map(|layer| model.spec().linears(layer)) {
            let read = |model: &HfModel| {
                let weight = LinearWeight::read(model.tensors(), model.spec(), &linear).unwrap();
                weight.weight.into_dense()
            };
            let (before, wanted, found) = (read(&model), read(&dense), read(&same));
            for ((before, wanted), found) in before.iter().zip(&wanted).zip(&found) {
                change += f64::from(wanted - before).powi(2);
                error += f64::from(found - wanted).powi(2);
            }
        }
        let error = (error / change).sqrt();
        eprintln!(
            "{}: kept {:.3}, error {:.3}",
            report.base, report.kept, report.error
        );
        assert!(
            (error / report.error - 1.0).abs() < 1e-2,
            "{config}: {error} {}",
            report.error
        );
        assert!(
            report.kept > 0.8 && report.kept < 1.1,
            "{config}: {}",
            report.kept
        );
    }
}

#[test]
fn merging_again_gives_the_same_bytes_and_foreign_folders_are_kept() {
    let model = HfModel::open(golden("phi3")).unwrap();
    let adapter = golden("merged/patterns/adapter");
    let output = tempfile::tempdir().unwrap();
    let read = || std::fs::read(output.path().join("model/model.safetensors")).unwrap();
    merged(&model, &adapter, output.path());
    let first = read();
    merged(&model, &adapter, output.path());
    assert!(read() == first, "the second merge wrote other bytes");

    let foreign = tempfile::tempdir().unwrap();
    std::fs::create_dir(foreign.path().join("model")).unwrap();
    std::fs::write(foreign.path().join("model/notes.txt"), "mine").unwrap();
    let context = PassContext {
        output: foreign.path(),
        progress: &NoProgress,
        cancel: &CancelToken::default(),
    };
    let error = merge(&model, &adapter, MergeLayout::Auto, &context).unwrap_err();
    assert!(error.to_string().contains("model"), "{error}");
    assert!(foreign.path().join("model/notes.txt").is_file());

    let stopped = tempfile::tempdir().unwrap();
    let cancel = CancelToken::default();
    cancel.cancel();
    let context = PassContext {
        output: stopped.path(),
        progress: &NoProgress,
        cancel: &cancel,
    };
    assert!(matches!(
        merge(&model, &adapter, MergeLayout::Auto, &context),
        Err(olive_core::Error::Cancelled)
    ));
    assert_eq!(std::fs::read_dir(stopped.path()).unwrap().count(), 0);
}
