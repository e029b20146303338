//! Rows from local files: JSON, CSV or plain text.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::csv;
use super::split::Split;
use crate::error::{Error, Result};
use crate::fsio;
use crate::rng::PythonRng;

/// How data files are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataFormat {
    /// JSON objects one after another (JSON lines), or one array of them.
    Json,
    /// Comma-separated values under a line of column names.
    Csv,
    /// Plain text: a row is a line, its column is `text`.
    Text,
}

impl DataFormat {
    /// The format that a data set name of `olive` or Hugging Face stands for.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for anything but `json`, `csv` and `text`.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "json" => Ok(Self::Json),
            "csv" => Ok(Self::Csv),
            "text" => Ok(Self::Text),
            other => Err(Error::unsupported(
                format!("data set `{other}`"),
                "data sets are read from files: use `json`, `csv` or `text`, and name the files",
            )),
        }
    }
}

/// Local data files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataSource {
    /// How they are written.
    pub format: DataFormat,
    /// The files, in order.
    pub files: Vec<PathBuf>,
    /// The part to use, in Hugging Face's notation: `train[:100]`, `train[80%:]`. `None` for all of it.
    pub split: Option<String>,
    /// Shuffles the rows as Python's `random.Random(seed).shuffle` does, before the split takes its part.
    pub shuffle_seed: Option<i64>,
}

/// A row of a data file.
#[derive(Debug, Clone)]
pub struct Row {
    /// The file it comes from.
    pub file: Arc<Path>,
    /// The line on which it begins, counted from 1.
    pub line: usize,
    /// Columns and values.
    pub fields: Map<String, Value>,
}

/// The rows of a data source, in order.
#[derive(Debug, Clone, Default)]
pub struct Table {
    /// The rows.
    pub rows: Vec<Row>,
}

impl DataSource {
    /// All of the given files.
    pub fn new<P: Into<PathBuf>>(format: DataFormat, files: impl IntoIterator<Item = P>) -> Self {
        Self {
            format,
            files: files.into_iter().map(Into::into).collect(),
            split: None,
            shuffle_seed: None,
        }
    }

    /// Reads all rows of the split.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read; [`Error::File`] with the line for one that is not what it
    /// should be; [`Error::Config`] for a split that does not exist.
    pub fn load(&self) -> Result<Table> {
        let mut rows = Vec::new();
        for path in &self.files {
            let text = read_text(path)?;
            let file: Arc<Path> = Arc::from(path.as_path());
            match self.format {
                DataFormat::Json => read_json_rows(&file, &text, &mut rows)?,
                DataFormat::Csv => read_csv_rows(&file, &text, &mut rows)?,
                DataFormat::Text => rows.extend(text.lines().enumerate().map(|(i, line)| Row {
                    file: file.clone(),
                    line: i + 1,
                    fields: Map::from_iter([("text".to_owned(), Value::from(line))]),
                })),
            }
        }
        if let Some(seed) = self.shuffle_seed {
            PythonRng::new(seed).shuffle(&mut rows);
        }
        if let Some(split) = &self.split {
            let split = Split::parse(split)?;
            if !matches!(split.name.as_str(), "train" | "all" | "") {
                let expected = "`train`, or a part of it such as `train[80%:]`: data files have one split";
                return Err(Error::config(
                    "data",
                    "split",
                    expected,
                    format!("`{}`", split.name),
                ));
            }
            let range = split.rows(rows.len());
            rows = rows.drain(range).collect();
        }
        Ok(Table { rows })
    }

    /// The files' texts as they are, in order; for [`DataFormat::Text`].
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] for one that is not UTF-8.
    pub fn texts(&self) -> Result<Vec<String>> {
        self.files.iter().map(|path| read_text(path)).collect()
    }
}

fn read_text(path: &Path) -> Result<String> {
    let bytes = fsio::read(path)?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let found = format!("other bytes at {}", e.utf8_error().valid_up_to());
        Error::file(path, "UTF-8 text", found)
    })?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

/// Lines up to a byte of the text, counted from 1.
struct LineCounter<'a> {
    text: &'a str,
    at: usize,
    line: usize,
}

impl LineCounter<'_> {
    fn line_of(&mut self, byte: usize) -> usize {
        self.line += self.text.as_bytes()[self.at..byte]
            .iter()
            .filter(|b| **b == b'\n')
            .count();
        self.at = byte;
        self.line
    }
}

