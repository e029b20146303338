//! `adapter_config.json`: written with the keys of PEFT 0.13, which every later release reads; read strictly.

use std::collections::BTreeMap;
use std::path::Path;

use olive_core::{Error, Result, fsio};
use serde_json::{Map, Value, json};

use crate::matching::Targets;
use crate::options::LoraOptions;

/// The file's name.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// Keys that may hold anything: they describe the adapter and do not change what it computes.
const DESCRIPTIVE: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
];

/// Ways of initialising that change the base too: such an adapter is one of another base.
const CHANGES_BASE: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Keys that are read.
const READ: &[&str] = &[
    "alpha_pattern",
    "exclude_modules",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
];

/// The config of an adapter, keys sorted.
pub fn to_json(options: &LoraOptions, targets: &Targets, base_model: &str) -> Value {
    let targets = match targets {
        Targets::Names(names) => {
            let mut names = names.clone();
            names.sort();
            names.dedup();
            json!(names)
        }
        Targets::Pattern(text) => json!(text),
    };
    let config: BTreeMap<&str, Value> = [
        ("alpha_pattern", json!(options.alpha_pattern)),
        ("auto_mapping", Value::Null),
        ("base_model_name_or_path", json!(base_model)),
        ("bias", json!("none")),
        ("fan_in_fan_out", json!(false)),
        ("inference_mode", json!(true)),
        ("init_lora_weights", json!(true)),
        ("layer_replication", Value::Null),
        ("layers_pattern", Value::Null),
        ("layers_to_transform", json!(options.layers_to_transform)),
        ("loftq_config", json!({})),
        ("lora_alpha", json!(options.alpha)),
        ("lora_dropout", json!(options.dropout)),
        ("megatron_config", Value::Null),
        ("megatron_core", json!("megatron.core")),
        ("modules_to_save", Value::Null),
        ("peft_type", json!("LORA")),
        ("r", json!(options.r)),
        ("rank_pattern", json!(options.rank_pattern)),
        ("revision", Value::Null),
        ("target_modules", targets),
        ("task_type", json!("CAUSAL_LM")),
        ("use_dora", json!(options.use_dora)),
        ("use_rslora", json!(options.use_rslora)),
    ]
    .into();
    let mut object: Map<String, Value> = config
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
    // A key of later releases, written only where it says something.
    if let Some(exclude) = &options.exclude_modules {
        object.insert("exclude_modules".to_owned(), json!(exclude));
        object.sort_keys();
    }
    Value::Object(object)
}

/// Reads the config of a folder.
///
/// # Errors
/// [`Error::Io`] or [`Error::Json`] for the file; [`Error::Config`] for a wrong value; [`Error::Unsupported`] for
/// another kind of adapter or an option that changes what it computes and is not plain LoRA.
pub fn read(folder: &Path) -> Result<LoraOptions> {
    let path = folder.join(CONFIG_FILE);
    let config: Map<String, Value> = fsio::read_json(&path)?;
    let origin = path.display().to_string();
    let kind = config
        .get("peft_type")
        .and_then(Value::as_str)
        .unwrap_or_default();
    if kind != "LORA" {
        let what = format!("peft_type `{kind}` of `{origin}`");
        return Err(Error::unsupported(what, "olive reads LORA"));
    }
    let way = config.get("init_lora_weights").and_then(Value::as_str);
    if let Some(way) = way.filter(|way| CHANGES_BASE.iter().any(|known| way.starts_with(known))) {
        let what = format!("`init_lora_weights` = \"{way}\" of `{origin}`");
        let reason = "it belongs to a changed base; have PEFT convert it to a plain adapter first";
        return Err(Error::unsupported(what, reason));
    }
    for (key, value) in &config {
        let known = READ.contains(&key.as_str()) || DESCRIPTIVE.contains(&key.as_str());
        let empty = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            Value::String(text) => key == "bias" && text == "none",
            _ => false,
        };
        if key == "fan_in_fan_out" && !empty {
            // As PEFT says and does.
            tracing::warn!("`{key}` of `{origin}` has no effect: every adapted module is a linear");
        } else if !known && !empty {
            let what = format!("`{key}` = {value} of `{origin}`");
            return Err(Error::unsupported(what, "olive reads LoRA and DoRA adapters"));
        }
    }
    let fields = Fields { origin, config };
    Ok(LoraOptions {
        r: fields.field("r", Some(json!(8)))?,
        alpha: fields.field("lora_alpha", Some(json!(8)))?,
        dropout: fields.field("lora_dropout", Some(json!(0.0)))?,
        target_modules: Some(fields.field("target_modules", None)?),
        exclude_modules: fields.field("exclude_modules", Some(Value::Null))?,
        layers_to_transform: fields.field("layers_to_transform", Some(Value::Null))?,
        rank_pattern: fields.field("rank_pattern", Some(json!({})))?,
        alpha_pattern: fields.field("alpha_pattern", Some(json!({})))?,
        use_rslora: fields.field("use_rslora", Some(json!(false)))?,
        use_dora: fields.field("use_dora", Some(json!(false)))?,
        initial_adapter: None,
        base_model_name: fields.field("base_model_name_or_path", Some(Value::Null))?,
    })
}

struct Fields {
    origin: String,
    config: Map<String, Value>,
}

impl Fields {
    fn field<T: serde::de::DeserializeOwned>(&self, key: &str, default: Option<Value>) -> Result<T> {
        let value = self
            .config
            .get(key)
            .filter(|value| !value.is_null())
            .cloned()
            .or(default)
            .ok_or_else(|| Error::config(&self.origin, key, "a value", "none"))?;
        serde_json::from_value(value.clone())
            .map_err(|error| Error::config(&self.origin, key, error.to_string(), value.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_has_the_keys_of_the_real_package() {
        let options = LoraOptions {
            r: 4,
            rank_pattern: [("o_proj".to_owned(), 2)].into(),
            base_model_name: Some("base".into()),
            ..LoraOptions::default()
        };
        let targets = Targets::from_text("v_proj,q_proj");
        let json = to_json(&options, &targets, "base");
        let folder = tempfile::tempdir().unwrap();
        fsio::write_json(folder.path().join(CONFIG_FILE), &json, 2).unwrap();
        let expected = LoraOptions {
            target_modules: Some(Targets::Names(vec!["q_proj".into(), "v_proj".into()])),
            ..options
        };
        assert_eq!(read(folder.path()).unwrap(), expected);
        let keys: Vec<&String> = json.as_object().unwrap().keys().collect();
        assert!(keys.is_sorted());
        assert_eq!(keys.len(), 24);
    }

    #[test]
    fn configs_of_the_real_package_are_read_and_others_refused_by_name() {
        let golden =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/peft/runs/llama-decay/adapter_final");
        let options = read(&golden).unwrap();
        assert_eq!((options.r, options.alpha, options.use_rslora), (4, 4.0, true));
        let config: Map<String, Value> = fsio::read_json(golden.join(CONFIG_FILE)).unwrap();
        for (key, value) in [
            ("peft_type", json!("LOHA")),
            ("lora_bias", json!(true)),
            ("init_lora_weights", json!("pissa_niter_4")),
            ("bias", json!("all")),
            ("modules_to_save", json!(["lm_head"])),
            ("some_new_option", json!(3)),
            ("r", json!("many")),
        ] {
            let mut changed = config.clone();
            changed.insert(key.to_owned(), value);
            let folder = tempfile::tempdir().unwrap();
            fsio::write_json(folder.path().join(CONFIG_FILE), &changed, 2).unwrap();
            let error = read(folder.path()).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
