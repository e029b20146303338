//! Backslash escapes in a command-line value, as Python's `unicode_escape` codec reads them.

/// Replaces `\n`, `\t`, `\xhh`, `\uhhhh`, `\Uhhhhhhhh`, octal and the other escapes of Python's string literals. An
/// unknown escape stays as it is. Characters beyond ASCII stay too, where Python's codec would garble them.
///
/// # Errors
/// What is wrong with the first escape that is cut short, names no character, or is a `\N{name}`.
pub fn decode_escapes(text: &str) -> Result<String, String> {
    let mut decoded = String::with_capacity(text.len());
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter != '\\' {
            decoded.push(letter);
            continue;
        }
        let Some(kind) = letters.next() else {
            return Err("`\\` at the end of the text".to_owned());
        };
        match kind {
            '\n' => {}
            '\\' | '\'' | '"' => decoded.push(kind),
            'a' => decoded.push('\x07'),
            'b' => decoded.push('\x08'),
            'f' => decoded.push('\x0c'),
            'n' => decoded.push('\n'),
            'r' => decoded.push('\r'),
            't' => decoded.push('\t'),
            'v' => decoded.push('\x0b'),
            '0'..='7' => decoded.push(octal(kind, &mut letters)),
            'x' => decoded.push(character(hex('x', 2, &mut letters)?)?),
            'U' => decoded.push(character(hex('U', 8, &mut letters)?)?),
            'u' => decoded.push(utf16(&mut letters)?),
            'N' => return Err("`\\N{…}` is not supported; write the character itself".to_owned()),
            other => decoded.extend(['\\', other]),
        }
    }
    Ok(decoded)
}

type Letters<'a> = std::iter::Peekable<std::str::Chars<'a>>;

/// Up to three octal digits; at most 0o777, so always a character.
fn octal(first: char, letters: &mut Letters<'_>) -> char {
    let mut value = first.to_digit(8).unwrap_or_default();
    for _ in 0..2 {
        match letters.peek().and_then(|letter| letter.to_digit(8)) {
            Some(digit) => {
                value = value * 8 + digit;
                letters.next();
            }
            None => break,
        }
    }
    char::from_u32(value).unwrap_or_default()
}

fn hex(kind: char, digits: usize, letters: &mut Letters<'_>) -> Result<u32, String> {
    let mut value = 0u32;
    for _ in 0..digits {
        let digit = letters.peek().and_then(|letter| letter.to_digit(16));
        let digit = digit.ok_or_else(|| format!("`\\{kind}` without {digits} hexadecimal digits"))?;
        value = value.wrapping_mul(16).wrapping_add(digit);
        letters.next();
    }
    Ok(value)
}

fn character(code: u32) -> Result<char, String> {
    char::from_u32(code).ok_or_else(|| format!("`{code:#x}` is no character"))
}

/// `\uhhhh`, or two of them that make up one character.
fn utf16(letters: &mut Letters<'_>) -> Result<char, String> {
    let first = hex('u', 4, letters)?;
    if !(0xd800..0xdc00).contains(&first) {
        return character(first);
    }
    let mut ahead = letters.clone();
    if ahead.next() == Some('\\') && ahead.next() == Some('u') {
        let second = hex('u', 4, &mut ahead)?;
        if (0xdc00..0xe000).contains(&second) {
            *letters = ahead;
            return character(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00));
        }
    }
    Err(format!("`\\u{first:04x}` is half a character"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_pythons() {
        for (text, wanted) in [
            (r"<|user|>\n{prompt}<|end|>", "<|user|>\n{prompt}<|end|>"),
            (r"a\tb\\n\'\q", "a\tb\\n'\\q"),
            (r"\x41\u00e9\U0001F600\ud83d\ude00", "Aé😀😀"),
            (r"\101\0\7779", "A\0\u{1ff}9"),
            ("é\\\nü", "éü"),
            ("", ""),
        ] {
            assert_eq!(decode_escapes(text).as_deref(), Ok(wanted), "{text}");
        }
        for bad in [
            r"\",
            r"\x4",
            r"\u12",
            r"\ud83d",
            r"\ud83d\u0041",
            r"\UFFFFFFFF",
            r"\N{DASH}",
        ] {
            assert!(decode_escapes(bad).is_err(), "{bad}");
        }
    }
}
