//! Hugging Face's split notation: `train`, `train[:100]`, `train[10%:20%]`, `train[-50:]`.

use std::ops::Range;

use crate::error::{Error, Result};

/// A split's name and the part of it that is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Split {
    /// The name before the bracket.
    pub(super) name: String,
    from: Option<Bound>,
    to: Option<Bound>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bound {
    Rows(i64),
    Percent(i64),
}

impl Split {
    /// Parses the notation.
    ///
    /// # Errors
    /// [`Error::Config`] naming `split`.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let wrong = || {
            let expected = "a split such as `train`, `train[:100]` or `train[10%:20%]`";
            Error::config("data", "split", expected, format!("`{text}`"))
        };
        let Some((name, rest)) = text.split_once('[') else {
            return Ok(Self {
                name: text.to_owned(),
                from: None,
                to: None,
            });
        };
        let inside = rest.strip_suffix(']').ok_or_else(wrong)?;
        let (from, to) = inside.split_once(':').ok_or_else(wrong)?;
        let bound = |text: &str| -> Result<Option<Bound>> {
            if text.is_empty() {
                return Ok(None);
            }
            let bound = match text.strip_suffix('%') {
                Some(percent) => percent
                    .parse()
                    .ok()
                    .filter(|p| (-100..=100).contains(p))
                    .map(Bound::Percent),
                None => text.parse().ok().map(Bound::Rows),
            };
            bound.map(Some).ok_or_else(wrong)
        };
        Ok(Self {
            name: name.to_owned(),
            from: bound(from.trim())?,
            to: bound(to.trim())?,
        })
    }

    /// The rows of a data set with `count` rows. Percentages are rounded to the nearest row, half to even.
    pub(super) fn rows(&self, count: usize) -> Range<usize> {
        let place = |bound: Option<Bound>, absent: usize| {
            let rows = match bound {
                None => return absent,
                Some(Bound::Rows(rows)) => rows,
                Some(Bound::Percent(percent)) => {
                    (percent as f64 * count as f64 / 100.0).round_ties_even() as i64
                }
            };
            let rows = if rows < 0 { rows + count as i64 } else { rows };
            rows.clamp(0, count as i64) as usize
        };
        let from = place(self.from, 0);
        from..place(self.to, count).max(from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_those_of_hugging_face() {
        for (text, count, rows) in [
            ("train", 10, 0..10),
            ("train[:4]", 10, 0..4),
            ("train[4:]", 10, 4..10),
            ("train[-3:]", 10, 7..10),
            ("train[:80%]", 289, 0..231),
            ("train[80%:]", 289, 231..289),
            ("train[5:2]", 10, 5..5),
            ("train[:100]", 10, 0..10),
        ] {
            assert_eq!(Split::parse(text).unwrap().rows(count), rows, "{text}");
        }
        for bad in ["train[", "train[5]", "train[a:]", "train[:200%]"] {
            assert!(Split::parse(bad).is_err(), "{bad}");
        }
    }
}
