//! Tasks in local files: multiple choice, and perplexity of plain text, scored as lm-evaluation-harness scores them.
//!
//! A task is a file, or an object in that tool's keys:
//!
//! | form | read as |
//! |---|---|
//! | `"quiz.jsonl"` (`.json`, `.jsonl`, `.csv`) | rows with a question (`question`, `query`, `prompt`, `context`, `text` or `sentence`), `choices` (or `options`, `endings`) and an `answer` (or `gold`, `label`, `target`): an index, a letter, or the choice itself. The prompt is `Question: …\nAnswer:` |
//! | `"text.txt"` | a text whose perplexity is measured in blocks of `max_length` tokens |
//! | `{"task": "quiz", "dataset_path": "json", "dataset_kwargs": {"data_files": "quiz.jsonl"}, "doc_to_text": "{{question}}", "doc_to_choice": ["no", "yes"], "doc_to_target": "label"}` | the same rows with columns or templates for question, choices and answer; `target_delimiter` stands between prompt and choice |
//!
//! Values are named by the task: `quiz-acc` is the share of rows whose answer is the likeliest choice, `quiz-acc_norm`
//! the same with the log-likelihood divided by the choice's length, `text-perplexity` a perplexity.

use std::path::{Path, PathBuf};

use minijinja::Environment;
use olive_core::data::{DataFormat, DataSource, IGNORED_LABEL, Row, Sample, token_blocks};
use olive_core::text::TextTokenizer;
use olive_core::workflow::registry::{EvalContext, Evaluator, Measured};
use olive_core::workflow::schema::{DataConfig, MetricSpec};
use olive_core::{CancelToken, Error, ModelHandle, Progress, Result};
use serde_json::{Map, Value};

use super::score::{Scorer, Scorers};

/// A question with its choices.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// What stands before the choice.
    pub prompt: String,
    /// The choices.
    pub choices: Vec<String>,
    /// The right one.
    pub answer: usize,
}

/// What a task asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum TaskKind {
    /// Which choice is likeliest.
    Choices {
        /// The questions.
        questions: Vec<Question>,
        /// What stands between prompt and choice.
        delimiter: String,
    },
    /// How well a text is foreseen.
    Text(String),
}

/// A task.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// Its name, by which values are named.
    pub name: String,
    /// What it asks for.
    pub kind: TaskKind,
}

/// How tasks are run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TaskOptions {
    /// Tokens of a sample at most: longer prompts lose their beginning, texts are cut into blocks.
    pub max_length: usize,
    /// Questions (or blocks) at most: a number from 1 on, a share below 1; `None` for all.
    pub limit: Option<f64>,
}

impl Default for TaskOptions {
    /// 1024 tokens, no limit.
    fn default() -> Self {
        Self {
            max_length: 1024,
            limit: None,
        }
    }
}

impl TaskOptions {
    fn most(&self, all: usize) -> usize {
        match self.limit {
            None => all,
            Some(share) if share < 1.0 => ((all as f64 * share).ceil() as usize).clamp(1, all.max(1)),
            Some(count) => (count as usize).min(all),
        }
    }
}

impl Task {
    /// Reads a task: the path of a file, or an object. Relative paths are relative to `folder`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a task that is no file here; [`Error::File`] with the line of a row that does not
    /// fit; [`Error::Config`] naming the key of the object.
    pub fn read(task: &Value, folder: &Path) -> Result<Self> {
        match task {
            Value::String(name) => Self::from_file(&folder.join(name), name),
            Value::Object(keys) => Self::from_object(keys, folder),
            other => Err(Error::config(
                "tasks",
                "task",
                "a file or an object",
                other.to_string(),
            )),
        }
    }

