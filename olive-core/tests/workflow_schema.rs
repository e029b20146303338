//! Workflow files that people use, and what is refused in them.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed expectation in a test is a failed test"
)]

use std::path::{Path, PathBuf};

use olive_core::workflow::plan::Plan;
use olive_core::workflow::registry::PassRegistry;
use olive_core::workflow::schema::document::Document;
use olive_core::workflow::schema::{ModelType, RunConfig, SystemKind};
use serde_json::{Map, Value, json};

/// The folder of shared test material; `None`, loudly, where it is absent.
fn shared() -> Option<PathBuf> {
    let folder = match std::env::var_os("OLIVE_SHARED") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared"),
    };
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("SKIPPED: `{}` is absent", folder.display());
    None
}

fn recipes() -> Vec<(PathBuf, Value)> {
    let Some(shared) = shared() else { return Vec::new() };
    let mut recipes: Vec<_> = std::fs::read_dir(shared.join("recipes"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            (path, value)
        })
        .collect();
    recipes.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(recipes.len() >= 20);
    recipes
}

#[test]
fn every_recipe_parses() {
    for (path, _) in recipes() {
        let config = RunConfig::read(&path).unwrap_or_else(|e| panic!("{e}"));
        assert!(!config.passes.is_empty());
        assert!(matches!(config.input_model.kind, ModelType::Hf | ModelType::Onnx));
        assert!(config.systems.iter().all(|(_, s)| s.kind == SystemKind::Local));
    }
}

/// Paths of all keys of a document, as the steps that lead to each.
fn keys(value: &Value, at: &mut Vec<String>, found: &mut Vec<Vec<String>>) {
    match value {
        Value::Object(object) => {
            for (key, entry) in object {
                at.push(key.clone());
                found.push(at.clone());
                keys(entry, at, found);
                at.pop();
            }
        }
        Value::Array(list) => {
            for (index, entry) in list.iter().enumerate() {
                at.push(format!("[{index}]"));
                keys(entry, at, found);
                at.pop();
            }
        }
        _ => {}
    }
}

/// The document with the key at `path` renamed; the order of keys stays.
fn renamed(value: &Value, path: &[String], to: &str) -> Value {
    let [step, rest @ ..] = path else {
        return value.clone();
    };
    match value {
        Value::Object(object) => {
            let entries = object.iter().map(|(key, entry)| match (key == step, rest) {
                (true, []) => (to.to_owned(), entry.clone()),
                (true, rest) => (key.clone(), renamed(entry, rest, to)),
                (false, _) => (key.clone(), entry.clone()),
            });
            Value::Object(entries.collect::<Map<_, _>>())
        }
        Value::Array(list) => {
            let entries = list.iter().enumerate().map(|(index, entry)| {
                if *step == format!("[{index}]") {
                    renamed(entry, rest, to)
                } else {
                    entry.clone()
                }
            });
            Value::Array(entries.collect())
        }
        other => other.clone(),
    }
}

/// Maps whose keys are the user's own names: another name there is as good as the first.
const FREE: &[&[&str]] = &[
    &["systems"],
    &["evaluators"],
    &["passes"],
    &["passes", "*", "overrides"],
    &["passes", "*", "customized_weight_config"],
    &["evaluators", "*", "tasks", "*", "metadata"],
];

fn is_free(path: &[String]) -> bool {
    let Some((_, parent)) = path.split_last() else {
        return false;
    };
    FREE.iter().any(|free| {
        free.len() == parent.len()
            && free
                .iter()
                .zip(parent)
                .all(|(want, step)| *want == "*" || want == step)
    })
}

#[test]
fn one_changed_key_is_refused_by_name() {
    let (mut refused, mut free) = (0, 0);
    for (path, value) in recipes() {
        let mut all = Vec::new();
        keys(&value, &mut Vec::new(), &mut all);
        for key in all {
            let Some(last) = key.last() else { continue };
            for name in [
                format!("{last}x"),
                format!("zz_{last}"),
                last[..last.len() - 1].to_owned(),
            ] {
                let changed = renamed(&value, &key, &name);
                if name.is_empty() || changed == value {
                    continue;
                }
                let document = Document::from_value("recipe.json", path.parent().unwrap(), changed);
                let result = RunConfig::from_document(&document);
                let plan = result.and_then(|config| Plan::new(&config, &PassRegistry::new()));
                if is_free(&key) {
                    free += 1;
                    continue;
                }
                let Err(error) = plan else {
                    panic!("{}: {key:?} → `{name}` is accepted", path.display())
                };
                let text = error.to_string();
                assert!(
                    text.contains(&format!("{name}`")),
                    "{}: {key:?} → `{name}`: {text}",
                    path.display()
                );
                assert!(error.is_usage(), "{text}");
                refused += 1;
            }
        }
    }
    if shared().is_some() {
        assert!(refused > 1500 && free > 100, "{refused} refused, {free} free");
    }
}

