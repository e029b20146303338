//! Rows to samples, by the rules of Olive's text-generation preprocessing.

use std::collections::HashMap;

use serde_json::Value;

use super::config::{Strategy, TextGenConfig, TextSource};
use super::sample::{IGNORED_LABEL, Sample};
use super::source::{Row, Table};
use super::template::Misfit;
use crate::error::{Error, Result};
use crate::rng::PythonRng;
use crate::text::{ChatInputs, TextTokenizer};

/// See [`TextGenConfig::samples`].
pub(super) fn samples(
    config: &TextGenConfig,
    table: &Table,
    tokenizer: &TextTokenizer,
) -> Result<Vec<Sample>> {
    check(config)?;
    let texts = texts(config, table, tokenizer)?;
    let wrong = |expected: &str, found: String| Err(Error::config("data", "data_files", expected, found));
    if texts.is_empty() {
        return wrong("rows with text", format!("none in {} row(s)", table.rows.len()));
    }
    let samples = match config.strategy {
        Strategy::Join => join(config, &texts, tokenizer, config.max_seq_len, 0)?,
        Strategy::JoinSlidingWindow { stride } => {
            join(config, &texts, tokenizer, stride, config.max_seq_len - stride)?
        }
        Strategy::JoinRandom => join_random(config, &texts, tokenizer)?,
        Strategy::LineByLine => lines(config, &texts, tokenizer)?,
        Strategy::LineByLineRandom => lines_random(config, &texts, tokenizer)?,
    };
    if samples.is_empty() {
        let expected = format!("text for a sample of {} tokens", config.max_seq_len);
        return wrong(&expected, format!("less in {} row(s)", texts.len()));
    }
    if let Some(wanted) = config.max_samples.filter(|wanted| samples.len() < *wanted) {
        tracing::debug!(
            "the data gives {} samples, fewer than max_samples = {wanted}",
            samples.len()
        );
    }
    Ok(samples)
}

fn check(config: &TextGenConfig) -> Result<()> {
    let wrong = |key: &str, expected: &str, found: String| Err(Error::config("data", key, expected, found));
    if config.max_seq_len == 0 {
        return wrong("max_seq_len", "at least 1", "0".to_owned());
    }
    if config.pad_to_max_len && config.drop_short_sequences {
        let found = "both".to_owned();
        return wrong("drop_short_sequences", "either this or pad_to_max_len", found);
    }
    if let Strategy::JoinSlidingWindow { stride } = config.strategy
        && !(1..=config.max_seq_len).contains(&stride)
    {
        let expected = format!("1 to max_seq_len = {}", config.max_seq_len);
        return wrong("stride", &expected, stride.to_string());
    }
    let random = matches!(config.strategy, Strategy::JoinRandom | Strategy::LineByLineRandom);
    if random && config.max_samples.is_none() {
        return wrong(
            "max_samples",
            "a number, for a random strategy",
            "none".to_owned(),
        );
    }
    Ok(())
}

/// The texts of the rows; empty ones are dropped.
fn texts(config: &TextGenConfig, table: &Table, tokenizer: &TextTokenizer) -> Result<Vec<String>> {
    let mut texts = Vec::with_capacity(table.rows.len());
    for row in &table.rows {
        let mut text = row_text(&config.text, row, tokenizer)?;
        if config.add_special_tokens && !matches!(config.text, TextSource::Chat { .. }) {
            let special = tokenizer.special();
            let token = |token: &Option<String>, name: &str| {
                token.clone().ok_or_else(|| {
                    let expected = format!("a tokenizer with a {name}");
                    Error::config("data", "add_special_tokens", expected, "none")
                })
            };
            let (bos, eos) = (
                token(&special.bos, "bos_token")?,
                token(&special.eos, "eos_token")?,
            );
            text = format!("{bos} {text} {eos}");
        }
        if !text.is_empty() {
            texts.push(text);
        }
    }
    Ok(texts)
}