    fn from_file(path: &Path, given: &str) -> Result<Self> {
        if !path.is_file() {
            return Err(Error::unsupported(
                format!("the task `{given}`"),
                "tasks are read from files of this machine: give a file of questions (.json, .jsonl, .csv) or a \
                 text (.txt)",
            ));
        }
        let name = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let kind = match format_of(path)? {
            DataFormat::Text => TaskKind::Text(DataSource::new(DataFormat::Text, [path]).texts()?.concat()),
            format => {
                let rows = DataSource::new(format, [path]).load()?.rows;
                let questions = rows.iter().map(plain_question).collect::<Result<_>>()?;
                TaskKind::Choices {
                    questions,
                    delimiter: " ".to_owned(),
                }
            }
        };
        Ok(Self { name, kind })
    }

    fn from_object(keys: &Map<String, Value>, folder: &Path) -> Result<Self> {
        let text = |key: &str| keys.get(key).and_then(Value::as_str);
        let name = text("task_alias")
            .or_else(|| text("task"))
            .unwrap_or("task")
            .to_owned();
        let origin = format!("task `{name}`");
        if keys
            .get("num_fewshot")
            .and_then(Value::as_u64)
            .is_some_and(|n| n > 0)
        {
            return Err(Error::unsupported(
                format!("`num_fewshot` of {origin}"),
                "questions are asked without examples",
            ));
        }
        if let Some(kind) = text("output_type").filter(|kind| *kind != "multiple_choice") {
            return Err(Error::unsupported(
                format!("`output_type` `{kind}` of {origin}"),
                "tasks are multiple_choice",
            ));
        }
        let files = task_files(keys, folder);
        let Some(first) = files.first() else {
            let what = format!("the data set of {origin}");
            return Err(Error::unsupported(
                what,
                "name local files: `dataset_kwargs.data_files`",
            ));
        };
        let rows = DataSource::new(format_of(first)?, files.iter().cloned())
            .load()?
            .rows;
        let asks = Asks {
            origin: &origin,
            question: keys.get("doc_to_text"),
            choices: keys.get("doc_to_choice"),
            answer: keys.get("doc_to_target"),
        };
        let questions = rows.iter().map(|row| asks.question(row)).collect::<Result<_>>()?;
        let delimiter = text("target_delimiter").unwrap_or(" ").to_owned();
        let kind = TaskKind::Choices { questions, delimiter };
        Ok(Self { name, kind })
    }

    /// Runs the task on a model and gives its values by name.
    ///
    /// # Errors
    /// Those of the scorer; [`Error::Config`] for a task without questions.
    pub fn run(
        &self,
        scorer: &dyn Scorer,
        model: &dyn ModelHandle,
        options: &TaskOptions,
        progress: &dyn Progress,
        cancel: &CancelToken,
    ) -> Result<Vec<Measured>> {
        let tokenizer = TextTokenizer::open(model.path())?;
        let named = |what: &str, value: f64, higher_is_better: bool| Measured {
            name: format!("{}-{what}", self.name),
            value,
            higher_is_better,
        };
        match &self.kind {
            TaskKind::Text(text) => {
                let mut blocks =
                    token_blocks(&tokenizer, std::slice::from_ref(text), options.max_length, None)?;
                blocks.truncate(options.most(blocks.len()));
                let samples: Vec<Sample> = blocks.into_iter().map(Sample::from_ids).collect();
                let scores = scorer.score(model, &samples, progress, cancel)?;
                let loss: f64 = scores.iter().map(|score| score.loss).sum();
                let tokens: usize = scores.iter().map(|score| score.tokens).sum();
                if tokens == 0 {
                    return Err(self.empty("two tokens or more"));
                }
                Ok(vec![named("perplexity", (loss / tokens as f64).exp(), false)])
            }
            TaskKind::Choices { questions, delimiter } => {
                let questions = &questions[..options.most(questions.len())];
                if questions.is_empty() {
                    return Err(self.empty("at least one question"));
                }
                let mut samples = Vec::new();
                for question in questions {
                    for choice in &question.choices {
                        let (prompt, choice) = (&question.prompt, format!("{delimiter}{choice}"));
                        samples.push(continuation(&tokenizer, prompt, &choice, options.max_length)?);
                    }
                }
                let scores = scorer.score(model, &samples, progress, cancel)?;
                let (mut right, mut right_by_length, mut at) = (0, 0, 0);
                for question in questions {
                    let own = &scores[at..at + question.choices.len()];
                    at += question.choices.len();
                    let best = |value: &dyn Fn(usize) -> f64| {
                        (1..own.len()).fold(0, |best, i| if value(i) > value(best) { i } else { best })
                    };
                    let length = |i: usize| question.choices[i].chars().count().max(1) as f64;
                    right += usize::from(best(&|i| -own[i].loss) == question.answer);
                    right_by_length += usize::from(best(&|i| -own[i].loss / length(i)) == question.answer);
                }
                let share = |count: usize| count as f64 / questions.len() as f64;
                Ok(vec![
                    named("acc", share(right), true),
                    named("acc_norm", share(right_by_length), true),
                ])
            }
        }
    }

