//! Data configs from JSON, in today's keys of Olive and in those of its releases before 0.7.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::config::{DataConfig, Strategy, TextGenConfig, TextSource};
use super::source::{DataFormat, DataSource};
use crate::error::{Error, Result};

/// Keys of a text-generation config; the second column is the key that an old one became.
const TEXT_KEYS: &[(&str, Option<&str>)] = &[
    ("add_special_tokens", None),
    ("chat_template", None),
    ("corpus_strategy", Some("strategy")),
    ("dataset_type", None),
    ("drop_short_sequences", None),
    ("joiner", None),
    ("max_samples", None),
    ("max_seq_len", None),
    ("message_col", None),
    ("model_name", None),
    ("pad_to_max_len", None),
    ("padding_side", None),
    ("processing_batch_size", None),
    ("random_retries", None),
    ("random_seed", None),
    ("source_max_len", Some("max_seq_len")),
    ("strategy", None),
    ("stride", None),
    ("text_cols", None),
    ("text_formatting_func", None),
    ("text_template", None),
    ("trust_remote_code", None),
    ("type", None),
    ("use_attention_mask", None),
];

/// Typed access to a JSON object, with errors that name the object and the key.
struct Keys<'a> {
    origin: &'a str,
    map: &'a Map<String, Value>,
    notes: &'a mut Vec<String>,
}

impl Keys<'_> {
    /// The value under `key` or under an old name of it; `null` counts as absent.
    fn value(&mut self, key: &str) -> Option<&Value> {
        let present = |name: &str| self.map.get(name).filter(|value| !value.is_null());
        if let Some(value) = present(key) {
            return Some(value);
        }
        let old = TEXT_KEYS
            .iter()
            .find(|(_, new)| *new == Some(key))
            .map(|(old, _)| *old)?;
        let value = present(old)?;
        self.notes
            .push(format!("{}: key `{old}` is now `{key}`", self.origin));
        Some(value)
    }

    fn wrong<T>(&self, key: &str, expected: &str, found: &Value) -> Result<T> {
        Err(Error::config(self.origin, key, expected, found.to_string()))
    }

    fn text(&mut self, key: &str) -> Result<Option<String>> {
        match self.value(key).cloned() {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => self.wrong(key, "text", &other),
        }
    }

    fn flag(&mut self, key: &str, default: bool) -> Result<bool> {
        match self.value(key).cloned() {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => self.wrong(key, "true or false", &other),
        }
    }

    fn count(&mut self, key: &str) -> Result<Option<usize>> {
        match self.value(key).cloned() {
            None => Ok(None),
            Some(value) => match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
                Some(count) => Ok(Some(count)),
                None => self.wrong(key, "a whole number, 0 or more", &value),
            },
        }
    }

    /// A text or a list of texts.
    fn texts(&mut self, key: &str) -> Result<Option<Vec<String>>> {
        match self.value(key).cloned() {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(vec![text])),
            Some(Value::Array(list)) if list.iter().all(Value::is_string) => Ok(Some(
                list.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            )),
            Some(other) => self.wrong(key, "text or a list of texts", &other),
        }
    }
}

