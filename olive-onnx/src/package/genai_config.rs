//! `genai_config.json`: what onnxruntime-genai reads about a model folder. It refuses keys that it does not know, so
//! nothing is added to them.
//!
//! A sliding window is not written: with that key the runtime keeps a cache of the window only, which a graph whose
//! nodes carry the window themselves does not expect.

use std::path::Path;

use olive_core::{Error, Family, ModelSpec, Result, RopeScaling, fsio};
use serde_json::{Map, Value, json};

use crate::build::{BuilderOptions, Provider};

/// The config for a checkpoint in `folder`: sizes from its spec; tokens and sampling from `generation_config.json`,
/// then `config.json`, then the tokenizer; `options.search` goes over the `search` part.
///
/// # Errors
/// [`Error::Io`], [`Error::Json`], [`Error::Config`] for a value of the wrong type, or [`Error::UnknownKey`] for an
/// override that the runtime does not know.
pub fn genai_config(folder: &Path, spec: &ModelSpec, options: &BuilderOptions) -> Result<Value> {
    let generation = Fields::read(&folder.join("generation_config.json"))?;
    let tokenizer = Tokens::read(folder)?;
    let eos = eos_tokens(&generation, spec, &tokenizer)?;
    let first_eos = eos.as_array().map_or(Some(&eos), |list| list.first()).cloned();
    let bos = match spec.bos_token_id {
        Some(id) => json!(id),
        None => generation.token("bos_token_id")?.map_or(json!(1), |id| json!(id)),
    };
    let pad = match (
        generation.token("pad_token_id")?,
        spec.pad_token_id.or(tokenizer.pad),
    ) {
        (Some(id), _) | (None, Some(id)) => json!(id),
        (None, None) => first_eos.unwrap_or(json!(0)),
    };
    Ok(json!({
        "model": {
            "bos_token_id": bos,
            "context_length": spec.max_position,
            "decoder": decoder(spec, options),
            "eos_token_id": eos,
            "pad_token_id": pad,
            "type": runtime_type(spec.family),
            "vocab_size": spec.vocab_size,
        },
        "search": overridden(search(&generation, spec)?, &options.search)?,
    }))
}

/// The runtime's name for a family.
const fn runtime_type(family: Family) -> &'static str {
    match family {
        Family::Llama => "llama",
        Family::Mistral => "mistral",
        Family::Phi3 => "phi3",
        Family::Qwen2 => "qwen2",
        Family::Qwen3 => "qwen3",
    }
}

fn decoder(spec: &ModelSpec, options: &BuilderOptions) -> Value {
    let mut inputs = Map::new();
    let tokens = match options.exclude_embeds {
        true => "inputs_embeds",
        false => "input_ids",
    };
    for name in [tokens, "attention_mask"] {
        inputs.insert(name.to_owned(), name.into());
    }
    if options.provider == Provider::Dml {
        inputs.insert("position_ids".to_owned(), "position_ids".into());
    }
    inputs.insert("past_key_names".to_owned(), "past_key_values.%d.key".into());
    inputs.insert("past_value_names".to_owned(), "past_key_values.%d.value".into());
    let mut outputs = Map::new();
    if !options.exclude_lm_head {
        outputs.insert("logits".to_owned(), "logits".into());
    }
    outputs.insert("present_key_names".to_owned(), "present.%d.key".into());
    outputs.insert("present_value_names".to_owned(), "present.%d.value".into());
    json!({
        "session_options": {
            "log_id": "onnxruntime-genai",
            "provider_options": provider_options(spec, options),
        },
        "filename": options.filename,
        "head_size": spec.head_dim,
        "hidden_size": spec.hidden_size,
        "inputs": inputs,
        "outputs": outputs,
        "num_attention_heads": spec.n_heads,
        "num_hidden_layers": options.n_layers.unwrap_or(spec.n_layers),
        "num_key_value_heads": spec.n_kv_heads,
    })
}

/// What the runtime tells the provider; the CPU needs nothing.
fn provider_options(spec: &ModelSpec, options: &BuilderOptions) -> Value {
    let flag = |on: bool| if on { "1" } else { "0" };
    match options.provider {
        Provider::Cpu => json!([]),
        Provider::Cuda => json!([{"cuda": {"enable_cuda_graph": flag(options.enable_cuda_graph)}}]),
        Provider::Dml => json!([{"dml": {"enable_graph_capture": "1"}}]),
        Provider::WebGpu => {
            let captured = options.enable_webgpu_graph;
            let validation = if captured { "disabled" } else { "basic" };
            let mut webgpu = json!({"enableGraphCapture": flag(captured), "validationMode": validation});
            if let RopeScaling::LongRope {
                original_max_position: original,
                ..
            } = &spec.rope.scaling
                && captured
                && *original < spec.max_position
            {
                webgpu["multiRotaryCacheConcatOffset"] = json!(original.to_string());
            }
            json!([{"webgpu": webgpu}])
        }
    }
}

