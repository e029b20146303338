//! Text templates with the rules of Python's `str.format(**row)`.

use serde_json::{Map, Value};

use super::{format, python};

/// A template such as `"<|user|>\n{prompt}<|end|>"`: column names in braces (spaces allowed), `{{` and `}}` for
/// braces, `!r` and `!s`, `[key]`, and Python's format specifications.
#[derive(Debug, Clone, PartialEq)]
pub struct Template {
    source: String,
    pieces: Vec<Piece>,
}

#[derive(Debug, Clone, PartialEq)]
enum Piece {
    Text(String),
    Field(Field),
}

#[derive(Debug, Clone, PartialEq)]
struct Field {
    column: String,
    keys: Vec<String>,
    repr: bool,
    specification: Vec<Piece>,
}

/// Why a row does not fit a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Misfit {
    /// The row has no such column, or no value in it.
    Missing(String),
    /// The column's value cannot be written as asked for.
    Value(String, String),
}

impl Template {
    /// Parses a template.
    ///
    /// # Errors
    /// What is wrong with its braces.
    pub fn parse(source: &str) -> Result<Self, String> {
        let mut letters = source.chars().peekable();
        let pieces = pieces(&mut letters, 0)?;
        Ok(Self {
            source: source.to_owned(),
            pieces,
        })
    }

    /// The template as it was written.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Fills in a row.
    pub(super) fn render(&self, row: &Map<String, Value>) -> Result<String, Misfit> {
        render(&self.pieces, row)
    }
}

type Letters<'a> = std::iter::Peekable<std::str::Chars<'a>>;

/// Pieces up to the end of the text, or, inside a field's specification (`depth` 1), up to its closing brace.
fn pieces(letters: &mut Letters<'_>, depth: usize) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut text = String::new();
    loop {
        match letters.peek().copied() {
            None if depth > 0 => return Err("a `{` is never closed".to_owned()),
            None => break,
            Some('}') if depth > 0 => break,
            Some('{') => {
                letters.next();
                // Python doubles braces outside of fields only.
                if depth == 0 && letters.next_if_eq(&'{').is_some() {
                    text.push('{');
                    continue;
                }
                if depth > 1 {
                    return Err("fields inside of fields are too deep".to_owned());
                }
                if !text.is_empty() {
                    pieces.push(Piece::Text(std::mem::take(&mut text)));
                }
                pieces.push(Piece::Field(field(letters, depth)?));
            }
            Some('}') => {
                letters.next();
                if letters.next_if_eq(&'}').is_none() {
                    return Err("a `}` without `{`; write `}}` for a brace".to_owned());
                }
                text.push('}');
            }
            Some(letter) => {
                letters.next();
                text.push(letter);
            }
        }
    }
    if !text.is_empty() {
        pieces.push(Piece::Text(text));
    }
    Ok(pieces)
}

/// A field after its opening brace, through its closing one.
fn field(letters: &mut Letters<'_>, depth: usize) -> Result<Field, String> {
    let mut name = String::new();
    let mut inside_key = false;
    while let Some(letter) = letters.peek().copied() {
        match letter {
            '{' => return Err("unexpected `{` in a field name; write `{{` for a brace".to_owned()),
            '}' | ':' | '!' if !inside_key => break,
            '[' => inside_key = true,
            ']' => inside_key = false,
            _ => {}
        }
        name.push(letter);
        letters.next();
    }
    let (column, keys) = split_name(&name)?;
    let mut repr = false;
    if letters.next_if_eq(&'!').is_some() {
        repr = match letters.next() {
            Some('r' | 'a') => true,
            Some('s') => false,
            other => return Err(format!("unknown conversion `!{}`", other.unwrap_or(' '))),
        };
        if !matches!(letters.peek(), Some(':' | '}')) {
            return Err("expected `:` or `}` after a conversion".to_owned());
        }
    }
    let specification = if letters.next_if_eq(&':').is_some() {
        pieces(letters, depth + 1)?
    } else {
        Vec::new()
    };
    match letters.next() {
        Some('}') => Ok(Field {
            column,
            keys,
            repr,
            specification,
        }),
        _ => Err("a `{` is never closed".to_owned()),
    }
}

