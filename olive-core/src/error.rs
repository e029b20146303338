//! The error type of the crate. Every variant says which file, tensor, node or key was wrong, what was expected
//! and what was found.

use std::path::{Path, PathBuf};

/// Shorthand for a result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong while reading, checking or writing models, data and configs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file system operation failed.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// What was tried, as a verb: "read", "create", "rename".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A file is not what its name or place promises.
    #[error("`{}`: expected {expected}, found {found}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        expected: String,
        /// What it holds.
        found: String,
    },
    /// A file is not valid JSON or lacks a field.
    #[error("`{}`: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's answer, with line and column.
        source: serde_json::Error,
    },
    /// A tensor has the wrong shape, dtype or contents.
    #[error("tensor `{name}`: expected {expected}, found {found}")]
    Tensor {
        /// The tensor's name.
        name: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A checkpoint lacks tensors that its config promises.
    #[error("`{}` lacks {} tensor(s): {}", path.display(), names.len(), preview(names))]
    MissingTensors {
        /// The checkpoint.
        path: PathBuf,
        /// All that are missing.
        names: Vec<String>,
    },
    /// A checkpoint holds tensors that no part of the model reads.
    #[error("`{}` has {} tensor(s) that the model does not use: {}", path.display(), names.len(), preview(names))]
    UnknownTensors {
        /// The checkpoint.
        path: PathBuf,
        /// All that are unknown.
        names: Vec<String>,
    },
    /// A key of a config (or a flag) has a wrong value.
    #[error("{origin}: `{key}`: expected {expected}, found {found}")]
    Config {
        /// The file or command that holds the key.
        origin: String,
        /// The key, dotted from the top.
        key: String,
        /// What is allowed.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A key is not known.
    #[error("{origin}: unknown key `{key}`{}", nearest.as_ref().map(|n| format!(", did you mean `{n}`?")).unwrap_or_default())]
    UnknownKey {
        /// The file or command that holds the key.
        origin: String,
        /// The key, dotted from the top.
        key: String,
        /// The nearest known name, if one is near.
        nearest: Option<String>,
    },
    /// Something valid that olive does not do.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// The model family, option, layout, …
        what: String,
        /// Why, and what would work.
        reason: String,
    },
    /// A computation met a value that is not finite.
    #[error("{what}: {found} non-finite value(s)")]
    NotFinite {
        /// The tensor or the place.
        what: String,
        /// How many.
        found: usize,
    },
    /// The run was interrupted; what was finished is kept.
    #[error("interrupted; run the same command again to continue")]
    Cancelled,
    /// A stage of another crate failed.
    #[error("{stage}: {source}")]
    Stage {
        /// The pass or stage.
        stage: String,
        /// Its error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// An [`Error::Io`] for `path`; for use with `map_err`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { action, path, source }
    }

    /// An [`Error::Json`] for `path`; for use with `map_err`.
    pub fn json(path: impl AsRef<Path>) -> impl FnOnce(serde_json::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Json { path, source }
    }

    /// An [`Error::File`].
    pub fn file(path: impl AsRef<Path>, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::File {
            path: path.as_ref().to_path_buf(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// An [`Error::Tensor`].
    pub fn tensor(name: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Tensor {
            name: name.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// An [`Error::Config`].
    pub fn config(
        origin: impl Into<String>,
        key: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Config {
            origin: origin.into(),
            key: key.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// An [`Error::UnknownKey`] with the nearest of `known`.
    pub fn unknown_key<'a>(
        origin: impl Into<String>,
        key: impl Into<String>,
        known: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let key = key.into();
        let last = key.rsplit('.').next().unwrap_or(&key);
        let nearest = nearest_name(last, known);
        Self::UnknownKey {
            origin: origin.into(),
            key,
            nearest,
        }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported {
            what: what.into(),
            reason: reason.into(),
        }
    }

    /// An [`Error::Stage`] around another crate's error; for use with `map_err`.
    pub fn stage<E>(stage: impl Into<String>) -> impl FnOnce(E) -> Self
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let stage = stage.into();
        move |source| Self::Stage {
            stage,
            source: Box::new(source),
        }
    }

    /// Whether the call itself was wrong (a flag, a config key), as opposed to a run that failed.
    /// The command line exits with 2 for the former and 1 for the latter.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Config { .. } | Self::UnknownKey { .. })
    }
}

/// The name of `known` that is nearest to `name`, if one is near enough to be meant.
pub fn nearest_name<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    known
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(score, _)| *score >= 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate.to_owned())
}

/// The first few names, for an error message.
fn preview(names: &[String]) -> String {
    const SHOWN: usize = 6;
    let mut text = names
        .iter()
        .take(SHOWN)
        .map(|n| format!("`{n}`"))
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}