impl TextGenConfig {
    /// Reads `pre_process_data_config`, with Olive's defaults (special tokens on). What an old key became, or
    /// that a key has no effect, is appended to `notes`.
    ///
    /// # Errors
    /// [`Error::UnknownKey`], [`Error::Config`] or [`Error::Unsupported`], naming `origin` and the key.
    pub fn parse(origin: &str, map: &Map<String, Value>, notes: &mut Vec<String>) -> Result<Self> {
        for key in map.keys() {
            if !TEXT_KEYS.iter().any(|(known, _)| known == key) {
                return Err(Error::unknown_key(
                    origin,
                    key,
                    TEXT_KEYS.iter().map(|(known, _)| *known),
                ));
            }
        }
        let mut keys = Keys { origin, map, notes };
        let legacy = match keys.text("dataset_type")?.as_deref() {
            None => false,
            Some("corpus") => true,
            Some(other) => {
                return Err(Error::unsupported(
                    format!("{origin}: `dataset_type` `{other}`"),
                    "use a `text_template` with both columns",
                ));
            }
        };
        if keys.value("text_formatting_func").is_some() {
            let what = format!("{origin}: `text_formatting_func`");
            return Err(Error::unsupported(what, "it is Python code; use `text_template`"));
        }
        let mut config = Self::new(text_source(&mut keys)?);
        config.strategy = parse_strategy(&mut keys, legacy)?;
        config.joiner = parse_joiner(&mut keys, legacy)?;
        config.max_seq_len = keys.count("max_seq_len")?.unwrap_or(config.max_seq_len);
        config.max_samples = keys.count("max_samples")?;
        config.pad_to_max_len = keys.flag("pad_to_max_len", true)?;
        config.drop_short_sequences = keys.flag("drop_short_sequences", false)?;
        config.add_special_tokens = keys.flag("add_special_tokens", true)?;
        config.processing_batch_size = keys.count("processing_batch_size")?.unwrap_or(1024);
        config.random_retries = keys.count("random_retries")?.unwrap_or(10);
        if let Some(seed) = keys.value("random_seed").cloned() {
            match seed.as_i64() {
                Some(seed) => config.random_seed = seed,
                None => return keys.wrong("random_seed", "a whole number", &seed),
            }
        }
        if let Some(side) = keys.text("padding_side")?
            && !matches!(side.as_str(), "left" | "right")
        {
            return keys.wrong("padding_side", "left or right", &Value::from(side));
        }
        let joins = !matches!(config.strategy, Strategy::LineByLine | Strategy::LineByLineRandom);
        if !keys.flag("use_attention_mask", true)? && config.pad_to_max_len && !joins {
            let found = Value::from(false);
            return keys.wrong("use_attention_mask", "true, where samples are padded", &found);
        }
        Ok(config)
    }
}

fn text_source(keys: &mut Keys<'_>) -> Result<TextSource> {
    let column = keys.text("message_col")?.unwrap_or_else(|| "messages".to_owned());
    match keys.value("chat_template").cloned() {
        None | Some(Value::Bool(false)) => {}
        Some(Value::Bool(true)) => {
            return Ok(TextSource::Chat {
                column,
                template: None,
            });
        }
        Some(Value::String(template)) => {
            let template = Some(template);
            return Ok(TextSource::Chat { column, template });
        }
        Some(other) => return keys.wrong("chat_template", "true, false or a template", &other),
    }
    match keys.text("text_template")? {
        Some(template) => TextSource::template(&template),
        None => {
            let columns = keys
                .texts("text_cols")?
                .unwrap_or_else(|| vec!["text".to_owned()]);
            Ok(TextSource::Columns(columns))
        }
    }
}

fn parse_strategy(keys: &mut Keys<'_>, legacy: bool) -> Result<Strategy> {
    let default = if legacy { "line-by-line" } else { "join" };
    let name = keys.text("strategy")?.unwrap_or_else(|| default.to_owned());
    Ok(match name.replace('_', "-").to_lowercase().as_str() {
        "line-by-line" => Strategy::LineByLine,
        "line-by-line-random" => Strategy::LineByLineRandom,
        "join" => Strategy::Join,
        "join-random" => Strategy::JoinRandom,
        "join-sliding-window" => match keys.count("stride")? {
            Some(stride) => Strategy::JoinSlidingWindow { stride },
            None => {
                return keys.wrong(
                    "stride",
                    "a number of tokens, for `join-sliding-window`",
                    &Value::Null,
                );
            }
        },
        _ => {
            let expected = "line-by-line, line-by-line-random, join, join-random or join-sliding-window";
            return keys.wrong("strategy", expected, &Value::from(name));
        }
    })
}

/// `null` means no joiner; without the key, old configs have none and new ones an empty line.
fn parse_joiner(keys: &mut Keys<'_>, legacy: bool) -> Result<String> {
    match keys.map.get("joiner") {
        Some(Value::Null) => Ok(String::new()),
        Some(Value::String(joiner)) => Ok(joiner.clone()),
        Some(other) => keys.wrong("joiner", "text", other),
        None if legacy => Ok(String::new()),
        None => Ok("\n\n".to_owned()),
    }
}