/// `column[key][key]` in parts.
fn split_name(name: &str) -> Result<(String, Vec<String>), String> {
    let end = name.find(['.', '[']).unwrap_or(name.len());
    let (column, mut rest) = name.split_at(end);
    if column.is_empty() || column.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!(
            "`{{{name}}}` names no column; write `{{{{` and `}}}}` for braces"
        ));
    }
    let mut keys = Vec::new();
    while !rest.is_empty() {
        let key = rest.strip_prefix('[').and_then(|inner| inner.split_once(']'));
        match key {
            Some((key, after)) if !key.is_empty() => {
                keys.push(key.to_owned());
                rest = after;
            }
            _ => return Err(format!("`{{{name}}}`: expected `column` or `column[key]`")),
        }
    }
    Ok((column.to_owned(), keys))
}

fn render(pieces: &[Piece], row: &Map<String, Value>) -> Result<String, Misfit> {
    let mut text = String::new();
    for piece in pieces {
        match piece {
            Piece::Text(part) => text.push_str(part),
            Piece::Field(field) => {
                let value = field.value(row)?;
                let specification = render(&field.specification, row)?;
                let written = if field.repr {
                    format::format_value(&Value::String(python::to_repr(value)), &specification)
                } else {
                    format::format_value(value, &specification)
                };
                text.push_str(&written.map_err(|reason| Misfit::Value(field.column.clone(), reason))?);
            }
        }
    }
    Ok(text)
}

impl Field {
    fn value<'a>(&self, row: &'a Map<String, Value>) -> Result<&'a Value, Misfit> {
        let missing = || Misfit::Missing(self.column.clone());
        let mut value = row.get(&self.column).ok_or_else(missing)?;
        for key in &self.keys {
            let inner = match value {
                Value::Array(list) => key.parse::<usize>().ok().and_then(|index| list.get(index)),
                Value::Object(map) => map.get(key),
                _ => None,
            };
            value = inner.ok_or_else(|| Misfit::Value(self.column.clone(), format!("no `[{key}]` in it")))?;
        }
        // Python would write the word `None` into the text.
        if value.is_null() {
            Err(missing())
        } else {
            Ok(value)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fill(template: &str, row: Value) -> Result<String, Misfit> {
        Template::parse(template)
            .unwrap()
            .render(row.as_object().unwrap())
    }

    #[test]
    fn columns_braces_and_specifications_are_pythons() {
        let row = json!({"Best Answer": "yes", "n": 7, "w": 5, "list": ["a", {"k": "v"}], "t": true});
        for (template, wanted) in [
            ("", ""),
            ("plain", "plain"),
            ("<{Best Answer}>", "<yes>"),
            ("{{Best Answer}}", "{Best Answer}"),
            ("{{{n}}}", "{7}"),
            ("{n:03}|{n:>{w}}|{Best Answer!r:>6}", "007|    7| 'yes'"),
            ("{list[0]}{list[1][k]}", "av"),
            ("{list}", "['a', {'k': 'v'}]"),
            ("{t}", "True"),
        ] {
            assert_eq!(fill(template, row.clone()).as_deref(), Ok(wanted), "{template}");
        }
    }

    #[test]
    fn wrong_templates_are_refused() {
        for bad in [
            "{",
            "}",
            "{a",
            "{}",
            "{0}",
            "{a.b}",
            "{a!q}",
            "{a!}",
            "{a!rx}",
            "{a[}",
            "{a{b}}",
            "{a[]}",
            "{a:{b:{c}}}",
        ] {
            assert!(Template::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn missing_columns_and_nulls_are_named() {
        let row = json!({"a": null, "b": "x"});
        assert_eq!(fill("{c}", row.clone()), Err(Misfit::Missing("c".into())));
        assert_eq!(fill("{a}", row.clone()), Err(Misfit::Missing("a".into())));
        assert!(matches!(fill("{b:d}", row), Err(Misfit::Value(column, _)) if column == "b"));
    }
}
