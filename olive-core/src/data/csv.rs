//! Comma-separated values, RFC 4180: quotes around fields with commas, quotes (doubled) or line ends.

/// A record's line, counted from 1, and its fields.
pub(super) type Record = (usize, Vec<String>);

/// The records of `text`, each with the line on which it begins, counted from 1. Empty lines are skipped.
///
/// # Errors
/// The line of a quote that is never closed, or of text after a closing quote.
pub(super) fn records(text: &str) -> Result<Vec<Record>, (usize, &'static str)> {
    let mut records = Vec::new();
    let mut letters = text.chars().peekable();
    let mut line = 1;
    while letters.peek().is_some() {
        let first_line = line;
        let mut fields = Vec::new();
        loop {
            let mut field = String::new();
            if letters.next_if_eq(&'"').is_some() {
                loop {
                    match letters.next() {
                        None => return Err((first_line, "a quote that is never closed")),
                        Some('"') if letters.next_if_eq(&'"').is_some() => field.push('"'),
                        Some('"') => break,
                        Some(letter) => {
                            line += usize::from(letter == '\n');
                            field.push(letter);
                        }
                    }
                }
                if !matches!(letters.peek(), None | Some(',' | '\r' | '\n')) {
                    return Err((line, "text after a closing quote"));
                }
            } else {
                while let Some(letter) = letters.next_if(|l| !matches!(l, ',' | '\r' | '\n')) {
                    field.push(letter);
                }
            }
            fields.push(field);
            if letters.next_if_eq(&',').is_none() {
                break;
            }
        }
        letters.next_if_eq(&'\r');
        letters.next_if_eq(&'\n');
        line += 1;
        if fields.len() > 1 || !fields[0].is_empty() {
            records.push((first_line, fields));
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_line_ends_and_empty_fields() {
        let text = "a,b\r\n1,\"x, \"\"y\"\"\nz\"\n\n,\n";
        let read = records(text).unwrap();
        let wanted: Vec<Record> = vec![
            (1, vec!["a".into(), "b".into()]),
            (2, vec!["1".into(), "x, \"y\"\nz".into()]),
            (5, vec![String::new(), String::new()]),
        ];
        assert_eq!(read, wanted);
        assert!(records("a\n\"b").is_err());
        assert!(records("\"b\"c").is_err());
    }
}
