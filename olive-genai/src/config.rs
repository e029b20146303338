//! `genai_config.json`.

use std::collections::BTreeMap;
use std::path::Path;

use olive_core::{Error, Result, fsio};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::exec::GraphNames;
use crate::params::SearchOptions;

/// What the runtime reads of a model folder's `genai_config.json`. Unknown keys are errors, as in onnxruntime-genai.
#[derive(Debug, Clone, Deserialize)]
pub struct GenaiConfig {
    /// The model.
    pub model: ModelSection,
    /// Defaults of the search.
    #[serde(default)]
    pub search: SearchOptions,
    /// Other keys at the top.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// `model`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(
    missing_docs,
    reason = "the keys of the file; the format's own description says what they mean"
)]
pub struct ModelSection {
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default)]
    pub tokenizer_dir: String,
    #[serde(default)]
    pub pad_token_id: u32,
    #[serde(default)]
    pub bos_token_id: u32,
    #[serde(default, deserialize_with = "one_or_many")]
    pub eos_token_id: Vec<u32>,
    #[serde(default)]
    pub vocab_size: usize,
    pub context_length: usize,
    pub decoder: DecoderSection,
    #[serde(default)]
    pub sep_token_id: Value,
    #[serde(default)]
    pub decoder_start_token_id: Value,
    #[serde(default)]
    pub bot_token_id: Value,
    #[serde(default)]
    pub eot_token_id: Value,
    #[serde(default)]
    pub bor_token_id: Value,
    #[serde(default)]
    pub eor_token_id: Value,
    #[serde(default)]
    pub image_token_id: Value,
    #[serde(default)]
    pub audio_token_id: Value,
    #[serde(default)]
    pub boa_token_id: Value,
    #[serde(default)]
    pub video_token_id: Value,
    #[serde(default)]
    pub vision_start_token_id: Value,
    #[serde(default)]
    pub encoder: Value,
    #[serde(default)]
    pub embedding: Value,
    #[serde(default)]
    pub vision: Value,
    #[serde(default)]
    pub speech: Value,
    #[serde(default)]
    pub joiner: Value,
    #[serde(default)]
    pub vad: Value,
    #[serde(default)]
    pub mtp: Value,
    #[serde(default)]
    pub draft: Value,
}

/// `model.decoder`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(
    missing_docs,
    reason = "the keys of the file; the format's own description says what they mean"
)]
pub struct DecoderSection {
    #[serde(default)]
    pub filename: String,
    #[serde(default)]
    pub session_options: Map<String, Value>,
    #[serde(default)]
    pub run_options: Value,
    #[serde(default)]
    pub hidden_size: usize,
    #[serde(default)]
    pub num_attention_heads: usize,
    #[serde(default)]
    pub num_key_value_heads: usize,
    #[serde(default)]
    pub num_hidden_layers: usize,
    #[serde(default)]
    pub head_size: usize,
    #[serde(default)]
    pub layer_types: Value,
    #[serde(default)]
    pub conv_cache_size: Value,
    #[serde(default)]
    pub shared_initializers: Value,
    #[serde(default)]
    pub state_groups: Value,
    #[serde(default)]
    pub pipeline: Value,
    #[serde(default)]
    pub sliding_window: Value,
    #[serde(default)]
    pub inputs: BTreeMap<String, String>,
    #[serde(default)]
    pub outputs: BTreeMap<String, String>,
}

const INPUTS: [&str; 29] = [
    "input_ids",
    "embeddings",
    "attention_mask",
    "position_ids",
    "past_key_names",
    "past_value_names",
    "past_names",
    "cross_past_key_names",
    "cross_past_value_names",
    "past_key_values_length",
    "past_sequence_length",
    "current_sequence_length",
    "total_sequence_length",
    "cache_indirection",
    "encoder_hidden_states",
    "rnn_prev_states",
    "encoder_attention_mask",
    "cumulative_sequence_lengths",
    "past_sequence_lengths",
    "block_table",
    "block_table_windowed",
    "attention_metadata",
    "past_conv_names",
    "hidden_states",
    "targets",
    "targets_length",
    "lstm_hidden_state",
    "lstm_cell_state",
    "per_layer_inputs",
];
const OUTPUTS: [&str; 8] = [
    "logits",
    "present_key_names",
    "present_value_names",
    "present_names",
    "output_cross_qk_names",
    "rnn_states",
    "present_conv_names",
    "hidden_states",
];

fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Ids {
        One(u32),
        Many(Vec<u32>),
    }
    Ok(match Ids::deserialize(deserializer)? {
        Ids::One(id) => vec![id],
        Ids::Many(ids) => ids,
    })
}

