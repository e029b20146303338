//! Python's format specification: `[[fill]align][sign][#][0][width][grouping][.precision][type]`.

use serde_json::Value;

use super::python;

/// The text of `format(value, specification)`.
///
/// # Errors
/// Why the specification does not fit the value, as Python's `ValueError` would say.
pub(super) fn format_value(value: &Value, specification: &str) -> Result<String, String> {
    if specification.is_empty() {
        return Ok(python::to_str(value));
    }
    let spec = Spec::parse(specification)?;
    match value {
        Value::String(text) => spec.text(text),
        Value::Number(number) => match (number.as_i128(), number.as_f64()) {
            (Some(whole), _) => spec.whole(whole),
            (None, Some(float)) => spec.float(float),
            (None, None) => Err(format!("`{number}` is too large a number")),
        },
        Value::Bool(flag) => spec.whole(i128::from(*flag)),
        Value::Null | Value::Array(_) | Value::Object(_) => Err(format!(
            "`{specification}` cannot be applied to {}",
            python::to_repr(value)
        )),
    }
}

#[derive(Debug, Clone, Copy)]
struct Spec {
    fill: char,
    align: Option<char>,
    sign: char,
    alternate: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

/// Wider than any column of text needs; a limit so that a template cannot ask for all of the memory.
const WIDEST: usize = 1 << 20;

impl Spec {
    fn parse(text: &str) -> Result<Self, String> {
        let invalid = || format!("`{text}` is not a format specification");
        let letters: Vec<char> = text.chars().collect();
        let mut at = 0;
        let is_align = |i: usize| letters.get(i).is_some_and(|l| "<>=^".contains(*l));
        let mut spec = Self {
            fill: ' ',
            align: None,
            sign: '-',
            alternate: false,
            width: 0,
            grouping: None,
            precision: None,
            kind: None,
        };
        if is_align(1) {
            (spec.fill, spec.align, at) = (letters[0], Some(letters[1]), 2);
        } else if is_align(0) {
            (spec.align, at) = (Some(letters[0]), 1);
        }
        if let Some(sign) = letters.get(at).filter(|l| "+- ".contains(**l)) {
            (spec.sign, at) = (*sign, at + 1);
        }
        if letters.get(at) == Some(&'#') {
            (spec.alternate, at) = (true, at + 1);
        }
        if letters.get(at) == Some(&'0') {
            at += 1;
            if spec.align.is_none() {
                (spec.fill, spec.align) = ('0', Some('='));
            }
        }
        let number = |at: &mut usize| -> Result<Option<usize>, String> {
            let begin = *at;
            while letters.get(*at).is_some_and(char::is_ascii_digit) {
                *at += 1;
            }
            if begin == *at {
                return Ok(None);
            }
            let digits: String = letters[begin..*at].iter().collect();
            let value = digits.parse().ok().filter(|n| *n <= WIDEST);
            value.map(Some).ok_or_else(|| format!("`{digits}` is too wide"))
        };
        spec.width = number(&mut at)?.unwrap_or(0);
        if let Some(grouping) = letters.get(at).filter(|l| "_,".contains(**l)) {
            (spec.grouping, at) = (Some(*grouping), at + 1);
        }
        if letters.get(at) == Some(&'.') {
            at += 1;
            spec.precision = Some(number(&mut at)?.ok_or_else(invalid)?);
        }
        if let Some(kind) = letters.get(at) {
            (spec.kind, at) = (Some(*kind), at + 1);
        }
        if at == letters.len() {
            Ok(spec)
        } else {
            Err(invalid())
        }
    }

    fn text(&self, text: &str) -> Result<String, String> {
        if !matches!(self.kind, None | Some('s')) {
            return Err(self.unknown_kind("text"));
        }
        // Before Python 3.10 a leading zero meant `=`, which text refuses; since then it only sets the fill.
        let align = match self.align {
            Some('=') if self.fill == '0' => '<',
            Some('=') => return Err("`=` alignment is for numbers".to_owned()),
            other => other.unwrap_or('<'),
        };
        if self.sign != '-' || self.alternate || self.grouping.is_some() {
            return Err("a sign, `#` or a thousands separator is for numbers".to_owned());
        }
        let cut: String = match self.precision {
            Some(length) => text.chars().take(length).collect(),
            None => text.to_owned(),
        };
        Ok(self.padded("", &cut, align))
    }

    fn whole(&self, value: i128) -> Result<String, String> {
        if matches!(self.kind, Some('e' | 'E' | 'f' | 'F' | '%')) {
            return self.float(value as f64);
        }
        if self.precision.is_some() {
            return Err("a precision is not for whole numbers".to_owned());
        }
        let magnitude = value.unsigned_abs();
        let (prefix, digits, group) = match self.kind {
            None | Some('d') => ("", magnitude.to_string(), 3),
            Some('b') => ("0b", format!("{magnitude:b}"), 4),
            Some('o') => ("0o", format!("{magnitude:o}"), 4),
            Some('x') => ("0x", format!("{magnitude:x}"), 4),
            Some('X') => ("0X", format!("{magnitude:X}"), 4),
            Some(_) => return Err(self.unknown_kind("a whole number")),
        };
        let prefix = if self.alternate { prefix } else { "" };
        Ok(self.number(value < 0, prefix, &digits, group))
    }