fn row_text(source: &TextSource, row: &Row, tokenizer: &TextTokenizer) -> Result<String> {
    let missing = |column: &str| {
        let columns: Vec<String> = row.fields.keys().map(|name| format!("`{name}`")).collect();
        let found = match row.fields.get(column) {
            Some(_) => "no value".to_owned(),
            None => format!("columns {}", columns.join(", ")),
        };
        Error::file(
            &row.file,
            format!("column `{column}` at line {}", row.line),
            found,
        )
    };
    match source {
        TextSource::Template(template) => template.render(&row.fields).map_err(|misfit| match misfit {
            Misfit::Missing(column) => missing(&column),
            Misfit::Value(column, reason) => {
                let expected = format!("column `{column}` at line {} to fit the template", row.line);
                Error::file(&row.file, expected, reason)
            }
        }),
        TextSource::Columns(columns) => {
            let mut parts = Vec::with_capacity(columns.len());
            for column in columns {
                match row.fields.get(column) {
                    Some(Value::String(text)) => parts.push(text.as_str()),
                    None | Some(Value::Null) => return Err(missing(column)),
                    Some(other) => {
                        let expected = format!("text in column `{column}` at line {}", row.line);
                        return Err(Error::file(&row.file, expected, other.to_string()));
                    }
                }
            }
            Ok(parts.join(" "))
        }
        TextSource::Chat { column, template } => {
            let messages = row.fields.get(column).filter(|messages| !messages.is_null());
            let inputs = ChatInputs {
                add_generation_prompt: false,
                template: template.as_deref(),
                ..ChatInputs::prompt(messages.ok_or_else(|| missing(column))?)
            };
            tokenizer.render_chat(&inputs).map_err(|error| {
                let expected = format!("chat messages at line {}", row.line);
                Error::file(&row.file, expected, error.to_string())
            })
        }
    }
}

/// Blocks of all rows one after another. A block begins every `step` tokens; its first `context` are not trained.
fn join(
    config: &TextGenConfig,
    texts: &[String],
    tokenizer: &TextTokenizer,
    step: usize,
    context: usize,
) -> Result<Vec<Sample>> {
    let joiner = joiner_ids(config, tokenizer)?;
    let limit = config.max_samples.unwrap_or(usize::MAX);
    let mut samples = Vec::new();
    let mut pending: Vec<u32> = Vec::new();
    for batch in texts.chunks(config.processing_batch_size.max(1)) {
        if samples.len() >= limit {
            break;
        }
        for ids in tokenizer.encode_batch(batch, false)? {
            pending.extend(ids);
            pending.extend(&joiner);
        }
        let mut begin = 0;
        let mut used = 0;
        while begin + config.max_seq_len <= pending.len() && samples.len() < limit {
            used = begin + config.max_seq_len;
            let mut sample = Sample::from_ids(pending[begin..used].to_vec());
            sample.labels[..context].fill(IGNORED_LABEL);
            samples.push(sample);
            begin += step;
        }
        pending.drain(..used);
    }
    Ok(samples)
}

fn joiner_ids(config: &TextGenConfig, tokenizer: &TextTokenizer) -> Result<Vec<u32>> {
    if config.joiner.is_empty() {
        return Ok(Vec::new());
    }
    tokenizer.encode(&config.joiner, false)
}

/// Token ids of rows that are asked for in random order, each tokenised once.
struct Encoded<'a> {
    texts: &'a [String],
    tokenizer: &'a TextTokenizer,
    ids: HashMap<usize, Vec<u32>>,
}

impl<'a> Encoded<'a> {
    fn new(texts: &'a [String], tokenizer: &'a TextTokenizer) -> Self {
        Self {
            texts,
            tokenizer,
            ids: HashMap::new(),
        }
    }

    fn row(&mut self, row: usize) -> Result<&[u32]> {
        Ok(match self.ids.entry(row) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(self.tokenizer.encode(&self.texts[row], false)?)
            }
        })
    }
}

/// Draws rows until `make` gives a sample or the retries are used up, `max_samples` times.
fn draw(
    config: &TextGenConfig,
    rows: usize,
    mut make: impl FnMut(usize) -> Result<Option<Sample>>,
) -> Result<Vec<Sample>> {
    let mut rng = PythonRng::new(config.random_seed);
    let mut samples = Vec::new();
    for _ in 0..config.max_samples.unwrap_or_default() {
        for _ in 0..config.random_retries {
            let row = rng.up_to(rows as u64 - 1) as usize;
            if let Some(sample) = make(row)? {
                samples.push(sample);
                break;
            }
        }
    }
    Ok(samples)
}

