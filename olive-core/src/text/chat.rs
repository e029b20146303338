//! Chat templates: Jinja, as Hugging Face's tokenizers render it.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use super::clock;
use super::special::SpecialTokens;
use crate::error::{Error, Result};
use crate::fsio;

/// What a chat template is given.
#[derive(Debug, Clone, Copy)]
pub struct ChatInputs<'a> {
    /// `[{"role": …, "content": …}, …]`.
    pub messages: &'a Json,
    /// Tools that the model may call, as a list of JSON schemas.
    pub tools: Option<&'a Json>,
    /// Whether the text ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// A template to use in place of the folder's.
    pub template: Option<&'a str>,
    /// Further variables of the template.
    pub extra: Option<&'a Map<String, Json>>,
}

impl<'a> ChatInputs<'a> {
    /// Messages alone, ending where the answer begins.
    pub fn prompt(messages: &'a Json) -> Self {
        Self {
            messages,
            tools: None,
            add_generation_prompt: true,
            template: None,
            extra: None,
        }
    }
}

/// The chat templates of a model folder: one, or several by name.
#[derive(Debug, Clone, Default)]
pub struct ChatTemplates {
    origin: PathBuf,
    named: Vec<(String, String)>,
}

impl ChatTemplates {
    /// Reads `chat_template.jinja`, else `chat_template.json`, else `chat_template` of `tokenizer_config.json`,
    /// which is a text or a list of `{"name", "template"}`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`] or [`Error::File`].
    pub fn read(folder: &Path) -> Result<Self> {
        let origin = folder.join("chat_template.jinja");
        if origin.is_file() {
            let named = vec![("default".to_owned(), fsio::read_to_string(&origin)?)];
            return Ok(Self { origin, named });
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let origin = folder.join(name);
            if !origin.is_file() {
                continue;
            }
            let file: Map<String, Json> = fsio::read_json(&origin)?;
            let named = templates_of(&origin, file.get("chat_template"))?;
            if !named.is_empty() {
                return Ok(Self { origin, named });
            }
        }
        Ok(Self {
            origin: folder.join("tokenizer_config.json"),
            named: Vec::new(),
        })
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// The template for a conversation: `tool_use` with tools where there is one, else `default`, else the only one.
    pub fn select(&self, with_tools: bool) -> Option<&str> {
        let find = |wanted: &str| self.named.iter().find(|(name, _)| name == wanted);
        let tool_use = if with_tools { find("tool_use") } else { None };
        let only = || (self.named.len() == 1).then(|| &self.named[0]);
        tool_use
            .or_else(|| find("default"))
            .or_else(only)
            .map(|(_, template)| template.as_str())
    }

    /// The text of a conversation; see [`super::TextTokenizer::render_chat`].
    ///
    /// # Errors
    /// [`Error::File`] if there is no template, or if it refuses the messages.
    pub fn render(&self, special: &SpecialTokens, inputs: &ChatInputs<'_>) -> Result<String> {
        let chosen = inputs.template.or_else(|| self.select(inputs.tools.is_some()));
        let template = chosen.ok_or_else(|| Error::file(&self.origin, "a `chat_template`", "none"))?;
        // Hugging Face marks the assistant's words for loss masks; the marks themselves leave no text.
        let template = strip_tags(template, &["generation", "endgeneration"]);
        let environment = environment();
        let fail = |source: minijinja::Error| {
            let found = format!("{source:#}");
            Error::file(&self.origin, "a `chat_template` that accepts the messages", found)
        };
        let mut variables = vec![
            ("messages".to_owned(), to_value(inputs.messages)),
            (
                "tools".to_owned(),
                inputs.tools.map_or_else(|| Value::from(()), to_value),
            ),
            ("documents".to_owned(), Value::from(())),
            (
                "add_generation_prompt".to_owned(),
                Value::from(inputs.add_generation_prompt),
            ),
        ];
        for (name, token) in special.named() {
            variables.push((name.to_owned(), Value::from(token)));
        }
        for (name, value) in inputs.extra.into_iter().flatten() {
            variables.push((name.clone(), to_value(value)));
        }
        environment
            .render_str(&template, Value::from_pairs(variables))
            .map_err(fail)
    }
}

/// `chat_template` of a JSON file: a text, or a list of named ones.
fn templates_of(origin: &Path, value: Option<&Json>) -> Result<Vec<(String, String)>> {
    let wrong = |found: &Json| {
        let expected = "`chat_template` to be text or a list of `name` and `template`";
        Error::file(origin, expected, found.to_string())
    };
    match value {
        None | Some(Json::Null) => Ok(Vec::new()),
        Some(Json::String(template)) => Ok(vec![("default".to_owned(), template.clone())]),
        Some(Json::Array(list)) => list
            .iter()
            .map(|entry| {
                let text = |key: &str| entry.get(key).and_then(Json::as_str).map(str::to_owned);
                text("name").zip(text("template")).ok_or_else(|| wrong(entry))
            })
            .collect(),
        Some(other) => Err(wrong(other)),
    }
}

/// Jinja with the settings and functions that Hugging Face gives its templates.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
    {
        environment.set_syntax(syntax);
    }
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    environment.add_function("strftime_now", |format: String| clock::format_now(&format));
    environment.add_filter("tojson", to_json_filter);
    environment
}

