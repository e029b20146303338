//! From what a user calls a model to a folder on disk: a folder, or a model of the Hugging Face hub.
//!
//! The network is touched for a remote name only: one that is no path of this machine and does not look like one.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::progress::Progress;

/// What a model reference means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// A folder or file of this machine.
    Local(PathBuf),
    /// `org/name` of the Hugging Face hub.
    Hub(String),
}

impl Reference {
    /// Reads a reference: something that exists on disk, `azureml://…` (refused), `https://huggingface.co/org/name`,
    /// or `org/name`. Touches the disk only.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model of Azure ML; [`Error::File`] for a path where nothing is.
    pub fn parse(text: &str) -> Result<Self> {
        let path = Path::new(text);
        if path.exists() {
            return Ok(Self::Local(path.to_path_buf()));
        }
        if text.starts_with("azureml:") {
            return Err(Error::unsupported(
                format!("model `{text}` of Azure ML"),
                "download its folder (`az ml model download`) and name that",
            ));
        }
        if let Some(rest) = text.strip_prefix("https://huggingface.co/") {
            let name: Vec<&str> = rest.trim_end_matches('/').splitn(3, '/').take(2).collect();
            return match name.as_slice() {
                [org, model] if is_hub_part(org) && is_hub_part(model) => {
                    Ok(Self::Hub(format!("{org}/{model}")))
                }
                _ => Err(Error::file(
                    path,
                    "`https://huggingface.co/org/name`",
                    "another address",
                )),
            };
        }
        match text.split_once('/') {
            // In a folder that is there, a name is a path with a typing error, not a model of the hub.
            Some((org, model)) if is_hub_part(org) && is_hub_part(model) && !Path::new(org).is_dir() => {
                Ok(Self::Hub(text.to_owned()))
            }
            _ => Err(Error::file(
                path,
                "a model folder or `org/name`",
                "no such folder",
            )),
        }
    }
}

/// Letters, digits, `-`, `_` and `.`, not at the beginning.
fn is_hub_part(part: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    part.starts_with(|c: char| c.is_ascii_alphanumeric()) && part.len() <= 96 && part.chars().all(letter)
}

/// The folder of a model reference, downloaded if it is a remote one.
///
/// # Errors
/// Those of [`Reference::parse`]; [`Error::Unsupported`] where a download is needed and not built in or not
/// possible.
pub fn resolve(text: &str, progress: &dyn Progress) -> Result<PathBuf> {
    match Reference::parse(text)? {
        Reference::Local(path) => Ok(path),
        Reference::Hub(name) => download(&name, progress),
    }
}

#[cfg(not(feature = "hub"))]
fn download(name: &str, _progress: &dyn Progress) -> Result<PathBuf> {
    let reason = "downloads are not built in (feature `hub`); name a folder";
    Err(Error::unsupported(format!("model `{name}` of the hub"), reason))
}

/// The files of a repository that olive reads; files of other frameworks stay where they are.
#[cfg(any(feature = "hub", test))]
fn is_wanted(file: &str) -> bool {
    let flat = !file.contains('/');
    let named = [
        "tokenizer.model",
        "merges.txt",
        "vocab.json",
        "chat_template.jinja",
    ]
    .contains(&file);
    flat && (named || file.ends_with(".json") || file.ends_with(".safetensors"))
}

#[cfg(feature = "hub")]
fn download(name: &str, progress: &dyn Progress) -> Result<PathBuf> {
    use hf_hub::api::sync::ApiBuilder;

    let failed = |error: hf_hub::api::sync::ApiError| {
        let reason = format!("no folder of that name exists, and the hub did not deliver it: {error}");
        Error::unsupported(format!("model `{name}`"), reason)
    };
    let api = ApiBuilder::from_env()
        .with_progress(false)
        .build()
        .map_err(failed)?;
    let repository = api.model(name.to_owned());
    let files: Vec<String> = repository
        .info()
        .map_err(failed)?
        .siblings
        .into_iter()
        .map(|file| file.rfilename)
        .filter(|file| is_wanted(file))
        .collect();
    if !files.iter().any(|file| file.ends_with(".safetensors")) {
        return Err(Error::unsupported(
            format!("model `{name}` of the hub"),
            "it has no safetensors",
        ));
    }
    progress.start(&format!("download {name}"), files.len() as u64);
    let mut folder = None;
    for (done, file) in files.iter().enumerate() {
        let path = repository.get(file).map_err(failed)?;
        folder = path.parent().map(Path::to_path_buf);
        progress.update(done as u64 + 1, file);
    }
    progress.finish();
    folder.ok_or_else(|| Error::unsupported(format!("model `{name}` of the hub"), "it has no files"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remote_names_are_told_from_paths() {
        let here = tempfile::tempdir().unwrap();
        let folder = here.path().to_str().unwrap().to_owned();
        assert_eq!(
            Reference::parse(&folder).unwrap(),
            Reference::Local(here.path().to_path_buf())
        );
        for (text, name) in [
            (
                "microsoft/Phi-3.5-mini-instruct",
                "microsoft/Phi-3.5-mini-instruct",
            ),
            ("https://huggingface.co/org/name", "org/name"),
            ("https://huggingface.co/org/name/tree/main", "org/name"),
        ] {
            assert_eq!(
                Reference::parse(text).unwrap(),
                Reference::Hub(name.to_owned()),
                "{text}"
            );
        }
        for bad in [
            "models/phi/awq",
            "./models/phi",
            "/models/phi",
            "../x",
            "phi",
            "src/none",
            "a/b c",
            "org/",
            "",
        ] {
            let error = Reference::parse(bad).unwrap_err().to_string();
            assert!(error.contains("no such folder"), "{bad}: {error}");
        }
        let error = Reference::parse("azureml://registries/azureml/models/Phi/versions/4").unwrap_err();
        assert!(error.to_string().contains("Azure ML"), "{error}");
    }

    #[test]
    fn only_files_that_are_read_are_fetched() {
        for file in [
            "config.json",
            "model-00001-of-00002.safetensors",
            "tokenizer.model",
            "chat_template.jinja",
        ] {
            assert!(is_wanted(file), "{file}");
        }
        for file in [
            "pytorch_model.bin",
            "onnx/model.onnx",
            "README.md",
            "original/params.json",
        ] {
            assert!(!is_wanted(file), "{file}");
        }
    }
}