fn join_random(config: &TextGenConfig, texts: &[String], tokenizer: &TextTokenizer) -> Result<Vec<Sample>> {
    let joiner = joiner_ids(config, tokenizer)?;
    let mut encoded = Encoded::new(texts, tokenizer);
    draw(config, texts.len(), |first| {
        let mut ids: Vec<u32> = Vec::new();
        for row in first..texts.len() {
            ids.extend(encoded.row(row)?);
            ids.extend(&joiner);
            if ids.len() >= config.max_seq_len {
                ids.truncate(config.max_seq_len);
                return Ok(Some(Sample::from_ids(ids)));
            }
        }
        Ok(None)
    })
}

fn lines(config: &TextGenConfig, texts: &[String], tokenizer: &TextTokenizer) -> Result<Vec<Sample>> {
    let limit = config.max_samples.unwrap_or(usize::MAX);
    let mut samples = Vec::new();
    for batch in texts.chunks(config.processing_batch_size.max(1)) {
        for ids in tokenizer.encode_batch(batch, false)? {
            if samples.len() >= limit {
                return Ok(samples);
            }
            samples.extend(line_sample(config, tokenizer, &ids)?);
        }
    }
    Ok(samples)
}

fn lines_random(config: &TextGenConfig, texts: &[String], tokenizer: &TextTokenizer) -> Result<Vec<Sample>> {
    let mut encoded = Encoded::new(texts, tokenizer);
    draw(config, texts.len(), |row| {
        line_sample(config, tokenizer, encoded.row(row)?)
    })
}

