//! The data configs of a workflow as samples.
//!
//! A data config names files (`load_dataset_config`) and says how their rows become text (`pre_process_data_config`).
//! Passes train and calibrate on [`TextData::samples`]; evaluators also ask for [`TextData::choices`], the same rows
//! with every label in place of their own:
//!
//! ```json
//! {
//!   "name": "tones",
//!   "type": "HuggingfaceContainer",
//!   "load_dataset_config": {
//!     "data_name": "json", "data_files": "dataset-classification.json",
//!     "shuffle_seed": 42, "split": "train[80%:]"
//!   },
//!   "pre_process_data_config": {
//!     "text_template": "### Text: {phrase}\n### The tone is:\n{tone}",
//!     "strategy": "line-by-line", "pad_to_max_len": false,
//!     "label_cols": ["tone"], "labels": ["joy", "fear", "sadness", "surprise"]
//!   }
//! }
//! ```
//!
//! | key | meaning |
//! |---|---|
//! | `load_dataset_config.shuffle_seed` | rows are shuffled with this seed (as Python's `random.Random(seed).shuffle`) before `split` takes its part; two configs with one seed and `train[:80%]`, `train[80%:]` share no row |
//! | `pre_process_data_config.label_cols` | the column that holds the answer; the template (or `text_cols`) names it, too |
//! | `pre_process_data_config.labels` | the answers to choose from; without it all that the files hold |

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::data::{
    DataConfig, DataFormat, DataSource, IGNORED_LABEL, Sample, SampleScore, Strategy, Table, TextGenConfig,
    TextSource,
};
use crate::error::{Error, Result};
use crate::text::TextTokenizer;

/// A data config that can be read here.
#[derive(Debug, Clone)]
pub struct TextData {
    /// Its name, for errors.
    name: String,
    /// Files, and how rows become text.
    config: DataConfig,
    /// Rows at most.
    max_rows: Option<usize>,
    /// The column that holds the answer.
    label_column: Option<String>,
    /// The answers to choose from.
    labels: Option<Vec<Value>>,
}

/// Rows with every label in place of their own.
#[derive(Debug, Clone)]
pub struct Choices {
    /// The labels.
    pub labels: Vec<Value>,
    /// For each row, for each label, the sample; labelled where the texts of the row differ.
    pub samples: Vec<Sample>,
    /// For each row, the index of its own label.
    pub answers: Vec<usize>,
}

impl Choices {
    /// For each row, the label whose text is likeliest; of equal ones the first. `scores` are those of the samples.
    pub fn chosen(&self, scores: &[SampleScore]) -> Vec<usize> {
        let best = |scores: &[SampleScore]| {
            let mut best = 0;
            for (at, score) in scores.iter().enumerate() {
                if score.loss < scores[best].loss {
                    best = at;
                }
            }
            best
        };
        scores.chunks_exact(self.labels.len().max(1)).map(best).collect()
    }
}

/// Keys of `load_dataset_config` that [`DataSource::parse`] reads.
const SOURCE_KEYS: &[&str] = &[
    "data_name",
    "data_files",
    "data_dir",
    "split",
    "shuffle_seed",
    "subset",
    "type",
    "name",
];
/// Keys of `load_dataset_config` that change nothing here.
const WITHOUT_EFFECT: &[&str] = &[
    "trust_remote_code",
    "cache_dir",
    "token",
    "use_auth_token",
    "streaming",
    "num_proc",
    "keep_in_memory",
    "save_infos",
    "download_mode",
    "download_config",
    "verification_mode",
    "ignore_verifications",
    "storage_options",
    "features",
    "model_name",
    "task",
    "user_script",
    "script_dir",
    "revision",
];
/// Keys of `pre_process_data_config` that say nothing about text.
const NOT_TEXT: &[&str] = &[
    "name",
    "task",
    "batched",
    "user_script",
    "script_dir",
    "label_col",
    "label_cols",
    "labels",
    "input_cols",
];

