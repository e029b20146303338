//! Whole runs on tiny checkpoints of every family: grouped heads, fused and biased projections, tied embeddings.

use std::path::{Path, PathBuf};

use olive_core::{
    CancelToken, CheckpointPlan, CheckpointWriter, Error, HfModel, ModelHandle, NoProgress, Pass, PassConfig,
    PassContext, Progress, Result, fsio,
};

use crate::calibration::CalibrationSet;
use crate::options::{QuantizeOptions, Search};
use crate::pass::AutoAwqQuantizer;
use crate::report::QuantizeReport;
use crate::work::WORK_FOLDER;
use crate::{output, quantize};

pub(super) const FAMILIES: [&str; 5] = ["llama3-rope", "mistral", "phi3-partial", "qwen2", "qwen3"];

pub(super) fn family(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden/families")
        .join(name);
    assert!(folder.is_dir(), "{}", folder.display());
    folder
}

pub(super) fn calibration() -> CalibrationSet {
    let sequence = |seed: u32, length: u32| (0..length).map(|i| (i * i + 7 * i * seed + seed) % 64).collect();
    CalibrationSet::new(
        (1..8)
            .map(|seed| sequence(seed, if seed % 3 == 0 { 24 } else { 40 }))
            .collect(),
    )
}

fn options() -> QuantizeOptions {
    QuantizeOptions {
        group_size: 16,
        ..QuantizeOptions::default()
    }
}

fn run(model: &Path, options: &QuantizeOptions, output: &Path) -> Result<QuantizeReport> {
    let model = HfModel::open(model)?;
    quantize(
        &model,
        &calibration(),
        options,
        output,
        &NoProgress,
        &CancelToken::default(),
    )
}

/// Every file below a folder, with its bytes.
pub(super) fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut entries: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push((path.clone(), std::fs::read(&path).unwrap()));
        }
    }
    found
}

/// The bytes of the checkpoint that a run left, without the folder's own name.
pub(super) fn model_bytes(output: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = output.join(output::MODEL_FOLDER);
    let relative = |path: PathBuf| path.strip_prefix(&folder).unwrap().to_path_buf();
    files(&folder)
        .into_iter()
        .map(|(path, bytes)| (relative(path), bytes))
        .collect()
}

#[test]
fn every_family_keeps_its_function_and_is_never_worse_than_rounding() {
    for name in FAMILIES {
        for search in [Search::Exact, Search::Hybrid, Search::Fast] {
            let folder = tempfile::tempdir().unwrap();
            let options = QuantizeOptions { search, ..options() };
            let report = run(&family(name), &options, folder.path()).unwrap();
            for layer in &report.layers {
                assert!(layer.preservation_error.unwrap() <= 1e-5, "{name}");
                assert_eq!(layer.mappings.len(), 4);
                for mapping in &layer.mappings {
                    assert!(mapping.loss <= mapping.loss_rtn, "{name} {}", mapping.name);
                }
                for linear in &layer.linears {
                    assert!(
                        linear.quantized && linear.weight_error < 0.3,
                        "{name} {}",
                        linear.name
                    );
                    assert!(linear.clip.is_none_or(|clip| clip.gain >= 0.0));
                }
            }
            let written = HfModel::open(folder.path()).unwrap();
            written.check_tensors().unwrap();
            assert!(written.spec().is_quantized());
            assert!(!folder.path().join(WORK_FOLDER).exists());
        }
    }
}

#[test]
fn the_configs_are_those_that_autoawq_and_olive_write() {
    let folder = tempfile::tempdir().unwrap();
    run(&family("qwen2"), &options(), folder.path()).unwrap();
    let config: serde_json::Value = fsio::read_json(folder.path().join("model/config.json")).unwrap();
    let expected = serde_json::json!({
        "bits": 4, "group_size": 16, "modules_to_not_convert": null, "quant_method": "awq", "version": "gemm",
        "zero_point": true,
    });
    assert_eq!(config["quantization_config"], expected);
    assert_eq!(config["torch_dtype"], "float16");
    let config: serde_json::Value = fsio::read_json(folder.path().join("model_config.json")).unwrap();
    assert_eq!(config["config"]["model_path"], "model");
}

/// Asks for a stop once `after` layers are done.
pub(super) struct StopAfter<'a> {
    pub after: u64,
    pub cancel: &'a CancelToken,
}

impl Progress for StopAfter<'_> {
    fn start(&self, _stage: &str, _total: u64) {}

    fn update(&self, done: u64, _note: &str) {
        if done >= self.after {
            self.cancel.cancel();
        }
    }

    fn finish(&self) {}
}