impl DataSource {
    /// Reads `load_dataset_config`: `data_name`, `data_files` (a text, a list, or lists by split), `split` and
    /// `shuffle_seed`.
    ///
    /// # Errors
    /// [`Error::UnknownKey`], [`Error::Config`] or [`Error::Unsupported`], naming `origin` and the key.
    pub fn parse(origin: &str, map: &Map<String, Value>, notes: &mut Vec<String>) -> Result<Self> {
        const KEYS: &[&str] = &[
            "data_name",
            "data_files",
            "split",
            "shuffle_seed",
            "subset",
            "data_dir",
            "type",
            "trust_remote_code",
            "task",
            "name",
        ];
        if let Some(key) = map.keys().find(|key| !KEYS.contains(&key.as_str())) {
            return Err(Error::unknown_key(origin, key, KEYS.iter().copied()));
        }
        let mut keys = Keys { origin, map, notes };
        let Some(name) = keys.text("data_name")? else {
            return keys.wrong("data_name", "json, csv or text", &Value::Null);
        };
        let format = DataFormat::from_name(&name)?;
        let mut split = keys.text("split")?;
        let folder = keys.text("data_dir")?.map(PathBuf::from).unwrap_or_default();
        let files = match keys.value("data_files").cloned() {
            Some(Value::Object(by_split)) => {
                let wanted = split.clone().unwrap_or_else(|| "train".to_owned());
                let (base, part) = match wanted.find('[') {
                    Some(at) => wanted.split_at(at),
                    None => (wanted.as_str(), ""),
                };
                let mut inner = Keys {
                    origin,
                    map: &by_split,
                    notes: keys.notes,
                };
                let files = inner.texts(base)?;
                split = Some(format!("train{part}"));
                files
            }
            Some(Value::String(text)) => Some(text.split(',').map(|file| file.trim().to_owned()).collect()),
            _ => keys.texts("data_files")?,
        };
        let Some(files) = files.filter(|files| !files.is_empty()) else {
            let found = Value::Null;
            return keys.wrong("data_files", "the files to read", &found);
        };
        let files = files.iter().map(|file| folder.join(file)).collect();
        let shuffle_seed = match keys.value("shuffle_seed").cloned() {
            None => None,
            Some(seed) => match seed.as_i64() {
                Some(seed) => Some(seed),
                None => return keys.wrong("shuffle_seed", "a whole number", &seed),
            },
        };
        Ok(Self {
            format,
            files,
            split,
            shuffle_seed,
        })
    }
}

impl DataConfig {
    /// Reads an entry of `data_configs`. Components may be flat or under `params`, as Olive allows both.
    ///
    /// # Errors
    /// [`Error::UnknownKey`], [`Error::Config`] or [`Error::Unsupported`], naming `origin` and the key.
    pub fn parse(origin: &str, map: &Map<String, Value>, notes: &mut Vec<String>) -> Result<Self> {
        const KEYS: &[&str] = &[
            "name",
            "type",
            "load_dataset_config",
            "pre_process_data_config",
            "post_process_data_config",
            "dataloader_config",
            "user_script",
            "script_dir",
        ];
        if let Some(key) = map.keys().find(|key| !KEYS.contains(&key.as_str())) {
            return Err(Error::unknown_key(origin, key, KEYS.iter().copied()));
        }
        for key in ["user_script", "script_dir"] {
            if map.get(key).is_some_and(|value| !value.is_null()) {
                return Err(Error::unsupported(
                    format!("{origin}: `{key}`"),
                    "it is Python code",
                ));
            }
        }
        let source_at = format!("{origin}.load_dataset_config");
        let source = DataSource::parse(&source_at, &component(origin, map, "load_dataset_config")?, notes)?;
        let text_at = format!("{origin}.pre_process_data_config");
        let text = TextGenConfig::parse(
            &text_at,
            &component(origin, map, "pre_process_data_config")?,
            notes,
        )?;
        Ok(Self { source, text })
    }
}