    fn empty(&self, expected: &str) -> Error {
        Error::config(format!("task `{}`", self.name), "data", expected, "none")
    }
}

/// The sample of a prompt and what goes on from it, labelled from there. Spaces at the end of the prompt belong to the
/// continuation, since tokens begin with their space; an empty prompt is a begin (or end) token.
fn continuation(tokenizer: &TextTokenizer, prompt: &str, after: &str, longest: usize) -> Result<Sample> {
    let kept = prompt.trim_end_matches(' ');
    let after = format!("{}{after}", &prompt[kept.len()..]);
    let (mut ids, from) = match kept {
        "" => {
            let first = tokenizer.bos_id().or(tokenizer.eos_id());
            let first = first.ok_or_else(|| {
                Error::config(
                    "tasks",
                    "prompt",
                    "text, or a tokenizer with a bos_token",
                    "neither",
                )
            })?;
            let mut ids = vec![first];
            ids.extend(tokenizer.encode(&after, false)?);
            (ids, 1)
        }
        kept => {
            let before = tokenizer.encode(kept, false)?.len();
            (tokenizer.encode(&format!("{kept}{after}"), false)?, before)
        }
    };
    if ids.len() < 2 {
        return Err(Error::config(
            "tasks",
            "choices",
            "a choice of a token or more",
            format!("`{after}`"),
        ));
    }
    let mut from = from.clamp(1, ids.len() - 1);
    let cut = ids.len().saturating_sub(longest.max(2));
    ids.drain(..cut);
    from = from.saturating_sub(cut).max(1);
    let mut sample = Sample::from_ids(ids);
    sample.labels[..from].fill(IGNORED_LABEL);
    Ok(sample)
}

fn format_of(path: &Path) -> Result<DataFormat> {
    let extension = path
        .extension()
        .unwrap_or_default()
        .to_string_lossy()
        .to_ascii_lowercase();
    match extension.as_str() {
        "json" | "jsonl" => Ok(DataFormat::Json),
        "csv" => Ok(DataFormat::Csv),
        "txt" | "text" | "md" => Ok(DataFormat::Text),
        other => Err(Error::file(
            path,
            "a file of type .json, .jsonl, .csv or .txt",
            format!("`.{other}`"),
        )),
    }
}

/// The files of a task that is written out.
fn task_files(keys: &Map<String, Value>, folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut add = |value: &Value| {
        if let Value::String(text) = value {
            files.extend(text.split(',').map(|file| folder.join(file.trim())));
        }
    };
    match keys
        .get("dataset_kwargs")
        .and_then(|kwargs| kwargs.get("data_files"))
    {
        Some(Value::Array(list)) => list.iter().for_each(&mut add),
        Some(Value::Object(splits)) => {
            let wanted = ["test_split", "validation_split", "training_split"];
            let named = wanted
                .iter()
                .find_map(|key| keys.get(*key).and_then(Value::as_str));
            let value = named
                .and_then(|name| splits.get(name))
                .or_else(|| splits.values().next());
            match value {
                Some(Value::Array(list)) => list.iter().for_each(&mut add),
                Some(value) => add(value),
                None => {}
            }
        }
        Some(value) => add(value),
        None => {
            if let Some(path) = keys.get("dataset_path").and_then(Value::as_str)
                && folder.join(path).is_file()
            {
                files.push(folder.join(path));
            }
        }
    }
    files
}