impl TextData {
    /// Reads a data config in today's spelling, as passes and evaluators are given it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] or [`Error::Config`] naming the data config and the key.
    pub fn read(value: &Value) -> Result<Self> {
        let empty = Map::new();
        let map = value.as_object().unwrap_or(&empty);
        let name = map
            .get("name")
            .and_then(Value::as_str)
            .unwrap_or("inline")
            .to_owned();
        let origin = format!("data config `{name}`");
        let part = |key: &str| map.get(key).and_then(Value::as_object).unwrap_or(&empty);
        let (load, pre) = (part("load_dataset_config"), part("pre_process_data_config"));
        let mut notes = Vec::new();
        let (source, max_rows) = read_source(&origin, load, &mut notes)?;
        let text = read_text(&origin, pre, &mut notes)?;
        for note in notes {
            tracing::warn!("{note}");
        }
        let label_column = label_column(&origin, pre)?;
        let labels = match pre.get("labels").filter(|labels| !labels.is_null()) {
            None => None,
            Some(Value::Array(labels)) if labels.len() > 1 => Some(labels.clone()),
            Some(other) => {
                let expected = "a list of two labels or more";
                let key = "pre_process_data_config.labels";
                return Err(Error::config(origin, key, expected, other.to_string()));
            }
        };
        Ok(Self {
            name,
            config: DataConfig { source, text },
            max_rows,
            label_column,
            labels,
        })
    }

    /// The rows.
    ///
    /// # Errors
    /// Those of [`DataSource::load`].
    pub fn table(&self) -> Result<Table> {
        let mut table = self.config.source.load()?;
        table.rows.truncate(self.max_rows.unwrap_or(usize::MAX));
        Ok(table)
    }

    /// Whether rows have a label to choose.
    pub fn has_labels(&self) -> bool {
        self.label_column.is_some()
    }

    /// The samples, for training and evaluation.
    ///
    /// # Errors
    /// Those of [`TextData::table`] and [`TextGenConfig::samples`].
    pub fn samples(&self, tokenizer: &TextTokenizer) -> Result<Vec<Sample>> {
        self.config.text.samples(&self.table()?, tokenizer)
    }

    /// Token sequences for calibration: plain text files as consecutive blocks from the start, rows as
    /// [`TextData::samples`] without their padding.
    ///
    /// # Errors
    /// As [`TextData::samples`].
    pub fn calibration(&self, tokenizer: &TextTokenizer) -> Result<Vec<Vec<u32>>> {
        if self.config.source.format == DataFormat::Text {
            return self.config.calibration(tokenizer);
        }
        let samples = self.samples(tokenizer)?.into_iter().map(|mut sample| {
            sample.input_ids.truncate(sample.length);
            sample.input_ids
        });
        Ok(samples.collect())
    }

    /// Samples that are labelled from the label on: what a row's text says before it is not predicted.
    ///
    /// # Errors
    /// As [`TextData::choices`].
    pub fn answers(&self, tokenizer: &TextTokenizer) -> Result<Vec<Sample>> {
        let choices = self.choices(tokenizer)?;
        let labels = choices.labels.len();
        let own = choices
            .answers
            .iter()
            .enumerate()
            .map(|(row, own)| row * labels + own);
        Ok(own.map(|at| choices.samples[at].clone()).collect())
    }

