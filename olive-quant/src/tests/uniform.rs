//! Whole runs to Olive's layout on tiny checkpoints of every family.

use std::path::Path;
use std::sync::Arc;

use olive_core::arch::ModuleQuantization;
use olive_core::decoder::{Cpu, evaluate_perplexity};
use olive_core::workflow::registry::PassRegistry;
use olive_core::{
    CancelToken, Error, HfModel, ModelHandle, NoProgress, Pass, PassConfig, PassContext, Progress, Result,
    fsio,
};
use serde_json::{Map, Value, json};

use super::runs::{FAMILIES, StopAfter, calibration, changed, family, files, model_bytes};
use crate::calibration::CalibrationSet;
use crate::olive_layout::{Rounding, UniformOptions, UniformReport, quantize_uniform};
use crate::work::WORK_FOLDER;
use crate::{QuantizeOptions, quantize};

const ROUNDINGS: [Rounding; 3] = [Rounding::Nearest, Rounding::KQuant, Rounding::GPTQ];

fn options(rounding: Rounding, bits: usize, group_size: i64, symmetric: bool) -> UniformOptions {
    UniformOptions {
        settings: ModuleQuantization {
            bits,
            group_size,
            symmetric,
        },
        ..UniformOptions::new(rounding)
    }
}

fn run_with(
    model: &Path,
    options: &UniformOptions,
    output: &Path,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<UniformReport> {
    quantize_uniform(
        &HfModel::open(model)?,
        &calibration(),
        options,
        output,
        progress,
        cancel,
    )
}

fn run(model: &Path, options: &UniformOptions, output: &Path) -> Result<UniformReport> {
    run_with(model, options, output, &NoProgress, &CancelToken::default())
}

fn loss(model: &Path) -> f64 {
    let model = HfModel::open(model).unwrap();
    let blocks = &calibration().sequences;
    let none = CancelToken::default();
    let found = evaluate_perplexity::<Cpu>(&model, blocks, None, &NoProgress, &none);
    found.unwrap().loss
}

fn config(output: &Path) -> Map<String, Value> {
    fsio::read_json(output.join("model/config.json")).unwrap()
}

fn object(value: Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap()
}

#[test]
fn every_family_is_quantized_readable_and_nearly_the_same_with_8_bits() {
    for name in FAMILIES {
        let dense = loss(&family(name));
        for rounding in ROUNDINGS {
            for (bits, group_size, symmetric) in
                [(8, 16, false), (8, -1, true), (4, 16, true), (4, -1, false)]
            {
                let folder = tempfile::tempdir().unwrap();
                let mut options = options(rounding, bits, group_size, symmetric);
                options.lm_head = true;
                options.embeds = !rounding.calibrates();
                let report = run(&family(name), &options, folder.path()).unwrap();
                let written = HfModel::open(folder.path()).unwrap();
                written.check_tensors().unwrap();
                let what = format!("{name} {rounding:?} {bits} {group_size} {symmetric}");
                let most = if bits == 8 { 0.01 } else { 0.15 };
                // GPTQ moves weights away from their nearest integers to make up for others.
                let most = if rounding.calibrates() { 3.0 * most } else { most };
                for linear in &report.linears {
                    assert_eq!((linear.bits, linear.symmetric), (bits, symmetric), "{what}");
                    assert!(linear.weight_error < most, "{what}: {linear:?}");
                    assert!(linear.loss <= linear.loss_rtn, "{what}: {linear:?}");
                    assert_eq!(linear.loss.is_some(), rounding.calibrates());
                }
                if bits == 8 {
                    let found = loss(folder.path());
                    assert!((found - dense).abs() < 0.02, "{what}: {found} after {dense}");
                }
                assert!(!folder.path().join(WORK_FOLDER).exists());
            }
        }
    }
}

#[test]
fn an_interrupted_run_goes_on_to_the_same_bytes_after_every_part() {
    for (name, rounding) in [
        ("mistral", Rounding::GPTQ),
        ("qwen2", Rounding::GPTQ),
        ("qwen3", Rounding::KQuant),
    ] {
        let mut options = options(rounding, 4, 16, false);
        options.lm_head = true;
        options.modules_to_not_convert = vec!["layers.0.self_attn.o_proj".to_owned()];
        let whole = tempfile::tempdir().unwrap();
        run(&family(name), &options, whole.path()).unwrap();
        // Embedding, two layers, head.
        for after in 1..=3 {
            let resumed = tempfile::tempdir().unwrap();
            let cancel = CancelToken::default();
            let stop = StopAfter {
                after,
                cancel: &cancel,
            };
            let error = run_with(&family(name), &options, resumed.path(), &stop, &cancel).unwrap_err();
            assert!(matches!(error, Error::Cancelled), "{error}");
            assert!(!resumed.path().join("model").exists());
            assert_eq!(
                resumed.path().join(WORK_FOLDER).join("layer-000.json").exists(),
                after > 1
            );
            run(&family(name), &options, resumed.path()).unwrap();
            assert!(
                model_bytes(whole.path()) == model_bytes(resumed.path()),
                "{name} {after}"
            );
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_byte() {
    for rounding in ROUNDINGS {
        let results = [1, 3].map(|threads| {
            let folder = tempfile::tempdir().unwrap();
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let options = options(rounding, 4, 16, false);
            pool.install(|| run(&family("phi3-partial"), &options, folder.path()))
                .unwrap();
            model_bytes(folder.path())
        });
        assert!(results[0] == results[1], "{rounding:?}");
    }
}

#[test]
fn a_tied_head_parts_from_the_embedding_unless_one_table_serves_both() {
    let cases = [
        (true, false, json!({}), false),
        (true, true, json!({}), true),
        (true, true, json!({"lm_head": {"group_size": 32}}), false),
        (true, true, json!({"lm_head": {"bits": 16}}), false),
        (false, true, json!({}), false),
    ];
    for (lm_head, embeds, overrides, one_table) in cases {
        let folder = tempfile::tempdir().unwrap();
        let mut own = options(Rounding::Nearest, 8, 16, false);
        (own.lm_head, own.embeds, own.overrides) = (lm_head, embeds, object(overrides));
        run(&family("qwen2"), &own, folder.path()).unwrap();
        let written = HfModel::open(folder.path()).unwrap();
        written.check_tensors().unwrap();
        assert_eq!(written.spec().tie_word_embeddings, one_table);
        assert_eq!(config(folder.path())["tie_word_embeddings"], json!(false));
        let found = loss(folder.path());
        assert!((found - loss(&family("qwen2"))).abs() < 0.02);
    }
    // Neither: the model stays as it was.
    let folder = tempfile::tempdir().unwrap();
    run(
        &family("qwen2"),
        &options(Rounding::GPTQ, 8, 16, false),
        folder.path(),
    )
    .unwrap();
    let written = HfModel::open(folder.path()).unwrap();
    assert!(written.spec().tie_word_embeddings);
    assert_eq!(config(folder.path())["tie_word_embeddings"], json!(true));
}

#[test]
fn query_key_and_value_share_the_finest_settings() {
    let folder = tempfile::tempdir().unwrap();
    let mut own = options(Rounding::Nearest, 4, 32, false);
    own.overrides = object(json!({
        "model.layers.0.self_attn.k_proj": {"bits": 8},
        "model.layers.1.self_attn.v_proj": {"group_size": 16},
        "model.layers.1.self_attn.q_proj": {"group_size": -1},
    }));
    let report = run(&family("mistral"), &own, folder.path()).unwrap();
    for linear in &report.linears {
        let qkv = ["q_proj", "k_proj", "v_proj"]
            .iter()
            .any(|name| linear.name.ends_with(name));
        let wanted = match (qkv, linear.name.contains("layers.0")) {
            (true, true) => (8, 32),
            (true, false) => (4, 16),
            _ => (4, 32),
        };
        assert_eq!((linear.bits, linear.group_size), wanted, "{}", linear.name);
    }
    HfModel::open(folder.path()).unwrap().check_tensors().unwrap();
}

fn pass(registry: &PassRegistry, name: &str, given: Value, model: &Path, output: &Path) -> Result<()> {
    let pass: &dyn Pass = registry.find(name).unwrap();
    let config = PassConfig::new("t", pass.params(), given.as_object().unwrap())?;
    let model = HfModel::open(model)?;
    pass.check(&model, &config)?;
    let context = PassContext {
        output,
        progress: &NoProgress,
        cancel: &CancelToken::default(),
    };
    pass.run(&model, &config, &context).map(|_| ())
}

fn registry() -> PassRegistry {
    let mut registry = PassRegistry::new();
    let provider: crate::CalibrationProvider = Arc::new(|_, _| Ok(calibration()));
    crate::register_passes(&mut registry, &provider);
    registry
}

/// The chain of Olive's recipes: choose, calibrate the layers, round what is left.
#[test]
fn a_second_pass_fills_what_the_first_left_dense() {
    for name in ["mistral", "qwen2"] {
        let folder = tempfile::tempdir().unwrap();
        let [chosen, layers, all] = ["a", "b", "c"].map(|part| folder.path().join(part));
        let registry = registry();
        let run = |pass_name: &str, given: Value, from: &Path, to: &Path| {
            pass(&registry, pass_name, given, from, to).unwrap();
        };
        let choice = json!({"algorithm": "k_quant_mixed"});
        run("SelectiveMixedPrecision", choice, &family(name), &chosen);
        run("Gptq", json!({"group_size": 16}), &chosen, &layers);
        let ends = json!({"bits": 8, "group_size": 32, "lm_head": true, "embeds": true,
            "overrides": {"lm_head": {"bits": 8}, "model.embed_tokens": {"bits": 8}}});
        run("Rtn", ends, &layers, &all);
        let (before, after) = (HfModel::open(&layers).unwrap(), HfModel::open(&all).unwrap());
        after.check_tensors().unwrap();
        let part = "model.layers.1.mlp.gate_proj.weight_qweight";
        let bytes = |model: &HfModel| model.tensors().bytes(part).unwrap().into_owned();
        assert_eq!(bytes(&before), bytes(&after));
        let quantization = after.spec().quantization.clone().unwrap();
        let settings = |module: &str| {
            let own = quantization.module(module).unwrap();
            (own.bits, own.group_size)
        };
        assert_eq!(settings("model.layers.1.mlp.gate_proj"), (4, 16));
        // The first of two layers is one that the rule promotes.
        assert_eq!(settings("model.layers.0.mlp.down_proj"), (8, 16));
        assert_eq!(settings("model.embed_tokens"), (8, 32));
        assert_eq!(settings("lm_head"), (8, 32));
        let config = config(&all);
        assert_eq!(config["quantization_config"]["lm_head"], json!(true));
        assert_eq!(config["quantization_config"]["embeds"], json!(true));
        let dense = loss(&family(name));
        assert!((loss(&all) - dense).abs() < 0.5, "{} {dense}", loss(&all));
    }
}

#[test]
fn an_exclusion_ends_once_the_module_is_packed() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["a", "b"].map(|part| folder.path().join(part));
    let mut own = options(Rounding::GPTQ, 4, 16, false);
    own.modules_to_not_convert = vec!["down_proj".to_owned()];
    run(&family("mistral"), &own, &first).unwrap();
    let exclusions = |output: &Path| config(output)["quantization_config"]["modules_to_not_convert"].clone();
    assert_eq!(exclusions(&first), json!(["down_proj"]));
    run(&first, &options(Rounding::Nearest, 8, 16, true), &second).unwrap();
    assert_eq!(exclusions(&second), Value::Null);
    let written = HfModel::open(&second).unwrap();
    written.check_tensors().unwrap();
    let own = written
        .spec()
        .quantization
        .clone()
        .unwrap()
        .module("model.layers.1.mlp.down_proj");
    assert_eq!(own.map(|own| (own.bits, own.symmetric)).unwrap(), (8, true));
}

#[test]
fn wrong_requests_are_refused_by_name_before_anything_is_written() {
    let parent = tempfile::tempdir().unwrap();
    let output = parent.path().join("out");
    let refuse = |model: &Path, options: UniformOptions| {
        let error = run(model, &options, &output).unwrap_err().to_string();
        assert!(!output.exists(), "{error}");
        error
    };
    let mistral = family("mistral");
    let group = refuse(&mistral, options(Rounding::Nearest, 4, 24, false));
    assert!(group.contains("q_proj") && group.contains("24"), "{group}");
    let bits = refuse(&mistral, options(Rounding::Nearest, 3, 16, false));
    assert!(bits.contains("3 bits"), "{bits}");
    let mut typo = options(Rounding::Nearest, 4, 16, false);
    typo.overrides = object(json!({"lm_head": {"bitz": 8}}));
    typo.lm_head = true;
    assert!(refuse(&mistral, typo).contains("`bits`"));
    let norm = "model.layers.1.input_layernorm.weight";
    let weight = "model.layers.1.mlp.up_proj.weight";
    for tensor in [norm, weight] {
        let model = changed("mistral", tensor, |values| values[3] = f32::NAN);
        let error = refuse(model.path(), options(Rounding::Nearest, 4, 16, false));
        assert!(error.contains(tensor), "{error}");
    }
    let packed = parent.path().join("packed");
    run(&mistral, &options(Rounding::Nearest, 4, 16, false), &packed).unwrap();
    let error = refuse(&packed, options(Rounding::GPTQ, 4, 16, false));
    assert!(error.contains("quantized already"), "{error}");
    let awq = parent.path().join("awq");
    let rtn = QuantizeOptions {
        group_size: 16,
        ..QuantizeOptions::rtn()
    };
    let model = HfModel::open(&mistral).unwrap();
    let none = CancelToken::default();
    quantize(&model, &CalibrationSet::default(), &rtn, &awq, &NoProgress, &none).unwrap();
    let error = refuse(&awq, options(Rounding::Nearest, 4, 16, false));
    assert!(error.contains("awq"), "{error}");
}

#[test]
fn an_earlier_result_survives_a_failed_run() {
    let folder = tempfile::tempdir().unwrap();
    let good = options(Rounding::Nearest, 4, 16, false);
    run(&family("mistral"), &good, folder.path()).unwrap();
    let before = files(folder.path());
    let bad = changed("mistral", "model.norm.weight", |values| values[0] = f32::INFINITY);
    run(bad.path(), &good, folder.path()).unwrap_err();
    assert!(files(folder.path()) == before);
    assert!(run(folder.path(), &good, folder.path()).is_err());
    assert!(files(folder.path()) == before);
}

#[test]
fn the_registry_holds_olives_quantizers_with_their_parameters() {
    let known: Map<String, Value> = match shared_parameters() {
        Some(known) => known,
        None => return,
    };
    for name in [
        "AutoAWQQuantizer",
        "Rtn",
        "Gptq",
        "KQuant",
        "SelectiveMixedPrecision",
    ] {
        let registry = registry();
        let pass = registry.find(name).unwrap();
        let theirs = object(known[name]["params"].clone());
        let mut theirs: Vec<&String> = theirs.keys().collect();
        let mut ours: Vec<&str> = pass.params().iter().map(|spec| spec.name).collect();
        // The one parameter that Olive does not have.
        ours.retain(|own| *own != "awq_search");
        theirs.sort();
        ours.sort_unstable();
        assert_eq!(ours, theirs, "{name}");
        for spec in pass.params() {
            let values = spec.search.iter().chain(&spec.default);
            for value in values {
                serde_json::from_str::<Value>(value).unwrap();
            }
        }
    }
}

/// The parameters of Olive's head, where they are at hand.
fn shared_parameters() -> Option<Map<String, Value>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/golden/olive/passes.json");
    let found = fsio::read_json(&path);
    if found.is_err() {
        eprintln!("SKIPPED: {} is not here", path.display());
    }
    found.ok()
}