/// A row in usual columns.
fn plain_question(row: &Row) -> Result<Question> {
    let find = |names: &[&str]| names.iter().find_map(|name| row.fields.get(*name));
    let expected = |what: &str| {
        let columns: Vec<&str> = row.fields.keys().map(String::as_str).collect();
        let expected = format!("{what} at line {}", row.line);
        Error::file(&row.file, expected, format!("columns {}", columns.join(", ")))
    };
    let question = find(&["question", "query", "prompt", "context", "text", "sentence"])
        .and_then(Value::as_str)
        .ok_or_else(|| expected("a column `question`"))?;
    let choices = find(&["choices", "options", "endings"]).ok_or_else(|| expected("a column `choices`"))?;
    // ARC keeps the texts beside their letters.
    let choices =
        texts(choices.get("text").unwrap_or(choices)).ok_or_else(|| expected("a list of choices"))?;
    let answer = find(&["answer", "answer_index", "answerKey", "gold", "label", "target"])
        .ok_or_else(|| expected("a column `answer`"))?;
    let answer =
        answer_index(answer, &choices).ok_or_else(|| expected("an answer that is one of the choices"))?;
    Ok(Question {
        prompt: format!("Question: {question}\nAnswer:"),
        choices,
        answer,
    })
}

fn texts(value: &Value) -> Option<Vec<String>> {
    let list: Vec<String> = value.as_array()?.iter().map(as_text).collect();
    (list.len() > 1).then_some(list)
}

fn as_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The choice that an answer names: by its text, its place counted from 0, or its letter.
fn answer_index(answer: &Value, choices: &[String]) -> Option<usize> {
    let text = as_text(answer);
    let text = text.trim();
    if let Some(at) = choices.iter().position(|choice| choice.trim() == text) {
        return Some(at);
    }
    let by_letter = || match text.as_bytes() {
        [letter @ b'A'..=b'Z'] => Some(usize::from(letter - b'A')),
        [letter @ b'a'..=b'z'] => Some(usize::from(letter - b'a')),
        _ => None,
    };
    let index = text.parse::<usize>().ok().or_else(by_letter)?;
    (index < choices.len()).then_some(index)
}

/// How a row becomes a question, in the keys of lm-evaluation-harness.
struct Asks<'a> {
    origin: &'a str,
    question: Option<&'a Value>,
    choices: Option<&'a Value>,
    answer: Option<&'a Value>,
}