fn read_json_rows(file: &Arc<Path>, text: &str, rows: &mut Vec<Row>) -> Result<()> {
    if text.trim_start().starts_with('[') {
        let list: Vec<Value> = serde_json::from_str(text).map_err(Error::json(file))?;
        for (i, value) in list.into_iter().enumerate() {
            // The line of an array's item is not known; its number serves.
            rows.push(object_row(file, i + 1, value)?);
        }
        return Ok(());
    }
    let mut lines = LineCounter { text, at: 0, line: 1 };
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    loop {
        let blank = text[stream.byte_offset()..].len() - text[stream.byte_offset()..].trim_start().len();
        let begin = stream.byte_offset() + blank;
        match stream.next() {
            None => return Ok(()),
            Some(value) => {
                let value = value.map_err(Error::json(file))?;
                rows.push(object_row(file, lines.line_of(begin), value)?);
            }
        }
    }
}

fn object_row(file: &Arc<Path>, line: usize, value: Value) -> Result<Row> {
    match value {
        Value::Object(fields) => Ok(Row {
            file: file.clone(),
            line,
            fields,
        }),
        other => {
            let found: String = other.to_string().chars().take(40).collect();
            Err(Error::file(
                file,
                "JSON objects",
                format!("`{found}` at line {line}"),
            ))
        }
    }
}

fn read_csv_rows(file: &Arc<Path>, text: &str, rows: &mut Vec<Row>) -> Result<()> {
    let wrong = |line: usize, found: String| {
        Error::file(file, "comma-separated values", format!("{found} at line {line}"))
    };
    let mut records = csv::records(text)
        .map_err(|(line, found)| wrong(line, found.to_owned()))?
        .into_iter();
    let Some((_, names)) = records.next() else {
        return Ok(());
    };
    for (line, fields) in records {
        if fields.len() != names.len() {
            return Err(wrong(
                line,
                format!("{} fields under {} columns", fields.len(), names.len()),
            ));
        }
        let fields = names
            .iter()
            .cloned()
            .zip(fields.into_iter().map(Value::from))
            .collect();
        rows.push(Row {
            file: file.clone(),
            line,
            fields,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(format: DataFormat, name: &str, content: &[u8]) -> Result<Table> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        DataSource::new(format, [path]).load()
    }

    #[test]
    fn json_lines_arrays_and_spread_objects_are_read() {
        for content in [
            &b"{\"a\": 1}\n{\"a\": 2}\n"[..],
            b"\xef\xbb\xbf\n{\"a\": 1}\r\n\n{\n\"a\": 2}",
            b" [{\"a\": 1}, {\"a\": 2}]",
        ] {
            let table = load(DataFormat::Json, "f.json", content).unwrap();
            let values: Vec<_> = table.rows.iter().map(|row| row.fields["a"].clone()).collect();
            assert_eq!(values, [1, 2]);
        }
        let table = load(DataFormat::Json, "f", b"\n{\"a\": 1}\n\n{\n\"a\": 2} {\"a\": 3}").unwrap();
        let lines: Vec<_> = table.rows.iter().map(|row| row.line).collect();
        assert_eq!(lines, [2, 4, 5]);
    }

    #[test]
    fn broken_files_are_named_with_the_line() {
        for (format, content, wanted) in [
            (DataFormat::Json, &b"{\"a\": 1}\n{\"a\": \n"[..], "line 3"),
            (DataFormat::Json, b"{\"a\": 1}\n7\n", "line 2"),
            (DataFormat::Csv, b"a,b\n1,2\n1\n", "line 3"),
            (DataFormat::Text, b"ok\n\xff", "at 3"),
        ] {
            let error = load(format, "name.x", content).unwrap_err().to_string();
            assert!(error.contains("name.x") && error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn splits_cut_and_unknown_ones_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f.txt");
        std::fs::write(&path, "a\nb\n\nc\n").unwrap();
        let mut source = DataSource::new(DataFormat::Text, [path]);
        assert_eq!(source.load().unwrap().rows.len(), 4);
        source.split = Some("train[50%:]".to_owned());
        assert_eq!(source.load().unwrap().rows[1].fields["text"], "c");
        source.split = Some("validation".to_owned());
        assert!(source.load().unwrap_err().is_usage());
    }
}