/// A component's parameters, from the object itself and from its `params`.
fn component(origin: &str, map: &Map<String, Value>, key: &str) -> Result<Map<String, Value>> {
    let wrong = |found: &Value| Err(Error::config(origin, key, "an object", found.to_string()));
    let mut flat = match map.get(key) {
        None | Some(Value::Null) => return Ok(Map::new()),
        Some(Value::Object(component)) => component.clone(),
        Some(other) => return wrong(other),
    };
    match flat.shift_remove("params") {
        None | Some(Value::Null) => {}
        Some(Value::Object(params)) => flat.extend(params),
        Some(other) => return wrong(&other),
    }
    Ok(flat)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap()
    }

    fn text(value: Value) -> Result<(TextGenConfig, Vec<String>)> {
        let mut notes = Vec::new();
        TextGenConfig::parse("data config `d`", &object(value), &mut notes).map(|config| (config, notes))
    }

    #[test]
    fn defaults_are_olives() {
        let (config, notes) = text(json!({})).unwrap();
        let mut wanted = TextGenConfig::new(TextSource::Columns(vec!["text".into()]));
        wanted.add_special_tokens = true;
        assert_eq!(config, wanted);
        assert!(notes.is_empty());
    }

    #[test]
    fn old_keys_are_understood_and_said() {
        let (config, notes) = text(json!({
            "dataset_type": "corpus", "corpus_strategy": "join", "source_max_len": 2048, "pad_to_max_len": false,
            "use_attention_mask": false, "text_cols": ["phrase", "tone"],
            "text_template": "### Text: {phrase}\n### The tone is:\n{tone}"
        }))
        .unwrap();
        assert_eq!((config.strategy, config.max_seq_len), (Strategy::Join, 2048));
        assert_eq!(config.joiner, "");
        assert!(matches!(config.text, TextSource::Template(_)));
        assert_eq!(notes.len(), 2, "{notes:?}");
        let (config, _) = text(json!({"dataset_type": "corpus"})).unwrap();
        assert_eq!(config.strategy, Strategy::LineByLine);
    }

    #[test]
    fn wrong_keys_and_values_are_named() {
        for (value, wanted) in [
            (json!({"max_seq_length": 1}), "did you mean `max_seq_len`"),
            (json!({"max_seq_len": "x"}), "`max_seq_len`"),
            (json!({"strategy": "shuffle"}), "`strategy`"),
            (json!({"strategy": "join-sliding-window"}), "`stride`"),
            (json!({"text_template": "{"}), "`text_template`"),
            (json!({"padding_side": "top"}), "`padding_side`"),
            (json!({"dataset_type": "pair"}), "`pair`"),
            (json!({"text_formatting_func": "f"}), "Python"),
            (
                json!({"strategy": "line-by-line", "use_attention_mask": false}),
                "`use_attention_mask`",
            ),
        ] {
            let error = text(value).unwrap_err().to_string();
            assert!(
                error.contains(wanted) && error.contains("data config `d`")
                    || error.contains("text_template"),
                "{error}"
            );
        }
    }

    #[test]
    fn whole_data_configs_are_read_flat_or_with_params() {
        let mut notes = Vec::new();
        let map = object(json!({
            "name": "train", "type": "HuggingfaceContainer",
            "load_dataset_config": {"type": "huggingface_dataset",
                "params": {"data_name": "json", "data_files": {"train": "a.jsonl", "test": ["b.jsonl"]}, "split": "test[:5]"}},
            "pre_process_data_config": {"params": {"strategy": "line-by-line"}, "max_samples": 3},
            "dataloader_config": {"batch_size": 4}
        }));
        let config = DataConfig::parse("data config `train`", &map, &mut notes).unwrap();
        assert_eq!(config.source.files, [PathBuf::from("b.jsonl")]);
        assert_eq!(config.source.split.as_deref(), Some("train[:5]"));
        assert_eq!(
            (config.text.strategy, config.text.max_samples),
            (Strategy::LineByLine, Some(3))
        );
        let hub = object(json!({"load_dataset_config": {"data_name": "org/set", "data_files": "x"}}));
        let error = DataConfig::parse("d", &hub, &mut notes).unwrap_err().to_string();
        assert!(error.contains("org/set"), "{error}");
    }
}