impl Asks<'_> {
    fn question(&self, row: &Row) -> Result<Question> {
        if self.question.is_none() && self.choices.is_none() && self.answer.is_none() {
            return plain_question(row);
        }
        let wrong = |key: &str, expected: &str, found: String| {
            Error::config(
                self.origin,
                key,
                format!("{expected} at line {}", row.line),
                found,
            )
        };
        let prompt = self.field("doc_to_text", self.question, row)?;
        let choices = match self.choices {
            Some(Value::Array(_)) => self.choices.and_then(texts),
            Some(Value::String(name)) => match row.fields.get(name) {
                Some(column) => texts(column.get("text").unwrap_or(column)),
                None => {
                    let rendered = self.field("doc_to_choice", self.choices, row)?;
                    let list: Value = serde_json::from_str(&rendered.replace('\'', "\""))
                        .map_err(|_| wrong("doc_to_choice", "a list of choices", rendered.clone()))?;
                    texts(&list)
                }
            },
            _ => None,
        };
        let found = || format!("{:?}", self.choices);
        let choices = choices.ok_or_else(|| wrong("doc_to_choice", "a list of choices", found()))?;
        let answer = match self.answer {
            Some(Value::String(name)) => match row.fields.get(name) {
                Some(column) => column.clone(),
                None => Value::from(self.field("doc_to_target", self.answer, row)?),
            },
            Some(other) => other.clone(),
            None => {
                return Err(wrong(
                    "doc_to_target",
                    "a column or a template",
                    "nothing".to_owned(),
                ));
            }
        };
        let index = answer_index(&answer, &choices);
        let answer = index.ok_or_else(|| wrong("doc_to_target", "one of the choices", answer.to_string()))?;
        Ok(Question {
            prompt,
            choices,
            answer,
        })
    }

    /// A column by its name, or a template over the columns.
    fn field(&self, key: &str, source: Option<&Value>, row: &Row) -> Result<String> {
        let Some(Value::String(source)) = source else {
            let found = source.map_or_else(|| "nothing".to_owned(), Value::to_string);
            return Err(Error::config(self.origin, key, "a column or a template", found));
        };
        if let Some(column) = row.fields.get(source) {
            return Ok(as_text(column));
        }
        let rendered = Environment::new().render_str(source, variables(&row.fields));
        rendered.map_err(|error| {
            let expected = format!("a template that fits the row at line {}", row.line);
            Error::config(self.origin, key, expected, error.to_string())
        })
    }
}

/// The columns of a row, for a template.
fn variables(fields: &Map<String, Value>) -> minijinja::Value {
    let entries = fields.iter().map(|(name, value)| (name.clone(), variable(value)));
    minijinja::Value::from_pairs(entries)
}