impl GenaiConfig {
    /// Reads `genai_config.json` of a folder.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Json`]; [`Error::Config`] and [`Error::UnknownKey`] for values that cannot be;
    /// [`Error::Unsupported`] for models of other kinds than decoders of text.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("genai_config.json");
        if !path.is_file() {
            return Err(Error::file(
                path,
                "the description of a model folder",
                "no such file",
            ));
        }
        let mut config: Self = fsio::read_json(&path)?;
        config.check(&path.display().to_string())?;
        Ok(config)
    }

    fn check(&mut self, origin: &str) -> Result<()> {
        const KNOWN: [&str; 4] = ["model", "search", "speculative", "engine"];
        for (key, value) in &self.rest {
            if value.is_object() && !KNOWN.contains(&key.as_str()) {
                return Err(Error::unknown_key(origin, key, KNOWN));
            }
        }
        let model = &mut self.model;
        if model.context_length == 0 {
            return Err(Error::config(
                origin,
                "model.context_length",
                "a number above 0",
                "0",
            ));
        }
        for (section, given, known) in [
            ("inputs", &model.decoder.inputs, &INPUTS[..]),
            ("outputs", &model.decoder.outputs, &OUTPUTS[..]),
        ] {
            if let Some(key) = given.keys().find(|key| !known.contains(&key.as_str())) {
                return Err(Error::unknown_key(
                    origin,
                    format!("model.decoder.{section}.{key}"),
                    known.iter().copied(),
                ));
            }
        }
        let filled = |value: &Value| match value {
            Value::Null => false,
            Value::Array(list) => !list.is_empty(),
            Value::Object(map) => !map.is_empty(),
            _ => true,
        };
        let parts = [
            ("encoder", &model.encoder),
            ("embedding", &model.embedding),
            ("vision", &model.vision),
            ("speech", &model.speech),
            ("joiner", &model.joiner),
            ("vad", &model.vad),
            ("decoder.pipeline", &model.decoder.pipeline),
            ("decoder.state_groups", &model.decoder.state_groups),
        ];
        if let Some((name, _)) = parts.into_iter().find(|(_, value)| filled(value)) {
            let what = format!("`model.{name}` of {origin}");
            return Err(Error::unsupported(
                what,
                "the runtime runs single decoders of text",
            ));
        }
        if model.eos_token_id.is_empty() {
            model.eos_token_id = vec![model.pad_token_id];
        }
        if self.search.max_length == 0 {
            self.search.max_length = model.context_length;
        }
        self.search.check(origin, model.context_length, model.vocab_size)
    }

    /// What the graph's values are called.
    pub fn graph_names(&self) -> GraphNames {
        let decoder = &self.model.decoder;
        let mut names = GraphNames::default();
        let set = |place: &mut String, given: Option<&String>| {
            if let Some(name) = given {
                place.clone_from(name);
            }
        };
        set(&mut names.input_ids, decoder.inputs.get("input_ids"));
        set(&mut names.attention_mask, decoder.inputs.get("attention_mask"));
        set(&mut names.position_ids, decoder.inputs.get("position_ids"));
        set(&mut names.past_key, decoder.inputs.get("past_key_names"));
        set(&mut names.past_value, decoder.inputs.get("past_value_names"));
        set(&mut names.present_key, decoder.outputs.get("present_key_names"));
        set(
            &mut names.present_value,
            decoder.outputs.get("present_value_names"),
        );
        set(&mut names.logits, decoder.outputs.get("logits"));
        names
    }

    /// `intra_op_num_threads`, if it is set.
    pub fn threads(&self) -> Option<usize> {
        let threads = self
            .model
            .decoder
            .session_options
            .get("intra_op_num_threads")?
            .as_u64()?;
        usize::try_from(threads).ok().filter(|threads| *threads > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<GenaiConfig> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("genai_config.json"), text).unwrap();
        GenaiConfig::read(folder.path())
    }

    const GOOD: &str = r#"{"model": {"type": "llama", "context_length": 64, "eos_token_id": 3, "pad_token_id": 2,
        "vocab_size": 100, "decoder": {"filename": "model.onnx"}}, "search": {"top_k": 7}}"#;

    #[test]
    fn defaults_are_filled_in() {
        let config = read(GOOD).unwrap();
        assert_eq!(config.model.eos_token_id, [3]);
        assert_eq!((config.search.max_length, config.search.top_k), (64, 7));
        assert_eq!(config.graph_names().past_key, "past_key_values.%d.key");
        let config = read(&GOOD.replace("\"eos_token_id\": 3, ", "")).unwrap();
        assert_eq!(config.model.eos_token_id, [2]);
    }

    #[test]
    fn mistakes_are_named() {
        for (from, to, wanted) in [
            ("\"type\"", "\"foo\": 1, \"type\"", "unknown field `foo`"),
            ("\"top_k\"", "\"topk\"", "unknown field `topk`"),
            ("64", "0", "context_length"),
            ("\"search\"", "\"serch\": {}, \"search\"", "did you mean `search`"),
            (
                "\"filename\"",
                "\"inputs\": {\"input_idz\": \"a\"}, \"filename\"",
                "did you mean `input_ids`",
            ),
            (
                "\"decoder\"",
                "\"vision\": {\"filename\": \"v.onnx\"}, \"decoder\"",
                "`model.vision`",
            ),
            ("\"top_k\": 7", "\"top_k\": 101", "top_k"),
            ("\"top_k\": 7", "\"top_p\": 1.5", "top_p"),
            ("\"top_k\": 7", "\"max_length\": 65", "max_length"),
            ("\"context_length\": 64,", "", "context_length"),
        ] {
            let error = read(&GOOD.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(wanted), "{wanted}: {error}");
        }
    }
}