/// A row's tokens, cut off and filled up; `None` if it is short and short ones are dropped.
fn line_sample(config: &TextGenConfig, tokenizer: &TextTokenizer, ids: &[u32]) -> Result<Option<Sample>> {
    if config.drop_short_sequences && ids.len() < config.max_seq_len {
        return Ok(None);
    }
    let mut sample = Sample::from_ids(ids[..ids.len().min(config.max_seq_len)].to_vec());
    if config.pad_to_max_len {
        let pad = tokenizer.pad_id().ok_or_else(|| {
            let expected = "a tokenizer with a pad_token or eos_token";
            Error::config("data", "pad_to_max_len", expected, "neither")
        })?;
        sample.input_ids.resize(config.max_seq_len, pad);
        sample.labels.resize(config.max_seq_len, IGNORED_LABEL);
    }
    Ok(Some(sample))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{DataFormat, DataSource};
    use serde_json::json;
    use std::path::Path;
    use std::sync::Arc;

    fn tokenizer() -> TextTokenizer {
        TextTokenizer::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/tiny-phi3")).unwrap()
    }

    fn table(texts: &[&str]) -> Table {
        let file: Arc<Path> = Arc::from(Path::new("rows.json"));
        let row = |(i, text): (usize, &&str)| Row {
            file: file.clone(),
            line: i + 1,
            fields: json!({"text": text}).as_object().unwrap().clone(),
        };
        Table {
            rows: texts.iter().enumerate().map(row).collect(),
        }
    }

    fn config() -> TextGenConfig {
        TextGenConfig::new(TextSource::Columns(vec!["text".to_owned()]))
    }

    const ROWS: [&str; 5] = [
        "one two three four five six",
        "",
        "a horse and a cart on the road to the town",
        "short",
        "in the evening the lamps were lit and they sat down to dinner",
    ];

    /// The stream of the join strategies, written out plainly.
    fn stream(tokenizer: &TextTokenizer, rows: &[&str], joiner: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        for row in rows.iter().filter(|row| !row.is_empty()) {
            ids.extend(tokenizer.encode(row, false).unwrap());
            ids.extend(tokenizer.encode(joiner, false).unwrap());
        }
        ids
    }

    #[test]
    fn join_cuts_blocks_and_keeps_one_that_ends_exactly() {
        let tokenizer = tokenizer();
        let ids = stream(&tokenizer, &ROWS, "\n\n");
        for (max_seq_len, batch) in [(7, 1024), (7, 1), (7, 2), (ids.len(), 1024), (ids.len() / 2, 3)] {
            let config = TextGenConfig {
                max_seq_len,
                processing_batch_size: batch,
                ..config()
            };
            let samples = config.samples(&table(&ROWS), &tokenizer).unwrap();
            let wanted: Vec<Sample> = ids
                .chunks_exact(max_seq_len)
                .map(|c| Sample::from_ids(c.to_vec()))
                .collect();
            assert_eq!(samples, wanted, "{max_seq_len} {batch}");
        }
        let longer = TextGenConfig {
            max_seq_len: ids.len() + 1,
            ..config()
        };
        assert!(longer.samples(&table(&ROWS), &tokenizer).unwrap_err().is_usage());
        let capped = TextGenConfig {
            max_seq_len: 7,
            max_samples: Some(2),
            ..config()
        };
        assert_eq!(capped.samples(&table(&ROWS), &tokenizer).unwrap().len(), 2);
    }

    #[test]
    fn sliding_windows_mask_their_context_even_in_the_first() {
        let tokenizer = tokenizer();
        let ids = stream(&tokenizer, &ROWS, "\n\n");
        let config = TextGenConfig {
            max_seq_len: 9,
            strategy: Strategy::JoinSlidingWindow { stride: 4 },
            ..config()
        };
        let samples = config.samples(&table(&ROWS), &tokenizer).unwrap();
        assert_eq!(samples.len(), (ids.len() - 9) / 4 + 1);
        for (i, sample) in samples.iter().enumerate() {
            assert_eq!(sample.input_ids, ids[i * 4..i * 4 + 9]);
            assert_eq!(sample.labels[..5], [IGNORED_LABEL; 5]);
            assert_eq!(sample.labels[5], i64::from(sample.input_ids[5]));
        }
        let wrong = TextGenConfig {
            strategy: Strategy::JoinSlidingWindow { stride: 10 },
            ..config
        };
        assert!(wrong.samples(&table(&ROWS), &tokenizer).is_err());
    }

    #[test]
    fn lines_are_cut_padded_or_dropped() {
        let tokenizer = tokenizer();
        let config = TextGenConfig {
            strategy: Strategy::LineByLine,
            max_seq_len: 6,
            ..config()
        };
        let samples = config.samples(&table(&ROWS), &tokenizer).unwrap();
        assert_eq!(samples.len(), 4);
        for (sample, row) in samples.iter().zip(ROWS.iter().filter(|row| !row.is_empty())) {
            let ids = tokenizer.encode(row, false).unwrap();
            let length = ids.len().min(6);
            assert_eq!(sample.length, length);
            assert_eq!(sample.input_ids[..length], ids[..length]);
            assert_eq!(sample.input_ids.len(), 6);
            assert!(
                sample.input_ids[length..]
                    .iter()
                    .all(|id| Some(*id) == tokenizer.pad_id())
            );
            assert!(
                sample.labels[length..]
                    .iter()
                    .all(|label| *label == IGNORED_LABEL)
            );
        }
        let dropping = TextGenConfig {
            pad_to_max_len: false,
            drop_short_sequences: true,
            ..config.clone()
        };
        let kept = dropping.samples(&table(&ROWS), &tokenizer).unwrap();
        assert!(kept.iter().all(|sample| sample.length == 6) && kept.len() < 4);
        let unpadded = TextGenConfig {
            pad_to_max_len: false,
            max_samples: Some(3),
            ..config.clone()
        };
        let unpadded = unpadded.samples(&table(&ROWS), &tokenizer).unwrap();
        assert_eq!(unpadded.len(), 3);
        assert!(
            unpadded
                .iter()
                .all(|sample| sample.input_ids.len() == sample.length)
        );
        let both = TextGenConfig {
            drop_short_sequences: true,
            ..config
        };
        assert!(both.samples(&table(&ROWS), &tokenizer).is_err());
    }

    #[test]
    fn random_strategies_draw_pythons_rows() {
        let tokenizer = tokenizer();
        // `random.Random(42)`: randint(0, 3) gives 0, 0, 2, 1, 1, 1.
        let rows: Vec<u64> = {
            let mut rng = PythonRng::new(42);
            (0..6).map(|_| rng.up_to(3)).collect()
        };
        assert_eq!(rows, [0, 0, 2, 1, 1, 1]);
        let texts: Vec<&str> = ROWS.iter().copied().filter(|row| !row.is_empty()).collect();
        let lines = TextGenConfig {
            strategy: Strategy::LineByLineRandom,
            max_seq_len: 64,
            max_samples: Some(6),
            pad_to_max_len: false,
            ..config()
        };
        for (sample, row) in lines
            .samples(&table(&ROWS), &tokenizer)
            .unwrap()
            .iter()
            .zip(&rows)
        {
            assert_eq!(
                sample.input_ids,
                tokenizer.encode(texts[*row as usize], false).unwrap()
            );
        }
        let join = TextGenConfig {
            strategy: Strategy::JoinRandom,
            max_seq_len: 8,
            ..lines.clone()
        };
        for (sample, row) in join.samples(&table(&ROWS), &tokenizer).unwrap().iter().zip(&rows) {
            assert_eq!(
                sample.input_ids,
                stream(&tokenizer, &texts[*row as usize..], "\n\n")[..8]
            );
        }
        let unlimited = TextGenConfig {
            max_samples: None,
            ..lines
        };
        assert!(unlimited.samples(&table(&ROWS), &tokenizer).is_err());
    }

    #[test]
    fn special_tokens_are_written_with_spaces() {
        let tokenizer = tokenizer();
        let config = TextGenConfig {
            strategy: Strategy::LineByLine,
            add_special_tokens: true,
            pad_to_max_len: false,
            ..config()
        };
        let samples = config.samples(&table(&["hello"]), &tokenizer).unwrap();
        let wanted = tokenizer.encode("<s> hello <|endoftext|>", false).unwrap();
        assert_eq!(samples[0].input_ids, wanted);
    }

    #[test]
    fn a_missing_column_is_named_with_its_line() {
        let tokenizer = tokenizer();
        let mut rows = table(&ROWS);
        rows.rows[2].fields.clear();
        let error = config().samples(&rows, &tokenizer).unwrap_err().to_string();
        assert!(
            error.contains("rows.json") && error.contains("`text`") && error.contains("line 3"),
            "{error}"
        );
        let mut config = config();
        config.text = TextSource::template("{prompt}").unwrap();
        let error = config.samples(&table(&ROWS), &tokenizer).unwrap_err().to_string();
        assert!(
            error.contains("`prompt` at line 1") && error.contains("columns `text`"),
            "{error}"
        );
        let empty = table(&["", ""]);
        assert!(super::samples(&super::tests::config(), &empty, &tokenizer).is_err());
    }

    #[test]
    fn chat_rows_use_the_models_template() {
        let tokenizer = tokenizer();
        let mut rows = table(&["x"]);
        rows.rows[0].fields.insert(
            "messages".to_owned(),
            json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]),
        );
        let config = TextGenConfig {
            text: TextSource::Chat {
                column: "messages".to_owned(),
                template: None,
            },
            strategy: Strategy::LineByLine,
            pad_to_max_len: false,
            add_special_tokens: true,
            ..config()
        };
        let samples = config.samples(&rows, &tokenizer).unwrap();
        let text = "<|user|>\nhi<|end|>\n<|assistant|>\nyes<|end|>\n<|endoftext|>";
        assert_eq!(samples[0].input_ids, tokenizer.encode(text, false).unwrap());
    }

    #[test]
    fn the_travel_data_gives_the_blocks_of_the_lab() {
        let tokenizer = tokenizer();
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../fixtures/data_sample_travel.jsonl"
        );
        let mut config = config();
        config.text =
            TextSource::template("<|user|>\n{prompt}<|end|>\n<|assistant|>\n{response}<|end|>").unwrap();
        let rows = DataSource::new(DataFormat::Json, [path]).load().unwrap();
        assert_eq!(rows.rows.len(), 289);
        let samples = config.samples(&rows, &tokenizer).unwrap();
        assert!(samples.len() > 15, "{}", samples.len());
    }
}