fn search(generation: &Fields, spec: &ModelSpec) -> Result<Value> {
    Ok(json!({
        "diversity_penalty": 0.0,
        "do_sample": generation.flag("do_sample")?.unwrap_or(false),
        "early_stopping": true,
        "length_penalty": 1.0,
        "max_length": spec.max_position,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": true,
        "repetition_penalty": 1.0,
        "temperature": generation.number("temperature")?.unwrap_or(1.0),
        "top_k": generation.whole("top_k")?.unwrap_or(50),
        "top_p": generation.number("top_p")?.unwrap_or(1.0),
    }))
}

/// Keys of `search` that the runtime knows besides those that are always written.
const MORE_SEARCH_KEYS: &[&str] = &["random_seed", "batch_size", "chunk_size"];

fn overridden(mut search: Value, overrides: &Map<String, Value>) -> Result<Value> {
    let Some(fields) = search.as_object_mut() else {
        return Ok(search);
    };
    for (key, value) in overrides {
        if !fields.contains_key(key) && !MORE_SEARCH_KEYS.contains(&key.as_str()) {
            let known = fields
                .keys()
                .map(String::as_str)
                .chain(MORE_SEARCH_KEYS.iter().copied());
            return Err(Error::unknown_key(
                "model builder",
                format!("search.{key}"),
                known,
            ));
        }
        fields.insert(key.clone(), value.clone());
    }
    Ok(search)
}

/// One id or a list: those of the generation config, else of the config, with the tokenizer's own appended.
fn eos_tokens(generation: &Fields, spec: &ModelSpec, tokenizer: &Tokens) -> Result<Value> {
    let mut ids = generation.tokens("eos_token_id")?;
    if ids.is_empty() {
        ids.clone_from(&spec.eos_token_ids);
    }
    if let Some(own) = tokenizer.eos.filter(|own| !ids.contains(own)) {
        ids.push(own);
    }
    Ok(match ids.as_slice() {
        [one] => json!(one),
        several => json!(several),
    })
}

/// A JSON object that may be absent, with errors that name file and key.
struct Fields {
    origin: String,
    fields: Map<String, Value>,
}

impl Fields {
    fn read(path: &Path) -> Result<Self> {
        let fields = match path.is_file() {
            true => fsio::read_json(path)?,
            false => Map::new(),
        };
        Ok(Self {
            origin: format!("`{}`", path.display()),
            fields,
        })
    }

    fn typed<T>(&self, key: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.fields.get(key).filter(|value| !value.is_null()) {
            None => Ok(None),
            Some(value) => read(value)
                .map(Some)
                .ok_or_else(|| Error::config(&self.origin, key, expected, value.to_string())),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    fn whole(&self, key: &str) -> Result<Option<i64>> {
        self.typed(key, "a whole number", Value::as_i64)
    }

    fn tokens(&self, key: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let read = |value: &Value| match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        Ok(self
            .typed(key, "a token id or a list of them", read)?
            .unwrap_or_default())
    }

    fn token(&self, key: &str) -> Result<Option<u32>> {
        Ok(self.tokens(key)?.first().copied())
    }
}

/// Ids of the tokenizer's own special tokens.
struct Tokens {
    eos: Option<u32>,
    pad: Option<u32>,
}

impl Tokens {
    fn read(folder: &Path) -> Result<Self> {
        let config = Fields::read(&folder.join("tokenizer_config.json"))?;
        let tokenizer = Fields::read(&folder.join("tokenizer.json"))?;
        let id = |key: &str| {
            let content = match config.fields.get(key)? {
                Value::String(text) => text.as_str(),
                object => object.get("content")?.as_str()?,
            };
            let added = tokenizer.fields.get("added_tokens").and_then(Value::as_array);
            let found = added.and_then(|list| list.iter().find(|token| token["content"] == content));
            let id = match found {
                Some(token) => token["id"].as_u64(),
                None => tokenizer
                    .fields
                    .get("model")?
                    .get("vocab")?
                    .get(content)?
                    .as_u64(),
            };
            u32::try_from(id?).ok()
        };
        Ok(Self {
            eos: id("eos_token"),
            pad: id("pad_token"),
        })
    }
}