    fn float(&self, value: f64) -> Result<String, String> {
        let places = self.precision.unwrap_or(6);
        let magnitude = value.abs();
        let digits = match (self.kind, self.precision) {
            (None, None) => python::float_repr(magnitude),
            (Some('f' | 'F'), _) => format!("{magnitude:.places$}"),
            (Some('%'), _) => format!("{:.places$}%", magnitude * 100.0),
            (Some(kind @ ('e' | 'E')), _) => {
                let text = format!("{magnitude:.places$e}");
                let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
                let exponent: i32 = exponent.parse().unwrap_or_default();
                let sign = if exponent < 0 { '-' } else { '+' };
                format!("{digits}{kind}{sign}{:02}", exponent.abs())
            }
            _ => return Err(self.unknown_kind("a number; use `f`, `e` or `%`")),
        };
        Ok(self.number(value.is_sign_negative(), "", &digits, 3))
    }

    fn number(&self, negative: bool, prefix: &str, digits: &str, group: usize) -> String {
        let sign = match (negative, self.sign) {
            (true, _) => "-",
            (false, '+') => "+",
            (false, ' ') => " ",
            (false, _) => "",
        };
        let head = format!("{sign}{prefix}");
        let digits = match self.grouping {
            Some(separator) => {
                let zeros = if self.fill == '0' && self.align == Some('=') {
                    self.width.saturating_sub(head.len())
                } else {
                    0
                };
                grouped(digits, separator, group, zeros)
            }
            None => digits.to_owned(),
        };
        self.padded(&head, &digits, self.align.unwrap_or('>'))
    }

    fn padded(&self, head: &str, body: &str, align: char) -> String {
        let missing = self
            .width
            .saturating_sub(head.chars().count() + body.chars().count());
        let fill = |count: usize| self.fill.to_string().repeat(count);
        match align {
            '<' => format!("{head}{body}{}", fill(missing)),
            '^' => format!("{}{head}{body}{}", fill(missing / 2), fill(missing - missing / 2)),
            '=' => format!("{head}{}{body}", fill(missing)),
            _ => format!("{}{head}{body}", fill(missing)),
        }
    }

    fn unknown_kind(&self, what: &str) -> String {
        format!("format type `{}` is not for {what}", self.kind.unwrap_or(' '))
    }
}

/// Separates the digits before the point into groups; `width` fills up with zeros, which are grouped too.
fn grouped(digits: &str, separator: char, group: usize, width: usize) -> String {
    let end = digits
        .find(|l: char| !l.is_ascii_alphanumeric())
        .unwrap_or(digits.len());
    let (whole, rest) = digits.split_at(end);
    let mut whole: std::collections::VecDeque<char> = whole.chars().collect();
    let length = |count: usize| count + (count - 1) / group + rest.len();
    while length(whole.len()) < width {
        whole.push_front('0');
    }
    let count = whole.len();
    let mut text = String::new();
    for (i, digit) in whole.into_iter().enumerate() {
        if i > 0 && (count - i).is_multiple_of(group) {
            text.push(separator);
        }
        text.push(digit);
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn specifications_are_pythons() {
        for (value, spec, wanted) in [
            (json!("hello"), "10", "hello     "),
            (json!("hello"), ">8", "   hello"),
            (json!("hello"), "*^9.3", "***hel***"),
            (json!("hello"), ".2s", "he"),
            (json!("é"), "_<3", "é__"),
            (json!(1_234_567), ",", "1,234,567"),
            (json!(42), "05d", "00042"),
            (json!(-42), "06", "-00042"),
            (json!(42), "+d", "+42"),
            (json!(255), "#x", "0xff"),
            (json!(255), "_b", "1111_1111"),
            (json!(1234), "010,", "00,001,234"),
            (json!(42), "<5", "42   "),
            (json!(1.256_25), ".2f", "1.26"),
            (json!(0.25), ".0%", "25%"),
            (json!(12345.678), ".2e", "1.23e+04"),
            (json!(1234.5), ",.1f", "1,234.5"),
            (json!(2.5), "8", "     2.5"),
            (json!(true), "d", "1"),
        ] {
            assert_eq!(
                format_value(&value, spec).as_deref(),
                Ok(wanted),
                "{value} {spec}"
            );
        }
        for (value, spec) in [
            (json!("a"), "d"),
            (json!("a"), ","),
            (json!(1), ".2"),
            (json!(1), "s"),
            (json!([1]), "5"),
            (json!("a"), "5sx"),
            (json!("a"), "99999999999"),
        ] {
            assert!(format_value(&value, spec).is_err(), "{value} {spec}");
        }
    }
}