fn variable(value: &Value) -> minijinja::Value {
    match value {
        Value::Null => minijinja::Value::from(()),
        Value::Bool(flag) => minijinja::Value::from(*flag),
        Value::String(text) => minijinja::Value::from(text.as_str()),
        Value::Array(list) => list.iter().map(variable).collect(),
        Value::Object(fields) => variables(fields),
        Value::Number(number) => match number.as_i64() {
            Some(whole) => minijinja::Value::from(whole),
            None => minijinja::Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
    }
}

/// Measures the tasks of `LMEvaluator`.
pub struct TaskEvaluator {
    scorers: Scorers,
}

impl TaskEvaluator {
    /// The evaluator.
    pub fn new(scorers: Scorers) -> Self {
        Self { scorers }
    }
}

fn tasks_of(metric: &MetricSpec) -> Result<Vec<Task>> {
    let tasks = metric.settings.get("tasks").and_then(Value::as_array);
    let tasks = tasks.into_iter().flatten();
    tasks.map(|task| Task::read(task, Path::new(HERE))).collect()
}

/// Paths in `tasks` were made absolute when the workflow was read; others are relative to the working folder.
const HERE: &str = "";

impl Evaluator for TaskEvaluator {
    fn metric(&self) -> &'static str {
        "tasks"
    }

    fn input_files(&self, metric: &MetricSpec) -> Vec<PathBuf> {
        let tasks = metric.settings.get("tasks").and_then(Value::as_array);
        let files = tasks.into_iter().flatten().flat_map(|task| match task {
            Value::String(name) => vec![PathBuf::from(name)],
            Value::Object(keys) => task_files(keys, Path::new(HERE)),
            _ => Vec::new(),
        });
        files.filter(|file| file.is_file()).collect()
    }

    fn check(&self, metric: &MetricSpec, _data: Option<&DataConfig>) -> Result<()> {
        tasks_of(metric).map(drop)
    }

    fn evaluate(
        &self,
        model: &dyn ModelHandle,
        metric: &MetricSpec,
        context: &EvalContext<'_>,
    ) -> Result<Vec<Measured>> {
        let default = TaskOptions::default();
        let length = metric.settings.get("max_length").and_then(Value::as_u64);
        let options = TaskOptions {
            max_length: length
                .and_then(|n| usize::try_from(n).ok())
                .unwrap_or(default.max_length),
            limit: metric.settings.get("limit").and_then(Value::as_f64),
        };
        let tasks = tasks_of(metric)?;
        let mut measured = Vec::new();
        for task in &tasks {
            measured.extend(task.run(&self.scorers, model, &options, context.progress, context.cancel)?);
        }
        Ok(measured)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn file(name: &str, text: &str) -> (tempfile::TempDir, Value) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(name), text).unwrap();
        (folder, json!(name))
    }

    #[test]
    fn rows_in_usual_columns_are_questions() {
        let rows = "{\"question\": \"1+1?\", \"choices\": [\"1\", \"2\", \"3\"], \"answer\": \"2\"}\n\
                    {\"query\": \"b?\", \"options\": [\"x\", \"y\"], \"gold\": 1}\n\
                    {\"question\": \"c?\", \"choices\": {\"text\": [\"u\", \"v\"], \"label\": [\"A\", \"B\"]}, \"answerKey\": \"B\"}\n";
        let (folder, name) = file("quiz.jsonl", rows);
        let task = Task::read(&name, folder.path()).unwrap();
        assert_eq!(task.name, "quiz");
        let TaskKind::Choices { questions, .. } = task.kind else {
            panic!("no questions")
        };
        let answers: Vec<usize> = questions.iter().map(|q| q.answer).collect();
        assert_eq!(answers, [1, 1, 1]);
        assert_eq!(questions[0].prompt, "Question: 1+1?\nAnswer:");
        assert_eq!(questions[2].choices, ["u", "v"]);
    }

    #[test]
    fn templates_and_columns_make_questions() {
        let (folder, _) = file("d.json", r#"[{"s": "good", "l": 1, "o": ["a", "b"], "n": "B"}]"#);
        let read = |task: Value| match Task::read(&task, folder.path()).map(|task| task.kind) {
            Ok(TaskKind::Choices { questions, .. }) => questions,
            other => panic!("{other:?}"),
        };
        let base = json!({"task": "t", "dataset_path": "json", "dataset_kwargs": {"data_files": "d.json"}});
        let with = |keys: Value| {
            let mut task = base.as_object().cloned().unwrap();
            task.extend(keys.as_object().cloned().unwrap());
            Value::Object(task)
        };
        let one = read(with(
            json!({"doc_to_text": "Is {{s}} good?", "doc_to_choice": ["no", "yes"], "doc_to_target": "l"}),
        ));
        assert_eq!((one[0].prompt.as_str(), one[0].answer), ("Is good good?", 1));
        let two = read(with(
            json!({"doc_to_text": "s", "doc_to_choice": "o", "doc_to_target": "{{n}}"}),
        ));
        assert_eq!(
            (two[0].choices.as_slice(), two[0].answer),
            (&["a".to_owned(), "b".to_owned()][..], 1)
        );
        let wrong = with(json!({"doc_to_text": "s", "doc_to_choice": ["x", "y"], "doc_to_target": "s"}));
        let error = Task::read(&wrong, folder.path()).unwrap_err().to_string();
        assert!(
            error.contains("doc_to_target") && error.contains("line 1"),
            "{error}"
        );
    }

    #[test]
    fn tasks_of_elsewhere_are_refused() {
        let error = Task::read(&json!("mmlu"), Path::new("/nowhere"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("`mmlu`") && error.contains(".jsonl"), "{error}");
    }

    #[test]
    fn limits_are_numbers_or_shares() {
        let most = |limit| {
            TaskOptions {
                limit,
                ..TaskOptions::default()
            }
            .most(10)
        };
        assert_eq!(
            (most(None), most(Some(3.0)), most(Some(0.25)), most(Some(99.0))),
            (10, 3, 3, 10)
        );
    }
}