fn read(value: Value) -> olive_core::Result<RunConfig> {
    RunConfig::from_document(&Document::from_value("t.json", "/nowhere", value))
}

#[test]
fn nested_and_flat_forms_say_the_same() {
    let nested = json!({
        "input_model": {"type": "hfmodel", "config": {"model_path": "org/name", "load_kwargs": {"torch_dtype": "float16"}}},
        "systems": {"s": {"type": "localsystem", "config": {"accelerators": [{"device": "gpu"}]}}},
        "data_configs": [{"name": "d", "type": "HuggingfaceContainer",
            "load_dataset_config": {"type": "huggingface_dataset", "params": {"data_name": "json", "data_files": "x.json"}}}],
        "passes": {"m": {"type": "MODELBUILDER", "config": {"precision": "INT4"}}},
        "engine": {"config": {"target": "s", "output_dir": "out", "search_strategy": false}}
    });
    let flat = json!({
        "input_model": {"type": "HfModel", "model_path": "org/name", "load_kwargs": {"torch_dtype": "float16"}},
        "systems": {"s": {"type": "LocalSystem", "accelerators": [{"device": "gpu"}]}},
        "data_configs": [{"name": "d", "type": "HuggingfaceContainer",
            "load_dataset_config": {"type": "huggingface_dataset", "data_name": "json", "data_files": "x.json"}}],
        "passes": {"m": [{"type": "ModelBuilder", "precision": "int4"}]},
        "target": "s", "output_dir": "out", "search_strategy": false
    });
    let (nested, flat) = (read(nested).unwrap(), read(flat).unwrap());
    assert_eq!(nested.passes[0].1[0].given, flat.passes[0].1[0].given);
    assert_eq!(nested.passes[0].1[0].kind, "ModelBuilder");
    assert_eq!(nested.systems, flat.systems);
    assert_eq!(nested.systems[0].1.accelerator.to_string(), "gpu-cuda");
    assert_eq!(nested.data_configs, flat.data_configs);
    assert_eq!(nested.data_configs[0].files, [PathBuf::from("/nowhere/x.json")]);
    assert_eq!(nested.engine.output_dir, flat.engine.output_dir);
    assert_eq!(nested.engine.output_dir, Some(PathBuf::from("/nowhere/out")));
    assert!(nested.warnings.is_empty(), "{:?}", nested.warnings);
}

#[test]
fn errors_name_the_key_as_it_is_written() {
    let base =
        |pass: Value| json!({"input_model": {"type": "HfModel", "model_path": "a/b"}, "passes": {"m": pass}});
    let refuse = |value: Value| read(value).unwrap_err().to_string();
    let error = refuse(base(
        json!({"type": "ModelBuilder", "config": {"precison": "int4"}}),
    ));
    assert_eq!(
        error,
        "t.json: unknown key `passes.m.config.precison`, did you mean `precision`?"
    );
    let error = refuse(base(json!({"type": "ModelBuilder", "precision": "int5"})));
    assert!(
        error.contains("`passes.m.precision`: expected one of int4"),
        "{error}"
    );
    let error = refuse(base(json!({"type": "Gptq", "bits": "many"})));
    assert!(
        error.contains("`passes.m.bits`: expected a whole number"),
        "{error}"
    );
    let mut two = base(json!({"type": "Gptq"}));
    two["engine"] = json!({"output_dir": "a", "cache_dri": "b"});
    let error = refuse(two);
    assert!(
        error.contains("`engine.cache_dri`, did you mean `cache_dir`?"),
        "{error}"
    );
    let error = refuse(json!({"input_model": {"type": "HfModle", "model_path": "x"}}));
    assert!(error.contains("`HfModel`"), "{error}");
    let template = json!({"input_model": {"type": "HfModel", "model_path": "a/b"}, "data_configs": [
        {"name": "d", "pre_process_data_config": {"text_template": "{Best Answer}\n{phrase"}}]});
    assert!(refuse(template).contains("text_template"));
}

