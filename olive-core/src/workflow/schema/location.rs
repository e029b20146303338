//! Where a model or a file is: here, on the hub, or in Azure.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

/// Something kept in Azure Machine Learning.
#[derive(Debug, Clone, PartialEq)]
pub struct AzureResource {
    /// `azureml_registry_model`, `azureml_model`, `azureml_datastore` or `azureml_job_output`.
    pub kind: String,
    /// Its other keys.
    pub fields: Map<String, Value>,
}

impl AzureResource {
    /// What it is and what fetching it needs, for an error message.
    pub fn need(&self) -> String {
        let text = |key: &str| self.fields.get(key).and_then(Value::as_str).unwrap_or("?");
        match self.kind.as_str() {
            "azureml_registry_model" => format!(
                "the model `{}` version {} of the registry `{}`; download it \
                 (`az ml model download --registry-name {} --name {} --version {}`) and give its folder",
                text("name"),
                text("version"),
                text("registry_name"),
                text("registry_name"),
                text("name"),
                text("version"),
            ),
            "azureml_model" => format!(
                "the model `{}` version {} of a workspace; download it (`az ml model download`) and give its folder",
                text("name"),
                text("version")
            ),
            "azureml_datastore" => format!(
                "`{}` of the datastore `{}`; copy it here (`az storage blob download` or azcopy) and give its path",
                text("relative_path"),
                text("datastore_name")
            ),
            _ => format!(
                "the output `{}` of the job `{}`; download it (`az ml job download`) and give its path",
                text("output_name"),
                text("job_name")
            ),
        }
    }
}

/// Where something is.
#[derive(Debug, Clone, PartialEq)]
pub enum Location {
    /// A file or folder here, absolute or relative to the working folder.
    Local(PathBuf),
    /// A repository of the Hugging Face hub, `org/name`.
    Hub(String),
    /// Kept in Azure.
    Azure(AzureResource),
}

impl Location {
    /// Reads a path of a config: text, or an object that describes a resource. `folder` is what relative paths are
    /// relative to. Text that names nothing here and looks like `org/name` or `name` is a hub repository.
    pub(super) fn read(value: &Value, folder: &Path) -> Option<Self> {
        match value {
            Value::String(text) => Some(Self::from_text(text, folder)),
            Value::Object(object) => {
                let kind = object.get("type").and_then(Value::as_str).unwrap_or_default();
                if kind.starts_with("azureml_") {
                    let mut fields = object.clone();
                    fields.shift_remove("type");
                    return Some(Self::Azure(AzureResource {
                        kind: kind.to_owned(),
                        fields,
                    }));
                }
                let path = object.get("path").or_else(|| object.get("name"))?.as_str()?;
                if kind == "string_name" {
                    return Some(Self::Hub(path.to_owned()));
                }
                Some(Self::Local(resolve(folder, path)))
            }
            _ => None,
        }
    }

    fn from_text(text: &str, folder: &Path) -> Self {
        if let Some(resource) = registry_url(text) {
            return Self::Azure(resource);
        }
        for host in ["https://huggingface.co/", "http://huggingface.co/"] {
            if let Some(name) = text.strip_prefix(host) {
                return Self::Hub(name.trim_end_matches('/').to_owned());
            }
        }
        let path = resolve(folder, text);
        if path.exists() || !looks_like_repository(text) {
            Self::Local(path)
        } else {
            Self::Hub(text.to_owned())
        }
    }

    /// The path, if it is here.
    pub fn local(&self) -> Option<&Path> {
        match self {
            Self::Local(path) => Some(path),
            _ => None,
        }
    }
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Local(path) => write!(f, "{}", path.display()),
            Self::Hub(name) => write!(f, "{name} (hub)"),
            Self::Azure(resource) => write!(f, "{}", resource.kind),
        }
    }
}

/// `azureml://registries/<registry>/models/<name>/versions/<version>`.
fn registry_url(text: &str) -> Option<AzureResource> {
    let rest = text.strip_prefix("azureml:")?;
    let parts: Vec<&str> = rest.trim_start_matches('/').split('/').collect();
    let mut fields = Map::new();
    let kind = match parts.as_slice() {
        ["registries", registry, "models", name, "versions", version] => {
            fields.insert("registry_name".to_owned(), Value::from(*registry));
            fields.insert("name".to_owned(), Value::from(*name));
            fields.insert("version".to_owned(), Value::from(*version));
            "azureml_registry_model"
        }
        _ => {
            let (name, version) = rest.rsplit_once(':').unwrap_or((rest, "latest"));
            fields.insert("name".to_owned(), Value::from(name));
            fields.insert("version".to_owned(), Value::from(version));
            "azureml_model"
        }
    };
    Some(AzureResource {
        kind: kind.to_owned(),
        fields,
    })
}

/// Joins a relative path to the folder of the file that names it.
pub(super) fn resolve(folder: &Path, text: &str) -> PathBuf {
    let path = Path::new(text);
    if path.is_absolute() || folder == Path::new(".") {
        path.to_path_buf()
    } else {
        folder.join(path)
    }
}

fn looks_like_repository(text: &str) -> bool {
    let file = [
        ".onnx",
        ".json",
        ".pt",
        ".pth",
        ".bin",
        ".safetensors",
        ".gguf",
        ".xml",
    ];
    let parts: Vec<&str> = text.split('/').collect();
    let plain = |part: &&str| {
        !part.is_empty()
            && **part != *"."
            && **part != *".."
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
    };
    parts.len() <= 2 && parts.iter().all(plain) && !file.iter().any(|end| text.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_told_apart() {
        let folder = Path::new("/nowhere");
        let read = |text: &str| Location::read(&Value::from(text), folder).unwrap();
        assert_eq!(
            read("microsoft/phi-2"),
            Location::Hub("microsoft/phi-2".to_owned())
        );
        assert_eq!(
            read("https://huggingface.co/org/name"),
            Location::Hub("org/name".to_owned())
        );
        assert_eq!(read("models/a/b"), Location::Local("/nowhere/models/a/b".into()));
        assert_eq!(read("./phi"), Location::Local("/nowhere/./phi".into()));
        assert_eq!(
            read("x/model.onnx"),
            Location::Local("/nowhere/x/model.onnx".into())
        );
        let url = "azureml://registries/azureml/models/Phi-3/versions/7";
        let Location::Azure(resource) = read(url) else {
            panic!("{url}");
        };
        assert!(resource.need().contains("`Phi-3` version 7"));
    }
}
