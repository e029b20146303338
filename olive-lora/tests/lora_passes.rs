//! The passes of a workflow: Olive's names and parameters, and a chain of them.
#![expect(clippy::unwrap_used, reason = "what fails to unwrap fails the test")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use olive_core::workflow::registry::PassRegistry;
use olive_core::workflow::schema::passes;
use olive_core::{
    CancelToken, Error, HfModel, ModelHandle, NoProgress, PassConfig, PassContext, Result, Sample,
};
use olive_lora::register_passes;
use serde_json::{Value, json};

fn golden(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden/peft")
        .join(part)
}

/// As many samples as the data config says.
fn samples(data: &Value, model: &dyn ModelHandle) -> Result<Vec<Sample>> {
    let count = data["count"].as_u64().unwrap() as usize;
    let vocabulary = model.spec().vocab_size;
    let token = |i: usize, t: usize| (3 + (i * 7 + t * (1 + i % 3)) % (vocabulary - 3)) as u32;
    let sample = |i: usize| Sample::from_ids((0..24).map(|t| token(i, t)).collect());
    Ok((0..count).map(sample).collect())
}

fn registry() -> PassRegistry {
    let mut registry = PassRegistry::new();
    register_passes(&mut registry, Arc::new(samples));
    registry
}

fn run(pass: &str, model: &dyn ModelHandle, config: Value, output: &Path) -> Result<Arc<dyn ModelHandle>> {
    let registry = registry();
    let pass = registry.find(pass).unwrap();
    let config = PassConfig::new(pass.name(), pass.params(), config.as_object().unwrap())?;
    pass.check(model, &config)?;
    let context = PassContext {
        output,
        progress: &NoProgress,
        cancel: &CancelToken::default(),
    };
    pass.run(model, &config, &context)
}

fn training() -> Value {
    json!({
        "r": 4, "alpha": 8.0, "train_data_config": {"count": 8}, "eval_data_config": {"count": 2},
        "training_args": {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
    })
}

fn with(mut config: Value, extra: Value) -> Value {
    config
        .as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    config
}

#[test]
fn every_parameter_of_olive_is_there() {
    let registry = registry();
    let names: Vec<&str> = registry.iter().map(|pass| pass.name()).collect();
    assert_eq!(names, ["LoRA", "QLoRA", "DoRA", "MergeAdapterWeights"]);
    for pass in registry.iter() {
        let known = passes::find(pass.name()).unwrap();
        for param in &known.params {
            // A workflow cuts the data before the pass sees it.
            if param.name != "eval_dataset_size" {
                let own = pass.params().iter().find(|spec| spec.name == param.name);
                let own = own.unwrap_or_else(|| panic!("{} lacks {}", pass.name(), param.name));
                assert_eq!(
                    own.default.is_none(),
                    param.required,
                    "{} {}",
                    pass.name(),
                    param.name
                );
            }
        }
    }
}

#[test]
fn adapters_are_trained_and_merged_pass_by_pass() {
    let base = HfModel::open(golden("phi3")).unwrap();
    for (pass, extra, quantized) in [
        ("LoRA", json!({"target_modules": ["qkv_proj"]}), false),
        ("DoRA", json!({}), false),
        (
            "QLoRA",
            json!({"double_quant": true, "compute_dtype": "float16"}),
            true,
        ),
        ("QLoRA", json!({"quant_type": "fp4"}), true),
        ("QLoRA", json!({"save_quant_config": false}), false),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let tuned = run(
            pass,
            &base,
            with(training(), extra.clone()),
            &folder.path().join("tuned"),
        )
        .unwrap();
        assert_eq!(tuned.spec().is_quantized(), quantized, "{pass} {extra}");
        let adapter: Value =
            olive_core::fsio::read_json(tuned.adapter().unwrap().join("adapter_config.json")).unwrap();
        assert_eq!(adapter["use_dora"], json!(pass == "DoRA"));
        assert_eq!(adapter["base_model_name_or_path"], "phi3", "{pass} {extra}");
        let merged = run(
            "MergeAdapterWeights",
            &*tuned,
            json!({}),
            &folder.path().join("merged"),
        )
        .unwrap();
        assert!(!merged.spec().is_quantized() && merged.adapter().is_none());
        assert_ne!(merged.fingerprint().unwrap(), base.fingerprint().unwrap());
        if quantized {
            let config: Value = olive_core::fsio::read_json(tuned.path().join("config.json")).unwrap();
            let quantization = &config["quantization_config"];
            assert_eq!(
                quantization["bnb_4bit_use_double_quant"],
                extra["double_quant"].as_bool().unwrap_or(false)
            );
            assert_eq!(
                quantization["bnb_4bit_quant_type"],
                extra["quant_type"].as_str().unwrap_or("nf4")
            );
            let same = folder.path().join("same");
            let same = run("MergeAdapterWeights", &*tuned, json!({"layout": "same"}), &same).unwrap();
            assert!(same.spec().is_quantized());
        }
    }
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let base = HfModel::open(golden("phi3")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let refused = |pass: &str, model: &dyn ModelHandle, config: Value| -> String {
        let error = run(pass, model, config, &output).err().unwrap();
        assert!(!output.join("model_config.json").exists());
        error.to_string()
    };
    for (pass, config, named) in [
        ("MergeAdapterWeights", json!({}), "adapter"),
        ("MergeAdapterWeights", json!({"layout": "packed"}), "layout"),
        (
            "LoRA",
            with(training(), json!({"modules_to_save": ["lm_head"]})),
            "modules_to_save",
        ),
        (
            "DoRA",
            with(training(), json!({"target_modules": ["q_proj"]})),
            "q_proj",
        ),
        (
            "QLoRA",
            with(training(), json!({"quant_type": "int4"})),
            "quant_type",
        ),
        ("QLoRA", with(training(), json!({"r": 0})), "`r`"),
        ("QLoRA", json!({}), "train_data_config"),
    ] {
        let message = refused(pass, &base, config);
        assert!(message.contains(named), "{pass}: {message}");
    }
    // A packed base is trained over by LoRA, not rounded again.
    let tuned = folder.path().join("tuned");
    run("QLoRA", &base, training(), &tuned).unwrap();
    let packed = HfModel::open(tuned.join("model")).unwrap();
    assert!(refused("QLoRA", &packed, training()).contains("bitsandbytes"));
    let result = run("LoRA", &packed, training(), &folder.path().join("again"));
    assert!(
        !matches!(result, Err(Error::Unsupported { .. })),
        "{:?}",
        result.err()
    );
}