#[test]
fn every_recipe_plans_and_says_why_it_cannot_run() {
    for (path, value) in recipes() {
        let config = RunConfig::read(&path).unwrap();
        let plan = Plan::new(&config, &PassRegistry::new()).unwrap_or_else(|e| panic!("{e}"));
        let text = plan.to_string();
        for pass in value["passes"].as_object().unwrap().values() {
            let kind = pass["type"].as_str().unwrap().to_ascii_lowercase();
            assert!(text.to_ascii_lowercase().contains(&kind), "{text}");
        }
        assert!(
            text.contains(config.input_model.path.as_ref().unwrap().to_string().as_str()),
            "{text}"
        );
        assert!(
            plan.check_runnable()
                .unwrap_err()
                .to_string()
                .contains("not built into this program")
        );
        // JSON is YAML, too.
        let yaml = serde_yaml_ng::to_string(&value).unwrap();
        let yaml = olive_core::workflow::schema::document::parse_yaml(&yaml, "t").unwrap();
        assert_eq!(yaml, value);
    }
}

/// The fragments of the second tutorial, as they stand there.
fn tutorial() -> Option<Vec<Map<String, Value>>> {
    let text = std::fs::read_to_string(shared()?.join("tutorials/olive-run-config.ja.md")).unwrap();
    let blocks = text
        .split("```json")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap());
    let parse = |block: &str| -> Map<String, Value> {
        let members = block.trim().trim_end_matches(',');
        serde_json::from_str(&format!("{{{members}}}")).unwrap_or_else(|e| panic!("{e}: {members}"))
    };
    Some(blocks.map(parse).collect())
}

/// One file out of the fragments: `data` and `model` choose between the local and the Azure form.
fn assembled(blocks: &[Map<String, Value>], data: usize, model: usize) -> Value {
    let [.., lora, merge, engine] = blocks else {
        panic!("{} blocks", blocks.len())
    };
    let mut passes = lora.clone();
    passes.extend(merge.clone());
    let mut whole = Map::new();
    for block in [&blocks[data], &blocks[2], &blocks[model], engine] {
        whole.extend(block.clone());
    }
    whole.insert("passes".to_owned(), Value::Object(passes));
    Value::Object(whole)
}

#[test]
fn the_tutorial_parses_and_plans_as_written() {
    let Some(blocks) = tutorial() else { return };
    assert_eq!(blocks.len(), 8);
    let config = read(assembled(&blocks, 0, 3)).unwrap();
    assert_eq!(config.input_model.kind, ModelType::Hf);
    assert_eq!(config.input_model.task, "text-generation");
    let path = config.input_model.path.as_ref().and_then(|path| path.local());
    assert_eq!(path, Some(Path::new("/nowhere/model-cache/microsoft/phi-3-mini")));
    let aml = config.system("aml").unwrap();
    assert_eq!(
        (aml.kind, aml.accelerator.to_string().as_str()),
        (SystemKind::AzureMl, "gpu-cuda")
    );
    let data = &config.data_configs[0];
    assert_eq!(
        data.files,
        [PathBuf::from("/nowhere/dataset/dataset-classification.json")]
    );
    assert_eq!(
        Value::Object(data.pre_process.clone()),
        json!({"text_cols": ["phrase", "tone"], "text_template": "### Text: {phrase}\n### The tone is:\n{tone}",
            "strategy": "join", "max_seq_len": 2048, "pad_to_max_len": false, "use_attention_mask": false})
    );
    let plan = Plan::new(&config, &PassRegistry::new()).unwrap();
    let steps = &plan.pipelines[0].steps;
    let kinds: Vec<&str> = steps.iter().map(|step| step.choices[0].kind.as_str()).collect();
    assert_eq!(kinds, ["LoRA", "MergeAdapterWeights", "ModelBuilder"]);
    let lora = &steps[0].choices[0].params;
    assert_eq!(
        (lora["r"].as_i64(), lora["alpha"].as_f64()),
        (Some(64), Some(64.0))
    );
    let split = |data: &str| lora[data]["load_dataset_config"]["split"].clone();
    assert_eq!(
        (split("train_data_config"), split("eval_data_config")),
        (json!("train[:70%]"), json!("train[70%:]"))
    );
    assert_eq!(lora["training_args"]["eval_strategy"], "steps");
    assert_eq!(lora["train_data_config"]["name"], "dataset_default_train");
    assert!(!lora.contains_key("double_quant"));
    for mapped in [
        "legacy key `input_model.config.hf_config` → ",
        "legacy key `systems.aml.config.accelerators` → ",
        "legacy key `data_configs[0].pre_process_data_config.params.corpus_strategy` → `strategy`",
        "legacy key `passes.lora.config.lora_alpha` → `alpha`",
        "legacy key `passes.lora.config.double_quant` → nothing",
        "legacy key `passes.lora.config.training_args.evaluation_strategy` → `eval_strategy`",
    ] {
        let times = plan
            .warnings
            .iter()
            .filter(|line| line.starts_with(mapped))
            .count();
        assert!(
            times == 1 || mapped.contains("accelerators"),
            "{mapped}: {:#?}",
            plan.warnings
        );
    }
    assert!(
        plan.blockers
            .iter()
            .any(|line| line.contains("`aml` is a compute of Azure Machine Learning"))
    );
}