#[test]
fn an_interrupted_run_goes_on_to_the_same_bytes() {
    let model = HfModel::open(family("mistral")).unwrap();
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [whole, resumed] = [folders[0].path(), folders[1].path()];
    run(model.path(), &options(), whole).unwrap();
    let cancel = CancelToken::default();
    let stop = StopAfter {
        after: 1,
        cancel: &cancel,
    };
    let error = quantize(&model, &calibration(), &options(), resumed, &stop, &cancel).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    assert!(resumed.join(WORK_FOLDER).join("layer-000/report.json").is_file());
    assert!(!resumed.join("model").exists());
    // A layer without its report counts as unfinished, whatever else is there.
    std::fs::create_dir_all(resumed.join(WORK_FOLDER).join("layer-001")).unwrap();
    std::fs::write(
        resumed.join(WORK_FOLDER).join("layer-001/model.safetensors"),
        b"half",
    )
    .unwrap();
    run(model.path(), &options(), resumed).unwrap();
    assert!(model_bytes(whole) == model_bytes(resumed));
    assert!(!resumed.join(WORK_FOLDER).exists());
}

#[test]
fn unfinished_work_of_another_request_is_not_used() {
    let model = HfModel::open(family("mistral")).unwrap();
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let cancel = CancelToken::default();
    let stop = StopAfter {
        after: 1,
        cancel: &cancel,
    };
    let other = QuantizeOptions {
        clip: false,
        ..options()
    };
    quantize(&model, &calibration(), &other, folders[0].path(), &stop, &cancel).unwrap_err();
    run(model.path(), &options(), folders[0].path()).unwrap();
    run(model.path(), &options(), folders[1].path()).unwrap();
    assert!(model_bytes(folders[0].path()) == model_bytes(folders[1].path()));
}

#[test]
fn the_number_of_threads_does_not_change_a_byte() {
    for name in ["phi3-partial", "qwen2"] {
        let results = [1, 2, 5].map(|threads| {
            let folder = tempfile::tempdir().unwrap();
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| run(&family(name), &options(), folder.path()))
                .unwrap();
            model_bytes(folder.path())
        });
        assert!(results[0] == results[1] && results[1] == results[2], "{name}");
    }
}

#[test]
fn the_order_of_the_calibration_changes_rounding_at_most() {
    let model = HfModel::open(family("mistral")).unwrap();
    let losses = [false, true].map(|reversed| {
        let mut calibration = calibration();
        if reversed {
            calibration.sequences.reverse();
        }
        let folder = tempfile::tempdir().unwrap();
        let report = quantize(
            &model,
            &calibration,
            &options(),
            folder.path(),
            &NoProgress,
            &CancelToken::default(),
        );
        report.unwrap().totals.loss
    });
    assert!((losses[0] / losses[1] - 1.0).abs() < 1e-4, "{losses:?}");
}

#[test]
fn rounding_to_nearest_needs_no_calibration_and_modules_can_stay_dense() {
    let folder = tempfile::tempdir().unwrap();
    let model = HfModel::open(family("qwen3")).unwrap();
    let options = QuantizeOptions {
        group_size: 16,
        modules_to_not_convert: vec!["down_proj".to_owned()],
        ..QuantizeOptions::rtn()
    };
    let none = CalibrationSet::default();
    let report = quantize(
        &model,
        &none,
        &options,
        folder.path(),
        &NoProgress,
        &CancelToken::default(),
    )
    .unwrap();
    assert_eq!(report.totals.quantized_linears, 2 * 6);
    let written = HfModel::open(folder.path()).unwrap();
    written.check_tensors().unwrap();
    assert!(
        written
            .tensors()
            .info("model.layers.0.mlp.down_proj.weight")
            .is_some()
    );
}

/// A copy of a family's folder with one tensor's bytes changed.
pub(super) fn changed(name: &str, tensor: &str, change: impl Fn(&mut Vec<f32>)) -> tempfile::TempDir {
    let (source, folder) = (HfModel::open(family(name)).unwrap(), tempfile::tempdir().unwrap());
    for file in source.companion_files().unwrap() {
        std::fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
    }
    let mut plan = CheckpointPlan::default();
    for (name, shape) in source.spec().dense_tensors() {
        plan.push(name, olive_core::DType::F32, shape);
    }
    let mut writer = CheckpointWriter::create(folder.path(), &plan).unwrap();
    for (name, _) in &plan.tensors {
        let mut values = source.tensors().read_f32(name).unwrap();
        if name == tensor {
            change(&mut values);
        }
        writer.write(name, bytemuck::cast_slice(&values)).unwrap();
    }
    writer.finish().unwrap();
    folder
}