/// Removes `{% tag %}` marks, with the line end that `trim_blocks` would take.
fn strip_tags(template: &str, tags: &[&str]) -> String {
    let mut text = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(begin) = rest.find("{%") {
        let Some(length) = rest[begin..].find("%}") else {
            break;
        };
        let end = begin + length + 2;
        let inside =
            rest[begin + 2..end - 2].trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        if tags.contains(&inside) {
            let dash_before = rest[begin + 2..].starts_with('-');
            let dash_after = rest[..end - 2].ends_with('-');
            let before = &rest[..begin];
            text.push_str(if dash_before { before.trim_end() } else { before });
            rest = &rest[end..];
            rest = if dash_after {
                rest.trim_start()
            } else {
                rest.strip_prefix('\n').unwrap_or(rest)
            };
        } else {
            text.push_str(&rest[..end]);
            rest = &rest[end..];
        }
    }
    text.push_str(rest);
    text
}

/// A JSON value as Jinja sees it; objects keep the order of their keys.
fn to_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(n), _, _) => Value::from(n),
            (_, Some(n), _) => Value::from(n),
            (_, _, n) => Value::from(n.unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(list) => Value::from(list.iter().map(to_value).collect::<Vec<_>>()),
        Json::Object(map) => Value::make_object_map(
            map.clone(),
            |map| Box::new(map.keys().map(Value::from)),
            |map, key| map.get(key.as_str()?).map(to_value),
        ),
    }
}

/// `tojson` as Hugging Face defines it: nothing escaped for HTML, non-ASCII kept, Python's separators.
fn to_json_filter(value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Accepted, and already so.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut text = String::new();
    write_json(&mut text, value, indent, 0)?;
    Ok(text)
}

fn write_json(
    text: &mut String,
    value: &Value,
    indent: Option<usize>,
    depth: usize,
) -> Result<(), minijinja::Error> {
    let line = |text: &mut String, depth: usize| {
        if let Some(indent) = indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => text.push_str("null"),
        ValueKind::String => text.push_str(&Json::from(value.as_str().unwrap_or_default()).to_string()),
        ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => {
            let _ = write!(text, "{value}");
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            text.push('[');
            for (i, item) in items.iter().enumerate() {
                text.push_str(if i > 0 { comma } else { "" });
                line(text, depth + 1);
                write_json(text, item, indent, depth + 1)?;
            }
            if !items.is_empty() {
                line(text, depth);
            }
            text.push(']');
        }
        ValueKind::Map => {
            let keys: Vec<Value> = value.try_iter()?.collect();
            text.push('{');
            for (i, key) in keys.iter().enumerate() {
                text.push_str(if i > 0 { comma } else { "" });
                line(text, depth + 1);
                text.push_str(&Json::from(key.to_string()).to_string());
                text.push_str(": ");
                write_json(text, &value.get_item(key)?, indent, depth + 1)?;
            }
            if !keys.is_empty() {
                line(text, depth);
            }
            text.push('}');
        }
        other => {
            let message = format!("a {other} cannot be written as JSON");
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(template: &str, messages: Json) -> Result<String> {
        let special = SpecialTokens {
            eos: Some("</s>".to_owned()),
            ..Default::default()
        };
        let mut inputs = ChatInputs::prompt(&messages);
        inputs.template = Some(template);
        ChatTemplates::default().render(&special, &inputs)
    }

    #[test]
    fn blocks_are_trimmed_and_python_methods_work() {
        let template = "{% for m in messages %}\n    {% if m.role.upper() == 'USER' %}\n[{{ m['content'].strip() }}]\
                        {% endif %}\n{% endfor %}\n{{ eos_token }}{% if add_generation_prompt %}>{% endif %}";
        let messages = json!([{"role": "user", "content": " hi "}, {"role": "x", "content": "no"}]);
        assert_eq!(render(template, messages).unwrap(), "[hi]</s>>");
    }

    #[test]
    fn tojson_keeps_order_and_characters() {
        let messages = json!([{"z": "a<b>'é", "a": [1, 2.5, true, null], "e": {}}]);
        let text = render("{{ messages[0] | tojson }}", messages.clone()).unwrap();
        assert_eq!(text, r#"{"z": "a<b>'é", "a": [1, 2.5, true, null], "e": {}}"#);
        let text = render("{{ messages[0].a | tojson(indent=2) }}", messages).unwrap();
        assert_eq!(text, "[\n  1,\n  2.5,\n  true,\n  null\n]");
    }

    #[test]
    fn a_refusing_template_says_why() {
        let error = render("{{ raise_exception('roles must alternate') }}", json!([])).unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
    }

    #[test]
    fn loop_controls_and_generation_marks_are_understood() {
        let template = "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}\
                        {% generation %}\n{{ m.content }}{%- endgeneration -%} {% endfor %}";
        let messages = json!([{"content": "one"}, {"content": "two"}]);
        assert_eq!(render(template, messages).unwrap(), "one");
    }

    #[test]
    fn named_templates_are_chosen() {
        let folder = tempfile::tempdir().unwrap();
        let list = json!({"chat_template": [
            {"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]});
        std::fs::write(folder.path().join("tokenizer_config.json"), list.to_string()).unwrap();
        let templates = ChatTemplates::read(folder.path()).unwrap();
        assert_eq!(templates.select(false), Some("plain"));
        assert_eq!(templates.select(true), Some("tools"));
        std::fs::write(folder.path().join("chat_template.jinja"), "file").unwrap();
        assert_eq!(
            ChatTemplates::read(folder.path()).unwrap().select(true),
            Some("file")
        );
    }

    #[test]
    fn no_template_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let templates = ChatTemplates::read(folder.path()).unwrap();
        let error = templates
            .render(&SpecialTokens::default(), &ChatInputs::prompt(&json!([])))
            .unwrap_err();
        assert!(error.to_string().contains("tokenizer_config.json"), "{error}");
    }
}