#[test]
fn the_azure_parts_of_the_tutorial_say_what_they_need() {
    let Some(blocks) = tutorial() else { return };
    let plan = Plan::new(&read(assembled(&blocks, 1, 4)).unwrap(), &PassRegistry::new()).unwrap();
    let all = plan.check_runnable().unwrap_err().to_string();
    assert!(
        all.contains("the model `microsoft/Phi-3-mini-4k-instruct` version 11 of the registry `azureml-msr`")
    );
    assert!(all.contains("of the datastore `workspaceblobstore`"), "{all}");
    let mut changed = assembled(&blocks, 1, 4);
    let files = "/data_configs/0/load_dataset_config/params/data_files/config";
    let config = changed.pointer_mut(files).unwrap().as_object_mut().unwrap();
    config.insert("datastore_nam".to_owned(), json!("x"));
    let error = read(changed).unwrap_err().to_string();
    assert!(
        error.contains("data_files.config.datastore_nam`, did you mean `datastore_name`?"),
        "{error}"
    );
}

#[test]
fn special_values_of_parameters() {
    let flow = |precision: Value, search: Value| {
        read(
            json!({"input_model": {"type": "HfModel", "model_path": "a/b"}, "search_strategy": search,
            "evaluators": {"e": {"metrics": [{"name": "s", "type": "size_on_disk"}]}}, "evaluator": "e",
            "passes": {"m": {"type": "Gptq", "bits": precision}}}),
        )
        .and_then(|config| Plan::new(&config, &PassRegistry::new()))
    };
    let bits = |plan: &Plan| {
        let pass = &plan.pipelines[0].steps[0].choices[0];
        let searched = pass.search.iter().find(|(name, _)| name == "bits");
        searched.map_or_else(|| pass.params["bits"].clone(), |(_, values)| json!(values))
    };
    assert_eq!(
        bits(&flow(json!("DEFAULT_VALUE"), json!(true)).unwrap()),
        json!(4)
    );
    assert_eq!(
        bits(&flow(json!("SEARCHABLE_VALUES"), json!(true)).unwrap()),
        json!([2, 4, 8])
    );
    assert_eq!(bits(&flow(json!([4, 8]), json!(true)).unwrap()), json!([4, 8]));
    assert_eq!(bits(&flow(json!(null), json!(true)).unwrap()), json!([2, 4, 8]));
    assert_eq!(bits(&flow(json!(null), json!(false)).unwrap()), json!(4));
    // Everything else that can be searched is, unless the search is told not to.
    assert_eq!(
        flow(json!(4), json!(true)).unwrap().pipelines[0].points(),
        5 * 2 * 2 * 3
    );
    assert_eq!(
        flow(json!(4), json!({"include_pass_params": false}))
            .unwrap()
            .pipelines[0]
            .points(),
        1
    );
    for refused in [json!("SEARCHABLE_VALUES"), json!([4, 8])] {
        assert!(
            flow(refused, json!(false))
                .unwrap_err()
                .to_string()
                .contains("search_strategy")
        );
    }
}
