//! JSON values as Python would print them.

use serde_json::Value;

/// `str(value)`.
pub(super) fn to_str(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => to_repr(other),
    }
}

/// `repr(value)`.
pub(super) fn to_repr(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() => float_repr(float),
            _ => number.to_string(),
        },
        Value::String(text) => text_repr(text),
        Value::Array(list) => {
            let items: Vec<String> = list.iter().map(to_repr).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(map) => {
            let entries: Vec<String> = map
                .iter()
                .map(|(key, value)| format!("{}: {}", text_repr(key), to_repr(value)))
                .collect();
            format!("{{{}}}", entries.join(", "))
        }
    }
}

/// The shortest digits that read back as the same number, with an exponent outside of 1e-4 to 1e16.
pub(super) fn float_repr(value: f64) -> String {
    let scientific = format!("{value:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if value == 0.0 || (-4..16).contains(&exponent) {
        return format!("{value:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

fn text_repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut repr = String::from(quote);
    for letter in text.chars() {
        match letter {
            '\\' => repr.push_str("\\\\"),
            '\n' => repr.push_str("\\n"),
            '\r' => repr.push_str("\\r"),
            '\t' => repr.push_str("\\t"),
            letter if letter == quote => repr.extend(['\\', quote]),
            letter if letter.is_control() && (letter as u32) < 0x100 => {
                repr.push_str(&format!("\\x{:02x}", letter as u32));
            }
            letter => repr.push(letter),
        }
    }
    repr.push(quote);
    repr
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_print_as_in_python() {
        let value = json!({"a": [1, 2.0, 1e16, 1.5e-7, "it's", true, null], "b": "q\"'\n\u{1}"});
        assert_eq!(
            to_str(&value),
            r#"{'a': [1, 2.0, 1e+16, 1.5e-07, "it's", True, None], 'b': 'q"\'\n\x01'}"#
        );
        assert_eq!(to_str(&json!("plain")), "plain");
        assert_eq!(float_repr(1e15), "1000000000000000.0");
        assert_eq!(float_repr(0.0001), "0.0001");
    }
}
