//! Workflow files that people use, and what is refused in them.

use std::path::{Path, PathBuf};

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
                let plan = result
                    .and_then(|config| olive_core::workflow::plan::Plan::new(&config, &Default::default()));
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
