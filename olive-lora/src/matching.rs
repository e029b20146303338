//! Which linears an adapter changes: the matching rules of PEFT.
//!
//! A list of targets matches a module whose path equals a name or ends with `.name`; one text is a regular expression
//! that must match the whole path, or `all-linear`. Patterns of ranks and alphas match at the end of a path, after a
//! dot or at its start.

use olive_core::{Error, LinearSpec, ModelSpec, Result};
use regex::Regex;
use serde::{Deserialize, Serialize};

/// Names of modules: a list, or one regular expression.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Targets {
    /// Paths, or their ends.
    Names(Vec<String>),
    /// A regular expression for the whole path, or `all-linear`.
    Pattern(String),
}

impl Targets {
    /// Targets from the text of a command line: names separated by commas, or `all-linear`.
    pub fn from_text(text: &str) -> Self {
        if text.eq_ignore_ascii_case("all-linear") {
            return Self::Pattern(text.to_owned());
        }
        let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
        Self::Names(names.map(str::to_owned).collect())
    }

    fn matcher(&self, key: &'static str) -> Result<Matcher> {
        match self {
            Self::Names(names) => Ok(Matcher::Names(names.clone())),
            Self::Pattern(text) if text.eq_ignore_ascii_case("all-linear") => Ok(Matcher::All),
            Self::Pattern(text) => Ok(Matcher::Whole(compile(key, text, &format!("^(?:{text})$"))?)),
        }
    }
}

enum Matcher {
    All,
    Names(Vec<String>),
    Whole(Regex),
}

impl Matcher {
    fn matches(&self, path: &str) -> bool {
        match self {
            Self::All => true,
            Self::Names(names) => names.iter().any(|name| ends_with_name(path, name)),
            Self::Whole(pattern) => pattern.is_match(path),
        }
    }
}

fn ends_with_name(path: &str, name: &str) -> bool {
    path == name
        || path
            .strip_suffix(name)
            .is_some_and(|before| before.ends_with('.'))
}

fn compile(key: &'static str, text: &str, pattern: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|error| {
        // The crate reports several lines; its last one says what is wrong.
        let reason = error
            .to_string()
            .lines()
            .last()
            .unwrap_or_default()
            .trim()
            .to_owned();
        Error::config(
            "adapter config",
            key,
            "a regular expression",
            format!("`{text}` ({reason})"),
        )
    })
}

/// Values by regular expression; the first that matches the end of a path counts.
pub(crate) struct PatternMap<T> {
    entries: Vec<(Regex, T)>,
}

impl<T: Copy> PatternMap<T> {
    pub fn new<'a>(key: &'static str, patterns: impl IntoIterator<Item = (&'a String, T)>) -> Result<Self> {
        let entries = patterns
            .into_iter()
            .map(|(text, value)| Ok((compile(key, text, &format!(r"^(?:.*\.)?(?:{text})$"))?, value)))
            .collect::<Result<_>>()?;
        Ok(Self { entries })
    }

    pub fn get(&self, path: &str) -> Option<T> {
        let entry = self.entries.iter().find(|(pattern, _)| pattern.is_match(path));
        entry.map(|(_, value)| *value)
    }
}

/// The linears of a model that an adapter changes, in the order of the forward pass, each with its layer.
///
/// # Errors
/// [`Error::Config`] for an invalid expression, or targets that match nothing; the modules there are named.
pub fn matched_linears(
    spec: &ModelSpec,
    targets: &Targets,
    exclude: Option<&Targets>,
    layers: Option<&[usize]>,
) -> Result<Vec<(usize, LinearSpec)>> {
    let wanted = targets.matcher("target_modules")?;
    let unwanted = exclude.map(|e| e.matcher("exclude_modules")).transpose()?;
    let mut matched = Vec::new();
    for layer in 0..spec.n_layers {
        if layers.is_some_and(|layers| !layers.contains(&layer)) {
            continue;
        }
        for linear in spec.linears(layer) {
            let excluded = unwanted.as_ref().is_some_and(|u| u.matches(&linear.name));
            if !excluded && wanted.matches(&linear.name) {
                matched.push((layer, linear));
            }
        }
    }
    let names: Vec<String> = spec
        .linears(0)
        .iter()
        .map(|linear| linear.name.rsplit('.').next().unwrap_or_default().to_owned())
        .collect();
    let unused = match targets {
        // A target that names nothing is a spelling mistake or another architecture's module.
        Targets::Names(list) => list
            .iter()
            .find(|name| {
                !matched
                    .iter()
                    .any(|(_, linear)| ends_with_name(&linear.name, name))
            })
            .cloned(),
        Targets::Pattern(text) => matched.is_empty().then(|| text.clone()),
    };
    match unused {
        None if !matched.is_empty() => Ok(matched),
        unused => {
            let expected = format!("modules of the model: {}", names.join(", "));
            let found = unused.unwrap_or_else(|| "none".to_owned());
            Err(Error::config("adapter config", "target_modules", expected, found))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(family: &str) -> ModelSpec {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/golden/peft")
            .join(family);
        olive_core::arch::read_spec(&folder).unwrap()
    }

    fn names(family: &str, targets: &Targets, exclude: Option<&Targets>) -> Vec<String> {
        let matched = matched_linears(&spec(family), targets, exclude, None).unwrap();
        matched.into_iter().map(|(_, linear)| linear.name).collect()
    }

    #[test]
    fn names_patterns_and_all_linear_match_as_in_peft() {
        let layer = "model.layers.1.self_attn";
        let list = Targets::from_text("q_proj, v_proj");
        assert_eq!(names("llama", &list, None).len(), 4);
        assert_eq!(
            names(
                "llama",
                &Targets::Names(vec![format!("{layer}.q_proj"), "down_proj".into()]),
                None
            )
            .len(),
            3
        );
        let pattern = Targets::Pattern(r".*\.1\..*_proj".into());
        assert_eq!(names("llama", &pattern, None).len(), 7);
        let all = Targets::from_text("all-linear");
        assert_eq!(names("phi3", &all, None).len(), 8);
        assert_eq!(names("phi3", &all, Some(&Targets::from_text("o_proj"))).len(), 6);
    }

    #[test]
    fn what_matches_nothing_is_refused_by_name() {
        for targets in [
            Targets::from_text("qkv_proj,proj"),
            Targets::Pattern("q_proj".into()),
            Targets::Names(vec![]),
            Targets::Pattern("(".into()),
        ] {
            let error = matched_linears(&spec("phi3"), &targets, None, None).unwrap_err();
            assert!(error.to_string().contains("target_modules"), "{error}");
        }
    }

    #[test]
    fn the_first_pattern_that_fits_the_end_counts() {
        let patterns = [("1.self_attn.q_proj".to_owned(), 4), ("q_proj".to_owned(), 2)];
        let map = PatternMap::new("rank_pattern", patterns.iter().map(|(k, v)| (k, *v))).unwrap();
        assert_eq!(map.get("model.layers.1.self_attn.q_proj"), Some(4));
        assert_eq!(map.get("model.layers.0.self_attn.q_proj"), Some(2));
        assert_eq!(map.get("model.layers.0.self_attn.xq_proj"), None);
    }
}