    /// The rows with every label in place of their own.
    ///
    /// # Errors
    /// [`Error::Config`] without `label_cols`, for a row whose label is none of the `labels`, and where label and
    /// text cannot be told apart; errors of [`TextGenConfig::samples`].
    pub fn choices(&self, tokenizer: &TextTokenizer) -> Result<Choices> {
        let origin = format!("data config `{}`", self.name);
        let wrong = |key: &str, expected: &str, found: String| Error::config(&origin, key, expected, found);
        let column = self.label_column.as_ref().ok_or_else(|| {
            let key = "pre_process_data_config.label_cols";
            wrong(key, "the column that holds the answer", "none".to_owned())
        })?;
        let mut table = self.table()?;
        if let Some(most) = self.config.text.max_samples {
            table.rows.truncate(most);
        }
        let labels = self.all_labels(column)?;
        let mut answers = Vec::with_capacity(table.rows.len());
        let mut spread = Table::default();
        for row in &table.rows {
            let own = row.fields.get(column).unwrap_or(&Value::Null);
            let index = labels.iter().position(|label| label == own).ok_or_else(|| {
                let expected = format!(
                    "one of {} in column `{column}` at line {}",
                    shown(&labels),
                    row.line
                );
                Error::file(&row.file, expected, own.to_string())
            })?;
            answers.push(index);
            for label in &labels {
                let mut other = row.clone();
                other.fields.insert(column.clone(), label.clone());
                spread.rows.push(other);
            }
        }
        let text = TextGenConfig {
            strategy: Strategy::LineByLine,
            max_seq_len: usize::MAX >> 1,
            max_samples: None,
            pad_to_max_len: false,
            drop_short_sequences: false,
            ..self.config.text.clone()
        };
        let mut samples = text.samples(&spread, tokenizer)?;
        if samples.len() != answers.len() * labels.len() {
            let found = format!("{} empty texts", answers.len() * labels.len() - samples.len());
            return Err(wrong("pre_process_data_config", "text in every row", found));
        }
        for (row, own) in samples.chunks_exact_mut(labels.len()).enumerate() {
            let shared = shared_prefix(own);
            // Without a token before the label nothing predicts it.
            if own.iter().any(|sample| sample.length <= shared.max(1)) {
                let line = table.rows[row].line;
                let expected = "a text that the label changes, with something before it";
                let found = format!("the same text for several labels at line {line}");
                return Err(wrong("pre_process_data_config.label_cols", expected, found));
            }
            for sample in own {
                sample.labels[..shared].fill(IGNORED_LABEL);
            }
        }
        Ok(Choices {
            labels,
            samples,
            answers,
        })
    }

    /// The labels of the config, or all that the files hold, in order.
    fn all_labels(&self, column: &str) -> Result<Vec<Value>> {
        if let Some(labels) = &self.labels {
            return Ok(labels.clone());
        }
        let source = DataSource {
            split: None,
            shuffle_seed: None,
            ..self.config.source.clone()
        };
        let mut found: Vec<Value> = Vec::new();
        for row in source.load()?.rows {
            match row.fields.get(column) {
                Some(label) if !label.is_null() => {
                    if !found.contains(label) {
                        found.push(label.clone());
                    }
                }
                _ => {
                    let expected = format!("column `{column}` at line {}", row.line);
                    return Err(Error::file(&row.file, expected, "no value"));
                }
            }
        }
        found.sort_by_key(plain);
        match found.len() {
            0 | 1 => Err(Error::config(
                format!("data config `{}`", self.name),
                "pre_process_data_config.label_cols",
                "a column with two different labels or more",
                shown(&found),
            )),
            _ => Ok(found),
        }
    }
}