#[test]
fn weights_that_cannot_be_quantized_are_named_and_nothing_is_left() {
    let weight = "model.layers.1.mlp.up_proj.weight";
    let norm = "model.layers.1.input_layernorm.weight";
    for (tensor, value) in [
        (weight, f32::NAN),
        (weight, f32::INFINITY),
        (norm, f32::NAN),
        (norm, 1e9),
    ] {
        let model = changed("mistral", tensor, |values| values[3] = value);
        let parent = tempfile::tempdir().unwrap();
        let output = parent.path().join("out");
        let error = run(
            model.path(),
            &QuantizeOptions {
                algorithm: crate::Algorithm::Rtn,
                ..options()
            },
            &output,
        );
        let error = error.unwrap_err().to_string();
        assert!(error.contains(tensor), "{error}");
        assert!(!output.exists());
    }
}

#[test]
fn silent_channels_and_constant_groups_are_quantized_well() {
    let zeroed = changed("mistral", "model.layers.0.input_layernorm.weight", |values| {
        values[5] = 0.0
    });
    let constant = changed("mistral", "model.layers.0.mlp.down_proj.weight", |values| {
        values[..32].fill(0.25)
    });
    for model in [zeroed, constant] {
        let folder = tempfile::tempdir().unwrap();
        let report = run(model.path(), &options(), folder.path()).unwrap();
        assert!(
            report
                .layers
                .iter()
                .flat_map(|layer| &layer.linears)
                .all(|linear| linear.weight_error < 0.3)
        );
    }
}

#[test]
fn wrong_requests_are_refused_before_anything_is_written() {
    let (model, parent) = (family("mistral"), tempfile::tempdir().unwrap());
    let output = parent.path().join("out");
    let refuse = |options: QuantizeOptions| {
        let error = run(&model, &options, &output).unwrap_err();
        assert!(!output.exists());
        error.to_string()
    };
    let group = refuse(QuantizeOptions {
        group_size: 24,
        ..options()
    });
    assert!(
        group.contains("group size 24") && group.contains("q_proj"),
        "{group}"
    );
    assert!(refuse(QuantizeOptions { bits: 3, ..options() }).contains("`bits`"));
    assert!(
        refuse(QuantizeOptions {
            zero_point: false,
            ..options()
        })
        .contains("`zero_point`")
    );
    let handle = HfModel::open(&model).unwrap();
    let beyond = CalibrationSet::new(vec![vec![1, 2, 96]]);
    for calibration in [CalibrationSet::default(), beyond] {
        let error = quantize(
            &handle,
            &calibration,
            &options(),
            &output,
            &NoProgress,
            &CancelToken::default(),
        );
        assert!(error.unwrap_err().to_string().contains("calibration"));
        assert!(!output.exists());
    }
}

#[test]
fn an_earlier_result_survives_a_failed_run_and_strange_folders_are_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    run(&family("mistral"), &options(), folder.path()).unwrap();
    let before = files(folder.path());
    let bad = changed("mistral", "model.norm.weight", |values| values[0] = 1e9);
    run(bad.path(), &options(), folder.path()).unwrap_err();
    assert!(files(folder.path()) == before);
    // Its own result is no dense model any more, and must not be replaced by itself.
    assert!(run(folder.path(), &options(), folder.path()).is_err());
    assert!(run(folder.path(), &options(), &folder.path().join("again")).is_err());
    let strange = tempfile::tempdir().unwrap();
    std::fs::create_dir(strange.path().join("model")).unwrap();
    assert!(run(&family("mistral"), &options(), strange.path()).is_err());
    assert_eq!(std::fs::read_dir(strange.path()).unwrap().count(), 1);
}

#[test]
fn the_pass_takes_olives_parameters() {
    let model = HfModel::open(family("mistral")).unwrap();
    let pass = AutoAwqQuantizer::new(std::sync::Arc::new(|_, _| Ok(calibration())));
    let given = serde_json::json!({"q_group_size": 16, "version": "GEMM"});
    let folder = tempfile::tempdir().unwrap();
    let config = PassConfig::new("t", pass.params(), given.as_object().unwrap()).unwrap();
    pass.check(&model, &config).unwrap();
    let context = PassContext {
        output: folder.path(),
        progress: &NoProgress,
        cancel: &CancelToken::default(),
    };
    let result = pass.run(&model, &config, &context).unwrap();
    assert!(result.spec().is_quantized());
}