/// A label as text.
pub fn plain(label: &Value) -> String {
    match label {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn shown(labels: &[Value]) -> String {
    labels.iter().map(plain).collect::<Vec<_>>().join(", ")
}

/// How many tokens all samples begin with.
fn shared_prefix(samples: &[Sample]) -> usize {
    let Some((first, rest)) = samples.split_first() else {
        return 0;
    };
    let same = |at: &usize| {
        rest.iter()
            .all(|other| other.input_ids.get(*at) == first.input_ids.get(*at))
    };
    (0..first.length).take_while(same).count()
}

fn label_column(origin: &str, pre: &Map<String, Value>) -> Result<Option<String>> {
    let given = ["label_cols", "label_col"].iter().find_map(|key| pre.get(*key));
    match given {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(column)) => Ok(Some(column.clone())),
        Some(Value::Array(list)) => match list.as_slice() {
            [Value::String(column)] => Ok(Some(column.clone())),
            _ => {
                let key = "pre_process_data_config.label_cols";
                Err(Error::config(
                    origin,
                    key,
                    "one column",
                    Value::from(list.clone()).to_string(),
                ))
            }
        },
        Some(other) => {
            let key = "pre_process_data_config.label_cols";
            Err(Error::config(origin, key, "a column", other.to_string()))
        }
    }
}

fn read_source(
    origin: &str,
    load: &Map<String, Value>,
    notes: &mut Vec<String>,
) -> Result<(DataSource, Option<usize>)> {
    let at = format!("{origin}.load_dataset_config");
    let mut max_rows = None;
    let mut kept = Map::new();
    for (key, value) in load.iter().filter(|(_, value)| !value.is_null()) {
        match key.as_str() {
            "max_samples" | "limit" => match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
                Some(rows) => max_rows = Some(rows),
                None => return Err(Error::config(at, key, "a number of rows", value.to_string())),
            },
            known if SOURCE_KEYS.contains(&known) => _ = kept.insert(key.clone(), value.clone()),
            known if WITHOUT_EFFECT.contains(&known) => {}
            _ => {
                let what = format!("`{key}` of {at}");
                return Err(Error::unsupported(
                    what,
                    "rows are read from the files as they are",
                ));
            }
        }
    }
    let name = kept.get("data_name").and_then(Value::as_str).unwrap_or_default();
    let path = Path::new(name);
    if !kept.contains_key("data_files") && path.exists() {
        let files = match path.is_dir() {
            true => data_files_in(path)?,
            false => vec![path.to_path_buf()],
        };
        let files: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
        kept.insert("data_files".to_owned(), Value::from(files));
        kept.insert("data_name".to_owned(), Value::Null);
    }
    let named = kept.get("data_name").and_then(Value::as_str);
    let name = match named {
        Some("jsonl") => "json".to_owned(),
        Some("txt") => "text".to_owned(),
        Some(name) => name.to_owned(),
        None => format_of(kept.get("data_files")).unwrap_or_default(),
    };
    if !name.is_empty() {
        kept.insert("data_name".to_owned(), Value::from(name));
    }
    Ok((DataSource::parse(&at, &kept, notes)?, max_rows))
}

/// The format that the names of files speak for.
fn format_of(files: Option<&Value>) -> Option<String> {
    let first = match files? {
        Value::String(text) => text.split(',').next()?.trim().to_owned(),
        Value::Array(list) => list.first()?.as_str()?.to_owned(),
        Value::Object(splits) => return format_of(splits.values().next()),
        _ => return None,
    };
    let extension = Path::new(&first)
        .extension()?
        .to_string_lossy()
        .to_ascii_lowercase();
    Some(match extension.as_str() {
        "json" | "jsonl" => "json".to_owned(),
        "txt" => "text".to_owned(),
        other => other.to_owned(),
    })
}

/// The data files of a folder, by name.
fn data_files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let path = entry.map_err(Error::io("list", folder))?.path();
        let known = path
            .extension()
            .is_some_and(|e| e == "json" || e == "jsonl" || e == "csv" || e == "txt");
        if path.is_file() && known {
            files.push(path);
        }
    }
    files.sort();
    match files.is_empty() {
        true => Err(Error::file(
            folder,
            "data files (.json, .jsonl, .csv, .txt)",
            "none",
        )),
        false => Ok(files),
    }
}

fn read_text(origin: &str, pre: &Map<String, Value>, notes: &mut Vec<String>) -> Result<TextGenConfig> {
    let at = format!("{origin}.pre_process_data_config");
    let kind = pre.get("type").and_then(Value::as_str).unwrap_or_default();
    let known = [
        "",
        "text_generation_huggingface_pre_process",
        "huggingface_pre_process",
        "pre_process",
    ];
    if !known.contains(&kind.to_ascii_lowercase().as_str()) {
        return Err(Error::unsupported(
            format!("`type` `{kind}` of {at}"),
            "rows become text by a template or by columns",
        ));
    }
    let mut kept: Map<String, Value> = pre
        .iter()
        .filter(|(key, _)| !NOT_TEXT.contains(&key.as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let given = |key: &str| pre.get(key).is_some_and(|value| !value.is_null());
    if let Some(columns) = pre.get("input_cols").filter(|columns| !columns.is_null())
        && !given("text_cols")
        && !given("text_template")
    {
        kept.insert("text_cols".to_owned(), columns.clone());
    }
    TextGenConfig::parse(&at, &kept, notes)
}

impl From<TextData> for DataConfig {
    fn from(data: TextData) -> Self {
        data.config
    }
}

impl TextData {
    /// Where the text of a row comes from.
    pub fn text(&self) -> &TextSource {
        &self.config.text.text
    }
}
